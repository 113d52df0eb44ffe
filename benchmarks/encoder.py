"""A contrastive loss over the whole batch, its encoders in micro-batches.

CLIP's loss compares every image with every text. The towers are small transformers in
Flax, their layers scanned and rematerialised, all in float32. Temporaries are what XLA
reports, as multiples of the parameters' bytes. All ways compute the same gradient, one
after the other in each round; their times are multiples of the checkpointed scan's.

Two towers, in two sizes: one has more bytes of parameters than of a micro-batch's
activations, the other has fewer.

checkpointed scan              jax.lax.map over jax.checkpoint of a tower
whole batch                    without micro-batches
GradCache by hand              the two passes of Gao et al., 2021, in two scans
oa.microbatch                  each gradient straight into the sum
oa.microbatch(in_place=False)  each gradient by itself, then added

One tower for both inputs, with as many parameters as one of the larger two. Two calls
have a sum of gradients each. One call has one, be it with both inputs as batch
arguments, or with both concatenated, in twice as many micro-batches.

The ways that add in place need JAX 0.11 and are left out before.
"""

import argparse
import functools
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import optax_accum as oa
from benchmarks import shared
from tests.support import hlo

K = 16
FEATURES = 32  # of one patch or token, and so of what comes in
IN_PLACE = jax.__version_info__ >= (0, 11)
PARAMETERS, ACTIVATIONS, ONE_TOWER = PARTS = (
    "more parameters",
    "more activations",
    "one tower",
)

BASE = "checkpointed scan"
OURS, ADDED = "oa.microbatch", "oa.microbatch(in_place=False)"
WHOLE, GRAD_CACHE = "whole batch", "GradCache by hand"
BASE_TWICE, TWICE = f"{BASE}, two calls", f"{OURS}, two calls"
TWO_ARGUMENTS = f"{OURS}, one call with both inputs"
ONE_BATCH = f"{OURS}, one call, both in one batch"
TWO_TOWERS = (BASE, WHOLE, GRAD_CACHE, OURS, ADDED)
WAYS = {
    PARAMETERS: TWO_TOWERS,
    ACTIVATIONS: TWO_TOWERS,
    ONE_TOWER: (BASE_TWICE, TWICE, TWO_ARGUMENTS, ONE_BATCH),
}
NEED_IN_PLACE = {OURS, TWICE, TWO_ARGUMENTS, ONE_BATCH}


class Sizes(NamedTuple):
    """Of a tower and of one micro-batch."""

    layers: int
    width: int
    heads: int
    length: int
    examples: int


MANY_PARAMETERS = Sizes(layers=12, width=192, heads=4, length=8, examples=8)
SIZES = {
    PARAMETERS: MANY_PARAMETERS,
    ACTIVATIONS: Sizes(layers=4, width=64, heads=4, length=32, examples=16),
    ONE_TOWER: MANY_PARAMETERS,
}
QUICK = {
    PARAMETERS: Sizes(layers=12, width=96, heads=4, length=4, examples=4),
    ACTIVATIONS: Sizes(layers=2, width=32, heads=4, length=32, examples=4),
    ONE_TOWER: Sizes(layers=12, width=96, heads=4, length=4, examples=4),
}


class Row(NamedTuple):
    """One way in one part."""

    part: str
    way: str
    parameters: int
    k: int
    examples: int  # of a micro-batch
    temporaries: float  # in parameters' bytes
    time: float  # over the checkpointed scan's: a median of ratios within one round
    ms: float
    compile_s: float


# --- The model ---


class Layer(nn.Module):
    """Attention and a dense part."""

    sizes: Sizes

    @nn.compact
    def __call__(self, x, _):
        """Maps ``[B, T, width]`` to the same, as `nn.scan` wants it."""
        width = self.sizes.width
        x = x + nn.MultiHeadDotProductAttention(self.sizes.heads)(nn.LayerNorm()(x))
        hidden = nn.gelu(nn.Dense(4 * width)(nn.LayerNorm()(x)))
        return x + nn.Dense(width)(hidden), None


class Tower(nn.Module):
    """An encoder."""

    sizes: Sizes

    @nn.compact
    def __call__(self, x):
        """Maps ``[B, T, FEATURES]`` to embeddings ``[B, width]`` of norm 1."""
        layers = nn.scan(
            nn.remat(Layer, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.sizes.layers,
        )
        x, _ = layers(self.sizes)(nn.Dense(self.sizes.width)(x), None)
        x = nn.LayerNorm()(x.mean(axis=1))
        return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def contrast(images: jax.Array, texts: jax.Array) -> jax.Array:
    """CLIP's loss of embeddings ``[B, width]``, with a fixed temperature."""
    similarities = 10 * images @ texts.T
    own = jnp.arange(len(images))
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    losses = cross_entropy(similarities, own) + cross_entropy(similarities.T, own)
    return losses.mean() / 2


def make_model(part: str, sizes: Sizes) -> tuple[Callable, Any, Any]:
    """``(encode, params, batch)``; with two towers, ``params`` has both."""
    tower = Tower(sizes)
    shape = (K * sizes.examples, sizes.length, FEATURES)
    keys = jax.random.split(jax.random.key(0), 4)
    batch = [jax.random.normal(key, shape) for key in keys[:2]]

    def encode(params, x):
        return tower.apply({"params": params}, x)

    init = jax.jit(tower.init)
    towers = [init(key, batch[0][:1])["params"] for key in keys[2:]]
    return encode, towers[0] if part == ONE_TOWER else towers, batch


# --- The ways ---


def make_value_and_grad(part: str, way: str, encode: Callable) -> Callable:
    """``value_and_grad(params, batch)`` in one of the ways."""
    in_place = False if way == ADDED else None
    microbatch = functools.partial(oa.microbatch, in_place=in_place)
    if way == GRAD_CACHE:
        return grad_cache(encode)
    if way == TWO_ARGUMENTS:
        both = microbatch(
            lambda params, a, b: (encode(params, a), encode(params, b)),
            num_microbatches=K,
            batch_argnums=(1, 2),
        )
        return jax.value_and_grad(lambda p, batch: contrast(*both(p, *batch)))
    if way == ONE_BATCH:
        in_parts = microbatch(encode, num_microbatches=2 * K)

        def of_both(params, batch):
            embeddings = in_parts(params, jnp.concatenate(batch))
            return contrast(*jnp.split(embeddings, 2))

        return jax.value_and_grad(of_both)
    if way in (BASE, BASE_TWICE):
        encode = checkpointed(encode)
    elif way != WHOLE:
        encode = microbatch(encode, num_microbatches=K)

    def loss(params, batch):
        towers = [params, params] if part == ONE_TOWER else params
        return contrast(*map(encode, towers, batch))

    return jax.value_and_grad(loss)


def checkpointed(encode: Callable) -> Callable:
    """What people write: a scan that keeps what comes in, and nothing inside."""

    def run(params, x):
        own = jax.checkpoint(lambda part: encode(params, part), prevent_cse=False)
        return joined(jax.lax.map(own, parted(x)))

    return run


def grad_cache(encode: Callable) -> Callable:
    """As in Gao et al., 2021: what is cached are the embeddings' gradients."""

    def forward(params, x):
        return joined(jax.lax.map(functools.partial(encode, params), parted(x)))

    def backward(params, x, cotangents):
        def body(sums, part):
            x, cotangents = part
            _, pullback = jax.vjp(lambda params: encode(params, x), params)
            return jax.tree.map(jnp.add, sums, *pullback(cotangents)), None

        zeros = jax.tree.map(jnp.zeros_like, params)
        sums, _ = jax.lax.scan(body, zeros, (parted(x), parted(cotangents)))
        return sums

    def value_and_grad(towers, batch):
        embeddings = map(forward, towers, batch)
        value, cache = jax.value_and_grad(contrast, argnums=(0, 1))(*embeddings)
        return value, [*map(backward, towers, batch, cache)]

    return value_and_grad


def parted(x: jax.Array) -> jax.Array:
    """``[K * B, ...]`` as ``[K, B, ...]``, which copies nothing."""
    return x.reshape(K, -1, *x.shape[1:])


def joined(x: jax.Array) -> jax.Array:
    """The reverse of `parted`."""
    return x.reshape(-1, *x.shape[2:])


# --- Measuring ---


class Runner:
    """One way, compiled and ready to be timed."""

    def __init__(self, part: str, way: str, encode: Callable, params: Any, batch: Any):
        """Compiles."""
        self.way, self.arguments = way, (params, batch)
        lowered = jax.jit(make_value_and_grad(part, way, encode)).lower(params, batch)
        start = time.perf_counter()
        self.program = lowered.compile()
        self.compile_s = time.perf_counter() - start
        self.seconds: list[float] = []

    def run(self) -> Any:
        """The gradient."""
        _, grads = jax.block_until_ready(self.program(*self.arguments))
        return grads

    def turn(self) -> None:
        """The same, and notes how long it took."""
        start = time.perf_counter()
        self.run()
        self.seconds.append(time.perf_counter() - start)


def check_equal(runners: list[Runner]) -> None:
    """Raises unless all ways agree: no race between unequals. It is their first run."""
    wanted = runners[0].run()
    for runner in runners[1:]:
        distance = optax.tree.norm(optax.tree.sub(runner.run(), wanted))
        if not distance <= 1e-4 * optax.tree.norm(wanted):
            raise RuntimeError(f"{runner.way} computes something else")


def measure(options: argparse.Namespace) -> list[Row]:
    sizes = QUICK if options.quick else SIZES
    rows = []
    for part in options.only or PARTS:
        rows += measure_part(part, sizes[part], options.rounds)
    return rows


def measure_part(part: str, sizes: Sizes, rounds: int) -> list[Row]:
    """The ways of one part, interleaved."""
    encode, params, batch = make_model(part, sizes)
    ways = [way for way in WAYS[part] if IN_PLACE or way not in NEED_IN_PLACE]
    runners = [
        Runner(part, way, encode, params, batch)
        for way in shared.track(ways, f"compiling, {part}")
    ]
    check_equal(runners)
    for _, runner in shared.track(shared.in_turn(runners, rounds), part):
        runner.turn()
    return [
        Row(
            part=part,
            way=runner.way,
            parameters=sum(p.size for p in jax.tree.leaves(params)),
            k=K,
            examples=sizes.examples,
            temporaries=hlo.temporaries(runner.program) / hlo.nbytes(params),
            time=shared.median_ratio(runner.seconds, runners[0].seconds),
            ms=1e3 * statistics.median(runner.seconds),
            compile_s=runner.compile_s,
        )
        for runner in runners
    ]


def tables(rows: list[Row]) -> list[shared.Table]:
    return [
        shared.Table(
            f"{part}: {millions(own[0])} parameters",
            ("way", "temp. /\nparams", "time", "ms", "compile\ns"),
            "lrrrr",
            [
                (
                    r.way,
                    f"{r.temporaries:.2f}",
                    f"{r.time:.2f}",
                    f"{r.ms:.0f}",
                    f"{r.compile_s:.1f}",
                )
                for r in own
            ],
        )
        for part, own in shared.grouped(rows, "part").items()
    ]


def millions(row: Row) -> str:
    return f"{row.parameters / 1e6:.2g}M"


def page_table(rows: list[Row]) -> shared.Table:
    """A line for each way of each part."""
    return shared.Table(
        f"{K} micro-batches, the number of parameters in brackets",
        ("", "way", "temporaries", "time"),
        "llrr",
        [
            (
                f"{r.part} ({millions(r)})" if r.way == WAYS[r.part][0] else "",
                r.way if not r.way.startswith("oa.") else code(r.way),
                f"{r.temporaries:.2f}",
                f"{r.time:.2f}",
            )
            for r in rows
        ],
    )


def code(way: str) -> str:
    """Its call as code, and the rest as words."""
    call, comma, rest = way.partition(",")
    return f"`{call}`{comma}{rest}"


def check(rows: list[Row]) -> str:
    """No whole gradient besides the sum, and one sum where it is said to be one."""
    held = {(r.part, r.way): r.temporaries for r in rows}
    lines = []
    if (PARAMETERS, OURS) in held:
        ratio = held[PARAMETERS, OURS] / held[PARAMETERS, BASE]
        lines.append(
            f"{PARAMETERS}: oa.microbatch holds {ratio:.2f} times the temporaries of "
            "the checkpointed scan"
        )
        if not ratio <= 0.5:
            raise SystemExit(lines[-1])
    if (ONE_TOWER, TWICE) in held:
        saved = held[ONE_TOWER, TWICE] - held[ONE_TOWER, ONE_BATCH]
        lines.append(
            f"{ONE_TOWER}: one call holds {saved:.2f} times the parameters less than "
            "two calls"
        )
        if not saved > 0.75:
            raise SystemExit(lines[-1])
    return "\n".join(lines) or "Without the ways that add in place: they need JAX 0.11."


BENCHMARK = shared.Benchmark(
    row=Row,
    measure=measure,
    tables=tables,
    check=check,
    page="memory.md",
    page_table=page_table,
    rounds=11,
    choices=PARTS,
)
