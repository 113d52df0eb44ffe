"""How one call of `value_and_grad` is spread over devices, and what they exchange.

Each of ``D`` devices runs the loop on its own part of the batch. What comes out of it
is reduced once, after the last micro-batch:

=====================  =========================================================
value, gradients, W    summed; with `scatter` each device keeps its part of the
                       gradients' sum
aux "mean", "sum"      summed
aux "stack", "concat"  stay where they are: an array over all devices, if its
                       axis 0 is sharded
aux "last"             the last device's
carry                  the mean of floating leaves, weighted by the devices' W;
                       other leaves of the last device that has any weight
=====================  =========================================================
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from optax_accum import _checks, _distributed, _noise_scale, _types, _window


class Devices(NamedTuple):
    """The devices over which the batch is spread, or none.

    Attributes:
      axis_name: The name of their axis, or several, or ``None``.
      mesh: The mesh with that axis, where the call comes from outside of it.
      scatter: Whether each device keeps only its part of the gradients.
    """

    axis_name: Any
    mesh: Any
    scatter: bool

    @classmethod
    def of(cls, axis_name: Any, mesh: Any, scatter: bool) -> "Devices":
        """Checks them against each other.

        Raises:
          TypeError: A `mesh` that is none.
          ValueError: A `mesh` without that axis; `scatter` without an axis.
        """
        axis_name = _checks.axis_name(axis_name)
        if mesh is not None:
            _checks.mesh(mesh, axis_name)
        if scatter and axis_name is None:
            raise ValueError(
                "`scatter=True` needs `axis_name`, the axis of the devices that each "
                "keep their part of the gradients; got None"
            )
        return cls(axis_name, mesh, bool(scatter))

    @property
    def shards(self) -> int:
        """In how many parts the batch of one call is cut before the micro-batches."""
        if self.mesh is None:
            return 1
        return _count(self.mesh, self.axis_name)

    def check_place(self) -> None:
        """Raises unless a call is made where the axis is, or the mesh is needed."""
        if self.mesh is None:
            _checks.bound_axis(self.axis_name)
        elif any(map(_checks.is_bound, _checks.axis_names(self.axis_name))):
            raise ValueError(
                f"`mesh` was given inside an axis called {self.axis_name!r}, where "
                "every device runs this call on its own part of the batch already. "
                "Leave `mesh` out, and keep `axis_name`"
            )

    def run(
        self,
        function: Callable[[Any, Any], Any],
        batch: Any,
        arrays: Any,
        batch_axis: int,
        out_specs: Any,
    ) -> Any:
        """``function(batch, arrays)`` on each device's part of `batch`.

        Without a mesh the call is on one device already, or inside the axis.
        """
        if self.mesh is None:
            return function(batch, arrays)

        def batch_spec(x):
            return P(*[None] * (batch_axis % x.ndim), self.axis_name)

        # Without `check_vma`, which asks for a cast wherever a model starts a scan from
        # zeros.
        return jax.shard_map(
            function,
            mesh=self.mesh,
            axis_names=set(_checks.axis_names(self.axis_name)),
            in_specs=(jax.tree.map(batch_spec, batch), P()),
            out_specs=out_specs,
            check_vma=False,
        )(jax.tree.map(lambda x: self._spread(x, batch_axis % x.ndim), batch), arrays)

    def _spread(self, x: jax.Array, axis: int) -> jax.Array:
        """`x` with `axis` over the devices; on an Auto mesh the compiler does that."""
        names = _checks.axis_names(self.axis_name)
        types = dict(zip(self.mesh.axis_names, self.mesh.axis_types, strict=True))
        if not all(types[name] == AxisType.Explicit for name in names):
            return x
        rest = [
            tuple(name for name in _types.as_tuple(part) if name not in names)
            for part in _types.spec(x)
        ]
        rest[axis] = (*names, *rest[axis])
        spec = P(*(part or None for part in rest))
        return jax.reshard(x, NamedSharding(self.mesh, spec))

    def check_whole(self, name: str, tree: Any) -> None:
        """Raises where an argument is sharded over the axis, as far as types tell."""
        if self.mesh is None:
            return
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            if not isinstance(leaf, jax.Array):
                continue
            for axis in _checks.axis_names(self.axis_name):
                if any(axis in _types.as_tuple(part) for part in _types.spec(leaf)):
                    raise ValueError(
                        f"{_checks.named(name, path)} is sharded over "
                        f"`axis_name={axis!r}`, and with `mesh` everything but the "
                        "batch must be the same on all devices of that axis. For "
                        "parameters that are sharded over the axis of the batch "
                        "(FSDP), leave `mesh` and `axis_name` out: the compiler then "
                        "gathers and scatters in every micro-batch, as it must"
                    )

    def number(self, index: Any, count: int) -> Any:
        """The number of micro-batch `index` of `count` among those of all devices."""
        if self.axis_name is None:
            return index
        return lax.axis_index(self.axis_name) * count + index

    def total(self, tree: Any) -> Any:
        """The sum over all devices."""
        return _distributed.sum_over(self.axis_name, tree)

    def size(self) -> int:
        """How many devices run the call."""
        return 1 if self.axis_name is None else lax.axis_size(self.axis_name)

    def total_gradients(self, grads: Any) -> Any:
        """The sum over all devices, or this device's part of it."""
        if not self.scatter:
            return self.total(grads)

        def scatter_leaf(x):
            dimension = scatter_dimension(x, self.size())
            if dimension is None:
                return self.total(x)
            return lax.psum_scatter(
                x, self.axis_name, scatter_dimension=dimension, tiled=True
            )

        return jax.tree.map(scatter_leaf, grads)

    def squared_norm(self, parts: Any, whole: Any, dtype: Any) -> jax.Array:
        """Of gradients as `total_gradients` leaves them; `whole` has their shapes."""
        pairs = list(zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True))
        cut = [part for part, x in pairs if part.shape != x.shape]
        uncut = [part for part, x in pairs if part.shape == x.shape]
        square = _noise_scale.squared_norm(uncut, dtype)
        if cut:
            square += self.total(_noise_scale.squared_norm(cut, dtype))
        return square

    def merge_carry(
        self, carry: Any, before: Any, weight: jax.Array, total: jax.Array
    ) -> Any:
        """One carry from those of all devices.

        Args:
          carry: This device's, after its last micro-batch.
          before: The carry before the first; it stays where `total` is 0.
          weight: This device's W.
          total: W.
        """
        if self.axis_name is None:
            return carry

        def merge(own, old):
            if _window.is_inexact(own):
                part = self.total(_window.contributions(own, weight, "mean"))
                new = _window.close(part, total, "mean").astype(own.dtype)
            else:
                # A device with nothing but padding has not moved its counter or key.
                last = _distributed.last_device(self.axis_name, weight)
                new = _distributed.of_device(self.axis_name, last, own)
            return jnp.where(total != 0, new, old)

        return jax.tree.map(merge, carry, before)

    def gradient_specs(self, params: Any) -> Any:
        """Where the gradients of `params` lie on the mesh: for ``out_specs``."""
        if not self.scatter or self.mesh is None:
            return P()
        return scatter_specs(params, self.mesh, self.axis_name)


def scatter_specs(params: Any, mesh: Any, axis_name: Any) -> Any:
    """Where `value_and_grad` with ``scatter=True`` leaves the gradients.

    For ``out_specs``, and to put the optimizer's state where the gradients are.

    Args:
      params: A tree of arrays or of `jax.ShapeDtypeStruct`.
      mesh: The mesh.
      axis_name: Its axis, or several, over which gradients are scattered.

    Returns:
      A tree like `params` of ``PartitionSpec``: each leaf is cut along its first axis
      that the devices divide and that is not sharded already; a leaf without one stays
      whole, ``P()``.

    Raises:
      TypeError: `mesh` is none.
      ValueError: `mesh` has no such axis.

    Examples:
      >>> import jax, jax.numpy as jnp, optax_accum as oa
      >>> mesh = jax.sharding.AbstractMesh((4,), ("data",))
      >>> params = {"w": jnp.ones((3, 8)), "b": jnp.ones(3)}
      >>> oa.scatter_specs(params, mesh, "data")
      {'b': P(), 'w': P(None, 'data')}
    """
    _checks.mesh(mesh, axis_name)
    size = _count(mesh, axis_name)

    def spec(x):
        dimension = scatter_dimension(x, size)
        return P() if dimension is None else P(*[None] * dimension, axis_name)

    return jax.tree.map(spec, params)


def _count(mesh: Any, axis_name: Any) -> int:
    """How many devices `mesh` has along its axis or axes."""
    return math.prod(mesh.shape[name] for name in _checks.axis_names(axis_name))


def scatter_dimension(x: Any, size: int) -> int | None:
    """The first axis of `x` that `size` devices divide and that is not sharded."""
    for dimension, (length, part) in enumerate(
        zip(jnp.shape(x), _types.spec(x), strict=True)
    ):
        if length and length % size == 0 and part is None:
            return dimension
    return None
