"""One training on global batches and on micro-batches: do the parameters agree?

Handwritten digits, a small network, AdamW with a schedule and clipping; the same data
in the same order, and the same number of updates, four times:

global batch           plain Optax, a whole batch at once
equal micro-batches    every batch in eight equal parts; the window closes by count
ragged micro-batches   parts of a fixed size: the epoch's last batch is smaller, ends in
                       a short part, and its window is closed early
float64                global batches again, to know what float32 rounding does

It fails if micro-batches move a parameter by more than three times what float32 does.
"""

import argparse
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import optax_accum as oa
from benchmarks import shared

TRAINING_EXAMPLES, BATCH_SIZE, K = 1480, 256, 8
MARGIN = 3  # times the distance between float32 and float64
GLOBAL, EQUAL, RAGGED, FLOAT64 = RUNS = (
    "global batch",
    "equal micro-batches",
    "ragged micro-batches",
    "global batch in float64",
)


class Row(NamedTuple):
    """A run after one of its updates."""

    run: str
    update: int
    loss: float  # of the global batch
    distance: float  # of a parameter from the global batch's run, at most


def load_data() -> tuple[np.ndarray, np.ndarray]:
    digits = load_digits()
    images = (digits.data[:TRAINING_EXAMPLES] / 16).astype(np.float32)
    return images, digits.target[:TRAINING_EXAMPLES].astype(np.int32)


def make_params(dtype: Any) -> list[dict[str, jax.Array]]:
    """Three dense layers, 0.09M parameters, the same ones in both dtypes."""
    random = np.random.default_rng(0)
    sizes = [64, 256, 256, 10]
    return [
        {
            "w": jnp.asarray(np.float32(random.normal(size=(m, n)) / m**0.5), dtype),
            "b": jnp.zeros(n, dtype),
        }
        for m, n in itertools.pairwise(sizes)
    ]


def mean_loss(params: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
    # With GELU, because a rounding that flips a ReLU moves a gradient by more than the
    # rounding; then float32 alone would take two runs far apart.
    *hidden, last = params
    x = images
    for layer in hidden:
        x = jax.nn.gelu(x @ layer["w"] + layer["b"])
    logits = x @ last["w"] + last["b"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def global_batches(epochs: int) -> list[np.ndarray]:
    """The examples of each batch, the same ones in every run."""
    random = np.random.default_rng(0)
    cuts = range(BATCH_SIZE, TRAINING_EXAMPLES, BATCH_SIZE)
    orders = [random.permutation(TRAINING_EXAMPLES) for _ in range(epochs)]
    return [batch for order in orders for batch in np.split(order, cuts)]


def parts_of(batch: np.ndarray, run: str) -> list[np.ndarray]:
    if run == EQUAL:
        return np.array_split(batch, K)
    if run == RAGGED:
        size = BATCH_SIZE // K
        return np.split(batch, range(size, len(batch), size))
    return [batch]


def make_step(run: str, optimizer: optax.GradientTransformation) -> tuple[Any, Any]:
    """The transformation, and the step with the whole batch or with a part of it."""
    tx = oa.accumulate(optimizer, K)

    def micro_step(params, state, images, labels, boundary):
        loss, grads = jax.value_and_grad(mean_loss)(params, images, labels)
        params, state = tx.update_params(
            grads, state, params, weight=len(labels), boundary=boundary, value=loss
        )
        return params, state, state.window.loss / state.window.weight

    def global_step(params, state, images, labels, boundary):
        del boundary
        loss, grads = jax.value_and_grad(mean_loss)(params, images, labels)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    if run in (EQUAL, RAGGED):
        return tx, jax.jit(micro_step, static_argnames="boundary")
    return optimizer, jax.jit(global_step, static_argnames="boundary")


def train(run: str, epochs: int) -> list[tuple[float, Any]]:
    """The loss and the parameters after every update."""
    dtype = np.float64 if run == FLOAT64 else np.float32
    images, labels = load_data()
    batches = global_batches(epochs)
    per_epoch = len(batches) // epochs
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, 3e-3, per_epoch, len(batches) + per_epoch
    )
    tx, step = make_step(
        run, optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))
    )
    params = make_params(dtype)
    state = tx.init(params)
    history = []
    for batch in shared.track(batches, run):
        parts = parts_of(batch, run)
        for i, part in enumerate(parts, start=1):
            # The count closes whole windows; a short one is closed here.
            boundary = True if i == len(parts) < K else None
            params, state, loss = step(
                params, state, images[part].astype(dtype), labels[part], boundary
            )
        history.append((float(loss), jax.tree.map(np.asarray, params)))
    return history


def measure(options: argparse.Namespace) -> list[Row]:
    rows = []
    for run in RUNS:
        with jax.enable_x64(run == FLOAT64):
            history = train(run, epochs=3 if options.quick else 15)
        if run == GLOBAL:
            reference = [params for _, params in history]
        for i, (loss, params) in enumerate(history):
            distance = shared.largest_difference(params, reference[i])
            rows.append(Row(run, i + 1, loss, distance))
    return rows


def tolerance(rows: list[Row]) -> float:
    return MARGIN * shared.last(rows, "run")[FLOAT64].distance


def tables(rows: list[Row]) -> list[shared.Table]:
    ends = shared.last(rows, "run").values()
    return [
        shared.Table(
            f"after {rows[-1].update} updates",
            ("run", "loss", "parameters' distance"),
            "lrr",
            [(r.run, f"{r.loss:.6f}", f"{r.distance:.1e}") for r in ends],
        )
    ]


def check(rows: list[Row]) -> str:
    worst = max(shared.last(rows, "run")[run].distance for run in (EQUAL, RAGGED))
    text = (
        f"Micro-batches moved a parameter by {worst:.1e} at most; tolerance "
        f"{tolerance(rows):.1e} ({MARGIN} x float32 rounding)."
    )
    if not worst <= tolerance(rows):
        raise SystemExit(f"FAILED: {text}")
    return text


def draw(rows: list[Row]) -> Any:
    """The losses, which lie on one another, and how far the parameters are apart."""
    plt = shared.pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(7.3, 3.6))
    styles: dict[str, Any] = {
        GLOBAL: {"color": shared.GREY, "lw": 6},
        EQUAL: {"color": shared.BLUE, "lw": 2.5},
        RAGGED: {"color": shared.RED, "lw": 2, "ls": ":"},
        FLOAT64: {"color": shared.GREY, "lw": 2, "ls": "--"},
    }
    runs = shared.grouped(rows, "run")
    for run, style in styles.items():
        own = runs[run]
        updates = [r.update for r in own]
        if run != FLOAT64:
            left.plot(updates, [r.loss for r in own], label=run, **style)
        if run != GLOBAL:
            # No distance yet has no place on a logarithmic axis.
            distances = [r.distance or np.nan for r in own]
            label = run if run == FLOAT64 else None
            right.plot(updates, distances, label=label, **style)
    right.axhline(tolerance(rows), color=shared.GREEN, lw=1.5, label="tolerance")
    left.set(title="Loss of each batch", yscale="log")
    right.set(title="Largest distance of a parameter", yscale="log")
    for axis in (left, right):
        axis.set_xlabel("update")
    figure.legend(loc="outside upper center", ncols=3)
    return figure


BENCHMARK = shared.Benchmark(
    row=Row, measure=measure, tables=tables, check=check, draw=draw
)
