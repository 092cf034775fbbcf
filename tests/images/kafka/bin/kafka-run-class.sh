#!/usr/bin/env bash
# Runs a class of Kafka's jars with the options that Kafka's own script takes from the environment.
kafka=/opt/kafka
export LOG_DIR=${LOG_DIR:-$kafka/logs}
if [[ ${1-} == -daemon || ${1-} == -name || ${1-} == -loggc ]]; then
  echo "$0: $1 is not offered by this stand-in image" >&2
  exit 1
fi
if [[ -n ${JMX_PORT-} && ${KAFKA_JMX_OPTS-} != *jmxremote.port* ]]; then
  KAFKA_JMX_OPTS="${KAFKA_JMX_OPTS-} -Dcom.sun.management.jmxremote=true \
    -Dcom.sun.management.jmxremote.authenticate=false -Dcom.sun.management.jmxremote.ssl=false \
    -Dcom.sun.management.jmxremote.port=$JMX_PORT"
fi
: "${KAFKA_HEAP_OPTS:=-Xmx256M}"
: "${KAFKA_LOG4J_OPTS:=-Dlog4j2.configurationFile=$kafka/config/tools-log4j2.yaml}"
: "${KAFKA_JVM_PERFORMANCE_OPTS:=-server -XX:+UseG1GC -XX:MaxGCPauseMillis=20 -Djava.awt.headless=true}"
# The options are lists of words, hence no quotes.
# shellcheck disable=SC2086
exec java $KAFKA_HEAP_OPTS $KAFKA_JVM_PERFORMANCE_OPTS ${KAFKA_GC_LOG_OPTS-} ${KAFKA_JMX_OPTS-} \
  -Dkafka.logs.dir="$LOG_DIR" $KAFKA_LOG4J_OPTS -cp "${CLASSPATH:+$CLASSPATH:}$kafka/libs/*" ${KAFKA_OPTS-} "$@"
