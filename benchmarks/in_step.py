"""The whole batch in micro-batches inside one step: four ways.

Every way computes the value and the gradient of the same batch. All take turns within
each round, which spreads whatever else the machine does over all of them. Compare the
ratios; the milliseconds are this machine's at that hour.

full batch                  jax.value_and_grad, everything at once
scan by hand                jax.lax.scan over contiguous micro-batches, float32 sums
optax microbatch            optax.microbatching.microbatch around jax.value_and_grad
optax_accum.value_and_grad  this library
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from optax import microbatching

import optax_accum as oa
from benchmarks import shared

FULL, BY_HAND, OPTAX, OURS = WAYS = (
    "full batch",
    "scan by hand",
    "optax microbatch",
    "optax_accum.value_and_grad",
)
TURN = 0.3  # seconds that a turn takes at least


class Model(NamedTuple):
    """What is differentiated: ``loss(params, batch)`` is a mean over the examples."""

    name: str
    loss: Callable[[Any, Any], jax.Array]
    params: Any
    batch: Any


class Row(NamedTuple):
    """One way with one model and number of micro-batches; times are medians."""

    model: str
    parameters: int
    k: int
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


def measure(options: argparse.Namespace) -> list[Row]:
    rows = []
    for name in options.only or MODELS:
        model = MODELS[name](options.quick)
        for k in options.k or ([4] if options.quick else [2, 8, 32]):
            rows += measure_model(model, k, options)
    return rows


def measure_model(model: Model, k: int, options: argparse.Namespace) -> list[Row]:
    """All ways with one model and number of micro-batches, interleaved."""
    runners = {way: Runner(way, model, k) for way in WAYS}
    check_equal(list(runners.values()))
    turns = shared.in_turn(list(runners.values()), options.rounds)
    for _, runner in shared.track(turns, f"{model.name}, {k} micro-batches"):
        runner.turn(0 if options.quick else TURN)
    return [
        Row(
            model=model.name,
            parameters=sum(x.size for x in jax.tree.leaves(model.params)),
            k=k,
            way=way,
            ms=1e3 * statistics.median(runner.seconds),
            to_scan=shared.median_ratio(runner.seconds, runners[BY_HAND].seconds),
            temporary_mb=runner.temporaries / 1e6,
            compile_s=runner.compile_s,
        )
        for way, runner in runners.items()
    ]


def tables(rows: list[Row]) -> list[shared.Table]:
    columns = "k", "way", "ms", "times scan\nby hand", "temporary\nMB", "compile\ns"
    return [
        shared.Table(
            title(own[0]),
            columns,
            "rlrrrr",
            [
                (
                    str(r.k) if r.way == FULL else "",
                    r.way,
                    f"{r.ms:.1f}",
                    f"{r.to_scan:.2f}",
                    f"{r.temporary_mb:.1f}",
                    f"{r.compile_s:.2f}",
                )
                for r in own
            ],
        )
        for own in shared.grouped(rows, "model").values()
    ]


def title(row: Row) -> str:
    return f"{row.model}, {row.parameters / 1e6:.2g}M parameters"


def draw(rows: list[Row]) -> Any:
    """Time and temporaries over the number of micro-batches."""
    plt = shared.pyplot()
    models = list(shared.grouped(rows, "model").values())
    figure, axes = plt.subplots(
        2, len(models), figsize=(7.3, 5), squeeze=False, sharex="col", sharey="row"
    )
    styles: dict[str, dict[str, Any]] = {
        FULL: {"color": shared.GREY, "ls": "--"},
        BY_HAND: {"color": shared.GREEN, "lw": 8, "alpha": 0.5},
        OPTAX: {"color": shared.RED, "marker": "s"},
        OURS: {"color": shared.BLUE, "marker": "o", "lw": 2.5, "ls": ":"},
    }
    for own, (above, below) in zip(models, axes.T, strict=True):
        counts = sorted({r.k for r in own})
        for way, style in styles.items():
            line = [r for r in own if r.way == way]
            above.plot(counts, [r.to_scan for r in line], label=way, **style)
            # As a share of the full batch's, since the models differ in size.
            share = [r.temporary_mb / own[0].temporary_mb for r in line]
            below.plot(counts, share, **style)
        above.set(title=title(own[0]), ylim=(0, 1.05 * max(r.to_scan for r in rows)))
        below.set(xlabel="micro-batches", ylim=(0, None))
        below.set_xscale("log", base=2)
        below.set_xticks(counts, [str(k) for k in counts])
    axes[0][0].set_ylabel("time, times a scan by hand")
    axes[1][0].set_ylabel("temporaries, times\nthe full batch's")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=9)
    return figure


def add_options(parser: argparse.ArgumentParser) -> None:
    text = "numbers of micro-batches (default: 2 8 32, with --quick 4)"
    parser.add_argument("--k", type=int, nargs="+", help=text)


BENCHMARK = shared.Benchmark(
    row=Row,
    measure=measure,
    tables=tables,
    draw=draw,
    rounds=40,
    choices=tuple(MODELS),
    add_options=add_options,
)
