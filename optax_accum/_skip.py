"""Predicates that reject a micro-batch."""

from typing import Any

import jax
import jax.numpy as jnp

from optax_accum import _window


def skip_not_finite(
    updates: Any, gradient_step: Any = None, params: Any = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Rejects a micro-batch whose gradient holds a NaN or an infinity.

    The same answer as `optax.skip_not_finite` and the same signature, for a fraction
    of the cost: whether ``max(|g|) < inf`` is one fused read of each leaf, where
    counting the elements that are not finite writes a temporary as large as the
    parameters.

    Args:
      updates: The micro-batch's gradients; leaves of any shape. Integer leaves are
        finite.
      gradient_step: Not used.
      params: Not used.

    Returns:
      ``(bool[], {"should_skip": bool[]})``.

    Examples:
      >>> import jax.numpy as jnp, optax_accum as oa
      >>> should_skip, info = oa.skip_not_finite({"w": jnp.array([1.0, jnp.nan])})
      >>> print(should_skip)
      True
    """
    del gradient_step, params
    leaves = jax.tree.leaves(_window.keep_inexact(updates))
    parts = [part for g in leaves for part in _real_parts(jnp.asarray(g))]
    # A NaN wins every maximum, and is not less than infinity.
    finite = [jnp.max(jnp.abs(part), initial=0) < jnp.inf for part in parts]
    should_skip = ~jnp.all(jnp.array(finite)) if finite else jnp.zeros([], bool)
    return should_skip, {"should_skip": should_skip}


def _real_parts(g: jax.Array) -> tuple[jax.Array, ...]:
    """Real arrays that are finite where `g` is, in a dtype that has an infinity."""
    if jnp.iscomplexobj(g):  # Its absolute value overflows before its parts do.
        return g.real, g.imag
    return (g.astype(_window.at_least_float32(g.dtype)),)
