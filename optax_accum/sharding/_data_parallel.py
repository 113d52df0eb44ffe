"""Data parallelism: who has which part of the batch, and what devices exchange.

Each device runs the loop on its own part of the batch. What comes out of it is reduced
once, after the last micro-batch: the window is summed (with `scatter` each device keeps
its part of the gradients' sum), a carry is averaged (`DataParallel.merge_carry`), and
auxiliary outputs do what their accumulators say.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from optax_accum import _tree, _validate, _window
from optax_accum._overwrite import Overwrite, Overwritten
from optax_accum._types import (
    AnyMesh,
    AxisName,
    Batch,
    DType,
    Grads,
    Params,
    Scalar,
    Specs,
    Tree,
)
from optax_accum.sharding import _collectives


class DataParallel(NamedTuple):
    """The devices that share the batch, or none.

    Attributes:
      axis_name: The name of their axis, or several, or ``None``.
      mesh: The mesh with that axis, where the call comes from outside of it.
      scatter: Whether each device keeps only its part of the gradients.
      local: Whether nothing is reduced: results have a row for each device.
    """

    axis_name: AxisName | None = None
    mesh: AnyMesh | None = None
    scatter: bool = False
    local: bool = False

    @classmethod
    def of(
        cls,
        axis_name: Any,
        mesh: Any = None,
        scatter: Any = False,
        local: Any = False,
    ) -> Self:
        """Checks them against each other.

        Raises:
          TypeError: An `axis_name` of another type.
          ValueError: A `mesh` without that axis; `scatter` without an axis; `local`
            without a mesh, or with `scatter`.
        """
        axis_name = _collectives.check_name(axis_name)
        if mesh is not None:
            _check_mesh(mesh, axis_name)
        if scatter and axis_name is None:
            raise ValueError(
                "`scatter=True` needs `axis_name`, the axis of the devices over which "
                "to scatter the gradients; got None"
            )
        if local and mesh is None:
            raise ValueError(
                "`local=True` needs `mesh` and `axis_name`, for a call from plain "
                "jax.jit; got no `mesh`. Inside jax.pmap or jax.shard_map, leave "
                "`axis_name` out, and nothing is reduced"
            )
        if local and scatter:
            raise ValueError(
                "`local=True` exchanges nothing, so there is nothing to `scatter`. "
                "Leave one of the two out; oa.accumulate(..., mesh=mesh, "
                "scatter=True) scatters the sum of a window"
            )
        return cls(axis_name, mesh, bool(scatter), bool(local))

    @property
    def axes(self) -> tuple[Any, ...]:
        """The names in `axis_name`."""
        return _tree.axes_of(self.axis_name)

    @property
    def num_shards(self) -> int:
        """In how many parts the batch of one call is cut before the micro-batches."""
        if self.mesh is None:
            return 1
        return _count(self.mesh, self.axis_name)

    @property
    def reduced_over(self) -> AxisName | None:
        """The axis over which results are reduced, or ``None``."""
        return None if self.local else self.axis_name

    def as_rows(self, tree: Tree) -> Tree:
        """`tree`, each leaf as the row of this device if nothing is reduced."""
        return _tree.with_leading_axis(tree) if self.local else tree

    def check_place(self, remedy: str) -> None:
        """Raises unless a call is made where the axis is, or the mesh is needed.

        `remedy` is what to do with both options inside the axis.
        """
        if self.mesh is None:
            _collectives.check_bound(self.axis_name)
        elif any(map(_collectives.is_bound, self.axes)):
            raise ValueError(
                f"`mesh` was given inside an axis called {self.axis_name!r}, where "
                "every device already runs this call on its own part of the batch. "
                f"{remedy}"
            )

    def on_each_device(
        self,
        function: Callable[[Batch, Tree], Any],
        batch: Batch,
        arrays: Tree,
        axes: Sequence[int],
        out_specs: Specs,
    ) -> Any:
        """``function(batch, arrays)`` on each device's part of `batch`.

        Without a mesh the call is on one device already, or inside the axis. With it
        each leaf of `batch` is cut along its axis in `axes`.
        """
        if self.mesh is None:
            return function(batch, arrays)

        # Without `check_vma`, which asks for a cast wherever a model starts a scan from
        # zeros.
        return jax.shard_map(
            function,
            mesh=self.mesh,
            axis_names=set(self.axes),
            in_specs=([P(*[None] * axis, self.axis_name) for axis in axes], P()),
            out_specs=out_specs,
            check_vma=False,
        )(list(map(self.spread, batch, axes)), arrays)

    def spread(self, x: jax.Array, axis: int) -> jax.Array:
        """`x` with `axis` over the devices; on an Auto mesh the compiler does that."""
        names = self.axes
        assert self.mesh is not None
        types = dict(zip(self.mesh.axis_names, self.mesh.axis_types, strict=True))
        if not all(types[name] == AxisType.Explicit for name in names):
            return x
        rest = [
            tuple(name for name in _tree.axes_of(part) if name not in names)
            for part in _tree.spec(x)
        ]
        rest[axis] = (*names, *rest[axis])
        spec = P(*(part or None for part in rest))
        return jax.reshard(x, NamedSharding(self.mesh, spec))

    def check_whole(self, name: str, tree: Tree) -> None:
        """Raises where an argument is sharded over the axis, as far as types tell."""
        if self.mesh is None:
            return
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if not isinstance(leaf, jax.Array):
                continue
            for axis in self.axes:
                if any(axis in _tree.axes_of(part) for part in _tree.spec(leaf)):
                    raise ValueError(
                        f"{_validate.named(name, path)} is sharded over "
                        f"`axis_name={axis!r}`, but with `mesh` only the batch may be. "
                        "If parameters are sharded over the axis of the batch (FSDP), "
                        "gather them once for all micro-batches of the call, with "
                        "jax.reshard(params, P()); or leave `mesh` and `axis_name` "
                        "out: the compiler then gathers and scatters in every "
                        "micro-batch"
                    )

    def global_index(self, index: Any, count: int) -> Any:
        """The number of micro-batch `index` of `count` among those of all devices."""
        if self.axis_name is None:
            return index
        return lax.axis_index(self.axis_name) * count + index

    def num_devices(self) -> int:
        """How many devices run the call."""
        return 1 if self.axis_name is None else lax.axis_size(self.axis_name)

    def sum(self, grads: Grads, rest: Tree) -> tuple[Grads, Tree]:
        """The sums over all devices; of the gradients this device's part, if scattered.

        See `_window.Devices`.
        """
        if not self.scatter:
            return _collectives.sum_over(self.reduced_over, (grads, rest))

        def scatter_leaf(x: jax.Array) -> jax.Array:
            dimension = scatter_dimension(x, self.num_devices())
            if dimension is None:
                return lax.psum(x, self.axis_name)
            return lax.psum_scatter(
                x, self.axis_name, scatter_dimension=dimension, tiled=True
            )

        return jax.tree.map(scatter_leaf, grads), lax.psum(rest, self.axis_name)

    def reduce(self, reduction: str, x: jax.Array, weight: Scalar) -> jax.Array:
        """The "sum", "max" or "last" of all devices, see `_window.Devices`."""
        if self.reduced_over is None:
            return x
        if reduction == "sum":
            return lax.psum(x, self.axis_name)
        if reduction == "max":
            return lax.pmax(x, self.axis_name)
        last = _collectives.last_device(self.axis_name, weight)
        return _collectives.of_device(self.axis_name, last, x)

    def squared_norm(self, grads: Grads, whole: Grads, dtype: DType) -> Scalar:
        """Of gradients as `sum` leaves them; `whole` has the shapes that they had."""
        pairs = list(zip(jax.tree.leaves(grads), jax.tree.leaves(whole), strict=True))
        cut = [part for part, x in pairs if part.shape != x.shape]
        uncut = [part for part, x in pairs if part.shape == x.shape]
        square = _tree.squared_norm(uncut, dtype)
        if cut:
            square += lax.psum(_tree.squared_norm(cut, dtype), self.axis_name)
        return square

    def merge_carry(
        self, carry: Tree, before: Tree, weight: Scalar, total: Scalar
    ) -> Tree:
        """One carry from those of all devices.

        Args:
          carry: This device's, after its last micro-batch.
          before: The carry before the first; it stays where `total` is 0.
          weight: This device's W.
          total: W.
        """
        if self.axis_name is None or not jax.tree.leaves(carry):
            return carry
        if self.local:  # A carry has no rows.
            total = lax.psum(weight, self.axis_name)

        def merge(own: jax.Array, old: jax.Array) -> jax.Array:
            if _tree.is_inexact(own):
                part = _window.contributions(own, weight, "mean")
                part = _collectives.sum_over(self.axis_name, part)
                new = _window.divide(part, total, "mean").astype(own.dtype)
            else:
                # A device with padding alone has not moved its counter or key.
                last = _collectives.last_device(self.axis_name, weight)
                new = _collectives.of_device(self.axis_name, last, own)
            return jnp.where(total != 0, new, old)

        return jax.tree.map(merge, carry, before)

    @property
    def result_spec(self) -> P:
        """Where what is reduced, or a row instead, lies on the mesh."""
        return P(self.axis_name) if self.local else P()

    def gradient_specs(self, params: Params, overwritten: Overwritten) -> Specs:
        """Where the gradients of `params` lie on the mesh: for ``out_specs``."""
        if not self.scatter or self.mesh is None:
            return self.result_spec
        return scatter_specs(
            params, self.mesh, self.axis_name, overwrite=overwritten.rule
        )


def scatter_specs(
    params: Params,
    mesh: AnyMesh,
    axis_name: AxisName,
    *,
    overwrite: Overwrite | None = None,
) -> Specs:
    """Returns how ``scatter=True`` shards the gradients.

    Use it for ``out_specs``, and to shard the optimizer's state like the gradients.

    Args:
      params: A tree of arrays or of `jax.ShapeDtypeStruct`.
      mesh: The mesh.
      axis_name: Its axis, or several, over which gradients are scattered.
      overwrite: As given to `value_and_grad`. Overwritten leaves stay whole.

    Returns:
      A tree like `params` of ``PartitionSpec``: each leaf is split along its first axis
      that the devices divide and that is not sharded yet; a leaf without one stays
      whole, ``P()``.

    Raises:
      ValueError: `mesh` has no such axis.

    Examples:
      >>> import jax, jax.numpy as jnp, optax_accum as oa
      >>> mesh = jax.sharding.AbstractMesh((4,), ("data",))
      >>> params = {"w": jnp.ones((3, 8)), "b": jnp.ones(3)}
      >>> oa.sharding.scatter_specs(params, mesh, "data")
      {'b': P(), 'w': P(None, 'data')}
    """
    _check_mesh(mesh, axis_name)
    size = _count(mesh, axis_name)

    def spec(reduction: str | None, x: Any) -> P:
        dimension = None if reduction else scatter_dimension(x, size)
        return P() if dimension is None else P(*[None] * dimension, axis_name)

    return Overwritten(overwrite).map(spec, params)


def _count(mesh: AnyMesh, axis_name: AxisName | None) -> int:
    """How many devices `mesh` has along its axis or axes."""
    return math.prod(mesh.shape[name] for name in _tree.axes_of(axis_name))


def scatter_dimension(x: Any, size: int) -> int | None:
    """The first axis of `x` that `size` devices divide and that is not sharded."""
    for dimension, (length, part) in enumerate(
        zip(jnp.shape(x), _tree.spec(x), strict=True)
    ):
        if length and length % size == 0 and part is None:
            return dimension
    return None


def _check_mesh(mesh: Any, axis_name: Any) -> None:
    """Raises unless `mesh` is a mesh with the axis or axes called `axis_name`."""
    has = ", ".join(map(repr, mesh.axis_names))
    if axis_name is None:
        raise ValueError(
            "`mesh` needs `axis_name`, the axis over which the batch is sharded; got "
            f"None. This mesh has {has}"
        )
    for name in _tree.axes_of(axis_name):
        if name not in mesh.axis_names:
            raise ValueError(
                f"`axis_name={name!r}` is not an axis of `mesh`, which has {has}"
            )
