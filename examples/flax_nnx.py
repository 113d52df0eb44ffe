"""Train an NNX module with BatchNorm and dropout, the whole batch in one step.

    python examples/flax_nnx.py

`oaf.value_and_grad` replaces `nnx.value_and_grad`, and splits the batch of 128 images
into micro-batches of 32. The optimizer stays the same. BatchNorm normalises each
micro-batch separately. Its running statistics, and the random stream of dropout, pass
from one micro-batch to the next. (If your loader yields micro-batches, see train.py.)
"""

import argparse

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.progress import track
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import optax_accum.flax as oaf

parser = argparse.ArgumentParser(
    description="Train an NNX module, the whole batch in one step.",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
)
parser.add_argument("--epochs", type=int, default=6, help="passes over the data")
parser.add_argument("--batch-size", type=int, default=128, help="images per update")
parser.add_argument("--size", type=int, default=32, help="images per micro-batch")
parser.add_argument("--learning-rate", type=float, default=2e-3, help="for AdamW")
options = parser.parse_args()


class Network(nnx.Module):
    """Two convolutions with BatchNorm, and dropout before the output."""

    def __init__(self, rngs):
        self.conv1 = nnx.Conv(1, 16, (3, 3), rngs=rngs)
        self.norm1 = nnx.BatchNorm(16, momentum=0.95, rngs=rngs)
        self.conv2 = nnx.Conv(16, 32, (3, 3), strides=2, rngs=rngs)
        self.norm2 = nnx.BatchNorm(32, momentum=0.95, rngs=rngs)
        self.dropout = nnx.Dropout(0.3, rngs=rngs)
        self.out = nnx.Linear(4 * 4 * 32, 10, rngs=rngs)

    def __call__(self, x):
        """Maps images ``[B, 8, 8, 1]`` to logits ``[B, 10]``."""
        x = nnx.relu(self.norm1(self.conv1(x)))
        x = nnx.relu(self.norm2(self.conv2(x)))
        return self.out(self.dropout(x.reshape(len(x), -1)))


def loss_fn(model, x, y):
    return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()


@nnx.jit(donate_argnums=(0, 1))
def train_step(model, optimizer, x, y):
    value_and_grad = oaf.value_and_grad(
        loss_fn, batch_argnums=(1, 2), microbatch_size=min(options.size, len(x))
    )
    loss, grads = value_and_grad(model, x, y)
    optimizer.update(model, grads)
    return loss


@nnx.jit
def accuracy(model, x, y):
    model = nnx.view(model, use_running_average=True, deterministic=True)
    return jnp.mean(model(x).argmax(-1) == y)


images, labels = load_digits(return_X_y=True)
images = images.reshape(-1, 8, 8, 1).astype(np.float32) / 16
train_x, test_x, train_y, test_y = train_test_split(images, labels, random_state=0)
model = Network(nnx.Rngs(0))
optimizer = nnx.Optimizer(model, optax.adamw(options.learning_rate), wrt=nnx.Param)

for epoch in track(range(1, options.epochs + 1), "Training"):
    order = np.random.default_rng(epoch).permutation(len(train_x))
    for start in range(0, len(order), options.batch_size):
        batch = order[start : start + options.batch_size]
        loss = train_step(model, optimizer, train_x[batch], train_y[batch])
    test_accuracy = accuracy(model, test_x, test_y)
    print(f"epoch {epoch}: loss {loss:.3f}, test accuracy {test_accuracy:.1%}")
