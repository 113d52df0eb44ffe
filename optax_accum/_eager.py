"""Calls from outside of `jax.jit`."""

import warnings

import jax
import numpy as np

from optax_accum._types import Tree

_warned: set[str] = set()


def is_eager(arguments: Tree) -> bool:
    """Whether a call with these arguments is traced by nobody."""
    return not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(arguments))


def are_arrays(arguments: Tree) -> bool:
    """Whether `arguments` hold nothing but what `jax.jit` takes."""
    array = jax.Array | np.ndarray | np.generic | bool | int | float | complex
    return all(isinstance(x, array) for x in jax.tree.leaves(arguments))


def warn_once(name: str, why: str) -> None:
    """Warns, once in a process, that `name` compiles at every call."""
    if name not in _warned:
        _warned.add(name)
        warnings.warn(
            f"{name} was called outside of jax.jit, and {why}, so it is compiled again "
            "at every call. Put the training step under jax.jit (nnx.jit, "
            "eqx.filter_jit)",
            stacklevel=4,
        )
