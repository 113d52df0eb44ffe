"""Axes of devices, what is exchanged over them, and what must differ until then.

Under ``check_vma=True`` a parameter that is the same on all devices does not vary, and
`jax.grad` with respect to it sums over the devices by itself, in every micro-batch.
Cast to vary, it gives gradients that stay local, which is what everything here is
about: local until the end, and then one sum.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_accum import _flow, _tree, _validate
from optax_accum._types import AxisName, Grads, Params, Scalar, Tree

# The primitives that reduce. (Gathering does not: a contrastive loss gathers.)
_REDUCTIONS = ("psum", "psum_invariant", "pmax", "pmin")

# Those that name an axis without exchanging anything.
_SILENT = ("axis_index", "pvary", "pcast")

_CONSTANT, _REDUCED, _LOCAL = range(3)

# --- Axes ---


def check_name(axis_name: Any) -> AxisName | None:
    """A name, a tuple of names, or ``None``.

    Raises:
      TypeError: The position of an axis, or no name at all.
    """
    names = tuple(axis_name) if isinstance(axis_name, list) else axis_name
    is_position = any(isinstance(n, int | np.integer) for n in _tree.axes_of(names))
    if names == () or is_position:
        raise TypeError(
            "`axis_name` must be the name of an axis of devices, as jax.pmap or a mesh "
            f"has it, or a tuple of them; got {axis_name!r}"
        )
    return names


def is_bound(name: Any) -> bool:
    """Whether the code runs inside an axis called `name`."""
    try:
        lax.axis_size(name)
    except NameError:
        return False
    return True


def check_bound(axis_name: AxisName | None) -> None:
    """Raises unless the code runs inside the axis or axes called `axis_name`."""
    for name in _tree.axes_of(axis_name):
        if not is_bound(name):
            raise ValueError(
                f"`axis_name={name!r}` is not bound: no jax.pmap or jax.shard_map "
                f"around this call has that axis. Call it inside jax.pmap(..., "
                f"axis_name={name!r}), or inside a jax.shard_map over a mesh with such "
                "an axis. Under plain jax.jit, pass the `mesh` as well, or leave "
                "`axis_name` out"
            )


# --- Exchanging ---


def sum_over(axis_name: AxisName | None, tree: Tree) -> Tree:
    """`tree` summed over the devices of `axis_name`, or as it is without one."""
    return tree if axis_name is None else lax.psum(tree, axis_name)


def last_device(axis_name: AxisName, weight: Scalar | None = None) -> Scalar:
    """The number of the last device, or of the last one whose `weight` is not 0.

    It is -1 if all weights are 0.
    """
    if weight is None:
        return jnp.int32(lax.axis_size(axis_name) - 1)
    number = lax.axis_index(axis_name)
    return lax.pmax(jnp.where(weight != 0, number, -1), axis_name)


def of_device(axis_name: AxisName, number: Scalar, tree: Tree) -> Tree:
    """`tree` as the device with this `number` has it; zeros if there is none."""
    is_this = lax.axis_index(axis_name) == number

    def choose(x: jax.Array) -> jax.Array:
        return _tree.masked_sum(x, is_this, lambda part: lax.psum(part, axis_name))

    return jax.tree.map(choose, tree)


def of_each_device(axis_name: AxisName, tree: Tree) -> Tree:
    """`tree` as each device has it, ``[D, ...]``, on all of them."""
    count = lax.axis_size(axis_name)
    is_this = jnp.arange(count) == lax.axis_index(axis_name)

    def gather(x: jax.Array) -> jax.Array:
        return _tree.masked_sum(
            lax.broadcast(x, (count,)), is_this, lambda part: lax.psum(part, axis_name)
        )

    return jax.tree.map(gather, tree)


def may_differ() -> bool:
    """Whether devices may differ in what they do here: in a `shard_map` or `pmap`."""
    return bool(jax.sharding.get_abstract_mesh().manual_axes)


def may_exchange(jaxpr: Any) -> bool:
    """Whether devices that may differ in what they do meet in `jaxpr`.

    There no branch may depend on a device's own values: the others would wait forever.
    """
    if not may_differ():
        # Any `jax.shard_map` in `jaxpr` is run by all of its devices alike.
        return bool(_named_axes(jaxpr, _SILENT))
    return compiler_may_exchange() or any(
        _named_axes(part, _SILENT) for part in _flow.with_inner(jaxpr)
    )


def compiler_may_exchange() -> bool:
    """Whether a `jax.shard_map` leaves axes to the compiler, which does as it must."""
    mesh = jax.sharding.get_abstract_mesh()
    return may_differ() and set(mesh.axis_names) != set(mesh.manual_axes)


def mapped_axes(jaxpr: Any) -> frozenset[Any]:
    """The axes in `jaxpr` that are not of devices, but of a `jax.vmap`."""
    manual = jax.sharding.get_abstract_mesh().manual_axes
    return _named_axes(jaxpr) - frozenset(manual)


def _named_axes(jaxpr: Any, without: tuple[str, ...] = ()) -> frozenset[Any]:
    """The axes, bound outside of `jaxpr`, that its operations name."""
    names: frozenset[Any] = frozenset()
    for equation in jaxpr.eqns:
        if equation.primitive.name not in without:
            for parameter in ("axes", "axis_name"):
                given = _tree.axes_of(equation.params.get(parameter))
                names |= {n for n in given if not isinstance(n, int)}
        bound = equation.params.get("newly_manual_axes", frozenset())
        for inner in _flow.functions_in(equation):
            names |= _named_axes(inner, without) - frozenset(bound)
    return names


# --- Local until then ---


def vary(axis_name: AxisName | None, tree: Tree) -> Tree:
    """`tree` as something that differs between the devices of `axis_name`."""
    if axis_name is None:
        return tree
    return _tree.vary_like(tree, lax.axis_index(axis_name))


def check_local(axis_name: AxisName | None, grads: Grads) -> None:
    """Raises if gradients are known to be the same on all devices of `axis_name`.

    They have been summed over these devices by `jax.grad`; another sum would count
    them once per device.
    """
    for name in _tree.axes_of(axis_name):
        if not _types_tell(name):
            continue
        for path, g in jax.tree_util.tree_leaves_with_path(grads):
            if name not in _tree.varying(g):
                raise ValueError(
                    f"{_validate.named('grads', path)} is the same on all devices "
                    f"of `axis_name={name!r}`: it is already summed over them. "
                    "Gradients must be local. Differentiate with respect to "
                    f"jax.lax.pcast(params, {name!r}, to='varying'); or if "
                    "oa.value_and_grad has reduced them, give `axis_name` to only one "
                    "of the two"
                )


def check_same(axis_name: AxisName | None, params: Params) -> None:
    """Raises if types say that `params` differ between devices of `axis_name`."""
    for name in _tree.axes_of(axis_name):
        for path, leaf in jax.tree_util.tree_leaves_with_path(params):
            if isinstance(leaf, jax.Array) and name in _tree.varying(leaf):
                raise ValueError(
                    f"{_validate.named('params', path)} may differ between the devices "
                    f"of `axis_name={name!r}`, and parameters must be the same on all "
                    "of them. Only cast them for jax.grad; here pass the original "
                    "parameters, with in_specs=P()"
                )


def check_local_loss(axis_name: AxisName, loss: Any, jaxpr: Any) -> None:
    """Raises if `loss`, the first output of `jaxpr`, was reduced over `axis_name`.

    In `jax.pmap` and under ``check_vma=False`` types do not tell; there the operations
    that lead to the loss do. Neither sees a loss of which only a part was reduced.
    """
    for name in _tree.axes_of(axis_name):
        if _types_tell(name):
            is_reduced = name not in _tree.varying(loss)
        else:
            is_reduced = _origins(jaxpr, name)[0] == _REDUCED
        if is_reduced:
            raise ValueError(
                f"`fun` must return this device's own value with `axis_name={name!r}`; "
                "got one that is the same on all of its devices. Leave the psum or "
                "pmean out of `fun`: value and gradient are reduced once, after the "
                "last micro-batch"
            )


def _types_tell(name: Any) -> bool:
    """Whether the code runs inside a `jax.shard_map` that checks what varies."""
    return name in _tree.varying(lax.axis_index(name))


def _origins(jaxpr: Any, name: Any, inputs: list[int] | None = None) -> list[int]:
    """For each output of `jaxpr`: made of constants, of reduced, or of local values."""
    if inputs is None:
        inputs = [_LOCAL] * len(jaxpr.invars)
    # What `fun` closes over may be anything.
    origins = dict.fromkeys(jaxpr.constvars, _LOCAL)
    origins.update(zip(jaxpr.invars, inputs, strict=True))

    def origin(atom: Any) -> int:
        is_literal = hasattr(atom, "val")
        return _CONSTANT if is_literal else origins.get(atom, _CONSTANT)

    for equation in jaxpr.eqns:
        given = [origin(v) for v in equation.invars]
        called = _flow.called(equation)
        if called is not None:
            made = _origins(called, name, given)
        elif _reduces(equation, name):
            made = [_REDUCED] * len(equation.outvars)
        else:
            is_index = equation.primitive.name == "axis_index"
            most = _LOCAL if is_index else max(given, default=_CONSTANT)
            made = [most] * len(equation.outvars)
        origins.update(zip(equation.outvars, made, strict=True))
    return [origin(v) for v in jaxpr.outvars]


def _reduces(equation: Any, name: Any) -> bool:
    """Whether the result is the same on all devices of the axis `name`."""
    if equation.primitive.name not in _REDUCTIONS:
        return False
    in_groups = equation.params.get("axis_index_groups") is not None
    return name in equation.params["axes"] and not in_groups
