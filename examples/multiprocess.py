r"""Train in several processes that have different amounts of data.

This command starts two processes on this computer, with two simulated devices each:

    python examples/multiprocess.py

On two hosts, start one process on each:

    python examples/multiprocess.py --coordinator HOST0:1234 --processes 2 --process 0
    python examples/multiprocess.py --coordinator HOST0:1234 --processes 2 --process 1

SLURM, Open MPI and Cloud TPU pass these settings to JAX. Under SLURM, start one process
for each GPU. On Cloud TPU, start one on each host:

    srun --nodes=2 --gres=gpu:8 --ntasks-per-node=8 \
        python examples/multiprocess.py --cluster
    gcloud compute tpus tpu-vm ssh NAME --zone=ZONE --worker=all \
        --command="python examples/multiprocess.py --cluster"

Every process reads its own images, one micro-batch per step. The processes exchange
gradients once per update, so all must make the same number of steps. A process without
more images continues with padding, which has weight 0. docs/checkpoints.md shows how to
save and restore, and how to continue with a different number of processes.
"""

import argparse
import functools
import os
import socket
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import optax_accum as oa


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawTextHelpFormatter):
    """Shows the text above as it stands, and defaults."""


parser = argparse.ArgumentParser(description=__doc__, formatter_class=Help)
parser.add_argument(
    "--cluster", action="store_true", help="let JAX find the other processes"
)
parser.add_argument(
    "--coordinator", help="HOST:PORT, with a free port of the first host"
)
parser.add_argument("--processes", type=int, default=2, help="number of processes")
parser.add_argument("--process", type=int, help="number of this process, from 0")
parser.add_argument("--epochs", type=int, default=20, help="passes over the data")
parser.add_argument("--size", type=int, default=32, help="images per micro-batch")
parser.add_argument("--every-k", type=int, default=4, help="micro-batches per update")
options = parser.parse_args()


def start_here():
    """Starts all processes on this computer, and prints what they print."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        coordinator = f"localhost:{s.getsockname()[1]}"
    command = [sys.executable, *sys.argv, "--coordinator", coordinator, "--process"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    children = [
        subprocess.Popen([*command, str(i)], env=environment, **pipes)
        for i in range(options.processes)
    ]
    for child in children:
        lines = child.communicate()[0].splitlines(keepends=True)
        # Gloo reports every connection on stdout, and no setting turns that off.
        print("".join(line for line in lines if not line.startswith("[Gloo]")), end="")
    sys.exit(any(child.returncode for child in children))


def predict(params, x):
    return x @ params["w"] + params["b"]


def loss_fn(params, batch):
    x, y, valid = batch
    losses = optax.softmax_cross_entropy_with_integer_labels(predict(params, x), y)
    return jnp.sum(losses * valid) / jnp.maximum(valid.sum(), 1)


def count(_, batch):
    return batch[2].sum()


def micro_batches(x, y, steps, epoch):
    """This process's micro-batches, filled up with padding."""
    order = np.random.default_rng(epoch).permutation(len(x))
    for part in np.split(order, options.size * np.arange(1, steps)):
        pad = (0, options.size - len(part))
        valid = np.arange(options.size) < len(part)
        yield np.pad(x[part], [pad, (0, 0)]), np.pad(y[part], [pad]), valid


if options.cluster:
    jax.distributed.initialize()
elif options.process is None:
    start_here()
else:
    jax.distributed.initialize(options.coordinator, options.processes, options.process)
process, processes = jax.process_index(), jax.process_count()

images, labels = load_digits(return_X_y=True)
images = images.astype(np.float32) / 16
train_x, test_x, train_y, test_y = train_test_split(images, labels, random_state=0)
# Real hosts read their own files. Here the last process has twice as many images.
cuts = np.arange(1, processes) * (len(train_x) // (processes + 1))
own_x, own_y = (np.split(a, cuts)[process] for a in (train_x, train_y))
steps = -(-multihost_utils.process_allgather(len(own_x)).max() // options.size)

mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
replicated, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))
# Each device has its own gradients, and its own open window.
gradient = oa.value_and_grad(
    loss_fn,
    num_microbatches=1,
    weight=count,
    mesh=mesh,
    axis_name="data",
    local=True,
    return_info=True,
)
tx = oa.accumulate(optax.adamw(1e-2), options.every_k, mesh=mesh, axis_name="data")


@functools.partial(jax.jit, donate_argnums=(0, 1))
def train_step(params, state, batch):
    (loss, grads), info = gradient(params, batch)
    return tx.update_params(grads, state, params, weight=info.weight, value=loss)


# The same in all processes.
params = {"w": np.zeros((64, 10), np.float32), "b": np.zeros(10, np.float32)}
params = jax.device_put(params, replicated)
state = tx.init(params)

devices = f"{jax.local_device_count()} of {jax.device_count()} devices"
print(f"Process {process} has {len(own_x)} images and {devices}")
for epoch in range(options.epochs):
    for own in micro_batches(own_x, own_y, steps, epoch):
        batch = tuple(jax.make_array_from_process_local_data(split, x) for x in own)
        params, state = train_step(params, state, batch)
        # Simulated devices share a few threads: queued steps can deadlock.
        jax.block_until_ready(params)
    # All processes must compute it, even if one prints it.
    loss = float(state.window.loss.sum() / state.window.weight.sum())
    if process == 0 and epoch % 5 == 4:
        print(f"epoch {epoch + 1}: loss {loss:.3f}, the mean of the last window")
correct = predict(jax.device_get(params), test_x).argmax(-1) == test_y
print(f"Process {process}: test accuracy {correct.mean():.1%}")
