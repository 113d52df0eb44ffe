"""Gradients that the backward pass adds straight into their sum.

A gradient that is computed first and added after is one more buffer as large as the
parameters, and with layers in a `jax.lax.scan` the largest temporary of a training
step. JAX's pullback can add to a `jax.Ref` instead, in place and layer by layer
(https://docs.jax.dev/en/latest/301/refs.html).

For a mean, wᵢ·gᵢ is to be added. If the backward pass is sure to give that for the
cotangent wᵢ, it does so at no cost. If not, S is divided by wᵢ before and multiplied by
it after, in place, which takes time but no memory.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental import pallas

from optax_accum import _flow, _tree
from optax_accum._types import Grads, Leaf, Scalar

_FLOAT32 = jnp.finfo(jnp.float32)


class Pullback(NamedTuple):
    """A micro-batch's gradient that has yet to be computed.

    Attributes:
      function: What `jax.vjp` returned besides a scalar loss. What it was taken with
        respect to is `like`.
      loss: ``[]``, the loss, or something of its type.
      like: Arrays, or shapes, of the gradient's types.
    """

    function: Any
    loss: Scalar
    like: Grads

    def gradients(self) -> Grads:
        """The gradient by itself."""
        (grads,) = self.function(self._cotangent())
        return grads

    def added_to(
        self,
        sums: Grads,
        weight: Scalar | None,
        *,
        counted: bool | Scalar,
        first: Scalar | None = None,
    ) -> Grads:
        """`sums` with one more gradient in them.

        Args:
          sums: S.
          weight: By what the gradient is multiplied, or ``None`` for 1.
          counted: As in `Window.add`.
          first: As in `Window.add`.
        """
        cotangent, factor = self._cotangent(), None
        if weight is not None and self._takes_weights():
            cotangent = cotangent * weight.astype(cotangent.dtype)
        elif weight is not None:
            factor = weight
            if counted is True:  # XLA takes away a branch that is always taken.
                counted = lax.optimization_barrier(weight) != 0
        if first is not None:
            # In a branch: a select would read and write S on every micro-step.
            sums = lax.cond(first, _tree.zeros, lambda sums: sums, sums)

        def if_counted(function: Callable[[Grads], Grads], sums: Grads) -> Grads:
            # A gradient that is NaN is not multiplied by 0, but never computed.
            if counted is True:
                return function(sums)
            return lax.cond(counted, function, lambda sums: sums, sums)

        def scaled(factor: Scalar, sums: Grads) -> Grads:
            fits = jax.tree.map(is_like, sums, self.like)
            return jax.tree.map(
                lambda is_, s: s * factor.astype(s.dtype) if is_ else s, fits, sums
            )

        # Each in a branch of its own, or else XLA has a second S in between.
        if factor is not None:
            sums = if_counted(functools.partial(scaled, 1 / factor), sums)
        sums = if_counted(lambda sums: _add(sums, self, cotangent, factor), sums)
        if factor is not None:
            sums = if_counted(functools.partial(scaled, factor), sums)
        return sums

    def _cotangent(self) -> Scalar:
        return _tree.vary_like(jnp.ones_like(self.loss), self.loss)

    def _takes_weights(self) -> bool:
        """Whether the gradient is sure to grow with the cotangent, whatever its size.

        A weight of 301 is no bfloat16, and may overflow in float16. A rule written by
        hand, with `jax.custom_vjp`, may clip.
        """
        program = self.function.jaxpr  # linear; the backward pass is its transpose
        dtypes = [self.loss.dtype, *_flow.dtypes_in(program)]
        floating = [x for x in dtypes if jnp.issubdtype(x, jnp.inexact)]
        has_range = all(jnp.finfo(x).maxexp >= _FLOAT32.maxexp for x in floating)
        has_digits = jnp.finfo(self.loss.dtype).bits >= _FLOAT32.bits
        return has_range and has_digits and not _flow.has(program, "custom_lin")


def _add(
    sums: Grads, pullback: Pullback, cotangent: Scalar, factor: Scalar | None
) -> Grads:
    """`sums` with a gradient times `factor` in them.

    In place where a sum is of the gradient's type. Where it is not (a sum of bfloat16
    gradients, in float32), the gradient is held.
    """
    fits = jax.tree.map(is_like, sums, pullback.like)

    def buffer(is_in_place: bool, s: jax.Array, like: Leaf) -> jax.Array:
        return s if is_in_place else _tree.zeros(like)

    def total(is_in_place: bool, s: jax.Array, buffer: jax.Array) -> jax.Array:
        if is_in_place:
            return buffer
        wide = _tree.widened(s)
        added = buffer.astype(wide.dtype)
        if factor is not None:
            added = added * factor.astype(wide.dtype)
        return (wide + added).astype(s.dtype)

    if any(jax.tree.leaves(fits)):
        buffers = jax.tree.map(buffer, fits, sums, pullback.like)
        buffers = _add_in_place(buffers, pullback.function, cotangent)
    else:
        (buffers,) = pullback.function(cotangent)
    return jax.tree.map(total, fits, sums, buffers)


def is_like(s: jax.Array, like: Leaf) -> bool:
    """Whether a gradient like `like` can be added to `s` in place."""
    return _tree.type_of(s) == _tree.type_of(like)


def _add_after(sums: Grads, function: Any, cotangent: Scalar) -> Grads:
    (grads,) = function(cotangent)
    return jax.tree.map(jnp.add, sums, grads)


# JAX neither maps a scan that adds to a ref, nor compiles one in a function with a
# derivative of its own, as the loop is, if the ref is made by `jax.new_ref`. Both find
# the same sum here, without refs.


@custom_vmap
def _add_or_map(sums: Grads, function: Any, cotangent: Scalar) -> Grads:
    return pallas.run_state(lambda refs: function.with_refs(refs)(cotangent))(sums)


@_add_or_map.def_vmap
def _add_mapped(
    size: int, is_mapped: Any, sums: Grads, function: Any, cotangent: Scalar
) -> tuple[Grads, Grads]:
    axes = jax.tree.map(lambda is_: 0 if is_ else None, is_mapped)
    add = jax.vmap(_add_after, in_axes=tuple(axes), axis_size=size)
    return add(sums, function, cotangent), jax.tree.map(lambda _: True, sums)


_add_in_place = jax.custom_jvp(_add_or_map)


@_add_in_place.defjvp
def _add_jvp(primals: Any, tangents: Any) -> tuple[Grads, Grads]:
    return _add_in_place(*primals), jax.jvp(_add_after, primals, tangents)[1]
