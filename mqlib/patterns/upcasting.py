"""Upcasting: old events are read as if they had been written today, by a chain of small functions, v1 to v2 to v3.

What is in the log stays as it is. Each function turns one version of one type of event into the next, and depends on
nothing else, so that a replay gives the same again. After the upcasters of event sourcing, such as Axon's:
https://docs.axoniq.io/axon-framework-reference/4.11/events/event-versioning/.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from aiokafka import ConsumerRecord

TYPE, VERSION = "event-type", "event-version"
"""The headers with the type and the version of an event."""
Function = Callable[[dict[str, Any]], dict[str, Any]]


class Step(NamedTuple):
    """Turns version `version` of events of a type into `version + 1`."""

    type: str
    version: int
    function: Function


@dataclass(frozen=True)
class Event:
    """An event as this program wants it; `written` is the version that the log has."""

    type: str
    version: int
    data: dict[str, Any]
    written: int


class UpcastError(Exception):
    """An event that cannot be read. Set it aside: it is not skipped, and not guessed at."""


class NewerVersion(UpcastError):
    """It was written by a newer program. It is not broken: whoever reads it has to be deployed first."""


class UnknownType(UpcastError):
    """No version of such an event is known here."""


class NotAnEvent(UpcastError):
    """No type, no version, or no JSON object; or a version that never was."""


class StepFailed(UpcastError):
    """A step raised, or did not return an object: it does not fit what was once written."""


class Upcaster:
    """Leads any version of an event to the current one.

    `current` has the newest version of each type, `steps` all that lead there, from version `oldest` on. Raises
    `ValueError` at once when a step is missing, is there twice, or leads nowhere: and not at the first old event.
    """

    def __init__(self, current: Mapping[str, int], steps: Iterable[Step], oldest: int = 1) -> None:
        self.current, self.oldest = dict(current), oldest
        self._steps: dict[tuple[str, int], Function] = {}
        for step in steps:
            place = step.type, step.version
            name = f"the step from version {step.version} of {step.type!r}"
            if place in self._steps:
                raise ValueError(f"{name} is there twice; an event has one past")
            if step.type not in self.current or not oldest <= step.version < self.current[step.type]:
                known = self.current.get(step.type, "unknown")
                raise ValueError(f"{name} leads nowhere: the oldest version is {oldest}, the current one {known}")
            self._steps[place] = step.function
        for type, newest in self.current.items():
            if newest < oldest:
                raise ValueError(f"the current version of {type!r} is {newest}, and the oldest one {oldest}")
            for version in range(oldest, newest):
                if (type, version) not in self._steps:
                    raise ValueError(f"the step from version {version} of {type!r} is missing; add it, or raise oldest")

    def upcast(self, type: str, version: int, data: Mapping[str, Any]) -> dict[str, Any]:
        """The event's data in the current version; what was handed in stays as it is. Raises a kind of `UpcastError`,
        which names type and version."""
        name = f"version {version} of {type!r}"
        if type not in self.current:
            raise UnknownType(f"{name}: only {', '.join(sorted(self.current)) or 'no type'} is known here")
        newest = self.current[type]
        if version > newest:
            raise NewerVersion(f"{name} is newer than {newest}, all that is known here: deploy this reader first")
        if version < self.oldest:
            raise NotAnEvent(f"{name}: the oldest version is {self.oldest}")
        result = copy.deepcopy(dict(data))
        for number in range(version, newest):
            try:
                result = self._steps[type, number](result)
            except Exception as error:
                raise StepFailed(f"{name}: the step from {number}: {error.__class__.__name__}: {error}") from error
            if not isinstance(result, dict):
                raise StepFailed(f"{name}: the step from {number} returned {result!r:.100}, and not an object")
        return result

    def read(self, record: ConsumerRecord) -> Event:
        """The event of a record: JSON, with type and version in headers. Raises as `upcast` does, and names the place
        of the record."""
        where = f"{record.topic}-{record.partition}, offset {record.offset}"
        headers = dict(record.headers)
        try:
            type, version = headers[TYPE].decode(), int(headers[VERSION])
            data = json.loads(record.value)
            if not isinstance(data, dict):
                raise ValueError("its value is no object")
        except KeyError as error:
            raise NotAnEvent(f"{where}: it has no header {error}") from None
        except (ValueError, TypeError, AttributeError, RecursionError) as error:  # also of JSON, and of UTF-8
            raise NotAnEvent(f"{where}: {error.__class__.__name__}: {error}") from None
        try:
            return Event(type, self.current.get(type, version), self.upcast(type, version, data), version)
        except UpcastError as error:
            raise error.__class__(f"{where}: {error}") from error.__cause__


def event_headers(type: str, version: int) -> list[tuple[str, bytes]]:
    """The headers with which an event is sent."""
    return [(TYPE, type.encode()), (VERSION, b"%d" % version)]
