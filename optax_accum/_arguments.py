"""Which argument of a function is what: a batch, a carry, a key, or just there."""

import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_accum import _window

Positions = int | Sequence[int]


class Call(NamedTuple):
    """One call's arguments, taken apart by their roles.

    Attributes:
      args: All positional arguments.
      kwargs: All keyword arguments.
      names: The name of each positional argument, for messages.
      differentiated: The positions in `argnums`.
      batch: The batch arguments by name, all leaves arrays.
      places: Where the batch arguments stand: a position or a keyword, by name.
      carry: The position of the carried argument, or ``None``.
      keys: The positions of the random keys.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    names: list[str]
    differentiated: tuple[int, ...]
    batch: dict[str, Any]
    places: dict[str, int | str]
    carry: int | None
    keys: tuple[int, ...]

    def for_microbatch(
        self, part: dict[str, Any], carry: Any, index: Any
    ) -> tuple[list[Any], dict[str, Any]]:
        """The arguments with which the micro-batch number `index` is run."""
        args, kwargs = list(self.args), dict(self.kwargs)
        for name, place in self.places.items():
            (args if isinstance(place, int) else kwargs)[place] = part[name]  # type: ignore[index]
        if self.carry is not None:
            args[self.carry] = carry
        for position in self.keys:
            args[position] = jax.tree.map(
                lambda key: jax.random.fold_in(key, index), args[position]
            )
        return args, kwargs


class Roles(NamedTuple):
    """The roles that `value_and_grad` was told, checked against each call."""

    argnums: Positions
    batch_argnums: Positions
    batch_argnames: str | Sequence[str]
    carry_argnum: int | None
    rng_argnums: Positions

    def bind(
        self, fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Call:
        """Takes a call of `fun` apart.

        Raises:
          TypeError: A position that is no int, or a key that is none.
          ValueError: An argument that the call does not have, or with two roles.
        """
        carry = () if self.carry_argnum is None else (self.carry_argnum,)
        positions = {
            role: _positions(role, value, args)
            for role, value in {
                "argnums": self.argnums,
                "batch_argnums": self.batch_argnums,
                "carry_argnum": carry,
                "rng_argnums": self.rng_argnums,
            }.items()
        }
        names = _names(fun, len(args))
        _check_disjoint(positions, names)
        places: dict[str, int | str] = {names[i]: i for i in positions["batch_argnums"]}
        places |= {name: name for name in _keywords(self.batch_argnames, kwargs)}
        batch = {
            name: jax.tree.map(
                jnp.asarray, args[place] if isinstance(place, int) else kwargs[place]
            )
            for name, place in places.items()
        }
        for i in positions["rng_argnums"]:
            _check_keys(names[i], args[i])
        return Call(
            args=args,
            kwargs=kwargs,
            names=names,
            differentiated=positions["argnums"],
            batch=batch,
            places=places,
            carry=next(iter(positions["carry_argnum"]), None),
            keys=positions["rng_argnums"],
        )


def _positions(role: str, value: Positions, args: tuple[Any, ...]) -> tuple[int, ...]:
    """The positions in `value`, counted from the front."""
    try:
        try:
            given: Any = (operator.index(value),)  # type: ignore[arg-type]
        except TypeError:
            given = tuple(operator.index(i) for i in value)  # type: ignore[union-attr]
    except TypeError:
        raise TypeError(
            f"`{role}` must be an int or several ints, positions of arguments; got "
            f"{value!r}"
        ) from None
    for i in given:
        if not -len(args) <= i < len(args):
            hint = ""
            if role == "batch_argnums":
                hint = (
                    "; for a batch that is passed by keyword use "
                    "`batch_argnums=()` and `batch_argnames`"
                )
            raise ValueError(
                f"`{role}` names the positional argument {i}, but the function was "
                f"called with {len(args)}{hint}"
            )
    return tuple(i % len(args) for i in given)


def _keywords(names: str | Sequence[str], kwargs: dict[str, Any]) -> tuple[str, ...]:
    names = (names,) if isinstance(names, str) else tuple(names)
    for name in names:
        if name not in kwargs:
            raise ValueError(
                f"`batch_argnames` names the keyword argument {name!r}, but the "
                f"function was called with {sorted(kwargs) or 'none'}. Pass it by "
                "keyword, or give its position in `batch_argnums`"
            )
    return names


def _names(fun: Callable[..., Any], count: int) -> list[str]:
    """What `fun` calls its positional arguments, or ``args[i]``."""
    positional = (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
    )
    try:
        parameters = inspect.signature(fun).parameters.values()
    except (TypeError, ValueError):  # Not everything that is callable tells.
        parameters = {}.values()
    names = [p.name for p in parameters if p.kind in positional][:count]
    return names + [f"args[{i}]" for i in range(len(names), count)]


def _check_disjoint(positions: dict[str, tuple[int, ...]], names: list[str]) -> None:
    """Raises where one argument has two roles, or one role twice."""
    seen: dict[int, str] = {}
    for role, given in positions.items():
        for i in given:
            if i in seen:
                raise ValueError(
                    f"`{seen[i]}` and `{role}` both name argument {i}, `{names[i]}`; "
                    "an argument has one role"
                )
            seen[i] = role


def _check_keys(name: str, keys: Any) -> None:
    """Raises unless every leaf is one random key, typed or raw."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(keys):
        dtype, shape = _window.dtype_of(leaf), jnp.shape(leaf)
        if jnp.issubdtype(dtype, jax.dtypes.prng_key):
            is_one = shape == ()
        else:
            is_one = dtype == jnp.uint32 and len(shape) == 1
        if not is_one:
            raise TypeError(
                f"`{name}{jax.tree_util.keystr(path)}` is in `rng_argnums` and must be "
                "one random key, from jax.random.key or jax.random.PRNGKey; got shape "
                f"{shape} and dtype {dtype}"
            )
