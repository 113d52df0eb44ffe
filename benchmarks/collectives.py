"""What one update exchanges between devices, read from the compiled programs.

Every way of computing one update in K micro-batches over several devices (made up on a
CPU), ours and the others'. Counted are the collectives of all programs that run for one
update: what is in a loop counts K times, what is in a micro-step K times, what is in
the boundary's branch once. No clock: devices that are made up have no wires.
"""

import argparse
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optax import microbatching

import optax_accum as oa
from benchmarks import shared
from tests.support import hlo

AXIS = "data"


class Setup(NamedTuple):
    """What every way is measured on."""

    params: Any
    batch: jax.Array
    k: int
    devices: int

    def mesh(self, kind: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
        """All devices on one axis."""
        return jax.make_mesh((self.devices,), (AXIS,), axis_types=(kind,))


class Program(NamedTuple):
    """A compiled program, and how often it runs for one update."""

    compiled: Any
    runs: int


class Row(NamedTuple):
    """One way.

    `places` are where the collectives are, `per_update` how many run for one update,
    and `data` is what they exchange, as a multiple of the gradient's bytes.
    """

    devices: int
    k: int
    group: str
    way: str
    places: str
    per_update: int
    data: float


def loss(params: Any, x: jax.Array) -> jax.Array:
    """A network with an embedding's transpose, a norm and biases."""
    h = jnp.tanh(x @ params["in"] + params["bias"])
    h = (h - h.mean(-1, keepdims=True)) * params["scale"]
    return jnp.mean((h @ params["in"].T - x) ** 2)


def make_setup(k: int, devices: int, side: int = 64) -> Setup:
    params = {
        "in": jnp.ones((side, 2 * side)),
        "bias": jnp.zeros(2 * side),
        "scale": jnp.ones(2 * side),
    }
    return Setup(params, jnp.ones((2 * k * devices, side)), k, devices)


# --- Across steps: one micro-batch to a call ---


def optimizer() -> optax.GradientTransformation:
    return optax.adamw(1e-3)


def pmap_windows(setup: Setup) -> list[Program]:
    tx = oa.accumulate(optimizer(), setup.k, axis_name=AXIS)

    def step(params, state, x):
        return tx.update_params(jax.grad(loss)(params, x), state, params)

    return [Program(compile_pmap(step, tx, setup), setup.k)]


def pmap_multi_steps(setup: Setup) -> list[Program]:
    tx = optax.MultiSteps(optimizer(), setup.k)

    def step(params, state, x):
        grads = jax.lax.pmean(jax.grad(loss)(params, x), AXIS)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return [Program(compile_pmap(step, tx, setup), setup.k)]


def compile_pmap(step: Any, tx: Any, setup: Setup) -> Any:
    def stacked(tree):
        return jax.tree.map(lambda x: jnp.stack([x] * setup.devices), tree)

    params, state = stacked((setup.params, tx.init(setup.params)))
    x = micro_batch(setup).reshape(setup.devices, -1, setup.batch.shape[1])
    return jax.pmap(step, AXIS, donate_argnums=(0, 1)).lower(params, state, x).compile()


def micro_batch(setup: Setup) -> jax.Array:
    return setup.batch[: len(setup.batch) // setup.k]


def shard_map_windows(setup: Setup, *, check: bool, static: bool) -> list[Program]:
    tx = oa.accumulate(optimizer(), None if static else setup.k, axis_name=AXIS)
    state = oa.sharding.stack_windows(tx.init(setup.params), setup.devices)
    specs = P(), oa.sharding.window_specs(state, AXIS)

    def step(params, state, x, boundary):
        local = jax.lax.pcast(params, AXIS, to="varying") if check else params
        grads = jax.grad(loss)(local, x)
        return tx.update_params(grads, state, params, boundary=boundary)

    def program(boundary):
        mapped = jax.shard_map(
            functools.partial(step, boundary=boundary),
            mesh=setup.mesh(),
            in_specs=(*specs, P(AXIS)),
            out_specs=specs,
            check_vma=check,
        )
        jitted = jax.jit(mapped, donate_argnums=(0, 1))
        return jitted.lower(setup.params, state, micro_batch(setup)).compile()

    if static:
        return [Program(program(False), setup.k - 1), Program(program(True), 1)]
    return [Program(program(None), setup.k)]


def jit_windows(setup: Setup, tx: Any) -> list[Program]:
    """The compiler's own propagation: nothing is said about devices."""
    mesh = setup.mesh()

    def step(params, state, x):
        updates, state = tx.update(jax.grad(loss)(params, x), state, params)
        return optax.apply_updates(params, updates), state

    start = jax.device_put(
        (setup.params, tx.init(setup.params)), NamedSharding(mesh, P())
    )
    x = jax.device_put(micro_batch(setup), NamedSharding(mesh, P(AXIS)))
    jitted = jax.jit(
        step, donate_argnums=(0, 1), out_shardings=NamedSharding(mesh, P())
    )
    return [Program(jitted.lower(*start, x).compile(), setup.k)]


# --- Inside one step: the gradient of a whole batch ---


def pmap_in_step(setup: Setup) -> list[Program]:
    f = oa.value_and_grad(loss, num_microbatches=setup.k, axis_name=AXIS)
    x = setup.batch.reshape(setup.devices, -1, setup.batch.shape[1])
    mapped = jax.pmap(f, AXIS, in_axes=(None, 0))
    return [Program(mapped.lower(setup.params, x).compile(), 1)]


def shard_map_in_step(setup: Setup, *, check: bool) -> list[Program]:
    f = oa.value_and_grad(loss, num_microbatches=setup.k, axis_name=AXIS)
    return compile_shard_map(f, setup, check=check)


def shard_map_by_hand(setup: Setup) -> list[Program]:
    """As one would write it under `check_vma`: `jax.grad` reduces by itself."""
    return compile_shard_map(by_hand(setup), setup, check=True, values=P(AXIS))


def compile_shard_map(
    f: Any, setup: Setup, *, check: bool, values: Any = None
) -> list[Program]:
    mapped = jax.shard_map(
        f,
        mesh=setup.mesh(),
        in_specs=(P(), P(AXIS)),
        out_specs=(values or P(), P()),
        check_vma=check,
    )
    lowered = jax.jit(mapped).lower(setup.params, setup.batch)
    return [Program(lowered.compile(), 1)]


def by_hand(setup: Setup) -> Callable[[Any, jax.Array], Any]:
    """Strided, so that the split itself exchanges nothing."""

    def f(params, x):
        parts = x.reshape(-1, setup.k, x.shape[1])

        def add(sums, i):
            value, grads = jax.value_and_grad(loss)(params, parts[:, i])
            return jax.tree.map(jnp.add, sums, grads), value

        zeros = jax.tree.map(jnp.zeros_like, params)
        sums, values = jax.lax.scan(add, zeros, jnp.arange(setup.k))
        grads = jax.tree.map(lambda s: s / setup.k, sums)
        return values.mean()[None], grads

    return f


def jit_in_step(setup: Setup, f: Any, kind: AxisType = AxisType.Auto) -> list[Program]:
    mesh = setup.mesh(kind)
    params = jax.device_put(setup.params, NamedSharding(mesh, P()))
    x = jax.device_put(setup.batch, NamedSharding(mesh, P(AXIS)))
    with jax.set_mesh(mesh):
        return [Program(jax.jit(f).lower(params, x).compile(), 1)]


def on_mesh(setup: Setup, kind: AxisType, *, scatter: bool = False) -> list[Program]:
    f = oa.value_and_grad(
        loss,
        num_microbatches=setup.k,
        mesh=setup.mesh(kind),
        axis_name=AXIS,
        scatter=scatter,
    )
    return jit_in_step(setup, f, kind)


def without_mesh(setup: Setup) -> list[Program]:
    return jit_in_step(setup, oa.value_and_grad(loss, num_microbatches=setup.k))


def optax_microbatch(setup: Setup) -> list[Program]:
    f = microbatching.microbatch(
        jax.value_and_grad(loss),
        argnums=1,
        microbatch_size=len(setup.batch) // setup.k,
        accumulator=microbatching.AccumulationType.MEAN,
    )
    return jit_in_step(setup, f)


STREAM, IN_STEP = "one micro-batch per call", "all micro-batches in one call"
WAYS: dict[tuple[str, str], Callable[[Setup], list[Program]]] = {
    (STREAM, "pmap: `accumulate(axis_name=)`"): pmap_windows,
    (STREAM, "shard_map: `accumulate(axis_name=)`"): functools.partial(
        shard_map_windows, check=True, static=False
    ),
    (STREAM, "shard_map, `check_vma=False`: the same"): functools.partial(
        shard_map_windows, check=False, static=False
    ),
    (STREAM, "shard_map, `boundary` a Python bool: the same"): functools.partial(
        shard_map_windows, check=True, static=True
    ),
    (STREAM, "pmap: `optax.MultiSteps` after a pmean"): pmap_multi_steps,
    (STREAM, "jit on a mesh: `accumulate`"): lambda setup: jit_windows(
        setup, oa.accumulate(optimizer(), setup.k)
    ),
    (STREAM, "jit on a mesh: `optax.MultiSteps`"): lambda setup: jit_windows(
        setup, optax.MultiSteps(optimizer(), setup.k)
    ),
    (IN_STEP, "pmap: `value_and_grad(axis_name=)`"): pmap_in_step,
    (IN_STEP, "shard_map: `value_and_grad(axis_name=)`"): functools.partial(
        shard_map_in_step, check=True
    ),
    (IN_STEP, "shard_map, `check_vma=False`: the same"): functools.partial(
        shard_map_in_step, check=False
    ),
    (IN_STEP, "jit on an Auto mesh: `value_and_grad(mesh=)`"): functools.partial(
        on_mesh, kind=AxisType.Auto
    ),
    (IN_STEP, "jit on an Explicit mesh: `value_and_grad(mesh=)`"): functools.partial(
        on_mesh, kind=AxisType.Explicit
    ),
    (IN_STEP, "the same with `scatter=True`"): functools.partial(
        on_mesh, kind=AxisType.Auto, scatter=True
    ),
    (IN_STEP, "jit on a mesh: `value_and_grad`"): without_mesh,
    (IN_STEP, "jit on a mesh: `lax.scan` by hand"): lambda setup: jit_in_step(
        setup, by_hand(setup)
    ),
    (IN_STEP, "jit on a mesh: `optax.microbatching`"): optax_microbatch,
    (IN_STEP, "shard_map: `lax.scan` by hand"): shard_map_by_hand,
}


def measure(options: argparse.Namespace) -> list[Row]:
    jax.config.update("jax_num_cpu_devices", options.devices)
    setup = make_setup(options.k, options.devices)
    ways = list(WAYS.items())[:: 4 if options.quick else 1]
    return [
        measure_way(*names, programs(setup), setup)
        for names, programs in shared.track(ways, "compiling")
    ]


def measure_way(group: str, way: str, programs: list[Program], setup: Setup) -> Row:
    places: list[str] = []
    count, exchanged = 0, 0
    for program in programs:
        for operation in hlo.collectives(program.compiled):
            times = program.runs
            if operation.place == "branch":
                times = 1
            elif operation.place == "loop":
                times *= setup.k
            places.append(f"{operation.name}, {operation.place}")
            count += times
            # A reduce-scatter's result is one device's part of what was exchanged.
            parts = setup.devices if operation.name == "reduce-scatter" else 1
            exchanged += times * parts * operation.nbytes
    where = "; ".join(
        f"{places.count(place)} × {place}" for place in dict.fromkeys(places)
    )
    data = exchanged / hlo.nbytes(setup.params)
    return Row(setup.devices, setup.k, group, way, where or "none", count, data)


def table(rows: list[Row]) -> shared.Table:
    lines: list[tuple[str, ...]] = []
    for group in dict.fromkeys(r.group for r in rows):
        lines.append((f"**{group}**", "", "", ""))
        lines += [
            (r.way, r.places, str(r.per_update), f"{r.data:.2f}")
            for r in rows
            if r.group == group
        ]
    return shared.Table(
        f"{rows[0].devices} devices, {rows[0].k} micro-batches to an update",
        ("way", "collectives, and where", "per update", "data, times the gradient"),
        "llrr",
        lines,
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--k", type=int, default=8, help="micro-batches to an update (default: 8)")
    add("--devices", type=int, default=8, help="made up on a CPU (default: 8)")


BENCHMARK = shared.Benchmark(
    row=Row,
    measure=measure,
    tables=lambda rows: [table(rows)],
    page="devices.md",
    page_table=table,
    add_options=add_options,
)
