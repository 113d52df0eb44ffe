"""A training that is killed inside a window, and goes on as if nothing had happened.

    python examples/resume.py

The same training runs twice:

* in a process that is killed, by a real SIGKILL in the middle of a window; then in this
  one, which finds the newest checkpoint, saved inside a window too, and goes on with
  that window open;
* uninterrupted, from the first micro-step to the last.

Parameters and optimizer state end the same bit for bit, or the example fails.

The data come in another order in every epoch, and the network has dropout. Both follow
from the number of the micro-step, which names the checkpoint: nothing else needs to be
saved. What is worth copying is `micro_batch` and `train`; the data are made up.
"""

import argparse
import functools
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from rich.console import Console

import optax_accum as oa

EXAMPLES, SIZE = 640, 32  # all of them, and those of one micro-batch
K = 4  # micro-batches to a window
MICRO_STEPS = 45  # two epochs and a quarter; the last window stays open
SAVE_EVERY = 5  # micro-steps; not a multiple of K, so most checkpoints are in a window
KILL_AFTER = 38  # micro-steps: 2 of 4 in the tenth window

Batch = tuple[np.ndarray, np.ndarray]


def mean_loss(params: Any, batch: Batch, key: jax.Array) -> jax.Array:
    """The mean cross-entropy of a network with one hidden layer and dropout."""
    inputs, labels = batch
    hidden = jax.nn.gelu(inputs @ params["w1"] + params["b1"])
    keep = jax.random.bernoulli(key, 0.8, hidden.shape)
    logits = jnp.where(keep, hidden / 0.8, 0) @ params["w2"] + params["b2"]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def make_transformation() -> Any:
    schedule = optax.cosine_decay_schedule(1e-2, MICRO_STEPS // K)
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))
    return oa.accumulate(inner, every_k=K)


def initial_params() -> Any:
    random = np.random.default_rng(0)
    return {
        "w1": jnp.asarray(random.normal(size=(16, 64)) / 4, jnp.float32),
        "b1": jnp.zeros(64),
        "w2": jnp.asarray(random.normal(size=(64, 10)) / 8, jnp.float32),
        "b2": jnp.zeros(10),
    }


def made_up_data() -> Batch:
    """Inputs, and the largest of ten sums over them."""
    random = np.random.default_rng(1)
    inputs = random.normal(size=(EXAMPLES, 16)).astype(np.float32)
    return inputs, (inputs @ random.normal(size=(16, 10))).argmax(-1)


# --- To copy ---


def micro_batch(data: Batch, number: int) -> Batch:
    """The training's micro-batch of this number: the same whenever it is asked for."""
    inputs, labels = data
    epoch, place = divmod(number, EXAMPLES // SIZE)
    order = np.random.default_rng(epoch).permutation(EXAMPLES)
    chosen = order[place * SIZE : (place + 1) * SIZE]
    return inputs[chosen], labels[chosen]


def train(folder: Path, data: Batch, kill_after: int | None = None) -> Any:
    """Trains from the newest checkpoint in `folder`, or from the start."""
    tx = make_transformation()

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, batch, number):
        key = jax.random.fold_in(jax.random.key(0), number)
        loss, grads = jax.value_and_grad(mean_loss)(params, batch, key)
        return tx.update_params(grads, state, params, weight=SIZE, value=loss)

    params = initial_params()
    state = tx.init(params)
    options = ocp.CheckpointManagerOptions(
        save_interval_steps=SAVE_EVERY, max_to_keep=2
    )
    with ocp.CheckpointManager(folder, options=options) as manager:
        taken = manager.latest_step() or 0  # how many micro-steps there were
        if taken:
            params, state = manager.restore(
                taken, args=ocp.args.StandardRestore((params, state))
            )
        tell("starts", taken, state)
        for number in range(taken, MICRO_STEPS):
            batch = micro_batch(data, number)
            params, state = step(params, state, batch, number)
            taken = number + 1
            manager.save(taken, args=ocp.args.StandardSave((params, state)))
            if taken == kill_after:
                tell("is killed", taken, state)
                kill_this_process(manager)
    tell("ends", taken, state)
    return params, state


# --- Only to show that it works ---


def tell(what: str, taken: int, state: Any) -> None:
    updates, seen = int(oa.gradient_step(state)), int(oa.micro_step(state))
    window = f"window {updates + 1} is open with {seen} of {K}"
    if not seen:
        window = "no window is open"
    # Flushed, because a process that is killed prints nothing more.
    print(f"  {what} at micro-step {taken}: {window}", flush=True)


def kill_this_process(manager: ocp.CheckpointManager) -> None:
    # Only so that this prints the same every time. A save that is cut off leaves no
    # checkpoint, and the training would go on from the one before.
    manager.wait_until_finished()
    os.kill(os.getpid(), signal.SIGKILL)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--kill-after", type=int, default=KILL_AFTER, help=f"(default: {KILL_AFTER})")
    add("--be-killed-in", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not 1 <= options.kill_after <= MICRO_STEPS:
        parser.error(f"--kill-after must be between 1 and {MICRO_STEPS}")
    data = made_up_data()
    if options.be_killed_in:
        train(options.be_killed_in, data, options.kill_after)

    console = Console()
    Path("out").mkdir(exist_ok=True)
    out = Path(tempfile.mkdtemp(prefix="resume-", dir="out")).resolve()
    command = [sys.executable, __file__, "--be-killed-in", str(out / "interrupted")]
    command += ["--kill-after", str(options.kill_after)]

    console.print("[bold]to be killed")
    status = subprocess.run(command, check=False).returncode
    print(f"  exit status {status}")
    if status != -signal.SIGKILL:
        console.print(f"[red]FAILED: the exit status should be {-signal.SIGKILL}")
        return 1
    every = f"there is a checkpoint at every {SAVE_EVERY}th micro-step"
    console.print(f"[bold]started again[/bold], from the newest: {every}")
    interrupted = train(out / "interrupted", data)
    console.print("[bold]uninterrupted")
    uninterrupted = train(out / "uninterrupted", data)

    pairs = zip(*map(jax.tree.leaves, (interrupted, uninterrupted)), strict=True)
    same = [np.asarray(x).tobytes() == np.asarray(y).tobytes() for x, y in pairs]
    if not all(same):
        console.print(f"[red]FAILED: {same.count(False)} of {len(same)} arrays differ")
        return 1
    print(f"All {len(same)} arrays of parameters and optimizer state are the same,")
    print(f"bit for bit. The checkpoints are in {out.relative_to(Path.cwd())}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
