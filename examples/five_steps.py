"""Gradient accumulation in five steps, with all numbers.

    python examples/five_steps.py

A model with two parameters learns the price of a taxi ride from ten rides, in five
micro-batches of two. Each row of the table shows the state after a micro-batch. S is
the sum of the gradients, and W the sum of the weights. The parameters stay the same
until the fifth micro-batch, the boundary. There the optimizer runs once, on S / W: the
gradient of all ten rides.

docs/what-is-gradient-accumulation.md walks through these numbers.
"""

import jax
import jax.numpy as jnp
import optax
from rich import box
from rich.console import Console
from rich.table import Table

import optax_accum as oa

kilometres = jnp.array([1.0, 2, 1, 3, 2, 4, 3, 1, 4, 2])
prices = jnp.array([15.0, 25, 15, 35, 15, 50, 40, 25, 50, 30])


def loss_fn(params, x, y):
    """The mean squared error over rides of `x` kilometres and price `y`."""
    return jnp.mean((params["w"] * x + params["b"] - y) ** 2)


tx = oa.accumulate(optax.sgd(1 / 16), every_k=5)


@jax.jit
def train_step(params, state, x, y):
    loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
    params, state = tx.update_params(grads, state, params, value=loss)
    return params, state, loss, grads


def pair(tree):
    return f"{tree['w']:g}, {tree['b']:g}"


caption = "Pairs are w, b. S: sum of gradients. W: sum of weights."
table = Table("step", "loss", box=box.SIMPLE_HEAD, caption=caption)
for column in ("gradient", "S", "W", "S / W", "updated", "parameters"):
    table.add_column(column, justify="right")

params = {"w": jnp.array(20.0), "b": jnp.array(0.0)}  # 20 for each kilometre
state = tx.init(params)
parts = zip(jnp.split(kilometres, 5), jnp.split(prices, 5), strict=True)
for number, (x, y) in enumerate(parts, start=1):
    params, state, loss, grads = train_step(params, state, x, y)
    S, W = state.window.grads, state.window.weight
    table.add_row(
        f"{number}",
        f"{loss:g}",
        pair(grads),
        pair(S),
        f"{W:g}",
        pair({"w": S["w"] / W, "b": S["b"] / W}),
        f"{oa.has_updated(state)}",
        pair(params),
    )
Console().print(table)
before, after = state.window.loss / W, loss_fn(params, kilometres, prices)
print(f"The mean loss of the ten rides falls from {before:g} to {after:g}.")
