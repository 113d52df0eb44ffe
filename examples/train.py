"""Train a small network on handwritten digits, with gradient accumulation.

Four micro-batches of 32 images make an update. The last update of an epoch is made from
32 + 32 + 3 images. Every epoch is saved: run it again with more --epochs to continue.
"""

import argparse
from pathlib import Path

import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from rich.progress import track
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import optax_accum as oa
import optax_accum.flax as oaf

parser = argparse.ArgumentParser(
    description="Train a small network, with gradient accumulation.",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
)
parser.add_argument("--epochs", type=int, default=10, help="passes over the data")
parser.add_argument("--size", type=int, default=32, help="images per micro-batch")
parser.add_argument("--every-k", type=int, default=4, help="micro-batches per update")
parser.add_argument("--learning-rate", type=float, default=3e-3, help="for AdamW")
parser.add_argument("--folder", type=Path, default="out/train", help="for checkpoints")
options = parser.parse_args()


class Network(nnx.Module):
    """Two convolutions and a dense layer."""

    def __init__(self, rngs):
        self.conv1 = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), strides=2, rngs=rngs)
        self.out = nnx.Linear(4 * 4 * 32, 10, rngs=rngs)

    def __call__(self, x):
        """Maps images ``[B, 8, 8, 1]`` to logits ``[B, 10]``."""
        x = nnx.relu(self.conv2(nnx.relu(self.conv1(x))))
        return self.out(x.reshape(len(x), -1))


@nnx.jit(donate_argnums=(0, 1), static_argnames="boundary")
def train_step(model, optimizer, x, y, boundary):
    def loss_fn(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    loss, grads = nnx.value_and_grad(loss_fn)(model)
    optimizer.update(model, grads, weight=len(x), value=loss, boundary=boundary)
    window = optimizer.opt_state.window  # the micro-batches of this update so far
    return window.loss / window.weight  # their mean loss


@nnx.jit
def accuracy(model, x, y):
    return (model(x).argmax(-1) == y).mean()


images, labels = load_digits(return_X_y=True)
images = images.reshape(-1, 8, 8, 1).astype(np.float32) / 16
train_x, test_x, train_y, test_y = train_test_split(images, labels, random_state=0)
model = Network(nnx.Rngs(0))
tx = oa.accumulate(optax.adamw(options.learning_rate))
optimizer = oaf.Optimizer(model, tx, wrt=nnx.Param)

with ocp.CheckpointManager(options.folder.resolve()) as manager:
    if done := manager.latest_step() or 0:
        print(f"Continuing after epoch {done} of {options.epochs}: {options.folder}")
        like = ocp.args.StandardRestore(nnx.state((model, optimizer)))
        nnx.update((model, optimizer), manager.restore(done, args=like))
    for epoch in track(range(done + 1, options.epochs + 1), "Training"):
        order = np.random.default_rng(epoch).permutation(len(train_x))
        parts = np.split(order, range(options.size, len(order), options.size))
        for part, boundary in oa.with_boundaries(parts, options.every_k):
            loss = train_step(model, optimizer, train_x[part], train_y[part], boundary)
        manager.save(epoch, args=ocp.args.StandardSave(nnx.state((model, optimizer))))
        test_accuracy = accuracy(model, test_x, test_y)
        print(
            f"epoch {epoch}: {optimizer.gradient_step} updates, loss of the last one "
            f"{loss:.3f}, test accuracy {test_accuracy:.1%}"
        )
print(f"Test accuracy: {accuracy(model, test_x, test_y):.1%}")
