"""What is summed over devices, and what must differ between them until then.

Under ``check_vma=True`` `jax.shard_map` knows of each array over which axes of the mesh
it *varies*. A parameter that is the same on all devices does not, and `jax.grad` with
respect to it sums over them by itself, in every micro-batch. Cast to vary, it gives
gradients that stay local, which is what everything here is about: local until the end,
and then one sum.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from optax_accum import _checks

# The primitives whose result is the same on all devices of the axis.
_REDUCTIONS = (
    *("psum", "psum_invariant", "pmax", "pmin"),
    *("all_gather", "all_gather_invariant", "all_gather_reduced"),
)

# The primitives that do nothing but call another function.
_CALLS = ("jit", "pjit", "closed_call", "remat", "checkpoint", "custom_jvp_call")


def sum_over(axis_name: Any, tree: Any) -> Any:
    """`tree` summed over the devices of `axis_name`, or as it is without one."""
    return tree if axis_name is None else lax.psum(tree, axis_name)


def last_of(axis_name: Any, tree: Any) -> Any:
    """`tree` as the last device of `axis_name` has it, or as it is without one."""
    if axis_name is None:
        return tree
    is_last = lax.axis_index(axis_name) == lax.axis_size(axis_name) - 1

    def last(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(
                last(jax.random.key_data(x)), impl=jax.random.key_impl(x)
            )
        numbers = x.astype(jnp.int32) if x.dtype == bool else x
        # Selected, and not multiplied: what the others hold may be NaN.
        chosen = jnp.where(is_last, numbers, jnp.zeros([], numbers.dtype))
        return lax.psum(chosen, axis_name).astype(x.dtype)

    return jax.tree.map(last, tree)


def vary(axis_name: Any, tree: Any) -> Any:
    """`tree` as something that differs between the devices of `axis_name`."""
    if axis_name is None:
        return tree
    return vary_like(tree, lax.axis_index(axis_name))


def vary_like(tree: Any, *others: Any) -> Any:
    """`tree` as something that differs wherever one of `others` does.

    Arrays, or shapes of them; the first value that goes round a `lax.scan` must vary
    over the axes that the later ones vary over.
    """
    axes = frozenset().union(*map(varying, others))

    def cast(x):
        missing = tuple(sorted(axes - varying(x)))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)


def varying(x: Any) -> frozenset:
    """The axes over which `x` is known to differ between devices."""
    aval = jax.typeof(x)
    named = getattr(aval, "mat", None)
    return getattr(named, "varying", None) or getattr(aval, "vma", None) or frozenset()


def check_local(axis_name: Any, grads: Any) -> None:
    """Raises where gradients are known to be the same on all devices of `axis_name`.

    They have been summed over these devices by `jax.grad`; another sum would count
    them once per device.
    """
    for name in _checks.axis_names(axis_name):
        if name not in varying(lax.axis_index(name)):
            continue  # Not inside a `shard_map` that checks.
        for path, g in jax.tree_util.tree_leaves_with_path(grads):
            if name not in varying(g):
                raise ValueError(
                    f"{_checks.named('grads', path)} is the same on all devices "
                    f"of `axis_name={name!r}`: it has been summed over them already. "
                    "Gradients must be local. Take them with respect to jax.lax.pcast("
                    f"params, {name!r}, to='varying'), or use check_vma=False"
                )


def check_local_loss(axis_name: Any, loss: Any, jaxpr: Any) -> None:
    """Raises where `loss`, the first output of `jaxpr`, was reduced over `axis_name`.

    In `jax.pmap` and under ``check_vma=False`` types do not tell; there the operations
    that lead to the loss do.
    """
    for name in _checks.axis_names(axis_name):
        if name in varying(lax.axis_index(name)):
            is_local = name in varying(loss)
        else:
            is_local = _local_outputs(jaxpr, name)[0]
        if not is_local:
            raise ValueError(
                f"`fun` must return this device's own value with `axis_name={name!r}`; "
                "got one that is the same on all of its devices. Leave the psum or "
                "pmean out of `fun`: value and gradient are reduced once, after the "
                "last micro-batch"
            )


def _local_outputs(
    jaxpr: Any, name: Any, local_inputs: list[bool] | None = None
) -> list[bool]:
    """Which outputs of `jaxpr` may differ between the devices of the axis `name`."""
    if local_inputs is None:
        local_inputs = [True] * len(jaxpr.invars)
    local = set(jaxpr.constvars)
    local.update(v for v, yes in zip(jaxpr.invars, local_inputs, strict=True) if yes)

    def may_differ(atom):
        is_literal = hasattr(atom, "val")
        return not is_literal and atom in local

    for equation in jaxpr.eqns:
        inputs = [may_differ(v) for v in equation.invars]
        called = _called(equation)
        if called is not None:
            outputs = _local_outputs(called, name, inputs)
        else:
            reduced = equation.primitive.name in _REDUCTIONS and name in _axes(equation)
            outputs = [any(inputs) and not reduced] * len(equation.outvars)
        local.update(v for v, yes in zip(equation.outvars, outputs, strict=True) if yes)
    return [may_differ(v) for v in jaxpr.outvars]


def _axes(equation: Any) -> tuple[Any, ...]:
    """The axes over which a collective reduces or gathers."""
    given = equation.params.get("axes", equation.params.get("axis_name"))
    return _checks.axis_names(given)


def _called(equation: Any) -> Any:
    """The function that `equation` merely calls, such as a `jax.jit`, or ``None``."""
    if equation.primitive.name not in _CALLS:
        return None
    inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
    return getattr(inner, "jaxpr", inner)
