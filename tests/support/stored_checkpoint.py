"""Writes `tests/data/first`: a checkpoint that every version must restore.

    python tests/support/stored_checkpoint.py

It was run once, when the fields of `AccumulateState` became what they are, and is not
to be run again: what it wrote then is in people's checkpoints.

`checkpoint` was saved with Orbax in the middle of the second window, after `SAVED` of
the micro-steps. `micro_steps.npz` holds what all of them were given, and the leaves of
parameters and state when it was saved and in the end, as that version computed them.
"""

import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import optax_accum as oa

FOLDER = Path(__file__).parents[1] / "data" / "first"
K, SAVED, MICRO_STEPS = 4, 7, 12  # saved at 3 of 4 in the second of three windows
SHAPES = {"w": (3, 4), "b": (4,)}


def transformation():
    inner = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1))
    return oa.accumulate(inner, K, skip=oa.skip_not_finite)


def initial_params():
    return {name: jnp.ones(shape) for name, shape in SHAPES.items()}


def made_up():
    """What the micro-steps are given, on a first axis of micro-steps; one is NaN."""
    random = np.random.default_rng(0)
    inputs = {
        name: random.normal(size=(MICRO_STEPS, *shape)).astype(np.float32)
        for name, shape in SHAPES.items()
    }
    inputs["b"][SAVED - 2] = np.nan
    inputs["weight"] = random.integers(1, 20, MICRO_STEPS).astype(np.float32)
    inputs["value"] = random.normal(size=MICRO_STEPS).astype(np.float32)
    return inputs


def run(params, state, inputs, micro_steps):
    """Parameters and state after `micro_steps`, a range."""
    tx = transformation()

    @jax.jit
    def step(params, state, given):
        grads = {name: given[name] for name in SHAPES}
        return tx.update_params(
            grads, state, params, weight=given["weight"], value=given["value"]
        )

    for i in micro_steps:
        given = {name: x[i] for name, x in inputs.items()}
        params, state = step(params, state, given)
    return params, state


def numbered(name, tree):
    return {f"{name}_{i:02}": x for i, x in enumerate(jax.tree.leaves(tree))}


def main():
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    inputs, params = made_up(), initial_params()
    start = params, transformation().init(params)
    saved = run(*start, inputs, range(SAVED))
    end = run(*saved, inputs, range(SAVED, MICRO_STEPS))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(FOLDER / "checkpoint", saved)
    leaves = numbered("saved", saved) | numbered("end", end)
    np.savez_compressed(FOLDER / "micro_steps.npz", **inputs, **leaves)
    print(f"written by {oa.__file__}: {int(oa.micro_step(saved[1]))} of {K}")


if __name__ == "__main__":
    main()
