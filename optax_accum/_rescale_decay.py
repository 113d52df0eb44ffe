"""Decays of moving averages for a different batch size."""

import math
from typing import overload

import jax
import jax.numpy as jnp

from optax_accum import _validate
from optax_accum._types import Schedule


@overload
def rescale_decay(decay: float, *, from_batch: float, to_batch: float) -> float: ...


@overload
def rescale_decay(
    decay: float, *, from_batch: float, to_batch: Schedule
) -> Schedule: ...


def rescale_decay(
    decay: float, *, from_batch: float, to_batch: float | Schedule
) -> float | Schedule:
    """Converts the decay of a moving average to a different batch size.

    Use it for Adam's `b2` or an average of the parameters if you change the global
    batch. Decays count updates: if an update takes more examples, the average looks
    back over more of them. ``decay ** (to_batch / from_batch)`` keeps its half-life in
    examples or tokens.

    For Adam's `b2` this is the rule of Marek et al., who found that `b1` could stay as
    it was. For averages of the parameters it is the rule of Busbridge et al.

    Args:
      decay: The decay that suits `from_batch`, a number in [0, 1).
      from_batch: The global batch that `decay` was chosen for, a positive number of
        examples or tokens.
      to_batch: The global batch that you train with, in the same units; or a schedule
        ``gradient_step -> batch``, if it changes in training.

    Returns:
      A float; or for a schedule, a schedule ``gradient_step -> f32[]``, always below 1,
      for `optax.inject_hyperparams`. With bfloat16 parameters, also pass it
      ``hyperparam_dtype=jnp.float32``. Otherwise the decay is rounded to bfloat16, in
      which 0.999 is 1.

    Raises:
      TypeError: `decay` or a batch is not a number.
      ValueError: `decay` is not in [0, 1), or a batch is not positive and finite.

    Examples:
      `b2` was tuned for 512 sequences, and the batch is now 4 times as large, or 1/64:

      >>> import optax_accum as oa
      >>> round(oa.rescale_decay(0.95, from_batch=512, to_batch=2048), 6)
      0.814506
      >>> round(oa.rescale_decay(0.95, from_batch=512, to_batch=8), 6)
      0.999199

      A batch that doubles after 1000 updates, from half a million tokens:

      >>> import optax
      >>> tokens = optax.piecewise_constant_schedule(500_000, {1000: 2})
      >>> b2 = oa.rescale_decay(0.95, from_batch=500_000, to_batch=tokens)
      >>> adamw = optax.inject_hyperparams(optax.adamw)(1e-3, b2=b2)
      >>> tx = oa.accumulate(adamw, every_k=oa.by_weight(tokens))
      >>> print(b2(0), b2(1000))
      0.95 0.9025

    References:
      Marek et al., Small Batch Size Training for Language Models: When Vanilla SGD
      Works, and Why Gradient Accumulation Is Wasteful, 2025, section 4.3
      (https://arxiv.org/abs/2507.07101).

      Busbridge et al., How to Scale Your EMA, 2023 (https://arxiv.org/abs/2307.13813).
    """
    decay = _validate.fraction(
        "decay", decay, "how much of the average an update keeps"
    )
    meaning = "how many examples or tokens the global batch has"
    from_batch = _validate.positive("from_batch", from_batch, meaning)
    if not callable(to_batch):
        or_else = ", or a schedule `gradient_step -> batch`"
        to_batch = _validate.positive("to_batch", to_batch, meaning, or_else)
        return decay ** (to_batch / from_batch)
    batch_of = to_batch
    # The logarithm is Python's, in float64: in float32 a decay near 1 has few digits.
    rate = math.log(decay) / from_batch if decay else -math.inf
    # With 1, to which a tiny batch rounds and which a ramp from 0 starts at, Adam's
    # bias correction is 0 / 0.
    below_one = 1 - float(jnp.finfo(jnp.float32).epsneg)

    def schedule(gradient_step: jax.Array) -> jax.Array:
        batch = jnp.asarray(batch_of(gradient_step), jnp.float32)
        return jnp.minimum(jnp.exp(rate * batch), below_one)

    return schedule
