"""Measure how large the batch should be, and adapt it during training.

    python examples/noise_scale.py

The noise scale is the batch size at which a gradient has as much noise as signal.
`accumulate` measures it during training, and `adaptive_k` adapts the number of
micro-batches per update, so the batch is as large as the noise scale. The picture
compares the measurement with the true noise scale, computed from all training images.
(That is too expensive in a real training run.)
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
from matplotlib.figure import Figure
from rich.progress import track
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import optax_accum as oa

parser = argparse.ArgumentParser(
    description="Adapt the batch size to the noise scale during training.",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
)
parser.add_argument("--updates", type=int, default=300, help="number of updates")
parser.add_argument("--size", type=int, default=8, help="images per micro-batch")
parser.add_argument(
    "--max-k", type=int, default=256, help="largest number of micro-batches per update"
)
parser.add_argument("--learning-rate", type=float, default=0.1, help="for SGD")
parser.add_argument(
    "--picture",
    type=Path,
    default="out/noise_scale.png",
    help="where to save the picture",
)
options = parser.parse_args()

every_k = oa.noise.adaptive_k(2, options.max_k)
tx = oa.accumulate(optax.sgd(options.learning_rate), every_k, noise_decay=0.9)


def predict(params, x):
    return jax.nn.gelu(x @ params["w1"] + params["b1"]) @ params["w2"] + params["b2"]


def loss_fn(params, x, y):
    logits = predict(params, x)
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


@partial(jax.jit, donate_argnums=(0, 1))
def train_step(params, state, x, y):
    grads = jax.grad(loss_fn)(params, x, y)
    return tx.update_params(grads, state, params, weight=len(x))


@jax.jit
def true_noise_scale(params, x, y):
    def gradient(x, y):
        grads = jax.grad(loss_fn)(params, x[None], y[None])
        return jnp.concatenate([g.ravel() for g in jax.tree.leaves(grads)])

    grads = jax.vmap(gradient)(x, y)
    mean = grads.mean(0)
    return ((grads - mean) ** 2).sum(-1).mean() / (mean**2).sum()


images, labels = load_digits(return_X_y=True)
images = images.astype(np.float32) / 16
train_x, test_x, train_y, test_y = train_test_split(images, labels, random_state=0)
key1, key2 = jax.random.split(jax.random.key(0))
params = {
    "w1": jax.random.normal(key1, (64, 64)) / 8,
    "b1": jnp.zeros(64),
    "w2": jax.random.normal(key2, (64, 10)) / 8,
    "b2": jnp.zeros(10),
}
state = tx.init(params)

random = np.random.default_rng(0)
batch_sizes, measured, true = [], [], {}
for update in track(range(1, options.updates + 1), "Training"):
    k = int(state.noise.k)  # how many micro-batches the next update is made from
    for _ in range(k):
        part = random.integers(len(train_x), size=options.size)  # independent draws
        params, state = train_step(params, state, train_x[part], train_y[part])
    batch_sizes.append(options.size * k)
    measured.append(float(oa.noise.estimate(state).batch_size))
    if update % 30 == 0:
        true[update] = float(true_noise_scale(params, train_x, train_y))
        print(
            f"update {update}: noise scale {measured[-1]:.0f} images "
            f"(true value {true[update]:.0f}), batch size {batch_sizes[-1]}"
        )
correct = predict(params, test_x).argmax(-1) == test_y
print(f"Test accuracy: {correct.mean():.1%}")

grey, blue, red = "#808080", "#4a90e2", "#e0523f"  # legible on white and on black
style: Any = {
    "font.size": 13,
    "text.color": grey,
    "axes.edgecolor": grey,
    "axes.labelcolor": grey,
    "xtick.color": grey,
    "ytick.color": grey,
}
x = range(1, options.updates + 1)
with mpl.rc_context(style):
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.step(x, batch_sizes, color=red, lw=3, label="images per update")
    axes.plot(x, measured, color=blue, label="noise scale, measured")
    axes.plot(list(true), list(true.values()), "o", c=grey, label="noise scale, true")
    axes.set(xlabel="update", ylabel="images", yscale="log")
    axes.set_title("The batch grows with the noise scale", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False, labelcolor="linecolor")
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(options.picture, dpi=150, transparent=True)
print(f"Saved the picture as {options.picture}")
