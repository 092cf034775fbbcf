"""The ledger counts as sets and counters would, in every history; and it stays small."""

from __future__ import annotations

import itertools
import subprocess
import sys
import tempfile
import tracemalloc
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pandas
import pytest
from hypothesis import given, settings, strategies

from mqlib.ledger import EVENTS, Journal, Ledger

PRODUCERS = ["", "a", "b"]


def ledger_of(sent: int, received: list[int], acknowledged: int | None = None) -> Ledger:
    """`sent` messages, all acknowledged unless told otherwise, received in that order."""
    ledger = Ledger()
    for number in range(sent):
        ledger.sent(number)
    for number in range(sent if acknowledged is None else acknowledged):
        ledger.acknowledged(number)
    for number in received:
        ledger.received(number)
    return ledger


def test_negative_numbers_are_refused() -> None:
    """By every way in, with the number in the message, and without a trace in the totals."""
    ledger = Ledger()
    for record in (ledger.sent, ledger.acknowledged, ledger.failed, ledger.received, ledger.handled):
        with pytest.raises(ValueError, match="start at 0"):
            record(-3)
    assert str(ledger) == "sent 0, acknowledged 0, received 0: lost 0, duplicated 0, reordered 0"


def test_nothing_is_wrong_when_everything_came_once() -> None:
    ledger = ledger_of(100, list(range(100)))
    assert ledger.exact
    assert (ledger.lost, ledger.duplicated, ledger.reordered, ledger.unexpected) == (0, 0, 0, 0)
    assert (ledger.lost_although_acknowledged, ledger.delivered_although_unacknowledged) == (0, 0)
    assert ledger.missing() == []


def test_what_was_sent_and_never_received_is_lost() -> None:
    ledger = ledger_of(10, [0, 1, 2, 4, 5, 6, 8, 9], acknowledged=5)
    assert (ledger.lost, ledger.missing(), ledger.exact) == (2, [3, 7], False)
    assert ledger.lost_although_acknowledged == 1, "of 3 and 7, only 3 had been promised"


def test_what_is_known_to_have_failed_is_not_lost() -> None:
    """A refused message is the producer's to send again; no one lost it."""
    ledger = ledger_of(3, [0, 1], acknowledged=2)
    ledger.failed(2)
    assert (ledger.lost, ledger.missing(), ledger.lost_although_acknowledged) == (0, [], 0)


def test_each_reception_beyond_the_first_is_a_duplicate() -> None:
    ledger = ledger_of(3, [0, 1, 1, 2, 1])
    assert (ledger.duplicated, ledger.lost, ledger.exact) == (2, 0, False)


def test_reordered_counts_first_receptions_after_a_higher_number() -> None:
    """A duplicate of an old message is a duplicate, not a reordering."""
    assert ledger_of(4, [0, 2, 1, 3]).reordered == 1
    assert ledger_of(4, [3, 2, 1, 0]).reordered == 3
    assert ledger_of(4, [0, 1, 2, 3, 0]).reordered == 0
    assert ledger_of(4, [3, 2, 1, 0]).exact, "exact says nothing of the order"


def test_received_without_an_acknowledgement_is_told_apart() -> None:
    """What a retry would turn into duplicates."""
    ledger = ledger_of(4, [0, 1, 2], acknowledged=1)
    assert (ledger.delivered_although_unacknowledged, ledger.lost) == (2, 1)


def test_what_nobody_sent_is_unexpected() -> None:
    ledger = ledger_of(2, [0, 1, 7])
    assert (ledger.unexpected, ledger.lost, ledger.exact) == (1, 0, False)


def test_nothing_received_is_never_exact() -> None:
    """So that a check on an empty run fails instead of proving nothing."""
    assert not Ledger().exact
    assert not ledger_of(3, []).exact


def test_producers_have_numbers_of_their_own() -> None:
    """The same number of two producers is two messages; order is only kept within one."""
    ledger = Ledger()
    for producer in ("a", "b"):
        for number in range(3):
            ledger.sent(number, producer)
            ledger.acknowledged(number, producer)
    for number, producer in [(2, "a"), (0, "b"), (1, "b"), (1, "a"), (1, "b")]:
        ledger.received(number, producer)
    assert (ledger.lost, ledger.missing("a"), ledger.missing("b")) == (2, [0], [2])
    assert (ledger.duplicated, ledger.reordered) == (1, 1)
    assert ledger.missing("nobody") == []
    assert str(ledger) == "sent 6, acknowledged 6, received 4: lost 2, duplicated 1, reordered 1"


def test_the_printed_line_is_the_whole_account() -> None:
    ledger = ledger_of(10, [0, 2, 1, 1], acknowledged=9)
    assert (
        str(ledger)
        == repr(ledger)
        == ("sent 10, acknowledged 9, unknown 1, received 3: lost 7, duplicated 1, reordered 1")
    )


class Naive:
    """The same account, as the words say it, with Python's sets and lists: slow and obviously right."""

    def __init__(self) -> None:
        self.sent: set[Message] = set()
        self.acknowledged: set[Message] = set()
        self.failed: set[Message] = set()
        self.received: list[tuple[Message, str, int]] = []
        self.handled: list[Message] = []

    def record(self, event: str, message: Message, key: str, partition: int) -> None:
        if event == "received":
            self.received.append((message, key, partition))
        elif event == "handled":
            self.handled.append(message)
        elif event == "failed":
            self.failed |= {message} - self.acknowledged
        else:
            getattr(self, event).add(message)
            self.failed.discard(message)

    def reordered(self, group: Callable[[Message, str, int], object]) -> int:
        """First receptions after a higher number of the same producer in the same group."""
        count, seen, before = 0, set[Message](), defaultdict[object, list[int]](list)
        for message, key, partition in self.received:
            producer, number = message
            there = before[producer, group(message, key, partition)]
            count += message not in seen and any(other > number for other in there)
            there.append(number)
            seen.add(message)
        return count

    def account(self) -> dict[str, object]:
        came = [message for message, *_ in self.received]
        got = set(came)
        lost = self.sent - got - self.failed
        duplicated = len(came) - len(got)
        return {
            "lost": len(lost),
            "lost_although_acknowledged": len(lost & self.acknowledged),
            "delivered_although_unacknowledged": len(got - self.acknowledged),
            "unknown": len(self.sent - self.acknowledged - self.failed),
            "duplicated": duplicated,
            "reordered": self.reordered(lambda *_: None),
            "reordered_in_key": self.reordered(lambda _, key, __: key),
            "reordered_in_partition": self.reordered(lambda _, __, partition: partition),
            "unhandled": len(got - set(self.handled)),
            "handled_again": len(self.handled) - len(set(self.handled)),
            "unexpected": len(got - self.sent),
            "exact": bool(got) and not lost and not duplicated and not got - self.sent,
        }

    def missing(self, producer: str) -> list[int]:
        lost = self.sent - {message for message, *_ in self.received} - self.failed
        return sorted(number for owner, number in lost if owner == producer)

    def table(self) -> dict[str, dict[str, int]]:
        """By key."""
        rows: dict[str, dict[str, int]] = {}
        seen = set[Message]()
        for message, key, _ in self.received:
            row = rows.setdefault(key, {"received": 0, "duplicated": 0})
            row["received"] += 1
            row["duplicated"] += message in seen
            seen.add(message)
        return rows


Message = tuple[str, int]
MESSAGES = strategies.tuples(
    strategies.sampled_from(PRODUCERS), strategies.integers(0, 40) | strategies.integers(0, 700)
)
HISTORIES = strategies.lists(
    strategies.tuples(
        strategies.sampled_from(EVENTS), MESSAGES, strategies.sampled_from("kl"), strategies.integers(0, 2)
    ),
    max_size=60,
)


def record(ledger: Ledger | Journal, event: str, message: Message, key: str, partition: int) -> None:
    where = (key, partition) if event == "received" else ()
    getattr(ledger, event)(message[1], message[0], *where)


def both_of(history: list[tuple[str, Message, str, int]]) -> tuple[Ledger, Naive]:
    """The history, told to the ledger and to the naive account."""
    ours, theirs = Ledger(), Naive()
    for event, message, key, partition in history:
        record(ours, event, message, key, partition)
        theirs.record(event, message, key, partition)
    return ours, theirs


@settings(max_examples=1500, deadline=None)
@given(HISTORIES)
def test_any_history_gives_what_plain_sets_give(history: list[tuple[str, Message, str, int]]) -> None:
    """Whatever happens, in whatever order, of whichever producer: each total, list and table agrees."""
    ours, theirs = both_of(history)
    expected = theirs.account()
    assert {name: getattr(ours, name) for name in expected} == expected
    assert [ours.missing(producer) for producer in PRODUCERS] == [theirs.missing(name) for name in PRODUCERS]


@settings(max_examples=50, deadline=None)
@given(HISTORIES)
def test_the_tables_say_what_the_totals_say(history: list[tuple[str, Message, str, int]]) -> None:
    ours, theirs = both_of(history)
    totals = ours.table().sum()
    for name in ("lost", "duplicated", "reordered", "unknown"):
        assert totals.get(name, 0) == getattr(ours, name)
    by_key = ours.table("key")
    assert {key: dict(by_key.loc[key, ["received", "duplicated"]]) for key in by_key.index} == theirs.table()
    assert by_key.get("reordered", pandas.Series(dtype=int)).sum() == ours.reordered_in_key
    assert ours.table("partition").get("reordered", pandas.Series(dtype=int)).sum() == ours.reordered_in_partition


@settings(max_examples=100, deadline=None)
@given(HISTORIES)
def test_a_journal_that_is_replayed_is_the_same_history(history: list[tuple[str, Message, str, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        journal, ours, copy = Journal(Path(folder) / "journal"), Ledger(), Ledger()
        for event, message, key, partition in history:
            record(ours, event, message, key, partition)
            record(journal, event, message, key, partition)
        journal.close()
        copy.replay(Path(folder) / "journal")
    for by in ("producer", "key", "partition"):
        assert copy.table(by).equals(ours.table(by))


def test_a_journal_outlives_its_process(tmp_path: Path) -> None:
    """SIGKILL right after the call loses nothing; half a line at the end is no error, anything else is."""
    path = tmp_path / "journal"
    script = (
        "import os, signal, sys; from mqlib.ledger import Journal\n"
        "journal = Journal(sys.argv[1])\n"
        "for number in range(1000): journal.received(number, key='ü', partition=1)\n"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", script, str(path)], check=False)
    with path.open("a") as file:
        file.write('["received", 1000')
    ledger = Ledger()
    ledger.replay(path)
    assert ledger.table("key").loc["ü"].to_dict() == {"received": 1000, "duplicated": 0, "reordered": 0}
    path.write_text('["received", 1]\n["eaten", 2]\n')
    with pytest.raises(ValueError, match="line 2, is not of a journal"):
        ledger.replay(path)
    with pytest.raises(ValueError, match="by 'producer', 'key' or 'partition', not by 'colour'"):
        ledger.table("colour")  # type: ignore[arg-type]


def test_a_retry_that_was_stored_is_not_excused_by_the_attempt_that_failed() -> None:
    """What the broker has acknowledged, or may have, can be lost, whatever happened to the attempt before."""
    ledger = Ledger()
    for number in range(3):
        ledger.sent(number)
        ledger.failed(number)
    assert (ledger.lost, ledger.unknown) == (0, 0)
    ledger.sent(0)
    ledger.acknowledged(0)
    ledger.sent(1)
    assert (ledger.missing(), ledger.lost_although_acknowledged, ledger.unknown) == ([0, 1], 1, 1)
    assert str(ledger).startswith("sent 3, acknowledged 1, failed 1, unknown 1, received 0: lost 2")


def test_ten_million_messages_fit_in_fifty_megabytes() -> None:
    """The house rule, with every 256th number in place of each one; the totals included."""
    tracemalloc.start()
    try:
        ledger = Ledger()
        for number in itertools.chain(range(0, 10_000_000, 256), [9_999_999]):
            ledger.sent(number)
            ledger.acknowledged(number)
            ledger.received(number)
        assert ledger.exact
        assert ledger.lost_although_acknowledged == 0
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 50_000_000


def test_duplicates_cost_no_memory_each() -> None:
    """A run in which everything comes twice (a replay, a rewound group) is as small as one in which it comes once."""
    tracemalloc.start()
    try:
        ledger = Ledger()
        for number in itertools.chain(range(50_000), range(50_000)):
            ledger.received(number)
        assert ledger.duplicated == 50_000
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000, "50 MB for 10 million messages are 5 bytes each"
