"""Two processes on this machine, as two hosts would be: no memory in common."""

import contextlib
import functools
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import optax_accum as oa
from tests.support import elastic
from tests.support.devices import PARAMS, examples, loss
from tests.support.training import promoting

PROCESSES, DEVICES, K = 2, 4, 3


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def started(module, folder, last_argument):
    """Processes that run a module of `tests.support`; none of them outlives the test.

    What they print is in `folder`, as ``0.log`` and so on.
    """
    address = f"localhost:{free_port()}"
    processes = []
    try:
        for i in range(PROCESSES):
            command = [sys.executable, "-m", f"tests.support.{module}"]
            arguments = [address, str(PROCESSES), str(i), str(last_argument(i))]
            with (folder / f"{i}.log").open("w") as log:
                processes.append(
                    subprocess.Popen(
                        command + arguments,
                        cwd=Path(__file__).parents[1],
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        env=os.environ | {"JAX_PLATFORMS": "cpu"},
                    )
                )
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def printed_in(folder):
    """The end of what the processes have printed."""
    return "\n".join(log.read_text()[-2000:] for log in sorted(folder.glob("*.log")))


@pytest.mark.slow
def test_two_processes_end_with_the_same_bits_and_match_one_process(tmp_path):
    """Windows and micro-batches, uneven data: the same bits, and the right ones."""
    files = [tmp_path / f"{i}.npz" for i in range(PROCESSES)]
    with started("worker_process", tmp_path, files.__getitem__) as processes:
        codes = [process.wait(timeout=300) for process in processes]
    assert codes == [0] * PROCESSES, printed_in(tmp_path)

    found = [dict(np.load(file)) for file in files]
    assert [int(f.pop("memory_limit")) for f in found] == [2**40 - PROCESSES] * 2
    ways = "checked", "unchecked", "mesh", "rows", "scatter", "hsdp"
    assert all(len(f) == len(ways) * 2 * DEVICES // PROCESSES for f in found)
    everything = found[0] | found[1]
    wanted = alone()
    for way in ways:
        for name, p in wanted.items():
            shards = [
                x for key, x in everything.items() if key.startswith(f"{way}/{name}/")
            ]
            assert len(shards) == DEVICES
            for shard in shards:
                np.testing.assert_array_equal(shard, shards[0])
            np.testing.assert_allclose(shards[0], p, rtol=1e-5, atol=1e-6)


def alone():
    """Plain Optax in this process, on the counted examples of both."""
    inner = promoting(optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(0.1)))
    x, mask = examples(2 * K, count=DEVICES)
    params, state = PARAMS, inner.init(PARAMS)
    for start in range(0, 2 * K, K):
        counted = x[start : start + K][mask[start : start + K]]
        grads = jax.grad(loss)(params, counted, jnp.ones(len(counted), bool))
        updates, state = inner.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


# --- A training that goes on with other devices ---


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The checkpoints of two processes that were killed inside a window."""
    folder = tmp_path_factory.mktemp("killed")
    ready = [folder / f"{i}.ready" for i in range(PROCESSES)]
    with started("elastic", folder, lambda _: folder) as processes:
        until = time.monotonic() + 120
        while not all(file.exists() for file in ready):
            codes = [process.poll() for process in processes]
            assert codes == [None] * PROCESSES, printed_in(folder)
            assert time.monotonic() < until, printed_in(folder)
            time.sleep(0.1)
        # The first has begun another micro-step and its checkpoint, and waits.
        time.sleep(1)
        for process in reversed(processes):
            process.kill()
            process.wait()
            time.sleep(0.5)
    assert processes[1].returncode == -signal.SIGKILL
    assert processes[0].returncode != 0
    return folder / "checkpoints"


def restored(folder):
    """The newest checkpoint: parameters, and the windows of those devices."""
    tx = oa.accumulate(elastic.optimizer())
    shapes = jax.eval_shape(
        lambda p: (p, oa.sharding.stack_windows(tx.init(p), DEVICES)), PARAMS
    )
    here = SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), shapes
    )
    with ocp.CheckpointManager(folder) as manager:
        assert manager.latest_step() == elastic.STOP
        saved = manager.restore(elastic.STOP, args=ocp.args.StandardRestore(like))
    return jax.device_get(saved)


@functools.cache
def undisturbed():
    """Plain Optax, after each of the global batches of `elastic`."""
    inner = elastic.optimizer()
    params, state = PARAMS, inner.init(PARAMS)
    found = []
    for number in range(4):
        x = jnp.asarray(elastic.global_batch(number))
        grads = jax.grad(loss)(params, x, jnp.ones(len(x), bool))
        updates, state = inner.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        found.append(params)
    return found


@pytest.mark.slow
@pytest.mark.several_devices
@pytest.mark.parametrize(
    ("count", "micro_steps"), [(1, [5, 11]), (2, [3, 6]), (3, [2, 4]), (8, [1, 2])]
)
def test_the_windows_of_killed_processes_go_on_on_other_devices(
    killed, count, micro_steps
):
    """On the global batches that there would have been: 13 of the 22 are in it."""
    mesh = jax.make_mesh(
        (count,), ("data",), (AxisType.Auto,), devices=jax.devices()[:count]
    )
    split = NamedSharding(mesh, P("data"))
    tx, step = elastic.training(mesh)
    params, state = restored(killed)
    assert state.window.weight.sum() == sum(elastic.COUNTS[:2]) == 13
    np.testing.assert_allclose(params["w"], undisturbed()[0]["w"], rtol=1e-5)

    one = oa.sharding.sum_windows(state, rescale=False)
    state = oa.sharding.stack_windows(one, count, rescale=False)
    specs = P(), oa.sharding.window_specs(state, "data")
    params, state = jax.device_put(
        (jax.tree.map(np.asarray, params), state),
        jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs),
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(params))
    taken, size, found = 13, elastic.PER_DEVICE * count, []
    for number in range(1, 4):
        left = oa.sharding.micro_steps_left(state, elastic.BATCH, size)
        found.append(left)
        for i in range(left):
            examples = elastic.global_batch(number)[taken : taken + size]
            batch = jax.device_put(elastic.padded(examples, size), split)
            params, state = jax.block_until_ready(
                step(params, state, *batch, boundary=i == left - 1)
            )
            taken += len(examples)
        assert taken == elastic.BATCH
        taken = 0
        chex.assert_trees_all_close(params, undisturbed()[number], rtol=1e-5)
    assert found == [micro_steps[0], micro_steps[1], micro_steps[1]]
    assert oa.gradient_step(state) == 4
