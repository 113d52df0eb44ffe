"""How fast and how densely `oa.token_batches` packs 100,000 documents.

A micro-batch has up to 32768 tokens in rows of 4096. The lengths are

uniform     anything from 1 to 4096 tokens
log-normal  mostly short and a few long, as documents of the web are
middling    from 1/4 to 3/4 of a row: with much that does not fit together
paragraphs  the characters of the paragraphs of Python's language reference, drawn again
            and again

Nothing is trained: the plan alone is timed, on the processor that would otherwise
prepare the data. What is counted is exact. It fails if planning takes a second or more.
"""

import argparse
import math
import pydoc_data.topics
import statistics
import time
from typing import Any, NamedTuple

import numpy as np

import optax_accum as oa
from benchmarks import shared

ROW, BUDGET = 4096, 32768  # tokens
MOST_SECONDS = 1.0


class Row(NamedTuple):
    """The plan for one distribution of lengths."""

    lengths: str
    documents: int
    mean: float  # tokens of a document
    rows: int  # with a document in them
    fewest: int  # rows that all tokens would fill
    micro_batches: int
    shapes: int
    padding: float  # as a share of all tokens
    alone: float  # the same, if every document had a row of its own
    seconds: float  # median


def distributions(number: int) -> dict[str, np.ndarray]:
    """`number` lengths of each kind."""
    random = np.random.default_rng(0)
    topics = pydoc_data.topics.topics.values()
    paragraphs = [len(p) for t in topics for p in t.split("\n\n") if p]
    return {
        "uniform": random.integers(1, ROW + 1, number),
        "log-normal": random.lognormal(6, 1.2, number).astype(int).clip(1, ROW),
        "middling": random.integers(ROW // 4, 3 * ROW // 4 + 1, number),
        "paragraphs": random.choice(paragraphs, number).clip(1, ROW),
    }


def measure(options: argparse.Namespace) -> list[Row]:
    kinds = distributions(5_000 if options.quick else 100_000)
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    plans: dict[str, Any] = {}
    for _, name in shared.track(
        shared.in_turn(list(kinds), options.rounds), "planning"
    ):
        start = time.perf_counter()
        plans[name] = oa.token_batches(kinds[name], BUDGET, row_length=ROW)
        seconds[name].append(time.perf_counter() - start)
    rows = []
    for name, lengths in kinds.items():
        plan, tokens = plans[name], int(lengths.sum())
        row = Row(
            lengths=name,
            documents=len(lengths),
            mean=tokens / len(lengths),
            rows=sum(bool(row) for batch in plan for row in batch.documents),
            fewest=-(-tokens // ROW),
            micro_batches=len(plan),
            shapes=len({batch.shape for batch in plan}),
            padding=1 - tokens / sum(math.prod(batch.shape) for batch in plan),
            alone=1 - tokens / (len(lengths) * ROW),
            seconds=statistics.median(seconds[name]),
        )
        rows.append(row)
    return rows


def table(rows: list[Row]) -> shared.Table:
    return shared.Table(
        f"{rows[0].documents:,} documents, rows of {ROW} tokens, micro-batches of "
        f"{BUDGET}",
        (
            "lengths",
            "mean",
            "rows",
            "at least",
            "padding",
            "a row each",
            "shapes",
            "seconds",
        ),
        "lrrrrrrr",
        [
            (
                r.lengths,
                f"{r.mean:.0f}",
                f"{r.rows:,}",
                f"{r.fewest:,}",
                f"{r.padding:.2%}",
                f"{r.alone:.0%}",
                str(r.shapes),
                f"{r.seconds:.2f}",
            )
            for r in rows
        ],
    )


def check(rows: list[Row]) -> str:
    slowest = max(rows, key=lambda row: row.seconds)
    text = (
        f"Planning {slowest.documents:,} documents took {slowest.seconds:.2f} s at "
        f"most ({slowest.lengths})."
    )
    if slowest.seconds >= MOST_SECONDS:
        raise SystemExit(f"FAILED: {text} Less than {MOST_SECONDS:.0f} s is promised.")
    return text


BENCHMARK = shared.Benchmark(
    row=Row,
    measure=measure,
    tables=lambda rows: [table(rows)],
    check=check,
    page="token-budgets.md",
    page_table=table,
    rounds=5,
)
