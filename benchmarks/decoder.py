"""What gradient accumulation adds to the training step of a decoder: memory and time.

A small transformer in Flax whose layers are rematerialised: once scanned, so one
program runs them all, and once unrolled. Parameters are float32; the layers compute in
bfloat16. Temporaries are what XLA reports, and "in all" adds arguments and results,
both as multiples of the parameters' bytes. Within each part all ways run the same
micro-batches, one way after the other in each round; their times are multiples of the
first one's.

One step, for a gradient:

jax.value_and_grad                 on each micro-batch, nothing summed: the floor
oa.value_and_grad                  optax_accum's, each gradient straight into the sum
oa.value_and_grad(in_place=False)  each gradient by itself, then added
scan by hand                       jax.lax.scan over jax.value_and_grad
JAX's recipe with refs             of "Autodiff with refs", divided after the loop
the same, cotangent 1/k            divided before it, in the loss's cotangent
optax microbatch                   optax.microbatching.microbatch

Across steps, micro-steps with AdamW that donate parameters and state:

AdamW alone              an update for each micro-batch, nothing summed: the floor
update_params(pullback)  optax_accum.accumulate, given JAX's pullback
update_params(grads)     optax_accum.accumulate, given the gradient
optax.MultiSteps         then optax.apply_updates

Empty micro-batches: a batch in one step, weighted by its tokens, and the same with
padding alone in half of its micro-batches.

The ways that add in place need JAX 0.11; before, JAX computes some of these gradients
wrongly, and they are left out.
"""

import argparse
import functools
import operator
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from optax import microbatching

import optax_accum as oa
from benchmarks import shared
from optax_accum.diagnose._memory import Memory
from tests.support import hlo

K = 4
IN_PLACE = jax.__version_info__ >= (0, 11)
SCANNED, UNROLLED = LAYERS = ("scanned", "unrolled")
ONE_STEP, ACROSS, EMPTY = PARTS = ("one step", "across steps", "empty micro-batches")

WAYS = {
    ONE_STEP: (
        VALUE_AND_GRAD := "jax.value_and_grad",
        OURS := "oa.value_and_grad",
        ADDED := "oa.value_and_grad(in_place=False)",
        BY_HAND := "scan by hand",
        RECIPE := "JAX's recipe with refs",
        RECIPE_SCALED := "the same, cotangent 1/k",
        OPTAX := "optax microbatch",
    ),
    ACROSS: (
        ALONE := "AdamW alone",
        PULLBACK := "update_params(pullback)",
        GRADS := "update_params(grads)",
        MULTI_STEPS := "optax.MultiSteps",
    ),
    EMPTY: (
        NONE := "none of them empty",
        HALF := "half of them empty",
    ),
}
PLAIN = {BY_HAND, OPTAX, ALONE, RECIPE, RECIPE_SCALED, NONE, HALF}  # no code
COLORS = {  # red is what adds a whole gradient to the sum
    VALUE_AND_GRAD: shared.GREY,
    ALONE: shared.GREY,
    OURS: shared.BLUE,
    PULLBACK: shared.BLUE,
    RECIPE: shared.GREEN,
    RECIPE_SCALED: shared.GREEN,
}
NEED_IN_PLACE = {OURS, RECIPE, RECIPE_SCALED, PULLBACK}


class Sizes(NamedTuple):
    """Of the model and of one micro-batch."""

    layers: int = 16
    width: int = 192
    heads: int = 4
    vocabulary: int = 256
    length: int = 32
    examples: int = 4


QUICK = Sizes(width=64, length=16, examples=2)


class Row(NamedTuple):
    """One way in one part, with one kind of layers."""

    layers: str
    part: str
    way: str
    parameters: int
    k: int
    temporaries: float  # in parameters' bytes
    in_all: float  # likewise: arguments, results and temporaries
    time: float  # over the first way's: a median of ratios, each within one round
    ms: float  # of k micro-batches
    compile_s: float


# --- The model ---


class Layer(nn.Module):
    """Attention and a dense part, computed in bfloat16."""

    sizes: Sizes

    @nn.compact
    def __call__(self, x, _):
        """Maps ``[B, T, width]`` to the same, as `nn.scan` wants it."""
        norm = functools.partial(nn.LayerNorm, dtype=jnp.bfloat16)
        dense = functools.partial(nn.Dense, dtype=jnp.bfloat16)
        attention = nn.MultiHeadDotProductAttention(
            self.sizes.heads, dtype=jnp.bfloat16
        )
        x = x + attention(norm()(x), mask=nn.make_causal_mask(x[..., 0]))
        width = self.sizes.width
        return x + dense(width)(nn.gelu(dense(4 * width)(norm()(x)))), None


class Decoder(nn.Module):
    """A transformer that predicts the next token."""

    sizes: Sizes
    scanned: bool

    @nn.compact
    def __call__(self, tokens):
        """Maps tokens ``[B, T]`` to logits ``[B, T, vocabulary]``."""
        sizes = self.sizes
        x = nn.Embed(sizes.vocabulary, sizes.width, dtype=jnp.bfloat16)(tokens)
        if self.scanned:
            layers = nn.scan(
                nn.remat(Layer, prevent_cse=False),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=sizes.layers,
            )
            x, _ = layers(sizes)(x, None)
        else:
            for _ in range(sizes.layers):
                x, _ = nn.remat(Layer)(sizes)(x, None)
        return nn.Dense(sizes.vocabulary, dtype=jnp.bfloat16)(nn.LayerNorm()(x))


def make_model(layers: str, sizes: Sizes) -> tuple[Callable, Any, Any]:
    """``(loss, params, batch)``: the batch has K micro-batches, all tokens valid."""
    model = Decoder(sizes, layers == SCANNED)
    shape = (K * sizes.examples, sizes.length + 1)
    tokens = jax.random.randint(jax.random.key(0), shape, 0, sizes.vocabulary)
    batch = {"tokens": tokens, "mask": jnp.ones((shape[0], sizes.length))}

    def loss(params, batch):
        """A mean over the valid tokens."""
        tokens, mask = batch["tokens"], batch["mask"]
        logits: Any = model.apply({"params": params}, tokens[:, :-1])
        logits = logits.astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return jnp.sum(mask * losses) / jnp.maximum(mask.sum(), 1)

    init = jax.jit(model.init)
    return loss, init(jax.random.key(1), tokens[:1, :-1])["params"], batch


def count_tokens(params: Any, batch: Any) -> jax.Array:
    """The weight of a micro-batch, which depends on the batch alone."""
    del params
    return batch["mask"].sum()


def half_empty(batch: Any) -> Any:
    """The same batch, with nothing valid in the second half of the micro-batches."""
    # Example i is in micro-batch i % K.
    example = jnp.arange(len(batch["mask"]))[:, None]
    return batch | {"mask": batch["mask"] * (example % K < K // 2)}


# --- The ways ---


def scan_by_hand(loss: Callable) -> Callable:
    """What people write."""

    def value_and_grad(params, batch):
        def body(sums, part):
            return jax.tree.map(
                jnp.add, sums, jax.value_and_grad(loss)(params, part)
            ), None

        zeros = jnp.zeros([]), jax.tree.map(jnp.zeros_like, params)
        sums, _ = jax.lax.scan(body, zeros, parted(batch))
        return jax.tree.map(lambda s: s / K, sums)

    return value_and_grad


def recipe_with_refs(loss: Callable, *, scaled: bool) -> Callable:
    """The recipe of JAX's documentation, which sums; here divided by K."""

    def value_and_grad(params, batch):
        sums = jax.tree.map(lambda p: jax.new_ref(jnp.zeros_like(p)), params)

        def body(_, part):
            pullback: Any
            value, pullback = jax.vjp(lambda p: loss(p, part), params)
            pullback.with_refs(sums)(jnp.full_like(value, 1 / K if scaled else 1))
            return (), value

        (), values = jax.lax.scan(body, (), parted(batch))
        grads = jax.tree.map(jax.freeze, sums)
        if not scaled:
            grads = jax.tree.map(lambda g: g / K, grads)
        return values.mean(), grads

    return value_and_grad


def parted(batch: Any) -> Any:
    """``[B * K, ...]`` as ``[K, B, ...]``, strided as ours: then all round alike."""
    return jax.tree.map(lambda x: x.reshape(-1, K, *x.shape[1:]).swapaxes(0, 1), batch)


def make_step(part: str, way: str, loss: Callable) -> tuple[Callable, Callable]:
    """``init(params)``, ``step(params, state, batch) -> (result, state)``.

    The result is the value and the gradient, or the next parameters.
    """
    if part == ACROSS:
        return make_micro_step(way, loss)
    value_and_grad = make_value_and_grad(way, loss)

    def step(params, state, batch):
        return value_and_grad(params, batch), state

    return optax.identity().init, step


def make_value_and_grad(way: str, loss: Callable) -> Callable:
    """``value_and_grad(params, batch)`` in one of the ways of one step."""
    if way == VALUE_AND_GRAD:
        return jax.value_and_grad(loss)
    if way == BY_HAND:
        return scan_by_hand(loss)
    if way in (RECIPE, RECIPE_SCALED):
        return recipe_with_refs(loss, scaled=way == RECIPE_SCALED)
    if way == OPTAX:
        return lambda params, batch: microbatching.microbatch(
            jax.value_and_grad(loss),
            argnums=1,
            microbatch_size=len(batch["tokens"]) // K,
            accumulator=microbatching.AccumulationType.MEAN,
        )(params, batch)
    weight = count_tokens if way in WAYS[EMPTY] else None
    in_place = False if way == ADDED else None
    return oa.value_and_grad(loss, num_microbatches=K, weight=weight, in_place=in_place)


def make_micro_step(way: str, loss: Callable) -> tuple[Callable, Callable]:
    """The same across steps: ``step(params, state, batch) -> (params, state)``."""
    tx: Any = optax.adamw(1e-3)
    if way in (PULLBACK, GRADS):
        tx = oa.accumulate(tx, K)
    elif way == MULTI_STEPS:
        tx = optax.MultiSteps(tx, K).gradient_transformation()

    def step(params, state, batch):
        if way == PULLBACK:
            _, pullback = jax.vjp(lambda p: loss(p, batch), params)
            return tx.update_params(pullback, state, params)
        _, grads = jax.value_and_grad(loss)(params, batch)
        if way == GRADS:
            return tx.update_params(grads, state, params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return tx.init, step


# --- Measuring ---


class Runner:
    """One way, compiled and ready to be timed."""

    def __init__(self, part: str, way: str, loss: Callable, params: Any, batch: Any):
        """Compiles."""
        self.part, self.way = part, way
        if part == ACROSS or way == VALUE_AND_GRAD:
            self.batches = [
                jax.tree.map(operator.itemgetter(i), parted(batch)) for i in range(K)
            ]
        else:
            self.batches = [half_empty(batch) if way == HALF else batch]
        init, step = make_step(part, way, loss)
        # Copies, because they are donated.
        self.params, self.state = jax.tree.map(jnp.copy, (params, init(params)))
        jitted = jax.jit(step, donate_argnums=(0, 1) if part == ACROSS else ())
        lowered = jitted.lower(self.params, self.state, self.batches[0])
        start = time.perf_counter()
        self.program = lowered.compile()
        self.compile_s = time.perf_counter() - start
        self.seconds: list[float] = []

    def run(self) -> Any:
        """All micro-batches once: the gradient, or the parameters after one window."""
        for batch in self.batches:
            result, self.state = self.program(self.params, self.state, batch)
            jax.block_until_ready((result, self.state))
            if self.part == ACROSS:
                self.params = result
        return result if self.part == ACROSS else result[1]

    def turn(self) -> None:
        """The same, and notes how long it took."""
        start = time.perf_counter()
        self.run()
        self.seconds.append(time.perf_counter() - start)


def check_equal(runners: list[Runner], params: Any) -> None:
    """Raises unless all ways agree: no race between unequals. It is their first run."""
    results = {r.way: r.run() for r in runners}
    if runners[0].part == ACROSS:  # the updates, not the parameters
        results = {w: optax.tree.sub(p, params) for w, p in results.items()}
    # The floors and a batch with less in it compute something else.
    for way in (VALUE_AND_GRAD, ALONE, HALF):
        results.pop(way, None)
    wanted = next(iter(results.values()))
    for way, got in results.items():
        distance = optax.tree.norm(optax.tree.sub(got, wanted))
        if not distance <= 1e-3 * optax.tree.norm(wanted):
            raise RuntimeError(f"{way} computes something else")


def measure(options: argparse.Namespace) -> list[Row]:
    sizes = QUICK if options.quick else Sizes()
    rows = []
    for layers in options.only or (LAYERS[:1] if options.quick else LAYERS):
        model = make_model(layers, sizes)
        for part in PARTS:
            rows += measure_part(layers, part, *model, rounds=options.rounds)
    return rows


def measure_part(
    layers: str, part: str, loss: Callable, params: Any, batch: Any, *, rounds: int
) -> list[Row]:
    """The ways of one part, interleaved."""
    ways = [way for way in WAYS[part] if IN_PLACE or way not in NEED_IN_PLACE]
    runners = [
        Runner(part, way, loss, params, batch)
        for way in shared.track(ways, f"compiling, {layers}")
    ]
    check_equal(runners, params)
    turns = shared.in_turn(runners, rounds)
    for _, runner in shared.track(turns, f"{layers}, {part}"):
        runner.turn()
    nbytes = hlo.nbytes(params)
    return [
        Row(
            layers=layers,
            part=part,
            way=runner.way,
            parameters=sum(p.size for p in jax.tree.leaves(params)),
            k=K,
            temporaries=hlo.temporaries(runner.program) / nbytes,
            in_all=Memory.of(runner.program).total / nbytes,
            time=shared.median_ratio(runner.seconds, runners[0].seconds),
            ms=1e3 * statistics.median(runner.seconds),
            compile_s=runner.compile_s,
        )
        for runner in runners
    ]


def tables(rows: list[Row]) -> list[shared.Table]:
    columns = (
        "part",
        "way",
        "temp. /\nparams",
        "in all /\nparams",
        "time",
        "ms",
        "compile\ns",
    )
    return [
        shared.Table(
            f"{layers} layers, {own[0].parameters / 1e6:.3g}M parameters",
            columns,
            "llrrrrr",
            [
                (
                    r.part if r.way == WAYS[r.part][0] else "",
                    r.way,
                    f"{r.temporaries:.2f}",
                    f"{r.in_all:.2f}",
                    f"{r.time:.2f}",
                    f"{r.ms:.0f}",
                    f"{r.compile_s:.1f}",
                )
                for r in own
            ],
        )
        for layers, own in shared.grouped(rows, "layers").items()
    ]


def page_table(rows: list[Row]) -> shared.Table:
    """A line for each way, with both kinds of layers side by side."""
    kinds = shared.grouped(rows, "layers").values()
    return shared.Table(
        f"{title(rows[0])}, k = {K}",
        (
            "",
            "way",
            *(
                f"{own[0].layers}: {column}"
                for own in kinds
                for column in ("temporaries", "in all", "time")
            ),
        ),
        "ll" + "rrr" * len(kinds),
        [
            (
                r.part if r.way == WAYS[r.part][0] else "",
                r.way if r.way in PLAIN else f"`{r.way}`",
                *(
                    f"{x:.2f}"
                    for r in same_way
                    for x in (r.temporaries, r.in_all, r.time)
                ),
            )
            for r, *_ in zip(*kinds, strict=True)
            for same_way in [[x for x in rows if x.way == r.way]]
        ],
    )


def title(row: Row) -> str:
    return f"{row.parameters / 1e6:.3g}M parameters"


def check(rows: list[Row]) -> str:
    """What is added straight into the sum must not hold a gradient besides."""
    lines = []
    for layers, own in shared.grouped(rows, "layers").items():
        held = {r.way: r.temporaries for r in own}
        if OURS not in held:
            return "Without the ways that add in place: they need JAX 0.11."
        saved = held[ADDED] - held[OURS], held[GRADS] - held[PULLBACK]
        lines.append(
            f"{layers} layers: straight into the sum, {saved[0]:.2f} times the "
            f"parameters less in one step, {saved[1]:.2f} less across steps"
        )
        if layers == SCANNED and not min(saved) > 0.75:
            raise SystemExit(lines[-1])
    return "\n".join(lines)


def draw(rows: list[Row]) -> Any:
    """The temporaries of each way, with scanned layers and with unrolled ones."""
    plt = shared.pyplot()
    kinds = list(shared.grouped(rows, "layers").values())
    figure, axes = plt.subplots(
        1, len(kinds), figsize=(7.3, 3.6), squeeze=False, sharex=True, sharey=True
    )
    for axis, own in zip(axes[0], kinds, strict=True):
        drawn = [r for r in own if r.part != EMPTY]
        # A gap between the parts.
        y = [i + (r.part == ACROSS) for i, r in enumerate(drawn)]
        bars = axis.barh(
            y,
            [r.temporaries for r in drawn],
            color=[COLORS.get(r.way, shared.RED) for r in drawn],
            height=0.7,
        )
        held = [f"{r.temporaries:.2f} ×" for r in drawn]
        axis.bar_label(bars, held, padding=4, color=shared.INK)
        axis.set(title=f"{own[0].layers} layers", xlabel="temporaries / parameters")
        axis.set_yticks(y, [r.way for r in drawn], fontsize=9)
        axis.set_xticks([])
        axis.spines["bottom"].set_visible(False)
        axis.tick_params(axis="y", length=0)
    axes[0][0].invert_yaxis()
    axes[0][0].set_xlim(0, 1.25 * max(r.temporaries for r in rows))
    return figure


BENCHMARK = shared.Benchmark(
    row=Row,
    measure=measure,
    tables=tables,
    check=check,
    draw=draw,
    page="temporaries.md",
    page_table=page_table,
    rounds=11,
    choices=LAYERS,
)
