"""What accumulating costs: a stream of micro-batch gradients through five ways.

Every way gets the same gradients, donates parameters and state, and is timed once
within each round, which spreads whatever else the machine does over all of them.
Compare the ratios; the milliseconds are this machine's at that hour.

floor              acc + g, donated: what accumulation cannot do without (XLA's CPU
                   compiler runs this lone addition slower than the same one fused
                   with a select, which is why a ratio can be below 1)
update_params      optax_accum.accumulate, update and apply in one
update             optax_accum.accumulate, then optax.apply_updates
optax.MultiSteps   then optax.apply_updates
optax.apply_every  chained behind the optimizer, then optax.apply_updates
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib

import optax_accum as oa
from benchmarks import shared

OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "sgd": lambda: optax.sgd(1e-3),
    "adamw": lambda: optax.adamw(1e-3),
    "muon": lambda: optax.contrib.muon(1e-3),
}
# Parameters of each; Muon multiplies matrices, and takes longer.
SIZES = {"sgd": 20e6, "adamw": 20e6, "muon": 4e6}
FLOOR, OURS, UPDATE, MULTI_STEPS, APPLY_EVERY = WAYS = (
    "floor",
    "update_params",
    "update",
    "optax.MultiSteps",
    "optax.apply_every",
)


class Row(NamedTuple):
    """One way with one optimizer; times are medians over the rounds."""

    optimizer: str
    parameters: int
    dtype: str
    k: int
    way: str
    micro_step_ms: float  # off the boundary
    window_ms: float
    micro_step_to_floor: float  # a median of ratios, each taken within one round
    multi_steps_to_window: float  # likewise: how many times faster a window is
    temporaries: float  # in parameters' bytes
    compile_s: float


def make_params(count: int, dtype: Any) -> dict[str, jax.Array]:
    """Four square matrices and their biases, `count` elements in all or a few less."""
    side = max(8, int((count / 4) ** 0.5))
    key = jax.random.key(0)
    params = {}
    for i in range(4):
        params[f"kernel_{i}"] = jax.random.normal(key, (side, side), dtype) * 0.02
        params[f"bias_{i}"] = jnp.full((side,), 0.01, dtype)
    return params


def make_step(way: str, optimizer: optax.GradientTransformation, k: int) -> tuple:
    """``(init, step)`` with ``step(params, state, grads) -> (params, state)``."""
    if way == FLOOR:

        def add(params, acc, grads):
            return params, jax.tree.map(jnp.add, acc, grads)

        return lambda params: jax.tree.map(jnp.zeros_like, params), add
    if way == OURS:
        tx = oa.accumulate(optimizer, k)
        return tx.init, lambda p, s, g: tx.update_params(g, s, p)
    wrapped = {
        UPDATE: lambda: oa.accumulate(optimizer, k),
        MULTI_STEPS: lambda: optax.MultiSteps(optimizer, k).gradient_transformation(),
        APPLY_EVERY: lambda: optax.chain(optimizer, optax.apply_every(k)),
    }[way]()

    def step(params, state, grads):
        updates, state = wrapped.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return wrapped.init, step


class Runner:
    """One way, compiled and ready to be timed a window at a time."""

    def __init__(self, way: str, optimizer: str, params: Any, k: int):
        """Compiles."""
        init, step = make_step(way, OPTIMIZERS[optimizer](), k)
        self.way, self.k = way, k
        self.params = jax.tree.map(jnp.copy, params)
        self.state = jax.tree.map(jnp.copy, init(self.params))
        start = time.perf_counter()
        self.step = (
            jax.jit(step, donate_argnums=(0, 1))
            .lower(self.params, self.state, params)
            .compile()
        )
        self.compile_s = time.perf_counter() - start
        memory: Any = self.step.memory_analysis()
        self.temporaries = memory.temp_size_in_bytes
        self.micro_steps: list[float] = []
        self.windows: list[float] = []

    def window(self, grads: Any) -> list[float]:
        """Seconds of each of the k micro-steps of one window."""
        seconds = []
        for _ in range(self.k):
            start = time.perf_counter()
            self.params, self.state = self.step(self.params, self.state, grads)
            jax.block_until_ready((self.params, self.state))
            seconds.append(time.perf_counter() - start)
        return seconds


def measure(options: argparse.Namespace) -> list[Row]:
    rows = []
    for name in options.only or OPTIMIZERS:
        default = 0.1e6 if options.quick else SIZES[name]
        grads = make_params(int(options.params or default), jnp.dtype(options.dtype))
        rows += measure_optimizer(name, grads, options)
    return rows


def measure_optimizer(name: str, grads: Any, options: argparse.Namespace) -> list[Row]:
    """All ways with one optimizer, interleaved."""
    runners = {way: Runner(way, name, grads, options.k) for way in WAYS}
    turns = shared.in_turn(list(runners.values()), options.rounds + 1)
    for number, runner in shared.track(turns, name):
        seconds = runner.window(grads)
        if number > 0:  # The first one warms up.
            runner.micro_steps.append(statistics.median(seconds[:-1]))
            runner.windows.append(sum(seconds))

    floor, multi_steps = runners[FLOOR], runners[MULTI_STEPS]
    ratio = shared.median_ratio
    return [
        Row(
            optimizer=name,
            parameters=sum(x.size for x in jax.tree.leaves(grads)),
            dtype=options.dtype,
            k=options.k,
            way=way,
            micro_step_ms=1e3 * statistics.median(runner.micro_steps),
            window_ms=1e3 * statistics.median(runner.windows),
            micro_step_to_floor=ratio(runner.micro_steps, floor.micro_steps),
            multi_steps_to_window=ratio(multi_steps.windows, runner.windows),
            temporaries=runner.temporaries / sum(x.nbytes for x in grads.values()),
            compile_s=runner.compile_s,
        )
        for way, runner in runners.items()
    ]


def tables(rows: list[Row]) -> list[shared.Table]:
    columns = (
        "way",
        "micro-step\nms",
        "times\nfloor",
        "window\nms",
        "faster than\nMultiSteps",
        "temp. /\nparams",
        "compile\ns",
    )
    return [
        shared.Table(
            title(own[0]),
            columns,
            "lrrrrrr",
            [
                (
                    r.way,
                    f"{r.micro_step_ms:.2f}",
                    f"{r.micro_step_to_floor:.2f}",
                    f"{r.window_ms:.1f}",
                    f"{r.multi_steps_to_window:.1f}",
                    f"{r.temporaries:.2f}",
                    f"{r.compile_s:.2f}",
                )
                for r in own
            ],
        )
        for own in shared.grouped(rows, "optimizer").values()
    ]


def title(row: Row) -> str:
    return f"{row.optimizer}, {row.parameters / 1e6:.3g}M parameters"


def draw(rows: list[Row]) -> Any:
    """A window's time and temporaries, one row of panels for each optimizer."""
    plt = shared.pyplot()
    optimizers = list(shared.grouped(rows, "optimizer").values())
    figure, axes = plt.subplots(
        len(optimizers),
        2,
        figsize=(7.3, 1.4 * len(optimizers) + 0.7),
        sharex="col",
        sharey=True,
        squeeze=False,
    )
    colors = {
        FLOOR: shared.GREY,
        OURS: shared.BLUE,
        UPDATE: shared.BLUE,
        MULTI_STEPS: shared.RED,
    }
    for (left, right), own in zip(axes, optimizers, strict=True):
        drawn = [r for r in own if r.way in colors]
        names = [r.way for r in drawn]
        style = {"color": [colors[r.way] for r in drawn], "height": 0.7}
        bars = left.barh(names, [1 / r.multi_steps_to_window for r in drawn], **style)
        times = [f"{r.window_ms:.0f} ms{faster(r)}" for r in drawn]
        left.bar_label(bars, times, padding=4, color=shared.INK)
        bars = right.barh(names, [r.temporaries for r in drawn], **style)
        held = [f"{round(r.temporaries, 1):g} ×" for r in drawn]
        right.bar_label(bars, held, padding=4, color=shared.INK)
        left.set_title(title(own[0]))
        left.invert_yaxis()
        for axis in (left, right):
            axis.set_xticks([])
            axis.spines["bottom"].set_visible(False)
            axis.tick_params(axis="y", length=0)
    axes[0][0].set_xlim(0, 1.35)
    axes[0][1].set_xlim(0, 1.25 * max(r.temporaries for r in rows))
    axes[-1][0].set_xlabel(f"time of a window of {rows[0].k} micro-steps")
    axes[-1][1].set_xlabel("temporaries, times the parameters")
    return figure


def faster(row: Row) -> str:
    """How many times, against `optax.MultiSteps`."""
    if row.way not in (OURS, UPDATE):
        return ""
    return f"  ({row.multi_steps_to_window:.1f} × faster)"


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--k", type=int, default=8, help="micro-steps in a window (default: 8)")
    add("--params", type=float, help="parameters (default: 20e6, for Muon 4e6)")
    add("--dtype", default="float32", help="of parameters and gradients")


BENCHMARK = shared.Benchmark(
    row=Row,
    measure=measure,
    tables=tables,
    draw=draw,
    rounds=5,
    choices=tuple(OPTIMIZERS),
    add_options=add_options,
)
