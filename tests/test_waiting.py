"""`until` waits for a fact, says what it saw instead, and always ends."""

from __future__ import annotations

import asyncio

import pytest

import mqlib as mq
from mqlib.waiting import beside


async def test_it_returns_what_the_fact_returns() -> None:
    """The value itself, not True: the fact is asked until it says something."""
    answers = iter([0, "", [], "there"])
    assert await mq.until(lambda: next(answers), every=0) == "there"


async def test_an_async_fact_is_awaited() -> None:
    answers = iter([None, 7])

    async def fact() -> int | None:
        await asyncio.sleep(0)
        return next(answers)

    assert await mq.until(fact, every=0) == 7


async def test_it_gives_way_to_other_tasks() -> None:
    """What it waits for may be done by a task of the same loop, however short the interval."""
    done = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        group.create_task(mq.until(done.is_set, every=0))
        done.set()


async def test_the_fact_is_asked_once_even_without_time() -> None:
    """`within=0` means: now."""
    assert await mq.until(lambda: "now", within=0) == "now"
    with pytest.raises(TimeoutError):
        await mq.until(lambda: False, within=0)


async def test_a_time_out_names_the_deadline_and_the_last_value() -> None:
    with pytest.raises(TimeoutError, match=r"not within 0\.05 s; the last value was False"):
        await mq.until(lambda: False, within=0.05, every=0.01)
    with pytest.raises(TimeoutError, match=r"the last value was \[\]"):
        await mq.until(lambda: [], within=0)


async def test_a_fact_that_raises_is_not_waited_for() -> None:
    """An error is not "not yet": it comes out at once, unchanged."""
    asked: list[int] = []

    def fact() -> bool:
        asked.append(1)
        raise LookupError("no such queue")

    with pytest.raises(LookupError, match="no such queue"):
        await mq.until(fact)
    assert len(asked) == 1


async def test_an_async_fact_that_hangs_does_not_hang_the_cell() -> None:
    """`within` bounds the whole: a call to a broker that never answers ends, too, in `until`'s own words."""

    async def fact() -> None:
        await asyncio.Event().wait()

    async with asyncio.timeout(5):
        with pytest.raises(TimeoutError, match=r"not within 0\.1 s"):
            await mq.until(fact, within=0.1)


async def test_cancelling_it_is_not_a_time_out() -> None:
    waiting = asyncio.ensure_future(mq.until(lambda: False, within=60))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_work_beside_a_block_ends_with_it() -> None:
    """Cancelled, or asked to finish, also when the block raises; and no task is left."""
    before, stopped = asyncio.all_tasks(), asyncio.Event()
    async with beside(asyncio.Event().wait()) as task:
        assert not task.done()
    assert task.cancelled()
    async with beside(stopped.wait(), stopped.set) as task:
        pass
    assert task.result() is True
    with pytest.raises(ZeroDivisionError):
        async with beside(asyncio.Event().wait()):
            raise ZeroDivisionError
    assert asyncio.all_tasks() == before


async def test_work_that_fails_interrupts_its_block_with_its_error() -> None:
    """What the block waits for may never come, and the error says why; also when both fail."""

    async def failing() -> None:
        await asyncio.sleep(0)
        raise LookupError("no such queue")

    async with asyncio.timeout(5):
        with pytest.raises(LookupError, match="no such queue"):
            async with beside(failing()):
                await asyncio.Event().wait()
        with pytest.raises(LookupError, match="no such queue"):
            async with beside(failing()) as task:
                await asyncio.wait([task])
    await asyncio.sleep(0)  # the interruption is over: this is not cancelled


async def test_work_that_fails_in_the_turn_in_which_its_block_ends_gives_its_error() -> None:
    """The block goes on before the task's callback is called, and is not interrupted while it waits for the task."""
    told = asyncio.Event()

    async def work() -> None:
        told.set()
        raise ValueError("the task's own")

    with pytest.raises(ValueError, match="the task's own"):
        async with beside(work()):
            await told.wait()
    current = asyncio.current_task()
    assert current
    assert current.cancelling() == 0


async def test_a_block_that_is_cancelled_from_outside_stays_cancelled() -> None:
    ended = asyncio.Event()

    async def work() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async def block() -> None:
        async with beside(work()):
            await asyncio.Event().wait()

    running = asyncio.create_task(block())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert ended.is_set()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05), beside(asyncio.Event().wait()):
            await asyncio.Event().wait()
