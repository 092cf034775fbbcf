"""Every image tag and artifact version of the project, here and nowhere else."""

KAFKA_VERSION = "4.3.1"
KAFKA_IMAGE = "apache/kafka:4.3.1"
RABBITMQ_IMAGE = "rabbitmq:4.0.5-management"

# `kafka-clients` and `log4j-core` are named although they are dependencies of the first: left to itself the resolver
# takes an older `kafka-clients` from a dependency's dependency management, and the broker then fails at run time.
KAFKA_ARTIFACTS = (
    f"org.apache.kafka:kafka_2.13:{KAFKA_VERSION}",
    f"org.apache.kafka:kafka-clients:{KAFKA_VERSION}",
    "org.apache.logging.log4j:log4j-slf4j-impl:2.25.3",
    "org.apache.logging.log4j:log4j-core:2.25.3",
)

KAFKA_TOOLS_ARTIFACT = f"org.apache.kafka:kafka-tools:{KAFKA_VERSION}"
"""Kafka's command-line tools, to check and to compare with."""
