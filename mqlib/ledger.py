"""What was sent, acknowledged and received: what was lost, duplicated, reordered, and what nobody can know yet."""

from __future__ import annotations


class BitSet:
    """Non-negative integers, one bit each."""

    def __init__(self) -> None:
        self._bits = bytearray()
        self._count = 0

    def add(self, number: int) -> bool:
        """Adds `number`; True when it is new. Raises `ValueError` for a negative one."""
        if number < 0:
            raise ValueError(f"sequence numbers start at 0, and this is {number}")
        byte, bit = number >> 3, 1 << (number & 7)
        if byte >= len(self._bits):
            self._bits.extend(bytes(max(byte + 1 - len(self._bits), len(self._bits), 64)))
        new = not self._bits[byte] & bit
        self._bits[byte] |= bit
        self._count += new
        return new

    def __contains__(self, number: int) -> bool:
        byte = number >> 3
        return 0 <= byte < len(self._bits) and bool(self._bits[byte] & 1 << (number & 7))

    def __len__(self) -> int:
        return self._count

    def __int__(self) -> int:
        return int.from_bytes(self._bits, "little")

    def numbers(self) -> list[int]:
        return bits_of(int(self))


def bits_of(whole: int) -> list[int]:
    """The positions of the bits that are set, in order."""
    return [8 * index + bit for index, byte in enumerate(whole.to_bytes((whole.bit_length() + 7) // 8, "little"))
            if byte for bit in range(8) if byte & 1 << bit]  # fmt: skip


class _Account:
    """One producer's messages."""

    def __init__(self) -> None:
        self.sent, self.acknowledged, self.failed, self.received = BitSet(), BitSet(), BitSet(), BitSet()
        self.highest = -1

    @property
    def lost(self) -> int:
        return int(self.sent) & ~int(self.received) & ~int(self.failed)


class Ledger:
    """Counts by sequence number, per producer.

    Every message carries a sequence number from 0 on, and its producer's name where there are several. Record what
    happens as it happens; read the totals when all that can still arrive has arrived.
    """

    def __init__(self) -> None:
        self._accounts: dict[str, _Account] = {}
        self.duplicated = 0
        """Receptions beyond the first of each message."""
        self.reordered = 0
        """Messages first received after one with a higher number of the same producer."""

    def _of(self, producer: str) -> _Account:
        return self._accounts.setdefault(producer, _Account())

    def sent(self, number: int, producer: str = "") -> None:
        """The message was handed to the client or the broker."""
        self._of(producer).sent.add(number)

    def acknowledged(self, number: int, producer: str = "") -> None:
        """The broker said that it has it."""
        self._of(producer).acknowledged.add(number)

    def failed(self, number: int, producer: str = "") -> None:
        """It is known not to be stored. (After a time-out record nothing: that is unknown.)"""
        self._of(producer).failed.add(number)

    def received(self, number: int, producer: str = "") -> None:
        """A consumer got it; once more counts as a duplicate."""
        account = self._of(producer)
        if not account.received.add(number):
            self.duplicated += 1
        elif number < account.highest:
            self.reordered += 1
        account.highest = max(account.highest, number)

    def _total(self, name: str) -> int:
        return sum(len(getattr(account, name)) for account in self._accounts.values())

    @property
    def lost(self) -> int:
        """Sent, not known to have failed, and never received."""
        return sum(account.lost.bit_count() for account in self._accounts.values())

    @property
    def lost_although_acknowledged(self) -> int:
        """The part of `lost` that the broker had promised to keep."""
        return sum((account.lost & int(account.acknowledged)).bit_count() for account in self._accounts.values())

    @property
    def delivered_although_unacknowledged(self) -> int:
        """Received, although the producer was never told so: what a retry turns into duplicates."""
        return sum(
            (int(account.received) & ~int(account.acknowledged)).bit_count() for account in self._accounts.values()
        )

    @property
    def unexpected(self) -> int:
        """Received, but never recorded as sent."""
        return sum((int(account.received) & ~int(account.sent)).bit_count() for account in self._accounts.values())

    @property
    def exact(self) -> bool:
        """Everything that was sent was received once, in whatever order, and nothing else was."""
        return self.lost == self.duplicated == self.unexpected == 0 and self._total("received") > 0

    def missing(self, producer: str = "") -> list[int]:
        """The numbers of the lost messages of one producer."""
        return bits_of(self._of(producer).lost)

    def __str__(self) -> str:
        return (
            f"sent {self._total('sent')}, acknowledged {self._total('acknowledged')}, "
            f"received {self._total('received')}: lost {self.lost}, duplicated {self.duplicated}, "
            f"reordered {self.reordered}"
        )

    __repr__ = __str__
