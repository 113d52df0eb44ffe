"""Data-parallel training that exchanges gradients once per update.

    python examples/data_parallel.py

The same network, data order, optimizer and number of updates, on eight devices (made up
where there are none), every global batch in `--micro-batches` parts:

* pmap: `oa.accumulate` with `axis_name`, one micro-batch per step, against
  `optax.MultiSteps` after a pmean;
* mesh: `oa.value_and_grad` with `mesh`, all micro-batches in one step, against a
  `lax.scan` as one would write it.

What is printed: how many all-reduces one update takes, read from the compiled programs,
and how far the parameters end from those of plain Optax on one device. An epoch's last
batch is filled up with padding, which `weight` leaves out of every mean. The example
fails if ours moves a parameter by more than three times what float32 itself does.
"""

import argparse
import dataclasses
import functools
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.jax_utils
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from rich import box
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

import optax_accum as oa

TRAINING_EXAMPLES = 1480  # of 1797; the rest is for testing
FLOAT32_MARGIN = 3  # times the distance between the float32 and the float64 run


class Batch(NamedTuple):
    """Examples, and which of them count.

    Attributes:
      images: ``f32[B, 8, 8, 1]``.
      labels: ``i32[B]``.
      counts: ``f32[B]``, 0 for padding.
    """

    images: Any
    labels: Any
    counts: Any


class Network(nn.Module):
    """A convolution and two dense layers."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images to logits ``f32[B, 10]``."""
        x = nn.gelu(nn.Conv(16, (3, 3), strides=2)(images))
        x = nn.gelu(nn.Dense(64)(x.reshape(len(x), -1)))
        return nn.Dense(10)(x)


def mean_loss(params: Any, batch: Batch) -> jax.Array:
    """The mean cross-entropy over the examples that count: a plain local loss."""
    logits = jnp.asarray(Network().apply({"params": params}, batch.images))
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    return jnp.sum(losses * batch.counts) / jnp.maximum(batch.counts.sum(), 1)


def count(params: Any, batch: Batch) -> jax.Array:
    """How many examples `mean_loss` is a mean over."""
    del params
    return batch.counts.sum()


def load_data() -> tuple[Batch, Batch]:
    """Training and test set, shuffled once and for all."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = (digits.images[order, ..., None] / 16).astype(np.float32)
    labels = digits.target[order].astype(np.int32)
    data = Batch(images, labels, np.ones(len(labels), np.float32))
    n = TRAINING_EXAMPLES
    return Batch(*(x[:n] for x in data)), Batch(*(x[n:] for x in data))


def global_batches(data: Batch, options: argparse.Namespace) -> Iterator[Batch]:
    """All batches of all epochs; the last of an epoch is filled up with padding."""
    random = np.random.default_rng(options.seed)
    for _ in range(options.epochs):
        order = random.permutation(len(data.labels))
        for start in range(0, len(order), options.batch_size):
            part = Batch(*(x[order[start : start + options.batch_size]] for x in data))
            missing = options.batch_size - len(part.labels)
            yield Batch(
                *(np.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)) for x in part)
            )


# --- One step in each way ---


def plain(tx, options):
    """Plain Optax on one device, a whole batch at once."""
    del options

    @jax.jit
    def step(params, state, batch):
        grads = jax.grad(mean_loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return Way(step, tx.init)


def pmap_accumulate(tx, options):
    """Gradients stay on their devices until the window closes."""
    tx = oa.accumulate(tx, options.micro_batches, axis_name="data")

    @functools.partial(jax.pmap, axis_name="data", donate_argnums=(0, 1))
    def step(params, state, batch):
        grads = jax.grad(mean_loss)(params, batch)
        return tx.update_params(grads, state, params, weight=batch.counts.sum())

    return Way(step, tx.init, stacked=True, streams=True)


def pmap_multi_steps(tx, options):
    """A pmean, and then Optax's own accumulation."""
    tx = optax.MultiSteps(tx, options.micro_batches)

    @functools.partial(jax.pmap, axis_name="data", donate_argnums=(0, 1))
    def step(params, state, batch):
        grads = jax.lax.pmean(jax.grad(mean_loss)(params, batch), "data")
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return Way(step, tx.init, stacked=True, streams=True)


def mesh_value_and_grad(tx, options):
    """The loop runs on every device by itself, and what it sums is exchanged once."""
    mesh = jax.make_mesh((options.devices,), ("data",), axis_types=(AxisType.Auto,))
    gradient = oa.grad(
        mean_loss,
        num_microbatches=options.micro_batches,
        weight=count,
        mesh=mesh,
        axis_name="data",
    )

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, batch):
        updates, state = tx.update(gradient(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    return Way(step, tx.init, mesh=mesh)


def mesh_scan(tx, options):
    """The compiler sees to the devices: in every turn of the loop."""
    k = options.micro_batches
    mesh = jax.make_mesh((options.devices,), ("data",), axis_types=(AxisType.Auto,))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, batch):
        def add(sums, i):
            # Every k-th example, so that the split itself exchanges nothing.
            part = Batch(*(x.reshape(-1, k, *x.shape[1:])[:, i] for x in batch))
            grads = jax.grad(lambda p: mean_loss(p, part) * part.counts.sum())(params)
            return jax.tree.map(jnp.add, sums, grads), None

        zeros = jax.tree.map(jnp.zeros_like, params)
        sums, _ = jax.lax.scan(add, zeros, jnp.arange(k))
        grads = jax.tree.map(lambda s: s / batch.counts.sum(), sums)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return Way(step, tx.init, mesh=mesh)


@dataclasses.dataclass
class Way:
    """A step, and what its arguments look like."""

    step: Any  # jitted: (params, state, batch) -> (params, state)
    init: Callable[[Any], Any]
    mesh: Any = None
    stacked: bool = False  # a leading axis of devices, for pmap
    streams: bool = False  # one micro-batch per call

    def start(self, params: Any) -> tuple[Any, Any]:
        """Parameters and optimizer state."""
        start = jax.tree.map(jnp.array, (params, self.init(params)))
        if self.stacked:
            return flax.jax_utils.replicate(start)
        if self.mesh is None:
            return start
        return jax.device_put(start, NamedSharding(self.mesh, P()))

    def calls(self, batch: Batch, options: argparse.Namespace) -> list[Batch]:
        """What the step is called with, for one global batch."""
        if self.streams:
            shape = options.micro_batches, options.devices, -1
            parts = Batch(*(x.reshape(*shape, *x.shape[1:]) for x in batch))
            return [Batch(*(x[i] for x in parts)) for i in range(options.micro_batches)]
        if self.mesh is None:
            return [batch]
        return [jax.device_put(batch, NamedSharding(self.mesh, P("data")))]


# --- What the compiled program exchanges ---


def all_reduces_per_update(program: Any, way: Way, micro_batches: int) -> int:
    """Counts them where they are: in a loop they run once per micro-batch.

    A micro-step's program runs once per micro-batch, but what is in a branch there only
    at the boundary.
    """
    computations = {}
    for m in re.finditer(
        r"^(ENTRY )?%?([\w.-]+) [^\n]*\{$(.*?)^\}", program.as_text(), re.M | re.S
    ):
        computations["entry" if m[1] else m[2]] = m[3]

    def visit(name: str, times: int) -> int:
        text, total = computations[name], 0
        total += times * len(re.findall(r" all-reduce(?:-start)?\(", text))
        for body in re.findall(r"body=%?([\w.-]+)", text):
            total += visit(body, times * micro_batches)
        for called in re.findall(r" (?:call|async)\(.*?to_apply=%?([\w.-]+)", text):
            total += visit(called, times)
        for branches in re.findall(r"branch_computations=\{(.*?)\}", text):
            for branch in re.findall(r"[\w.-]+", branches):
                total += visit(branch, 1)
        return total

    return visit("entry", micro_batches if way.streams else 1)


def train(
    way: Way, params: Any, data: Batch, options: argparse.Namespace
) -> tuple[Any, int]:
    """The parameters in the end, and the all-reduces of one update."""
    params, state = way.start(params)
    program = None
    for batch in global_batches(data, options):
        for call in way.calls(batch, options):
            if program is None:
                program = way.step.lower(params, state, call).compile()
            params, state = way.step(params, state, call)
            # Devices that are made up share a few threads: one program at a time, or
            # those that wait for each other can leave none for who they wait for.
            jax.block_until_ready(params)
    if way.stacked:
        params = flax.jax_utils.unreplicate(params)
    exchanges = all_reduces_per_update(program, way, options.micro_batches)
    return jax.device_get(params), exchanges


def make_optimizer(options: argparse.Namespace) -> optax.GradientTransformation:
    batches = options.epochs * -(-TRAINING_EXAMPLES // options.batch_size)
    schedule = optax.cosine_decay_schedule(options.learning_rate, batches)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))


def largest_difference(a: Any, b: Any) -> float:
    """The largest absolute difference between two trees."""
    differences = jax.tree.map(lambda x, y: np.abs(np.asarray(x) - y).max(), a, b)
    return float(max(jax.tree.leaves(differences)))


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--devices", type=int, default=8, help="made up on a CPU (default: 8)")
    add("--epochs", type=int, default=10)
    add("--batch-size", type=int, default=256, help="the global batch (default: 256)")
    add("--micro-batches", type=int, default=4, help="to an update (default: 4)")
    add("--learning-rate", type=float, default=3e-3)
    add("--seed", type=int, default=0)
    add("--quick", action="store_true", help="two epochs")
    options = parser.parse_args(arguments)
    if options.quick:
        options.epochs = 2
    if options.batch_size % (options.devices * options.micro_batches):
        parser.error("--batch-size must be a multiple of --devices x --micro-batches")
    return options


def main(arguments: list[str]) -> int:
    options = parse_arguments(arguments)
    jax.config.update("jax_num_cpu_devices", options.devices)
    if jax.device_count() < options.devices:
        sys.exit(f"there are {jax.device_count()} devices; see --devices")
    data, test_data = load_data()
    params = Network().init(jax.random.key(options.seed), data.images[:1])["params"]

    @jax.jit
    def accuracy(params):
        logits = jnp.asarray(Network().apply({"params": params}, test_data.images))
        return (logits.argmax(-1) == test_data.labels).mean()

    tx = make_optimizer(options)
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    table.add_column("")
    for heading in (
        "all-reduces\nper update",
        "parameters'\ndifference",
        "test\naccuracy",
    ):
        table.add_column(heading, justify="right")
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), (params, data))
        wide_data = wide[1]._replace(labels=data.labels)
        exact, _ = train(plain(tx, options), wide[0], wide_data, options)
    reference, _ = train(plain(tx, options), params, data, options)
    tolerance = FLOAT32_MARGIN * largest_difference(exact, reference)
    ours, failed = ("optax_accum.accumulate", "optax_accum.value_and_grad"), False
    for name, make in {
        "one device, global batch": plain,
        "pmap, optax_accum.accumulate": pmap_accumulate,
        "pmap, optax.MultiSteps": pmap_multi_steps,
        "mesh, optax_accum.value_and_grad": mesh_value_and_grad,
        "mesh, lax.scan by hand": mesh_scan,
    }.items():
        trained, exchanges = train(make(tx, options), params, data, options)
        difference = largest_difference(trained, reference)
        failed |= name.endswith(ours) and not difference <= tolerance
        table.add_row(
            name,
            str(exchanges),
            f"{difference:.1e}",
            f"{100 * float(accuracy(trained)):.1f} %",
        )
    console = Console(highlight=False)
    console.print(
        f"{options.devices} x {jax.devices()[0].device_kind}, {options.micro_batches} "
        f"micro-batches to an update, {options.epochs} epochs"
    )
    console.print(table)
    console.print(f"Float32 itself explains a difference of {tolerance:.1e}.")
    if failed:
        console.print("[red]FAILED: micro-batches moved a parameter by more")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
