"""Prints by how much resident memory rises when a planned step runs: run it alone."""

import json
import resource
import threading

import jax
import jax.numpy as jnp

import optax_accum as oa

LAYERS, WIDTH, BATCH = 12, 512, 32768


def loss(params, x):
    for w in params:
        x = jnp.tanh(x @ w)
    return jnp.mean(x**2)


def make_step(num_microbatches):
    grad = oa.grad(loss, num_microbatches=num_microbatches)
    return jax.jit(lambda params, x: (grad(params, x), x[::2]))


def resident() -> int:
    """The bytes of this process that are in memory now."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def main():
    params = [jnp.full((WIDTH, WIDTH), 0.01) for _ in range(LAYERS)]
    x = jnp.ones((BATCH, WIDTH))
    plan = oa.diagnose.plan_microbatches(
        make_step, params, x, candidates=[2], memory_limit=8 * 2**30
    )
    # Whatever running anything costs, paid before.
    jax.jit(lambda x: jnp.tanh(x @ x).sum())(jnp.ones((64, 64))).block_until_ready()

    highest, stop = [resident()], threading.Event()

    def watch():
        while not stop.wait(0.002):
            highest.append(resident())

    before = highest[0]
    watcher = threading.Thread(target=watch)
    watcher.start()
    outputs = jax.block_until_ready(plan.step(params, x))
    stop.set()
    watcher.join()
    memory = plan.candidates[0].memory
    assert memory is not None
    rise = max(*highest, resident()) - before
    del outputs
    # The arguments were there before.
    print(json.dumps({"rise": rise, "planned": memory.total - memory.arguments}))


if __name__ == "__main__":
    main()
