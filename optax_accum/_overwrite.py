"""Parameters that are not trained, but overwritten with their "gradient".

Some layers return the next value of a parameter as its gradient: Flax's fp8 layers do
so for their scales and the histories of their largest values, in the collection
``_overwrite_with_gradient``. Such a leaf has no gradient to average, and no optimizer
may see it. The micro-batches of a window all start from the same parameters, and what
they return is reduced by one of these:

=========  ===================================================
reduction  of the micro-batches that count
=========  ===================================================
``"max"``  the largest, entry by entry: Flax's histories
``"last"`` what the last one returned: Flax's scales
``"sum"``  the sum: a count, say
=========  ===================================================
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import KeyPath

from optax_accum import _tree, _validate
from optax_accum._types import Grads, Params, Scalar, Tree, Updates

REDUCTIONS = ("max", "last", "sum")

Overwrite = Callable[[str], str | None]  # from the path of a leaf to a reduction


@dataclasses.dataclass(frozen=True)
class Overwritten:
    """Which leaves are overwritten, and how they are reduced.

    Attributes:
      rule: A user's: from the path of a leaf, as ``"layer/scale"``, to a reduction, or
        ``None``. It is asked before Flax's collection is looked for.
    """

    rule: Overwrite | None = None

    def gradients(self, tree: Tree) -> Tree:
        """`tree` with ``None`` in place of what is overwritten."""
        return self.map(lambda reduction, x: None if reduction else x, tree)

    def others(self, tree: Tree) -> Tree:
        """`tree` with ``None`` in place of gradients."""
        return self.map(lambda reduction, x: x if reduction else None, tree)

    def any_in(self, tree: Tree) -> bool:
        """Whether a leaf of `tree` is overwritten."""
        return bool(jax.tree.leaves(self.map(lambda r, _: r, tree)))

    def empty(self, sums: Tree) -> Tree:
        """`sums` of zeros, as they are before the first micro-batch."""
        return self.map(lambda r, s: s - jnp.inf if r == "max" else s, sums)

    def add(
        self,
        old: Tree,
        new: Tree,
        counted: bool | Scalar,
        first: Scalar | None = None,
    ) -> Tree:
        """After one more micro-batch; ``None`` for gradients.

        Args:
          old: Before it.
          new: What it returned.
          counted: ``bool[]``, whether it counts.
          first: ``bool[]``, whether it is the first of its window.
        """

        def add(reduction: str | None, old: jax.Array, new: Any) -> jax.Array | None:
            if reduction is None:
                return None
            new = jnp.asarray(new).astype(old.dtype)
            if reduction == "last":
                return jnp.where(counted, new, old)
            nothing = jnp.full([], -jnp.inf if reduction == "max" else 0, old.dtype)
            new = jnp.where(counted, new, nothing)
            total = jnp.maximum(old, new) if reduction == "max" else old + new
            return total if first is None else jnp.where(first, new, total)

        return self.map(add, old, new)

    def over_devices(self, tree: Tree, devices: Any, weight: Scalar) -> Tree:
        """Of all devices, ``None`` for gradients; `weight` is this device's W."""
        return self.map(lambda r, x: r and devices.reduce(r, x, weight), tree)

    def unless_empty(self, grads: Grads, params: Params, weight: Scalar) -> Grads:
        """`grads` with the leaves of `params` in place of these if `weight` is 0."""
        if not self.any_in(grads):
            return grads

        def choose(reduction: str | None, new: jax.Array, old: Any) -> jax.Array:
            return jnp.where(weight != 0, new, old) if reduction else new

        return self.map(choose, grads, params)

    def around(
        self, inner: optax.GradientTransformationExtraArgs
    ) -> optax.GradientTransformationExtraArgs:
        """`inner` without these leaves; its updates hold their next values."""

        def init(params: Params) -> Tree:
            return inner.init(self.gradients(params))

        def update(
            grads: Grads, state: Tree, params: Params = None, **extra_args: Any
        ) -> tuple[Updates, Tree]:
            if not self.any_in(grads):
                return inner.update(grads, state, params, **extra_args)
            if params is None:
                raise ValueError(
                    "`params` are needed, because some of them are overwritten with "
                    "their gradient, as Flax's fp8 layers ask for: update(grads, "
                    "state, params)"
                )
            if "grad" in extra_args:
                extra_args["grad"] = self.gradients(extra_args["grad"])
            updates, state = inner.update(
                self.gradients(grads), state, self.gradients(params), **extra_args
            )
            return _tree.merge(updates, self.others(grads)), state

        return optax.GradientTransformationExtraArgs(init, update)

    def apply(
        self,
        apply_updates: Callable[[Params, Updates], Params],
        params: Params,
        updates: Updates,
    ) -> Params:
        """What `apply_updates` makes of the others, and the values of these."""
        trained = apply_updates(self.gradients(params), self.gradients(updates))
        return _tree.merge(trained, self.others(updates))

    def as_updates(self, updates: Updates, params: Params) -> Updates:
        """`updates` that, added to `params`, give the values of these leaves."""
        if not self.any_in(updates):
            return updates
        new, old = self.others(updates), self.others(params)
        differences = jax.tree.map(lambda n, o: n - o.astype(n.dtype), new, old)
        return _tree.merge(self.gradients(updates), differences)

    def map(self, function: Callable[..., Any], tree: Tree, *others: Tree) -> Tree:
        """``function(reduction or None, *leaves)`` of every leaf."""

        def of_leaf(path: KeyPath, *leaves: Any) -> Any:
            return function(self._reduction(path), *leaves)

        return jax.tree_util.tree_map_with_path(of_leaf, tree, *others)

    def _reduction(self, path: KeyPath) -> str | None:
        """That of the leaf at `path`, or ``None`` for a gradient."""
        if self.rule is not None:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            reduction = self.rule(name)
            if reduction is not None:
                _validate.one_of("overwrite", reduction, REDUCTIONS)
                return reduction
        # Not by name, which takes time in trees of thousands of leaves.
        keys = [getattr(entry, "key", None) for entry in path]
        if "_overwrite_with_gradient" not in keys:
            return None
        return "max" if "amax" in str(keys[-1]) else "last"
