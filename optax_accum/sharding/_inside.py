"""Devices that each run the program, as inside `jax.pmap` and `jax.shard_map`.

Or one device alone. See `_rows` for plain `jax.jit`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from optax_accum import _tree, _validate
from optax_accum._backward import Pullback
from optax_accum._state import AccumulateState
from optax_accum._types import DType, Grads, Params, Scalar, Tree
from optax_accum._window import Window
from optax_accum.sharding import _collectives
from optax_accum.sharding._data_parallel import DataParallel
from optax_accum.sharding._windows import is_stacked, map_local


class Inside(DataParallel):
    """The devices that share a window, seen from one of them; `Rows` is the other way.

    `accumulate` asks either the same questions.
    """

    __slots__ = ()

    def like(self, tree: Tree) -> Tree:
        """Shapes of what this device has of its own: those of `tree`."""
        return tree

    def placed(self, state: AccumulateState) -> AccumulateState:
        """`state` lies where the program runs."""
        return state

    def each(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` itself: there is only one device here."""
        return function

    def check(self, state: AccumulateState, grads: Grads, params: Params) -> None:
        """Raises for a state of other devices, or gradients that are not local."""
        windows = jnp.shape(state.window.weight)
        if windows and self.axis_name is None:
            raise ValueError(
                f"`state` holds {windows[0]} windows, one per device, but `accumulate` "
                "has no `axis_name`. Pass it the axis of these devices, and from plain "
                "jax.jit the `mesh` as well; or make one window of them: "
                "oa.sharding.sum_windows(state)"
            )
        if windows not in ((), (1,)):
            raise ValueError(
                f"`state` holds {windows[0]} windows on this device, but each device "
                "needs one: it was made for a different number of devices, or lacks "
                "the `in_specs` of oa.sharding.window_specs(state, axis_name). To "
                "change the number: oa.sharding.stack_windows(oa.sharding.sum_windows("
                "state), num_devices)"
            )
        for path, g in jax.tree_util.tree_leaves_with_path(grads):
            if _tree.unreduced(g):
                raise ValueError(
                    f"{_validate.named('grads', path)} is unreduced, because the "
                    "parameter is tagged `reduced`, and a window cannot hold that. For "
                    "one all-reduce per update, use oa.value_and_grad(..., mesh=mesh, "
                    "axis_name=..., local=True) with parameters without the tag, and "
                    "give `accumulate` the same `mesh` and `axis_name`. Or sum them in "
                    "every micro-step: jax.reshard(grads, P())"
                )
        _collectives.check_local(self.axis_name, grads)
        _collectives.check_same(self.axis_name, params)

    def shapes(self, tree: Tree) -> Tree:
        """The shapes of what one device has of `tree`."""
        return tree

    def weight(self, value: Any, dtype: DType) -> tuple[Scalar, float | None]:
        """As `_validate.weight`."""
        return _validate.weight(value, dtype)

    def value(self, value: Any) -> Scalar:
        """As `_validate.scalar_value`."""
        return _validate.scalar_value(value)

    def unstacked(self, state: AccumulateState) -> tuple[AccumulateState, bool]:
        """The state of this device, and whether it came as one row of a stack."""
        if not is_stacked(state):
            return state, False
        return map_local(_tree.without_leading_axis, state), True

    def stacked(self, state: AccumulateState) -> AccumulateState:
        """`state` with the window of this device as one row of a stack."""
        return map_local(_tree.with_leading_axis, state)

    def add(
        self, window: Window, grads: Grads | Pullback, *args: Any, **kwargs: Any
    ) -> Window:
        """`window.add`, in the shape in which the accumulator lies in memory.

        Under `pmap` and in a stacked state the buffer has an axis of devices. XLA adds
        in place only in the buffer's own shape, and copies S otherwise.
        """
        if self.axis_name is None or isinstance(grads, Pullback):
            return window.add(grads, *args, **kwargs)
        window = window._replace(grads=_tree.with_leading_axis(window.grads))
        window = window.add(_tree.with_leading_axis(grads), *args, **kwargs)
        return window._replace(grads=_tree.without_leading_axis(window.grads))
