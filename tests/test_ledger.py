"""The ledger counts as sets and counters would, in every history; and it stays small."""

from __future__ import annotations

import itertools
import random
import tracemalloc
from collections import Counter, defaultdict

import pytest

from mqlib.ledger import BitSet, Ledger, bits_of

HISTORIES = 3000
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


def test_a_bit_set_is_a_set_of_integers() -> None:
    """Membership, length, order and whether a number was new agree with Python's own set."""
    chance = random.Random(1)
    for _ in range(200):
        ours, theirs = BitSet(), set[int]()
        for number in (chance.randrange(1 << chance.randrange(1, 14)) for _ in range(60)):
            assert ours.add(number) is (number not in theirs)
            theirs.add(number)
        assert (ours.numbers(), len(ours)) == (sorted(theirs), len(theirs))
        assert int(ours) == sum(1 << number for number in theirs)
        assert all((number in ours) is (number in theirs) for number in range(-10, 600))


def test_an_empty_bit_set_holds_nothing() -> None:
    empty = BitSet()
    assert (len(empty), int(empty), empty.numbers(), 0 in empty, bits_of(0)) == (0, 0, [], False, [])


def test_a_number_at_the_edge_of_a_byte_is_its_own() -> None:
    """No neighbour is set by accident where one byte, or one growth of the array, ends."""
    for number in (0, 7, 8, 511, 512, 1023, 1024, 4095, 4096):
        alone = BitSet()
        alone.add(number)
        assert alone.numbers() == [number]


def test_negative_numbers_are_refused() -> None:
    """By every way in, with the number in the message, and without a trace in the totals."""
    with pytest.raises(ValueError, match="-1"):
        BitSet().add(-1)
    ledger = Ledger()
    for record in (ledger.sent, ledger.acknowledged, ledger.failed, ledger.received):
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
    assert str(ledger) == repr(ledger) == "sent 10, acknowledged 9, received 3: lost 7, duplicated 1, reordered 1"


class Naive:
    """The same account, as the words say it, with Python's sets: slow and obviously right."""

    def __init__(self) -> None:
        self.sent, self.acknowledged, self.failed = (
            set[tuple[str, int]](),
            set[tuple[str, int]](),
            set[tuple[str, int]](),
        )
        self.received: list[tuple[str, int]] = []

    def record(self, what: str, message: tuple[str, int]) -> None:
        self.received.append(message) if what == "received" else getattr(self, what).add(message)

    def reordered(self) -> int:
        before: dict[str, list[int]] = defaultdict(list)
        count = 0
        for producer, number in self.received:
            count += number not in before[producer] and any(other > number for other in before[producer])
            before[producer].append(number)
        return count

    def account(self) -> dict[str, object]:
        got = set(self.received)
        lost = self.sent - got - self.failed
        duplicated = sum(times - 1 for times in Counter(self.received).values())
        return {
            "lost": len(lost),
            "lost_although_acknowledged": len(lost & self.acknowledged),
            "delivered_although_unacknowledged": len(got - self.acknowledged),
            "duplicated": duplicated,
            "reordered": self.reordered(),
            "unexpected": len(got - self.sent),
            "exact": bool(got) and not lost and not duplicated and not got - self.sent,
        }

    def missing(self, producer: str) -> list[int]:
        lost = self.sent - set(self.received) - self.failed
        return sorted(number for owner, number in lost if owner == producer)


@pytest.mark.parametrize("seed", range(4))
def test_random_histories_give_what_plain_sets_give(seed: int) -> None:
    """Whatever happens, in whatever order, of whichever producer: each total and each list agrees."""
    chance = random.Random(seed)
    seen: Counter[str] = Counter()
    for _ in range(HISTORIES // 4):
        ours, theirs = Ledger(), Naive()
        width = chance.choice([3, 10, 40, 700])
        producers = PRODUCERS[: chance.randint(1, 3)]
        kinds = chance.choices(["sent", "acknowledged", "failed", "received"], [4, 3, 1, 4], k=chance.randrange(60))
        for what in kinds:
            message = chance.choice(producers), chance.randrange(width)
            getattr(ours, what)(message[1], message[0])
            theirs.record(what, message)
        expected = theirs.account()
        assert {name: getattr(ours, name) for name in expected} == expected
        assert [ours.missing(producer) for producer in PRODUCERS] == [theirs.missing(name) for name in PRODUCERS]
        seen.update(name for name, value in expected.items() if value)
    assert all(seen[name] > 20 for name in theirs.account() if name != "exact"), f"the histories prove little: {seen}"


@pytest.mark.parametrize("seed", range(2))
def test_random_deliveries_give_what_plain_sets_give(seed: int) -> None:
    """As brokers do it: a run in order, some lost, some again, some late; also runs that are exact."""
    chance = random.Random(100 + seed)
    exact = 0
    for _ in range(HISTORIES // 10):
        ours, theirs = Ledger(), Naive()
        size, trouble = chance.randint(1, 50), chance.choice([0.0, 0.05, 0.3])
        deliveries = [number for number in range(size) if chance.random() >= trouble]
        for _ in range(int(trouble * size)):
            deliveries.insert(chance.randint(0, len(deliveries)), chance.randrange(size))
        for number in range(size):
            for what in ("sent", "acknowledged") if chance.random() >= trouble else ("sent",):
                getattr(ours, what)(number)
                theirs.record(what, ("", number))
        for number in deliveries:
            ours.received(number)
            theirs.record("received", ("", number))
        expected = theirs.account()
        assert {name: getattr(ours, name) for name in expected} == expected
        exact += ours.exact
    assert exact > HISTORIES // 50


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
