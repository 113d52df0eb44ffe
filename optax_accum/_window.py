"""The arithmetic of a window: a sum of gradients and a sum of weights.

A window carries ``(S, W)``. Every micro-batch adds to both; the boundary divides
once. With ``g_i`` the gradient and ``w_i`` the weight of micro-batch ``i``:

=========  ===========  =======  ===========================================
reduction  S            result   for
=========  ===========  =======  ===========================================
"mean"     Σ w_i·g_i    S / W    ``g_i`` is the gradient of a mean over w_i
"ratio"    Σ g_i        S / W    ``g_i`` is the gradient of a sum over w_i
"sum"      Σ g_i        S        the plain sum
=========  ===========  =======  ===========================================

Padding, token masks, a ragged last micro-batch, a skipped micro-batch and an
early close are all nothing but weights. A weight of 0 contributes nothing, even
where its gradient is NaN or inf, so zeros are *selected*: 0 * NaN is NaN.

Plain sums, not a running mean: the mean costs a subtraction per element and
keeps the addition from fusing into what computed the gradient.

Shapes: every function here takes trees whose leaves are floating or complex
arrays of any shape, and scalars ``f32[]`` for weights.
"""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import dtypes, lax

from optax_accum import _types

Reduction = Literal["mean", "ratio", "sum"]
REDUCTIONS: tuple[str, ...] = get_args(Reduction)

Tree = Any


def dtype_of(leaf: Any) -> Any:
    """The dtype that `leaf` has in JAX: a NumPy float64 is a float32 to it."""
    if isinstance(leaf, np.ndarray) and leaf.dtype == dtypes.float0:
        return leaf.dtype
    is_jax = hasattr(leaf, "dtype") and not isinstance(leaf, np.ndarray | np.generic)
    return leaf.dtype if is_jax else jnp.result_type(leaf)


def is_inexact(leaf: Any) -> bool:
    """Whether `leaf` is floating or complex: the leaves that are accumulated."""
    return jnp.issubdtype(dtype_of(leaf), jnp.inexact)


def is_float0(leaf: Any) -> bool:
    """Whether `leaf` is the gradient that JAX gives an integer parameter."""
    return dtype_of(leaf) == dtypes.float0


def keep_inexact(tree: Tree) -> Tree:
    """`tree` with ``None`` in place of the leaves that are not accumulated."""
    return jax.tree.map(lambda x: x if is_inexact(x) else None, tree)


def fill_inexact(tree: Tree, accumulated: Tree) -> Tree:
    """`tree` with its inexact leaves replaced, in order, by those of `accumulated`."""
    leaves = iter(jax.tree.leaves(accumulated))
    return jax.tree.map(lambda x: next(leaves) if is_inexact(x) else x, tree)


def at_least_float32(dtype: Any) -> Any:
    """The default accumulator dtype: float32, or `dtype` where that is wider.

    In bfloat16 ones sum to 256 and stay there. Integers are counts, and stay.
    """
    if not jnp.issubdtype(dtype, jnp.inexact):
        return dtype
    return dtype if jnp.finfo(dtype).bits >= 32 else jnp.dtype("float32")


def zeros(tree: Tree, dtype: Any = None) -> Tree:
    """An empty sum for gradients like `tree`, each leaf an array of its own."""
    return jax.tree.map(
        lambda x: _types.zeros_like(x, dtype or at_least_float32(dtype_of(x))),
        keep_inexact(tree),
    )


def weight_dtype(tree: Tree) -> Any:
    """float32, or float64 where `tree` holds double precision."""
    bits = [jnp.finfo(dtype_of(x)).bits for x in jax.tree.leaves(keep_inexact(tree))]
    return jnp.dtype("float64" if 64 in bits else "float32")


def as_arrays(tree: Tree) -> Tree:
    """`tree` with its Python scalars as arrays."""
    return jax.tree.map(lambda x: x if hasattr(x, "dtype") else jnp.asarray(x), tree)


def cast_like(tree: Tree, like: Tree) -> Tree:
    """`tree` in the dtypes of `like`, none of them weak.

    A weak type would become a strong one in the next update, and compile it anew.
    """

    def cast(x, target):
        if x.dtype == target.dtype and not getattr(x, "weak_type", False):
            return x
        return lax.convert_element_type(x, target.dtype)

    return jax.tree.map(cast, as_arrays(tree), as_arrays(like))


def _scaled(x: jax.Array, factor: jax.Array) -> jax.Array:
    return x * factor.astype(x.dtype)


def contributions(tree: Tree, weight: jax.Array, reduction: str) -> Tree:
    """What a micro-batch's gradients add to S: nothing where `weight` is 0."""

    def contribution(x):
        x = jnp.asarray(x)
        # At least float32: a weight of 301 is no bfloat16.
        x = x.astype(at_least_float32(x.dtype))
        if reduction == "mean":
            x = _scaled(x, weight)
        return jnp.where(weight != 0, x, jnp.zeros([], x.dtype))

    return jax.tree.map(contribution, tree)


def add(
    sums: Tree,
    tree: Tree,
    weight: jax.Array,
    reduction: str,
    *,
    first: jax.Array | None = None,
) -> Tree:
    """S with one more micro-batch in it, in the dtypes of `sums`.

    On the `first` micro-step of a window, if it is told, the sums start anew. That
    is a select, and the only thing that clears a window: no buffer is rewritten with
    zeros, and a NaN never outlives its window.
    """

    def add_leaf(s, x):
        # A narrow accumulator is rounded once, after the addition.
        wide = at_least_float32(s.dtype)
        x = contributions(jnp.asarray(x).astype(wide), weight, reduction)
        total = s.astype(wide) + x
        if first is not None:
            total = jnp.where(first, x, total)
        return total.astype(s.dtype)

    return jax.tree.map(add_leaf, sums, tree)


def close(sums: Tree, weight: jax.Array, reduction: str) -> Tree:
    """The window's result: S / W, or S for ``"sum"``; zeros where W is 0."""
    if reduction == "sum":
        return sums
    # The reciprocal, once per window: a division by a traced scalar does not
    # fuse into the optimizer and would cost a temporary the size of S.
    empty = weight == 0
    reciprocal = jnp.where(empty, 0, 1 / jnp.where(empty, 1, weight))

    def mean(s):
        return _scaled(s.astype(at_least_float32(s.dtype)), reciprocal).astype(s.dtype)

    return jax.tree.map(mean, sums)
