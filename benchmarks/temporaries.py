"""What every optimizer holds besides its arguments and results, with and without us.

One compiled micro-step each, parameters and state donated, nothing run: the temporaries
that XLA reports, as a multiple of the parameters' bytes.

alone             the optimizer by itself, on every step; what accumulation cannot
                  take away from it
update_params     optax_accum.accumulate, update and apply in one
update            optax_accum.accumulate, then optax.apply_updates
optax.MultiSteps  then optax.apply_updates; "raises" if it does not hand the optimizer
                  the extra arguments that it needs
"""

import argparse
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import optax_accum as oa
from benchmarks import shared
from tests.support import catalogue, hlo

K = 8
DTYPES = ("float32", "bfloat16")
SIDE = 512  # of the square matrices
QUICK = ("optax.adamw", "optax.lion")
# Why XLA gives some more than `optax.MultiSteps`, read in their programs; the page has
# a paragraph for each reason.
REASONS = {
    "optax.lamb": "float32 results",
    "optax.contrib.muon": "float32 results",
    "optax.contrib.prodigy": "float32 results",
    "optax.lion": "crossed reads",
    "optax.optimistic_gradient_descent": "crossed reads",
    "optax.contrib.acprop": "crossed reads",
    "optax.contrib.dadapt_adamw": "sums over all leaves",
}


class Row(NamedTuple):
    """One optimizer's temporaries over its parameters' bytes; nan if it raises."""

    dtype: str
    optimizer: str
    alone: float
    update_params: float
    update: float
    multi_steps: float


def loss(params: Any) -> jax.Array:
    squares = [jnp.sum(x.astype(jnp.float32) ** 2) for x in jax.tree.leaves(params)]
    return jnp.stack(squares).sum()


def make_step(tx: Any, name: str, way: str) -> Callable:
    def step(params, state, grads, value):
        extra = catalogue.extra_args(name, loss, params, grads, value)
        if way == "update_params":
            return tx.update_params(grads, state, params, **extra)
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    return step


def measure(options: argparse.Namespace) -> list[Row]:
    names = options.only or (QUICK if options.quick else catalogue.optimizers())
    cases = [(dtype, name) for dtype in DTYPES for name in names]
    return [measure_one(*case) for case in shared.track(cases, "compiling")]


def measure_one(dtype: str, name: str) -> Row:
    params = {
        "in": jax.ShapeDtypeStruct((SIDE, SIDE), dtype),
        "out": jax.ShapeDtypeStruct((SIDE, SIDE // 2), dtype),
        "bias": jax.ShapeDtypeStruct((SIDE,), dtype),
    }
    inner = optax.with_extra_args_support(catalogue.optimizers()[name]())
    ours = oa.accumulate(inner, K)
    multi_steps = optax.MultiSteps(inner, K).gradient_transformation()

    def ratio(way: str, tx: Any) -> float:
        value = jax.ShapeDtypeStruct((), jnp.float32)
        state = jax.eval_shape(tx.init, params)
        step = make_step(tx, name, way)
        program = hlo.compiled(step, params, state, params, value)
        return hlo.temporaries(program) / hlo.nbytes(params)

    try:
        theirs = ratio("update", optax.with_extra_args_support(multi_steps))
    except (TypeError, ValueError):
        theirs = math.nan
    return Row(
        dtype,
        name,
        ratio("update", inner),
        ratio("update_params", ours),
        ratio("update", ours),
        theirs,
    )


def exceptions(rows: list[Row]) -> list[Row]:
    """Those of which one of our ways takes more than `optax.MultiSteps`."""
    return [r for r in rows if max(r.update_params, r.update) > r.multi_steps + 0.01]


def cells(row: Row) -> tuple[str, ...]:
    return (
        f"`{row.optimizer}`",
        *(f"{x:.2f}" if math.isfinite(x) else "raises" for x in row[2:]),
    )


COLUMNS = ("optimizer", "alone", "update_params", "update", "optax.MultiSteps")


def tables(rows: list[Row]) -> list[shared.Table]:
    whole = [
        shared.Table(
            f"{dtype}: temporaries over the parameters' bytes",
            COLUMNS,
            "lrrrr",
            [cells(r) for r in rows if r.dtype == dtype],
        )
        for dtype in DTYPES
    ]
    return [*whole, page_table(rows)]


def page_table(rows: list[Row]) -> shared.Table:
    return shared.Table(
        "Those that hold more than with `optax.MultiSteps`, times the parameters",
        ("optimizer", "dtype", *COLUMNS[2:], "because of"),
        "llrrrl",
        [
            (
                f"`{r.optimizer}`",
                r.dtype,
                *cells(r)[2:],
                REASONS.get(r.optimizer, "not looked into"),
            )
            for r in exceptions(rows)
        ],
    )


def draw(rows: list[Row]) -> Any:
    """A line for each optimizer, from what it holds with us to `optax.MultiSteps`."""
    plt = shared.pyplot()
    first = [r for r in rows if r.dtype == DTYPES[0]]
    # What is saved most is on top, what raises at the bottom.
    first.sort(key=lambda r: -math.inf if math.isnan(r.multi_steps) else saved(r))
    order = [r.optimizer for r in first]
    figure, axes = plt.subplots(
        1, len(DTYPES), figsize=(7.3, 1.6 + 0.21 * len(order)), sharey=True
    )
    for axis, dtype in zip(axes, DTYPES, strict=True):
        own = {r.optimizer: r for r in rows if r.dtype == dtype}
        draw_dtype(axis, [own[name] for name in order])
        axis.set(title=dtype, xlabel="temporaries, times the parameters")
    names = [name.removeprefix("optax.") for name in order]
    axes[0].set_yticks(range(len(order)), names, fontsize=9)
    axes[0].set_ylim(-0.7, len(order) - 0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=5, columnspacing=1)
    return figure


def saved(row: Row) -> float:
    return row.multi_steps - row.update_params


def draw_dtype(axis: Any, rows: list[Row]) -> None:
    y = range(len(rows))
    for name, values, marker, color, size in (
        ("optax.MultiSteps", [r.multi_steps for r in rows], "s", shared.RED, 5),
        ("update", [r.update for r in rows], "o", shared.BLUE, 8),
        ("update_params", [r.update_params for r in rows], "o", shared.BLUE, 4),
        ("alone", [r.alone for r in rows], "|", shared.INK, 10),
    ):
        face = "none" if name == "update" else color
        axis.plot(values, y, marker, label=name, color=color, mfc=face, ms=size)
    starts = [r.update_params for r in rows]
    axis.hlines(y, starts, [r.multi_steps for r in rows], shared.GREY, lw=1, zorder=0)
    axis.plot(
        [math.isnan(r.multi_steps) or math.nan for r in rows],
        y,
        "x",
        label="MultiSteps raises",
        color=shared.RED,
        transform=axis.get_yaxis_transform(),  # at the right edge
        clip_on=False,
    )
    axis.set_xscale("symlog", linthresh=10, linscale=2)  # a few hold very much
    axis.set_xlim(-0.3, 80)
    axis.set_xticks([0, 2, 4, 6, 8, 10, 50], ["0", "2", "4", "6", "8", "10", "50"])
    axis.tick_params(axis="y", length=0)


BENCHMARK = shared.Benchmark(
    row=Row,
    measure=measure,
    tables=tables,
    draw=draw,
    page="temporaries.md",
    page_table=page_table,
    choices=tuple(catalogue.optimizers()),
)
