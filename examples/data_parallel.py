"""Train on several devices, with one all-reduce of gradients per update.

    python examples/data_parallel.py

The parameters are on every device, and the batch is split over the devices. On each
device, `oa.value_and_grad` runs its part in micro-batches and adds up their gradients.
Only the sums are exchanged. A computer without accelerators simulates eight devices.
"""

import argparse
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.progress import track
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import optax_accum as oa

parser = argparse.ArgumentParser(
    description="Train on several devices, with one all-reduce per update.",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
)
parser.add_argument("--epochs", type=int, default=20, help="passes over the data")
parser.add_argument("--batch-size", type=int, default=256, help="images per update")
parser.add_argument("--every-k", type=int, default=4, help="micro-batches per update")
parser.add_argument("--learning-rate", type=float, default=3e-3, help="for AdamW")
parser.add_argument("--cpu-devices", type=int, default=8, help="simulated on a CPU")
options = parser.parse_args()

jax.config.update("jax_num_cpu_devices", options.cpu_devices)
D = jax.device_count()
mesh = jax.make_mesh((D,), ("data",), axis_types=(AxisType.Auto,))
replicated, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))


class Network(nn.Module):
    """A convolution and two dense layers."""

    @nn.compact
    def __call__(self, x):
        """Maps images ``[B, 8, 8, 1]`` to logits ``[B, 10]``."""
        x = nn.relu(nn.Conv(16, (3, 3), strides=2)(x))
        x = nn.relu(nn.Dense(64)(x.reshape(len(x), -1)))
        return nn.Dense(10)(x)


network = Network()
tx = optax.adamw(options.learning_rate)


def predict(params, x):
    return network.apply(params, x)


def loss_fn(params, batch):
    """The mean over the images that are not padding, on one device."""
    logits = predict(params, batch["image"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return jnp.sum(losses * batch["valid"]) / jnp.maximum(num_valid(params, batch), 1)


def num_valid(params, batch):
    del params
    return batch["valid"].sum()


value_and_grad = oa.value_and_grad(
    loss_fn,
    num_microbatches=options.every_k,
    weight=num_valid,
    mesh=mesh,
    axis_name="data",
)


@partial(jax.jit, donate_argnums=(0, 1))
def train_step(params, state, batch):
    loss, grads = value_and_grad(params, batch)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss


@jax.jit
def accuracy(params, x, y):
    return jnp.mean(predict(params, x).argmax(-1) == y)


def batches(x, y, epoch):
    """An epoch's batches, over the devices; the last one is padded."""
    order = np.random.default_rng(epoch).permutation(len(x))
    for start in range(0, len(x), options.batch_size):
        part = order[start : start + options.batch_size]
        missing = options.batch_size - len(part)
        batch = {
            "image": np.pad(x[part], [(0, missing), (0, 0), (0, 0), (0, 0)]),
            "label": np.pad(y[part], [(0, missing)]),
            "valid": np.arange(options.batch_size) < len(part),
        }
        yield jax.device_put(batch, split)


images, labels = load_digits(return_X_y=True)
images = images.reshape(-1, 8, 8, 1).astype(np.float32) / 16
train_x, test_x, train_y, test_y = train_test_split(images, labels, random_state=0)
params = jax.device_put(network.init(jax.random.key(0), test_x[:1]), replicated)
state = jax.device_put(tx.init(params), replicated)

print(f"{D} devices, each with {options.every_k} micro-batches per update")
for epoch in track(range(1, options.epochs + 1), "Training"):
    for batch in batches(train_x, train_y, epoch):
        params, state, loss = train_step(params, state, batch)
        # Simulated devices share a few threads: queued steps can deadlock.
        jax.block_until_ready(loss)
    if epoch % 2 == 0:
        test_accuracy = accuracy(params, test_x, test_y)
        print(f"epoch {epoch}: loss {loss:.3f}, test accuracy {test_accuracy:.1%}")
