"""The derivative of the value is the gradient, which has been computed already.

Without this, `jax.grad` of the value goes back through the loop, and keeps what every
micro-batch needs for its backward pass, to compute what the loop has computed before.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.extend import core

from optax_accum import _flow, _tree
from optax_accum._types import Batch, Grads, Leaf, Scalar, Tree

Arrays = list[Any]  # with ``None`` for leaves that are not arrays


class Result(NamedTuple):
    """What a run returns."""

    value: Leaf
    grads: Grads
    rest: Tree


Run = Callable[[Batch, Arrays], Result]


class _Arguments(NamedTuple):
    """What a run is a function of."""

    differentiated: Arrays  # with ``None`` for the other arrays
    others: Arrays
    batch: Batch
    closed_over: list[jax.Array]


def run_with_derivative(run: Run, batch: Batch, arrays: Arrays, places: Tree) -> Result:
    """``run(batch, arrays)``, in which the value's derivative is the gradient.

    This holds if only what is differentiated has a tangent. Otherwise, and for
    everything but the value, derivatives go through `run`.

    Args:
      run: To be called.
      batch: Its first argument.
      arrays: Its second argument.
      places: A tree like what is differentiated, of places in `arrays`.
    """
    differentiated = set(jax.tree.leaves(places))
    # What `run` closes over may have tangents, too, and becomes an argument.
    # (`jax.closure_convert` would keep the arrays of many calls in memory.)
    program, shapes = jax.make_jaxpr(run, return_shape=True)(batch, arrays)
    if _flow.has_refs(program.jaxpr):
        # JAX does not lower a `custom_jvp` with refs in it.
        return run(batch, arrays)

    def call(given: _Arguments) -> Result:
        pairs = zip(given.differentiated, given.others, strict=True)
        both = [other if own is None else own for own, other in pairs]
        closed = core.ClosedJaxpr(program.jaxpr, given.closed_over)
        outputs = core.jaxpr_as_fun(closed)(*jax.tree.leaves((given.batch, both)))
        return jax.tree.unflatten(jax.tree.structure(shapes), outputs)

    def jvp(
        primals: tuple[_Arguments], tangents: tuple[_Arguments]
    ) -> tuple[Result, Result]:
        leaves, structure = jax.tree.flatten(*primals)
        dots = jax.tree.leaves(tangents)
        moving = [i for i, dot in enumerate(dots) if not isinstance(dot, SymbolicZero)]

        def of_moving(*moved: jax.Array) -> Result:
            replaced = dict(enumerate(leaves)) | dict(zip(moving, moved, strict=True))
            return call(jax.tree.unflatten(structure, replaced.values()))

        result, dot = jax.jvp(
            of_moving, [leaves[i] for i in moving], [dots[i] for i in moving]
        )
        front = len(jax.tree.leaves(primals[0].differentiated))
        is_sum = not any(map(_tree.unreduced, jax.tree.leaves(result.grads)))
        if is_sum and all(i < front for i in moving):
            tangents_of = tangents[0].differentiated
            value_dot = _inner_product(result, places, tangents_of)
            # Inside a `jax.shard_map` the gradient of this device's own value may have
            # been summed over all devices; then it is not this value's derivative.
            if _tree.varying(value_dot) == _tree.varying(result.value):
                dot = dot._replace(value=value_dot)
        return result, dot

    function = jax.custom_jvp(call)
    function.defjvp(jvp, symbolic_zeros=True)
    numbered = list(enumerate(arrays))
    return function(
        _Arguments(
            differentiated=[x if i in differentiated else None for i, x in numbered],
            others=[None if i in differentiated else x for i, x in numbered],
            batch=batch,
            closed_over=program.consts,
        )
    )


def _inner_product(result: Result, places: Tree, tangents: Arrays) -> Scalar:
    """What the value changes by, if what is differentiated does by `tangents`."""
    dtype = _tree.at_least_float32(result.value.dtype)

    def product(place: int, grad: Any) -> Scalar:
        tangent = tangents[place]
        if grad is None or tangent is None or isinstance(tangent, SymbolicZero):
            return jnp.zeros([], dtype)
        terms = _tree.widened(grad) * _tree.widened(jnp.asarray(tangent))
        if not _tree.is_complex(result.value):
            terms = terms.real
        return jnp.sum(terms).astype(dtype)

    products = jax.tree.leaves(jax.tree.map(product, places, result.grads))
    return sum(products, jnp.zeros([], dtype)).astype(result.value.dtype)
