"""What reaches every micro-batch whole, and looks as if it should not.

An argument with as many entries as the batch has examples looks like a batch that was
not named: if it broadcasts against a micro-batch, the result is silently wrong. A
random key from which all micro-batches draw the same is silently wrong, too. So is
either in a closure of the loss. All are refused, and the message says how to write
what is meant.
"""

import functools
import inspect
import types
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from optax_accum import _arguments, _validate
from optax_accum._arguments import Call, Place, Roles
from optax_accum._closures import cells_of, globals_of
from optax_accum._types import Function

Named = list[tuple[str, Any]]  # leaves, and what to call them


def check(
    call: Call, roles: Roles, functions: dict[str, Function], examples: int
) -> None:
    """Raises for what looks like a batch or a key, in a call whose batch is split.

    Args:
      call: The call.
      roles: The roles to which it was bound.
      functions: Whose closures to look at, by what to call them in a message.
      examples: B, of the whole call.

    Raises:
      ValueError: An argument, or something that a function closes over, has an entry
        for each example, or is a random key that is the same for all micro-batches.
    """
    values = call.by_place()
    for place in call.rest:
        pairs = jax.tree_util.tree_leaves_with_path(values[place])
        name = call.name_of(place)
        leaves = [(name + jax.tree_util.keystr(path), x) for path, x in pairs]
        for leaf_name, x in leaves:
            if _arguments.is_raw_key(x):  # Of typed ones every micro-batch has its own.
                by = "num" if _has_position(call, place) else "name"
                value = place if by == "num" else repr(name)
                raise ValueError(
                    f"`{leaf_name}` looks like a random key, uint32 of shape "
                    f"{x.shape}, and every micro-batch would draw the same from it. "
                    f"Pass rng_arg{by}s={value} to give each a key of its own, or make "
                    "the key with jax.random.key, which is recognised. If it is not a "
                    "key, or all should draw the same, pass "
                    f"{_option(call, roles, place, None)}"
                )
        found = _looks_like_a_batch(leaves, call.axis, examples)
        if found:
            raise ValueError(
                f"{', '.join(found)}, but is not a batch argument: every micro-batch "
                "would get all of it. If it belongs to the batch, pass "
                f"{_option(call, roles, place, call.axis)}. If every micro-batch needs "
                f"all of it, pass {_option(call, roles, place, None)}"
            )
    for who, function in functions.items():
        for how, leaves in _held_by(function, call):
            for name, x in leaves:
                if _arguments.is_key(x):
                    raise ValueError(
                        f"{who} {how} `{name}`, which looks like a random key, and "
                        "every micro-batch would draw the same from it. "
                        f"{_MAKE_THE_KEY_AN_ARGUMENT}"
                    )
            found = _looks_like_a_batch(leaves, 0, examples)
            if found:
                raise ValueError(
                    f"{who} {how} {', which '.join(found)}; every micro-batch would "
                    f"get all of it. {_MAKE_IT_AN_ARGUMENT} in `batch_argnums` or "
                    "`batch_argnames`. If every micro-batch needs all of it, give it "
                    "None in `batch_axis`"
                )


def check_traced(who: str, run: Any, *args: Any) -> None:
    """Raises if the traced program reads a random key that is no argument of it.

    That finds the keys in objects that the loss closes over, in a `self`, and in what
    other functions close over, which `check` cannot look into.

    Args:
      who: What to call the user's function in a message.
      run: A `jax.jit` of a function whose arguments are all that may differ.
      *args: Its arguments.

    Raises:
      ValueError: It does.
    """
    jaxpr = run.trace(*args).jaxpr
    # Tracers that it closes over come before its arguments.
    count = len(jaxpr.jaxpr.invars) - len(jax.tree.leaves(args))
    held = [*(v.aval for v in jaxpr.jaxpr.invars[:count]), *_constants_in(jaxpr)]
    for x in held:
        if _arguments.is_key(x):
            raise ValueError(
                f"{who}, or what it calls, reads a random key, {x.dtype}"
                f"{list(x.shape)}, that is not one of its arguments (but a global "
                "variable, an attribute or in a closure), and every micro-batch would "
                f"draw the same from it. {_MAKE_THE_KEY_AN_ARGUMENT}. If it is not a "
                "key, or all should draw the same, give that argument None in "
                "`batch_axis`"
            )


def _constants_in(jaxpr: Any) -> Iterator[Any]:
    """The constants of a traced program, and of all programs inside of it."""
    yield from getattr(jaxpr, "consts", ())
    for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        for inner in jax.tree.leaves(
            list(equation.params.values()), is_leaf=_is_program
        ):
            if _is_program(inner):
                yield from _constants_in(inner)


def _is_program(x: Any) -> bool:
    return hasattr(getattr(x, "jaxpr", x), "eqns")


_MAKE_THE_KEY_AN_ARGUMENT = (
    "Pass it as an argument, as in f(params, batch, key): each micro-batch then "
    "gets a key of its own, if it is from jax.random.key or named in `rng_argnums` or "
    "`rng_argnames`"
)
_MAKE_IT_AN_ARGUMENT = "Make it an argument, as in f(params, x, y), and name it"


def _looks_like_a_batch(
    leaves: Named, axis: int, examples: int
) -> tuple[str, str] | None:
    """What to say if all arrays among `leaves` have an entry for each example.

    Which array, and that it has.
    """
    # An array with one entry says nothing: it may be a factor.
    arrays = [(name, x) for name, x in leaves if _is_array(x) and x.size != 1]
    fits = [-x.ndim <= axis < x.ndim and x.shape[axis] == examples for _, x in arrays]
    if not fits or not all(fits):
        return None
    name, x = arrays[0]
    return (
        f"`{name}`, {_validate.shown_type(x)}",
        f"has {examples} entries along axis {axis}, as many as the batch has examples",
    )


def _is_array(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray)


def _has_position(call: Call, place: Place) -> bool:
    """Whether the argument there was passed by position."""
    return isinstance(place, int) and place < call.num_positional


def _option(call: Call, roles: Roles, place: Place, axis: int | None) -> str:
    """The options with which the argument there is a batch argument as well."""
    axes = roles.batch_axis
    is_one = isinstance(axes, int)
    entries = [axes] * len(call.batch_arguments) if is_one else list(axes)
    if _has_position(call, place):
        option = f"batch_argnums={(*roles.batch_argnums, place)}"
        entries.insert(len(roles.batch_argnums), axis)
    else:
        option = f"batch_argnames={(*roles.batch_argnames, call.name_of(place))}"
        entries.append(axis)
    return option if is_one and axis == axes else f"{option}, batch_axis={(*entries,)}"


# --- What a function brings along ---


def _held_by(function: Function, call: Call) -> Iterator[tuple[str, Named]]:
    """The arrays that `function` uses besides the arguments of `call`, and how."""
    for name, value in _defaults(function, call).items():
        yield "has by default", _arrays_in(name, value)
    seen: set[int] = set()
    ahead: list[Any] = [function]
    while ahead:
        layer = ahead.pop()
        if id(layer) in seen:
            continue
        seen.add(id(layer))
        if isinstance(layer, functools.partial):
            for i, value in enumerate(layer.args):
                yield "is a functools.partial of", _arrays_in(f"args[{i}]", value)
            ahead.append(layer.func)
            continue
        if inspect.ismethod(layer):
            for name, value in _attributes_read(layer).items():
                yield "reads", _arrays_in(f"self.{name}", value)
            layer = layer.__func__
        if isinstance(layer, types.FunctionType):
            for name, value in (globals_of(layer) | cells_of(layer)).items():
                yield "closes over", _arrays_in(name, value)
            # What it decorates, and helpers next to it, have closures of their own.
            ahead += [f for f in cells_of(layer).values() if callable(f)]
        ahead.append(getattr(layer, "__wrapped__", None))


def _defaults(function: Function, call: Call) -> dict[str, Any]:
    """The arguments that `call` leaves to `function`, a partial's keywords included."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # Some have no signature.
        return {}
    given = {*call.names, *call.kwargs}
    return {
        p.name: p.default
        for p in signature.parameters.values()
        if p.default is not p.empty and p.name not in given
    }


def _attributes_read(method: types.MethodType) -> dict[str, Any]:
    """What a method may read of its object, unless that is a model of parameters."""
    owner = method.__self__
    if isinstance(owner, type) or not jax.tree_util.all_leaves([owner]):
        return {}
    own = getattr(owner, "__dict__", {})
    return {name: own[name] for name in method.__code__.co_names if name in own}


def _arrays_in(name: str, value: Any) -> Named:
    """The arrays in dicts, lists and tuples; modules and other objects are left alone.

    Not by `jax.tree`, which does not take every dict that a program may hold.
    """
    found, seen, stack = [], set(), [(name, value)]
    while stack:
        name, x = stack.pop()
        if _is_array(x):
            found.append((name, x))
        elif isinstance(x, dict | list | tuple) and id(x) not in seen:
            seen.add(id(x))
            items = x.items() if isinstance(x, dict) else enumerate(x)
            stack += [(f"{name}[{key!r}]", part) for key, part in items]
    return found
