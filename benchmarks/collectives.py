"""What one update exchanges between devices, read from the compiled programs.

Every way of computing one update in K micro-batches over several devices (simulated on
a CPU), ours and the others'. Counted are the collectives of all programs that run for
one update: what is in a loop counts K times, what is in a micro-step K times, what is
in the boundary's branch once. No clock: simulated devices have no wires.

Data are counted in all-reduces of the gradient. An all-reduce is a reduce-scatter and
an all-gather, so each of these counts half of what it leaves or takes on one device.
With HSDP the devices are replicas, in each of which the parameters lie in parts. What
crosses replicas, which have the slow wires between them, is told from the rest.

These are programs for a CPU, whose compiler leaves all-reduces of which every device
keeps its part. Others make reduce-scatters of them, which count half.
"""

import argparse
import functools
import math
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
# HSDP has two axes instead: parameters are in parts over the second.
REPLICAS, PARTS = "replica", "fsdp"
NUM_REPLICAS = 2


class Setup(NamedTuple):
    """What every way is measured on."""

    params: Any
    batch: jax.Array
    k: int
    devices: int

    def mesh(self, kind: AxisType = AxisType.Auto) -> jax.sharding.Mesh:
        """All devices on one axis."""
        return jax.make_mesh((self.devices,), (AXIS,), axis_types=(kind,))

    def replicas(self) -> jax.sharding.Mesh:
        """Replicas of equally many devices."""
        shape = NUM_REPLICAS, self.devices // NUM_REPLICAS
        return jax.make_mesh(shape, (REPLICAS, PARTS), axis_types=(AxisType.Auto,) * 2)


class Program(NamedTuple):
    """A compiled program, and how often it runs for one update."""

    compiled: Any
    runs: int


class Row(NamedTuple):
    """One way.

    `places` are where the collectives are, `per_update` how many run for one update,
    and `data` is what they exchange, in all-reduces of the gradient. `across` is how
    much of that crosses replicas, "nan" if there are none.
    """

    devices: int
    k: int
    group: str
    way: str
    places: str
    per_update: int
    data: float
    across: float


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


def jit_windows(
    setup: Setup,
    tx: Any,
    mesh: jax.sharding.Mesh | None = None,
    parts_over: str | None = None,
) -> list[Program]:
    """The compiler's own propagation: nothing is said about devices."""

    def step(params, state, x):
        updates, state = tx.update(jax.grad(loss)(params, x), state, params)
        return optax.apply_updates(params, updates), state

    mesh = mesh or setup.mesh()
    params, x = placed(setup, mesh, parts_over, micro_batch(setup))
    return [Program(compile_windows(step, mesh, tx.init(params), params, x), setup.k)]


def jit_rows(
    setup: Setup,
    mesh: jax.sharding.Mesh,
    axis_name: str = AXIS,
    parts_over: str | None = None,
    moments_over: str | None = None,
    *,
    scatter: bool = False,
    static: bool = False,
) -> list[Program]:
    """Each device's own gradient goes to the row of the window that it has."""
    f = oa.value_and_grad(
        loss, num_microbatches=1, mesh=mesh, axis_name=axis_name, local=True
    )
    every_k = None if static else setup.k
    tx = oa.accumulate(
        optimizer(), every_k, mesh=mesh, axis_name=axis_name, scatter=scatter
    )

    def step(params, state, x, boundary=None):
        whole = params
        if parts_over == axis_name and AxisType.Explicit in mesh.axis_types:
            whole = jax.reshard(params, P())
        _, grads = f(whole, x)
        return tx.update_params(grads, state, params, boundary=boundary)

    params, x = placed(setup, mesh, parts_over, micro_batch(setup))
    like, _ = placed(setup, mesh, parts_over or moments_over, x)
    state = tx.init(like)

    def program(boundary):
        own = functools.partial(step, boundary=boundary)
        return compile_windows(own, mesh, state, params, x)

    if static:
        return [Program(program(False), setup.k - 1), Program(program(True), 1)]
    return [Program(program(None), setup.k)]


def placed(
    setup: Setup, mesh: jax.sharding.Mesh, parts_over: str | None, x: jax.Array
) -> tuple[Any, jax.Array]:
    """Parameters everywhere, or in parts over one axis; and `x` over all."""
    specs: Any = P()
    if parts_over:
        specs = oa.sharding.scatter_specs(setup.params, mesh, parts_over)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    split = NamedSharding(mesh, P(mesh.axis_names))
    return jax.device_put(setup.params, shardings), jax.device_put(x, split)


def compile_windows(
    step: Any, mesh: jax.sharding.Mesh, state: Any, params: Any, x: jax.Array
) -> Any:
    """The step, whose parameters stay where they are."""
    stay = jax.tree.map(lambda p: p.sharding, params)
    jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=(stay, None))
    with jax.set_mesh(mesh):
        return jitted.lower(params, state, x).compile()


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
    """Strided: the split itself exchanges nothing."""

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


def jit_in_step(
    setup: Setup,
    f: Any,
    mesh: jax.sharding.Mesh | None = None,
    parts_over: str | None = None,
) -> list[Program]:
    mesh = mesh or setup.mesh()
    params, x = placed(setup, mesh, parts_over, setup.batch)
    # Gradients go where the parameters are; the mesh's way says where by itself.
    where = (None, jax.tree.map(lambda p: p.sharding, params)) if parts_over else None
    with jax.set_mesh(mesh):
        return [Program(jax.jit(f, out_shardings=where).lower(params, x).compile(), 1)]


def on_mesh(
    setup: Setup,
    mesh: jax.sharding.Mesh,
    axis_name: str = AXIS,
    parts_over: str | None = None,
    *,
    scatter: bool = False,
) -> list[Program]:
    f = oa.value_and_grad(
        loss,
        num_microbatches=setup.k,
        mesh=mesh,
        axis_name=axis_name,
        scatter=scatter,
    )
    return jit_in_step(setup, f, mesh, parts_over)


def without_mesh(
    setup: Setup,
    mesh: jax.sharding.Mesh | None = None,
    parts_over: str | None = None,
) -> list[Program]:
    f = oa.value_and_grad(loss, num_microbatches=setup.k)
    return jit_in_step(setup, f, mesh, parts_over)


def optax_microbatch(setup: Setup) -> list[Program]:
    f = microbatching.microbatch(
        jax.value_and_grad(loss),
        argnums=1,
        microbatch_size=len(setup.batch) // setup.k,
        accumulator=microbatching.AccumulationType.MEAN,
    )
    return jit_in_step(setup, f)


STREAM, IN_STEP = "one micro-batch per call", "all micro-batches in one call"
FSDP = "sharded parameters (FSDP)"
HSDP = f"{NUM_REPLICAS} replicas, parameters sharded inside each (HSDP)"
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
    (STREAM, "jit on an Auto mesh: `accumulate(mesh=)`"): lambda setup: jit_rows(
        setup, setup.mesh()
    ),
    (STREAM, "jit on an Explicit mesh: `accumulate(mesh=)`"): lambda setup: jit_rows(
        setup, setup.mesh(AxisType.Explicit)
    ),
    (
        STREAM,
        "jit on an Explicit mesh, `boundary` a Python bool: the same",
    ): lambda setup: jit_rows(setup, setup.mesh(AxisType.Explicit), static=True),
    (
        STREAM,
        "jit on an Explicit mesh, sharded moments: with `scatter=True`",
    ): lambda setup: jit_rows(
        setup, setup.mesh(AxisType.Explicit), moments_over=AXIS, scatter=True
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
    (IN_STEP, "jit on an Auto mesh: `value_and_grad(mesh=)`"): lambda setup: on_mesh(
        setup, setup.mesh()
    ),
    (IN_STEP, "jit on an Explicit mesh: `value_and_grad(mesh=)`"): lambda setup: (
        on_mesh(setup, setup.mesh(AxisType.Explicit))
    ),
    (IN_STEP, "the same with `scatter=True`"): lambda setup: on_mesh(
        setup, setup.mesh(), scatter=True
    ),
    (IN_STEP, "jit on a mesh: `value_and_grad`"): without_mesh,
    (IN_STEP, "jit on a mesh: `lax.scan` by hand"): lambda setup: jit_in_step(
        setup, by_hand(setup)
    ),
    (IN_STEP, "jit on a mesh: `optax.microbatching`"): optax_microbatch,
    (IN_STEP, "shard_map: `lax.scan` by hand"): shard_map_by_hand,
    (FSDP, "per call, Auto: `accumulate(mesh=, scatter=True)`"): lambda setup: jit_rows(
        setup, setup.mesh(), parts_over=AXIS, scatter=True
    ),
    (
        FSDP,
        "per call, Explicit: the same, of `jax.reshard(params, P())`",
    ): lambda setup: jit_rows(
        setup, setup.mesh(AxisType.Explicit), parts_over=AXIS, scatter=True
    ),
    (FSDP, "per call: `accumulate`"): lambda setup: jit_windows(
        setup, oa.accumulate(optimizer(), setup.k), setup.mesh(), AXIS
    ),
    (FSDP, "in one call: `value_and_grad`"): lambda setup: without_mesh(
        setup, setup.mesh(), AXIS
    ),
    (HSDP, 'per call: `accumulate(mesh=, axis_name="replica")`'): lambda setup: (
        jit_rows(setup, setup.replicas(), REPLICAS, PARTS)
    ),
    (HSDP, "per call: `accumulate`"): lambda setup: jit_windows(
        setup, oa.accumulate(optimizer(), setup.k), setup.replicas(), PARTS
    ),
    (HSDP, 'in one call: `value_and_grad(mesh=, axis_name="replica")`'): lambda setup: (
        on_mesh(setup, setup.replicas(), REPLICAS, PARTS)
    ),
    (HSDP, "in one call: `value_and_grad`"): lambda setup: without_mesh(
        setup, setup.replicas(), PARTS
    ),
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
    count, data, across = 0, 0.0, 0.0
    for program in programs:
        for operation in hlo.collectives(program.compiled):
            times = program.runs
            if operation.place == "branch":
                times = 1
            elif operation.place == "loop":
                times *= setup.k
            crosses = group == HSDP and crosses_replicas(operation, setup)
            where = ", across replicas" if crosses else ""
            places.append(f"{operation.name}, {operation.place}{where}")
            count += times
            exchanged = times * all_reduced(operation) / hlo.nbytes(setup.params)
            data += exchanged
            across += crosses * exchanged
    shown = "; ".join(
        f"{places.count(place)} × {place}" for place in dict.fromkeys(places)
    )
    if group != HSDP:
        across = float("nan")
    return Row(setup.devices, setup.k, group, way, shown or "none", count, data, across)


def all_reduced(operation: hlo.Operation) -> float:
    """The bytes of an all-reduce for which so many go over the wires."""
    if operation.name == "all-reduce":
        return operation.nbytes
    if operation.name == "all-gather":
        return operation.nbytes / 2
    if operation.name == "reduce-scatter":  # Its result is one device's part.
        return operation.nbytes * len(operation.groups[0]) / 2
    raise NotImplementedError(operation.name)


def crosses_replicas(operation: hlo.Operation, setup: Setup) -> bool:
    """Whether devices of different replicas meet."""
    size = setup.devices // NUM_REPLICAS
    groups = operation.groups or [list(range(setup.devices))]
    return any(len({device // size for device in group}) > 1 for group in groups)


def table(rows: list[Row]) -> shared.Table:
    lines: list[tuple[str, ...]] = []
    for group in dict.fromkeys(r.group for r in rows):
        lines.append((f"**{group}**", "", "", "", ""))
        lines += [
            (
                r.way,
                r.places,
                str(r.per_update),
                f"{r.data:.2f}",
                "" if math.isnan(r.across) else f"{r.across:.2f}",
            )
            for r in rows
            if r.group == group
        ]
    columns = (
        "way",
        "collectives, and where",
        "collectives per update",
        "data, in all-reduces of the gradient",
        "of which across replicas",
    )
    return shared.Table(
        f"{rows[0].devices} devices, {rows[0].k} micro-batches to an update",
        columns,
        "llrrr",
        lines,
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--k", type=int, default=8, help="micro-batches to an update (default: 8)")
    add(
        "--devices",
        type=int,
        default=8,
        help="simulated on a CPU, an even number (default: 8)",
    )


BENCHMARK = shared.Benchmark(
    row=Row,
    measure=measure,
    tables=lambda rows: [table(rows)],
    page="collectives.md",
    page_table=table,
    add_options=add_options,
)
