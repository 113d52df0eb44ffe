"""Questions to an optimizer state that has an `AccumulateState` somewhere in it."""

from typing import Any

import jax
import jax.numpy as jnp

from optax_accum import _checks, _window
from optax_accum._noise_scale import NoiseScale
from optax_accum._state import AccumulateState, none_in, states_in


def has_updated(opt_state: Any) -> jax.Array:
    """Whether the last micro-step made an update: the moment to log or evaluate.

    False on every micro-step that updated nothing: inside a window, at a boundary
    whose weights were all 0, on a skipped micro-step after an update.

    Args:
      opt_state: An `AccumulateState`, or any tree with one in it: the state of
        `optax.chain`, `optax.inject_hyperparams`, a Flax ``TrainState``, ...

    Returns:
      ``bool[]``.

    Raises:
      ValueError: `opt_state` holds no `AccumulateState`, or several.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_accum as oa
      >>> tx = optax.chain(optax.zero_nans(), oa.accumulate(optax.sgd(0.1), 2))
      >>> params = jnp.zeros(3)
      >>> state = tx.init(params)
      >>> for _ in range(4):
      ...     _, state = tx.update(jnp.ones(3), state, params)
      ...     print(oa.has_updated(state), oa.micro_step(state))
      False 1
      True 0
      False 1
      True 0
    """
    return jnp.asarray(find(opt_state).emitted)


def micro_step(opt_state: Any) -> jax.Array:
    """How many micro-steps the open window has seen, ``i32[]``; see `has_updated`."""
    return jnp.asarray(find(opt_state).micro_step)


def gradient_step(opt_state: Any) -> jax.Array:
    """How many updates the inner optimizer has made, ``i32[]``; see `has_updated`."""
    return jnp.asarray(find(opt_state).gradient_step)


def accumulated(opt_state: Any, *, reduction: _window.Reduction = "mean") -> Any:
    """The gradient of the open window so far: what closing it now would give.

    Across devices (`axis_name`), of this device's part of the window.

    Args:
      opt_state: As in `has_updated`.
      reduction: What `accumulate` was given.

    Returns:
      A tree like the parameters, in the accumulator's dtypes; zeros where the window
      is empty, ``None`` for leaves that are not accumulated.

    Raises:
      ValueError: As `has_updated`; an unknown `reduction`; `accumulate` with
        ``every_k=1``, which keeps no accumulator; a stack of states, as `jax.pmap`
        has them.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_accum as oa
      >>> tx = oa.accumulate(optax.sgd(0.1), every_k=4)
      >>> params = jnp.zeros(2)
      >>> state = tx.init(params)
      >>> print(oa.accumulated(state))
      [0. 0.]
      >>> _, state = tx.update(jnp.array([1.0, 2.0]), state, params, weight=3)
      >>> _, state = tx.update(jnp.array([5.0, 2.0]), state, params, weight=1)
      >>> print(oa.accumulated(state))
      [2. 2.]
    """
    _checks.one_of("reduction", reduction, _window.REDUCTIONS)
    state = find(opt_state)
    if isinstance(state.acc_grads, tuple) and state.acc_grads == ():
        raise ValueError(
            "`opt_state` holds no accumulator, because `accumulate` was given "
            "`every_k=1`: every micro-step's gradient goes straight to the optimizer"
        )
    if jnp.ndim(state.weight):
        raise ValueError(
            f"`opt_state` is a stack of {jnp.shape(state.weight)} windows. If they are "
            "those of several devices, sum them: oa.accumulated(oa.sum_windows("
            "opt_state)). Where all else is stacked too, as by jax.pmap and jax.vmap, "
            "jax.vmap(oa.accumulated)(opt_state) asks each of them"
        )
    is_open = jnp.asarray(state.micro_step) > 0

    def gradient(s):
        return jnp.where(is_open, s, jnp.zeros([], s.dtype))

    sums = _arrays(state.acc_grads)
    result = _window.close(sums, jnp.asarray(state.weight), reduction)
    return jax.tree.map(gradient, result)


def noise_scale(opt_state: Any) -> NoiseScale:
    """The noise scale as measured so far: see `oa.NoiseScale`.

    Args:
      opt_state: As in `has_updated`; `accumulate` was given a `noise_scale`.

    Returns:
      An `oa.NoiseScale`, averaged over all windows with at least two micro-batches of
      any weight, those of all devices counted.

    Raises:
      ValueError: As `has_updated`; the noise scale is not measured.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_accum as oa
      >>> tx = oa.accumulate(optax.sgd(0.1), every_k=8, noise_scale=0.9)
      >>> params = jnp.zeros(3)
      >>> state = tx.init(params)
      >>> for x in 1 + jax.random.normal(jax.random.key(0), (80, 4, 3)):
      ...     _, state = tx.update(x.mean(0), state, params, weight=len(x))
      >>> scale = oa.noise_scale(state)
      >>> bool(0.3 < scale.batch_size < 3), int(scale.count)
      (True, 10)
    """
    state = find(opt_state)
    if not state.noise_scale:
        raise ValueError(
            "`opt_state` holds no noise scale, because `accumulate` was not asked to "
            "measure it. Pass the decay of its averages: noise_scale=0.99"
        )
    return _arrays(state.noise_scale.estimate)


def _arrays(tree: Any) -> Any:
    """The arrays in `tree`, also out of what holds one and is a tree itself.

    Such are the variables in which NNX keeps an optimizer's state.
    """
    return jax.tree.map(
        jnp.asarray, tree, is_leaf=lambda x: hasattr(x, "__jax_array__")
    )


def find(opt_state: Any) -> AccumulateState:
    """The one `AccumulateState` in `opt_state`; raises where there is none or more."""
    if isinstance(opt_state, AccumulateState):
        return opt_state
    found = _nested_states_in(opt_state)
    if len(found) == 1:
        return found[0]
    if not found:
        raise none_in(opt_state)
    raise ValueError(
        f"`opt_state` holds {len(found)} states of `optax_accum.accumulate`, and each "
        "has an answer of its own. Pass the `AccumulateState` that you mean"
    )


def _nested_states_in(tree: Any) -> list[AccumulateState]:
    found = states_in(tree)
    return found + [x for state in found for x in _nested_states_in(state.inner_state)]
