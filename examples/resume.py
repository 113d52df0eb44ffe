"""Stop a training run mid-window, and continue it bit for bit.

    python examples/resume.py --stop-after 38
    python examples/resume.py

A window is the micro-batches between two updates, here four. The first command stops
after the second micro-batch of the tenth window, like a crash. The second command
restores the checkpoint of micro-step 35, with three micro-batches in the open window,
and continues.

The number of a checkpoint is the number of micro-batches seen. The order of the data
and the dropout keys follow from this number, so only parameters and state are saved.
"""

import argparse
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from sklearn.datasets import load_digits

import optax_accum as oa

parser = argparse.ArgumentParser(
    description="Stop a training run mid-window, and continue it bit for bit.",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
)
parser.add_argument("--micro-steps", type=int, default=100, help="micro-steps in total")
parser.add_argument("--stop-after", type=int, help="stop after this micro-step")
parser.add_argument(
    "--save-every", type=int, default=5, help="micro-steps between checkpoints"
)
parser.add_argument("--size", type=int, default=32, help="images per micro-batch")
parser.add_argument("--every-k", type=int, default=4, help="micro-batches per update")
parser.add_argument("--folder", type=Path, default="out/resume", help="for checkpoints")
options = parser.parse_args()

tx = oa.accumulate(optax.adamw(3e-3), every_k=options.every_k)
images, labels = load_digits(return_X_y=True)
images = images.astype(np.float32) / 16


def micro_batch(number):
    """The training's micro-batch of this number, in whichever process."""
    epoch, place = divmod(number, len(images) // options.size)
    order = np.random.default_rng(epoch).permutation(len(images))
    part = order[place * options.size : (place + 1) * options.size]
    return images[part], labels[part]


def loss_fn(params, x, y, key):
    hidden = jax.nn.gelu(x @ params["w1"] + params["b1"])
    keep = jax.random.bernoulli(key, 0.8, hidden.shape)
    logits = jnp.where(keep, hidden / 0.8, 0) @ params["w2"] + params["b2"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


@partial(jax.jit, donate_argnums=(0, 1))
def train_step(params, state, x, y, number):
    key = jax.random.fold_in(jax.random.key(0), number)
    loss, grads = jax.value_and_grad(loss_fn)(params, x, y, key)
    params, state = tx.update_params(grads, state, params, weight=len(x), value=loss)
    return params, state, loss


def where(state):
    updates, seen = oa.gradient_step(state), oa.micro_step(state)
    return f"updates: {updates}, micro-batches in the open window: {seen}"


key1, key2 = jax.random.split(jax.random.key(1))
params = {
    "w1": jax.random.normal(key1, (64, 128)) / 8,
    "b1": jnp.zeros(128),
    "w2": jax.random.normal(key2, (128, 10)) / 11,
    "b2": jnp.zeros(10),
}
state = tx.init(params)
folder = options.folder.resolve()  # Orbax takes absolute paths
manager_options = ocp.CheckpointManagerOptions(
    save_interval_steps=options.save_every, max_to_keep=2
)
with ocp.CheckpointManager(folder, options=manager_options) as manager:
    done = manager.latest_step() or 0
    if done:
        like = ocp.args.StandardRestore((params, state))
        params, state = manager.restore(done, args=like)
    print(f"Starting at micro-step {done} ({where(state)})")
    for number in range(done, options.micro_steps):
        params, state, loss = train_step(params, state, *micro_batch(number), number)
        done = number + 1
        manager.save(done, args=ocp.args.StandardSave((params, state)))
        if done == options.stop_after:
            break
print(f"Stopped at micro-step {done} ({where(state)})")
