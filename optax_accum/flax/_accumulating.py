"""What Linen's and NNX's training loops need of a transformation that accumulates."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_accum import _queries, _state


def check(opt_state: Any) -> None:
    """Raises unless there is an `AccumulateState` in what `tx` made."""
    if not _state.states_in(opt_state):
        raise ValueError(
            "`tx` must accumulate, but its state holds no `AccumulateState`. Wrap your "
            "optimizer: tx=oa.accumulate(optimizer, every_k=4)"
        )


def apply(
    tx: Any, grads: Any, opt_state: Any, params: Any, **arguments: Any
) -> tuple[Any, Any]:
    """One micro-step of `tx`: the next parameters and state, without copies if it can.

    `oa.accumulate` itself has `update_params`; what is built around it has `update`.
    """
    if hasattr(tx, "update_params"):
        return tx.update_params(grads, opt_state, params, **arguments)
    # A `value` of None would be given to the transformations around it as well.
    arguments = {name: x for name, x in arguments.items() if x is not None}
    updates, opt_state = tx.update(grads, opt_state, params, **arguments)
    return optax.apply_updates(params, updates), opt_state


def counted(weight: Any, before: Any, after: Any) -> jax.Array:
    """Whether the micro-batch between two states of `tx` counts for anything."""
    rejected = _queries.find(after).skipped > _queries.find(before).skipped
    return (jnp.asarray(weight) != 0) & ~rejected
