"""Leaves of trees: their dtypes, casts and norms, and what JAX's types say of them.

A leaf is *inexact* if it is floating or complex: these are accumulated. Integers, keys,
``None`` and float0 (the gradient that JAX gives an integer) pass through.

On an Explicit mesh a type says how an array is sharded. Under ``check_vma=True``
`jax.shard_map` knows over which axes of the mesh an array *varies*, that is, may differ
between devices.
"""

from collections.abc import Callable
from numbers import Number
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import dtypes, lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from optax_accum._types import DType, Leaf, Scalar, Tree

Axes = frozenset[Any]

# --- Dtypes ---


def dtype_of(leaf: Leaf) -> np.dtype:
    """The dtype that `leaf` has in JAX: a NumPy float64 is a float32 to it."""
    if isinstance(leaf, np.ndarray) and leaf.dtype == dtypes.float0:
        return leaf.dtype
    is_jax = hasattr(leaf, "dtype") and not isinstance(leaf, np.ndarray | np.generic)
    return leaf.dtype if is_jax else jnp.result_type(leaf)


def dtypes_of(tree: Tree) -> list[np.dtype]:
    """The dtypes of the leaves."""
    return [dtype_of(leaf) for leaf in jax.tree.leaves(tree)]


def is_inexact(leaf: Leaf) -> bool:
    """Whether `leaf` is floating or complex."""
    return jnp.issubdtype(dtype_of(leaf), jnp.inexact)


def is_float0(leaf: Leaf) -> bool:
    """Whether `leaf` is the gradient that JAX gives an integer parameter."""
    return dtype_of(leaf) == dtypes.float0


def is_complex(leaf: Leaf) -> bool:
    """Whether `leaf` is complex."""
    return jnp.issubdtype(dtype_of(leaf), jnp.complexfloating)


def at_least_float32(dtype: DType) -> np.dtype:
    """float32, or `dtype` if that is wider or an integer.

    In bfloat16 ones sum to 256 and stay there.
    """
    if not jnp.issubdtype(dtype, jnp.inexact):
        return dtype
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.dtype("float32")


def widened(x: jax.Array) -> jax.Array:
    """`x` in at least float32."""
    return x.astype(at_least_float32(x.dtype))


def scalar_dtype(tree: Tree) -> np.dtype:
    """float32, or float64 if `tree` holds double precision."""
    bits = [jnp.finfo(dtype_of(x)).bits for x in jax.tree.leaves(keep_inexact(tree))]
    return jnp.dtype("float64" if 64 in bits else "float32")


def is_array(leaf: Leaf) -> bool:
    """Whether `leaf` is an array, or the shape of one, and not a Python number."""
    # The class `jnp.float32` has a dtype, but its shape is not a tuple.
    return isinstance(getattr(leaf, "shape", None), tuple) and hasattr(leaf, "dtype")


# --- Trees ---


def trained(params: Tree) -> Tree:
    """The part of `params` that has gradients: all, except in `optax.lookahead`."""
    return params.fast if isinstance(params, optax.LookaheadParams) else params


def keep_inexact(tree: Tree) -> Tree:
    """`tree` with ``None`` in place of the leaves that are not accumulated."""
    return jax.tree.map(lambda x: x if is_inexact(x) else None, tree)


def differentiated(tree: Tree) -> Tree:
    """The part of an argument that is differentiated; other leaves are ``None``.

    That is all of it, unless JAX does not take one of its leaves, such as a function.
    Then it is a model like those of Equinox, and its inexact arrays are taken.
    """
    leaves = jax.tree.leaves(tree)
    if all(is_array(x) or _is_number(x) for x in leaves):
        return tree
    return jax.tree.map(lambda x: x if is_array(x) and is_inexact(x) else None, tree)


def _is_number(leaf: Leaf) -> bool:
    """Whether JAX takes `leaf` for an array although it is not one."""
    return isinstance(leaf, Number) or hasattr(leaf, "__jax_array__")


def merge(part: Tree, others: Tree) -> Tree:
    """`part`, with the leaves of `others` in the places where it has ``None``."""
    return jax.tree.map(
        lambda x, other: other if x is None else x,
        part,
        others,
        is_leaf=lambda x: x is None,
    )


def fill_float0(grads: Tree, params: Tree) -> Tree:
    """`grads` with float0 for ``None`` where `params` has a leaf, as JAX has it."""

    def fill(param: Leaf, grad: Leaf) -> Leaf:
        return np.zeros(jnp.shape(param), dtypes.float0) if grad is None else grad

    return jax.tree.map(fill, params, grads)


def numbered(tree: Tree) -> Tree:
    """`tree` with the number of each leaf in its place."""
    leaves, structure = jax.tree.flatten(tree)
    return jax.tree.unflatten(structure, range(len(leaves)))


def arrays_in(tree: Tree) -> list[Any]:
    """The leaves of `tree`, with ``None`` for those that are not a `jax.Array`."""
    return [x if isinstance(x, jax.Array) else None for x in jax.tree.leaves(tree)]


def filled(tree: Tree, leaves: list[Any]) -> Tree:
    """`tree` with its leaves replaced by those of `leaves` that are not ``None``."""
    old, structure = jax.tree.flatten(tree)
    pairs = zip(old, leaves, strict=True)
    return jax.tree.unflatten(structure, [x if y is None else y for x, y in pairs])


def kept_like(leaves: list[Any], tree: Tree) -> list[Any]:
    """The leaves of `tree`, with ``None`` where `leaves` has it."""
    pairs = zip(leaves, jax.tree.leaves(tree), strict=True)
    return [None if x is None else y for x, y in pairs]


def as_arrays(tree: Tree) -> Tree:
    """`tree` with its Python scalars as arrays."""
    return jax.tree.map(lambda x: x if hasattr(x, "dtype") else jnp.asarray(x), tree)


def as_jax_arrays(tree: Tree) -> Tree:
    """`tree` with every leaf as a `jax.Array`; those that are one stay the same."""

    def convert(x: Leaf) -> jax.Array:
        return x if isinstance(x, jax.Array) else strongly_typed(jnp.asarray(x))

    return jax.tree.map(convert, tree)


def cast_like(tree: Tree, like: Tree) -> Tree:
    """`tree` in the dtypes of `like`, none of them weak.

    A weak type would become a strong one in the next update, and compile it again.
    """

    def cast(x: Leaf, target: Any) -> Any:
        if x.dtype == target.dtype and not getattr(x, "weak_type", False):
            return x
        return lax.convert_element_type(x, target.dtype)

    return jax.tree.map(cast, as_arrays(tree), as_arrays(like))


def strongly_typed(tree: Tree) -> Tree:
    """`tree` as arrays, none of a weak type."""
    return cast_like(tree, tree)


def unshared(tree: Tree, other: Tree) -> Tree:
    """`tree` with a copy of each array that is in `other`, or in `tree` before it."""
    seen = {id(x) for x in jax.tree.leaves(other)}

    def own(x: jax.Array) -> jax.Array:
        is_shared = id(x) in seen
        seen.add(id(x))
        return jnp.copy(x) if is_shared else x

    return jax.tree.map(own, tree)


def squared_norm(tree: Tree, dtype: DType) -> Scalar:
    """``dtype[]``, the sum of the squares of all inexact entries."""
    total = jnp.zeros([], dtype)
    for x in map(jnp.asarray, jax.tree.leaves(keep_inexact(tree))):
        for part in (x.real, x.imag) if jnp.iscomplexobj(x) else (x,):
            total = total + jnp.sum(widened(part) ** 2).astype(dtype)
    return total


# --- What types say ---


def type_of(x: Leaf) -> Any:
    """The type of an array, or of its shape, whether it is weak or not."""
    if isinstance(x, jax.ShapeDtypeStruct):
        # In a `jax.shard_map` over some of a mesh's axes `jax.typeof` fails.
        (type_,) = jax.make_jaxpr(lambda: zeros_like(x))().out_avals
    else:
        type_ = jax.typeof(x)
    return type_.update(weak_type=False)


def varying(x: Leaf) -> Axes:
    """The axes over which an array, or the shape of one, is known to vary."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return x.manual_axis_type.varying if x.manual_axis_type else frozenset()
    return jax.typeof(x).mat.varying


def vary_over(axes: Axes, x: jax.Array) -> jax.Array:
    """`x` cast to vary over `axes` as well."""
    missing = tuple(sorted(axes - varying(x)))
    return lax.pcast(x, missing, to="varying") if missing else x


def vary_like(tree: Tree, *others: Leaf) -> Tree:
    """`tree` as something that varies over all the axes that one of `others` does.

    The first value that goes round a `lax.scan` must vary as the later ones do.
    """
    axes = frozenset().union(*map(varying, others))
    return jax.tree.map(lambda x: vary_over(axes, x), tree)


def axes_of(entry: Any) -> tuple[Any, ...]:
    """One axis of a mesh, several, or ``None``, as a tuple of them."""
    if entry is None:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


def spec(x: Leaf) -> list[Any]:
    """The axes of an Explicit mesh over which `x` is sharded, one entry per axis."""
    sharding = getattr(jax.typeof(x), "sharding", None)
    given = () if sharding is None else sharding.spec
    return [*given, *[None] * (jnp.ndim(x) - len(given))]


def unreduced(x: Leaf) -> Axes:
    """The axes of an Explicit mesh over which `x` has yet to be summed.

    The gradient of a parameter that is tagged ``reduced`` has some.
    """
    sharding = getattr(jax.typeof(x), "sharding", None)
    return frozenset() if sharding is None else frozenset(sharding.spec.unreduced)


def is_partial(x: Leaf) -> bool:
    """Whether `x` is tagged as ``reduced``, or as ``unreduced``."""
    sharding = getattr(type_of(x), "sharding", None)
    return bool(sharding and (sharding.spec.reduced or sharding.spec.unreduced))


def scaled(x: jax.Array, factor: Scalar) -> jax.Array:
    """``x * factor``; `x` may be unreduced."""
    axes = unreduced(x)
    if axes:
        spec = PartitionSpec(reduced=axes)
        factor = jax.reshard(factor, NamedSharding(jax.typeof(x).sharding.mesh, spec))
    return x * factor


# --- Arrays like others ---


def zeros_like(x: Leaf, dtype: DType = None) -> jax.Array:
    """Zeros like an array, or like the shape of one, sharded and varying as it is."""
    if not isinstance(x, jax.ShapeDtypeStruct):
        sharding = getattr(jax.typeof(x), "sharding", None)
        return _on_mesh(sharding, jnp.zeros_like(x, dtype=dtype))
    is_asked_for = isinstance(getattr(x.sharding, "mesh", None), Mesh)
    # What JAX has made itself says nothing of Auto axes.
    if is_asked_for or _names_auto_axes(x.sharding):
        return _placed_zeros(x.shape, dtype or x.dtype, x.sharding)
    # In a `jax.shard_map` over some of a mesh's axes `jnp.zeros_like` forgets the rest.
    zeros = jnp.zeros(x.shape, dtype or x.dtype, out_sharding=x.sharding)
    return vary_over(varying(x), _on_mesh(x.sharding, zeros))


def _names_auto_axes(sharding: Any) -> bool:
    """Whether a sharding says something of axes that are the compiler's."""
    mesh = getattr(sharding, "mesh", None)
    if mesh is None or AxisType.Auto not in mesh.axis_types:
        return False
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    named = [name for part in sharding.spec for name in axes_of(part)]
    return any(types[name] == AxisType.Auto for name in named)


def _on_mesh(sharding: Any, x: jax.Array) -> jax.Array:
    """`x` on the Explicit mesh of `sharding`, if that is on one and `x` is not.

    Outside of `jax.set_mesh`, JAX 0.12 makes no zeros on it.
    """
    mesh = getattr(sharding, "mesh", None)
    if mesh is None or AxisType.Explicit not in mesh.axis_types:
        return x
    return jax.reshard(x, sharding) if jax.typeof(x).sharding.mesh.empty else x


def _placed_zeros(
    shape: tuple[int, ...], dtype: DType, sharding: NamedSharding
) -> jax.Array:
    """Zeros on the devices of a mesh, each of which makes its own part."""
    if not isinstance(sharding.mesh, Mesh):  # but an abstract one, of the context
        return jax.jit(lambda: _placed(jnp.zeros(shape, dtype), sharding))()
    zeros = jnp.zeros(shape, dtype, device=sharding)
    # Inside of a trace `device` is not heeded.
    is_traced = isinstance(zeros, jax.core.Tracer)
    return _placed(zeros, sharding) if is_traced else zeros


def _placed(x: jax.Array, sharding: NamedSharding) -> jax.Array:
    """`x` sharded like that, inside of a trace."""
    if AxisType.Explicit in sharding.mesh.axis_types:
        return jax.reshard(x, sharding)
    # How the other dimensions are sharded, the compiler finds from their use.
    free = [PartitionSpec.UNCONSTRAINED if a is None else a for a in sharding.spec]
    free += [PartitionSpec.UNCONSTRAINED] * (x.ndim - len(free))
    spec = PartitionSpec(*free)
    return lax.with_sharding_constraint(x, sharding.update(spec=spec))


def placed_like(tree: Tree, like: Tree) -> Tree:
    """`tree` sharded as `like` is, where an Explicit mesh says how that is."""

    def place(x: jax.Array, target: Leaf) -> jax.Array:
        wanted = getattr(jax.typeof(target), "sharding", None)
        if wanted is None or wanted.mesh.empty or jax.typeof(x).sharding == wanted:
            return x
        return jax.reshard(x, wanted)

    return jax.tree.map(place, tree, like)


def with_leading_axis(tree: Tree) -> Tree:
    """Each leaf as the only entry along a new first axis."""
    return jax.tree.map(lambda x: x[None], tree)


def without_leading_axis(tree: Tree) -> Tree:
    """The first entry of each leaf."""
    return jax.tree.map(lambda x: x[0], tree)


def zeros(tree: Tree) -> Tree:
    """`tree` with zeros of its types."""
    return jax.tree.map(lambda x: vary_like(zeros_like(x), x), tree)


def opaque_true() -> Scalar:
    """True, which the compiler cannot know: it takes away a branch that it does."""
    return lax.optimization_barrier(jnp.ones([], bool))


def masked_sum(
    x: jax.Array, mask: jax.Array, total: Callable[[jax.Array], jax.Array]
) -> jax.Array:
    """The `total` of `x` with zeros where `mask` is False: one entry of several.

    `mask` has the first axes of `x`, or none. `x` may hold booleans or keys.
    """
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = masked_sum(jax.random.key_data(x), mask, total)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    numbers = x.astype(jnp.int32) if x.dtype == bool else x
    mask = mask.reshape(*mask.shape, *[1] * (x.ndim - mask.ndim))
    # Selected, and not multiplied: the rest may be NaN.
    part = jnp.where(mask, numbers, jnp.zeros([], numbers.dtype))
    return total(part).astype(x.dtype)
