"""What accumulating costs: a stream of micro-batch gradients through five ways.

    python benchmarks/stream.py                     # the table of the README
    python benchmarks/stream.py --quick             # a look, in seconds
    python benchmarks/stream.py --json out/stream.json --picture out/stream.png

Every way gets the same gradients, donates parameters and state, and is timed in turn
within each round, so that whatever else the machine does falls on all of them alike.
Compare the ratios; the milliseconds are this machine's at that hour.

floor              acc + g, donated: what accumulation cannot do without (XLA's CPU
                   compiler runs this lone addition slower than the same one fused
                   with a select, so a ratio below 1 is no mistake)
update_params      optax_accum.accumulate, update and apply in one
update             optax_accum.accumulate, then optax.apply_updates
optax.MultiSteps   then optax.apply_updates
optax.apply_every  chained behind the optimizer, then optax.apply_updates
"""

import argparse
import functools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from measuring import (
    in_turn,
    median_ratio,
    pyplot,
    save,
    setting,
    write_json,
    write_lines,
)
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import optax_accum as oa

OPTIMIZERS: dict[str, Callable[[], optax.GradientTransformation]] = {
    "sgd": lambda: optax.sgd(1e-3),
    "adamw": lambda: optax.adamw(1e-3),
    "muon": lambda: optax.contrib.muon(1e-3),
}
FLOOR, OURS, UPDATE, MULTI_STEPS, APPLY_EVERY = WAYS = (
    "floor",
    "update_params",
    "update",
    "optax.MultiSteps",
    "optax.apply_every",
)


class Result(NamedTuple):
    """One way with one optimizer; times are medians over the rounds."""

    optimizer: str
    parameters: int
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

    def window(self, grads: Any) -> list[float]:
        """Seconds of each of the k micro-steps of one window."""
        seconds = []
        for _ in range(self.k):
            start = time.perf_counter()
            self.params, self.state = self.step(self.params, self.state, grads)
            jax.block_until_ready((self.params, self.state))
            seconds.append(time.perf_counter() - start)
        return seconds


def measure(
    optimizer: str,
    count: int,
    *,
    k: int,
    rounds: int,
    dtype: Any,
    advance: Callable[[], None],
) -> list[Result]:
    """All ways with one optimizer, interleaved."""
    grads = make_params(count, dtype)
    runners = [Runner(way, optimizer, grads, k) for way in WAYS]
    micro: dict[str, list[float]] = {way: [] for way in WAYS}
    window: dict[str, list[float]] = {way: [] for way in WAYS}
    for number, runner in in_turn(runners, rounds + 1):
        seconds = runner.window(grads)
        if number > 0:  # The first one warms up.
            micro[runner.way].append(statistics.median(seconds[:-1]))
            window[runner.way].append(sum(seconds))
        advance()

    nbytes = sum(x.nbytes for x in jax.tree.leaves(grads))
    return [
        Result(
            optimizer=optimizer,
            parameters=sum(x.size for x in jax.tree.leaves(grads)),
            way=runner.way,
            micro_step_ms=1e3 * statistics.median(micro[runner.way]),
            window_ms=1e3 * statistics.median(window[runner.way]),
            micro_step_to_floor=median_ratio(micro[runner.way], micro[FLOOR]),
            multi_steps_to_window=median_ratio(window[MULTI_STEPS], window[runner.way]),
            temporaries=runner.temporaries / nbytes,
            compile_s=runner.compile_s,
        )
        for runner in runners
    ]


def show(results: list[Result], title: str, console: Console) -> None:
    """Prints a table for each optimizer."""
    console.print(title, highlight=False)
    for name in dict.fromkeys(r.optimizer for r in results):
        rows = [r for r in results if r.optimizer == name]
        table = Table(
            title=f"{name}, {rows[0].parameters / 1e6:.3g}M parameters",
            title_justify="left",
            box=box.SIMPLE_HEAD,
            padding=0,
        )
        table.add_column("way", no_wrap=True)
        for heading in (
            "micro-step\nms",
            "times\nfloor",
            "window\nms",
            "faster than\nMultiSteps",
            "temp. /\nparams",
            "compile\ns",
        ):
            table.add_column(heading, justify="right", no_wrap=True)
        for r in rows:
            table.add_row(
                r.way,
                f"{r.micro_step_ms:.2f}",
                f"{r.micro_step_to_floor:.2f}",
                f"{r.window_ms:.1f}",
                f"{r.multi_steps_to_window:.1f}",
                f"{r.temporaries:.2f}",
                f"{r.compile_s:.2f}",
            )
        console.print(table)


def write_markdown(results: list[Result], title: str, path: Path) -> None:
    """The table as the README has it."""
    lines = [
        f"{title}:",
        "",
        "| optimizer | way | micro-step, times the floor | window, ms | faster than "
        "`MultiSteps` | temporaries, times the parameters |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for r in results:
        first = r.way == WAYS[0]
        name = f"{r.optimizer}, {r.parameters / 1e6:.3g}M" if first else ""
        lines.append(
            f"| {name} | {r.way} | {r.micro_step_to_floor:.2f} | {r.window_ms:.0f} | "
            f"{r.multi_steps_to_window:.1f} | {r.temporaries:.2f} |"
        )
    write_lines(path, lines)


def draw(results: list[Result], title: str, path: Path) -> None:
    """One panel per optimizer: a window's time by way."""
    plt = pyplot()
    names = list(dict.fromkeys(r.optimizer for r in results))
    figure, axes = plt.subplots(
        1, len(names), figsize=(1.6 + 3.6 * len(names), 3.2), squeeze=False
    )
    colors = ["#9aa0a6", "#1a73e8", "#669df6", "#d93025", "#f29900"]
    for axis, name in zip(axes[0], names, strict=True):
        rows = [r for r in results if r.optimizer == name]
        bars = axis.barh(
            [r.way for r in rows], [r.window_ms for r in rows], color=colors
        )
        axis.bar_label(
            bars,
            [f"{r.window_ms:.{0 if r.window_ms > 10 else 1}f}" for r in rows],
            padding=3,
        )
        axis.set_title(f"{name}, {rows[0].parameters / 1e6:.3g}M parameters")
        axis.set_xlabel("milliseconds per window")
        axis.margins(x=0.15)
        axis.invert_yaxis()
        axis.spines[["top", "right"]].set_visible(False)
        if axis is not axes[0][0]:
            axis.set_yticklabels([])
    save(figure, title, path)
    plt.close(figure)


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    add("--params", type=float, default=20e6, help="parameters (default: 20e6)")
    add(
        "--muon-params",
        type=float,
        default=4e6,
        help="parameters for Muon, which multiplies matrices (default: 4e6)",
    )
    add("--k", type=int, default=8, help="micro-steps in a window (default: 8)")
    add("--rounds", type=int, default=5, help="timed windows of each (default: 5)")
    add("--dtype", default="float32", help="of parameters and gradients")
    add("--quick", action="store_true", help="0.5M parameters, two rounds")
    add("--json", type=Path, help="write the figures here")
    add("--markdown", type=Path, help="write the table here")
    add("--picture", type=Path, help="draw the windows here (needs matplotlib)")
    options = parser.parse_args(arguments)
    if options.quick:
        options.params = options.muon_params = 0.5e6
        options.rounds = 2
    return options


def main(arguments: list[str]) -> None:
    options = parse_arguments(arguments)
    title = f"{setting()}, {options.dtype}, k = {options.k}"
    results = []
    console = Console()
    with Progress(console=console, transient=True) as progress:
        for name in options.optimizers:
            task = progress.add_task(name, total=len(WAYS) * (options.rounds + 1))
            results += measure(
                name,
                int(options.muon_params if name == "muon" else options.params),
                k=options.k,
                rounds=options.rounds,
                dtype=jnp.dtype(options.dtype),
                advance=functools.partial(progress.advance, task),
            )
    show(results, title, console)
    if options.json:
        write_json(options.json, title, results)
    if options.markdown:
        write_markdown(results, title, options.markdown)
    if options.picture:
        draw(results, title, options.picture)


if __name__ == "__main__":
    main(sys.argv[1:])
