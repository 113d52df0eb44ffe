"""Two processes on this machine, as two hosts would be: no memory in common."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.support.devices import PARAMS, examples, loss
from tests.support.training import promoting

PROCESSES, DEVICES, K = 2, 4, 3


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


@pytest.mark.slow
def test_two_processes_end_with_the_same_bits_and_match_one_process(tmp_path):
    """Windows and micro-batches, uneven data: the same bits, and the right ones."""
    address = f"localhost:{free_port()}"
    files = [tmp_path / f"{i}.npz" for i in range(PROCESSES)]
    logs = [tmp_path / f"{i}.log" for i in range(PROCESSES)]
    started = []
    try:
        for i in range(PROCESSES):
            command = [sys.executable, "-m", "tests.support.worker_process"]
            arguments = [address, str(PROCESSES), str(i), str(files[i])]
            with logs[i].open("w") as log:
                started.append(
                    subprocess.Popen(
                        command + arguments,
                        cwd=Path(__file__).parents[1],
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        env=os.environ | {"JAX_PLATFORMS": "cpu"},
                    )
                )
        codes = [process.wait(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    assert codes == [0] * PROCESSES, "\n".join(log.read_text()[-2000:] for log in logs)

    found = [dict(np.load(file)) for file in files]
    assert [int(f.pop("memory_limit")) for f in found] == [2**40 - PROCESSES] * 2
    assert all(len(f) == 3 * 2 * DEVICES // PROCESSES for f in found)
    everything = found[0] | found[1]
    wanted = alone()
    for way in ("checked", "unchecked", "mesh"):
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
