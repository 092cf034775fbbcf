#!/usr/bin/env bash
# The official image's contract: started as root, the server runs as the user rabbitmq, who owns the data.
set -euo pipefail

if [[ ${1-} == rabbitmq* && $(id -u) == 0 ]]; then
  if [[ $1 == rabbitmq-server ]]; then
    find /var/lib/rabbitmq \! -user rabbitmq -exec chown rabbitmq '{}' +
  fi
  exec setpriv --reuid=rabbitmq --regid=rabbitmq --init-groups "$BASH_SOURCE" "$@"
fi

# The official image refuses the settings that RabbitMQ no longer reads, so that nobody relies on them in vain.
for old in DEFAULT_PASS_FILE DEFAULT_USER_FILE ERLANG_COOKIE_FILE HIPE_COMPILE VM_MEMORY_HIGH_WATERMARK; do
  name=RABBITMQ_$old
  if [[ -n ${!name-} ]]; then
    echo "error: $name is set but deprecated: use a configuration file instead" >&2
    exit 1
  fi
done

# A host name with a domain needs Erlang's long node names.
if [[ $(hostname) != "$(hostname -s)" ]]; then
  export RABBITMQ_USE_LONGNAME=${RABBITMQ_USE_LONGNAME:-true}
fi

exec "$@"
