"""What goes from micro-batch to micro-batch: which leaves, and in which types."""

from typing import Any

import jax

from optax_accum import _flow, _tree
from optax_accum._types import Tree


def is_written(run: Any, carry: Tree, *args: Any) -> list[bool]:
    """For each leaf of `carry`, whether `run` returns anything else for it.

    What it does not write, such as a frozen part of a model, goes neither round the
    loop nor over the devices.

    Args:
      run: A `jax.jit` of ``run(carry, *args)``, whose result has a `carry`.
      carry: The carry before the first micro-batch.
      *args: Whatever else `run` takes.
    """
    if not jax.tree.leaves(carry):
        return []
    sources = _flow.of_call(run, carry, *args)
    shapes = jax.eval_shape(run, carry, *args)
    numbers = jax.tree.leaves(_tree.numbered(shapes).carry)
    return [sources[number].same != i for i, number in enumerate(numbers)]


def first(
    run: Any, before: Tree, is_written: list[bool], *args: Any
) -> tuple[list[Any], Any]:
    """What is written, in the type in which it comes back, and what `run` returns.

    Args:
      run: As in `is_written`.
      before: The carry before the first micro-batch.
      is_written: For each leaf, whether it is; the others become ``None``.
      *args: As in `is_written`.
    """
    leaves = jax.tree.leaves(before)
    carry = [x if w else None for x, w in zip(leaves, is_written, strict=True)]
    while True:
        shapes = jax.eval_shape(run, _tree.filled(before, carry), *args)
        after = _tree.kept_like(carry, shapes.carry)
        cast = jax.tree.map(_tree.vary_like, carry, after)
        # By leaves: not every container knows its equals.
        types = [list(map(jax.typeof, jax.tree.leaves(c))) for c in (cast, carry)]
        if types[0] == types[1]:
            return carry, shapes
        carry = cast
