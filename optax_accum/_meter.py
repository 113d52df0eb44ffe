"""How `accumulate` measures the noise scale, and lets the windows follow it.

The sums are each device's own until the boundary, as those of the gradients are, and
are summed over devices with them. The averages, and k, change in the boundary's branch
alone.
"""

import dataclasses
import functools
from numbers import Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optax_accum import _checks, _window
from optax_accum._noise_scale import NoiseScale, Sums, of_batch, squared_norm


class NoiseScaleState(NamedTuple):
    """The `noise_scale` of an `AccumulateState`.

    Attributes:
      sums: Of the open window; across devices each has its own.
      estimate: The averages so far, a `NoiseScale`.
      k: ``i32[]``, how many micro-batches `adaptive_k` wants in the open window; ``()``
        without it.
    """

    sums: Sums
    estimate: NoiseScale
    k: Any


Measured = tuple[NoiseScale, Any]  # the averages, and the next window's k


@dataclasses.dataclass(frozen=True)
class Meter:
    """The settings; without a `decay` nothing is measured, and the state is ``()``."""

    decay: float | None
    adaptive_k: "AdaptiveK | None"

    @classmethod
    def of(cls, noise_scale: float | None, every_k: Any, axis_name: Any) -> "Meter":
        """Checks them against each other.

        Raises:
          TypeError: `noise_scale` is no number; `adaptive_k` was not called.
          ValueError: `noise_scale` is no decay; `adaptive_k` from 1 on one device.
        """
        if every_k is adaptive_k:
            raise TypeError(
                "`every_k` is the function `adaptive_k` itself; call it with its "
                "bounds: oa.adaptive_k(2, 64)"
            )
        follows = every_k if isinstance(every_k, AdaptiveK) else None
        if follows is not None and follows.min_k == 1 and axis_name is None:
            raise ValueError(
                "`every_k` is an `adaptive_k` with min_k=1, and one micro-batch alone "
                "shows no noise: k would stay 1 for ever. Use min_k=2"
            )
        if noise_scale is not None:
            meaning = "the decay of the averages with which it is measured"
            noise_scale = _checks.fraction("noise_scale", noise_scale, meaning)
        elif follows is not None:
            noise_scale = 0.99
        return cls(noise_scale, follows)

    def init(self, dtype: Any) -> Any:
        """The `noise_scale` of a new state."""
        if self.decay is None:
            return ()
        k = () if self.adaptive_k is None else jnp.int32(self.adaptive_k.min_k)
        return NoiseScaleState(Sums.empty(dtype), NoiseScale.empty(dtype), k)

    @functools.cached_property
    def _structure(self) -> Any:
        return jax.tree.structure(self.init(jnp.float32))

    def check(self, state: Any, grads: Any, axis_name: Any) -> None:
        """Raises unless this can be measured with an `AccumulateState` like `state`."""
        if self.decay is not None:
            _checks.noise_scale(state, self._structure)
            _checks.whole_gradients(state, _window.keep_inexact(grads), axis_name)

    def add(
        self, state: Any, grads: Any, weight: jax.Array, reduction: str, first: Any
    ) -> Any:
        """`state` with one more micro-batch in its sums."""
        if self.decay is None:
            return state
        return state._replace(
            sums=state.sums.add(grads, weight, reduction, first=first)
        )

    def sums(self, state: Any) -> Sums | None:
        """What is to be summed over devices."""
        return None if self.decay is None else state.sums.in_one_dtype()

    def measured(self, state: Any) -> Measured | None:
        """What the boundary changes."""
        return None if self.decay is None else (state.estimate, state.k)

    def square(self, sums: Any, dtype: Any) -> jax.Array | None:
        """‖S‖²."""
        return None if self.decay is None else squared_norm(sums, dtype)

    def square_at(
        self, boundary: bool | jax.Array, sums: Any, dtype: Any
    ) -> jax.Array | None:
        """‖S‖² at the boundary, in a branch before the one that overwrites S.

        Read in that same branch, S would be copied: nothing tells XLA that the norm is
        taken first.
        """
        if self.decay is None or isinstance(boundary, bool):
            return self.square(sums, dtype)
        return lax.cond(
            boundary,
            lambda sums: squared_norm(sums, dtype),
            lambda _: jnp.zeros([], dtype),
            sums,
        )

    def close(
        self,
        measured: Measured | None,
        sums: Sums | None,
        square: jax.Array | None,
        weight: jax.Array,
        micro_steps: jax.Array,
    ) -> Measured | None:
        """What it becomes after a window, of which these are the totals."""
        if measured is None or sums is None or square is None:
            return None
        estimate, k = measured
        sample = of_batch(sums, square / weight**2, weight)
        estimate = estimate.add(sample, self.decay)
        if self.adaptive_k is not None:
            k = self.adaptive_k.next(k, estimate, weight / micro_steps)
        return estimate, k

    def put(self, state: Any, measured: Measured | None) -> Any:
        """`state` with what the boundary changed."""
        if measured is None:
            return state
        estimate, k = measured
        return state._replace(estimate=estimate, k=k)


@dataclasses.dataclass(frozen=True)
class AdaptiveK:
    """What `adaptive_k` returns: the number of micro-batches for the next window."""

    min_k: int
    max_k: int
    multiple: float
    hysteresis: float
    powers_of_two: bool

    def next(self, k: jax.Array, estimate: NoiseScale, weight: jax.Array) -> jax.Array:
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
    """An `every_k` for `accumulate` that follows the measured noise scale.

    Each window gets as many micro-batches as make the global batch `multiple` times
    the noise scale, from `min_k` at the start. All of it is traced: k changes without
    compiling anything anew, and is the same on all devices.

    It is a heuristic. At the noise scale, a batch twice as large saves a quarter of the
    steps and costs half as many examples again: a fair trade, and no more than that.
    The noise scale grows during training, often by far more than tenfold, and
    learning rates that were tuned for one batch size suit no other: schedules inside
    the optimizer count updates, of which there are now fewer.

    Args:
      min_k: The fewest micro-batches of a window. One alone shows no noise, so that
        without `axis_name` at least 2 are needed.
      max_k: The most. Where the noise hides all signal, it is what is chosen.
      multiple: The global batch, in noise scales.
      hysteresis: k stays, unless what is wanted is more than this part above or below
        it; in [0, 1). It moves by at most a factor of two from window to window, and
        the rounding to a power of two.
      powers_of_two: Whether k is a power of two (or a bound), or any integer.

    Returns:
      A value for `every_k`. `accumulate` then measures the noise scale, with a decay of
      0.99 unless its `noise_scale` says otherwise.

    Raises:
      TypeError: A bound that is no int.
      ValueError: A bound < 1, `max_k` < `min_k`, a `multiple` that is no positive
        number, a `hysteresis` not in [0, 1).

    Examples:
      >>> import optax, optax_accum as oa
      >>> tx = oa.accumulate(optax.sgd(0.1), oa.adaptive_k(2, 64), noise_scale=0.95)

    References:
      McCandlish et al., An Empirical Model of Large-Batch Training, 2018, sections 2.3
      and 5 (https://arxiv.org/abs/1812.06162).
    """
    low, high = _checks.count("min_k", min_k), _checks.count("max_k", max_k)
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
    hysteresis = _checks.fraction("hysteresis", hysteresis, part)
    return AdaptiveK(low, high, float(multiple), hysteresis, bool(powers_of_two))
