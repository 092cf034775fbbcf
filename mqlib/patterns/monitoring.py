"""Watching queues: a monitor that is sampled, alerts that hold before they ring, and health over HTTP.

What is watched is a `LagMonitor`, a `DepthMonitor` or a `Canary`; what their samples say of a backlog is in `backlog`.
What cannot be known is a state of its own: "we do not know" is not "all is well".
After https://prometheus.io/docs/prometheus/latest/configuration/alerting_rules/ (`for`, `keep_firing_for`), and
Google's Site Reliability Engineering, "Monitoring Distributed Systems".
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol

from ..lag import GroupLag
from ..waiting import beside
from .backlog import drain as drain  # also from here: what alerts look at
from .backlog import stalled as stalled

Clock = Callable[[], float]
Value = Callable[[Sequence[Any]], float | None]
"""What an alert looks at, from a monitor's samples, the newest last; None or NaN when it cannot be known."""


class State(StrEnum):
    """What an alert says."""

    OK = "ok"
    FIRING = "firing"
    UNKNOWN = "unknown"


class Alert:
    """Fires when a value was `fires_at` or more for `fires_after` seconds; clears when it was `clears_at` or less for
    `clears_after` seconds. In between it stays what it is.

    Without a known value for `unknown_after` seconds it is unknown, whatever it was; after that it goes on as what it
    was, and what had to hold begins anew. A shorter gap is bridged. A condition is a value of True or False:
    `fires_at=1, clears_at=0`. Raises `ValueError` for limits that make no sense.
    """

    def __init__(
        self, name: str, fires_at: float, clears_at: float, fires_after: float = 60.0, clears_after: float = 60.0,
        unknown_after: float = 60.0, clock: Clock = time.monotonic,
    ) -> None:  # fmt: skip
        if not clears_at < fires_at:
            raise ValueError(f"alert {name!r}: clears_at ({clears_at}) is below fires_at ({fires_at})")
        if not (fires_after >= 0 and clears_after >= 0 and unknown_after > 0):
            raise ValueError(f"alert {name!r}: fires_after and clears_after are seconds from 0, unknown_after above 0")
        self.name, self.unknown_after = name, unknown_after
        self.value: float | None = None
        """The last known value."""
        self.listeners: list[Callable[[Alert, State | None], object]] = []
        """Called once a change, with the alert and the state before; that before the first is None."""
        self.error: Exception | None = None
        """What a listener raised last; the others are called all the same."""
        self._limits, self._holds, self._clock = (fires_at, clears_at), (fires_after, clears_after), clock
        self._firing = False
        self._told: State | None = None
        self._since: float | None = None  # when the known values began to ask for a change
        self._known, self._began = -math.inf, clock()

    def __str__(self) -> str:
        return f"{self.name}: {self.state}" + ("" if self.value is None else f" (last value {self.value:.4g})")

    @property
    def state(self) -> State:
        """What it says now; unknown also when nobody has told it anything for too long."""
        if self._clock() - self._known >= self.unknown_after:
            return State.UNKNOWN
        return State.FIRING if self._firing else State.OK

    def observe(self, value: float | None) -> State:
        """Takes in a value, None or NaN if it is not known; tells the listeners of a change, and returns the state."""
        now = self._clock()
        if value is not None and not math.isnan(value):
            if self.state is State.UNKNOWN:
                self._since = None
            if not (value <= self._limits[1] if self._firing else value >= self._limits[0]):
                self._since = None
            elif now - (since := now if self._since is None else self._since) >= self._holds[self._firing]:
                self._firing, self._since = not self._firing, None
            else:
                self._since = since
            self._known, self.value = now, value
        state, before = self.state, self._told
        begun = self._known > -math.inf or now - self._began >= self.unknown_after
        if begun and state is not before:
            self._told = state
            for listener in self.listeners:
                try:
                    listener(self, before)
                except Exception as error:
                    self.error = error
        return state


class Monitor(Protocol):
    """What can be watched: a `LagMonitor`, a `DepthMonitor`, a `Canary`, or what has the same two."""

    samples: list[Any]

    async def sample(self) -> Any:
        """Takes one sample, in a bounded time, and keeps it in `samples`. Raises when there is no answer."""


class Watch:
    """A monitor that is sampled, and the alerts that look at its samples; made by `watching`."""

    def __init__(self, monitor: Monitor, alerts: Mapping[Alert, Value], every: float, keep: int, clock: Clock) -> None:
        self.monitor, self.alerts, self.every = monitor, alerts, every
        self.missed = 0
        """Samples without an answer."""
        self.error: Exception | None = None
        """Why the last sample, or what an alert makes of it, is not known; None when all is."""
        self.turned = clock()
        """When the last sample was over, with an answer or without."""
        self.clock, self._keep = clock, keep

    async def step(self) -> None:
        """Takes one sample, and tells the alerts."""
        failed: Exception | None = None
        try:
            await self.monitor.sample()
        except Exception as error:  # whatever it is, nothing is known, and the watch goes on
            self.missed, failed = self.missed + 1, error
        del self.monitor.samples[: -self._keep]
        unanswered = failed is not None
        for alert, value in self.alerts.items():
            found = None
            try:
                found = None if unanswered else value(self.monitor.samples)
            except Exception as error:
                failed = error
            alert.observe(found)
        self.error, self.turned = failed, self.clock()

    async def run(self) -> None:
        """Steps for ever, every `every` seconds."""
        due = self.clock()
        while True:
            await self.step()
            due = max(due + self.every, self.clock())
            await asyncio.sleep(due - self.clock())


@contextlib.asynccontextmanager
async def watching(
    monitor: Any, alerts: Mapping[Alert, Value] | None = None, every: float = 5.0, keep: int = 1000,
    clock: Clock = time.monotonic,
) -> AsyncIterator[Watch]:  # fmt: skip
    """Samples a monitor every `every` seconds during the block, and lets each alert observe what its function makes of
    the samples: `watching(LagMonitor(kafka, "billing"), {late: lambda samples: samples[-1].seconds})`.

    A monitor that is a context manager is entered, and raises what that raises; after that, a sample without an answer
    is unknown. The last `keep` samples are kept. Raises `ValueError` for an alert that would be unknown between two.
    """
    alerts = alerts or {}
    if not every > 0 or keep < 1:
        raise ValueError(f"every is seconds above 0, keep at least one sample, not {every!r} and {keep!r}")
    if hasty := [alert.name for alert in alerts if alert.unknown_after <= every]:
        raise ValueError(f"unknown_after must be longer than every ({every:g} s); it is not for: {', '.join(hasty)}")
    async with contextlib.AsyncExitStack() as stack:
        if hasattr(monitor, "__aenter__"):
            await stack.enter_async_context(monitor)
        watch = Watch(monitor, alerts, every, keep, clock)
        await stack.enter_async_context(beside(watch.run()))
        yield watch


@dataclass(frozen=True)
class Health:
    """Whether a process is to be restarted (not `live`), and whether it does what it is there for (`ready`)."""

    live: bool
    ready: bool
    reasons: tuple[str, ...]
    """Why not, one for each fault."""


def health(*watches: Watch, stalled_after: float = 60.0, slack: int = 0) -> Health:
    """Judges by the watches. Not live: the event loop does not turn, or consumers have stalled for `stalled_after`
    seconds although the broker answers; restarting helps against nothing else. Not ready: those, no answer, progress
    that is unknown, an alert that fires or is unknown. May be called from another thread: only there a loop that is
    blocked can be told. See https://kubernetes.io/docs/concepts/configuration/liveness-readiness-startup-probes/.
    """
    dead, unready = list[str](), list[str]()
    for watch in watches:
        samples = list(watch.monitor.samples)
        idle = watch.clock() - watch.turned - watch.every
        if idle > stalled_after:
            dead.append(f"no sample was tried for {idle:.0f} s more than planned: is the event loop blocked?")
        elif watch.error or not samples:
            unready.append(f"the last sample is unknown: {watch.error or 'there is none yet'}")
        elif isinstance(samples[-1], GroupLag | tuple):
            silent = stalled(samples, slack)
            if silent is None:
                unready.append(f"progress is unknown: {samples[-1]}")
            elif silent >= stalled_after:
                certain = isinstance(samples[-1], GroupLag) or not samples[-1][1].consumers
                (dead if certain else unready).append(f"no sign of progress for {silent:.0f} s")
        unready += [str(alert) for alert in watch.alerts if alert.state is not State.OK]
    return Health(not dead, not dead and not unready, (*dead, *unready))


@contextlib.contextmanager
def serve_health(judge: Callable[[], Health], port: int = 0, host: str = "127.0.0.1") -> Iterator[str]:
    """Serves `/live` and `/ready` until the end of the block, from a thread, and yields the URL; port 0 is a free one.

    Answers 200 or 503, with a line for each reason. `with serve_health(lambda: health(watch)) as url`. Raises
    `OSError`, which names the address, when that cannot be had.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = judge()
            fine = {"/live": found.live, "/ready": found.ready}.get(self.path.partition("?")[0])
            self.send_response(404 if fine is None else 200 if fine else 503)
            self.end_headers()
            self.wfile.write("\n".join(found.reasons or ("ok",)).encode())

        def log_message(self, *_: Any) -> None:
            pass

    try:
        server = ThreadingHTTPServer((host, port), Handler)
    except (OSError, OverflowError) as error:
        raise OSError(f"cannot serve health on {host}, port {port} (0 takes a free one): {error}") from error
    with server:
        thread = threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True)
        thread.start()
        try:
            yield f"http://{host}:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
