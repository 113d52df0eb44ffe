"""Train an Equinox model, one micro-batch per step.

    python examples/equinox_mlp.py

An Equinox model mixes arrays with activation functions, numbers and flags. The
optimizer gets only the floating arrays, in `init` and in `update_params`. `eqx.combine`
puts the new arrays back into the model.
"""

import argparse
from collections.abc import Callable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import track
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import optax_accum as oa

parser = argparse.ArgumentParser(
    description="Train an Equinox model, one micro-batch per step.",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
)
parser.add_argument("--epochs", type=int, default=20, help="passes over the data")
parser.add_argument("--size", type=int, default=32, help="images per micro-batch")
parser.add_argument("--every-k", type=int, default=4, help="micro-batches per update")
parser.add_argument("--learning-rate", type=float, default=3e-3, help="for AdamW")
options = parser.parse_args()


class Network(eqx.Module):
    """One hidden layer with dropout."""

    hidden: eqx.nn.Linear
    activation: Callable
    dropout: eqx.nn.Dropout
    out: eqx.nn.Linear

    def __init__(self, key):
        key1, key2 = jax.random.split(key)
        self.hidden = eqx.nn.Linear(64, 128, key=key1)
        self.activation = jax.nn.gelu
        self.dropout = eqx.nn.Dropout(0.2)
        self.out = eqx.nn.Linear(128, 10, key=key2)

    def __call__(self, image, key=None):
        """Maps one image ``[64]`` to logits ``[10]``."""
        x = self.activation(self.hidden(image))
        return self.out(self.dropout(x, key=key))


def loss_fn(model, x, y, key):
    logits = jax.vmap(model)(x, jax.random.split(key, len(x)))
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


tx = oa.accumulate(optax.adamw(options.learning_rate))


@eqx.filter_jit(donate="all-except-first")
def train_step(batch, model, state, boundary):  # a Python bool is static to filter_jit
    loss, grads = eqx.filter_value_and_grad(loss_fn)(model, *batch)
    params, static = eqx.partition(model, eqx.is_inexact_array)
    weight = len(batch[0])
    params, state = tx.update_params(
        grads, state, params, weight=weight, value=loss, boundary=boundary
    )
    window = state.window  # the micro-batches of this update so far
    return eqx.combine(params, static), state, window.loss / window.weight


@eqx.filter_jit
def accuracy(model, x, y):
    model = eqx.nn.inference_mode(model)  # without dropout
    return jnp.mean(jax.vmap(model)(x).argmax(-1) == y)


images, labels = load_digits(return_X_y=True)
images = images.astype(np.float32) / 16
train_x, test_x, train_y, test_y = train_test_split(images, labels, random_state=0)
key, model_key = jax.random.split(jax.random.key(0))
model = Network(model_key)
state = tx.init(eqx.filter(model, eqx.is_inexact_array))

for epoch in track(range(1, options.epochs + 1), "Training"):
    order = np.random.default_rng(epoch).permutation(len(train_x))
    parts = np.split(order, range(options.size, len(order), options.size))
    for part, boundary in oa.with_boundaries(parts, options.every_k):
        key, dropout_key = jax.random.split(key)
        batch = train_x[part], train_y[part], dropout_key
        model, state, loss = train_step(batch, model, state, boundary)
    if epoch % 2 == 0:
        test_accuracy = accuracy(model, test_x, test_y)
        print(f"epoch {epoch}: loss {loss:.3f}, test accuracy {test_accuracy:.1%}")
