"""Runs the modes of `guarantees` through their faults: crashes of processes, and outages of brokers and networks."""

from __future__ import annotations

import asyncio
import functools
import gc
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..brokers import Kafka, RabbitMQ
from ..bulk import pump
from ..faults import Proxy, proxy
from ..queues import channel, depth
from ..topics import end_offsets, producer, read, topic
from ..waiting import until
from ..workers import worker
from .guarantees import CRASHES, MODES, OUTAGES, Cell, database

Table = dict[tuple[str, str], Cell]


async def run(role: str, cells: Iterable[Cell], kafka: Any, rabbit: Any) -> None:
    """All cells produce, or consume, at once."""
    async with asyncio.TaskGroup() as group:
        for cell in cells:
            mode = MODES[cell.mode]
            group.create_task(getattr(mode, role)(kafka if mode.kind == "kafka" else rabbit, cell))


async def run_and_die(cells: Sequence[Cell], kafka: Kafka, rabbit: RabbitMQ) -> None:
    """Producers and consumers, each until its worst moment, in the process that is to die."""
    barrier = asyncio.Barrier(len(cells))
    for cell in cells:
        cell.barrier, cell.armed = barrier, True
    producers = [cell for cell in cells if cell.fault == "producer crash"]
    consumers = [cell for cell in cells if cell.fault != "producer crash"]
    await asyncio.gather(run("produce", producers, kafka, rabbit), run("consume", consumers, kafka, rabbit))


async def _in_a_process(name: str, *arguments: Any) -> None:
    from mqlib.experiments import table

    await getattr(table, name)(*arguments)


class Experiment:
    """All modes under all faults, `messages` each, in batches. Outages need brokers of their own."""

    def __init__(
        self, kafka: Kafka, rabbit: RabbitMQ, own_kafka: Kafka, own_rabbit: RabbitMQ, folder: Path | str,
        messages: int = 10_000, batch: int = 1_000,
    ) -> None:  # fmt: skip
        if batch < 1 or messages % batch or messages // batch < 2:
            raise ValueError(f"messages are some whole batches, at least two: not {messages} in batches of {batch}")
        self._brokers: dict[str, Any] = {
            "kafka": kafka, "rabbit": rabbit, "own_kafka": own_kafka, "own_rabbit": own_rabbit,
        }  # fmt: skip
        self._folder, self._messages, self._batch = Path(folder), messages, batch

    async def run(self) -> Table:
        """The table by mode and fault. Crashes and outages, on RabbitMQ and on Kafka, all happen at the same time."""
        gc.freeze()  # what a notebook has loaded would be searched for garbage again and again
        try:
            async with asyncio.TaskGroup() as group:
                both = [group.create_task(self._crashes()), group.create_task(self._outages())]
        finally:
            gc.unfreeze()
        cells = [cell for task in both for cell in task.result()]
        for cell in cells:
            await self._count(cell)
        return {(cell.mode, cell.fault): cell for cell in cells}

    async def _cells(self, faults: Sequence[str], own: str) -> list[Cell]:
        source = await topic(self._brokers[own + "kafka"], "source")
        async with producer(self._brokers[own + "kafka"]) as sending:
            await pump(sending, source, [b"%d" % number for number in range(self._messages)])
        return await asyncio.gather(*(self._cell(mode, fault, own, source) for fault in faults for mode in MODES))

    async def _cell(self, mode: str, fault: str, own: str, source: str) -> Cell:
        kind = own + MODES[mode].kind
        broker = self._brokers[kind]
        name = broker.name("orders")
        if MODES[mode].kind == "kafka":
            name = await topic(broker, "orders")
        else:
            async with channel(broker) as opened:
                exchange = await opened.declare_exchange(name, "fanout", durable=True)
                await (await opened.declare_queue(name, durable=True)).bind(exchange)
        path = str(self._folder / f"{mode}, {fault}.db")
        return Cell(mode, fault, kind, self._messages, self._batch, path, name, name, broker.name("service"), source)

    async def _stored(self, cell: Cell) -> int:
        broker = self._brokers[cell.broker]
        if MODES[cell.mode].kind == "rabbit":
            return (await depth(broker, cell.queue, by="amqp")).ready
        return sum(await end_offsets(broker, cell.place))

    async def _note_stored(self, cells: Iterable[Cell]) -> None:
        for cell in cells:
            cell.stored = await self._stored(cell)

    async def _crashes(self) -> list[Cell]:
        """The modes run in a process until it kills itself; others then do what is left."""
        cells = await self._cells(CRASHES, own="")
        count = len(MODES)
        before, after, producers = cells[:count], cells[count : 2 * count], cells[2 * count :]
        for first, second in zip(before, after, strict=True):  # one production for both
            if first.broker == "rabbit":
                async with channel(self._brokers["rabbit"]) as opened:
                    await (await opened.get_queue(second.queue)).bind(first.place)
            elif first.mode != "transactional":
                second.place = first.place
        await self._process("run", "produce", [cell for cell in before if cell.mode != "transactional"])
        await self._note_stored(before + after)
        await self._process("run_and_die", cells)
        for cell in cells:  # when its consumer is gone, its messages are back
            if cell.broker == "rabbit":
                await until(functools.partial(self._is_free, cell))
        await self._process("run", "produce", producers)
        await self._note_stored(producers)
        await self._process("run", "consume", cells)
        return cells

    async def _is_free(self, cell: Cell) -> bool:
        return (await depth(self._brokers["rabbit"], cell.queue, by="amqp")).consumers == 0

    async def _process(self, name: str, *arguments: Any) -> None:
        """One of the functions above in a process of its own, which must be killed or must not."""
        kafka, rabbit = self._brokers["kafka"], self._brokers["rabbit"]
        async with worker(_in_a_process, name, *arguments, kafka, rabbit) as process:
            await process.ended(within=60)
        if process.crashed != (name == "run_and_die"):  # else its messages would be counted as lost by their mode
            raise RuntimeError(f"{name} in its process {'was killed' if process.crashed else 'has ended'}")

    async def _outages(self) -> list[Cell]:
        cells = await self._cells(OUTAGES, own="own_")

        async def side(broker: str, *faults: str) -> None:
            async with proxy(self._brokers[broker]) as network:
                for fault in faults:
                    await self._outage(fault, [c for c in cells if (c.broker, c.fault) == (broker, fault)], network)

        # RabbitMQ's clients are busy while they send, and would make those of Kafka wait: these have most of their turn
        # while RabbitMQ starts again.
        killed, *others = OUTAGES
        await asyncio.gather(side("own_rabbit", *OUTAGES), side("own_kafka", *others, killed))
        return cells

    async def _outage(self, fault: str, cells: Sequence[Cell], network: Proxy) -> None:
        barrier, over = asyncio.Barrier(len(cells) + 1), asyncio.Event()
        for cell in cells:
            cell.barrier, cell.over, cell.armed = barrier, over, True
        async with asyncio.TaskGroup() as group:
            direct = fault == "broker SIGKILL"
            broker = self._brokers[cells[0].broker] if direct else network
            group.create_task(run("produce", cells, broker, broker))
            await barrier.wait()
            await self._strike(fault, cells, network)
            over.set()
        await self._note_stored(cells)
        await run("consume", cells, self._brokers["own_kafka"], self._brokers["own_rabbit"])

    async def _strike(self, fault: str, cells: Sequence[Cell], network: Proxy) -> None:
        """What happens while all the modes send their middle batch."""
        if fault == "broker SIGKILL":
            node = self._brokers[cells[0].broker].nodes[0]
            await asyncio.to_thread(node.restart, graceful=False)
        elif fault == "lost response":
            plain = [cell for cell in cells if cell.mode not in ("transactional", "outbox + inbox")]

            async def sent() -> bool:
                wanted = self._messages // 2 + self._batch
                return all([await self._stored(cell) >= wanted for cell in plain])

            with network.swallow("down"):
                await until(sent, within=60, every=0.1)
        else:
            network.delay = 0.05  # the batch is on its way
            await asyncio.sleep(0.03)
            network.cut()
            network.delay = 0

    async def _count(self, cell: Cell) -> None:
        """The effects: results that are committed, or rows."""
        if cell.mode == "transactional":
            broker = self._brokers[cell.broker]
            cell.stored = len(await read(broker, cell.place))  # offsets count markers, too
            results = await read(broker, cell.place, isolation_level="read_committed")
            effects = [int(record.value) for record in results]
        else:
            with database(cell.path).connect() as connection:
                effects = list(connection.exec_driver_sql("SELECT number FROM effect").scalars())
            database(cell.path).dispose()
        cell.effects = len(effects)
        cell.lost = cell.messages - len(set(effects))
        cell.duplicated = len(effects) - len(set(effects))
