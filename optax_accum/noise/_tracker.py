"""How `accumulate` measures the noise scale.

The sums are in the `Window`, each device's own until the boundary. The averages, and k,
change in the boundary's branch alone.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optax_accum import _state, _tree, _validate
from optax_accum._types import DType, Grads, Scalar, Tree
from optax_accum._window import Window
from optax_accum.noise._adaptive_k import AdaptiveK
from optax_accum.noise._noise_scale import NoiseScale, of_window

_DEFAULT_DECAY = 0.99


class Tracked(NamedTuple):
    """The `noise` of an `AccumulateState`.

    Attributes:
      estimate: The averages so far.
      k: ``i32[]``, how many micro-batches `adaptive_k` wants in the open window; ``()``
        without it.
    """

    estimate: NoiseScale
    k: Any


class NoTracker:
    """Measures nothing."""

    measures = False

    def init(self, dtype: DType) -> Tree:
        """Nothing to keep."""
        del dtype
        return ()

    def check(self, state: _state.AccumulateState, grads: Grads, axes: Any) -> None:
        """Any state will do."""

    def square_before(self, runs: bool | jax.Array, window: Window) -> None:
        """Nothing to know."""

    def close(
        self, noise: Tree, total: Window, square: Scalar | None, micro_steps: Scalar
    ) -> Tree:
        """Nothing changes."""
        del total, square, micro_steps
        return noise


@dataclasses.dataclass(frozen=True)
class Tracker:
    """Averages the noise scale of each window, and chooses the next one's k."""

    decay: float
    adaptive_k: AdaptiveK | None

    measures = True

    def init(self, dtype: DType) -> Tracked:
        """The `noise` of a new state."""
        k = () if self.adaptive_k is None else jnp.int32(self.adaptive_k.min_k)
        return Tracked(NoiseScale.empty(dtype), k)

    def check(self, state: _state.AccumulateState, grads: Grads, axes: Any) -> None:
        """Raises unless the noise scale of these gradients can be kept in `state`."""
        wanted = jax.tree.structure(jax.eval_shape(lambda: self.init(jnp.float32)))
        is_there = jax.tree.structure(state.noise) == wanted  # type: ignore[operator]
        if not (is_there and state.window.noise):
            raise ValueError(
                "`state` was made without this `noise_decay` or `adaptive_k`, and "
                "lacks its averages. Between two windows, take them from a new state: "
                "new = tx.init(params), and state._replace(window=new.window, "
                "noise=new.noise), before oa.sharding.stack_windows if it is stacked"
            )
        everywhere = _tree.varying(jnp.asarray(state.noise.estimate.signal))
        for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
            others = _tree.varying(leaf) - everywhere - {*axes}
            if others:
                raise ValueError(
                    f"{_validate.named('grads', path)} differs between the devices of "
                    f"{', '.join(map(repr, sorted(others)))}, which is not in "
                    "`axis_name`, and `noise_decay` needs the norm of whole gradients. "
                    "Leave `noise_decay` out if parameters are sharded"
                )

    def square_before(self, runs: bool | jax.Array, window: Window) -> Scalar:
        """‖S‖², if the optimizer runs, in a branch before its own.

        Its updates overwrite S. Read in the same branch, S would be copied: XLA does
        not know that the norm is taken first.
        """
        dtype = window.weight.dtype
        return lax.cond(
            runs,
            lambda grads: _tree.squared_norm(grads, dtype),
            lambda _: jnp.zeros([], dtype),
            window.grads,
        )

    def close(
        self, noise: Tracked, total: Window, square: Scalar | None, micro_steps: Scalar
    ) -> Tracked:
        """The averages after a window of these totals; `square` is ‖S‖², if known."""
        if square is None:
            square = _tree.squared_norm(total.grads, total.weight.dtype)
        sample = of_window(total, square / total.weight**2)
        estimate, k = noise.estimate.add(sample, self.decay), noise.k
        if self.adaptive_k is not None:
            k = self.adaptive_k.next(k, estimate, total.weight / micro_steps)
        return Tracked(estimate, k)


def make_tracker(
    noise_decay: float | None, every_k: Any, *, one_device: bool
) -> Tracker | NoTracker:
    """What `accumulate` measures with these options.

    Raises:
      TypeError: `noise_decay` is not a number.
      ValueError: `noise_decay` is not a decay; `adaptive_k` from 1 on one device.
    """
    follows = every_k if isinstance(every_k, AdaptiveK) else None
    if follows is not None and follows.min_k == 1 and one_device:
        raise ValueError(
            "`every_k` is an `adaptive_k` with min_k=1, but noise cannot be measured "
            "on one micro-batch: k would stay 1. Use min_k=2"
        )
    if noise_decay is not None:
        meaning = "the decay of the averages of the noise scale"
        return Tracker(_validate.fraction("noise_decay", noise_decay, meaning), follows)
    return NoTracker() if follows is None else Tracker(_DEFAULT_DECAY, follows)


def estimate(opt_state: Tree) -> NoiseScale:
    """Returns the noise scale that `accumulate` has measured so far.

    Args:
      opt_state: The state of an `oa.accumulate` with `noise_decay` or
        `oa.noise.adaptive_k`, or any tree with that state in it.

    Returns:
      An `oa.noise.NoiseScale`, averaged over all windows in which at least two
      micro-batches, on all devices together, had any weight.

    Raises:
      ValueError: `opt_state` holds no `AccumulateState`, or several; the noise scale is
        not measured.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_accum as oa
      >>> tx = oa.accumulate(optax.sgd(0.1), every_k=8, noise_decay=0.9)
      >>> params = jnp.zeros(3)
      >>> state = tx.init(params)
      >>> for x in 1 + jax.random.normal(jax.random.key(0), (80, 4, 3)):
      ...     _, state = tx.update(x.mean(0), state, params, weight=len(x))
      >>> scale = oa.noise.estimate(state)
      >>> bool(0.3 < scale.batch_size < 3), int(scale.count)
      (True, 10)
    """
    state = _state.find(opt_state)
    if not state.noise:
        raise ValueError(
            "`opt_state` holds no noise scale, because `accumulate` does not measure "
            "it by default. Pass it noise_decay=0.99, the decay of its averages"
        )
    return _state.plain_arrays(state.noise.estimate)
