"""Why a gradient cannot be added straight into its sum (see `_backward`)."""

from collections.abc import Mapping
from typing import Any

import jax

from optax_accum import _flow, _tree
from optax_accum._backward import Pullback
from optax_accum.sharding import _collectives

# Before, a scan that uses a parameter beside something computed from another one got
# wrong gradients, without a word (https://github.com/jax-ml/jax/issues/32468).
_FIRST_JAX = (0, 11)


def in_jax() -> str | None:
    """What is in the way in any program, or ``None``."""
    if jax.__version_info__ < _FIRST_JAX:
        needed = ".".join(map(str, _FIRST_JAX))
        return f"JAX {jax.__version__} is older than {needed}"
    if jax.config.jax_disable_jit:  # type: ignore[attr-defined]
        return "`jax.disable_jit` is on"
    return None


def in_program(pullback: Pullback, program: Any, *, is_masked: bool) -> str | None:
    """What is in the way in this one, or ``None``.

    Args:
      pullback: Of arrays or shapes.
      program: The loss, or its derivative, traced.
      is_masked: Whether a micro-batch of weight 0 must contribute nothing.
    """
    is_partial = any(map(_tree.is_partial, jax.tree.leaves(pullback.like)))
    obstacle = first(
        {
            "a parameter is tagged `reduced`": is_partial,
            "the loss has a `jax.Ref`": _flow.has_refs(program),
            "the loss names an axis of `jax.vmap`": _collectives.mapped_axes(program),
        }
    )
    if obstacle is None and is_masked and _collectives.may_differ():
        backward = jax.make_jaxpr(Pullback.gradients)(pullback).jaxpr
        if _collectives.may_exchange(backward):
            return (
                "the loss exchanges data between devices, one of which may have a "
                "micro-batch of weight 0"
            )
    return obstacle


def first(obstacles: Mapping[str, Any]) -> str | None:
    """The first one that is there."""
    return next((name for name, is_there in obstacles.items() if is_there), None)
