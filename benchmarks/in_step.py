"""The whole batch at hand, in micro-batches inside one step: four ways.

    python benchmarks/in_step.py                     # the table of the documentation
    python benchmarks/in_step.py --quick             # a look, in seconds
    python benchmarks/in_step.py --json out/in_step.json --picture out/in_step.png

Every way computes the value and the gradient of the same batch. All take turns within
each round, so that whatever else the machine does falls on all of them alike. Compare
the ratios; the milliseconds are this machine's at that hour.

full batch                  jax.value_and_grad, everything at once
scan by hand                jax.lax.scan over contiguous micro-batches, float32 sums
optax microbatch            optax.microbatching.microbatch around jax.value_and_grad
optax_accum.value_and_grad  this library
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
from measuring import (
    in_turn,
    median_ratio,
    pyplot,
    save,
    setting,
    write_json,
    write_lines,
)
from optax import microbatching
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import optax_accum as oa

FULL, BY_HAND, OPTAX, OURS = WAYS = (
    "full batch",
    "scan by hand",
    "optax microbatch",
    "optax_accum.value_and_grad",
)


class Model(NamedTuple):
    """What is differentiated: ``loss(params, batch)`` is a mean over the examples."""

    name: str
    loss: Callable[[Any, Any], jax.Array]
    params: Any
    batch: Any


class Result(NamedTuple):
    """One way with one model and number of micro-batches; times are medians."""

    model: str
    parameters: int
    num_microbatches: int
    way: str
    ms: float
    to_scan: float  # a median of ratios, each taken within one round
    temporary_mb: float
    compile_s: float


def mlp(quick: bool) -> Model:
    """Three dense layers."""
    width, examples = (256, 64) if quick else (1024, 512)
    sizes = [(width, width)] * 3
    keys = jax.random.split(jax.random.key(0), len(sizes) + 1)
    params = [
        {"w": jax.random.normal(key, size) / size[0] ** 0.5, "b": jnp.zeros(size[1])}
        for key, size in zip(keys[1:], sizes, strict=True)
    ]

    def loss(params, x):
        h = x
        for layer in params:
            h = jax.nn.gelu(h @ layer["w"] + layer["b"])
        return jnp.mean((h - x) ** 2)

    return Model("MLP", loss, params, jax.random.normal(keys[0], (examples, width)))


def transformer(quick: bool) -> Model:
    """A small decoder."""
    if quick:
        return decoder(layers=2, width=64, heads=2, length=32, vocabulary=64)
    return decoder(layers=2, width=256, heads=4, length=64, vocabulary=256)


def decoder(
    *,
    layers: int,
    width: int,
    heads: int,
    length: int,
    vocabulary: int,
    examples: int = 32,
) -> Model:
    """A transformer with a scan over its layers, on sequences of tokens."""
    keys = iter(jax.random.split(jax.random.key(0), 8))

    def matrix(*shape):
        return jax.random.normal(next(keys), shape) * 0.02

    params = {
        "embedding": matrix(vocabulary, width),
        "position": matrix(length, width),
        "layers": {
            "qkv": matrix(layers, width, 3 * width),
            "out": matrix(layers, width, width),
            "up": matrix(layers, width, 4 * width),
            "down": matrix(layers, 4 * width, width),
        },
    }
    tokens = jax.random.randint(next(keys), (examples, length + 1), 0, vocabulary)

    def loss(params, tokens):
        x = params["embedding"][tokens[:, :-1]] + params["position"]

        def layer(x, p):
            q, k, v = jnp.split(jax.nn.standardize(x) @ p["qkv"], 3, axis=-1)
            q, k, v = (a.reshape(*a.shape[:2], heads, -1) for a in (q, k, v))
            attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
            x = x + attended.reshape(x.shape) @ p["out"]
            return x + jax.nn.gelu(jax.nn.standardize(x) @ p["up"]) @ p["down"], None

        x, _ = jax.lax.scan(layer, x, params["layers"])
        logits = jax.nn.log_softmax(x @ params["embedding"].T)
        return -jnp.mean(jnp.take_along_axis(logits, tokens[:, 1:, None], -1))

    return Model("transformer", loss, params, tokens)


MODELS = {"mlp": mlp, "transformer": transformer}


def scan_by_hand(loss: Callable, k: int) -> Callable:
    """What people write."""

    def value_and_grad(params, batch):
        def body(carry, part):
            return jax.tree.map(
                jnp.add, carry, jax.value_and_grad(loss)(params, part)
            ), None

        parts = batch.reshape(k, len(batch) // k, *batch.shape[1:])
        zeros = jnp.zeros([]), jax.tree.map(jnp.zeros_like, params)
        sums, _ = jax.lax.scan(body, zeros, parts)
        return jax.tree.map(lambda s: s / k, sums)

    return value_and_grad


def make(way: str, model: Model, k: int) -> Callable:
    """``value_and_grad(params, batch)`` in one of the four ways."""
    if way == FULL:
        return jax.value_and_grad(model.loss)
    if way == BY_HAND:
        return scan_by_hand(model.loss, k)
    if way == OURS:
        return oa.value_and_grad(model.loss, num_microbatches=k)
    return microbatching.microbatch(
        jax.value_and_grad(model.loss),
        argnums=1,
        microbatch_size=len(model.batch) // k,
        accumulator=microbatching.AccumulationType.MEAN,
    )


class Runner:
    """One way, compiled and ready to be timed."""

    def __init__(self, way: str, model: Model, k: int):
        """Compiles."""
        self.way = way
        self.arguments = model.params, model.batch
        start = time.perf_counter()
        self.program = jax.jit(make(way, model, k)).lower(*self.arguments).compile()
        self.compile_s = time.perf_counter() - start
        memory: Any = self.program.memory_analysis()
        self.temporaries = memory.temp_size_in_bytes
        self.seconds: list[float] = []

    def run(self) -> Any:
        """Once."""
        return jax.block_until_ready(self.program(*self.arguments))

    def turn(self, seconds: float) -> None:
        """Runs for at least so long, and notes how long one run took."""
        start, runs = time.perf_counter(), 0
        while (passed := time.perf_counter() - start) < seconds or not runs:
            self.run()
            runs += 1
        self.seconds.append(passed / runs)


def check_equal(runners: list[Runner]) -> None:
    """Raises unless all ways agree on the gradient: no race between unequals."""
    _, wanted = runners[0].run()
    scale = max(float(abs(g).max()) for g in jax.tree.leaves(wanted))
    for runner in runners[1:]:
        _, got = runner.run()
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
            if not float(abs(a - b).max()) <= 1e-4 * scale:
                raise RuntimeError(f"{runner.way} computes another gradient")


def measure(
    model: Model,
    k: int,
    *,
    rounds: int,
    turn: float,
    advance: Callable[[], None],
) -> list[Result]:
    """All ways with one model and number of micro-batches, interleaved."""
    runners = {way: Runner(way, model, k) for way in WAYS}
    check_equal(list(runners.values()))
    for _, runner in in_turn(list(runners.values()), rounds):
        runner.turn(turn)
        advance()
    return [
        Result(
            model=model.name,
            parameters=sum(x.size for x in jax.tree.leaves(model.params)),
            num_microbatches=k,
            way=way,
            ms=1e3 * statistics.median(runner.seconds),
            to_scan=median_ratio(runner.seconds, runners[BY_HAND].seconds),
            temporary_mb=runner.temporaries / 1e6,
            compile_s=runner.compile_s,
        )
        for way, runner in runners.items()
    ]


def show(results: list[Result], title: str, console: Console) -> None:
    """Prints a table for each model."""
    console.print(title, highlight=False)
    for name in dict.fromkeys(r.model for r in results):
        rows = [r for r in results if r.model == name]
        table = Table(
            title=f"{name}, {rows[0].parameters / 1e6:.3g}M parameters",
            title_justify="left",
            box=box.SIMPLE_HEAD,
            padding=0,
        )
        table.add_column("micro-\nbatches", justify="right")
        table.add_column("way", no_wrap=True)
        for heading in (
            "ms",
            "times scan\nby hand",
            "temporary\nMB",
            "compile\ns",
        ):
            table.add_column(heading, justify="right", no_wrap=True)
        for r in rows:
            table.add_row(
                str(r.num_microbatches) if r.way == WAYS[0] else "",
                r.way,
                f"{r.ms:.1f}",
                f"{r.to_scan:.2f}",
                f"{r.temporary_mb:.1f}",
                f"{r.compile_s:.2f}",
                end_section=r.way == WAYS[-1],
            )
        console.print(table)


def write_markdown(results: list[Result], title: str, path: Path) -> None:
    """The table as the documentation has it."""
    lines = [
        f"{title}:",
        "",
        "| model | micro-batches | way | times a scan by hand | ms | temporary MB | "
        "compile s |",
        "|---|---:|---|---:|---:|---:|---:|",
    ]
    named: set[str] = set()
    for r in results:
        name = "" if r.model in named else f"{r.model}, {r.parameters / 1e6:.2g}M"
        named.add(r.model)
        k = r.num_microbatches if r.way == WAYS[0] else ""
        lines.append(
            f"| {name} | {k} | {r.way} | {r.to_scan:.2f} | {r.ms:.0f} | "
            f"{r.temporary_mb:.1f} | {r.compile_s:.1f} |"
        )
    write_lines(path, lines)


def draw(results: list[Result], title: str, path: Path) -> None:
    """For each model the time and the temporaries by number of micro-batches."""
    plt = pyplot()
    names = list(dict.fromkeys(r.model for r in results))
    figure, axes = plt.subplots(
        2, len(names), figsize=(1 + 4 * len(names), 6), squeeze=False, sharex="col"
    )
    styles = {
        FULL: {"color": "#9aa0a6", "ls": "--"},
        BY_HAND: {"color": "#f29900", "marker": "o"},
        OPTAX: {"color": "#d93025", "marker": "s"},
        OURS: {"color": "#1a73e8", "marker": "D", "ls": ":"},
    }
    for name, (above, below) in zip(names, axes.T, strict=True):
        for way in WAYS:
            rows = [r for r in results if (r.model, r.way) == (name, way)]
            k = [r.num_microbatches for r in rows]
            above.plot(k, [r.to_scan for r in rows], label=way, **styles[way])
            below.plot(k, [r.temporary_mb for r in rows], label=way, **styles[way])
        above.set_title(f"{name}, {rows[0].parameters / 1e6:.2g}M parameters")
        above.set_ylim(0)
        below.set_ylim(0)
        below.set_xscale("log", base=2)
        below.set_xticks(k, [str(n) for n in k])
        below.set_xlabel("micro-batches")
        for axis in (above, below):
            axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("time, times a scan by hand")
    axes[1][0].set_ylabel("temporary MB")
    axes[0][-1].legend(frameon=False, fontsize="small", loc="lower left")
    save(figure, title, path)
    plt.close(figure)


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", choices=MODELS, default=list(MODELS))
    add(
        "--micro-batches",
        type=int,
        nargs="+",
        default=[2, 8, 32],
        help="numbers of them (default: 2 8 32)",
    )
    add("--rounds", type=int, default=40, help="turns of each (default: 40)")
    add("--turn", type=float, default=0.3, help="seconds at least (default: 0.3)")
    add("--quick", action="store_true", help="small models, two rounds")
    add("--json", type=Path, help="write the figures here")
    add("--markdown", type=Path, help="write the table here")
    add("--picture", type=Path, help="draw them here (needs matplotlib)")
    options = parser.parse_args(arguments)
    if options.quick:
        options.rounds, options.turn = 2, 0.0
    return options


def main(arguments: list[str]) -> None:
    options = parse_arguments(arguments)
    title = setting()
    results = []
    console = Console()
    with Progress(console=console, transient=True) as progress:
        for name in options.models:
            model = MODELS[name](options.quick)
            for k in options.micro_batches:
                task = progress.add_task(
                    f"{name}, {k} micro-batches", total=len(WAYS) * options.rounds
                )
                results += measure(
                    model,
                    k,
                    rounds=options.rounds,
                    turn=options.turn,
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
