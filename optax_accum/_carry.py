"""What goes from micro-batch to micro-batch: which leaves, and in which types."""

from collections.abc import Sequence
from typing import Any

import jax

from optax_accum import _flow, _tree
from optax_accum._types import Scalar, Tree


def is_written(runs: Sequence[Any], carry: Tree, index: Scalar) -> list[bool]:
    """For each leaf of `carry`, whether one of `runs` returns anything else for it.

    What they do not write, such as a frozen part of a model, goes neither round the
    loop nor over the devices.

    Args:
      runs: For each size of a micro-batch a `jax.jit` of ``run(carry, index)``, whose
        result has a `carry`.
      carry: The carry before the first micro-batch.
      index: Like the number of a micro-batch.
    """
    if not jax.tree.leaves(carry):
        return []
    found = []
    for run in runs:
        sources = _flow.of_call(run, carry, index)
        shapes = jax.eval_shape(run, carry, index)
        numbers = jax.tree.leaves(_tree.numbered(shapes).carry)
        found.append([sources[n].same != i for i, n in enumerate(numbers)])
    return [any(each) for each in zip(*found, strict=True)]


def first(
    run: Any, before: Tree, is_written: list[bool], index: Scalar
) -> tuple[list[Any], Any]:
    """What is written, in the type in which it comes back, and what `run` returns.

    Args:
      run: One of those in `is_written`.
      before: The carry before the first micro-batch.
      is_written: For each leaf, whether it is; the others become ``None``.
      index: As in `is_written`.
    """
    leaves = jax.tree.leaves(before)
    carry = [x if w else None for x, w in zip(leaves, is_written, strict=True)]
    while True:
        shapes = jax.eval_shape(run, _tree.filled(before, carry), index)
        after = _tree.kept_like(carry, shapes.carry)
        cast = jax.tree.map(_tree.vary_like, carry, after)
        # By leaves: not every container knows its equals.
        types = [list(map(jax.typeof, jax.tree.leaves(c))) for c in (cast, carry)]
        if types[0] == types[1]:
            return carry, shapes
        carry = cast


def after(before: Tree, written: list[Any]) -> Tree:
    """The carry after the last micro-batch.

    A leaf that is not written is not an output, and stays the very same arrays.
    """
    return _tree.filled(_tree.as_jax_arrays(before), written)
