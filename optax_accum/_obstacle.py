"""Why a gradient cannot be added straight into its sum (see `_backward`)."""

from typing import Any

import jax
import numpy as np

from optax_accum import _backward, _flow, _tree, _validate
from optax_accum._backward import Pullback
from optax_accum._overwrite import Overwritten
from optax_accum._types import Grads, Params
from optax_accum.sharding import _collectives

# Before 0.11, JAX silently computes wrong gradients in place for a scan that uses both
# a parameter and something made of another one
# (https://github.com/jax-ml/jax/issues/32468).
_FIRST_JAX = (0, 11)


def in_jax() -> str | None:
    """What is in the way in any program, or ``None``."""
    if jax.__version_info__ < _FIRST_JAX:
        needed = ".".join(map(str, _FIRST_JAX))
        return f"JAX {jax.__version__} is older than {needed}"
    if jax.config.jax_disable_jit:  # type: ignore[attr-defined]
        return "`jax.disable_jit` is on"
    return None


def in_parameters(params: Params, overwritten: Overwritten) -> str | None:
    """What is in the way in any program of these parameters, or ``None``."""
    if not all(map(_tree.is_inexact, jax.tree.leaves(params))):
        return "some of what is differentiated is not floating"
    if overwritten.any_in(params):
        return "some parameters are overwritten"
    return in_jax()


def in_sums(name: str, sums: Grads, grads: Grads) -> str | None:
    """Which of these gradients cannot be added to its sum in place, or ``None``.

    Args:
      name: What to call `grads`.
      sums: The sums.
      grads: The gradients, or arrays like them.
    """
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(sums), jax.tree.leaves(grads), strict=True
    )
    for (path, s), g in pairs:
        if not _backward.can_add_in_place(s, g):
            return (
                f"{_validate.named(name, path)} is {_validate.shown_type(g)}, and "
                f"its sum {_validate.shown_type(s)}; both must be of one dtype, at "
                "least float32"
            )
    return None


def check(pullback: Pullback, program: Any, *, is_masked: bool) -> None:
    """Raises if the gradients of a traced function cannot be added in place.

    Args:
      pullback: Its pullback, of arrays or shapes.
      program: The function.
      is_masked: Whether a micro-batch of weight 0 must contribute nothing.

    Raises:
      NotInPlaceError: They cannot.
    """
    obstacle = _in_forward_pass(program)
    obstacle = obstacle or in_program(pullback, program, is_masked=is_masked)
    if obstacle is not None:
        raise _backward.NotInPlaceError(obstacle)


def in_program(pullback: Pullback, program: Any, *, is_masked: bool) -> str | None:
    """What is in the way in this one, or ``None``.

    Args:
      pullback: Of arrays or shapes.
      program: The function, or its derivative, traced.
      is_masked: Whether a micro-batch of weight 0 must contribute nothing.
    """
    if any(map(_tree.is_partial, jax.tree.leaves(pullback.like))):
        return "a parameter is tagged `reduced`"
    if _flow.has_refs(program):
        return "the function has a `jax.Ref`"
    if _collectives.mapped_axes(program):
        return "the function names an axis of `jax.vmap`"
    # In a `jax.shard_map` over some axes JAX traces no backward pass of shapes.
    if is_masked and (
        _collectives.compiler_may_exchange()
        or (_collectives.may_differ() and _exchanges(pullback))
    ):
        return (
            "the function exchanges data between devices, one of which may have a "
            "micro-batch of weight 0"
        )
    return None


def _exchanges(pullback: Pullback) -> bool:
    backward = jax.make_jaxpr(Pullback.gradients)(pullback).jaxpr
    return _collectives.may_exchange(backward)


def _in_forward_pass(program: Any) -> str | None:
    """What is in the way in a function, and no more to be seen in its derivative.

    A gather may fill in what is out of bounds. JAX 0.12 adds the gradient of such an
    entry in place, to the wrong row, if its index is negative. (Where NaN is filled in,
    nothing is right.)
    """
    for equation in _flow.equations_in(program):
        if equation.primitive.name == "gather":
            fill = equation.params["fill_value"]
            if fill is not None and not np.isnan(fill):
                return "the function has a gather with a `fill_value`"
    return None
