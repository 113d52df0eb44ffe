"""What exchanging once per update is worth: bytes and time, from plain `jax.jit`.

Every way trains the same model on a mesh, k micro-batches to an update, one to a call.
All take turns within each round, which spreads whatever else the machine does over
them. Compare the ratios; the milliseconds are this machine's at that hour. Bytes are
those of the collectives in the compiled programs, on one device.

value_and_grad(local=True)  its gradients stay on their devices, and go to
                            `accumulate(mesh=)`, which exchanges at the boundary
accumulate                  of gradients that the compiler has reduced, in every call
optax.MultiSteps            likewise

Two processes on this machine exchange over a socket. Simulated devices of one
process have no wires, and share the cores: their exchange is reading each other's
memory, which any real one costs more than.
"""

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_accum as oa
from benchmarks import shared
from tests.support import hlo

AXIS = "data"
OURS, ACCUMULATE, MULTI_STEPS = WAYS = (
    "`value_and_grad(mesh=, local=True)`, `accumulate(mesh=)`",
    "`accumulate`",
    "`optax.MultiSteps`",
)
PLACES = {"processes": (2, 1), "devices": (1, 8)}  # processes, devices of each


class Row(NamedTuple):
    """One way in one place; times are medians over the rounds."""

    processes: int
    devices: int  # of each process
    cores: int
    parameters: int
    k: int
    examples: int  # in a micro-batch of one device
    way: str
    exchanged_mb: float  # per update
    ms: float  # per update
    to_ours: float  # a median of ratios, each taken within one round


def loss(params: Any, x: jax.Array) -> jax.Array:
    """A network whose layers are used once each."""
    h = x
    for layer in params:
        h = h + jnp.tanh(h @ layer["w"] + layer["b"])
    return jnp.mean((h - x) ** 2)


def make_params(layers: int, width: int) -> list[dict[str, np.ndarray]]:
    """NumPy's arrays, which every process has alike."""
    random = np.random.default_rng(0)
    return [
        {
            "w": random.normal(0, width**-0.5, (width, width)).astype(np.float32),
            "b": np.zeros(width, np.float32),
        }
        for _ in range(layers)
    ]


def make(way: str, k: int, mesh: jax.sharding.Mesh) -> tuple[Any, Any]:
    """``(init, step)`` with ``step(params, state, x) -> (params, state)``."""
    optimizer = optax.adamw(1e-3)
    if way == MULTI_STEPS:
        multi_steps = optax.MultiSteps(optimizer, k)

        def reduced_step(params, state, x):
            grads = jax.grad(loss)(params, x)
            updates, state = multi_steps.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        return multi_steps.init, reduced_step

    grad: Any
    if way == OURS:
        grad = oa.grad(loss, num_microbatches=1, mesh=mesh, axis_name=AXIS, local=True)
        tx = oa.accumulate(optimizer, k, mesh=mesh, axis_name=AXIS)
    else:
        grad, tx = jax.grad(loss), oa.accumulate(optimizer, k)
    return tx.init, lambda params, state, x: tx.update_params(
        grad(params, x), state, params
    )


class Runner:
    """One way, compiled and ready to be timed an update at a time."""

    def __init__(self, way: str, k: int, params: Any, x: jax.Array):
        """Compiles."""
        mesh: Any = x.sharding.mesh  # type: ignore[attr-defined]
        everywhere = NamedSharding(mesh, P())
        init, step = make(way, k, mesh)
        self.way, self.k, self.x = way, k, x
        self.params = jax.device_put(params, everywhere)
        self.state = jax.jit(init)(self.params)
        self.step = (
            jax.jit(step, donate_argnums=(0, 1), out_shardings=(everywhere, None))
            .lower(self.params, self.state, x)
            .compile()
        )
        # What is in the boundary's branch runs once, the rest in every call.
        self.exchanged = sum(
            operation.nbytes * (1 if operation.place == "branch" else k)
            for operation in hlo.collectives(self.step)
        )
        self.seconds: list[float] = []

    def update(self) -> float:
        """Seconds of the k micro-steps of one update."""
        start = time.perf_counter()
        for _ in range(self.k):
            self.params, self.state = self.step(self.params, self.state, self.x)
            # Simulated devices share a few threads: queued steps can deadlock.
            jax.block_until_ready((self.params, self.state))
        return time.perf_counter() - start


def measure(options: argparse.Namespace) -> list[Row]:
    rows: list[Row] = []
    for name in shared.track(options.only or PLACES, "measuring"):
        rows += start(*PLACES[name], options)
    return rows


def start(processes: int, devices: int, options: argparse.Namespace) -> list[Row]:
    """Runs `work` in so many processes; the first one's rows."""
    layers, width = (2, 256) if options.quick else (4, 1024)
    sizes = {"layers": layers, "width": width, "k": options.k}
    given = sizes | {"examples": options.examples, "rounds": options.rounds}
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
    }
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder) / f"{i}.log" for i in range(processes)]
        started = []
        try:
            for i, log in enumerate(logs):
                arguments = {"address": address, "processes": processes, "process": i}
                command = [sys.executable, "-m", "benchmarks.exchange"]
                with log.open("w") as file:
                    started.append(
                        subprocess.Popen(
                            [*command, folder, json.dumps(given | arguments)],
                            stdout=file,
                            stderr=subprocess.STDOUT,
                            env=environment,
                        )
                    )
            codes = [process.wait() for process in started]
        finally:
            for process in started:
                process.kill()
        if any(codes):
            raise SystemExit("\n".join(log.read_text()[-2000:] for log in logs))
        return [Row(*row) for row in json.loads((Path(folder) / "rows").read_text())]


def work(
    folder: Path,
    *,
    address: str,
    processes: int,
    process: int,
    layers: int,
    width: int,
    k: int,
    examples: int,
    rounds: int,
) -> None:
    """One of the processes: all ways, interleaved."""
    if processes > 1:
        jax.distributed.initialize(address, processes, process)
    count = jax.device_count()
    mesh = jax.make_mesh((count,), (AXIS,), axis_types=(AxisType.Auto,))
    params = make_params(layers, width)
    own = np.random.default_rng(process).normal(
        size=(jax.local_device_count() * examples, width)
    )
    x = jax.make_array_from_process_local_data(
        NamedSharding(mesh, P(AXIS)), own.astype(np.float32)
    )
    runners = {way: Runner(way, k, params, x) for way in WAYS}
    for number, runner in shared.in_turn(list(runners.values()), rounds + 1):
        seconds = runner.update()
        if number > 0:  # The first one warms up.
            runner.seconds.append(seconds)

    rows = [
        Row(
            processes=processes,
            devices=jax.local_device_count(),
            cores=os.cpu_count() or 1,
            parameters=sum(p.size for p in jax.tree.leaves(params)),
            k=k,
            examples=examples,
            way=way,
            exchanged_mb=runner.exchanged / 1e6,
            ms=1e3 * statistics.median(runner.seconds),
            to_ours=shared.median_ratio(runner.seconds, runners[OURS].seconds),
        )
        for way, runner in runners.items()
    ]
    if process == 0:
        (folder / "rows").write_text(json.dumps(rows))
    if processes > 1:
        jax.distributed.shutdown()


def table(rows: list[Row]) -> shared.Table:
    lines: list[tuple[str, ...]] = []
    for own in shared.grouped(rows, "processes").values():
        lines.append((f"**{place(own[0])}**", "", "", ""))
        lines += [
            (r.way, f"{r.exchanged_mb:.1f}", f"{r.ms:.0f}", f"{r.to_ours:.2f}")
            for r in own
        ]
    row = rows[0]
    return shared.Table(
        f"{row.parameters / 1e6:.2g}M parameters with AdamW, {row.k} micro-batches of "
        f"{row.examples} examples on each device to an update",
        (
            "way",
            "MB exchanged per update",
            "ms per update",
            "relative to the first",
        ),
        "lrrr",
        lines,
    )


def place(row: Row) -> str:
    if row.processes > 1:
        return f"{row.processes} processes, over a socket, on {row.cores} cores"
    return f"{row.devices} simulated devices in one process, on {row.cores} cores"


def check(rows: list[Row]) -> str:
    """One exchange against k, as far as the programs show."""
    for own in shared.grouped(rows, "processes").values():
        ways = shared.last(own, "way")
        for way in (ACCUMULATE, MULTI_STEPS):
            times = ways[way].exchanged_mb / ways[OURS].exchanged_mb
            if round(times, 2) != own[0].k:
                raise SystemExit(f"{way} exchanges {times:.2f} times the data")
    return f"the others exchange {rows[0].k} times the data"


def add_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--k", type=int, default=8, help="micro-batches to an update (default: 8)")
    add("--examples", type=int, default=4, help="in one, on each device (default: 4)")


BENCHMARK = shared.Benchmark(
    row=Row,
    measure=measure,
    tables=lambda rows: [table(rows)],
    check=check,
    page="collectives.md",
    page_table=table,
    rounds=10,
    choices=tuple(PLACES),
    add_options=add_options,
)

if __name__ == "__main__":
    work(Path(sys.argv[1]), **json.loads(sys.argv[2]))
