"""The boundary: the inner optimizer in a branch, without copies.

`lax.cond` runs the optimizer at the boundary alone, but XLA copies whatever its two
branches cannot share. What keeps the compiled program free of copies, found by
reading its HLO:

* Doing nothing is the false branch, so it becomes XLA's first. The other way
  around everything is copied (https://github.com/jax-ml/jax/issues/39449).
* A branch returns only buffers that it was given, leaf by leaf in the same shape and
  dtype, so both branches write in place. `update`'s updates therefore leave in the
  accumulator's buffers, which the next window overwrites anyway.
* No branch writes a buffer twice. The accumulator is not zeroed in the branch; the
  next window's first micro-step selects (see `_window.add`).
* What is rounded to be kept is computed last (see `with_branches`).
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from optax_accum import _tree
from optax_accum._optimizer import BoundOptimizer
from optax_accum._overwrite import Overwritten
from optax_accum._types import Grads, Reduction, Scalar, Tree, Updates
from optax_accum._window import Devices, Window
from optax_accum.noise._tracker import NoTracker, Tracker


class Closing(NamedTuple):
    """A window after a micro-step that may be its last.

    Attributes:
      ends: Whether it ends here.
      runs: Whether the inner optimizer runs: the window ends and, as far as one device
        knows, is not empty. A Python bool builds no `lax.cond`.
      checks_total: Whether `close` must still test W for 0, in which case nothing
        changes: across devices W is known only after the sum.
      window: The sums, each device's own.
      reduction: How they are divided.
      overwritten: Which leaves are overwritten, not summed.
      devices: Those that share the window.
      inner_state: The inner optimizer's state.
      noise: The averages of the noise scale.
      tracker: What measures it.
      micro_steps: How many there were.
      square: ‖S‖², if the noise scale needs it before the branch.
      widens: Whether the inner optimizer is given at least float32. A window of one
        gradient is not a sum, and reaches it as it is.
      two_phases: Whether the updates are computed first and the state second (see
        `with_branches`).
    """

    ends: bool | jax.Array
    runs: bool | jax.Array
    checks_total: bool
    window: Window
    reduction: Reduction
    overwritten: Overwritten
    devices: Devices
    inner_state: Tree
    noise: Tree
    tracker: Tracker | NoTracker
    micro_steps: Scalar
    square: Scalar | None
    widens: bool
    two_phases: bool = False

    @property
    def has_branch(self) -> bool:
        """Whether it is decided at run time if the inner optimizer runs."""
        return not isinstance(self.runs, bool)

    def as_given(self, sums: Grads) -> Grads:
        """`sums` in the dtypes in which the inner optimizer is given their mean."""
        return jax.tree.map(_tree.widened, sums) if self.widens else sums

    @property
    def writes_sums(self) -> bool:
        """Whether S is written to memory, and does not go right into the optimizer."""
        return self.runs is not True or self.devices.axis_name is not None


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
    buffers = Buffers(
        has_updated=jnp.zeros([], bool),
        sums=closing.window.grads,
        out=destination.out,
        inner_state=closing.inner_state,
        noise=closing.noise,
    )

    def update(buffers: Buffers, total: Window, runs: bool | jax.Array) -> Buffers:
        """With the window's update, if it `runs`; `buffers` hold the sum of `total`."""

        def apply(buffers: Buffers) -> Buffers:
            whole = total._replace(grads=closing.as_given(buffers.sums))
            gradients = whole._replace(grads=closing.overwritten.gradients(whole.grads))
            noise = closing.tracker.close(
                buffers.noise, gradients, closing.square, closing.micro_steps
            )
            value, grads = whole.result(closing.reduction, closing.overwritten)
            updates, inner_state = optimizer.update(grads, buffers.inner_state, value)
            buffers = destination.write(updates, buffers)
            return buffers._replace(
                # True, but not a constant, so XLA writes it in place.
                has_updated=~buffers.has_updated,
                inner_state=inner_state,
                noise=noise,
            )

        if not closing.two_phases:
            return branch(runs, apply, buffers)

        def write_updates(buffers: Buffers) -> Buffers:
            return apply(buffers)._replace(
                inner_state=buffers.inner_state, noise=buffers.noise
            )

        def write_state(buffers: Buffers) -> Buffers:
            new = apply(buffers)
            return buffers._replace(inner_state=new.inner_state, noise=new.noise)

        updated = branch(runs, write_updates, buffers)
        # It depends on the first branch's flag, so XLA runs it second.
        after = branch(updated.has_updated, write_state, buffers)
        return updated._replace(inner_state=after.inner_state, noise=after.noise)

    if closing.devices.axis_name is None:
        return update(buffers, closing.window, closing.runs)

    def exchange(buffers: Buffers) -> Buffers:
        window = closing.window._replace(grads=buffers.sums)
        total = window.over_devices(closing.devices, closing.overwritten)
        # The branches are inside, so two phases exchange once.
        runs = total.weight != 0 if closing.checks_total else True
        new = update(buffers._replace(sums=total.grads), total, runs)
        return new._replace(sums=buffers.sums)

    return branch(closing.runs, exchange, buffers)


def branch(
    predicate: bool | jax.Array,
    function: Callable[[Buffers], Buffers],
    buffers: Buffers,
) -> Buffers:
    """``function(buffers)`` if `predicate`, else `buffers`.

    A Python bool needs no `lax.cond`. Nothing is selected: that reads and copies what
    is kept.
    """
    if isinstance(predicate, bool):
        return function(buffers) if predicate else buffers
    return lax.cond(predicate, function, lambda buffers: buffers, buffers)


def with_branches(closing: Closing, optimizer: BoundOptimizer) -> Closing:
    """`closing`, with the branches that rounded sums and states need.

    If what the optimizer computes is rounded to be kept, the updates come first and the
    state second. A rounded moment and the unrounded one that the updates are computed
    from are live together, and XLA copies every moment otherwise. XLA removes from each
    branch what it does not return; what updates and state have in common is computed
    twice, once per window.

    Likewise S, if it is rounded, is written before it is read. XLA keeps such an order
    between branches alone (a barrier is gone before it decides on copies), so a
    window that ends for certain tests at run time whether W is 0.
    """

    def bits(tree: Tree) -> list[int]:
        leaves = jax.tree.leaves(_tree.keep_inexact(tree))
        return [jnp.finfo(x.dtype).bits for x in leaves if x.ndim]

    if closing.runs is False:
        return closing
    sums, given = closing.window.grads, closing.as_given(closing.window.grads)
    state, widest = bits(closing.inner_state), max(bits(given), default=0)
    is_narrow = any(kept < widest for kept in [*state, *bits(optimizer.shapes)])
    two_phases = is_narrow and bool(state)
    if closing.devices.axis_name is not None:
        checks_total = closing.checks_total or two_phases
        return closing._replace(two_phases=two_phases, checks_total=checks_total)
    runs = closing.runs
    if runs is True and (two_phases or bits(sums) != bits(given)):
        runs = closing.window.weight != 0
    return closing._replace(two_phases=two_phases, runs=runs)
