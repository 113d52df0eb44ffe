"""What JAX's types say of an array beside its shape and dtype.

On an Explicit mesh they say how it is sharded. Under ``check_vma=True`` `jax.shard_map`
knows over which axes of the mesh it *varies*, that is, may differ between devices.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def varying(x: Any) -> frozenset:
    """The axes over which an array, or the shape of one, is known to vary."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return x.manual_axis_type.varying if x.manual_axis_type else frozenset()
    return jax.typeof(x).mat.varying


def vary_over(axes: frozenset, x: Any) -> Any:
    """`x` cast to vary over `axes` as well."""
    missing = tuple(sorted(axes - varying(x)))
    return lax.pcast(x, missing, to="varying") if missing else x


def vary_like(tree: Any, *others: Any) -> Any:
    """`tree` as something that varies over all the axes that one of `others` does.

    The first value that goes round a `lax.scan` must vary as the later ones do.
    """
    axes = frozenset().union(*map(varying, others))
    return jax.tree.map(lambda x: vary_over(axes, x), tree)


def chosen(x: jax.Array, is_chosen: jax.Array, total: Callable[[Any], Any]) -> Any:
    """The part of `x` for which `is_chosen` holds, as a `total` of it and of zeros.

    `is_chosen` has the first axes of `x`, or none. Booleans and keys can be chosen too.
    """
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = chosen(jax.random.key_data(x), is_chosen, total)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    numbers = x.astype(jnp.int32) if x.dtype == bool else x
    is_chosen = is_chosen.reshape(*is_chosen.shape, *[1] * (x.ndim - is_chosen.ndim))
    # Selected, and not multiplied: the rest may be NaN.
    part = jnp.where(is_chosen, numbers, jnp.zeros([], numbers.dtype))
    return total(part).astype(x.dtype)


def spec(x: Any) -> list[Any]:
    """The axes of an Explicit mesh over which `x` is sharded, one entry per axis."""
    sharding = getattr(jax.typeof(x), "sharding", None)
    given = () if sharding is None else sharding.spec
    return [*given, *[None] * (jnp.ndim(x) - len(given))]


def as_tuple(part: Any) -> tuple[Any, ...]:
    """The axes in one entry of a spec."""
    if part is None:
        return ()
    return part if isinstance(part, tuple) else (part,)


def zeros_like(x: Any, dtype: Any = None) -> jax.Array:
    """Zeros like an array, or like the shape of one, sharded and varying as it is."""
    if not isinstance(x, jax.ShapeDtypeStruct):
        return jnp.zeros_like(x, dtype=dtype)
    # In a `jax.shard_map` over some of a mesh's axes `jnp.zeros_like` forgets the rest.
    zeros = jnp.zeros(x.shape, dtype or x.dtype, out_sharding=x.sharding)
    return vary_over(varying(x), zeros)
