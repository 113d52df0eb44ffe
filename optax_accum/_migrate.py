"""Moving a running job from `optax.MultiSteps`."""

from typing import Any

import jax
import jax.numpy as jnp

from optax_accum import _window
from optax_accum._state import AccumulateState


def from_multi_steps(
    multi_steps_state: Any, *, use_grad_mean: bool = True
) -> AccumulateState:
    """The state of `accumulate` in which a running `optax.MultiSteps` goes on.

    An open window continues where it was: a running mean over n micro-steps, times
    n, is their sum.

        S = n · ḡ,  W = n

    Args:
      multi_steps_state: An `optax.MultiStepsState`, restored or live. Its accumulator
        keeps its dtype.
      use_grad_mean: What `optax.MultiSteps` was given. Where it is ``False``, use
        ``accumulate(..., reduction="sum")``.

    Returns:
      The state for ``accumulate(inner, every_k)`` with the same inner optimizer and
      the same k; with ``skip`` and ``on_skip="wait"`` if there was a
      ``should_skip_update_fn``. `skipped` starts from 0, and so does `value`.

    Raises:
      TypeError: `multi_steps_state` is not an `optax.MultiStepsState`.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_accum as oa
      >>> params = jnp.zeros(2)
      >>> old = optax.MultiSteps(optax.sgd(1.0), every_k_schedule=2)
      >>> _, old_state = old.update(jnp.array([1.0, 3.0]), old.init(params), params)
      >>> tx = oa.accumulate(optax.sgd(1.0), every_k=2)
      >>> state = oa.from_multi_steps(old_state)
      >>> updates, state = tx.update(jnp.array([3.0, 3.0]), state, params)
      >>> print(updates)
      [-2. -3.]
    """
    # By its fields, not its class: a checkpoint may bring back a look-alike.
    fields = (
        "mini_step",
        "gradient_step",
        "inner_opt_state",
        "acc_grads",
        "skip_state",
    )
    missing = [name for name in fields if not hasattr(multi_steps_state, name)]
    if missing:
        raise TypeError(
            "`multi_steps_state` must be an `optax.MultiStepsState`; got "
            f"{type(multi_steps_state).__name__}, without `{missing[0]}`. Inside a "
            "chain, convert the one element that is a MultiStepsState"
        )
    old = multi_steps_state
    count = jnp.asarray(old.mini_step, jnp.int32)
    gradient_step = jnp.asarray(old.gradient_step, jnp.int32)
    weight = count.astype(_window.weight_dtype(old.acc_grads))

    def as_sum(mean):
        return mean * weight.astype(mean.dtype) if use_grad_mean else mean

    return AccumulateState(
        micro_step=count,
        gradient_step=gradient_step,
        emitted=(count == 0) & (gradient_step > 0),
        skipped=jnp.zeros([], jnp.int32),
        weight=weight,
        value=jnp.zeros_like(weight),
        skip_state=old.skip_state,
        noise_scale=(),
        acc_grads=jax.tree.map(as_sum, old.acc_grads),
        inner_state=old.inner_opt_state,
    )
