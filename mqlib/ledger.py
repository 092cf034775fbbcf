"""What was sent, acknowledged, received and handled: what was lost, duplicated, reordered, and what nobody can know."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import pandas

SENT, ACKNOWLEDGED, FAILED, RECEIVED, HANDLED = 1, 2, 4, 8, 16
EVENTS = ("sent", "acknowledged", "failed", "received", "handled")


class _Account:
    """One producer's messages: a byte of flags each, by sequence number."""

    def __init__(self) -> None:
        self.flags = bytearray()
        self.highest = -1
        self.duplicated = self.reordered = self.handled_again = 0

    def count(self, every: int, none: int = 0) -> int:
        """The messages that have all the flags `every` and none of the flags `none`."""
        return sum(self.flags.count(mix) for mix in range(1, 32) if mix & every == every and not mix & none)

    def numbers(self, every: int, none: int) -> list[int]:
        """Their numbers."""
        return [number for number, mix in enumerate(self.flags) if mix & every == every and not mix & none]

    def grow(self, number: int) -> None:
        """Makes room for `number`. Raises `ValueError` for one that is no sequence number."""
        if number < 0:
            raise ValueError(f"sequence numbers start at 0, and this is {number}")
        self.flags.extend(bytes(max(number + 1 - len(self.flags), len(self.flags) // 2, 64)))


class _Group:
    """What was received with one key, or from one partition."""

    def __init__(self) -> None:
        self.received = self.duplicated = self.reordered = 0
        self.highest: dict[str, int] = {}

    def add(self, number: int, producer: str, new: bool) -> None:
        highest = self.highest.get(producer, -1)
        self.received += 1
        self.duplicated += not new
        self.reordered += new and number < highest
        self.highest[producer] = max(number, highest)


class Ledger:
    """Counts by sequence number, per producer.

    Every message carries a sequence number from 0 on, and its producer's name where there are several. Record what
    happens as it happens; read the totals when all that can still arrive has arrived. A retry is the same message: the
    same number again. Ten million messages take some 15 MB. What another process saw comes in with `replay`.
    """

    def __init__(self) -> None:
        self._accounts: dict[str, _Account] = {}
        self._keys: dict[str, _Group] = {}
        self._partitions: dict[int, _Group] = {}

    def _of(self, number: int, producer: str) -> _Account:
        account = self._accounts.get(producer)
        if account is None:
            account = self._accounts[producer] = _Account()
        if not 0 <= number < len(account.flags):
            account.grow(number)
        return account

    def sent(self, number: int, producer: str = "") -> None:
        """The message was handed to the client or the broker; after a failure, once more, with an open outcome."""
        flags = self._of(number, producer).flags
        flags[number] = flags[number] & ~FAILED | SENT

    def acknowledged(self, number: int, producer: str = "") -> None:
        """The broker said that it has it, whatever earlier attempts came to."""
        flags = self._of(number, producer).flags
        flags[number] = flags[number] & ~FAILED | ACKNOWLEDGED

    def failed(self, number: int, producer: str = "") -> None:
        """It is known not to be stored. (After a time-out record nothing: that is unknown.)"""
        flags = self._of(number, producer).flags
        if not flags[number] & ACKNOWLEDGED:  # an attempt before this one may have been stored
            flags[number] |= FAILED

    def received(
        self, number: int, producer: str = "", key: str | bytes | None = None, partition: int | None = None
    ) -> None:
        """A consumer got it; once more counts as a duplicate. With a key or a partition, order is kept for it, too."""
        account = self._of(number, producer)
        mix = account.flags[number]
        new = not mix & RECEIVED
        if new:
            account.flags[number] = mix | RECEIVED
            if number < account.highest:
                account.reordered += 1
            else:
                account.highest = number
        else:
            account.duplicated += 1
        if key is not None:
            name = key if isinstance(key, str) else key.decode(errors="backslashreplace")
            self._keys.setdefault(name, _Group()).add(number, producer, new)
        if partition is not None:
            self._partitions.setdefault(partition, _Group()).add(number, producer, new)

    def handled(self, number: int, producer: str = "") -> None:
        """A handler finished it: its effect is there; once more is a second effect."""
        account = self._of(number, producer)
        account.handled_again += bool(account.flags[number] & HANDLED)
        account.flags[number] |= HANDLED

    def replay(self, path: str | Path) -> None:
        """Adds what a `Journal` wrote down. Raises `ValueError` for a line that is none, except an unfinished last."""
        *lines, _ = Path(path).read_text().split("\n")
        for place, line in enumerate(lines, start=1):
            try:
                event, *what = json.loads(line)
                if event not in EVENTS:
                    raise ValueError(event)
                getattr(self, event)(*what)
            except (TypeError, ValueError) as error:
                raise ValueError(f"{path}, line {place}, is not of a journal: {line[:80]!r} ({error})") from None

    def _total(self, every: int, none: int = 0) -> int:
        return sum(account.count(every, none) for account in self._accounts.values())

    @property
    def lost(self) -> int:
        """Sent, not known to have failed, and never received."""
        return self._total(SENT, FAILED | RECEIVED)

    @property
    def lost_although_acknowledged(self) -> int:
        """The part of `lost` that the broker had promised to keep."""
        return self._total(SENT | ACKNOWLEDGED, FAILED | RECEIVED)

    @property
    def delivered_although_unacknowledged(self) -> int:
        """Received, although the producer was never told so: what a retry turns into duplicates."""
        return self._total(RECEIVED, ACKNOWLEDGED)

    @property
    def unknown(self) -> int:
        """Sent, and neither acknowledged nor known to have failed: what the producer cannot know."""
        return self._total(SENT, ACKNOWLEDGED | FAILED)

    @property
    def duplicated(self) -> int:
        """Receptions beyond the first of each message."""
        return sum(account.duplicated for account in self._accounts.values())

    @property
    def handled_again(self) -> int:
        """Effects beyond the first of each message."""
        return sum(account.handled_again for account in self._accounts.values())

    @property
    def unhandled(self) -> int:
        """Received, and never handled to the end."""
        return self._total(RECEIVED, HANDLED)

    @property
    def reordered(self) -> int:
        """Messages first received after one with a higher number of the same producer."""
        return sum(account.reordered for account in self._accounts.values())

    @property
    def reordered_in_key(self) -> int:
        """The same, among the messages of one producer with one key."""
        return sum(group.reordered for group in self._keys.values())

    @property
    def reordered_in_partition(self) -> int:
        """The same, among the messages of one producer from one partition."""
        return sum(group.reordered for group in self._partitions.values())

    @property
    def unexpected(self) -> int:
        """Received, but never recorded as sent."""
        return self._total(RECEIVED, SENT)

    @property
    def exact(self) -> bool:
        """Everything that was sent was received once, in whatever order, and nothing else was."""
        return self.lost == self.duplicated == self.unexpected == 0 and self._total(RECEIVED) > 0

    def missing(self, producer: str = "") -> list[int]:
        """The numbers of the lost messages of one producer."""
        account = self._accounts.get(producer)
        return account.numbers(SENT, FAILED | RECEIVED) if account else []

    def table(self, by: Literal["producer", "key", "partition"] = "producer") -> pandas.DataFrame:
        """One row a producer with all its counts; or one a key or a partition, with what was received there."""
        import pandas

        if by == "producer":
            rows = {
                name: {
                    "sent": account.count(SENT), "acknowledged": account.count(ACKNOWLEDGED),
                    "failed": account.count(FAILED), "unknown": account.count(SENT, ACKNOWLEDGED | FAILED),
                    "received": account.count(RECEIVED), "handled": account.count(HANDLED),
                    "lost": account.count(SENT, FAILED | RECEIVED), "duplicated": account.duplicated,
                    "reordered": account.reordered,
                }
                for name, account in sorted(self._accounts.items())
            }  # fmt: skip
        elif by in ("key", "partition"):
            groups: dict[Any, _Group] = {**(self._keys if by == "key" else self._partitions)}
            rows = {
                name: {"received": group.received, "duplicated": group.duplicated, "reordered": group.reordered}
                for name, group in sorted(groups.items())
            }
        else:
            raise ValueError(f"a table is by 'producer', 'key' or 'partition', not by {by!r}")
        return pandas.DataFrame.from_dict(rows, orient="index").rename_axis(by)

    def __str__(self) -> str:
        """One line, the same for the same history; failed, unknown and handled stand in it when there are any."""
        counts = {
            "sent": self._total(SENT), "acknowledged": self._total(ACKNOWLEDGED), "failed": self._total(FAILED),
            "unknown": self.unknown if self._total(ACKNOWLEDGED) + self._total(FAILED) else 0,
            "received": self._total(RECEIVED), "handled": self._total(HANDLED),
        }  # fmt: skip
        shown = [f"{name} {count}" for name, count in counts.items()
                 if count or name in ("sent", "acknowledged", "received")]  # fmt: skip
        return f"{', '.join(shown)}: lost {self.lost}, duplicated {self.duplicated}, reordered {self.reordered}"

    __repr__ = __str__


class Journal:
    """The ledger's words, written into a file at once, by a process that may be killed; `Ledger.replay` reads them.

    A line is with the operating system when the call returns, so SIGKILL of this process loses none.
    """

    def __init__(self, path: str | Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def _write(self, *what: object) -> None:
        os.write(self._file, json.dumps(what).encode() + b"\n")

    def sent(self, number: int, producer: str = "") -> None:
        """As `Ledger.sent`."""
        self._write("sent", number, producer)

    def acknowledged(self, number: int, producer: str = "") -> None:
        """As `Ledger.acknowledged`."""
        self._write("acknowledged", number, producer)

    def failed(self, number: int, producer: str = "") -> None:
        """As `Ledger.failed`."""
        self._write("failed", number, producer)

    def received(self, number: int, producer: str = "", key: str | None = None, partition: int | None = None) -> None:
        """As `Ledger.received`."""
        self._write("received", number, producer, key, partition)

    def handled(self, number: int, producer: str = "") -> None:
        """As `Ledger.handled`."""
        self._write("handled", number, producer)

    def close(self) -> None:
        """Closes the file."""
        os.close(self._file)
