"""A module taken apart: what is differentiated, and what goes on beside it."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.nnx.filterlib import Filter
from jax import lax
from jax.tree_util import KeyPath

from optax_accum import _validate
from optax_accum._types import AxisName, Tree

State = tuple[nnx.State, nnx.State]  # of a module: its random keys, and the rest


def names_of(path: KeyPath) -> tuple[str, ...]:
    """A path in a tree, as the names of its keys."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


def split(model: Any, wrt: Filter) -> tuple[nnx.GraphDef, nnx.State, State]:
    """How `model` is built, its parameters, and its state: its keys, and the rest."""
    if not isinstance(model, nnx.Pytree):
        raise TypeError(
            "the first argument must be an NNX module; got a "
            f"{type(model).__name__}. For a tree of parameters there is "
            "optax_accum.value_and_grad; several modules go into one"
        )
    graphdef, *states = nnx.split(model, wrt, nnx.Any(nnx.RngKey, _is_key), ...)
    params, keys, rest = states
    return graphdef, params, (keys, rest)


def _is_key(path: Any, value: Any) -> bool:
    del path
    dtype = getattr(value, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def check_no_streams(name: str, argument: Tree) -> None:
    """Raises for random streams as an argument, which change where they are drawn."""
    for node in jax.tree.leaves(argument, is_leaf=lambda x: isinstance(x, nnx.Pytree)):
        if isinstance(node, nnx.Rngs):
            raise TypeError(
                f"`{name}` holds random streams, nnx.Rngs, whose counts would be lost. "
                "Put them into the module; or pass a key, named in `rng_argnums`, and "
                "make nnx.Rngs of it in the loss"
            )


def state_after(
    model: nnx.Pytree,
    wrt: Filter,
    graphdef: nnx.GraphDef,
    params: nnx.State,
    state: State,
) -> State:
    """The state of `model` after `loss_fn`; raises if anything else has changed."""
    graphdef_after, params_after, after = split(model, wrt)
    old, new = _types_of(params, *state), _types_of(params_after, *after)
    changes = [f"added {path}" for path in sorted(new.keys() - old.keys())]
    changes += [f"took away {path}" for path in sorted(old.keys() - new.keys())]
    changes += [
        f"changed the type of {path} from {old[path][0]} to {new[path][0]}"
        for path in sorted(old.keys() & new.keys())
        if old[path] != new[path]
    ]
    if changes:
        raise ValueError(
            "`loss_fn` must leave the module with the variables that it had, but it "
            f"{', '.join(changes)}. Take what is for one call alone out again, by "
            "nnx.capture or nnx.pop(model, nnx.Intermediate), and return it as "
            "auxiliary output"
        )
    before, now = _flat(params), _flat(params_after)
    written = [path for path in before if not _is_same(before[path], now[path])]
    if written:
        raise ValueError(
            "`loss_fn` must only read what it is differentiated with respect to, but "
            f"it wrote to {', '.join(written)}. Make it a variable of another kind "
            "than `wrt`, an nnx.Variable say"
        )
    if graphdef != graphdef_after:
        raise ValueError(
            "`loss_fn` must leave what is no variable in the module as it was, but it "
            "has changed an attribute. Keep what changes in an nnx.Variable, and take "
            "another view of the module before: nnx.view(model, deterministic=True)"
        )
    return after


def update(model: nnx.Pytree, before: State, after: State) -> None:
    """Gives `model` what is in `after` and was not there before."""
    for old, new in zip(before, after, strict=True):
        known = dict(nnx.to_flat_state(old))
        written = {
            path: variable
            for path, variable in nnx.to_flat_state(new)
            if not _is_same(known[path], variable)
        }
        nnx.update(model, nnx.from_flat_state(written))


def _flat(*states: nnx.State) -> dict[str, Any]:
    """The variables by their paths."""
    return {
        ".".join(map(str, path)): variable
        for state in states
        for path, variable in nnx.to_flat_state(state)
    }


def _types_of(*states: nnx.State) -> dict[str, tuple[str, Any]]:
    """For each variable what to call its type, and what its type is."""

    def type_of(variable: Any) -> tuple[str, Any]:
        leaves, structure = jax.tree.flatten(_value(variable))
        name, types = type(variable).__name__, list(map(_validate.shown_type, leaves))
        return f"{name} {', '.join(types)}", (name, structure, types)

    return {path: type_of(variable) for path, variable in _flat(*states).items()}


def _is_same(variable: Any, other: Any) -> bool:
    """Whether the very same arrays are in both, as when nobody wrote to them."""
    pairs = zip(*(jax.tree.leaves(_value(x)) for x in (variable, other)), strict=True)
    return all(x is y for x, y in pairs)


def _value(variable: Any) -> Any:
    is_variable = isinstance(variable, nnx.Variable)
    return variable.get_raw_value() if is_variable else variable


def of_this_device(state: State, axis_name: AxisName) -> State:
    """The state with keys of this device's own."""
    keys, rest = state
    index = lax.axis_index(axis_name)

    def fold(key: jax.Array) -> jax.Array:
        each = jnp.ravel(key)
        return jax.vmap(jax.random.fold_in, (0, None))(each, index).reshape(key.shape)

    return jax.tree.map(fold, keys), rest
