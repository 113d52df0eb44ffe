"""An Equinox model, trained on global batches and on micro-batches in two ways.

    pip install equinox
    python examples/equinox_mlp.py

An Equinox model is one tree of arrays and of what is no array: activation functions,
numbers, flags. Optimizers and `jax.grad` take the arrays alone, and so does gradient
accumulation:

* across steps: `accumulate` is initialised with the model's floating arrays,
  ``eqx.filter(model, eqx.is_inexact_array)``, and `update_params` is given them;
* inside one step: `value_and_grad` differentiates with respect to them, and the loss
  puts the model together again.

The network has a list of layers, an activation function and dropout. The random keys of
the dropout belong to the examples and are cut with them, so that the masks are the same
however a batch is cut. A batch of 100 runs as micro-batches of 32, 32, 32 and 4. The
example fails if either way moves a parameter by more than rounding does.

The data are scikit-learn's digits, 1797 images of 8 x 8, which come with the package.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import equinox as eqx
import jax
import numpy as np
import optax
from rich import box
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

import optax_accum as oa

TRAINING_EXAMPLES = 1500  # of 1797; the rest is for testing
BATCH, MICRO_BATCH = 100, 32
TOLERANCE = 1e-4  # what float32 may do to a parameter in this training


class Batch(NamedTuple):
    """Images ``f32[B, 64]``, labels ``i32[B]``, and for each example a key ``[B]``."""

    images: Any
    labels: Any
    keys: Any


class Network(eqx.Module):
    """Two layers, and between them what is no array."""

    layers: list[eqx.nn.Linear]
    activation: Callable[[jax.Array], jax.Array]
    dropout: eqx.nn.Dropout

    def __init__(self, key: jax.Array):
        """Random parameters."""
        first, second = jax.random.split(key)
        self.layers = [
            eqx.nn.Linear(64, 64, key=first),
            eqx.nn.Linear(64, 10, key=second),
        ]
        self.activation = jax.nn.gelu
        self.dropout = eqx.nn.Dropout(0.2)

    def __call__(self, image: jax.Array, key: jax.Array | None) -> jax.Array:
        """The logits ``f32[10]`` of one image."""
        first, second = self.layers
        return second(self.dropout(self.activation(first(image)), key=key))


def mean_loss(model: Network, batch: Batch) -> jax.Array:
    """The mean cross-entropy over a batch."""
    logits = jax.vmap(model)(batch.images, batch.keys)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    return losses.mean()


def global_batch_step(tx: Any) -> Any:
    """Equinox and Optax, as always."""

    @eqx.filter_jit(donate="all-except-first")
    def step(batch, model, state):
        grads = eqx.filter_grad(mean_loss)(model, batch)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, state = tx.update(grads, state, params)
        return eqx.apply_updates(model, updates), state

    return step


def across_steps(tx: Any) -> Any:
    """A step for micro-batches, with `tx` from `accumulate`."""

    @eqx.filter_jit(donate="all-except-first")
    def step(batch, model, state, boundary):
        grads = eqx.filter_grad(mean_loss)(model, batch)
        params, static = eqx.partition(model, eqx.is_inexact_array)
        # `boundary` is a Python bool, which `eqx.filter_jit` takes as static.
        params, state = tx.update_params(
            grads, state, params, weight=len(batch.labels), boundary=boundary
        )
        return eqx.combine(params, static), state

    return step


def inside_one_step(tx: Any) -> Any:
    """A step for global batches, in the memory of a micro-batch."""

    @eqx.filter_jit(donate="all-except-first")
    def step(batch, model, state):
        params, static = eqx.partition(model, eqx.is_inexact_array)

        def loss_of(params, batch):
            return mean_loss(eqx.combine(params, static), batch)

        grads = oa.grad(loss_of, microbatch_size=MICRO_BATCH)(params, batch)
        updates, state = tx.update(grads, state, params)
        return eqx.apply_updates(model, updates), state

    return step


def load_data() -> tuple[Any, Any]:
    """Images and labels for training and for testing, shuffled once and for all."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = (digits.data[order] / 16).astype(np.float32)
    labels = digits.target[order].astype(np.int32)
    n = TRAINING_EXAMPLES
    return (images[:n], labels[:n]), (images[n:], labels[n:])


def global_batches(data: Any, epochs: int) -> Iterator[Batch]:
    """The same in every run."""
    images, labels = data
    for epoch in range(epochs):
        order = np.random.default_rng(epoch).permutation(TRAINING_EXAMPLES)
        for i, chosen in enumerate(np.split(order, TRAINING_EXAMPLES // BATCH)):
            key = jax.random.fold_in(jax.random.key(epoch), i)
            yield Batch(images[chosen], labels[chosen], jax.random.split(key, BATCH))


def micro_batches(batch: Batch) -> Iterator[Batch]:
    """Parts of 32, 32, 32 and 4."""
    for start in range(0, BATCH, MICRO_BATCH):
        yield Batch(*(leaf[start : start + MICRO_BATCH] for leaf in batch))


def train(make_step: Any, tx: Any, data: Any, options: argparse.Namespace) -> Network:
    """Trains in one of the three ways."""
    model = Network(jax.random.key(options.seed))
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))
    step = make_step(tx)
    for batch in global_batches(data, options.epochs):
        if make_step is across_steps:
            for part, boundary in oa.with_boundaries(micro_batches(batch)):
                model, state = step(part, model, state, boundary)
        else:
            model, state = step(batch, model, state)
    return model


def accuracy(model: Network, data: Any) -> float:
    """How many of the images the network knows."""
    images, labels = data
    model = eqx.nn.inference_mode(model)  # without dropout
    logits = jax.jit(jax.vmap(lambda image: model(image, None)))(images)
    return float((logits.argmax(-1) == labels).mean())


def largest_difference(a: Network, b: Network) -> float:
    """The largest absolute difference between the arrays of two models."""
    arrays = [jax.tree.leaves(eqx.filter(m, eqx.is_inexact_array)) for m in (a, b)]
    return max(float(np.abs(x - y).max()) for x, y in zip(*arrays, strict=True))


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--epochs", type=int, default=10)
    add("--learning-rate", type=float, default=3e-3)
    add("--seed", type=int, default=0)
    add("--quick", action="store_true", help="two epochs")
    options = parser.parse_args(arguments)
    if options.quick:
        options.epochs = 2
    return options


def main(arguments: list[str]) -> int:
    options = parse_arguments(arguments)
    console = Console(highlight=False)
    data, test_data = load_data()
    inner = optax.adamw(options.learning_rate, weight_decay=1e-2)
    ways = {
        "global batches": (global_batch_step, inner),
        "across steps, oa.accumulate": (across_steps, oa.accumulate(inner)),
        "inside one step, oa.grad": (inside_one_step, inner),
    }
    models = {name: train(*way, data, options) for name, way in ways.items()}

    reference, *accumulated = models.values()
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    table.add_column("way", no_wrap=True)
    for heading in ("test\naccuracy", "parameters'\ndifference"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, model in models.items():
        table.add_row(
            name,
            f"{100 * accuracy(model, test_data):.1f} %",
            f"{largest_difference(model, reference):.1e}",
        )
    console.print(table)

    worst = max(largest_difference(model, reference) for model in accumulated)
    summary = (
        f"Micro-batches moved no parameter by more than {worst:.1e}; "
        f"{TOLERANCE:.0e} is allowed."
    )
    console.print(summary if worst <= TOLERANCE else f"[red]FAILED: {summary}")
    return 0 if worst <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
