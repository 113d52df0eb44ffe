"""Flax NNX with BatchNorm and dropout: handwritten digits, in both ways.

    python examples/flax_nnx.py
    python examples/flax_nnx.py --inside     # the batch in parts, inside one step

Across steps, `optax_accum.flax.Optimizer` takes one micro-batch's gradient at a time.
Inside one step, `optax_accum.flax.value_and_grad` takes the place of
`nnx.value_and_grad` and cuts the batch itself. Both make one update of 128 examples in
four micro-batches of 32. BatchNorm normalises every micro-batch by itself; its running
statistics, and the counts of the random stream that dropout draws from, go from
micro-batch to micro-batch and stay in the module.

The data are scikit-learn's scans of handwritten digits, which come with the package.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import optax_accum as oa
import optax_accum.flax as oaf

TRAINING_EXAMPLES = 1480  # of 1797; the rest is for testing


class Network(nnx.Module):
    """Two convolutions with BatchNorm, and dropout before the output."""

    def __init__(self, rngs: nnx.Rngs):
        self.conv1 = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.norm1 = nnx.BatchNorm(16, momentum=0.95, rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), rngs=rngs)
        self.norm2 = nnx.BatchNorm(32, momentum=0.95, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.out = nnx.Linear(8 * 8 * 32, 10, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images ``f32[B, 8, 8, 1]`` to logits ``f32[B, 10]``."""
        x = nnx.relu(self.norm1(self.conv1(images)))
        x = nnx.relu(self.norm2(self.conv2(x)))
        return self.out(self.dropout(x.reshape(len(x), -1)))


def loss_fn(model: Network, batch) -> jax.Array:
    images, labels = batch
    logits = model(images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


@nnx.jit(static_argnames="boundary")
def micro_step(model: Network, optimizer: nnx.Optimizer, batch, *, boundary: bool):
    """One micro-batch per call."""
    loss, grads = nnx.value_and_grad(loss_fn)(model, batch)
    optimizer.update(model, grads, weight=len(batch[1]), value=loss, boundary=boundary)


@nnx.jit(static_argnames="size")
def whole_step(model: Network, optimizer: nnx.Optimizer, batch, *, size: int):
    """The whole batch in one call, `size` examples at a time."""
    in_parts = oaf.value_and_grad(loss_fn, microbatch_size=min(size, len(batch[1])))
    loss, grads = in_parts(model, batch)
    optimizer.update(model, grads)
    return loss


@nnx.jit
def accuracy(model: Network, images, labels):
    return (model(images).argmax(-1) == labels).mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inside", action="store_true", help="inside one step")
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

    model = Network(nnx.Rngs(0))
    optimizer: nnx.Optimizer
    if options.inside:
        optimizer = nnx.Optimizer(model, optax.adamw(2e-3), wrt=nnx.Param)
    else:
        tx = oa.accumulate(optax.adamw(2e-3), options.every_k)
        optimizer = oaf.Optimizer(model, tx, wrt=nnx.Param)

    where = "inside one step" if options.inside else "across steps"
    print(f"{where}: {options.every_k} micro-batches of {options.size} per update")
    for epoch in range(2 if options.quick else options.epochs):
        order = random.permutation(TRAINING_EXAMPLES)
        size = options.size * (options.every_k if options.inside else 1)
        parts = np.split(order, range(size, len(order), size))
        losses = []
        for part, boundary in oa.with_boundaries(parts, options.every_k):
            batch = images[part], labels[part]
            if options.inside:
                losses.append(whole_step(model, optimizer, batch, size=options.size))
                continue
            micro_step(model, optimizer, batch, boundary=boundary)
            if boundary:  # the host knows, and waits for nothing
                window = nnx.as_pure(optimizer.opt_state).window
                losses.append(window.value / window.weight)
        correct = accuracy(
            nnx.view(model, use_running_average=True, deterministic=True), *test
        )
        print(
            f"epoch {epoch + 1}: {len(losses)} updates, "
            f"loss from {float(losses[0]):.3f} to {float(losses[-1]):.3f}, "
            f"test accuracy {float(correct):.3f}"
        )
    assert correct > 0.8


if __name__ == "__main__":
    main()
