"""Calls outside of `jax.jit`, and a warning if they compile every time."""

import collections
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_warned: set[str] = set()
_counts: collections.Counter[Any] = collections.Counter()


class Calls:
    """The calls of one function outside of `jax.jit` that compile it every time."""

    def __init__(self, name: str, remedy: str, fun: Callable | None = None) -> None:
        """`name` is what was called with `fun`, `remedy` what to do, as code."""
        self.name, self.remedy = name, remedy
        # A training step that is not compiled wraps the same loss again in every call.
        self.key = name, getattr(fun, "__code__", self)

    def note(self, *arguments: Any) -> None:
        """Counts a call with these arguments, and warns at the second one."""
        if self.name in _warned or not is_eager(arguments):
            return
        _counts[self.key] += 1
        if _counts[self.key] >= 2:
            _warned.add(self.name)
            warnings.warn(
                f"{self.name} was called outside of `jax.jit` for the second time, and "
                f"every such call compiles it again. Compile it once: {self.remedy}"
                ", or the whole training step. (This warning is shown once.)",
                UserWarning,
                stacklevel=3,
            )


def is_eager(arguments: Any) -> bool:
    """Whether a `jax.jit` inside of a call with these arguments is compiled at once."""
    if jax.config.jax_disable_jit:  # type: ignore[attr-defined]
        return False
    # In a trace even a constant is a tracer, so one of them shows it too.
    seen = [*jax.tree.leaves(arguments), jnp.zeros([])]
    return not any(isinstance(x, jax.core.Tracer) for x in seen)


def are_arrays(arguments: Any) -> bool:
    """Whether `arguments` hold only what `jax.jit` takes."""
    array = jax.Array | np.ndarray | np.generic | bool | int | float | complex
    return all(isinstance(x, array) for x in jax.tree.leaves(arguments))
