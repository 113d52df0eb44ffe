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
    # Not `isfinite`: a NaN wins every maximum, and is not less than infinity.
    finite = [
        jnp.max(jnp.abs(g), initial=0) < jnp.inf
        for g in jax.tree.leaves(_window.keep_inexact(updates))
    ]
    should_skip = ~jnp.all(jnp.array(finite)) if finite else jnp.zeros([], bool)
    return should_skip, {"should_skip": should_skip}
