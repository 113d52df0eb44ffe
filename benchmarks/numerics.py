"""How exact is a sum of k gradients? By the dtype of the gradients and of the sum.

Every way is given the same k gradients, drawn at random, and its result is compared
with their mean in float64. What counts is what the inner optimizer is given: one that
only remembers it stands in for one that trains. The errors are of rounding and nothing
else, and therefore the same at every run on one machine.

It fails if 4096 ones do not sum to 4096 by default, or if they do not stall at 256 in
bfloat16.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_accum as oa
from benchmarks import shared

ELEMENTS = 1024  # of a gradient, over which the error is a norm
HALF_ULP = {"float32": 2.0**-24, "bfloat16": 2.0**-9}  # the error of one rounding

DEFAULT = "accumulate"
NARROW = "accumulate, bfloat16 sums"
WIDE = "accumulate, float64 sums"
RUNNING = "optax.MultiSteps"
RUNNING_NARROW = "optax.MultiSteps, bfloat16 mean"
IN_STEP = "value_and_grad"
AT_ONCE = "the global batch at once"

ONES, SHIFTED, CANCELLING = "all ones", "normal, mean 1", "normal, mean 0"
TITLES = {SHIFTED: "agree", CANCELLING: "cancel"}


class Row(NamedTuple):
    """The error of one way on k gradients."""

    gradients: str
    dtype: str
    way: str
    k: int
    error: float  # ‖result − exact‖ / ‖exact‖, both in float64
    largest: float  # the largest element of the result


def remember(dtype: Any) -> optax.GradientTransformation:
    """An optimizer whose state is the last gradient that it was given."""

    def init(params):
        return jnp.zeros(params.shape, dtype)

    def update(updates, state, params=None):
        del params
        return updates, updates.astype(state.dtype)

    return optax.GradientTransformation(init, update)


def last_state(tx: Any, grads: jax.Array) -> Any:
    """The state after one micro-step for each row of `grads`."""
    params = jnp.zeros_like(grads[0])

    def micro_step(state, g):
        _, state = tx.update(g, state, params)
        return state, None

    return jax.lax.scan(micro_step, tx.init(params), grads)[0]


@functools.partial(jax.jit, static_argnums=1)
def accumulated(grads: jax.Array, dtype: Any = None) -> jax.Array:
    inner = remember(jnp.promote_types(jnp.float32, dtype or jnp.float32))
    tx = oa.accumulate(inner, len(grads), accumulator_dtype=dtype)
    return last_state(tx, grads).inner_state


@functools.partial(jax.jit, static_argnums=1)
def multi_steps(grads: jax.Array, dtype: Any = jnp.float32) -> jax.Array:
    inner = remember(jnp.float32)
    tx = optax.MultiSteps(inner, len(grads), accumulator_dtype=dtype)
    return last_state(tx, grads).inner_opt_state


def loss(params: jax.Array, batch: jax.Array) -> jax.Array:
    """A loss whose gradient on one example is that example."""
    return jnp.mean(batch @ params)


@jax.jit
def in_step(grads: jax.Array) -> jax.Array:
    gradient = oa.grad(loss, microbatch_size=1)
    return gradient(jnp.zeros_like(grads[0]), grads)


@jax.jit
def at_once(grads: jax.Array) -> jax.Array:
    return jax.grad(loss)(jnp.zeros_like(grads[0]), grads)


def in_float64(grads: jax.Array) -> np.ndarray:
    with jax.enable_x64(True):
        return np.asarray(accumulated(grads, jnp.float64))


WAYS: dict[str, Callable[[jax.Array], Any]] = {
    DEFAULT: accumulated,
    RUNNING: multi_steps,
    IN_STEP: in_step,
    AT_ONCE: at_once,
    NARROW: functools.partial(accumulated, dtype=jnp.bfloat16),
    RUNNING_NARROW: functools.partial(multi_steps, dtype=jnp.bfloat16),
    WIDE: in_float64,
}


EVERY_WAY = tuple(WAYS)
CASES = {
    (SHIFTED, "float32"): EVERY_WAY,
    (CANCELLING, "float32"): EVERY_WAY,
    (SHIFTED, "bfloat16"): (DEFAULT, RUNNING, IN_STEP, AT_ONCE),
    (ONES, "bfloat16"): (DEFAULT, NARROW),  # to show where a sum stalls
}


def draw_gradients(kind: str, k: int, elements: int) -> np.ndarray:
    """``f32[k, elements]``, the same for the first k whatever k is."""
    if kind == ONES:
        return np.ones((k, elements), np.float32)
    noise = np.random.default_rng(0).normal(size=(k, elements))
    return (noise + (kind == SHIFTED)).astype(np.float32)


def measure(options: argparse.Namespace) -> list[Row]:
    counts = [1, 16, 512] if options.quick else [4**n for n in range(7)]
    elements = 64 if options.quick else ELEMENTS
    rows = []
    for (kind, dtype), ways in shared.track(CASES.items(), "summing"):
        drawn = draw_gradients(kind, max(counts), elements)
        for k in counts:
            grads = jnp.asarray(drawn[:k], dtype)
            # The gradients' own rounding is not the sum's error.
            exact = np.asarray(grads, np.float64).mean(0)
            for way in ways:
                result = np.asarray(WAYS[way](grads), np.float64)
                error = np.linalg.norm(result - exact) / np.linalg.norm(exact)
                largest = float(result.max())
                rows.append(Row(kind, dtype, way, k, float(error), largest))
    return rows


def check(rows: list[Row]) -> str:
    """Raises unless ones sum to what they should."""
    for r in rows:
        if r.gradients == ONES and r.way in (DEFAULT, NARROW):
            stalled = min(r.k, 256) if r.way == NARROW else r.k
            # The stalled sum over k, in bfloat16: exact, for both are powers of two.
            if r.largest != stalled / r.k:
                raise SystemExit(f"{r.k} ones, {r.way}: {r.largest * r.k}")
    return "Ones add up to k by default; in bfloat16 they stop at 256."


def counts_of(rows: list[Row]) -> list[int]:
    return sorted({r.k for r in rows})


def tables(rows: list[Row]) -> list[shared.Table]:
    counts = counts_of(rows)
    return [
        shared.Table(
            ", ".join(case),
            ("error for k =", *map(str, counts)),
            "l" + "r" * len(counts),
            [
                (way, *(shown(r.error) for r in rows if r[:3] == (*case, way)))
                for way in ways
            ],
        )
        for case, ways in CASES.items()
    ]


def page_table(rows: list[Row]) -> shared.Table:
    """The largest k alone; the chart has the others."""
    k = max(counts_of(rows))
    errors = {r[:3]: shown(r.error) for r in rows if r.k == k}
    cases = [case for case in CASES if case[0] != ONES]
    return shared.Table(
        f"The error of a mean of {k} gradients, ‖result − exact‖ / ‖exact‖ over "
        f"{ELEMENTS} elements",
        ("way", *(f"{TITLES[kind]}, {dtype}" for kind, dtype in cases)),
        "lrrr",
        [(way, *(errors.get((*case, way), "") for case in cases)) for way in WAYS],
    )


def shown(error: float) -> str:
    return "0" if error == 0 else f"{error:.0e}"


def draw(rows: list[Row]) -> Any:
    """The error over k, and what theory expects of it."""
    plt = shared.pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(7.3, 4.6), sharey=True)
    styles = {
        NARROW: (shared.RED, "o-", "accumulate, bfloat16 sums"),
        RUNNING_NARROW: (shared.ORANGE, "s--", "MultiSteps, bfloat16 mean"),
        DEFAULT: (shared.BLUE, "o-", "accumulate, float32 sums (default)"),
        RUNNING: (shared.GREEN, "s--", "MultiSteps, float32 mean (default)"),
    }
    counts = counts_of(rows)
    for axis, (kind, title) in zip(axes, TITLES.items(), strict=True):
        for unit, label in zip(HALF_ULP.values(), ("√k roundings", None), strict=True):
            axis.plot(
                counts, np.sqrt(counts) * unit, ":", color=shared.GREY, label=label
            )
        for way, (color, style, label) in styles.items():
            own = [r for r in rows if r[:3] == (kind, "float32", way) and r.error]
            k, errors = [r.k for r in own], [r.error for r in own]
            axis.plot(k, errors, style, color=color, ms=4, label=label)
        axis.set(
            title=f"Gradients that {title}", xlabel="k, the number of micro-batches"
        )
        axis.set_xscale("log", base=4)
        axis.set_xticks(counts, [str(k) for k in counts])
        axis.set_yscale("log")
        axis.set_ylim(1e-8, 3)
    axes[0].set_ylabel("relative error of the mean gradient")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=2, fontsize=9)
    return figure


BENCHMARK = shared.Benchmark(
    row=Row,
    measure=measure,
    tables=tables,
    check=check,
    draw=draw,
    page="numerics.md",
    page_table=page_table,
)
