"""What the planner sees of a large model, on a machine that could not run it.

A decoder of GPT-2's smallest size, AdamW, a batch of sequences: only shapes; nothing is
allocated. The step is compiled for the numbers of micro-batches that the search asks
for, and for no others. The figures are those of this machine's compiler; another one's,
on a GPU say, keeps other temporaries.
"""

import argparse
import functools
import logging
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

import optax_accum as oa
from benchmarks import shared
from benchmarks.in_step import decoder

BATCH_SIZE = 64  # sequences
LARGE = {"layers": 12, "width": 768, "heads": 12, "length": 512, "vocabulary": 50257}
SMALL = {"layers": 2, "width": 64, "heads": 2, "length": 32, "vocabulary": 64}


class Row(NamedTuple):
    """What one number of micro-batches takes, in bytes on each device."""

    parameters: int
    sequences: int
    tokens: int  # of each
    micro_batches: int
    arguments: int
    outputs: int  # those that do not take the place of an argument
    temporaries: int
    limit: int  # what may be used
    fits: str


def shapes(batch_size: int, sizes: dict[str, int]) -> tuple[Any, Any, Any]:
    """The loss, and the shapes of parameters and batch."""
    losses = []

    def build():
        model = decoder(**sizes, examples=batch_size)
        losses.append(model.loss)
        return model.params, model.batch

    params, batch = jax.eval_shape(build)
    return losses[0], params, batch


def make_plan(
    loss: Any, params: Any, batch: Any, memory_limit: int
) -> oa.diagnose.MicrobatchPlan:
    tx = optax.adamw(1e-3)

    def make_step(num_microbatches: int) -> Any:
        grad = oa.grad(loss, num_microbatches=num_microbatches)

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params, state, batch):
            updates, state = tx.update(grad(params, batch), state, params)
            return optax.apply_updates(params, updates), state

        return step

    state = jax.eval_shape(tx.init, params)
    return oa.diagnose.plan_microbatches(
        make_step,
        params,
        state,
        batch,
        batch_size=batch.shape[0],
        memory_limit=memory_limit,
    )


def measure(options: argparse.Namespace) -> list[Row]:
    limit, sizes = (2**25, SMALL) if options.quick else (2**34, LARGE)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("optax_accum").setLevel(logging.INFO)
    loss, params, batch = shapes(BATCH_SIZE, sizes)
    plan = make_plan(loss, params, batch, limit)
    rows = []
    for candidate in plan.candidates:
        memory = candidate.memory
        assert memory is not None
        row = Row(
            parameters=sum(x.size for x in jax.tree.leaves(params)),
            sequences=BATCH_SIZE,
            tokens=sizes["length"],
            micro_batches=candidate.num_microbatches,
            arguments=memory.arguments,
            outputs=memory.outputs - memory.aliased,
            temporaries=memory.temporaries,
            limit=round(limit * (1 - plan.headroom)),
            fits="yes" if candidate.fits else "no",
        )
        rows.append(row)
    return rows


def unit(rows: list[Row]) -> tuple[int, str]:
    return (2**30, "GiB") if rows[0].limit >= 2**30 else (2**20, "MiB")


def table(rows: list[Row]) -> shared.Table:
    size, name = unit(rows)
    first = rows[0]
    return shared.Table(
        f"{first.parameters / 1e6:.1f}M parameters, AdamW, {first.sequences} sequences "
        f"of {first.tokens} tokens; {name}, of which {first.limit / size:.1f} may be "
        "used",
        ("micro-batches", "arguments", "temporaries", "total", "fits"),
        "rrrrl",
        [
            (
                str(r.micro_batches),
                f"{r.arguments / size:.2f}",
                f"{(r.outputs + r.temporaries) / size:.2f}",
                f"{(r.arguments + r.outputs + r.temporaries) / size:.2f}",
                r.fits,
            )
            for r in rows
        ],
    )


def draw(rows: list[Row]) -> Any:
    """Stacked bars of what each candidate takes, and a line for the limit."""
    plt = shared.pyplot()
    figure, axes = plt.subplots()
    size, name = unit(rows)
    parts = {
        "arguments": np.array([r.arguments for r in rows]) / size,
        "temporaries": np.array([r.outputs + r.temporaries for r in rows]) / size,
    }
    totals = np.sum(list(parts.values()), axis=0)
    labels = [
        f"{r.micro_batches}\n{total:.0f} {name}"
        for r, total in zip(rows, totals, strict=True)
    ]
    bottom = np.zeros(len(rows))
    for (label, part), color in zip(
        parts.items(), (shared.GREY, shared.BLUE), strict=True
    ):
        axes.bar(labels, part, bottom=bottom, label=label, color=color)
        bottom += part
    limit = rows[0].limit / size
    axes.axhline(limit, color=shared.RED, ls="--")
    axes.annotate(
        f"limit: {limit:.1f} {name}",
        (1, limit),
        xycoords=("axes fraction", "data"),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        color=shared.RED,
    )
    axes.set(xlabel="micro-batches, and their total", ylabel=f"{name} on each device")
    axes.tick_params(axis="x", length=0)
    figure.legend(loc="outside upper center", ncols=2)
    return figure


BENCHMARK = shared.Benchmark(
    row=Row,
    measure=measure,
    tables=lambda rows: [table(rows)],
    draw=draw,
    page="planning.md",
    page_table=table,
)
