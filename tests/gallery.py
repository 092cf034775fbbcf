"""Every kind of figure on one page, in colour and in grey, from made-up data: `python3 -m tests.gallery page.html`."""

from __future__ import annotations

import argparse
import base64
import html
import inspect
import io
import itertools
import math
import random
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from mqlib import plots
from mqlib.plots import Picture, Span

chance = random.Random(4)
SECONDS = [second / 4 for second in range(40)]
LAG = [max(0.0, 120 * math.sin(second / 2.5) + 20 * chance.random()) for second in SECONDS]
WAITS = {
    "prefetch 250": [chance.lognormvariate(3, 0.9) for _ in range(600)],
    "prefetch 1": [chance.lognormvariate(2, 0.4) for _ in range(600)],
}
MEMBERS = {f"partition {number}": {member: chance.randrange(20, 400) for member in "ABC"} for number in range(4)}
KEYS = {f"key {number}": (sorted(chance.sample(range(100), 20)), [number * 7 % 3] * 20) for number in range(5)}
CLICKS = {f"user {number}": {at: chance.randrange(60) for at in range(24)} for number in range(8)}

SAMPLES: dict[str, Callable[[], Picture]] = {
    "bars": lambda: plots.bars(
        {"await each": 1300, "pipelined": 55_000, "in batches": 190_000},
        "Pipelining is forty times faster than awaiting each record", "records per second",
    ),
    "bars, by meaning, log": lambda: plots.bars(
        {"nobody waits": 0, "acks=0": 1.2, "acks=all": 940}, "A frozen broker shows only with acks=all", "milliseconds",
        ["neutral", "naive", "fixed"], log=True, decimals=1,
    ),
    "bars, long names": lambda: plots.bars(
        {"orders.billing.retry.1000": 12, "at-least-once with deduplication": 1_234_567, "exactly once": 900_000},
        "A title of more than one line is wrapped, as are names: at their spaces, hyphens and dots, not within a word",
        "records per second",
    ),
    "bars, many": lambda: plots.bars(
        {f"consumer {number}": 100 + 7 * number for number in range(12)}, "Twelve consumers share unevenly", "tasks",
    ),
    "grouped": lambda: plots.grouped(
        {"none": {"1 kB": 1000, "10 kB": 9800, "100 kB": 97_000},
         "zstd": {"1 kB": 180, "10 kB": 1300, "100 kB": 12_100}},
        "zstd sends an eighth of the bytes", "bytes on the wire", "size of a record",
    ),
    "grouped, many": lambda: plots.grouped(
        {f"{kind}, {safe}": {f"{size} kB": speed * 6000 // size for size in (1, 4, 16, 64)} for speed, (kind, safe)
         in enumerate(itertools.product(("quorum", "classic", "stream"), ("confirms", "none")), start=3)},
        "Without confirms every kind of queue is faster", "messages per second", "size of a message",
    ),
    "shares": lambda: plots.shares(MEMBERS, "No member has a partition for itself", "records"),
    "shares, of 100": lambda: plots.shares(
        {"no limit": {"in time": 20, "late": 80}, "deadline": {"in time": 60, "late": 3, "shed": 37}},
        "Dropping what is late anyway leaves time for the rest", "messages of 100",
    ),
    "lines": lambda: plots.lines(
        {"lag": (SECONDS, LAG), "produced": (SECONDS, [4 * second for second in SECONDS])},
        "The lag rises while the broker is away, and goes back to 0", "seconds", "records (band: of three runs)",
        events={"broker killed": 2.0, "rebalance": (5.0, 6.5), "at the edge": 9.75},
        band={"lag": ([0.8 * lag for lag in LAG], [1.2 * lag + 5 for lag in LAG])},
    ),
    "lines, many": lambda: plots.lines(
        {f"partition {number}": (SECONDS, [9 * number + 4 + 3 * math.sin(second + number) for second in SECONDS])
         for number in range(8)},
        "Nobody reads partition 7", "seconds", "lag, records",
    ),
    "lines, steps, log": lambda: plots.lines(
        {"fixed interval": ([0, 1, 2, 3, 4], [1, 16, 32, 48, 64]), "doubling": ([0, 1, 2, 3, 4], [1, 4, 5, 6, 7])},
        "A doubling interval probes 7 times instead of 64", "seconds", "probes", steps=True, log_y=True,
        events={"outage": (0.5, 3.5)},
    ),
    "lines, below zero": lambda: plots.lines(
        {"naive": (range(11), range(100, -210, -30)), "fixed": (range(11), range(100, 1, -9))},
        "Without a check the balance goes below zero", "withdrawals", "euros", steps=True,
    ),
    "lines, nothing yet": lambda: plots.lines({"lag": ([], [])}, "How a live figure begins", "seconds", "records"),
    "lines, one point": lambda: plots.lines({"lag": ([0], [7])}, "And how it goes on", "seconds", "records"),
    "areas": lambda: plots.areas(
        {"ready": (SECONDS, LAG), "unacknowledged": (SECONDS, [30.0] * len(SECONDS))},
        "What is unacknowledged is not gone from the queue", "seconds", "messages", events={"consumer killed": 3},
    ),
    "areas, nothing yet": lambda: plots.areas(
        {"ready": ([], []), "unacknowledged": ([], [])}, "How a live figure begins", "seconds", "messages",
    ),
    "pair": lambda: plots.pair(
        ("throughput, messages/s", [1, 10, 100, 1000], [900, 5200, 9100, 9300]),
        ("p99, ms", [1, 10, 100, 1000], [2, 3, 14, 160]), "Beyond a prefetch of 100 only the waiting grows", "prefetch",
    ),
    "boxes": lambda: plots.boxes(WAITS, "prefetch 1: the typical task waits a third as long", "milliseconds"),
    "ecdf": lambda: plots.ecdf(
        {"service": [10.0] * 990 + [5000.0] * 10}, "The mean, 60 ms, is a time that no message took", "milliseconds",
        mark=(50, 99.9), mean=True,
    ),
    "ecdf, several": lambda: plots.ecdf(WAITS, "prefetch 1 shortens the tail most", "milliseconds"),
    "ecdf, shares": lambda: plots.ecdf(
        {"no hedge": ([1, 2, 5, 30, 31], [0.5, 0.9, 0.92, 0.99, 1]), "hedged": ([1, 2, 5, 9], [0.5, 0.9, 0.99, 1])},
        "A second request cuts the tail off", "milliseconds", log=False,
    ),
    "histogram": lambda: plots.histogram(WAITS, "prefetch 1: the waits lie close together", "milliseconds", log=True),
    "scatter": lambda: plots.scatter(
        {"one hold queue": ([1, 2, 3, 4], [4, 4, 4, 4]), "a queue per delay": ([1, 2, 3, 4], [1.05, 2.02, 3.1, 4.04])},
        "In one queue the short delay waits behind the long one", "asked, seconds", "measured, seconds", diagonal=True,
    ),
    "scatter, many": lambda: plots.scatter(
        KEYS, "Each key stays in its partition", "position in the global order", "partition",
    ),
    "gantt": lambda: plots.gantt(
        {
            "greedy": [Span("slow worker", 0, 4), Span("fast worker", 0, 0.8), Span("fast worker", 0.9, 0.9, "failed")],
            "fair": [Span("slow worker", 0, 1), *(Span("fast worker", n / 4, (n + 1) / 4) for n in range(5))],
        },
        "prefetch 1: nobody waits behind the slow worker",
    ),
    "gantt, instants": lambda: plots.gantt(
        {"an order that cannot be shipped": [
            Span("orders", 0.0, 0.1), Span("payment", 0.1, 0.3), Span("stock", 0.3, 0.5),
            Span("shipping", 0.7, 0.7, "failed"), Span("stock", 0.7, 0.8, "undone"),
            Span("payment", 0.8, 1.0, "undone"), Span("orders", 1.0, 1.0, "cancelled"),
        ]},
        "What was done is undone in reverse", events={"timeout": 0.7}, order=["orders", "payment", "stock", "shipping"],
    ),
    "states": lambda: plots.states(
        {
            "breaker": [(0, "closed"), (1.2, "open"), (3.2, "half-open"), (3.4, "open"), (7.4, "half-open"),
                        (7.6, "closed")],
            "broker": [(0, "up"), (1, "away"), (5.5, "up")],
        },
        10, "The breaker closes two seconds after the broker is back", events={"SIGSTOP": 1.0, "SIGCONT": 5.5},
    ),
    "states, owners": lambda: plots.states(
        {f"partition {number}": [(0, "member A"), (4, ""), (4.5 + number / 10, f"member {'ABC'[number % 3]}")]
         for number in range(6)},
        9, "While the group rebalances, nobody owns a partition", events={"B and C join": 4.0},
    ),
    "heatmap": lambda: plots.heatmap(MEMBERS, "Member B has most of partition 2", "member", "partition", "records"),
    "heatmap, many": lambda: plots.heatmap(CLICKS, "Nobody sleeps", "hour of the day", "user", "clicks"),
    "heatmap, words": lambda: plots.heatmap(
        {f"orders-{number}": {"two members": "AB"[number % 2], "C joins": "ABCBAC"[number]} for number in range(6)},
        "Sticky: only what C takes changes its owner", "", "partition",
    ),
    "matrix": lambda: plots.matrix(
        {
            "acks=0": {"SIGKILL": "lost", "connection cut": "lost"},
            "acks=all": {"SIGKILL": "kept", "connection cut": "kept"},
        },
        "Only what was acknowledged by all is kept",
    ),
    "topology": lambda: plots.topology(
        {
            "producer": ("app", 0, 0.5), "orders": ("exchange", 1, 0.5),
            "billing": ("queue", 2, 0), "archive": ("store", 2, 1),
        },
        [("producer", "orders", "publish"), ("orders", "billing", "order.*"), ("orders", "archive", "#")],
        "An exchange copies a message to every queue that is bound",
    ),
    "topology, many": lambda: plots.topology(
        {
            "order service": ("app", 0, 1), "orders": ("exchange", 1, 1), "orders.created.v1": ("queue", 2, 0),
            "orders.retry": ("queue", 2, 1), "dead letters": ("queue", 2, 2), "billing worker": ("app", 3, 0.5),
            "operator": ("app", 3, 2), "ledger": ("store", 4, 0.5),
        },
        [
            ("order service", "orders", "publish"), ("orders", "orders.created.v1", "created"),
            ("orders", "orders.retry", "retry"), ("orders", "dead letters", "expired"),
            ("orders.created.v1", "billing worker", ""), ("orders.retry", "billing worker", ""),
            ("billing worker", "ledger", "upsert"), ("dead letters", "operator", "replay"),
        ],
        "A message that was retried three times waits for an operator",
    ),
}  # fmt: skip
"""By the function's name and, after a comma, the variant."""

HEAD = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Figures of mqlib</title>
<style>body { font: 16px sans-serif; margin: 2em } img { max-width: 49%; vertical-align: top }</style>
<h1>Every kind of figure</h1>
<p>In colour, and as a black-and-white print shows it. The data are samples, made up: nothing was measured.</p>"""


def page() -> str:
    """The page, with all pictures in it."""
    parts = [HEAD]
    for name, draw in SAMPLES.items():
        about = inspect.getdoc(getattr(plots, name.partition(",")[0])) or ""
        png, grey = draw()._repr_png_(), io.BytesIO()
        Image.open(io.BytesIO(png)).convert("L").save(grey, "PNG")
        parts.append(f"<h2>plots.{name}</h2><p>{html.escape(about.splitlines()[0])}</p>")
        for picture, kind in ((png, "in colour"), (grey.getvalue(), "in grey")):
            data = base64.b64encode(picture).decode()
            parts.append(f'<img alt="{name} {kind}" src="data:image/png;base64,{data}">')
    return "\n".join(parts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python3 -m tests.gallery", description=__doc__)
    parser.add_argument("page", type=Path, help="the HTML file to write")
    parser.parse_args().page.write_text(page(), encoding="utf-8")
