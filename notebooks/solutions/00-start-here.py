"""The exercise of notebook 00."""

from __future__ import annotations

from typing import Any

from aio_pika import Message

import mqlib as mq
from mqlib.checks import Task, Wrong


async def judge_1(answer: Any) -> None:
    rabbit = mq.rabbitmq()
    async with mq.channel(rabbit) as channel:
        queue = await channel.declare_queue(rabbit.name("exercise"), durable=True)
        for number in range(7):
            await channel.default_exchange.publish(Message(b"%d" % number), queue.name)
        for message in (await mq.take_messages(queue, 7, ack=False))[:4]:
            await message.ack()
    async with mq.channel(rabbit) as channel:
        observed = len(await mq.take_messages(await channel.get_queue(queue.name), 7, within=0.5))
    if answer != observed:
        raise Wrong(f"you said {answer!r}; on this broker the next consumer found {_more_or_fewer(answer, observed)}")


def _more_or_fewer(answer: Any, observed: int) -> str:
    if not isinstance(answer, int):
        return "a whole number of messages"
    return "more" if observed > answer else "fewer"


TASKS = {
    "00.1": Task(
        question="How many are left?",
        start='answer = ...\n\nawait mq.exercise("00.1").check(answer)',
        hints=["A message leaves the queue when it is acknowledged, not when it is delivered."],
        solution=None,
        code="answer = 3",
        judge=judge_1,
        wrong=[0, 7, 4, "three"],
    ),
}
