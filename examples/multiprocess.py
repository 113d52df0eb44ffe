"""Training in several processes, with accumulation, on uneven data.

    python examples/multiprocess.py

starts two processes on this machine, with two devices each, as two hosts would be, and
compares what they learned with plain Optax in one process. On real hosts, start the
same program on each of them, with its number:

    python examples/multiprocess.py --coordinator HOST0:1234 --processes 2 --process 0
    python examples/multiprocess.py --coordinator HOST0:1234 --processes 2 --process 1

(On a TPU pod or under Slurm `jax.distributed.initialize()` finds these by itself.)

Every process reads its own part of the data, and the parts are not of the same size.
All must make the same number of micro-steps, because they meet at the end of every
window; a process that has run out goes on with padding, which has weight 0. Where a
window ends is decided from the number of the micro-step alone, which all count alike.
"""

import argparse
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits

import optax_accum as oa

SHARES = 0.7  # the first process has this much of the data, the rest share what is left
K = 4  # micro-batches to an update
SIZE = 32  # examples of a process in one micro-batch
EPOCHS = 5

Batch = tuple[Any, Any, Any]  # images f32[B, 64], labels i32[B], counts f32[B]


def initial_params() -> Any:
    """A network of two dense layers."""
    random = np.random.default_rng(0)
    return {
        "w1": random.normal(size=(64, 32)).astype(np.float32) / 8,
        "b1": np.zeros(32, np.float32),
        "w2": random.normal(size=(32, 10)).astype(np.float32) / 6,
        "b2": np.zeros(10, np.float32),
    }


def mean_loss(params: Any, batch: Batch) -> jax.Array:
    """The mean cross-entropy over the examples that count."""
    images, labels, counts = batch
    hidden = jax.nn.gelu(images @ params["w1"] + params["b1"])
    logits = hidden @ params["w2"] + params["b2"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.sum(losses * counts) / jnp.maximum(counts.sum(), 1)


def make_optimizer() -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-3))


# --- What a process does ---


def own_examples(process: int, processes: int) -> tuple[np.ndarray, np.ndarray]:
    """This process's part of the digits: as a host would read its own files."""
    digits = load_digits()
    order = np.random.default_rng(1).permutation(len(digits.target))
    first = int(SHARES * len(order))
    rest = np.array_split(order[first:], processes - 1) if processes > 1 else []
    mine = [order[:first], *rest][process]
    return (digits.data[mine] / 16).astype(np.float32), digits.target[mine].astype("i4")


def micro_steps_per_epoch(examples: int) -> int:
    """How many all processes make: as many as the one with the most examples needs."""
    most = int(SHARES * examples)
    return -(-most // SIZE)


def micro_batches(process: int, processes: int) -> Iterator[tuple[Batch, bool]]:
    """This process's micro-batches, and whether each closes a window."""
    images, labels = own_examples(process, processes)
    steps = micro_steps_per_epoch(len(load_digits().target))
    for epoch in range(EPOCHS):
        order = np.random.default_rng(epoch).permutation(len(labels))
        for step in range(steps):
            part = order[step * SIZE : (step + 1) * SIZE]
            missing = SIZE - len(part)
            batch = (
                np.pad(images[part], [(0, missing), (0, 0)]),
                np.pad(labels[part], [(0, missing)]),
                np.pad(np.ones(len(part), np.float32), [(0, missing)]),
            )
            # Every K-th closes a window, and the last one of an epoch.
            yield batch, (step + 1) % K == 0 or step + 1 == steps


def train(process: int, processes: int) -> Any:
    """The parameters that all processes end with."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    tx = oa.accumulate(make_optimizer(), axis_name="data")

    def on_device(params, state, batch, boundary):
        grads = jax.grad(mean_loss)(jax.lax.pcast(params, "data", to="varying"), batch)
        weight = batch[2].sum()
        return tx.update_params(grads, state, params, weight=weight, boundary=boundary)

    # Parameters are the same everywhere, an open window is each device's own.
    params = initial_params()
    shapes = jax.eval_shape(tx.init, params)
    specs = P(), oa.sharding.window_specs(shapes, "data")
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)

    def start(params):
        return params, oa.sharding.stack_windows(tx.init(params), jax.device_count())

    params, state = jax.jit(start, out_shardings=shardings)(params)
    step = jax.jit(
        jax.shard_map(
            on_device,
            mesh=mesh,
            in_specs=(*specs, P("data"), P()),
            out_specs=specs,
        ),
        donate_argnums=(0, 1),
    )
    split = NamedSharding(mesh, P("data"))
    for own, boundary in micro_batches(process, processes):
        batch = tuple(jax.make_array_from_process_local_data(split, x) for x in own)
        params, state = step(params, state, batch, np.bool_(boundary))
        if jax.default_backend() == "cpu":
            # Devices that are made up share a few threads: one program at a time, or
            # those that wait for each other can leave none for who they wait for.
            jax.block_until_ready(params)
    return jax.device_get(params)


# --- And the same in one ---


def train_alone(processes: int) -> Any:
    """Plain Optax on the examples that all processes' windows hold together."""
    tx = make_optimizer()
    params = jax.tree.map(jnp.asarray, initial_params())
    state = tx.init(params)

    @jax.jit
    def step(params, state, batch):
        updates, state = tx.update(jax.grad(mean_loss)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    window: list[Batch] = []
    streams = [micro_batches(process, processes) for process in range(processes)]
    for parts in zip(*streams, strict=True):
        window += [batch for batch, _ in parts]
        if parts[0][1]:
            batch = tuple(map(np.concatenate, zip(*window, strict=True)))
            params, state = step(params, state, batch)
            window = []
    return jax.device_get(params)


def start_here(processes: int) -> int:
    """Starts all processes on this machine and compares the result."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "params.npz"
        command = [sys.executable, __file__, "--coordinator", address]
        command += ["--processes", str(processes), "--save", str(file)]
        started = [
            subprocess.Popen([*command, "--process", str(i)], env=environment)
            for i in range(processes)
        ]
        codes = [process.wait() for process in started]
        if any(codes):
            print(f"FAILED: the processes ended with {codes}")
            return 1
        trained = dict(np.load(file))
    alone = train_alone(processes)
    start = initial_params()
    moved = max(np.abs(alone[name] - start[name]).max() for name in start)
    worst = max(np.abs(alone[name] - trained[name]).max() for name in start)
    print(f"Training moved a parameter by {moved:.2f}; {processes} processes end")
    print(f"within {worst:.1e} of what one ends with.")
    return int(not worst < 1e-4 * moved)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--coordinator", help="the first host and a free port there: HOST:PORT")
    add("--processes", type=int, default=2, help="how many there are (default: 2)")
    add("--process", type=int, help="the number of this one, from 0")
    add("--save", type=Path, help="where process 0 leaves the parameters")
    options = parser.parse_args(arguments)
    if (options.coordinator is None) != (options.process is None):
        parser.error("--coordinator and --process come together, or neither")
    if options.coordinator is None:
        return start_here(options.processes)

    jax.distributed.initialize(options.coordinator, options.processes, options.process)
    images, _ = own_examples(options.process, options.processes)
    print(
        f"process {options.process} of {options.processes}: {len(images)} examples, "
        f"{jax.local_device_count()} of {jax.device_count()} devices",
        flush=True,
    )
    params = train(options.process, options.processes)
    if options.save and options.process == 0:
        np.savez(options.save, **params)
    jax.distributed.shutdown()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
