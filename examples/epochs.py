"""Train on epochs that end mid-window, with metrics for every update.

    python examples/epochs.py

A window is the micro-batches between two updates: here four of 32 images each. An epoch
of 1347 images ends with a short window of three micro-batches, the last of 3 images:

* `with_boundaries` closes the short window, and the update is the mean over its images;
* the short micro-batch is padded, so the step does not compile again for a new shape.
  `weight=` counts only the real images;
* `accumulate(optax.identity())` returns the metrics' means over each window.

The data come from a Grain pipeline.
"""

import argparse
from functools import partial

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich.progress import track
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import optax_accum as oa

parser = argparse.ArgumentParser(
    description="Train on epochs that end mid-window, with metrics for every update.",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
)
parser.add_argument("--epochs", type=int, default=10, help="passes over the data")
parser.add_argument("--size", type=int, default=32, help="images per micro-batch")
parser.add_argument("--every-k", type=int, default=4, help="micro-batches per update")
parser.add_argument("--learning-rate", type=float, default=3e-3, help="for AdamW")
options = parser.parse_args()


def initial_params():
    key1, key2 = jax.random.split(jax.random.key(0))
    return {
        "w1": jax.random.normal(key1, (64, 128)) / 8,
        "b1": jnp.zeros(128),
        "w2": jax.random.normal(key2, (128, 10)) / 11,
        "b2": jnp.zeros(10),
    }


def loss_and_metrics(params, batch):
    hidden = jax.nn.gelu(batch["image"] @ params["w1"] + params["b1"])
    logits = hidden @ params["w2"] + params["b2"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    loss = jnp.mean(losses, where=batch["valid"])
    accuracy = jnp.mean(logits.argmax(-1) == batch["label"], where=batch["valid"])
    return loss, {"loss": loss, "accuracy": accuracy}


tx = oa.accumulate(optax.adamw(options.learning_rate))
metrics_tx = oa.accumulate(optax.identity())


@partial(jax.jit, donate_argnums=(0, 1, 2), static_argnames="boundary")
def train_step(params, state, metrics_state, batch, boundary):
    grads, metrics = jax.grad(loss_and_metrics, has_aux=True)(params, batch)
    window = {"weight": batch["valid"].sum(), "boundary": boundary}
    params, state = tx.update_params(grads, state, params, **window)
    metrics, metrics_state = metrics_tx.update(metrics, metrics_state, **window)
    return params, state, metrics_state, metrics


def pad(batch):
    missing = options.size - len(batch["label"])
    return {
        "image": np.pad(batch["image"], [(0, missing), (0, 0)]),
        "label": np.pad(batch["label"], [(0, missing)]),
        "valid": np.arange(options.size) < len(batch["label"]),
    }


images, labels = load_digits(return_X_y=True)
images = images.astype(np.float32) / 16
train_x, test_x, train_y, test_y = train_test_split(images, labels, random_state=0)
examples = [{"image": x, "label": y} for x, y in zip(train_x, train_y, strict=True)]
test = {"image": test_x, "label": test_y, "valid": np.full(len(test_y), True)}

params = initial_params()
state = tx.init(params)
metrics_state = metrics_tx.init({"loss": jnp.zeros([]), "accuracy": jnp.zeros([])})

for epoch in track(range(1, options.epochs + 1), "Training"):
    shuffled = grain.MapDataset.source(examples).shuffle(seed=epoch)
    loader = shuffled.batch(options.size, drop_remainder=False).map(pad)
    log = []
    for batch, boundary in oa.with_boundaries(loader, options.every_k):
        params, state, metrics_state, metrics = train_step(
            params, state, metrics_state, batch, boundary
        )
        if boundary:  # the metrics' means over the window; zeros elsewhere
            log.append(metrics)
    print(
        f"epoch {epoch}: {len(log)} updates, loss from {log[0]['loss']:.2f} "
        f"to {log[-1]['loss']:.2f}, last accuracy {log[-1]['accuracy']:.1%}"
    )
_, metrics = loss_and_metrics(params, test)
print(f"Test accuracy: {metrics['accuracy']:.1%}")
