"""Where our own brokers differ from the defaults, so that a lesson takes seconds; the same in every local provider."""

from __future__ import annotations

KAFKA: dict[str, str] = {
    # A typing error in a topic's name is an error, and lag monitoring never makes a topic.
    "auto.create.topics.enable": "false",
    # One node can hold one replica.
    "offsets.topic.num.partitions": "1",
    "transaction.state.log.num.partitions": "1",
    "share.coordinator.state.topic.num.partitions": "1",
    # Waiting times that a reader would otherwise sit through.
    "group.initial.rebalance.delay.ms": "0",
    "group.min.session.timeout.ms": "500",
    "group.consumer.min.heartbeat.interval.ms": "200",
    "group.consumer.heartbeat.interval.ms": "300",
    "group.consumer.min.session.timeout.ms": "1000",
    "group.consumer.session.timeout.ms": "3000",
    "group.share.min.record.lock.duration.ms": "1000",
    "log.retention.check.interval.ms": "500",
    "log.initial.task.delay.ms": "200",
    "log.cleaner.backoff.ms": "100",
    "log.segment.delete.delay.ms": "100",  # with 0 Kafka looks for what it can delete thousands of times a second
    "transaction.abort.timed.out.transaction.cleanup.interval.ms": "300",
    "broker.session.timeout.ms": "1500",
    "broker.heartbeat.interval.ms": "300",
}

RABBITMQ: dict[str, str] = {
    "loopback_users": "none",  # we bind to loopback; in a container the client comes from the bridge's address
    "collect_statistics_interval": "1000",
    # What a queue holds is sampled at the shortest of these intervals (default: 5 s).
    "management.sample_retention_policies.global.minute": "1",
    "management.sample_retention_policies.basic.minute": "1",
    "management.sample_retention_policies.detailed.10": "1",
    "log.console": "true",
    "log.console.level": "info",
    "log.console.use_colors": "off",  # it believes a file to be a terminal
    "log.file": "false",
}

RABBITMQ_PLUGINS = (
    "rabbitmq_management", "rabbitmq_prometheus", "rabbitmq_consistent_hash_exchange", "rabbitmq_random_exchange",
    "rabbitmq_recent_history_exchange", "rabbitmq_event_exchange", "rabbitmq_shovel", "rabbitmq_federation",
    "rabbitmq_stream",
)  # fmt: skip

# Application settings that rabbitmq.conf has no key for: how soon an acknowledgement timeout and a dead-letter
# worker's missing confirm are noticed (defaults: 60 s and 180 s).
RABBITMQ_ERLANG_ARGUMENTS = (
    "-rabbit channel_tick_interval 500 -rabbit dead_letter_worker_publisher_confirm_timeout 1000 +S 2:2 +sbwt none"
)


def kafka_replication(nodes: int) -> dict[str, str]:
    """Replication of Kafka's own topics for a cluster of `nodes`."""
    factor, in_sync = str(min(nodes, 3)), str(max(1, min(nodes, 3) - 1))
    return {
        "offsets.topic.replication.factor": factor,
        "transaction.state.log.replication.factor": factor,
        "transaction.state.log.min.isr": in_sync,
        "share.coordinator.state.topic.replication.factor": factor,
        "share.coordinator.state.topic.min.isr": in_sync,
        "default.replication.factor": factor,
    }
