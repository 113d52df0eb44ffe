"""Flax Linen with BatchNorm and dropout: handwritten digits in micro-batches.

    python examples/flax_linen.py

What a Linen user changes is little: the `TrainState` is that of `optax_accum.flax`, its
optimizer is wrapped in `oa.accumulate`, and `apply_gradients` is told over how many
examples the loss was a mean. Four micro-batches of 32 make an update, and the end of
the epoch closes its last window early. BatchNorm normalises every micro-batch by
itself, and its running statistics go from one to the next; the dropout key is folded
with `step`, which counts micro-steps, so that no two micro-batches have the same mask.

The data are scikit-learn's scans of handwritten digits, which come with the package.
"""

import argparse
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn.datasets import load_digits

import optax_accum as oa
from optax_accum.flax import TrainState

TRAINING_EXAMPLES = 1480  # of 1797; the rest is for testing


class Network(nn.Module):
    """Two convolutions with BatchNorm, and dropout before the output."""

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool) -> jax.Array:
        """Maps images ``f32[B, 8, 8, 1]`` to logits ``f32[B, 10]``."""
        x = images
        for features in (16, 32):
            x = nn.Conv(features, (3, 3))(x)
            x = nn.BatchNorm(use_running_average=not train, momentum=0.95)(x)
            x = nn.relu(x)
        x = x.reshape(len(x), -1)
        return nn.Dense(10)(nn.Dropout(0.3, deterministic=not train)(x))


def create_state(every_k: int) -> TrainState:
    model = Network()
    variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), train=False)
    return TrainState.create(
        apply_fn=model.apply,
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        tx=oa.accumulate(optax.adamw(2e-3), every_k),
    )


@functools.partial(jax.jit, donate_argnums=0, static_argnames="boundary")
def train_step(state: TrainState, images, labels, *, boundary: bool) -> TrainState:
    """One micro-step."""
    key = jax.random.fold_in(jax.random.key(1), state.step)

    def loss_fn(params):
        logits, changed = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            images,
            train=True,
            mutable="batch_stats",
            rngs={"dropout": key},
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return loss, changed["batch_stats"]

    (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
    return state.apply_gradients(
        grads=grads,
        weight=len(labels),
        value=loss,
        boundary=boundary,
        batch_stats=stats,
    )


@jax.jit
def accuracy(state: TrainState, images, labels):
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    logits = state.apply_fn(variables, images, train=False)
    return (logits.argmax(-1) == labels).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--every-k", type=int, default=4)
    parser.add_argument("--size", type=int, default=32, help="of a micro-batch")
    parser.add_argument("--quick", action="store_true", help="two epochs")
    options = parser.parse_args()

    digits = load_digits()
    images = jnp.asarray(digits.images[..., None] / 16, jnp.float32)
    labels = jnp.asarray(digits.target, jnp.int32)
    test = images[TRAINING_EXAMPLES:], labels[TRAINING_EXAMPLES:]
    random = np.random.default_rng(0)

    state = create_state(options.every_k)
    print(f"{options.every_k} micro-batches of {options.size} per update")
    for epoch in range(2 if options.quick else options.epochs):
        order = random.permutation(TRAINING_EXAMPLES)
        parts = np.split(order, range(options.size, len(order), options.size))
        losses = []
        for part, boundary in oa.with_boundaries(parts, options.every_k):
            state = train_step(state, images[part], labels[part], boundary=boundary)
            if boundary:  # the host knows, and waits for nothing
                window = state.opt_state.window
                losses.append(window.value / window.weight)
        print(
            f"epoch {epoch + 1}: {int(state.step)} micro-steps, "
            f"{int(state.gradient_step)} updates, "
            f"loss from {float(losses[0]):.3f} to {float(losses[-1]):.3f}, "
            f"test accuracy {float(accuracy(state, *test)):.3f}"
        )
    assert accuracy(state, *test) > 0.8


if __name__ == "__main__":
    main()
