"""Train a Linen module with BatchNorm and dropout, one micro-batch per step.

    python examples/flax_linen.py

Two things change in a Linen training loop: the `TrainState` is that of
`optax_accum.flax`, and its optimizer is wrapped in `oa.accumulate`. BatchNorm
normalises each micro-batch separately, and passes its running statistics to the next
one. `state.step` counts micro-batches, so each has a different dropout mask.
"""

import argparse
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import track
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import optax_accum as oa
from optax_accum.flax import TrainState

parser = argparse.ArgumentParser(
    description="Train a Linen module, one micro-batch per step.",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
)
parser.add_argument("--epochs", type=int, default=6, help="passes over the data")
parser.add_argument("--size", type=int, default=32, help="images per micro-batch")
parser.add_argument("--every-k", type=int, default=4, help="micro-batches per update")
parser.add_argument("--learning-rate", type=float, default=2e-3, help="for AdamW")
options = parser.parse_args()


class Network(nn.Module):
    """Two convolutions with BatchNorm, and dropout before the output."""

    @nn.compact
    def __call__(self, x, *, train):
        """Maps images ``[B, 8, 8, 1]`` to logits ``[B, 10]``."""
        for features, strides in ((16, 1), (32, 2)):
            x = nn.Conv(features, (3, 3), strides=strides)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.95)(x))
        x = x.reshape(len(x), -1)
        return nn.Dense(10)(nn.Dropout(0.3, deterministic=not train)(x))


@partial(jax.jit, donate_argnums=0, static_argnames="boundary")
def train_step(state, x, y, *, boundary):
    def loss_fn(params):
        logits, changed = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            x,
            train=True,
            mutable="batch_stats",
            rngs={"dropout": jax.random.fold_in(jax.random.key(1), state.step)},
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
        return losses.mean(), changed["batch_stats"]

    grad_fn = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, batch_stats), grads = grad_fn(state.params)
    state = state.apply_gradients(
        grads=grads,
        weight=len(x),
        value=loss,
        boundary=boundary,
        batch_stats=batch_stats,
    )
    window = state.opt_state.window  # the micro-batches of this update so far
    return state, window.loss / window.weight  # their mean loss


@jax.jit
def accuracy(state, x, y):
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    return jnp.mean(state.apply_fn(variables, x, train=False).argmax(-1) == y)


images, labels = load_digits(return_X_y=True)
images = images.reshape(-1, 8, 8, 1).astype(np.float32) / 16
train_x, test_x, train_y, test_y = train_test_split(images, labels, random_state=0)
network = Network()
variables = network.init(jax.random.key(0), test_x[:1], train=False)
state = TrainState.create(
    apply_fn=network.apply,
    params=variables["params"],
    batch_stats=variables["batch_stats"],
    tx=oa.accumulate(optax.adamw(options.learning_rate)),
)

for epoch in track(range(1, options.epochs + 1), "Training"):
    order = np.random.default_rng(epoch).permutation(len(train_x))
    parts = np.split(order, range(options.size, len(order), options.size))
    for part, boundary in oa.with_boundaries(parts, options.every_k):
        state, loss = train_step(state, train_x[part], train_y[part], boundary=boundary)
    test_accuracy = accuracy(state, test_x, test_y)
    print(f"epoch {epoch}: loss {loss:.3f}, test accuracy {test_accuracy:.1%}")
