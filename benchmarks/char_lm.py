"""Token weights against the mean of means, in a character language model.

A small network learns the paragraphs of Python's documentation (`pydoc_data.topics`).
They are short and long; a batch pads them, and its loss is the mean over the tokens
that are not padding. The same training, five times:

global batch             `jax.value_and_grad`, a whole batch of 32 paragraphs at once
5 at a time, weight=     `optax_accum.value_and_grad`, which is told how many tokens
1 at a time, weight=     each micro-batch holds
1 at a time, no weight=  the mean of means: a paragraph of ten characters counts as much
                         as one of a hundred
float64                  global batches again, to know what float32 rounding does

It fails if micro-batches with weights move a parameter by more than three times what
float32 does, or if the mean of means does not. A run with --quick is too short to
compare losses, and does not.
"""

import argparse
import functools
import math
import pydoc_data.topics
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_accum as oa
from benchmarks import shared

BATCH_SIZE, TEST_SIZE, LENGTH = 32, 128, 128  # paragraphs, paragraphs, characters
CONTEXT, WIDTH = 8, 256  # characters that predict the next; hidden units
EVERY = 10  # updates between two rows
MARGIN = 3  # times the distance between float32 and float64
GLOBAL, BY_5, BY_1, MEANS, FLOAT64 = (
    "global batch",
    "5 at a time, weight=",
    "1 at a time, weight=",
    "1 at a time, no weight=",
    "global batch in float64",
)

Batch = dict[str, np.ndarray]  # "tokens" i32[B, LENGTH + 1] and "valid" f32[B, LENGTH]


class Row(NamedTuple):
    """A run after so many updates."""

    run: str
    update: int
    test_loss: float  # per token; nan with --quick
    distance: float  # of a parameter from the global batch's run, at most


@functools.cache
def load_paragraphs() -> tuple[Batch, int]:
    """All paragraphs, cut and padded with 0, in random order; and the vocabulary."""
    topics = pydoc_data.topics.topics.values()
    text = [p for topic in topics for p in topic.split("\n\n") if len(p) > 1]
    characters = sorted(set("".join(text)))
    codes = {c: code for code, c in enumerate(characters, start=1)}
    tokens = np.zeros((len(text), LENGTH + 1), np.int32)
    for row, paragraph in zip(tokens, text, strict=True):
        known = [codes[c] for c in paragraph[: LENGTH + 1]]
        row[: len(known)] = known
    tokens = np.random.default_rng(0).permutation(tokens)
    valid = (tokens[:, 1:] != 0).astype(np.float32)
    return {"tokens": tokens, "valid": valid}, len(characters) + 1


def take(paragraphs: Batch, indices: Any) -> Batch:
    return {name: array[indices] for name, array in paragraphs.items()}


def make_params(vocabulary: int, dtype: Any) -> dict[str, jax.Array]:
    """The same ones in both dtypes."""
    normal = np.random.default_rng(0).normal
    wide = CONTEXT * 32
    params = {
        "embedding": normal(size=(vocabulary, 32)),
        "hidden": normal(size=(wide, WIDTH)) / wide**0.5,
        "bias": np.zeros(WIDTH),
        "out": normal(size=(WIDTH, vocabulary)) / WIDTH**0.5,
    }
    return {name: jnp.asarray(np.float32(p), dtype) for name, p in params.items()}


def mean_loss(params: Any, batch: Batch) -> jax.Array:
    """The mean cross-entropy over the tokens that are not padding."""
    tokens = jnp.asarray(batch["tokens"])
    # Before the start is padding as well.
    padded = jnp.pad(tokens[:, :-1], ((0, 0), (CONTEXT - 1, 0)))
    context = [padded[:, i : i + tokens.shape[1] - 1] for i in range(CONTEXT)]
    x = jnp.concatenate([params["embedding"][c] for c in context], -1)
    logits = jax.nn.gelu(x @ params["hidden"] + params["bias"]) @ params["out"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return jnp.sum(losses * batch["valid"]) / count_tokens(params, batch)


def count_tokens(params: Any, batch: Batch) -> jax.Array:
    """What `mean_loss` averages over: the weight of a micro-batch."""
    del params
    return jnp.sum(batch["valid"])


VALUE_AND_GRAD = {
    GLOBAL: jax.value_and_grad(mean_loss),
    BY_5: oa.value_and_grad(mean_loss, microbatch_size=5, weight=count_tokens),
    BY_1: oa.value_and_grad(mean_loss, microbatch_size=1, weight=count_tokens),
    MEANS: oa.value_and_grad(mean_loss, microbatch_size=1),
    FLOAT64: jax.value_and_grad(mean_loss),
}


def train(run: str, steps: int, *, test: bool) -> list[tuple[int, float, Any]]:
    """Of every tenth update its number, the test loss and the parameters."""
    dtype = np.float64 if run == FLOAT64 else np.float32
    paragraphs, vocabulary = load_paragraphs()
    paragraphs = paragraphs | {"valid": paragraphs["valid"].astype(dtype)}
    held_out = take(paragraphs, slice(-TEST_SIZE, None))
    random = np.random.default_rng(0)
    train_size = len(paragraphs["tokens"]) - TEST_SIZE
    batches = random.integers(train_size, size=(steps, BATCH_SIZE))

    schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-2, steps // 10, steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))
    params = make_params(vocabulary, dtype)
    state = tx.init(params)

    @jax.jit
    def step(params, state, batch):
        _, grads = VALUE_AND_GRAD[run](params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    test_loss = jax.jit(mean_loss)
    history = []
    for update, indices in enumerate(shared.track(batches, run), start=1):
        params, state = step(params, state, take(paragraphs, indices))
        if update % EVERY == 0:
            loss = float(test_loss(params, held_out)) if test else math.nan
            history.append((update, loss, jax.tree.map(np.asarray, params)))
    return history


def measure(options: argparse.Namespace) -> list[Row]:
    rows = []
    for run in VALUE_AND_GRAD:
        steps = 20 if options.quick else 300
        with jax.enable_x64(run == FLOAT64):
            history = train(run, steps, test=not options.quick)
        if run == GLOBAL:
            reference = {update: params for update, _, params in history}
        for update, loss, params in history:
            distance = shared.largest_difference(params, reference[update])
            rows.append(Row(run, update, loss, distance))
    return rows


def tolerance(rows: list[Row]) -> float:
    return MARGIN * shared.last(rows, "run")[FLOAT64].distance


def tables(rows: list[Row]) -> list[shared.Table]:
    tested = math.isfinite(rows[-1].test_loss)
    return [
        shared.Table(
            f"after {rows[-1].update} updates",
            ("run", "parameters' distance", *(["test loss"] if tested else [])),
            "lrr" if tested else "lr",
            [
                (
                    r.run,
                    f"{r.distance:.1e}",
                    *([f"{r.test_loss:.4f}"] if tested else []),
                )
                for r in shared.last(rows, "run").values()
            ],
        )
    ]


def check(rows: list[Row]) -> str:
    ends = shared.last(rows, "run")
    worst = max(ends[BY_5].distance, ends[BY_1].distance)
    text = (
        f"With weights, micro-batches moved a parameter by {worst:.1e} at most, "
        f"without by {ends[MEANS].distance:.1e}; tolerance {tolerance(rows):.1e} "
        f"({MARGIN} x float32 rounding)."
    )
    if not worst <= tolerance(rows) < ends[MEANS].distance:
        raise SystemExit(f"FAILED: {text}")
    return text


def draw(rows: list[Row]) -> Any:
    """The test loss with and without weights, and how far the parameters are apart."""
    plt = shared.pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.3, 3.8))
    styles: dict[str, Any] = {
        GLOBAL: {"color": shared.GREY, "lw": 6},
        BY_5: {"color": shared.GREEN, "lw": 2.5},
        BY_1: {"color": shared.BLUE, "lw": 2, "ls": ":"},
        MEANS: {"color": shared.RED, "lw": 2},
        FLOAT64: {"color": shared.GREY, "lw": 2, "ls": "--"},
    }
    runs = shared.grouped(rows, "run")
    for run, style in styles.items():
        own = runs[run]
        if run != FLOAT64:
            late = own[len(own) // 3 :]  # the first losses would hide the rest
            losses = [r.test_loss for r in late]
            left.plot([r.update for r in late], losses, label=run, **style)
        if run != GLOBAL:
            # No distance yet has no place on a logarithmic axis.
            distances = [r.distance or np.nan for r in own]
            label = run if run == FLOAT64 else None
            right.plot([r.update for r in own], distances, label=label, **style)
    left.set(title="Test loss per token", visible=math.isfinite(rows[0].test_loss))
    right.set(title="Largest distance of a parameter", yscale="log")
    for axis in (left, right):
        axis.set_xlabel("update")
    figure.legend(loc="outside upper center", ncols=3)
    return figure


BENCHMARK = shared.Benchmark(
    row=Row, measure=measure, tables=tables, check=check, draw=draw
)
