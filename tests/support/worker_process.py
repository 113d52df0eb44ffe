"""One of several processes that train together; started by `test_processes.py`.

    python -m tests.support.worker_process ADDRESS PROCESSES PROCESS FILE

Each has two devices and an own part of every micro-step's examples, of which it counts
as many as its mask says. It leaves in FILE what its own devices hold in the end.
"""

import sys

import jax
import numpy as np

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 2)


def main(address, processes, process, file):
    jax.distributed.initialize(address, int(processes), int(process))
    # Imported here, because the devices are there from now on.
    import optax  # noqa: PLC0415
    from jax.sharding import AxisType, NamedSharding  # noqa: PLC0415
    from jax.sharding import PartitionSpec as P  # noqa: PLC0415

    import optax_accum as oa  # noqa: PLC0415
    from tests.support import devices  # noqa: PLC0415

    steps, k = 6, 3
    mesh = devices.mesh()
    everywhere = NamedSharding(mesh, P())
    split = NamedSharding(mesh, P(None, devices.AXIS))
    x, mask = devices.examples(steps)
    own = slice(*np.array([int(process), int(process) + 1]) * (x.shape[1] // 2))
    # What a data loader would have: this process's part, and no other.
    x, mask = (
        jax.make_array_from_process_local_data(split, np.asarray(a)[:, own])
        for a in (x, mask)
    )
    inner = devices.CLIPPED_ADAMW
    ways = {}

    for way in ("checked", "unchecked"):
        tx = oa.accumulate(inner, k, axis_name=devices.AXIS)
        step, _ = devices.windows(way, tx)
        state = tx.init(devices.PARAMS)
        specs = oa.sharding.window_specs(state, devices.AXIS)
        shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
        stack = jax.jit(
            oa.sharding.stack_windows, static_argnums=1, out_shardings=shardings
        )
        state = stack(jax.tree.map(np.asarray, state), devices.COUNT)
        params = jax.device_put(jax.tree.map(np.asarray, devices.PARAMS), everywhere)
        for i in range(steps):
            params, state = step(params, state, x[i], mask[i], None)
        ways[way] = params

    gradient = oa.value_and_grad(
        devices.loss,
        num_microbatches=k,
        batch_argnums=(1, 2),
        weight=devices.count,
        axis_name=devices.AXIS,
        mesh=mesh,
    )

    @jax.jit
    def train(params, state, x, mask):
        # [k, examples, ...] -> the examples of each device together.
        x, mask = (a.swapaxes(0, 1).reshape(-1, *a.shape[2:]) for a in (x, mask))
        _, grads = gradient(params, x, mask)
        updates, state = inner.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = jax.device_put(jax.tree.map(np.asarray, devices.PARAMS), everywhere)
    state = jax.jit(inner.init)(params)
    for start in range(0, steps, k):
        part = slice(start, start + k)
        params, state = train(params, state, x[part], mask[part])
    ways["mesh"] = params

    def by_rows(mesh, over, part, x, **options):
        return rows(inner, k, mesh, over, part, x, mask, **options)

    ways["rows"] = by_rows(mesh, devices.AXIS, None, x)
    ways["scatter"] = by_rows(mesh, devices.AXIS, devices.AXIS, x, scatter=True)
    # A replica is a process, whose two devices have the parameters in parts. What does
    # not count shares a micro-batch with what does, and may not be NaN.
    replicas = jax.make_mesh(
        (int(processes), 2), ("replica", "fsdp"), axis_types=(AxisType.Auto,) * 2
    )
    assert {d.process_index for d in replicas.devices[int(process)]} == {int(process)}
    finite = jax.jit(jax.numpy.nan_to_num)(x)
    ways["hsdp"] = by_rows(replicas, "replica", "fsdp", finite)

    local = {
        f"{way}/{name}/{shard.device.id}": np.asarray(shard.data)
        for way, params in ways.items()
        for name, p in params.items()
        for shard in p.addressable_shards
    }
    # Each was told another limit, one of more than 32 bits; all must plan alike.
    plan = oa.diagnose.plan_microbatches(
        lambda _: jax.jit(devices.loss),
        devices.PARAMS,
        x[0],
        mask[0],
        candidates=[1],
        memory_limit=2**40 - 1 - int(process),
    )
    np.savez(file, memory_limit=plan.memory_limit, **local)
    jax.distributed.shutdown()


def rows(inner, k, mesh, over, part, x, mask, **options):
    """What micro-steps from plain jit make of parameters in parts over axis `part`."""
    from jax.sharding import NamedSharding  # noqa: PLC0415
    from jax.sharding import PartitionSpec as P  # noqa: PLC0415

    from tests.support import devices  # noqa: PLC0415

    tx, step = devices.rows(inner, k, mesh, over, **options)
    # Four columns each.
    placed = {
        name: NamedSharding(mesh, P(*[None] * (p.ndim - 1), part))
        for name, p in devices.PARAMS.items()
    }
    params = jax.device_put(jax.tree.map(np.asarray, devices.PARAMS), placed)
    state = tx.init(params)
    for i in range(len(x)):
        params, state = jax.block_until_ready(step(params, state, x[i], mask[i]))
    for tree in (params, state.inner_state[1][0].mu):
        for name, p in tree.items():
            assert p.sharding.is_equivalent_to(placed[name], p.ndim)
    # The parts are put together, if they are parts.
    return jax.jit(lambda p: p, out_shardings=NamedSharding(mesh, P()))(params)


if __name__ == "__main__":
    main(*sys.argv[1:])
