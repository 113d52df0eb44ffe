"""Train in several processes that have different amounts of data.

    python examples/multiprocess.py

starts two processes on this computer, with two simulated devices each. On real hosts,
start one on each, with its number:

    python examples/multiprocess.py --coordinator HOST0:1234 --processes 2 --process 0

Every process reads its own images, one micro-batch per step. They exchange gradients
once per update, so all must make the same number of steps: a process that has run out
of images continues with padding, which has no weight.
"""

import argparse
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

parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
parser.add_argument("--coordinator", help="HOST:PORT, a free port of the first host")
parser.add_argument("--processes", type=int, default=2, help="how many there are")
parser.add_argument("--process", type=int, help="the number of this one, from 0")
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
    processes = [
        subprocess.Popen([*command, str(i)], env=environment, **pipes)
        for i in range(options.processes)
    ]
    for process in processes:
        lines = process.communicate()[0].splitlines(keepends=True)
        # Gloo reports every connection on stdout, and has no setting against it.
        print("".join(line for line in lines if not line.startswith("[Gloo]")), end="")
    sys.exit(any(process.returncode for process in processes))


def predict(params, x):
    return x @ params["w"] + params["b"]


def loss_fn(params, x, y, valid):
    losses = optax.softmax_cross_entropy_with_integer_labels(predict(params, x), y)
    return jnp.sum(losses * valid) / jnp.maximum(valid.sum(), 1)


tx = oa.accumulate(optax.adamw(1e-2), options.every_k, axis_name="data")


def train_step(params, state, batch):
    """On each device: its own gradient goes into its own window."""
    local = jax.lax.pcast(params, "data", to="varying")
    grads = jax.grad(loss_fn)(local, *batch)
    return tx.update_params(grads, state, params, weight=batch[2].sum())


def start():
    params = {"w": jnp.zeros((64, 10)), "b": jnp.zeros(10)}
    return params, oa.sharding.stack_windows(tx.init(params), jax.device_count())


def micro_batches(x, y, steps, epoch):
    """This process's micro-batches, filled up with padding."""
    order = np.random.default_rng(epoch).permutation(len(x))
    for part in np.split(order, options.size * np.arange(1, steps)):
        pad = (0, options.size - len(part))
        valid = np.arange(options.size) < len(part)
        yield np.pad(x[part], [pad, (0, 0)]), np.pad(y[part], [pad]), valid


if options.process is None:
    start_here()
jax.distributed.initialize(options.coordinator, options.processes, options.process)

images, labels = load_digits(return_X_y=True)
images = images.astype(np.float32) / 16
train_x, test_x, train_y, test_y = train_test_split(images, labels, random_state=0)
# Real hosts read their own files. Here the last one has twice as much as the others.
cuts = np.arange(1, options.processes) * (len(train_x) // (options.processes + 1))
own_x, own_y = (np.split(a, cuts)[options.process] for a in (train_x, train_y))
steps = -(-multihost_utils.process_allgather(len(own_x)).max() // options.size)

mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
split = NamedSharding(mesh, P("data"))
# Parameters are the same on all devices, an open window is each device's own.
specs = P(), oa.sharding.window_specs(jax.eval_shape(start)[1], "data")
shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
params, state = jax.jit(start, out_shardings=shardings)()
step = jax.shard_map(
    train_step, mesh=mesh, in_specs=(*specs, P("data")), out_specs=specs
)
step = jax.jit(step, donate_argnums=(0, 1))

devices = f"{jax.local_device_count()} of {jax.device_count()} devices"
print(f"Process {options.process} has {len(own_x)} images and {devices}")
for epoch in range(options.epochs):
    for own in micro_batches(own_x, own_y, steps, epoch):
        batch = tuple(jax.make_array_from_process_local_data(split, x) for x in own)
        params, state = step(params, state, batch)
        # Simulated devices share a few threads: queued steps can deadlock.
        jax.block_until_ready(params)
correct = predict(jax.device_get(params), test_x).argmax(-1) == test_y
print(f"Process {options.process} ends with a test accuracy of {correct.mean():.1%}")
