"""What the settings of our own brokers must not do to the machine."""

from __future__ import annotations

from mqlib.brokers.settings import KAFKA

PAUSES = (".delay.ms", ".interval.ms", ".backoff.ms")
ONCE = {"group.initial.rebalance.delay.ms", "log.initial.task.delay.ms"}


def test_what_kafka_does_again_and_again_has_a_pause() -> None:
    """Without one its threads never rest: a delay of 0 before segments are deleted made 3,600 rounds a second of it."""
    repeated = {name: int(value) for name, value in KAFKA.items() if name.endswith(PAUSES)}
    assert {name: pause for name, pause in repeated.items() if name not in ONCE and pause < 100} == {}
    assert set(repeated) >= ONCE
