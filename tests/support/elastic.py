"""A training that goes on with any number of devices, and a process to be killed.

    python -m tests.support.elastic ADDRESS PROCESSES PROCESS FOLDER

trains on two devices of each process, saves after every micro-step, and waits to be
killed inside the second window.
"""

import sys
import time
from pathlib import Path

import jax
import numpy as np

BATCH = 22  # the examples of every global batch
PER_DEVICE = 2  # as many of them as fit on a device
COUNTS = (8, 5, 6, 3)  # in each micro-step of the processes, whose devices take 8
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
    import optax  # noqa: PLC0415

    from tests.support.training import promoting  # noqa: PLC0415

    return promoting(optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(0.1)))


def training(mesh):
    """``tx`` and ``step(params, state, x, mask, boundary)``, from plain jit."""
    import optax_accum as oa  # noqa: PLC0415
    from tests.support import devices  # noqa: PLC0415

    def count(params, x, mask):
        del params, x
        return mask.sum()

    over = {"mesh": mesh, "axis_name": "data"}
    tx = oa.accumulate(optimizer(), **over)
    gradient = oa.value_and_grad(
        devices.loss,
        num_microbatches=1,
        batch_argnums=(1, 2),
        weight=count,
        local=True,
        return_info=True,
        **over,
    )

    def step(params, state, x, mask, boundary):
        (value, grads), info = gradient(params, x, mask)
        return tx.update_params(
            grads, state, params, weight=info.weight, value=value, boundary=boundary
        )

    return tx, jax.jit(step, donate_argnums=(0, 1), static_argnames="boundary")


def main(address, processes, process, folder):
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(address, int(processes), int(process))
    import orbax.checkpoint as ocp  # noqa: PLC0415
    from jax.sharding import NamedSharding  # noqa: PLC0415
    from jax.sharding import PartitionSpec as P  # noqa: PLC0415

    from tests.support import devices  # noqa: PLC0415

    mesh = devices.mesh()
    split, everywhere = (NamedSharding(mesh, spec) for spec in (P("data"), P()))
    tx, step = training(mesh)
    params = jax.device_put(jax.tree.map(np.asarray, devices.PARAMS), everywhere)
    state = tx.init(params)
    cuts = np.cumsum(COUNTS)[:-1]
    own = slice(*np.array([int(process), int(process) + 1]) * 2 * PER_DEVICE)
    with ocp.CheckpointManager(Path(folder) / "checkpoints") as manager:
        for i in range(2 * len(COUNTS)):
            window, part = divmod(i, len(COUNTS))
            examples = np.split(global_batch(window), cuts)[part]
            x, mask = (
                jax.make_array_from_process_local_data(split, a[own])
                for a in padded(examples, PER_DEVICE * jax.device_count())
            )
            is_last = part == len(COUNTS) - 1
            params, state = step(params, state, x, mask, boundary=is_last)
            saved = ocp.args.StandardSave((params, state))
            manager.save(i + 1, args=saved)
            if i + 1 == STOP:
                manager.wait_until_finished()
                (Path(folder) / f"{process}.ready").touch()
                if process == "1":  # The other one goes on, and waits for it.
                    time.sleep(600)


if __name__ == "__main__":
    main(*sys.argv[1:])
