"""One open window per device, stacked along a leading axis.

A window's sums are each device's own until the boundary. Between two calls they are
arrays with a leading axis of devices: the state is *stacked*. `jax.pmap` stacks
everything; for `jax.shard_map` and plain `jax.jit` only what is local is stacked.
Inside `jax.shard_map` `accumulate` takes such a state as it comes, one window on each
device (`_inside`); under plain `jax.jit` it has all of them at once (`_rows`).
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from optax_accum import _validate
from optax_accum._overwrite import Overwrite, Overwritten
from optax_accum._state import AccumulateState, find, map_states, states_in
from optax_accum._types import AxisName, Specs, Tree
from optax_accum.sharding._rows import reduce_rows, row, sum_rows


def stack_windows(
    opt_state: Tree,
    num_devices: int,
    *,
    all_leaves: bool = False,
    rescale: bool = True,
    overwrite: Overwrite | None = None,
) -> Tree:
    """Gives every device its own window, along a leading axis of devices.

    Use it on the state for `jax.shard_map` and `jax.pmap`, and after `sum_windows`.
    (`accumulate` with a `mesh` does the same in `init`.)

    The first device continues the window in `opt_state`, the others start from zero;
    the sums over all of them do not change. For large models run it under
    ``jax.jit(..., out_shardings=...)``: then no device ever holds all windows.

    Args:
      opt_state: The result of `init` or `sum_windows`: an `AccumulateState`, or any
        tree with one in it.
      num_devices: How many devices the axis has, ``mesh.shape["data"]``.
      all_leaves: Whether to give all leaves an axis of devices, as `jax.pmap` needs it.
        By default only the local fields get one.
      rescale: Whether each device's micro-batch has the size that one device's had.
        Then one call runs `num_devices` of them, and `micro_step`, which counts calls,
        is divided by that. Pass ``False`` if all devices together run one such
        micro-batch per call.
      overwrite: As given to `accumulate`.

    Returns:
      `opt_state`, whose local fields (see `AccumulateState`) have the shapes
      ``[num_devices, ...]``.

    Raises:
      TypeError: `num_devices` is not an int.
      ValueError: `num_devices` < 1; `opt_state` holds no `AccumulateState`, or is
        already stacked; `micro_step` is not a multiple of `num_devices`. (Under
        `jax.jit`, where it is unknown, it is rounded up, and the window ends early.)

    Examples:
      >>> import jax.numpy as jnp, optax, optax_accum as oa
      >>> tx = oa.accumulate(optax.sgd(0.1), every_k=4, axis_name="data")
      >>> state = oa.sharding.stack_windows(tx.init(jnp.zeros(3)), 8)
      >>> state.window.grads.shape, state.window.weight.shape, state.micro_step.shape
      ((8, 3), (8,), ())
    """
    num_devices = _validate.whole_number("num_devices", num_devices)

    def repeat(x: Any) -> jax.Array:
        return jnp.repeat(jnp.asarray(x)[None], num_devices, axis=0)

    def on_first_device(x: Any) -> jax.Array:
        x = jnp.asarray(x)
        # Chosen by the device's number, which each knows by itself.
        number = jnp.arange(num_devices).reshape(-1, *[1] * x.ndim)
        return jnp.where(number == 0, x[None], jnp.zeros([], x.dtype))

    def stack(state: AccumulateState) -> AccumulateState:
        if is_stacked(state):
            raise ValueError(
                "`opt_state` is stacked already: its `window.weight` has shape "
                f"{jnp.shape(state.window.weight)}. To change the number of devices, "
                "make one window of it first, with oa.sharding.sum_windows(opt_state)"
            )
        if rescale:
            # By tree, because NNX keeps it in a variable.
            calls = functools.partial(_calls, num_devices=num_devices)
            state = state._replace(micro_step=jax.tree.map(calls, state.micro_step))
        everything = jax.tree.map(repeat, state) if all_leaves else state
        window = jax.tree.map(on_first_device, state.window)
        # The largest of all is not to be the zero of a device that has seen nothing.
        grads = Overwritten(overwrite).map(
            lambda r, s, x: repeat(x) if r == "max" else s,
            window.grads,
            state.window.grads,
        )
        return everything._replace(
            window=window._replace(grads=grads),
            skip_state=jax.tree.map(repeat, state.skip_state),
        )

    return map_states(opt_state, stack, repeat if all_leaves else lambda x: x)


def sum_windows(
    opt_state: Tree, *, rescale: bool = True, overwrite: Overwrite | None = None
) -> Tree:
    """Sums the windows of all devices into one, to change the number of devices.

    You need it to continue on a different number of devices, or on one, even inside a
    window. On the same number, a stacked state is saved and restored as it is.

    Args:
      opt_state: A stacked state, from `jax.shard_map`, from `jax.pmap`, or of an
        `accumulate` with a `mesh`.
      rescale: Whether `micro_step` becomes the number of micro-batches that all devices
        have run, which `stack_windows` divides by the new number of devices: then the
        window ends after as many examples if each device's micro-batch keeps its size.
        Pass ``False`` if the batch of a call, over all devices, keeps its size.
      overwrite: As given to `accumulate`.

    Returns:
      The state as `init` without a `mesh` builds it. `skip_state` is the first
      device's.

    Raises:
      ValueError: `opt_state` holds no `AccumulateState`, or is not stacked.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_accum as oa
      >>> tx = oa.accumulate(optax.sgd(0.1), every_k=4, axis_name="data")
      >>> state = oa.sharding.stack_windows(tx.init(jnp.zeros(3)), 8)
      >>> on_two_devices = oa.sharding.stack_windows(oa.sharding.sum_windows(state), 2)
      >>> on_two_devices.window.grads.shape
      (2, 3)
    """
    first = functools.partial(row, number=0)

    def merge(state: AccumulateState) -> AccumulateState:
        if not is_stacked(state):
            raise ValueError(
                "`opt_state` holds one window, not one per device: its "
                "`window.weight` is a scalar. There is nothing to sum; "
                "oa.sharding.stack_windows(opt_state, num_devices) gives each device "
                "its own"
            )
        num_devices = jnp.shape(state.window.weight)[0]
        everything = jax.tree.map(first, state) if all_stacked else state
        if rescale:
            count = jax.tree.map(lambda c: c * num_devices, everything.micro_step)
            everything = everything._replace(micro_step=count)
        weight = jnp.asarray(state.window.weight)
        sums = jax.tree.map(sum_rows, state.window._replace(grads=()))
        grads = Overwritten(overwrite).map(
            lambda reduction, x: reduce_rows(reduction or "sum", x, weight),
            state.window.grads,
        )
        return everything._replace(
            window=sums._replace(grads=grads),
            skip_state=jax.tree.map(first, state.skip_state),
        )

    # `jax.pmap` stacks what is around the windows as well.
    all_stacked = any(jnp.ndim(s.micro_step) > 0 for s in states_in(opt_state))
    return map_states(opt_state, merge, first if all_stacked else lambda x: x)


def micro_steps_left(
    opt_state: Tree, batch_size: float, micro_batch_size: float
) -> int:
    """Returns how many micro-steps the open window still needs if their size changes.

    Use it to continue on a different number of devices with the same global batch: run
    this many micro-steps, the last one with ``boundary=True`` (see `stack_windows` for
    the state). With W the weight of the open window it is

        ⌈(batch_size - W) / micro_batch_size⌉

    Both sizes must be in the unit of `weight`, such as examples. The last micro-step
    may need fewer than `micro_batch_size`: fill it up with padding that the loss masks
    out and `weight` does not count.

    If `weight` counts tokens, or if micro-batches were rejected, W does not say how
    many examples of the global batch are done. Ask the data loader instead, and divide
    the remaining examples by those of a micro-step.

    It reads values of the state: call it outside of `jax.jit`.

    Args:
      opt_state: An `AccumulateState`, or any tree with one in it, stacked or not.
      batch_size: The size of the global batch.
      micro_batch_size: The size of a micro-step, over all devices.

    Returns:
      An int >= 1; between two windows, that of a whole window.

    Raises:
      ValueError: The open window already has `batch_size` or more; a size is not
        positive; `opt_state` holds no `AccumulateState`, or several.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_accum as oa
      >>> tx = oa.accumulate(optax.sgd(0.1))
      >>> params = jnp.zeros(3)
      >>> _, state = tx.update(
      ...     jnp.ones(3), tx.init(params), params, weight=16, boundary=False
      ... )
      >>> oa.sharding.micro_steps_left(state, batch_size=64, micro_batch_size=12)
      4
    """
    sizes = {"batch_size": batch_size, "micro_batch_size": micro_batch_size}
    for name, size in sizes.items():
        if not 0 < size < math.inf:
            raise ValueError(f"`{name}` must be a finite number > 0; got {size!r}")
    state = find(opt_state)
    is_open = jnp.max(jnp.asarray(state.micro_step)) > 0
    seen = float(jnp.where(is_open, jnp.sum(jnp.asarray(state.window.weight)), 0))
    # Sums of fractions may be off by a rounding: of weights like 0.7, and of shares
    # that devices have of a whole number. Whole numbers are exact.
    rounding = 1e-6 * batch_size
    if abs(seen - round(seen)) < rounding:
        seen = round(seen)
    if all(x == round(x) for x in (seen, *sizes.values())):
        rounding = 0
    left = batch_size - seen
    if left <= rounding:
        raise ValueError(
            f"the open window in `opt_state` has a weight of {seen:g}, and "
            f"`batch_size={batch_size!r}` leaves nothing to add. Give both in the unit "
            "of `weight`; to close the window as it is, pass weight=0 and "
            "boundary=True"
        )
    return math.ceil((left - rounding) / micro_batch_size)


def window_specs(opt_state: Tree, axis_name: AxisName) -> Specs:
    """Returns how a stacked state is sharded, for ``in_specs`` and ``out_specs``.

    Args:
      opt_state: An `AccumulateState` or any tree with one in it, of arrays or of
        `jax.ShapeDtypeStruct`, stacked or not.
      axis_name: The axis of the mesh, or several, as given to `accumulate`.

    Returns:
      A tree like `opt_state` of ``PartitionSpec``: ``P(axis_name)`` for local fields,
      ``P()`` for the rest.

    Raises:
      ValueError: `opt_state` holds no `AccumulateState`.

    Examples:
      >>> import jax.numpy as jnp, optax, optax_accum as oa
      >>> tx = oa.accumulate(optax.sgd(0.1), every_k=4, axis_name="data")
      >>> specs = oa.sharding.window_specs(tx.init(jnp.zeros(3)), "data")
      >>> specs.window.grads, specs.micro_step
      (P('data',), P())
    """
    shared = PartitionSpec()

    def specs(state: AccumulateState) -> Specs:
        everything = jax.tree.map(lambda _: shared, state)
        return map_local(
            lambda tree: jax.tree.map(lambda _: PartitionSpec(axis_name), tree),
            everything,
        )

    return map_states(opt_state, specs, lambda _: shared)


def _calls(micro_batches: Any, num_devices: int) -> jax.Array:
    """How many calls it takes `num_devices` to run so many micro-batches."""
    count = jnp.asarray(micro_batches)
    if not isinstance(count, jax.core.Tracer) and int(count) % num_devices:
        raise ValueError(
            f"`opt_state` holds an open window of {int(count)} micro-batches, which "
            f"{num_devices} devices do not run in whole calls. Close it first, with "
            "boundary=True, or change their number between two windows; or if a "
            "call keeps its batch over all devices, pass rescale=False here and to "
            "sum_windows"
        )
    return (count + num_devices - 1) // num_devices


def is_stacked(state: AccumulateState) -> bool:
    """Whether the local fields have an axis of devices."""
    return jnp.ndim(state.window.weight) > 0


def map_local(
    function: Callable[[Tree], Tree], state: AccumulateState
) -> AccumulateState:
    """`state` with `function` of what is each device's own."""
    return state._replace(
        window=function(state.window), skip_state=function(state.skip_state)
    )
