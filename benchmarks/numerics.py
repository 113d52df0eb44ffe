"""How exact is a sum of k gradients? By the dtype of the gradients and of the sum.

    python benchmarks/numerics.py                    # the table, on the terminal
    python benchmarks/numerics.py --quick            # a look, in seconds
    python benchmarks/numerics.py --markdown out/numerics.md --picture out/numerics.png

Every way is given the same k gradients, drawn at random, and its result is compared
with their mean in float64. What counts is what the inner optimizer is given: one that
only remembers it stands in for one that trains. The errors are of rounding and nothing
else, so that they are the same at every run on one machine.

The script fails if 4096 ones do not sum to 4096 by default, or if they do not stall at
256 in bfloat16.
"""

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from measuring import pyplot, save, setting, write_lines
from rich import box
from rich.console import Console
from rich.table import Table

import optax_accum as oa

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


class Result(NamedTuple):
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


def measure(counts: list[int], elements: int) -> list[Result]:
    results = []
    for (kind, dtype), ways in CASES.items():
        drawn = draw_gradients(kind, max(counts), elements)
        for k in counts:
            grads = jnp.asarray(drawn[:k], dtype)
            # What the gradients' own rounding lost is no fault of the sum.
            exact = np.asarray(grads, np.float64).mean(0)
            for way in ways:
                result = np.asarray(WAYS[way](grads), np.float64)
                error = np.linalg.norm(result - exact) / np.linalg.norm(exact)
                largest = float(result.max())
                results.append(Result(kind, dtype, way, k, float(error), largest))
    return results


def check(results: list[Result]) -> None:
    """Raises unless ones sum to what they should."""
    for r in results:
        if r.gradients == ONES and r.way in (DEFAULT, NARROW):
            stalled = min(r.k, 256) if r.way == NARROW else r.k
            # The stalled sum over k, in bfloat16: exact, for both are powers of two.
            if r.largest != stalled / r.k:
                raise SystemExit(f"{r.k} ones, {r.way}: {r.largest * r.k}")


def rows(results: list[Result], case: tuple[str, str]) -> list[list[str]]:
    """For each way its name, and its error for every k."""
    return [
        [way, *(shown(r.error) for r in results if r[:3] == (*case, way))]
        for way in CASES[case]
    ]


def shown(error: float) -> str:
    return "0" if error == 0 else f"{error:.0e}"


def draw(results: list[Result], counts: list[int], path: Path) -> None:
    """The error over k, and what theory expects of it."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True)
    styles = {
        NARROW: ("#d93025", "o-", NARROW),
        RUNNING_NARROW: ("#f29900", "s--", RUNNING_NARROW),
        DEFAULT: ("#1a73e8", "o-", f"{DEFAULT}, float32 sums (default)"),
        RUNNING: ("#34a853", "s--", f"{RUNNING}, float32 mean (default)"),
    }
    k = np.array(counts, np.float64)
    titles = {SHIFTED: "Gradients that agree", CANCELLING: "Gradients that cancel"}
    for axis, (kind, title) in zip(axes, titles.items(), strict=True):
        for unit in HALF_ULP.values():
            axis.plot(k, k * unit, ":", color="#9aa0a6", lw=1)
            axis.plot(k, np.sqrt(k) * unit, "--", color="#9aa0a6", lw=1)
        for way, (color, style, label) in styles.items():
            own = [r for r in results if r[:3] == (kind, "float32", way) and r.error]
            axis.plot(
                [r.k for r in own],
                [r.error for r in own],
                style,
                color=color,
                ms=4,
                lw=1.4,
                label=label,
            )
        axis.set(title=f"{title} ({kind})", xlabel="k, the number of micro-batches")
        axis.set_xscale("log", base=4)
        axis.set_xticks(counts, [str(count) for count in counts])
        axis.tick_params(axis="x", which="minor", length=0)
        axis.set_yscale("log")
        axis.set_ylim(1e-8, 3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("relative error of the mean gradient")
    for name, unit in HALF_ULP.items():
        for text, x, y in (("k·u", k[2], k[2]), ("√k·u", k[-1], k[-1] ** 0.5)):
            axes[1].annotate(
                f"{text}, {name}",
                (x, y * unit),
                xytext=(-4, 4),
                textcoords="offset points",
                ha="right",
                va="bottom",
                color="#5f6368",
                fontsize="x-small",
            )
    axes[0].legend(frameon=False, fontsize="x-small", loc=(0.02, 0.34))
    title = f"Sums of k float32 gradients. {setting()}"
    save(figure, title, path)
    plt.close(figure)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--markdown", type=Path, help="write the table here")
    parser.add_argument("--picture", type=Path, help="draw the curves here")
    parser.add_argument("--quick", action="store_true", help="three k, small gradients")
    options = parser.parse_args(arguments)

    counts = [1, 16, 512] if options.quick else [4**n for n in range(7)]
    elements = 64 if options.quick else ELEMENTS
    results = measure(counts, elements)
    check(results)

    table = Table(box=box.SIMPLE_HEAD, padding=0)
    table.add_column("error for k =", no_wrap=True)
    for k in counts:
        table.add_column(str(k), justify="right", no_wrap=True)
    lines = [
        f"The error of what the optimizer is given, ‖result − exact‖ / ‖exact‖ over "
        f"{elements} elements. {setting()}:",
        "",
        f"| gradients | way | {' | '.join(f'k = {k}' for k in counts)} |",
        f"|---|---|{'---:|' * len(counts)}",
    ]
    for case in CASES:
        name = ", ".join(case)
        table.add_row(f"[bold]{name}")
        for cells in rows(results, case):
            table.add_row(*cells)
            lines.append(f"| {name} | {' | '.join(cells)} |")
            name = ""
    Console().print(table)
    if options.markdown:
        write_lines(options.markdown, lines)
    if options.picture:
        draw(results, counts, options.picture)


if __name__ == "__main__":
    main(sys.argv[1:])
