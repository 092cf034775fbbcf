"""The table of guarantees in small: what must hold, whatever the timing. (Notebook 10 runs it in full.)"""

from __future__ import annotations

from pathlib import Path

import pytest

import mqlib as mq
from mqlib.experiments.guarantees import CRASHES, FAULTS, MODES, Cell, database, left, note
from mqlib.experiments.table import Experiment


async def test_each_mode_keeps_its_promise_through_each_fault(
    kafka: mq.Kafka, rabbit: mq.RabbitMQ, tmp_path: Path
) -> None:
    with mq.kafka(private=True) as own_kafka, mq.rabbitmq(private=True) as own_rabbit:
        table = await Experiment(kafka, rabbit, own_kafka, own_rabbit, tmp_path, messages=300, batch=50).run()
    assert len(table) == len(MODES) * len(FAULTS)

    def sums(mode: str) -> tuple[int, int]:
        row = [table[mode, fault] for fault in FAULTS]
        return sum(cell.lost for cell in row), sum(cell.duplicated for cell in row)

    lost, duplicated = sums("fire and forget")
    assert lost >= 3 * 50
    assert duplicated == 0
    for mode in ("confirms", "acks=all", "idempotent"):
        lost, duplicated = sums(mode)
        assert (lost, duplicated > 0) == (0, True), mode
    for mode in ("transactional", "outbox + inbox"):
        assert sums(mode) == (0, 0), mode
    assert table["acks=all", "lost response"].duplicated > 0 == table["idempotent", "lost response"].duplicated
    for mode in ("confirms", "acks=all", "idempotent"):
        assert table[mode, CRASHES[2]].duplicated == 50, "the batch that was stored and not noted is sent again"


def cell_at(path: Path, fault: str) -> Cell:
    return Cell("confirms", fault, "rabbit", 30, 10, str(path / "cell.db"), "place", "queue", "group", "source")


def test_what_is_noted_is_not_left(tmp_path: Path) -> None:
    cell = cell_at(tmp_path, CRASHES[2])
    note(cell, range(10))
    assert left(cell) == [range(10, 20), range(20, 30)]
    database(cell.path).dispose()


def test_a_fault_strikes_at_the_middle_batch_of_its_cell(tmp_path: Path) -> None:
    cell = cell_at(tmp_path, CRASHES[0])
    assert not cell.is_hit(CRASHES[0], range(10, 20)), "nobody has armed it"
    cell.armed = True
    batches = [range(10), range(10, 20), range(20, 30)]
    assert [cell.is_hit(CRASHES[0], batch) for batch in batches] == [False, True, False]
    assert not cell.is_hit(CRASHES[1], batches[1])


@pytest.mark.parametrize(("messages", "batch"), [(100, 30), (100, 0), (100, 100), (0, 10)])
def test_messages_that_are_no_whole_batches_are_refused(
    kafka: mq.Kafka, rabbit: mq.RabbitMQ, tmp_path: Path, messages: int, batch: int
) -> None:
    with pytest.raises(ValueError, match="some whole batches"):
        Experiment(kafka, rabbit, kafka, rabbit, tmp_path, messages, batch)
