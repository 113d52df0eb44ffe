"""How the boundary stays free of copies.

`lax.cond` runs the optimizer at the boundary alone, but XLA copies whatever its two
branches cannot share. What keeps the compiled program free of copies, found by
reading its HLO:

* Doing nothing is the false branch, so that it becomes XLA's first. The other way
  around everything is copied (https://github.com/jax-ml/jax/issues/39449).
* A branch returns only buffers that it was given, leaf by leaf in the same shape and
  dtype, so that both branches write in place. The updates therefore leave in the
  accumulator's buffers, which the next window overwrites anyway: its *slots*.
* No branch writes a buffer twice. The accumulator is not zeroed in the branch; the
  next window's first micro-step selects (see `_window.add`).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import dtypes, lax

from optax_accum import _types, _window


class Totals(NamedTuple):
    """A whole window, before it is divided.

    Attributes:
      sums: S.
      value: The sum of the values, or ``None`` where there are none.
      weight: W.
      noise: The sums that the noise scale is estimated from, or ``None``.
      square: ‖S‖², or ``None`` where it is not needed.
    """

    sums: Any
    value: jax.Array | None
    weight: jax.Array
    noise: Any
    square: jax.Array | None


Collect = Callable[[Any], Totals]
Run = Callable[[Totals, Any], tuple[Any, Any]]
Write = Callable[[Any, Any], Any]


def run_at(
    boundary: bool | jax.Array,
    collect: Collect,
    run: Run,
    write: Write,
    target: Any,
    inner_state: Any,
    *,
    guard: bool,
) -> tuple[jax.Array, Any, Any]:
    """Runs the inner optimizer at the boundary, and there alone.

    Args:
      boundary: A Python bool builds no `lax.cond`.
      collect: ``target -> Totals``: the window, over all devices.
      run: ``(Totals, inner_state) -> (updates, inner_state)``.
      write: ``(updates, target) -> target``: puts the updates where they go.
      target: A tree of arrays; `write` keeps its type.
      inner_state: A tree of arrays; `run` keeps its type.
      guard: Whether only `collect` knows that the window is not empty. If it is empty,
        everything stays as it is.

    Returns:
      ``(updated, target, inner_state)``.
    """

    def apply(totals, no, target, inner_state):
        updates, new_state = run(totals, inner_state)
        return ~no, write(updates, target), new_state

    def close(*buffers):
        totals = collect(buffers[1])
        if not guard:
            return apply(totals, *buffers)
        nonempty = totals.weight != 0
        if isinstance(boundary, bool):
            new = apply(totals, *buffers)
            return jax.tree.map(lambda n, o: jnp.where(nonempty, n, o), new, buffers)
        # A second branch, because a select reads and copies what it keeps.
        return lax.cond(
            nonempty, functools.partial(apply, totals), lambda *same: same, *buffers
        )

    buffers = jnp.zeros([], bool), target, inner_state
    if isinstance(boundary, bool):
        return close(*buffers) if boundary else buffers
    return lax.cond(boundary, close, lambda *same: same, *buffers)


def run_in_turn(
    boundary: jax.Array,
    collect: Collect,
    run: Run,
    write: Write,
    target: Any,
    inner_state: Any,
) -> tuple[jax.Array, Any, Any]:
    """As `run_at`, but the inner state is computed after the updates.

    There are two branches, and the second waits for the first, whose flag it asks. The
    inner optimizer is traced in both; XLA removes from each what it does not return,
    but what updates and state have in common is computed twice, once per window.
    """

    def updates_only(no, target):
        updates, _ = run(collect(target), inner_state)
        return ~no, write(updates, target)

    def state_only(inner_state):
        _, new_state = run(collect(target), inner_state)
        return new_state

    updated, new_target = lax.cond(
        boundary, updates_only, lambda *same: same, jnp.zeros([], bool), target
    )
    inner_state = lax.cond(updated, state_only, lambda same: same, inner_state)
    return updated, new_target, inner_state


def rounds(accumulator: Any, updates: Any, inner_state: Any) -> bool:
    """Whether what the inner optimizer computed is rounded to be kept.

    Then a rounded moment and the unrounded one that the updates are computed from are
    live together, and XLA copies every moment unless the updates come first.
    """

    def bits(tree):
        leaves = jax.tree.leaves(_window.keep_inexact(tree))
        return [jnp.finfo(x.dtype).bits for x in leaves if x.ndim]

    widest = max(bits(accumulator), default=0)
    return any(kept < widest for kept in bits((updates, inner_state)))


def apply_updates(params: Any, updates: Any) -> Any:
    """`optax.apply_updates`, but a parameter without an update stays as it is."""

    def apply(p, u):
        has_update = u is not None and not _window.is_float0(u)
        return optax.apply_updates(p, u) if has_update else p

    return jax.tree.map(apply, params, updates, is_leaf=lambda x: x is None)


class Slots(NamedTuple):
    """Which update leaves in which accumulator's buffer.

    Attributes:
      shapes: The updates, as a tree of `jax.ShapeDtypeStruct`.
      homes: For each leaf of `shapes` the index of its slot, or ``None`` where no
        slot has its path, shape and dtype; it goes out by itself.
    """

    shapes: Any
    homes: list[int | None]

    @classmethod
    def plan(cls, shapes: Any, accumulator: Any) -> "Slots":
        """Finds a slot in `accumulator` for each leaf of the updates."""
        slots = {
            path: (index, slot)
            for index, (path, slot) in enumerate(
                jax.tree_util.tree_leaves_with_path(accumulator)
            )
        }

        def home(path, update):
            index, slot = slots.get(path, (None, None))
            if slot is None or slot.shape != update.shape:
                return None
            return index if update.dtype == slot.dtype else None

        leaves = jax.tree_util.tree_leaves_with_path(shapes)
        return cls(shapes, [home(path, update) for path, update in leaves])

    def loose(self) -> list[Any]:
        """Zeros for the updates that have no slot."""
        pairs = zip(jax.tree.leaves(self.shapes), self.homes, strict=True)
        return [_zeros(shape) for shape, home in pairs if home is None]

    def pack(self, updates: Any, accumulator: Any) -> tuple[Any, list[Any]]:
        """The accumulator with the updates in its slots, and those without one."""
        slots, structure = jax.tree.flatten(accumulator)
        loose = []
        for update, home in zip(jax.tree.leaves(updates), self.homes, strict=True):
            if home is None:
                loose.append(update)
            else:
                slots[home] = update
        return jax.tree.unflatten(structure, slots), loose

    def unpack(self, accumulator: Any, loose: list[Any], updated: jax.Array) -> Any:
        """The updates, or zeros where nothing was `updated`."""
        slots, rest = jax.tree.leaves(accumulator), iter(loose)

        def take(shape, home):
            if home is None:
                return next(rest)
            return jnp.where(updated, slots[home], jnp.zeros([], shape.dtype))

        shapes, structure = jax.tree.flatten(self.shapes)
        leaves = [take(*pair) for pair in zip(shapes, self.homes, strict=True)]
        return jax.tree.unflatten(structure, leaves)


def _zeros(shape: Any) -> Any:
    if _window.is_float0(shape):
        return np.zeros(shape.shape, dtypes.float0)
    return _types.zeros_like(shape)
