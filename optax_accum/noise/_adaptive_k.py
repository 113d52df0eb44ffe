"""Window sizes that follow the measured noise scale."""

import dataclasses
from numbers import Real

import jax.numpy as jnp

from optax_accum import _validate
from optax_accum._types import Scalar
from optax_accum.noise._noise_scale import NoiseScale


@dataclasses.dataclass(frozen=True)
class AdaptiveK:
    """What `adaptive_k` returns: the number of micro-batches for the next window."""

    min_k: int
    max_k: int
    multiple: float
    hysteresis: float
    powers_of_two: bool

    def next(self, k: Scalar, estimate: NoiseScale, weight: Scalar) -> Scalar:
        """``i32[]``, from the last `k` and the mean `weight` of a micro-step."""
        dtype = estimate.signal.dtype
        last = k.astype(dtype)
        # Without signal no batch is too large.
        wanted = jnp.where(
            estimate.signal > 0, self.multiple * estimate.batch_size / weight, jnp.inf
        )
        # One step of at most two at a time: the first estimates are rough.
        wanted = jnp.clip(wanted, last / 2, last * 2)
        margin = 1 + self.hysteresis
        moves = (wanted > last * margin) | (wanted < last / margin)
        if self.powers_of_two:
            wanted = 2 ** jnp.round(jnp.log2(wanted))
        chosen = jnp.clip(jnp.round(wanted), self.min_k, self.max_k)
        moves &= (estimate.count > 0) & (weight > 0)
        return jnp.where(moves, chosen.astype(k.dtype), k)


def adaptive_k(
    min_k: int,
    max_k: int,
    *,
    multiple: float = 1.0,
    hysteresis: float = 0.5,
    powers_of_two: bool = True,
) -> AdaptiveK:
    """Adapts the batch size to the noise scale: pass it as `every_k` to `accumulate`.

    Each window gets enough micro-batches to make the global batch `multiple` times the
    noise scale, starting from `min_k`. k is traced: it changes without compiling again,
    and is the same on all devices.

    It is a heuristic. At the noise scale, doubling the batch saves a quarter of the
    steps and costs half as many examples again. The noise scale grows during training,
    often by far more than tenfold, and a learning rate that was tuned for one batch
    size does not suit the next. Schedules inside the optimizer count updates, of which
    there are now fewer.

    Args:
      min_k: The fewest micro-batches in a window. Without `axis_name` at least 2, as
        noise cannot be measured on one.
      max_k: The most, also chosen if the noise hides all signal.
      multiple: The size of the global batch, in noise scales.
      hysteresis: A fraction in [0, 1): k only changes if the wanted number is more than
        this fraction above or below it. Between two windows it changes by at most a
        factor of two, and the rounding to a power of two.
      powers_of_two: Whether k is a power of two (or a bound), or any integer.

    Returns:
      A value for `every_k`. `accumulate` then measures the noise scale, with a decay of
      0.99, or its `noise_decay`.

    Raises:
      TypeError: A bound is not an int.
      ValueError: A bound is < 1; `max_k` < `min_k`; `multiple` is not a positive
        number; `hysteresis` is not in [0, 1).

    Examples:
      >>> import optax, optax_accum as oa
      >>> every_k = oa.noise.adaptive_k(2, 64)
      >>> tx = oa.accumulate(optax.sgd(0.1), every_k, noise_decay=0.95)

    References:
      McCandlish et al., An Empirical Model of Large-Batch Training, 2018, sections 2.3
      and 5 (https://arxiv.org/abs/1812.06162).
    """
    low, high = (
        _validate.whole_number("min_k", min_k),
        _validate.whole_number("max_k", max_k),
    )
    if high < low:
        raise ValueError(
            f"`max_k` must not be less than `min_k`; got max_k={high} and min_k={low}"
        )
    if not (isinstance(multiple, Real) and multiple > 0):
        raise ValueError(
            "`multiple` must be positive, the size of the global batch in noise "
            f"scales; got {multiple!r}"
        )
    part = "how far off k may be before it moves, as a part of k"
    hysteresis = _validate.fraction("hysteresis", hysteresis, part)
    return AdaptiveK(low, high, float(multiple), hysteresis, bool(powers_of_two))
