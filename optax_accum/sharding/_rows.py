"""Devices as rows: what is each device's own, under plain `jax.jit`.

Outside of `jax.pmap` and `jax.shard_map` a program has whole arrays, and what is each
device's own is a row of one: a leading axis of devices, sharded over them. Rows are
added to where they lie. Their sum is the exchange.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from optax_accum import _tree, _validate
from optax_accum._state import AccumulateState
from optax_accum._types import (
    AnyMesh,
    AxisName,
    DType,
    Grads,
    Leaf,
    Params,
    Scalar,
    Tree,
)
from optax_accum._window import Window
from optax_accum.sharding._data_parallel import DataParallel, scatter_specs


class Rows(NamedTuple):
    """The devices that share a window, seen from outside: each has a row.

    Attributes:
      axis_name: The name of their axis, or several.
      mesh: The mesh with that axis.
      scatter: Whether each device keeps only its part of the gradients' sum.
    """

    axis_name: AxisName
    mesh: AnyMesh
    scatter: bool

    @classmethod
    def of(cls, axis_name: AxisName | None, mesh: AnyMesh, scatter: bool) -> Self:
        """Checks them against each other, as `DataParallel.of` does."""
        devices = DataParallel.of(axis_name, mesh, scatter)
        return cls(devices.axis_name, mesh, devices.scatter)

    @property
    def axes(self) -> tuple[Any, ...]:
        """The names in `axis_name`."""
        return _tree.axes_of(self.axis_name)

    @property
    def num_devices(self) -> int:
        """How many devices there are."""
        return self._from_inside.num_shards

    @property
    def _from_inside(self) -> DataParallel:
        """The same devices, as each of them sees them."""
        return DataParallel(self.axis_name, self.mesh, self.scatter)

    def check_place(self, remedy: str) -> None:
        """Raises inside of the axis, where there are no rows."""
        self._from_inside.check_place(remedy)

    def each(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` of each row of its arguments."""
        return lambda *args: jax.vmap(function)(*self.spread(args))

    def spread(self, tree: Tree) -> Tree:
        """`tree` with each row on its device, as an Explicit mesh asks for it.

        What a caller made, or a number that devices share, lies nowhere in particular.
        """
        return jax.tree.map(lambda x: self._from_inside.spread(x, 0), tree)

    # --- Summing ---

    def sum(self, grads: Grads, rest: Tree) -> tuple[Grads, Tree]:
        """The sums over all rows, see `_window.Devices`."""
        if not self.scatter:
            return jax.tree.map(sum_rows, (grads, rest))
        # By hand, because not every compiler makes a reduce-scatter of a sum whose
        # result is sharded.
        specs = scatter_specs(self.shapes(grads), self.mesh, self.axis_name)
        return jax.shard_map(
            lambda rows: self._from_inside.sum(*_tree.without_leading_axis(rows)),
            mesh=self.mesh,
            axis_names=set(self.axes),
            in_specs=P(self.axis_name),
            out_specs=(specs, P()),
            check_vma=False,
        )(self.spread((grads, rest)))

    def reduce(self, reduction: str, x: jax.Array, weight: jax.Array) -> jax.Array:
        """The "sum", "max" or "last" of all rows, see `_window.Devices`."""
        return reduce_rows(reduction, x, weight)

    # --- Making and checking ---

    def like(self, tree: Tree) -> Tree:
        """Shapes ``[D, ...]`` of what is each device's own, and where it lies.

        Each device has one row. A row is sharded over the mesh's other axes as its
        leaf in `tree` is.
        """
        return jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(
                (self.num_devices, *jnp.shape(x)),
                _tree.dtype_of(x),
                sharding=NamedSharding(self.mesh, P(self.axis_name, *self._rest(x))),
            ),
            tree,
        )

    def placed(self, state: AccumulateState) -> AccumulateState:
        """`state`, all of it on the devices of the mesh: counts and the like on each.

        Every micro-step returns them so. The second one then runs the program of the
        first; and checkpoints hold no array of one process, and are restored where a
        step takes them.
        """

        def place(x: Any) -> Any:
            is_array = isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)
            if not is_array or x.committed or not isinstance(self.mesh, Mesh):
                return x
            return jax.device_put(x, NamedSharding(self.mesh, P()))

        return jax.tree.map(place, state)

    def _rest(self, x: Leaf) -> list[Any]:
        """How `x` is sharded over the mesh's other axes, as far as that is known."""
        spec = _tree.spec(x)
        if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer):
            spec, sharding = [], x.sharding
            if isinstance(sharding, NamedSharding) and sharding.mesh == self.mesh:
                spec = list(sharding.spec)
        return [
            tuple(name for name in _tree.axes_of(part) if name not in self.axes) or None
            for part in spec
        ]

    def check(self, state: AccumulateState, grads: Grads, params: Params) -> None:
        """Raises unless state and gradients have a row for each device."""
        count = self.num_devices
        windows = jnp.shape(state.window.weight)
        if windows == ():
            raise ValueError(
                f"`state` holds one window, but with `mesh` each of {self._shown} "
                "needs its own. Take a state from `init`, or give every device a "
                f"window: oa.sharding.stack_windows(state, {count})"
            )
        if windows != (count,):
            raise ValueError(
                f"`state` holds the windows of {windows[0]} devices, but needs those "
                f"of {self._shown}. Sum them, and give each device its own again: "
                "oa.sharding.stack_windows("
                f"oa.sharding.sum_windows(state), {count})"
            )
        # A parameter may have as many entries as there are devices.
        if params is None:
            whole = self.shapes(state.window.grads)
        else:
            whole = _tree.trained(params)
        shapes = dict(jax.tree_util.tree_leaves_with_path(whole))
        for path, g in jax.tree_util.tree_leaves_with_path(grads):
            is_whole = path in shapes and jnp.shape(g) == jnp.shape(shapes[path])
            if is_whole or jnp.shape(g)[:1] != (count,):
                raise ValueError(
                    f"{_validate.named('grads', path)} has shape {jnp.shape(g)}, but "
                    f"with `mesh` it needs a row for each of {self._shown}: their own "
                    "gradients, as oa.value_and_grad(..., mesh=mesh, axis_name="
                    f"{self.axis_name!r}, local=True) returns them. If gradients are "
                    "already summed over devices, leave `mesh` and `axis_name` out of "
                    "`accumulate`"
                )

    @property
    def _shown(self) -> str:
        """The devices, for a message."""
        return f"the {self.num_devices} devices of `axis_name={self.axis_name!r}`"

    def shapes(self, tree: Tree) -> Tree:
        """The shapes of what one device has of `tree`."""
        return jax.eval_shape(lambda tree: jax.tree.map(sum_rows, tree), tree)

    def unstacked(self, state: AccumulateState) -> tuple[AccumulateState, bool]:
        """`state` as it is: here it is that of all devices."""
        return state, False

    def stacked(self, state: AccumulateState) -> AccumulateState:
        """`state` as it is."""
        return state

    def add(self, window: Window, *args: Any, **kwargs: Any) -> Window:
        """`window.add`, of one row."""
        return window.add(*args, **kwargs)

    def weight(self, value: Any, dtype: DType) -> tuple[jax.Array, float | None]:
        """One weight for each row, ``dtype[D]``, and as a number if that is known.

        A number is the weight of all, of which each has an equal share.
        """
        count = self.num_devices
        if not isinstance(value, jax.Array) and jnp.ndim(value) == 0:
            total, known = _validate.weight(value, dtype)
            share = None if known is None else known / count
            return jnp.broadcast_to(total / count, (count,)), share
        if jnp.shape(value) != (count,):
            raise ValueError(
                f"`weight` must be an array with a number for each of {self._shown}, "
                f"or a Python number, which they share equally; got shape "
                f"{jnp.shape(value)}. Pass `info.weight`, from oa.value_and_grad(..., "
                "local=True, return_info=True)"
            )
        if not isinstance(value, jax.Array):
            for number in np.asarray(value):
                _validate.weight(number, dtype)
        return jnp.asarray(value).astype(dtype), None

    def value(self, value: Any) -> jax.Array:
        """One loss for each row."""
        value = jnp.asarray(value)
        is_real = jnp.issubdtype(value.dtype, jnp.floating)
        if value.shape != (self.num_devices,) or not is_real:
            raise ValueError(
                f"`value` must be the losses of {self._shown}, one for each, as "
                "oa.value_and_grad(..., local=True) returns them; got "
                f"{_validate.shown_type(value)}"
            )
        return value


def sum_rows(x: Any) -> jax.Array:
    """The sum over the leading axis, in the same dtype."""
    return jnp.sum(x, 0, dtype=x.dtype)


def reduce_rows(reduction: str, x: Any, weight: jax.Array) -> jax.Array:
    """The "sum", "max" or "last" of all rows with any `weight`, ``[D]``."""
    if reduction == "sum":
        return sum_rows(x)
    if reduction == "max":
        return jnp.max(jnp.asarray(x), 0)
    numbers = jnp.arange(len(weight))
    return row(x, jnp.max(jnp.where(weight != 0, numbers, -1)))


def row(x: Any, number: int | Scalar) -> jax.Array:
    """One row, without gathering the others; zeros if no row has that number."""
    x = jnp.asarray(x)
    return _tree.masked_sum(x, jnp.arange(len(x)) == number, sum_rows)
