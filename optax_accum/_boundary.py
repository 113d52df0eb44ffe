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
* What is rounded to be kept is computed last (see `needs_two_phases`).
"""

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from optax_accum import _tree
from optax_accum._optimizer import BoundOptimizer
from optax_accum._overwrite import Overwritten
from optax_accum._types import Grads, Reduction, Scalar, Tree, Updates
from optax_accum._window import Window
from optax_accum.noise._tracker import NoTracker, Tracker
from optax_accum.sharding._data_parallel import DataParallel


class Closing(NamedTuple):
    """A window after a micro-step that may be its last.

    Attributes:
      ends: Whether it ends here.
      runs: Whether the inner optimizer runs: the window ends and, as far as one device
        knows, is not empty. A Python bool builds no `lax.cond`.
      checks_total: Whether `close` must still test W for 0, in which case nothing
        changes: across devices W is known only after the sum, and a Python bool has no
        place for the test.
      window: The sums, each device's own.
      reduction: How they are divided.
      overwritten: Which leaves are no gradients.
      devices: Those that share the window.
      inner_state: The inner optimizer's state.
      noise: The averages of the noise scale.
      tracker: What measures it.
      micro_steps: How many there were.
      square: ‖S‖², if the noise scale needs it before the branch.
    """

    ends: bool | jax.Array
    runs: bool | jax.Array
    checks_total: bool
    window: Window
    reduction: Reduction
    overwritten: Overwritten
    devices: DataParallel
    inner_state: Tree
    noise: Tree
    tracker: Tracker | NoTracker
    micro_steps: Scalar
    square: Scalar | None

    @property
    def has_branch(self) -> bool:
        """Whether it is decided at run time if the inner optimizer runs."""
        return not isinstance(self.runs, bool)


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


class Destination(Protocol):
    """Where the updates go."""

    @property
    def out(self) -> Tree:
        """What the buffers hold for it before."""

    def write(self, updates: Updates, buffers: Buffers) -> Buffers:
        """The buffers with the updates in them."""


def close(
    closing: Closing, optimizer: BoundOptimizer, destination: Destination
) -> Buffers:
    """Runs the inner optimizer if the window ends, and then alone."""

    def do_update(buffers: Buffers) -> Buffers:
        window = closing.window._replace(grads=buffers.sums)
        total = window.over_devices(closing.devices, closing.overwritten)

        def apply(buffers: Buffers) -> Buffers:
            gradients = total._replace(grads=closing.overwritten.gradients(total.grads))
            noise = closing.tracker.close(
                buffers.noise, gradients, closing.square, closing.micro_steps
            )
            value, grads = total.result(closing.reduction, closing.overwritten)
            updates, inner_state = optimizer.update(grads, buffers.inner_state, value)
            buffers = destination.write(updates, buffers)
            return buffers._replace(
                # True, but no constant, so that XLA writes it in place.
                has_updated=~buffers.has_updated,
                inner_state=inner_state,
                noise=noise,
            )

        if not closing.checks_total:
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
        out=destination.out,
        inner_state=closing.inner_state,
        noise=closing.noise,
    )
    if isinstance(closing.runs, bool):
        return do_update(buffers) if closing.runs else buffers
    if not needs_two_phases(closing, optimizer):
        return lax.cond(closing.runs, do_update, same, buffers)

    def write_updates(buffers: Buffers) -> Buffers:
        return do_update(buffers)._replace(
            inner_state=buffers.inner_state, noise=buffers.noise
        )

    def write_state(buffers: Buffers) -> Buffers:
        new = do_update(buffers)
        return buffers._replace(inner_state=new.inner_state, noise=new.noise)

    updated = lax.cond(closing.runs, write_updates, same, buffers)
    # It depends on the first branch's flag, so that XLA runs it second.
    after = lax.cond(updated.has_updated, write_state, same, buffers)
    return updated._replace(inner_state=after.inner_state, noise=after.noise)


def needs_two_phases(closing: Closing, optimizer: BoundOptimizer) -> bool:
    """Whether the state is to be computed in a branch of its own, after the updates.

    That is so if what the optimizer computes is rounded to be kept. A rounded moment
    and the unrounded one that the updates are computed from are live together, and XLA
    copies every moment unless the updates come first. XLA removes from each branch what
    it does not return; what updates and state have in common is computed twice, once
    per window.
    """

    def bits(tree: Tree) -> list[int]:
        leaves = jax.tree.leaves(_tree.keep_inexact(tree))
        return [jnp.finfo(x.dtype).bits for x in leaves if x.ndim]

    # Across devices the gradients would be exchanged twice.
    if not closing.has_branch or closing.devices.axis_name is not None:
        return False
    widest = max(bits(closing.window.grads), default=0)
    return any(kept < widest for kept in bits((optimizer.shapes, closing.inner_state)))
