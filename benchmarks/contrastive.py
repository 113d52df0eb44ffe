"""A contrastive loss over the whole batch: oa.microbatch and plain accumulation.

Runs examples/contrastive.py from ten seeds, which choose the parameters at the start
and the batches.

It fails if oa.microbatch leaves the test loss of the whole batch, or if plain
accumulation does not.
"""

import argparse
import contextlib
import io
import runpy
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import shared

EXAMPLE = Path(__file__).parents[1] / "examples" / "contrastive.py"
TOLERANCE = 1e-4  # of a test loss, after 120 steps in float32
WHOLE, IN_PARTS, PLAIN = WAYS = ("whole batch", "oa.microbatch", "plain accumulation")


class Row(NamedTuple):
    """A training run after some of its steps."""

    way: str
    seed: int
    step: int
    loss: float  # on the test images
    matched: float  # the part of the test images that find their other half
    memory: int  # temporaries of a step, in bytes


def run_example(*arguments: str) -> dict[str, Any]:
    """Its variables at the end. What it prints is left out."""
    before = sys.argv
    sys.argv = [str(EXAMPLE), *arguments]
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return runpy.run_path(str(EXAMPLE))
    finally:
        sys.argv = before


def measure(options: argparse.Namespace) -> list[Row]:
    rows = []
    for seed in shared.track(range(2 if options.quick else 10), "seeds"):
        ends = run_example("--seed", str(seed))
        for way, tests, memory in zip(WAYS, ends["tests"], ends["memory"], strict=True):
            for step, (loss, matched) in tests.items():
                rows.append(Row(way, seed, step, float(loss), float(matched), memory))
    return rows


def at_the_end(rows: list[Row]) -> dict[str, list[Row]]:
    """The last row of each seed, by way."""
    last = max(row.step for row in rows)
    return shared.grouped([row for row in rows if row.step == last], "way")


def span(numbers: Iterator[float], form: str) -> str:
    low, *_, high = sorted(numbers)
    return f"{low:{form}} to {high:{form}}"


def tables(rows: list[Row]) -> list[shared.Table]:
    return [
        shared.Table(
            f"after {rows[-1].step} steps, {rows[-1].seed + 1} seeds",
            ("way", "test loss", "test images matched", "temporaries"),
            "lrrr",
            [
                (
                    way,
                    span((r.loss for r in own), ".3f"),
                    span((r.matched for r in own), ".1%"),
                    f"{own[0].memory / 1e6:.1f} MB",
                )
                for way, own in at_the_end(rows).items()
            ],
        )
    ]


def away(rows: list[Row], way: str) -> list[float]:
    """How far each test loss is above that of the whole batch."""
    ways = shared.grouped(rows, "way")
    return [a.loss - b.loss for a, b in zip(ways[way], ways[WHOLE], strict=True)]


def check(rows: list[Row]) -> str:
    worst = max(map(abs, away(rows, IN_PARTS)))
    least = min(away(rows, PLAIN))
    text = (
        f"Test losses differ from the whole batch's by {worst:.0e} at most with "
        f"oa.microbatch, and by {least:.2f} at least with plain accumulation."
    )
    if not worst <= TOLERANCE < least:
        raise SystemExit(f"FAILED: {text}")
    return text


def draw(rows: list[Row]) -> Any:
    """Test losses, and what is matched at the end: every seed, and their mean."""
    plt = shared.pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.3, 3.4))
    styles: dict[str, Any] = {
        WHOLE: {"color": shared.GREY, "lw": 7},
        IN_PARTS: {"color": shared.BLUE, "lw": 2.5},
        PLAIN: {"color": shared.RED, "lw": 2.5},
    }
    last = at_the_end(rows)
    for place, (way, style) in enumerate(styles.items()):
        steps = shared.grouped([r for r in rows if r.way == way], "step")
        means = [statistics.mean(r.loss for r in own) for own in steps.values()]
        left.plot(list(steps), means, label=way, **style)
        lows = [min(r.loss for r in own) for own in steps.values()]
        highs = [max(r.loss for r in own) for own in steps.values()]
        color = style["color"]
        left.fill_between(list(steps), lows, highs, color=color, alpha=0.25, lw=0)
        matched = [100 * r.matched for r in last[way]]
        right.bar(place, statistics.mean(matched), 0.6, color=color, alpha=0.5)
        right.plot([place] * len(matched), matched, "o", color=color, ms=4)
    left.set(title="Test loss", xlabel="step", ylim=0)
    right.set(title="Test images matched, %", ylim=(0, 100))
    right.set_xticks(range(3), [way.replace(" ", "\n") for way in WAYS])
    figure.legend(loc="outside upper center", ncols=3)
    return figure


BENCHMARK = shared.Benchmark(
    row=Row, measure=measure, tables=tables, check=check, draw=draw
)
