"""One open window per device, as the rows of one array.

Inside `jax.pmap` and `jax.shard_map` a window's sums are each device's own until the
boundary. Between two calls they are arrays with a leading axis of devices: the state is
*stacked*. `jax.pmap` stacks everything; with `jax.shard_map` only what is local is
stacked, and `accumulate` takes such a state as it comes, with one row on each device.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from optax_accum import _checks, _types
from optax_accum._state import AccumulateState, map_states, states_in

LOCAL = ("skipped", "weight", "value", "skip_state", "acc_grads")  # and noise sums


def stack_windows(opt_state: Any, num_devices: int, *, all_leaves: bool = False) -> Any:
    """Gives every device a row of the open window, for `jax.shard_map` or `jax.pmap`.

    The first device goes on with what `opt_state` holds, the others start from zero;
    over all of them the sums are what they were. For large models run it under
    ``jax.jit(..., out_shardings=...)``, so that no device ever holds all rows.

    Args:
      opt_state: What `init` returned or `sum_windows` made: an `AccumulateState`, or
        any tree with one in it.
      num_devices: How many devices the axis has, ``mesh.shape["data"]``.
      all_leaves: Whether everything gets an axis of devices, all of them with the same
        content, as `jax.pmap` needs it, and not only what is local.

    Returns:
      `opt_state`, whose local fields (see `AccumulateState`) have the shapes
      ``[num_devices, ...]``.

    Raises:
      TypeError: `num_devices` is no int.
      ValueError: `num_devices` < 1; `opt_state` holds no `AccumulateState`, or is
        stacked already.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_accum as oa
      >>> tx = oa.accumulate(optax.sgd(0.1), every_k=4, axis_name="data")
      >>> state = oa.stack_windows(tx.init(jnp.zeros(3)), 8)
      >>> state.acc_grads.shape, state.weight.shape, state.micro_step.shape
      ((8, 3), (8,), ())
    """
    num_devices = _checks.count("num_devices", num_devices)

    def repeat(x):
        return jnp.repeat(jnp.asarray(x)[None], num_devices, axis=0)

    def first_row(x):
        x = jnp.asarray(x)
        # Chosen by the row's number, which each device knows by itself.
        row = jnp.arange(num_devices).reshape(-1, *[1] * x.ndim)
        return jnp.where(row == 0, x[None], jnp.zeros([], x.dtype))

    def stack(state):
        if jnp.ndim(state.weight):
            raise ValueError(
                f"`opt_state` is stacked already: its `weight` has shape "
                f"{jnp.shape(state.weight)}. For another number of devices, make one "
                "window of it first, with oa.sum_windows(opt_state)"
            )
        everything = jax.tree.map(repeat, state) if all_leaves else state
        skip_state = jax.tree.map(repeat, state.skip_state)
        return _with_local(everything, first_row, state)._replace(skip_state=skip_state)

    return map_states(opt_state, stack, repeat if all_leaves else lambda x: x)


def sum_windows(opt_state: Any) -> Any:
    """Makes one window of those of all devices: a state for any number of devices.

    A stacked state is saved and restored as it is, bit for bit, on the same number of
    devices. For another number, or for one device, sum its windows first. They may be
    open: what they hold is added up, and `micro_step` stays.

    Args:
      opt_state: A stacked state, from `jax.shard_map` or from `jax.pmap`.

    Returns:
      The state as `init` would have built it. `skip_state` is the first device's.

    Raises:
      ValueError: `opt_state` holds no `AccumulateState`, or is not stacked.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_accum as oa
      >>> tx = oa.accumulate(optax.sgd(0.1), every_k=4, axis_name="data")
      >>> state = oa.stack_windows(tx.init(jnp.zeros(3)), 8)
      >>> on_two_devices = oa.stack_windows(oa.sum_windows(state), 2)
      >>> on_two_devices.acc_grads.shape
      (2, 3)
    """

    def first(x):
        """The first device's, without gathering the others'."""
        x = jnp.asarray(x)
        return _types.chosen(x, jnp.arange(len(x)) == 0, total)

    def total(x):
        return x.sum(0, dtype=x.dtype)

    def merge(state):
        if not jnp.ndim(state.weight):
            raise ValueError(
                "`opt_state` holds one window, not one per device: its `weight` is a "
                "scalar. Nothing is to be summed; oa.stack_windows(opt_state, "
                "num_devices) gives each device its own"
            )
        everything = jax.tree.map(first, state) if all_stacked else state
        skip_state = jax.tree.map(first, state.skip_state)
        return _with_local(everything, total, state)._replace(skip_state=skip_state)

    # `jax.pmap` stacks what is around the windows as well.
    all_stacked = any(jnp.ndim(s.micro_step) > 0 for s in states_in(opt_state))
    return map_states(opt_state, merge, first if all_stacked else lambda x: x)


def window_specs(opt_state: Any, axis_name: Any) -> Any:
    """Where the leaves of a stacked state lie: for ``in_specs`` and ``out_specs``.

    Args:
      opt_state: An `AccumulateState` or any tree with one in it, of arrays or of
        `jax.ShapeDtypeStruct`, stacked or not.
      axis_name: The axis of the mesh, or several, that `accumulate` was given.

    Returns:
      A tree like `opt_state` of ``PartitionSpec``: ``P(axis_name)`` for what is local,
      ``P()`` for everything else.

    Raises:
      ValueError: `opt_state` holds no `AccumulateState`.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_accum as oa
      >>> tx = oa.accumulate(optax.sgd(0.1), every_k=4, axis_name="data")
      >>> specs = oa.window_specs(tx.init(jnp.zeros(3)), "data")
      >>> specs.acc_grads, specs.micro_step
      (P('data',), P())
    """
    local, shared = PartitionSpec(axis_name), PartitionSpec()

    def specs(state):
        everything = jax.tree.map(lambda _: shared, state)
        return _with_local(everything, lambda _: local, state)

    return map_states(opt_state, specs, lambda _: shared)


def is_stacked(state: AccumulateState) -> bool:
    """Whether the local fields have an axis of devices."""
    return jnp.ndim(state.weight) > 0


def take_row(state: AccumulateState) -> AccumulateState:
    """The state of this device, which holds one row."""
    return _with_local(state, lambda x: x[0], state)


def put_row(state: AccumulateState) -> AccumulateState:
    """`state` as one row."""
    return _with_local(state, lambda x: x[None], state)


def as_row(tree: Any) -> Any:
    """Each leaf with a leading axis of one."""
    return jax.tree.map(lambda x: x[None], tree)


def row_of(tree: Any) -> Any:
    """The first row of each leaf."""
    return jax.tree.map(lambda x: x[0], tree)


def _with_local(
    state: AccumulateState, function: Callable[[Any], Any], source: AccumulateState
) -> AccumulateState:
    """`state` with `function` of the local leaves of `source`."""
    own = {name: jax.tree.map(function, getattr(source, name)) for name in LOCAL}
    if source.noise_scale:
        sums = jax.tree.map(function, source.noise_scale.sums)
        own["noise_scale"] = state.noise_scale._replace(sums=sums)
    return state._replace(**own)
