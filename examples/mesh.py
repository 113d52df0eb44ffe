"""Train with data parallelism, HSDP and FSDP, under plain `jax.jit`.

    python examples/mesh.py

Every call of the training step gets one micro-batch, split over all devices.
`oa.value_and_grad(..., local=True)` leaves the gradients on their devices.
`oa.accumulate(mesh=...)` adds them up there, and exchanges the sums once per update.

The three ways differ in the mesh and in how parameters and moments are sharded (see
`WAYS`). Each also runs by hand, without the library: then JAX exchanges gradients in
every call. The table at the end shows what the compiled programs exchange:

* `data`: every device has all parameters. Gradients are summed over devices once per
  update instead of once per micro-batch;
* `hsdp`: the devices of one replica exchange in every micro-batch, over a fast network.
  Replicas exchange once per update, and each device sends only its part;
* `fsdp`: parameters are gathered in every micro-batch. Gradients are scattered once per
  update, but take more memory: the sum on each device is as large as all parameters. By
  hand, a device keeps only its part of the sum. (On a CPU, XLA then uses an all-reduce
  instead of a reduce-scatter.)

A computer without accelerators simulates eight devices.
"""

import argparse
import math
import re
from collections import Counter
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import optax_accum as oa

parser = argparse.ArgumentParser(
    description="Train with data parallelism, HSDP and FSDP, and compare traffic.",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
)
parser.add_argument(
    "--way",
    choices=["data", "hsdp", "fsdp", "all"],
    default="all",
    help="what to shard: only the data (data), or also parameters (hsdp, fsdp)",
)
parser.add_argument("--epochs", type=int, default=10, help="passes over the data")
parser.add_argument("--size", type=int, default=64, help="images per micro-batch")
parser.add_argument("--every-k", type=int, default=4, help="micro-batches per update")
parser.add_argument("--learning-rate", type=float, default=3e-3, help="for AdamW")
parser.add_argument("--cpu-devices", type=int, default=8, help="simulated on a CPU")
options = parser.parse_args()

jax.config.update("jax_num_cpu_devices", options.cpu_devices)
D = jax.device_count()
if D % 2:
    parser.error(f"an even number of devices is needed, and there are {D}")


class Way(NamedTuple):
    """What differs between the ways."""

    mesh: dict[str, int]  # its axes; the batch is split over all of them
    axis_name: str  # the axis over which gradients are summed once per update
    cut_over: str | None = None  # the axis over which parameters are sharded
    scatter: bool = False  # whether each device gets only its part of that sum


WAYS = {
    "data": Way({"data": D}, axis_name="data"),
    "hsdp": Way({"replica": 2, "fsdp": D // 2}, axis_name="replica", cut_over="fsdp"),
    "fsdp": Way({"fsdp": D}, axis_name="fsdp", cut_over="fsdp", scatter=True),
}


# --- The training ---


def initial_params():
    key1, key2 = jax.random.split(jax.random.key(0))
    return {
        "w1": jax.random.normal(key1, (64, 256)) / 8,
        "b1": jnp.zeros(256),
        "w2": jax.random.normal(key2, (256, 10)) / 16,
    }


def predict(params, x):
    return jax.nn.gelu(x @ params["w1"] + params["b1"]) @ params["w2"]


def loss_fn(params, batch):
    """The mean over the images that are not padding."""
    # Gathers the shards. Otherwise JAX may shard activations, and exchange those.
    params = jax.lax.with_sharding_constraint(params, P())
    logits = predict(params, batch["image"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return jnp.sum(losses * batch["valid"]) / jnp.maximum(num_valid(params, batch), 1)


def num_valid(params, batch):
    del params
    return batch["valid"].sum()


adamw = optax.adamw(options.learning_rate)


def accumulated(mesh, way):
    """The optimizer's `init` and the training step, with one exchange per update."""
    value_and_grad = oa.value_and_grad(
        loss_fn,
        num_microbatches=1,
        weight=num_valid,
        mesh=mesh,
        axis_name=way.axis_name,
        local=True,
        return_info=True,
    )
    tx = oa.accumulate(adamw, mesh=mesh, axis_name=way.axis_name, scatter=way.scatter)

    def train_step(params, state, batch, boundary):
        # Rows, one for each device (`hsdp`: each replica); the numbers of images too.
        (_, grads), info = value_and_grad(params, batch)
        return tx.update_params(
            grads, state, params, weight=info.weight, boundary=boundary
        )

    return tx.init, train_step


def by_hand(mesh, way):
    """The same without the library: JAX exchanges the gradients in every call."""
    del mesh, way

    def init(params):
        return adamw.init(params), jax.tree.map(jnp.zeros_like, params), jnp.zeros([])

    def train_step(params, state, batch, boundary):
        moments, total, count = state
        grads, weight = jax.grad(loss_fn)(params, batch), num_valid(params, batch)
        total = jax.tree.map(lambda s, g: s + weight * g, total, grads)
        count += weight
        if boundary:
            mean = jax.tree.map(lambda s: s / count, total)
            updates, moments = adamw.update(mean, moments, params)
            params = optax.apply_updates(params, updates)
            total, count = jax.tree.map(jnp.zeros_like, (total, count))
        return params, (moments, total, count)

    return init, train_step


def micro_batches():
    """Each with whether it ends a window. An epoch's last one is padded."""
    for epoch in range(options.epochs):
        order = np.random.default_rng(epoch).permutation(len(train_x))
        parts = np.split(order, range(options.size, len(order), options.size))
        for part, boundary in oa.with_boundaries(parts, options.every_k):
            missing = options.size - len(part)
            batch = {
                "image": np.pad(train_x[part], [(0, missing), (0, 0)]),
                "label": np.pad(train_y[part], [(0, missing)]),
                "valid": np.arange(options.size) < len(part),
            }
            yield batch, boundary


def train(name, make):
    """Returns parameters, state, and the step's two programs, by their `boundary`."""
    way, params, batches = WAYS[name], initial_params(), list(micro_batches())
    sizes, axes = tuple(way.mesh.values()), tuple(way.mesh)
    mesh = jax.make_mesh(sizes, axes, axis_types=(AxisType.Auto,) * len(axes))
    split, parts = NamedSharding(mesh, P(axes)), P()
    if way.cut_over:
        parts = oa.sharding.scatter_specs(params, mesh, way.cut_over)
    params = jax.device_put(params, jax.tree.map(partial(NamedSharding, mesh), parts))
    init, train_step = make(mesh, way)
    with jax.set_mesh(mesh):
        state = init(params)  # the moments are sharded as the parameters are
        step = jax.jit(
            train_step,
            donate_argnums=(0, 1),
            static_argnames="boundary",
            # As before the step. By hand, JAX would replicate the sums.
            out_shardings=jax.tree.map(lambda x: x.sharding, (params, state)),
        )
        args = params, state, jax.device_put(batches[0][0], split)
        programs = {b: step.lower(*args, b).compile() for b in (False, True)}
        shown = f"{name}, {make.__name__.replace('_', ' ')}"
        for batch, boundary in track(batches, shown):
            args = params, state, jax.device_put(batch, split)
            params, state = programs[boundary](*args)
            # Simulated devices share a few threads: queued steps can deadlock.
            jax.block_until_ready(params)
    return params, state, programs


# --- What the compiled programs exchange ---

COLLECTIVE = re.compile(
    r" = (.*?) (all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute)"
    r"(-start)?\(.*?replica_groups=(.*)"
)
ARRAY = re.compile(r"[a-z]+(\d*)\w*\[([\d,]*)\]")  # bits (none: bool) and dimensions


def num_meeting(groups):
    """How many devices meet, in each of the three forms in which XLA writes groups."""
    if match := re.match(r"\{\{([\d,]+)", groups):  # {{0,1,2,3},{4,5,6,7}}
        return len(match[1].split(","))
    if match := re.match(r"\[\d+,(\d+)\]", groups):  # [2,4]<=[8]
        return int(match[1])
    # mesh['replica'=2,'fsdp'=4] {'fsdp'}
    [(axes, names)] = re.findall(r"mesh\[(.*?)\].*?\{(.*?)\}", groups)[:1]
    sizes = dict(axis.split("=") for axis in axes.split(","))
    return math.prod(int(sizes[name]) for name in names.split(","))


def exchanged(programs):
    """Bytes per update, by the kind of collective and how many devices meet."""
    found: Counter[tuple[str, int]] = Counter()
    for boundary, calls in (False, options.every_k - 1), (True, 1):
        for collective in COLLECTIVE.findall(programs[boundary].as_text()):
            result, kind, start, groups = collective
            arrays, devices = ARRAY.findall(result), num_meeting(groups)
            if kind == "all-gather" and start:
                arrays = arrays[len(arrays) // 2 :]  # the others are what goes in
            # A reduce-scatter returns one part: count all of them.
            factor = calls * devices if kind == "reduce-scatter" else calls
            for bits, sizes in arrays:
                size = math.prod(map(int, re.findall(r"\d+", sizes)))
                found[kind, devices] += factor * size * int(bits or 8) // 8
    return found


images, labels = load_digits(return_X_y=True)
images = images.astype(np.float32) / 16
train_x, test_x, train_y, test_y = train_test_split(images, labels, random_state=0)

names = WAYS if options.way == "all" else [options.way]
makers = {"by hand": by_hand, "oa.accumulate": accumulated}
results = {(n, label): train(n, makers[label]) for n in names for label in makers}
found = {key: exchanged(programs) for key, (*_, programs) in results.items()}
kinds = sorted({kind for collectives in found.values() for kind, _ in collectives})

table = Table("way", "gradients", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
for column in ("test\naccuracy", "held", "among", *kinds):
    table.add_column(column.replace("-", "-\n"), justify="right", vertical="bottom")
unit = sum(x.nbytes for x in jax.tree.leaves(initial_params()))
for key, (params, state, _) in results.items():
    correct = predict(jax.device_get(params), test_x).argmax(-1) == test_y
    own = [x.addressable_shards[0].data for x in jax.tree.leaves((params, state))]
    held = sum(x.nbytes for x in own) / unit
    cells = [*key, f"{correct.mean():.1%}", f"{held:.2f}"]
    for devices in sorted({devices for _, devices in found[key]}, reverse=True):
        sizes = [found[key].get((kind, devices)) for kind in kinds]
        shown = ["" if size is None else f"{size / unit:.2f}" for size in sizes]
        table.add_row(*cells, str(devices), *shown)
        cells = [""] * len(cells)

print(f"""
All sizes are in multiples of the parameters' size.

held: what each device stores between calls (parameters, moments, sums of gradients)
among: how many of the {D} devices exchange with each other
last columns: what they exchange in {options.every_k} micro-batches (0.00: scalars only)
""")
Console().print(table)


def largest_difference(a, b):
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: np.abs(x - y).max(), a, b)))


first, *others = (jax.device_get(params) for params, *_ in results.values())
away = max(largest_difference(first, params) for params in others)
print(f"\nThe final parameters of all rows agree to within {away:.0e}.")
