"""The noise scale: how large a batch is useful, measured as a by-product.

Let gᵢ be the gradients of k micro-batches, means over bᵢ units (examples, tokens), B
the sum of the bᵢ, and ḡ the weighted mean of the gᵢ, the global batch's gradient. If
the gradients of single units are independent, with mean G and covariance Σ, then

    Ŝ  = (Σ bᵢ·‖gᵢ‖² − B·‖ḡ‖²) / (k − 1)     estimates the noise, tr Σ,
    Ĝ² = ‖ḡ‖² − Ŝ / B                         estimates the signal, ‖G‖²,

both without bias, however uneven the bᵢ. Their ratio is the simple noise scale: the
batch size, in units, at which noise and signal are equal. One window is a very rough
measurement; averages over many windows are divided, because an average of ratios would
be dominated by those with a small signal.

McCandlish et al., An Empirical Model of Large-Batch Training, 2018, section 2.2 and
appendix A (https://arxiv.org/abs/1812.06162), where all bᵢ are equal.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_accum import _validate
from optax_accum._types import DType, Scalar
from optax_accum._window import NoiseSums, Window


class NoiseScale(NamedTuple):
    """An estimate of the simple noise scale, of one batch or averaged over many.

    It says how large a batch is useful. `accumulate` averages for you (see
    `oa.noise.estimate`); average those of `value_and_grad`, one per batch, with `add`.

    Attributes:
      signal: ``f32[]``, Ĝ², the squared norm of the true gradient. It is unbiased, and
        so negative at times, if the noise hides it. NaN for a batch of one micro-batch.
      noise: ``f32[]``, Ŝ, the trace of the covariance of one unit's gradient. The unit
        is that of the weights, an example or a token; without weights, one micro-batch.
      count: ``i32[]``, the number of batches in the averages; 0 if a batch had only one
        micro-batch or was not finite.

    Examples:
      Two micro-batches of 4 examples each, in every one of three steps:

      >>> import jax, jax.numpy as jnp, optax_accum as oa
      >>> def loss(w, x):
      ...     return jnp.mean((x @ w - 1) ** 2)
      >>> value_and_grad = jax.jit(
      ...     oa.value_and_grad(loss, num_microbatches=2, noise_scale=True)
      ... )
      >>> average = oa.noise.NoiseScale.empty()
      >>> for x in jax.random.normal(jax.random.key(0), (3, 8, 2)):
      ...     _, info = value_and_grad(jnp.ones(2), x)
      ...     average = average.add(info.noise_scale, decay=0.9)
      >>> int(average.count), average.batch_size.shape
      (3, ())

    References:
      McCandlish et al., An Empirical Model of Large-Batch Training, 2018, equation 2.9
      and appendix A.1 (https://arxiv.org/abs/1812.06162).
    """

    signal: Scalar
    noise: Scalar
    count: Scalar  # type: ignore[assignment]

    @classmethod
    def empty(cls, dtype: DType = jnp.float32) -> "NoiseScale":
        """Returns an estimate without measurements, to start averages from."""
        return cls(
            signal=jnp.zeros([], dtype),
            noise=jnp.zeros([], dtype),
            count=jnp.zeros([], jnp.int32),
        )

    @property
    def batch_size(self) -> Scalar:
        """``f32[]``, noise / signal: the simple noise scale, in units of the weights.

        Much smaller batches average mostly noise, and much larger ones are mostly
        redundant. Negative if the noise hides the signal: the useful batch is then
        large, but unknown. NaN before the first measurement.
        """
        return self.noise / self.signal

    def add(self, sample: "NoiseScale", decay: Any) -> "NoiseScale":
        """Adds a measurement to the exponential moving averages.

        Signal and noise are averaged separately, and corrected for the start from zero:

            aₙ = aₙ₋₁ + (xₙ − aₙ₋₁)·(1 − decay) / (1 − decayⁿ)

        Args:
          sample: The estimate of one batch. With ``count`` 0 it changes nothing.
          decay: That of the averages, in [0, 1): they reach back over about
            ``1 / (1 - decay)`` batches.

        Returns:
          The new averages.

        Raises:
          TypeError: `sample` is not a `NoiseScale`.
          ValueError: `decay` is a number outside of [0, 1).
        """
        if not isinstance(sample, NoiseScale):
            raise TypeError(
                "`sample` must be an `oa.noise.NoiseScale`, such as the `noise_scale` "
                "of the `MicrobatchInfo` that value_and_grad(..., noise_scale=True) "
                f"returns; got {type(sample).__name__}"
            )
        if not isinstance(decay, jax.Array):
            meaning = "how much of the averages is kept"
            decay = _validate.fraction("decay", decay, meaning)
        known = sample.count > 0
        count = self.count + known.astype(self.count.dtype)
        # 1 - decayⁿ in a form that keeps its digits if the decay is nearly 1.
        new = jnp.asarray(1 - decay, self.signal.dtype)
        steps = jnp.maximum(count, 1).astype(new.dtype)
        everything = -jnp.expm1(steps * jnp.log1p(-new))

        def average(mean: Scalar, x: Scalar) -> Scalar:
            # Selected, because an unknown value is NaN.
            moved = mean + (x.astype(mean.dtype) - mean) * (new / everything)
            return jnp.where(known, moved, mean)

        signal, noise = (
            average(*pair) for pair in zip(self[:2], sample[:2], strict=True)
        )
        return NoiseScale(signal, noise, count)


def of_window(total: Window, square: Scalar) -> NoiseScale:
    """The estimate from one window, of all devices; `square` is ``‖ḡ‖²``."""
    sums, weight = total.noise, total.weight
    assert isinstance(sums, NoiseSums)
    enough = sums.samples > 1
    others = jnp.where(enough, sums.samples - 1, 1).astype(square.dtype)
    noise = (sums.squares - weight * square) / others
    signal = square - noise / jnp.where(weight == 0, 1, weight)
    # A NaN in one window must not stay in the averages.
    known = enough & jnp.isfinite(signal)
    return NoiseScale(
        signal=jnp.where(known, signal, np.nan),
        noise=jnp.where(known, noise, np.nan),
        count=known.astype(jnp.int32),
    )
