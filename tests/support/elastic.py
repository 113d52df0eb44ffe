"""A training that is killed, and continues on any number of devices and processes.

    python -m tests.support.elastic ADDRESS PROCESSES PROCESS FOLDER

trains on two devices of each process, saves after every micro-step, and waits to be
killed inside the second window.

    python -m tests.support.elastic ADDRESS PROCESSES PROCESS FOLDER DEVICES

continues from there, on that many devices of each process.
"""

import sys
import time
from pathlib import Path

import jax
import numpy as np

BATCH = 22  # the examples of every global batch
PER_DEVICE = 2  # as many of them as fit on a device
COUNTS = (8, 5, 6, 3)  # in each micro-step of the processes, whose devices take 8
SAVED_BY = 4  # devices
STOP = len(COUNTS) + 2  # the micro-step after which they are killed


def global_batch(number):
    """The examples of one update."""
    return np.random.default_rng(number).normal(size=(BATCH, 3)).astype(np.float32)


def padded(examples, size):
    """Examples filled up to `size` with others, and the mask that leaves those out."""
    pad = (0, size - len(examples))
    x = np.pad(examples, [pad, (0, 0)], constant_values=1000)
    return x, np.arange(size) < len(examples)


def optimizer():
    """The inner one."""
    # Such imports wait for the devices, which `jax.distributed.initialize` finds.
    from tests.support.devices import CLIPPED_ADAMW  # noqa: PLC0415
    from tests.support.training import promoting  # noqa: PLC0415

    return promoting(CLIPPED_ADAMW)


def training(mesh):
    """`devices.rows`, with a boundary in every call."""
    from tests.support import devices  # noqa: PLC0415

    return devices.rows(optimizer(), None, mesh)


def go_on(folder, mesh):
    """From the newest checkpoint to the end of the fourth window, on the new mesh.

    Returns how many micro-steps each window took, and the parameters after it.
    """
    import orbax.checkpoint as ocp  # noqa: PLC0415
    from jax.sharding import NamedSharding  # noqa: PLC0415
    from jax.sharding import PartitionSpec as P  # noqa: PLC0415

    import optax_accum as oa  # noqa: PLC0415
    from tests.support import devices  # noqa: PLC0415

    split, everywhere = (NamedSharding(mesh, spec) for spec in (P("data"), P()))
    # The shapes are those of the four devices that have saved.
    one_window = oa.accumulate(optimizer()).init
    shapes = jax.eval_shape(
        lambda p: (p, oa.sharding.stack_windows(one_window(p), SAVED_BY)),
        devices.PARAMS,
    )
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), shapes
    )
    with ocp.CheckpointManager(folder) as manager:
        assert manager.latest_step() == STOP
        args = ocp.args.StandardRestore(like)
        params, state = manager.restore(STOP, args=args)

    tx, step = training(mesh)
    one = oa.sharding.sum_windows(state, rescale=False)
    state = oa.sharding.stack_windows(one, mesh.size, rescale=False)
    specs = oa.sharding.window_specs(state, "data")
    places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    state = jax.device_put(state, places)
    new = tx.init(params)
    for x, y in zip(jax.tree.leaves(state), jax.tree.leaves(new), strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)

    micro_steps, found = [], []
    taken, size = int(one.window.weight), PER_DEVICE * mesh.size
    assert taken == sum(COUNTS[: STOP % len(COUNTS)])
    for number in range(1, 4):
        left = oa.sharding.micro_steps_left(state, BATCH, size)
        for i in range(left):
            examples = global_batch(number)[taken : taken + size]
            batch = (
                jax.make_array_from_callback(a.shape, split, a.__getitem__)
                for a in padded(examples, size)
            )
            params, state = jax.block_until_ready(
                step(params, state, *batch, boundary=i == left - 1)
            )
            taken += len(examples)
        assert taken == BATCH
        taken = 0
        assert oa.gradient_step(state) == number + 1
        micro_steps.append(left)
        found.append(jax.device_get(params))
    return micro_steps, found


def main(address, processes, process, folder, devices_each=None):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", int(devices_each or 2))
    jax.distributed.initialize(address, int(processes), int(process))
    from tests.support import devices  # noqa: PLC0415

    checkpoints = Path(folder) / "checkpoints"
    if devices_each is None:
        until_killed(checkpoints, int(process))
    micro_steps, found = go_on(checkpoints, devices.mesh())
    leaves = {f"{i}/{name}": x for i, p in enumerate(found) for name, x in p.items()}
    np.savez(Path(folder) / f"{process}.npz", micro_steps=micro_steps, **leaves)
    jax.distributed.shutdown()


def until_killed(folder, process):
    """Trains, saves after every micro-step, and shows a file when it may be killed."""
    import orbax.checkpoint as ocp  # noqa: PLC0415
    from jax.sharding import NamedSharding  # noqa: PLC0415
    from jax.sharding import PartitionSpec as P  # noqa: PLC0415

    from tests.support import devices  # noqa: PLC0415

    mesh = devices.mesh()
    assert mesh.size == SAVED_BY
    split, everywhere = (NamedSharding(mesh, spec) for spec in (P("data"), P()))
    tx, step = training(mesh)
    params = jax.device_put(jax.tree.map(np.asarray, devices.PARAMS), everywhere)
    state = tx.init(params)
    cuts = np.cumsum(COUNTS)[:-1]
    own = slice(*np.array([process, process + 1]) * 2 * PER_DEVICE)
    with ocp.CheckpointManager(folder) as manager:
        for i in range(STOP + 1):
            window, part = divmod(i, len(COUNTS))
            examples = np.split(global_batch(window), cuts)[part]
            x, mask = (
                jax.make_array_from_process_local_data(split, a[own])
                for a in padded(examples, PER_DEVICE * mesh.size)
            )
            is_last = part == len(COUNTS) - 1
            params, state = step(params, state, x, mask, boundary=is_last)
            manager.save(i + 1, args=ocp.args.StandardSave((params, state)))
            if i + 1 == STOP:
                manager.wait_until_finished()
                (folder.parent / f"{process}.ready").touch()
                if process == 1:  # The first begins another checkpoint, and waits.
                    time.sleep(600)
        manager.wait_until_finished()


if __name__ == "__main__":
    main(*sys.argv[1:])
