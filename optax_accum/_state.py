"""The state of `accumulate`, queries that find it, and the way from `MultiSteps`."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_accum import _tree, _validate, _window
from optax_accum._overwrite import Overwrite, Overwritten
from optax_accum._types import Grads, Reduction, Scalar, Tree
from optax_accum._window import Window


class AccumulateState(NamedTuple):
    """The state of `accumulate`: a pytree, which any checkpointer saves as it is.

    Read it with `oa.has_updated`, `oa.micro_step`, `oa.gradient_step` and
    `oa.accumulated`, which also find it inside other states. After a boundary,
    `window.weight` and `window.loss` are still those of the closed window, until the
    next micro-step. `window.grads` is undefined then, because the updates use its
    memory.

    Across devices (`axis_name`), `window` and `skip_state` are each device's own; the
    rest is the same everywhere. With `mesh` they have a leading axis of devices,
    ``[D, ...]``.

    Attributes:
      micro_step: ``i32[]``, how many micro-steps the open window has seen.
      gradient_step: ``i32[]``, how many updates the inner optimizer has made.
      has_updated: ``bool[]``, whether the last micro-step made an update.
      window: The sums, an `oa.Window`. Its ``grads`` are ``()`` with ``every_k=1``,
        which needs no accumulator.
      skip_state: What `skip` returned besides its decision; ``()`` without `skip`.
      noise: ``()``, or if `accumulate` measures the noise scale, ``estimate``, an
        `oa.noise.NoiseScale`, and ``k``, the ``i32[]`` that `oa.noise.adaptive_k` has
        chosen for the open window, or ``()``.
      inner_state: The inner optimizer's state.
    """

    micro_step: Scalar
    gradient_step: Scalar
    has_updated: Scalar
    window: Window
    skip_state: Tree
    noise: Tree
    inner_state: Tree


# --- Finding it in other states ---


def find(opt_state: Tree) -> AccumulateState:
    """The one `AccumulateState` in `opt_state`; raises if there is none, or several."""
    if isinstance(opt_state, AccumulateState):
        return opt_state
    found = _nested_states_in(opt_state)
    if not found:
        raise _none_in(opt_state)
    if len(found) > 1:
        raise ValueError(
            f"`opt_state` holds {len(found)} states of `optax_accum.accumulate`. Pass "
            "the one `AccumulateState` that you mean"
        )
    return found[0]


def states_in(tree: Tree) -> list[AccumulateState]:
    """The outermost `AccumulateState`s in `tree`."""
    return [x for x in jax.tree.leaves(tree, is_leaf=_is_state) if _is_state(x)]


def map_states(
    opt_state: Tree,
    function: Callable[[AccumulateState], Any],
    otherwise: Callable[[Any], Any],
) -> Tree:
    """`opt_state` with `function` of each outermost `AccumulateState` in it.

    All other leaves become ``otherwise(leaf)``.

    Raises:
      ValueError: There is none.
    """
    if not states_in(opt_state):
        raise _none_in(opt_state)
    return jax.tree.map(
        lambda node: function(node) if _is_state(node) else otherwise(node),
        opt_state,
        is_leaf=_is_state,
    )


def plain_arrays(tree: Tree) -> Tree:
    """The arrays in `tree`, also out of what holds one and is a tree itself.

    Such are the variables in which NNX keeps an optimizer's state.
    """
    return jax.tree.map(
        jnp.asarray, tree, is_leaf=lambda x: hasattr(x, "__jax_array__")
    )


def _nested_states_in(tree: Tree) -> list[AccumulateState]:
    found = states_in(tree)
    return found + [x for state in found for x in _nested_states_in(state.inner_state)]


def _is_state(node: Any) -> bool:
    return isinstance(node, AccumulateState)


def _none_in(opt_state: Tree) -> ValueError:
    if hasattr(opt_state, "mini_step"):
        return ValueError(
            "`opt_state` must hold the state of `optax_accum.accumulate`; got that of "
            "`optax.MultiSteps`. Use oa.accumulate(optimizer, every_k=k) in its place; "
            "oa.from_multi_steps(opt_state) converts a running state"
        )
    return ValueError(
        "`opt_state` must hold the state of `optax_accum.accumulate`; found none "
        f"in a {type(opt_state).__name__}. Pass the optimizer state that `init` or "
        "`update` returned"
    )


# --- Queries ---


def has_updated(opt_state: Tree) -> Scalar:
    """Returns whether the last micro-step made an update: the time to log or save.

    False after every micro-step without an update: inside a window, and at a boundary
    whose weights are all 0.

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
    return jnp.asarray(find(opt_state).has_updated)


def micro_step(opt_state: Tree) -> Scalar:
    """Returns how many micro-steps the open window has seen, ``i32[]``.

    Arguments and errors are those of `has_updated`.
    """
    return jnp.asarray(find(opt_state).micro_step)


def gradient_step(opt_state: Tree) -> Scalar:
    """Returns how many updates the inner optimizer has made, ``i32[]``.

    Arguments and errors are those of `has_updated`.
    """
    return jnp.asarray(find(opt_state).gradient_step)


def accumulated(
    opt_state: Tree,
    *,
    reduction: Reduction = "mean",
    overwrite: Overwrite | None = None,
) -> Grads:
    """Returns the open window's gradient so far, as if it were closed now.

    Across devices (`axis_name`), that of this device's part of the window. After a
    boundary no window is open, and the result is zeros. To log the norm of an update's
    gradient, put ``optax.snapshot("grad_norm", optax.tree.norm)`` inside `accumulate`,
    and read it with ``optax.tree.get(opt_state, "grad_norm")``.

    Args:
      opt_state: As in `has_updated`.
      reduction: What `accumulate` was given.
      overwrite: What `accumulate` was given.

    Returns:
      A tree like the parameters, in the accumulator's dtypes, with ``None`` for leaves
      that are not accumulated.

    Raises:
      ValueError: As `has_updated`; `reduction` is unknown; `accumulate` has
        ``every_k=1``, and so no accumulator; `opt_state` is a stack of states, as
        `jax.pmap` has them.

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
    _validate.one_of("reduction", reduction, _window.REDUCTIONS)
    state = find(opt_state)
    window = state.window
    if isinstance(window.grads, tuple) and window.grads == ():
        raise ValueError(
            "`opt_state` holds no accumulator, because `accumulate` was given "
            "`every_k=1`: every micro-step's gradient goes straight to the optimizer"
        )
    if jnp.ndim(window.weight):
        raise ValueError(
            f"`opt_state` is a stack of {jnp.shape(window.weight)} windows. If they "
            "are those of several devices, sum them: oa.accumulated("
            "oa.sharding.sum_windows(opt_state)). If the whole state is stacked, as by "
            "jax.pmap and jax.vmap, use jax.vmap(oa.accumulated)(opt_state)"
        )
    is_open = jnp.asarray(state.micro_step) > 0
    _, grads = plain_arrays(window).result(reduction, Overwritten(overwrite))
    return jax.tree.map(lambda g: jnp.where(is_open, g, jnp.zeros([], g.dtype)), grads)


# --- From Optax ---


def from_multi_steps(
    multi_steps_state: Tree, *, use_grad_mean: bool = True
) -> AccumulateState:
    """Converts the state of a running `optax.MultiSteps`, to continue it here.

    An open window continues where it was: its running mean over n micro-steps becomes
    their sum.

        S = n · ḡ,  W = n

    Args:
      multi_steps_state: An `optax.MultiStepsState`, restored or live. Its accumulator
        keeps its dtype.
      use_grad_mean: As given to `optax.MultiSteps`. If it is ``False``, use
        ``accumulate(..., reduction="sum")``.

    Returns:
      The state for ``accumulate(inner, every_k)`` with the same inner optimizer and
      the same k; with ``skip`` and ``on_skip="wait"`` if there was a
      ``should_skip_update_fn``. `window.skipped` and `window.loss` start from 0.

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
    weight = count.astype(_tree.scalar_dtype(old.acc_grads))

    def as_sum(mean: jax.Array) -> jax.Array:
        return mean * weight.astype(mean.dtype) if use_grad_mean else mean

    return AccumulateState(
        micro_step=count,
        gradient_step=gradient_step,
        has_updated=(count == 0) & (gradient_step > 0),
        window=Window(
            loss=jnp.zeros_like(weight),
            grads=jax.tree.map(as_sum, old.acc_grads),
            weight=weight,
            skipped=jnp.zeros([], jnp.int32),
            noise=_window.NoNoiseSums(),
        ),
        skip_state=old.skip_state,
        noise=(),
        inner_state=old.inner_opt_state,
    )
