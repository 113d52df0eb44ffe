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
import pytest
from jax.sharding import AxisType

from tests.support import elastic
from tests.support.devices import CLIPPED_ADAMW, PARAMS, examples, loss
from tests.support.training import promoting

PROCESSES, DEVICES, K = 2, 4, 3


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


@contextlib.contextmanager
def started(module, folder, file_of, *more):
    """Processes that run a module of `tests.support`; none of them outlives the test.

    What they print is in `folder`, as ``0.log`` and so on.
    """
    address = f"localhost:{free_port()}"
    processes = []
    try:
        for i in range(PROCESSES):
            command = [sys.executable, "-m", f"tests.support.{module}"]
            arguments = map(str, [address, PROCESSES, i, file_of(i), *more])
            with (folder / f"{i}.log").open("w") as log:
                processes.append(
                    subprocess.Popen(
                        [*command, *arguments],
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
    inner = promoting(CLIPPED_ADAMW)
    x, mask = examples(2 * K, count=DEVICES)
    params, state = PARAMS, inner.init(PARAMS)
    for start in range(0, 2 * K, K):
        counted = x[start : start + K][mask[start : start + K]]
        grads = jax.grad(loss)(params, counted, jnp.ones(len(counted), bool))
        updates, state = inner.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


# --- A training that continues on other devices ---


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


def check_all(found):
    """The parameters after the second window and after each of two more."""
    for got, wanted in zip(found, undisturbed()[1:], strict=True):
        chex.assert_trees_all_close(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.several_devices
@pytest.mark.parametrize(
    ("count", "micro_steps"), [(1, [5, 11]), (2, [3, 6]), (3, [2, 4]), (8, [1, 2])]
)
def test_an_open_window_of_killed_processes_goes_on_in_one(killed, count, micro_steps):
    """On the global batches that there would have been: it has 13 of 22 examples."""
    mesh = jax.make_mesh(
        (count,), ("data",), (AxisType.Auto,), devices=jax.devices()[:count]
    )
    taken, found = elastic.go_on(killed, mesh)
    first, others = micro_steps
    assert taken == [first, others, others]
    check_all(found)


@pytest.mark.slow
def test_an_open_window_of_killed_processes_goes_on_in_others(killed):
    """In two that have three devices each."""
    folder = killed.parent
    with started("elastic", folder, lambda _: folder, 3) as processes:
        codes = [process.wait(timeout=300) for process in processes]
    assert codes == [0] * PROCESSES, printed_in(folder)
    for i in range(PROCESSES):
        with np.load(folder / f"{i}.npz") as file:
            assert file["micro_steps"].tolist() == [1, 2, 2]
            check_all([{n: file[f"{j}/{n}"] for n in PARAMS} for j in range(3)])
