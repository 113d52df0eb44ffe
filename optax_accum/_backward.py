"""Gradients that the backward pass adds straight into their sum.

A gradient that is computed first and added after is one more buffer as large as the
parameters, and with layers in a `jax.lax.scan` the largest temporary of the training
step. JAX's pullback can add to a `jax.Ref` instead, in place and layer by layer
(https://docs.jax.dev/en/latest/301/refs.html).

For a mean, wᵢ·gᵢ must be added. If the backward pass is sure to give that for the
cotangent wᵢ, it does so at no cost. If not, S is divided by wᵢ before and multiplied by
it after, in place: that takes time and two more roundings, but no memory.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.experimental import pallas  # for `run_state`; there is no kernel here

from optax_accum import _flow, _tree
from optax_accum._types import Grads, Leaf, Scalar, Tree

_FLOAT32 = jnp.finfo(jnp.float32)

# The primitives whose backward pass is a user's function, which may clip, or a solver,
# which may stop at a tolerance that does not grow with the cotangent.
_BY_HAND = ("custom_lin", "linear_call", "custom_transpose_call", "custom_linear_solve")


def is_pullback(x: Any) -> bool:
    """Whether `x` is what `jax.vjp` returns besides the function's value."""
    return hasattr(type(x), "with_refs")


def arguments_of(function: Any) -> tuple[Any, ...]:
    """What a pullback was taken with respect to, with `...` for every leaf."""
    return jax.tree.unflatten(function.in_tree, [...] * function.in_tree.num_leaves)


def outputs_of(function: Any) -> list[Any]:
    """The types of what was differentiated and depends on these arguments."""
    return [variable.aval for variable in function.jaxpr.outvars]


class NotInPlaceError(Exception):
    """JAX cannot add some gradient in place; its message is the reason."""


class Pullback(NamedTuple):
    """A micro-batch's gradient that has yet to be computed.

    Attributes:
      function: What `jax.vjp` returned besides the outputs. What it was taken with
        respect to is `like`.
      cotangent: Of the outputs: of a scalar loss 1.
      like: Arrays, or shapes, of the gradient's types.
    """

    function: Any
    cotangent: Tree
    like: Grads

    def gradients(self) -> Grads:
        """The gradient by itself."""
        (grads,) = self.function(self.cotangent)
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
          weight: By what the gradient of a scalar is multiplied, or ``None`` for 1.
          counted: As in `Window.add`.
          first: As in `Window.add`.
        """
        cotangent, factor = self.cotangent, None
        if weight is not None and self._scales_with_cotangent():
            cotangent = cotangent * weight.astype(cotangent.dtype)
        elif weight is not None:
            factor = weight
            counted = _tree.opaque_true() if counted is True else counted
        mask = None if counted is True else jnp.asarray(counted)
        return _add(sums, self, _How(cotangent, factor, mask, first))

    def _scales_with_cotangent(self) -> bool:
        """Whether the gradient is sure to be w times as large for the cotangent w.

        bfloat16 cannot represent a weight of 301. It may overflow in float16, or where
        float16 is emulated. A rule written by hand, with `jax.custom_vjp`, may clip.
        """
        program = self.function.jaxpr  # linear; the backward pass is its transpose
        dtypes = [
            *_tree.dtypes_of((self.cotangent, self.like)),
            *_flow.dtypes_in(program),
        ]
        floating = [x for x in dtypes if jnp.issubdtype(x, jnp.inexact)]
        has_range = all(jnp.finfo(x).maxexp >= _FLOAT32.maxexp for x in floating)
        has_digits = jnp.finfo(self.cotangent.dtype).bits >= _FLOAT32.bits
        equations = _flow.equations_in(program)
        return has_range and has_digits and all(map(_keeps_range, equations))


def _keeps_range(equation: Any) -> bool:
    """Whether what `equation` makes of a cotangent is sure to grow with it."""
    if equation.primitive.name == "reduce_precision":
        return equation.params["exponent_bits"] >= _FLOAT32.nexp
    return equation.primitive.name not in _BY_HAND


def one_like(loss: jax.Array) -> Scalar:
    """The cotangent 1 of `loss`."""
    return _tree.vary_like(jnp.ones_like(loss), loss)


class _How(NamedTuple):
    """How a gradient is added.

    Attributes:
      cotangent: With which it is computed.
      factor: By what it is multiplied then, or ``None`` for 1.
      counted: ``bool[]``, whether it is added, or ``None`` if it is.
      first: ``bool[]``, whether the sums start again, or ``None`` if they do not.
    """

    cotangent: Tree
    factor: Scalar | None
    counted: Scalar | None
    first: Scalar | None


_Numbered = dict[int, jax.Array]  # leaves by their number among all


def _add(sums: Grads, pullback: Pullback, how: _How) -> Grads:
    """`sums` with a gradient in them.

    In place if a sum has the gradient's type. If not (bfloat16 gradients, summed in
    float32), the gradient is held.
    """
    leaves, structure = jax.tree.flatten(sums)
    like = dict(enumerate(jax.tree.leaves(pullback.like)))
    own = {i: s for i, s in enumerate(leaves) if can_add_in_place(s, like[i])}
    held = {i: _tree.zeros(x) for i, x in like.items() if i not in own}
    add = _add_in_place if own else _add_after
    own, held = add(own, held, pullback.function, how)
    for i, g in held.items():
        wide = _tree.widened(_start(leaves[i], how.first))
        total = wide + _times(g.astype(wide.dtype), how.factor)
        own[i] = total.astype(leaves[i].dtype)
    return jax.tree.unflatten(structure, [own[i] for i in range(len(leaves))])


def can_add_in_place(s: jax.Array, like: Leaf) -> bool:
    """Whether the backward pass can add a gradient like `like` to `s`.

    Not to a narrow sum: a parameter that is used many times is added to many times, and
    each of these small parts would be rounded against the whole window.
    """
    is_narrow = s.dtype != _tree.at_least_float32(s.dtype)
    return not is_narrow and _tree.type_of(s) == _tree.type_of(like)


def _start(s: jax.Array, first: Scalar | None) -> jax.Array:
    return s if first is None else jnp.where(first, jnp.zeros_like(s), s)


def _times(x: jax.Array, factor: Scalar | None) -> jax.Array:
    return x if factor is None else x * factor.astype(x.dtype)


def _add_after(
    own: _Numbered, held: _Numbered, function: Any, how: _How
) -> tuple[_Numbered, _Numbered]:
    """`own` with the gradient times the factor, and `held` with the gradient.

    `held` is multiplied by the caller, in the sum's dtype.
    """
    grads = dict(enumerate(jax.tree.leaves(function(how.cotangent))))

    def added(x: jax.Array, g: jax.Array) -> jax.Array:
        return x + g if how.counted is None else jnp.where(how.counted, x + g, x)

    return (
        {
            i: added(_start(s, how.first), _times(grads[i], how.factor))
            for i, s in own.items()
        },
        {i: added(zeros, grads[i]) for i, zeros in held.items()},
    )


# A scan that adds to a ref cannot be mapped by `jax.vmap`, and one whose ref comes from
# `jax.new_ref` cannot be compiled inside a function with a derivative of its own, as
# the loop is. So refs come from `pallas.run_state`, and where it is mapped or
# differentiated, `_add_after` makes the same sum, without refs and branches.


@custom_vmap
def _add_or_map(
    own: _Numbered, held: _Numbered, function: Any, how: _How
) -> tuple[_Numbered, _Numbered]:
    """As `_add_after`, in place."""

    def if_counted(change: Callable[[Any], Any], x: Any) -> Any:
        # A gradient that is NaN is not multiplied by 0, but never computed.
        if how.counted is None:
            return change(x)
        return lax.cond(how.counted, change, lambda x: x, x)

    def scaled(own: _Numbered, factor: Scalar | None) -> _Numbered:
        # In a branch of its own, or else XLA has a second S in between.
        if factor is None:
            return own
        return if_counted(
            lambda own: {i: _times(s, factor) for i, s in own.items()}, own
        )

    def run(refs: tuple[Any, Any]) -> None:
        leaves = refs[0] | refs[1]
        leaves = [leaves[i] for i in range(len(leaves))]
        function.with_refs(*jax.tree.unflatten(function.in_tree, leaves))(how.cotangent)

    if how.first is not None:
        # In a branch: a select would read and write S on every micro-step.
        own = lax.cond(how.first, _tree.zeros, lambda own: own, own)
    own = scaled(own, None if how.factor is None else 1 / how.factor)
    try:
        own, held = if_counted(pallas.run_state(run), (own, held))
    except (NotImplementedError, AssertionError) as error:
        # For a parameter behind a barrier, say, or one that a scan goes through and
        # closes over. JAX says so in one way or another while it traces.
        raise NotInPlaceError("JAX cannot add one of its gradients in place") from error
    return scaled(own, how.factor), held


@_add_or_map.def_vmap
def _add_mapped(size: int, is_mapped: Any, *args: Any) -> tuple[Any, Any]:
    axes = jax.tree.map(lambda is_: 0 if is_ else None, is_mapped)
    result = jax.vmap(_add_after, in_axes=tuple(axes), axis_size=size)(*args)
    return result, jax.tree.map(lambda _: True, result)


_add_in_place = jax.custom_jvp(_add_or_map)


@_add_in_place.defjvp
def _add_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    return _add_in_place(*primals), jax.jvp(_add_after, primals, tangents)[1]
