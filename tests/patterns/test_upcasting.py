"""Old events become new ones by a chain that has no hole, and what cannot be read is said to be so."""

from __future__ import annotations

import json
from typing import Any

import pytest

import mqlib as mq
from mqlib.patterns import upcasting
from mqlib.patterns.upcasting import NewerVersion, NotAnEvent, Step, StepFailed, UnknownType, UpcastError

Upcaster, event_headers = upcasting.Upcaster, upcasting.event_headers


def to_cents(event: dict[str, Any]) -> dict[str, Any]:
    event["cents"] = round(100 * float(event.pop("amount")))  # it changes what it is given
    event["tags"].append("2")
    return event


def with_currency(event: dict[str, Any]) -> dict[str, Any]:
    return {**event, "currency": "EUR"}


STEPS = [Step("paid", 1, to_cents), Step("paid", 2, with_currency)]
UPCASTER = Upcaster({"paid": 3, "opened": 1}, STEPS)


@pytest.mark.parametrize(
    ("version", "data"),
    [
        (1, {"amount": "12.50", "tags": []}),
        (2, {"cents": 1250, "tags": ["2"]}),
        (3, {"cents": 1250, "tags": ["2"], "currency": "EUR"}),
    ],
)
def test_each_version_becomes_the_current_one_and_the_old_event_stays(version: int, data: dict[str, Any]) -> None:
    before = json.dumps(data)
    for _ in range(2):
        assert UPCASTER.upcast("paid", version, data) == {"cents": 1250, "tags": ["2"], "currency": "EUR"}
    assert json.dumps(data) == before


@pytest.mark.parametrize(
    ("current", "steps", "words"),
    [
        ({"paid": 3}, STEPS[1:], "the step from version 1 of 'paid' is missing"),
        ({"paid": 3}, STEPS[:1], "the step from version 2 of 'paid' is missing"),
        ({"paid": 3, "opened": 2}, STEPS, "the step from version 1 of 'opened' is missing"),
        ({"paid": 3}, [*STEPS, STEPS[0]], "the step from version 1 of 'paid' is there twice"),
        ({"paid": 2}, STEPS, "the step from version 2 of 'paid' leads nowhere: .* the current one 2"),
        ({"paid": 3}, [Step("paid", 0, to_cents), *STEPS], "version 0 of 'paid' leads nowhere: the oldest"),
        ({}, STEPS, "leads nowhere: .* the current one unknown"),
        ({"paid": 0}, [], "the current version of 'paid' is 0"),
    ],
)  # fmt: skip
def test_a_chain_with_a_hole_is_refused_before_the_first_event(
    current: dict[str, int], steps: list[Step], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        Upcaster(current, steps)


def test_versions_that_are_no_longer_in_the_log_need_no_step() -> None:
    upcaster = Upcaster({"paid": 3}, STEPS[1:], oldest=2)
    assert upcaster.upcast("paid", 2, {"cents": 1})["currency"] == "EUR"
    with pytest.raises(NotAnEvent, match="the oldest version is 2"):
        upcaster.upcast("paid", 1, {"amount": "1"})


@pytest.mark.parametrize(
    ("type", "version", "data", "kind", "words"),
    [
        ("paid", 4, {}, NewerVersion, "version 4 of 'paid' is newer than 3"),
        ("closed", 1, {}, UnknownType, "version 1 of 'closed': only opened, paid"),
        ("paid", 0, {}, NotAnEvent, "version 0 of 'paid': the oldest version is 1"),
        ("paid", 1, {"amount": "free", "tags": []}, StepFailed, "version 1 of 'paid': the step from 1: ValueError"),
        ("paid", 1, {}, StepFailed, "the step from 1: KeyError: 'amount'"),
    ],
)
def test_what_cannot_be_read_is_an_error_and_no_guess(
    type: str, version: int, data: dict[str, Any], kind: Any, words: str
) -> None:
    with pytest.raises(UpcastError, match=words) as caught:
        UPCASTER.upcast(type, version, data)
    assert caught.type is kind


def test_a_step_that_forgets_to_return() -> None:
    upcaster = Upcaster({"paid": 2}, [Step("paid", 1, lambda event: event.clear())])  # type: ignore[arg-type, return-value]
    with pytest.raises(StepFailed, match="the step from 1 returned None, and not an object"):
        upcaster.upcast("paid", 1, {})


async def test_the_events_of_a_log(kafka: mq.Kafka) -> None:
    """All versions side by side; and what is no event, or is newer, says where it is."""
    topic = await mq.topic(kafka, "events")
    good = [(1, {"amount": "12.50", "tags": []}), (2, {"cents": 1250, "tags": ["2"]})]
    wrong: list[tuple[bytes | None, list[tuple[str, bytes]], Any, str]] = [
        (b"{}", [], NotAnEvent, "no header 'event-type'"),
        (b"{}", event_headers("paid", 1)[:1], NotAnEvent, "no header 'event-version'"),
        (b"{}", [("event-type", b"paid"), ("event-version", b"one")], NotAnEvent, "ValueError"),
        (b"{}", [("event-type", b"\xff"), ("event-version", b"1")], NotAnEvent, "UnicodeDecodeError"),
        (b"{", event_headers("paid", 1), NotAnEvent, "JSONDecodeError"),
        (b"[" * 100_000, event_headers("paid", 1), NotAnEvent, "RecursionError"),
        (b"[]", event_headers("paid", 1), NotAnEvent, "its value is no object"),
        (None, event_headers("paid", 1), NotAnEvent, "TypeError"),
        (b"{}", event_headers("paid", 4), NewerVersion, "newer than 3"),
        (b"{}", event_headers("paid", 1), StepFailed, "KeyError"),
        (b"{}", event_headers("closed", 1), UnknownType, "only opened, paid"),
    ]
    async with mq.producer(kafka) as producer:
        for version, data in good:
            value = json.dumps(data).encode()
            await producer.send_and_wait(topic, value, headers=event_headers("paid", version))
        for body, headers, *_ in wrong:
            await producer.send_and_wait(topic, body, key=b"k", headers=headers)
    records = await mq.read(kafka, topic)
    events = [UPCASTER.read(record) for record in records[:2]]
    assert [(event.type, event.version, event.written) for event in events] == [("paid", 3, 1), ("paid", 3, 2)]
    assert events[0].data == events[1].data == {"cents": 1250, "tags": ["2"], "currency": "EUR"}
    for record, (*_, kind, words) in zip(records[2:], wrong, strict=True):
        with pytest.raises(UpcastError, match=words) as caught:
            UPCASTER.read(record)
        assert caught.type is kind
        assert str(caught.value).startswith(f"{topic}-0, offset {record.offset}: ")
    assert isinstance(caught.value, UnknownType)
