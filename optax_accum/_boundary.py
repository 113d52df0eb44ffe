"""The boundary: the inner optimizer in a branch, without copies.

`lax.cond` runs the optimizer at the boundary alone, but XLA copies whatever its two
branches cannot share. What keeps the compiled program free of copies, found by
reading its HLO:

* Doing nothing is the false branch, so that it becomes XLA's first. The other way
  around everything is copied (https://github.com/jax-ml/jax/issues/39449).
* A branch returns only buffers that it was given, leaf by leaf in the same shape and
  dtype, so that both branches write in place. `update`'s updates therefore leave in the
  accumulator's buffers, which the next window overwrites anyway.
* No branch writes a buffer twice. The accumulator is not zeroed in the branch; the
  next window's first micro-step selects (see `_window.add`).
* What is rounded to be kept is computed last (see `rounds`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import dtypes, lax

from optax_accum import _tree
from optax_accum._inner import Inner
from optax_accum._types import Grads, Params, Reduction, Scalar, Tree, Updates
from optax_accum._window import Devices, Window


class Buffers(NamedTuple):
    """What the boundary may write to. Off the boundary all of it stays the same.

    Attributes:
      has_updated: ``bool[]``, False before.
      sums: S. Updates may leave in it.
      out: The parameters, or the updates that do not leave in `sums`.
      inner_state: The inner optimizer's.
      noise: The averages of the noise scale.
    """

    has_updated: Scalar
    sums: Grads
    out: Tree
    inner_state: Tree
    noise: Tree


class Tracker(Protocol):
    """What measures the noise scale."""

    def close(
        self, noise: Tree, total: Window, square: Scalar | None, micro_steps: Scalar
    ) -> Tree:
        """The averages after a window of these totals; `square` is ‖S‖², if known."""


class Closing(NamedTuple):
    """A window at what may be its end.

    Attributes:
      ends: Whether it ends here.
      updates: Whether the inner optimizer runs: it ends and, as far as one device
        knows, is not empty. A Python bool builds no `lax.cond`.
      may_be_empty: Whether only the sum over all devices, or the run, tells that W is
        not 0. If it is, everything stays as it is.
      window: Its sums, each device's own.
      reduction: How they are divided.
      devices: Those that share the window.
      inner_state: The inner optimizer's state.
      noise: The averages of the noise scale.
      tracker: What measures it.
      micro_steps: How many there were.
      square: ‖S‖², if the noise scale needs it before the branch.
    """

    ends: bool | jax.Array
    updates: bool | jax.Array
    may_be_empty: bool
    window: Window
    reduction: Reduction
    devices: Devices
    inner_state: Tree
    noise: Tree
    tracker: Tracker
    micro_steps: Scalar
    square: Scalar | None

    @property
    def has_branch(self) -> bool:
        """Whether only the run tells if the inner optimizer runs."""
        return not isinstance(self.updates, bool)


def close(
    closing: Closing,
    inner: Inner,
    write: Callable[[Updates, Buffers], Buffers],
    out: Tree,
    *,
    two_phase: bool,
) -> Buffers:
    """Runs the inner optimizer at the boundary, and there alone.

    Args:
      closing: The window, and whether it ends.
      inner: ``(grads, inner_state, value) -> (updates, inner_state)``.
      write: Puts the updates where they go.
      out: The parameters, or zeros for the updates that do not leave in S.
      two_phase: Whether to compute the state in a second branch, after the updates.
        XLA removes from each branch what it does not return, but what updates and
        state have in common is computed twice, once per window.

    Returns:
      The buffers, in the same types.
    """

    def do_update(buffers: Buffers) -> Buffers:
        window = closing.window._replace(grads=buffers.sums)
        total = window.over_devices(closing.devices)

        def apply(buffers: Buffers) -> Buffers:
            noise = closing.tracker.close(
                buffers.noise, total, closing.square, closing.micro_steps
            )
            value, grads = total.result(closing.reduction)
            updates, inner_state = inner(grads, buffers.inner_state, value)
            return write(updates, buffers)._replace(
                has_updated=~buffers.has_updated, inner_state=inner_state, noise=noise
            )

        if not closing.may_be_empty:
            return apply(buffers)
        if not closing.has_branch:
            return jax.tree.map(
                lambda new, old: jnp.where(total.weight != 0, new, old),
                apply(buffers),
                buffers,
            )
        # A second branch, because a select reads and copies what it keeps.
        return lax.cond(total.weight != 0, apply, same, buffers)

    def same(buffers: Buffers) -> Buffers:
        return buffers

    buffers = Buffers(
        has_updated=jnp.zeros([], bool),
        sums=closing.window.grads,
        out=out,
        inner_state=closing.inner_state,
        noise=closing.noise,
    )
    if isinstance(closing.updates, bool):
        return do_update(buffers) if closing.updates else buffers
    if not two_phase:
        return lax.cond(closing.updates, do_update, same, buffers)

    def write_updates(buffers: Buffers) -> Buffers:
        return do_update(buffers)._replace(
            inner_state=buffers.inner_state, noise=buffers.noise
        )

    def write_state(buffers: Buffers) -> Buffers:
        new = do_update(buffers)
        return buffers._replace(inner_state=new.inner_state, noise=new.noise)

    updated = lax.cond(closing.updates, write_updates, same, buffers)
    # It asks the first one's flag, and so waits for it.
    after = lax.cond(updated.has_updated, write_state, same, buffers)
    return updated._replace(inner_state=after.inner_state, noise=after.noise)


def rounds(closing: Closing, updates: Updates) -> bool:
    """Whether what the inner optimizer computes in a branch is rounded to be kept.

    Then a rounded moment and the unrounded one that the updates are computed from are
    live together, and XLA copies every moment unless the updates come first.
    """

    def bits(tree: Tree) -> list[int]:
        leaves = jax.tree.leaves(_tree.keep_inexact(tree))
        return [jnp.finfo(x.dtype).bits for x in leaves if x.ndim]

    # Across devices the gradients would be exchanged twice.
    if not closing.has_branch or closing.devices.axis_name is not None:
        return False
    widest = max(bits(closing.window.grads), default=0)
    return any(kept < widest for kept in bits((updates, closing.inner_state)))


def apply_updates(params: Params, updates: Updates) -> Params:
    """`optax.apply_updates`, but a parameter without an update stays as it is."""

    def apply(p: Any, u: Any) -> Any:
        has_update = u is not None and not _tree.is_float0(u)
        return optax.apply_updates(p, u) if has_update else p

    return jax.tree.map(apply, params, updates, is_leaf=lambda x: x is None)


class Reused(NamedTuple):
    """Which update leaves in which of the accumulator's buffers.

    Attributes:
      shapes: The updates, as a tree of `jax.ShapeDtypeStruct`.
      indices: For each leaf of `shapes` the index of its buffer, or ``None`` where no
        buffer has its path, shape and dtype; it goes out by itself.
    """

    shapes: Updates
    indices: list[int | None]

    @classmethod
    def plan(cls, shapes: Updates, closing: Closing, *, two_phase: bool) -> "Reused":
        """Finds a buffer of the accumulator for each leaf of the updates.

        There are none if the second phase still reads S, if nothing is gained because
        there is no branch, or if S is each device's own and the updates are not.
        """
        is_local = closing.devices.axis_name is None
        may_reuse = is_local and closing.has_branch and not two_phase
        accumulator = closing.window.grads if may_reuse else ()
        leaves = jax.tree_util.tree_leaves_with_path(accumulator)
        buffers = {path: (i, buffer) for i, (path, buffer) in enumerate(leaves)}

        def index(path: Any, update: Any) -> int | None:
            i, buffer = buffers.get(path, (None, None))
            if buffer is None or buffer.shape != update.shape:
                return None
            return i if update.dtype == buffer.dtype else None

        updates = jax.tree_util.tree_leaves_with_path(shapes)
        return cls(shapes, [index(path, update) for path, update in updates])

    def others(self) -> list[jax.Array]:
        """Zeros for the updates that go out by themselves."""
        pairs = zip(jax.tree.leaves(self.shapes), self.indices, strict=True)
        return [_zeros(shape) for shape, index in pairs if index is None]

    def write(self, updates: Updates, buffers: Buffers) -> Buffers:
        """The buffers with the updates in them."""
        sums, structure = jax.tree.flatten(buffers.sums)
        others = []
        for update, index in zip(jax.tree.leaves(updates), self.indices, strict=True):
            if index is None:
                others.append(update)
            else:
                sums[index] = update
        return buffers._replace(sums=jax.tree.unflatten(structure, sums), out=others)

    def read(self, buffers: Buffers) -> Updates:
        """The updates, or zeros where nothing was updated."""
        sums, others = jax.tree.leaves(buffers.sums), iter(buffers.out)

        def take(shape: Any, index: int | None) -> jax.Array:
            if index is None:
                return next(others)
            zero = jnp.zeros([], shape.dtype)
            return jnp.where(buffers.has_updated, sums[index], zero)

        shapes, structure = jax.tree.flatten(self.shapes)
        leaves = [take(*pair) for pair in zip(shapes, self.indices, strict=True)]
        return jax.tree.unflatten(structure, leaves)


def write_params(updates: Updates, buffers: Buffers) -> Buffers:
    """The buffers with the updates added to the parameters."""
    return buffers._replace(out=apply_updates(buffers.out, updates))


def _zeros(shape: Any) -> Any:
    if _tree.is_float0(shape):
        return np.zeros(shape.shape, dtypes.float0)
    return _tree.zeros_like(shape)
