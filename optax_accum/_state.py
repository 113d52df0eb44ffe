"""The state of `accumulate`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class AccumulateState(NamedTuple):
    """The state of `accumulate`; a pytree that any checkpointer saves as it is.

    `weight`, `value` and `acc_grads` are sums over the open window, and mean it only
    while ``micro_step > 0``. At a boundary `weight` and `value` stay those of the
    window that it closes, until the next one's first micro-step; what `acc_grads`
    holds then is left open, because its memory is used for the updates.

    Across devices (`axis_name`), `skipped`, `weight`, `value`, `skip_state`,
    `acc_grads` and the sums in `noise_scale` are each device's own; the rest is the
    same everywhere.

    Attributes:
      micro_step: ``i32[]``, how many micro-steps the open window has seen.
      gradient_step: ``i32[]``, how many updates the inner optimizer has made.
      emitted: ``bool[]``, whether the last micro-step made an update.
      skipped: ``i32[]``, how many micro-batches `skip` has rejected so far.
      weight: ``f32[]``, the sum of the weights (``f64[]`` where a parameter has
        double precision).
      value: as `weight`, the sum of the values, weighted as the gradients are. With
        ``reduction="mean"``, ``value / weight`` is the window's mean loss.
      skip_state: what `skip` returned beside its decision; ``()`` without `skip`.
      noise_scale: ``()``, or where `accumulate` measures it: ``sums`` over the open
        window, ``squares: f32[]`` and ``samples: i32[]``; the ``estimate``, an
        `oa.NoiseScale`; and ``k: i32[]``, what `oa.adaptive_k` has chosen for the
        open window, or ``()``.
      acc_grads: the sum of the gradients, in the parameters' structure, shapes and
        at least float32; ``None`` for leaves that pass through, and ``()`` where
        ``every_k=1`` needs no accumulator.
      inner_state: the inner optimizer's state.
    """

    micro_step: jax.Array
    gradient_step: jax.Array
    emitted: jax.Array
    skipped: jax.Array
    weight: jax.Array
    value: jax.Array
    skip_state: Any
    noise_scale: Any
    acc_grads: Any
    inner_state: Any


def states_in(tree: Any) -> list[AccumulateState]:
    """The outermost `AccumulateState`s in `tree`."""
    return [x for x in jax.tree.leaves(tree, is_leaf=_is_state) if _is_state(x)]


def map_states(
    opt_state: Any,
    function: Callable[[AccumulateState], Any],
    otherwise: Callable[[Any], Any],
) -> Any:
    """`opt_state` with `function` of each outermost `AccumulateState` in it.

    All other leaves become ``otherwise(leaf)``.

    Raises:
      ValueError: There is none.
    """
    if not states_in(opt_state):
        raise none_in(opt_state)
    return jax.tree.map(
        lambda node: function(node) if _is_state(node) else otherwise(node),
        opt_state,
        is_leaf=_is_state,
    )


def none_in(opt_state: Any) -> ValueError:
    """What to raise where there is no `AccumulateState`."""
    return ValueError(
        "`opt_state` must hold the state of `optax_accum.accumulate`; found none "
        f"in a {type(opt_state).__name__}. Pass the optimizer state that `init` or "
        "`update` returned"
    )


def _is_state(node: Any) -> bool:
    return isinstance(node, AccumulateState)
