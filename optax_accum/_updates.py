"""Where the updates go: to the caller, or into the parameters."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import dtypes

from optax_accum import _tree
from optax_accum._boundary import Buffers, Closing
from optax_accum._optimizer import BoundOptimizer
from optax_accum._overwrite import Overwritten
from optax_accum._types import Params, Tree, Updates


class ToParams(NamedTuple):
    """They are added to the parameters.

    Attributes:
      out: The parameters.
      overwritten: Which of them are not added to.
    """

    out: Params
    overwritten: Overwritten

    def write(self, updates: Updates, buffers: Buffers) -> Buffers:
        """The buffers with the updates in them."""
        out = self.overwritten.apply(apply_updates, buffers.out, updates)
        return buffers._replace(out=_tree.placed_like(out, buffers.out))

    def read(self, buffers: Buffers) -> Params:
        """The parameters."""
        return buffers.out


class ToCaller(NamedTuple):
    """They leave in the accumulator's buffers, if these fit.

    Attributes:
      params: The parameters, if the caller gave them.
      overwritten: Which of them the updates are to replace.
      shapes: The updates, as a tree of `jax.ShapeDtypeStruct`.
      indices: For each leaf of `shapes` the index of its buffer, or ``None`` if no
        buffer has its path, shape and dtype; it goes out by itself.
    """

    params: Params
    overwritten: Overwritten
    shapes: Updates
    indices: list[int | None]

    @classmethod
    def plan(
        cls, closing: Closing, optimizer: BoundOptimizer, params: Params
    ) -> "ToCaller":
        """Finds a buffer of the accumulator for each leaf of the updates.

        None is reused in three cases: a second phase still reads S; there is no
        branch, and so nothing to gain; S differs between devices and the updates do
        not.
        """
        is_local = closing.devices.axis_name is None
        may_reuse = is_local and closing.has_branch and not closing.two_phases
        accumulator = closing.window.grads if may_reuse else ()
        leaves = jax.tree_util.tree_leaves_with_path(accumulator)
        buffers = {path: (i, buffer) for i, (path, buffer) in enumerate(leaves)}

        def index(path: Any, update: jax.ShapeDtypeStruct) -> int | None:
            i, buffer = buffers.get(path, (None, None))
            if buffer is None or buffer.shape != update.shape:
                return None
            return i if update.dtype == buffer.dtype else None

        updates = jax.tree_util.tree_leaves_with_path(optimizer.shapes)
        return cls(
            params=params,
            overwritten=closing.overwritten,
            shapes=optimizer.shapes,
            indices=[index(path, update) for path, update in updates],
        )

    @property
    def out(self) -> list[jax.Array]:
        """Zeros for the updates that go out by themselves."""
        pairs = zip(jax.tree.leaves(self.shapes), self.indices, strict=True)
        return [_zeros(shape) for shape, index in pairs if index is None]

    def write(self, updates: Updates, buffers: Buffers) -> Buffers:
        """The buffers with the updates in them."""
        updates = self.overwritten.as_updates(updates, self.params)
        sums, structure = jax.tree.flatten(buffers.sums)
        others = []
        for update, index in zip(jax.tree.leaves(updates), self.indices, strict=True):
            if index is None:
                others.append(update)
            else:
                sums[index] = update
        return buffers._replace(sums=jax.tree.unflatten(structure, sums), out=others)

    def read(self, buffers: Buffers) -> Updates:
        """The updates, or zeros if there was no update."""
        sums, others = jax.tree.leaves(buffers.sums), iter(buffers.out)

        def take(shape: jax.ShapeDtypeStruct, index: int | None) -> jax.Array:
            if index is None:
                return next(others)
            zero = jnp.zeros([], shape.dtype)
            return jnp.where(buffers.has_updated, sums[index], zero)

        shapes, structure = jax.tree.flatten(self.shapes)
        leaves = [take(*pair) for pair in zip(shapes, self.indices, strict=True)]
        return jax.tree.unflatten(structure, leaves)


def apply_updates(params: Params, updates: Updates) -> Params:
    """`optax.apply_updates`, but a parameter without an update stays as it is."""

    def apply(p: Tree, u: Tree) -> Tree:
        has_update = u is not None and not _tree.is_float0(u)
        return optax.apply_updates(p, u) if has_update else p

    return jax.tree.map(apply, params, updates, is_leaf=lambda x: x is None)


def _zeros(shape: jax.ShapeDtypeStruct) -> Any:
    if _tree.is_float0(shape):
        return np.zeros(shape.shape, dtypes.float0)
    return _tree.zeros_like(shape)
