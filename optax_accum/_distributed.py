"""Where S and W are summed over devices."""

from typing import Any

import jax
from jax import lax

from optax_accum import _checks


def sum_over(axis_name: Any, tree: Any) -> Any:
    """`tree` summed over the devices of `axis_name`, or as it is without one."""
    return tree if axis_name is None else lax.psum(tree, axis_name)


def check_local(axis_name: Any, grads: Any) -> None:
    """Raises where gradients are known to be the same on all devices of `axis_name`.

    Under ``check_vma=True``, `jax.grad` sums the gradient of a parameter that all
    devices share over those devices; another sum would count it once per device.
    """
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    for name in names:
        if name not in _varying(lax.axis_index(name)):
            continue  # Not inside a `shard_map` that checks.
        for path, g in jax.tree_util.tree_leaves_with_path(grads):
            if name not in _varying(g):
                raise ValueError(
                    f"{_checks.named('grads', path)} is the same on all devices "
                    f"of `axis_name={name!r}`: it has been summed over them already. "
                    "Gradients must be local. Take them with respect to jax.lax.pcast("
                    f"params, {name!r}, to='varying'), or use check_vma=False"
                )


def _varying(x: Any) -> frozenset:
    """The axes over which `x` is known to differ between devices."""
    aval = jax.typeof(x)
    named = getattr(aval, "mat", None)
    return getattr(named, "varying", None) or getattr(aval, "vma", None) or frozenset()
