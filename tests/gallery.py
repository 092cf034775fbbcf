"""Every kind of figure on one page, in colour and in grey, from made-up data: `python3 -m tests.gallery page.html`."""

from __future__ import annotations

import base64
import html
import io
import math
import random
import sys
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
PARTITIONS = {f"partition {number}": {member: chance.randrange(20, 400) for member in ("A", "B", "C")}
              for number in range(4)}  # fmt: skip

SAMPLES: dict[str, Callable[[], Picture]] = {
    "bars": lambda: plots.bars(
        {"await each": 1300, "pipelined": 55_000, "in batches": 190_000},
        "Pipelining is forty times faster than awaiting each record",
        "records per second",
    ),
    "bars, by meaning, log": lambda: plots.bars(
        {"with acks=0": 1.2, "with acks=all": 940.0},
        "A frozen broker shows only with acks=all",
        "milliseconds",
        ["naive", "fixed"],
        log=True,
        decimals=1,
    ),
    "bars, many": lambda: plots.bars(
        {f"consumer {number}": 100 + 7 * number for number in range(12)},
        "Twelve consumers share almost evenly",
        "tasks",
    ),
    "grouped": lambda: plots.grouped(
        {
            "none": {"1 kB": 1000, "10 kB": 9800, "100 kB": 97_000},
            "zstd": {"1 kB": 180, "10 kB": 1300, "100 kB": 12_100},
        },
        "zstd sends an eighth of the bytes",
        "bytes on the wire",
        "size of a record",
    ),
    "shares": lambda: plots.shares(PARTITIONS, "No member has a partition for itself", "records"),
    "lines": lambda: plots.lines(
        {"lag": (SECONDS, LAG), "produced": (SECONDS, [4 * second for second in SECONDS])},
        "The lag rises while the broker is away, and goes back to 0",
        "seconds",
        "records",
        events={"broker killed": 2.0, "rebalance": (5.0, 6.5)},
        band={"lag": ([0.8 * lag for lag in LAG], [1.2 * lag + 5 for lag in LAG])},
    ),
    "lines, steps, log": lambda: plots.lines(
        {"fixed interval": ([0, 1, 2, 3, 4], [1, 16, 32, 48, 64]), "doubling": ([0, 1, 2, 3, 4], [1, 4, 5, 6, 7])},
        "A doubling interval probes seven times instead of sixty-four",
        "seconds",
        "probes",
        steps=True,
        log_y=True,
    ),
    "lines, nothing yet": lambda: plots.lines(
        {"lag": ([], [])}, "What a live figure begins with", "seconds", "records"
    ),
    "pair": lambda: plots.pair(
        ("throughput, messages/s", [1, 10, 100, 1000], [900, 5200, 9100, 9300]),
        ("p99, ms", [1, 10, 100, 1000], [2, 3, 14, 160]),
        "Beyond a prefetch of 100 only the waiting grows",
        "prefetch",
    ),
    "areas": lambda: plots.areas(
        {"ready": (SECONDS, LAG), "unacknowledged": (SECONDS, [30.0] * len(SECONDS))},
        "What is unacknowledged is not gone from the queue",
        "seconds",
        "messages",
    ),
    "boxes": lambda: plots.boxes(WAITS, "prefetch 1: the typical task waits a third as long", "milliseconds"),
    "ecdf": lambda: plots.ecdf(
        {"service": [0.01] * 990 + [5.0] * 10}, "The mean, 60 ms, is a time that no message took", "seconds", mean=True
    ),
    "ecdf, several": lambda: plots.ecdf(WAITS, "prefetch 1 shortens the tail most", "milliseconds"),
    "histogram": lambda: plots.histogram(WAITS, "prefetch 1: the waits lie close together", "milliseconds", log=True),
    "scatter": lambda: plots.scatter(
        {"one hold queue": ([1, 2, 3, 4], [4, 4, 4, 4]), "a queue per delay": ([1, 2, 3, 4], [1.05, 2.02, 3.1, 4.04])},
        "In one queue the short delay waits behind the long one",
        "asked, seconds",
        "measured, seconds",
        diagonal=True,
    ),
    "gantt": lambda: plots.gantt(
        {
            "greedy": [Span("slow worker", 0, 4), Span("fast worker", 0, 0.8), Span("fast worker", 0.9, 0.9, "failed")],
            "fair": [Span("slow worker", 0, 1), *(Span("fast worker", n / 4, (n + 1) / 4) for n in range(5))],
        },
        "prefetch 1: nobody waits behind the slow worker",
    ),
    "states": lambda: plots.states(
        {
            "breaker": [
                (0, "closed"),
                (1.2, "open"),
                (3.2, "half-open"),
                (3.4, "open"),
                (7.4, "half-open"),
                (7.6, "closed"),
            ],
            "broker": [(0, "up"), (1, "away"), (5.5, "up")],
        },
        10,
        "The breaker closes two seconds after the broker is back",
        events={"SIGSTOP": 1.0, "SIGCONT": 5.5},
    ),
    "heatmap": lambda: plots.heatmap(
        PARTITIONS, "Member B has partition 2 almost alone", "member", "partition", "records"
    ),
    "heatmap, words": lambda: plots.heatmap(
        {
            f"partition {number}": {second: "ABC"[(number + (second > 4)) % 3] for second in range(10)}
            for number in range(3)
        },
        "At second 5 every partition changes its owner",
        "seconds",
        "partition",
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
            "producer": ("app", 0, 0.5),
            "orders": ("exchange", 1, 0.5),
            "billing": ("queue", 2, 0),
            "archive": ("store", 2, 1),
        },
        [("producer", "orders", "publish"), ("orders", "billing", "order.*"), ("orders", "archive", "#")],
        "An exchange copies a message to every queue that is bound",
    ),
}
"""By the function's name and, after a comma, the variant."""


def page() -> str:
    """The page."""
    parts = [
        "<!doctype html><meta charset=utf-8><title>Figures</title>"
        "<style>body{font:16px sans-serif;margin:2em}img{width:48%;vertical-align:top}</style>"
        "<h1>Every kind of figure</h1><p>The data are made up.</p>"
    ]
    for name, draw in SAMPLES.items():
        about = (getattr(plots, name.partition(",")[0]).__doc__ or "").split("\n\n")[0]
        png = draw()._repr_png_()
        grey = io.BytesIO()
        Image.open(io.BytesIO(png)).convert("L").save(grey, "PNG")
        parts.append(f"<h2>plots.{name}</h2><p>{html.escape(about)}</p>")
        for picture in (png, grey.getvalue()):
            parts.append(
                f'<img alt="{html.escape(name)}" src="data:image/png;base64,{base64.b64encode(picture).decode()}">'
            )
    return "\n".join(parts)


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
