"""An NNX module taken apart: what is differentiated, and what is carried."""

import dataclasses
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from flax.nnx.filterlib import Filter, to_predicate
from jax import lax
from jax.tree_util import KeyPath

from optax_accum import _arguments, _validate
from optax_accum._types import AxisName, Tree

Path = tuple[Any, ...]  # of a variable in `Nodes`


class Nodes(NamedTuple):
    """The module, and what else among the arguments can change where it stands.

    They are taken apart together, because they may share variables.

    Attributes:
      model: The module that is differentiated, or ``None`` if all are alike.
      others: Other modules, random streams and variables, by their names.
    """

    model: Any
    others: dict[str, Any]


class State(NamedTuple):
    """What the loss may change.

    Attributes:
      keys: Random keys.
      rest: Everything else that is not a parameter.
      params: The parameters as the last micro-batch left them. Every micro-batch
        starts from those of the first.
    """

    keys: nnx.State
    rest: nnx.State
    params: nnx.State


def names_of(path: KeyPath) -> tuple[str, ...]:
    """A path in a tree, as the names of its keys."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


# --- Arguments ---


@dataclasses.dataclass(frozen=True)
class _Place:
    """Stands in an argument for one of `Nodes.others`."""

    name: str


def check_module(model: Any) -> None:
    """Raises unless `model` is an NNX module."""
    if isinstance(model, nnx.Pytree):
        return
    name = type(model).__name__
    got = f"an {name}" if name[0] in "aeiou" else f"a {name}"
    if isinstance(model, type):
        got = f"the class {model.__name__} itself"
    elif isinstance(model, jax.Array | np.ndarray):  # not the name of a tracer
        got = "an array"
    raise TypeError(
        f"the first argument must be an NNX module; got {got}. For a tree of "
        "parameters, use optax_accum.value_and_grad; put several modules into one"
    )


def check_batch(name: str, argument: Tree) -> None:
    """Raises if there are parameters in a batch argument, which would be split."""
    leaves = jax.tree.leaves(argument, is_leaf=lambda x: isinstance(x, nnx.Variable))
    if any(isinstance(x, nnx.Param) for x in leaves):
        raise TypeError(
            f"`{name}` is a batch argument, but it holds parameters. List the "
            "arguments to split in `batch_argnums`; the first one is 0"
        )


def taken_out(name: str, argument: Tree, others: dict[str, Any]) -> Tree:
    """The argument with places for its nodes, which go into `others`."""

    def take(path: KeyPath, node: Any) -> Any:
        if not _is_node(node):
            return node
        place = _Place(f"{name}{jax.tree_util.keystr(path)}")
        others[place.name] = node
        return place

    return jax.tree_util.tree_map_with_path(take, argument, is_leaf=_is_node)


def put_back(arguments: Tree, others: dict[str, Any]) -> Tree:
    """The reverse of `taken_out`, for all arguments."""

    def put(x: Any) -> Any:
        return others[x.name] if isinstance(x, _Place) else x

    return jax.tree.map(put, arguments)


def _is_node(x: Any) -> bool:
    return isinstance(x, nnx.Pytree | nnx.Variable)


# --- Modules ---


def split(nodes: Nodes, wrt: Filter) -> tuple[nnx.GraphDef, nnx.State, State]:
    """How `nodes` are built, the parameters of the module, and what may change."""
    is_chosen = to_predicate(wrt)

    def is_param(path: Path, value: Any) -> bool:
        return path[0] == 0 and is_chosen(path[1:], value)

    def is_key(path: Path, value: Any) -> bool:
        del path
        return isinstance(value, nnx.RngKey) or _arguments.is_typed_key(value)

    graphdef, *states = nnx.split(tuple(nodes), is_param, is_key, ...)
    params, keys, rest = states
    flat = {path[1:]: variable for path, variable in nnx.to_flat_state(params)}
    params = nnx.from_flat_state(flat)
    return graphdef, params, State(keys, rest, params)


def merge(graphdef: nnx.GraphDef, params: nnx.State, state: State) -> Nodes:
    """The reverse of `split`, with variables of its own."""
    inside = {(0, *path): variable for path, variable in nnx.to_flat_state(params)}
    whole = nnx.from_flat_state(inside)
    model, others = nnx.merge(graphdef, whole, state.keys, state.rest, copy=True)
    return Nodes(model, others)


def update(nodes: Nodes, before: State, after: State) -> None:
    """Gives `nodes` what is in `after` and was not there before."""
    old, new = _flat(before), _flat(after)
    written = {path: new[path] for path in new if not _is_same(old[path], new[path])}
    nnx.update(tuple(nodes), nnx.from_flat_state(written))


def check_same_variables(before: State, after: State) -> None:
    """Raises if the function has added variables, removed some or changed types."""
    old, new = _types_of(before), _types_of(after)
    changes = [f"added {_shown(path)}" for path in new if path not in old]
    changes += [f"took away {_shown(path)}" for path in old if path not in new]
    changes += [
        f"changed the type of {_shown(path)} from {old[path][0]} to {new[path][0]}"
        for path in old
        if path in new and old[path] != new[path]
    ]
    if changes:
        raise ValueError(
            "the function must leave the module with the variables that it had, but it "
            f"{', '.join(changes)}. Take intermediate values out of it, with "
            "nnx.capture or nnx.pop(model, nnx.Intermediate), and return them as "
            "auxiliary output"
        )


def check_same_attributes(before: nnx.GraphDef, after: nnx.GraphDef) -> None:
    """Raises if the function has changed anything that is not a variable."""
    if before != after:
        raise ValueError(
            "the function must leave the module's plain attributes as they were, but "
            "it has changed one. Keep values that change in an nnx.Variable; to switch "
            "modes, take a view of the module first: nnx.view(model, "
            "deterministic=True)"
        )


def check_not_shared(nodes: Nodes, wrt: Filter) -> None:
    """Raises where the other arguments hold parameters of the module itself."""
    if not nodes.others:
        return
    is_param = to_predicate(wrt)
    params = {
        id(x): ".".join(map(str, path))
        for path, x in nnx.iter_graph(nodes.model)
        if isinstance(x, nnx.Variable) and is_param(path, x)
    }
    for name, node in nodes.others.items():
        for _, x in nnx.iter_graph(node):
            if id(x) in params:
                raise ValueError(
                    f"`{name}` must not hold parameters of the module, but it shares "
                    f"{params[id(x)]} with it. Use them through the module, or pass "
                    "nnx.clone of them to keep them fixed"
                )


def same_leaves(tree: Tree, other: Tree) -> list[bool]:
    """For each leaf whether the very same array is in both, so it was not written."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    return [x is y for x, y in pairs]


def check_not_written(params: nnx.State, is_wrong: list[bool]) -> None:
    """Raises if `loss_fn` has written what it must not to some leaves of `params`."""
    structure = jax.tree.structure(params)
    flat = nnx.to_flat_state(jax.tree.unflatten(structure, is_wrong))
    wrong = [".".join(map(str, path)) for path, x in flat if any(jax.tree.leaves(x))]
    if wrong:
        raise ValueError(
            "`loss_fn` must only read the variables that `wrt` selects, but it wrote "
            f"values that depend on the batch to {', '.join(wrong)}. Make these "
            "variables that `wrt` does not select, such as nnx.Variable"
        )


def check_params_only_read(before: State, after: State) -> None:
    """Raises if there are parameters in the state and the function wrote to them."""
    old, new = _flat(before), _flat(after)
    wrong = [
        _shown(path)
        for path, variable in old.items()
        if isinstance(variable, nnx.Param) and not _is_same(variable, new[path])
    ]
    if wrong:
        raise ValueError(
            "the function must only read parameters, but it wrote to "
            f"{', '.join(wrong)}, whose gradient would be lost. For a layer that "
            "writes to its parameters at each call, as nnx.WeightNorm does, call a "
            "copy: nnx.clone(layer)(x) in place of layer(x)"
        )


def of_this_device(state: State, axis_name: AxisName) -> State:
    """The state with keys of this device's own."""
    index = lax.axis_index(axis_name)
    keys = jax.tree.map(lambda key: _arguments.fold_in(key, index), state.keys)
    return state._replace(keys=keys)


def _flat(state: State) -> dict[Path, Any]:
    """The variables by their paths in `Nodes`."""
    flat = {(0, *path): variable for path, variable in nnx.to_flat_state(state.params)}
    for part in (state.keys, state.rest):
        flat |= dict(nnx.to_flat_state(part))
    return flat


def _shown(path: Path) -> str:
    """A path without the field of `Nodes`."""
    return ".".join(map(str, path[1:]))


def _types_of(state: State) -> dict[Path, tuple[str, Any]]:
    """For each variable what to call its type, and what its type is."""

    def type_of(variable: Any) -> tuple[str, Any]:
        leaves, structure = jax.tree.flatten(_value(variable))
        name, types = type(variable).__name__, list(map(_validate.shown_type, leaves))
        return f"{name} {', '.join(types)}", (name, structure, types)

    return {path: type_of(variable) for path, variable in _flat(state).items()}


def _is_same(variable: Any, other: Any) -> bool:
    """Whether the very same arrays are in both."""
    return all(same_leaves(_value(variable), _value(other)))


def _value(variable: Any) -> Any:
    is_variable = isinstance(variable, nnx.Variable)
    return variable.get_raw_value() if is_variable else variable
