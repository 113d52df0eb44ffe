"""What Linen's and NNX's training loops need of a transformation that accumulates."""

from typing import Any

import jax.numpy as jnp

from optax_accum import _backward, _state, _validate, _window
from optax_accum._accumulate import reduction_of
from optax_accum._types import DefaultWeight, Grads, Params, Scalar, Tree
from optax_accum._updates import apply_updates


class Counts:
    """The step counts of an object with an `opt_state`."""

    opt_state: Tree

    @property
    def micro_step(self) -> Scalar:
        """How many micro-steps the open window has seen, ``i32[]``."""
        return _state.micro_step(self.opt_state)

    @property
    def gradient_step(self) -> Scalar:
        """How many updates the optimizer has made, ``i32[]``."""
        return _state.gradient_step(self.opt_state)

    @property
    def has_updated(self) -> Scalar:
        """Whether the last micro-step made an update, ``bool[]``; then log or save."""
        return _state.has_updated(self.opt_state)


def check(opt_state: Tree) -> None:
    """Raises unless there is one `AccumulateState` in what `tx` made."""
    found = len(_state.states_in(opt_state))
    if found == 0 and hasattr(opt_state, "mini_step"):
        raise ValueError(
            "`tx` must accumulate with `oa.accumulate`; got optax.MultiSteps. Replace "
            "optax.MultiSteps(optimizer, k) by oa.accumulate(optimizer, every_k=k)"
        )
    if found == 0:
        raise ValueError(
            "`tx` must accumulate, but its state holds no `AccumulateState`. Wrap your "
            "optimizer: tx=oa.accumulate(optimizer, every_k=4)"
        )
    if found > 1:
        raise ValueError(
            f"`tx` must accumulate in one place, but its state holds {found} "
            "`AccumulateState`s. Put one `oa.accumulate` around optax.partition (or "
            "whatever joins your optimizers), not one into each"
        )


def takes_all(tx: Any) -> bool:
    """Whether `tx` is `oa.accumulate` itself, with nothing around it."""
    return hasattr(tx, "update_params")


def apply(
    tx: Any, grads: Grads, opt_state: Tree, params: Params, **arguments: Any
) -> tuple[Params, Tree]:
    """One micro-step of `tx`: the next parameters and state, without copies if it can.

    `oa.accumulate` itself has `update_params`; what is built around it has `update`.
    """
    if takes_all(tx):
        return tx.update_params(grads, opt_state, params, **arguments)
    # To what stands before `oa.accumulate` a pullback is a tree of residuals.
    grads = as_gradients(grads)
    # Arguments that were not given do not go to the transformations around it either.
    for name in ("weight", "boundary", "value"):
        if arguments[name] is None or isinstance(arguments[name], DefaultWeight):
            del arguments[name]
    updates, opt_state = tx.update(grads, opt_state, params, **arguments)
    return apply_updates(params, updates), opt_state


def as_gradients(grads: Grads) -> Grads:
    """`grads`, computed if it is a pullback."""
    if not _backward.is_pullback(grads):
        return grads
    return _validate.pullback(grads).gradients()


def counted(tx: Any, weight: Any, before: Tree, after: Tree) -> Scalar:
    """Whether the micro-batch between two states of `tx` counts for anything."""
    before, after = _state.find(before), _state.find(after)
    rejected = after.window.skipped > before.window.skipped
    weight = jnp.where(rejected, 0, weight)
    # A stacked state has one window on this device. Of the rows of all devices one is
    # enough: their statistics have been averaged by weight.
    return jnp.any(_window.counts(weight, reduction_of(tx), rejected))
