"""Windows that end by their weight."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from optax_accum import _validate
from optax_accum._types import Scalar, Schedule

_MEANING = "the weight at which a window ends"


@dataclasses.dataclass(frozen=True, repr=False)
class ByWeight:
    """What `by_weight` returns: the weight at which a window ends."""

    target: float | Schedule

    def __repr__(self) -> str:
        return f"oa.by_weight({self.target!r})"

    def is_reached(self, weight: Scalar, gradient_step: Scalar) -> Scalar:
        """``bool[]``, whether a window of this `weight` ends."""
        target: Any = self.target
        if callable(target):
            target = target(gradient_step)
        target = _validate.scheduled("target", _MEANING, target).astype(weight.dtype)
        # A sum of shares, such as three thirds, may be a few roundings below 1. Beyond
        # half a unit nothing is rounding: a count of millions may lack one token.
        rounding = 16 * float(jnp.finfo(weight.dtype).eps)
        lacks = weight - target < -jnp.minimum(target * rounding, 0.5)
        # Not `weight >= ...`, with which a weight of NaN would never end the window.
        # This way the window ends, and the update shows it.
        return jnp.logical_not(lacks)


def by_weight(target: float | Schedule) -> ByWeight:
    """Closes windows by their weight: pass it as `every_k` to `accumulate`.

    Use it for a global batch of a number of tokens. A window ends at the micro-step
    that brings W, the sum of its weights, to `target`, in the units that `weight`
    counts. W then exceeds `target` by less than the last micro-batch's weight. `weight`
    is needed on every call. Micro-batches of weight 0, and those that `skip` rejects,
    do not bring a window closer to its end.

    Across devices W is the sum over all devices; every micro-step exchanges this one
    number. W is float32, and compared to within 2e-6 of `target`, or half a unit if
    that is less. Beyond 16.8 million it is not exact to one unit, and a weight below a
    16-millionth of it adds nothing. To continue an open window on a different number of
    devices, pass ``rescale=False`` to `oa.sharding.sum_windows` and
    `oa.sharding.stack_windows`.

    Args:
      target: A positive number, or a schedule ``gradient_step -> number``. While a
        schedule returns 0 or less, every micro-step is a window.

    Returns:
      A value for `every_k`.

    Raises:
      TypeError: `target` is neither a number nor callable.
      ValueError: `target` is not positive, or not finite.

    Examples:
      Micro-batches of 500, 300 and 400 tokens, and then of 1000:

      >>> import jax.numpy as jnp, optax, optax_accum as oa
      >>> tx = oa.accumulate(optax.sgd(1.0), every_k=oa.by_weight(1000))
      >>> params = jnp.zeros(2)
      >>> state = tx.init(params)
      >>> for tokens in (500, 300, 400, 1000):
      ...     _, state = tx.update(jnp.ones(2), state, params, weight=tokens)
      ...     print(state.window.weight, oa.has_updated(state))
      500.0 False
      800.0 False
      1200.0 True
      1000.0 True

      A batch that doubles after 1000 updates, and again after 3000:

      >>> target = optax.piecewise_constant_schedule(0.5e6, {1000: 2, 3000: 2})
      >>> tx = oa.accumulate(optax.sgd(1.0), every_k=oa.by_weight(target))
    """
    if callable(target):
        return ByWeight(target)
    or_else = ", or a schedule `gradient_step -> number`"
    return ByWeight(_validate.positive("target", target, _MEANING, or_else))
