#!/usr/bin/env bash
# Starts the broker; the heap and the log configuration differ from a tool's.
if [[ $# -lt 1 ]]; then
  echo "USAGE: $0 server.properties [--override property=value]*" >&2
  exit 1
fi
export KAFKA_LOG4J_OPTS=${KAFKA_LOG4J_OPTS:--Dlog4j2.configurationFile=/opt/kafka/config/log4j2.yaml}
export KAFKA_HEAP_OPTS=${KAFKA_HEAP_OPTS:--Xmx1G -Xms1G}
if [[ -n ${KAFKA_JMX_PORT-} ]]; then
  export JMX_PORT=$KAFKA_JMX_PORT
  export KAFKA_JMX_OPTS="${KAFKA_JMX_OPTS-} -Djava.rmi.server.hostname=${KAFKA_JMX_HOSTNAME:-$(hostname -i)}"
fi
exec /opt/kafka/bin/kafka-run-class.sh kafka.Kafka "$@"
