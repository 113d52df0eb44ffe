"""Which argument of a function is what: a batch, a carry, a key, or just there."""

import inspect
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_accum import _checks, _window


class Call(NamedTuple):
    """One call's arguments, taken apart by their roles.

    Attributes:
      args: All positional arguments, with ``None`` for the batch arguments.
      kwargs: All keyword arguments but the batch arguments.
      names: The name of each positional argument, for messages.
      argnums: What to differentiate with respect to, counted from the front.
      batch: The batch arguments, all leaves arrays.
      places: Where each of them stands: its position or its keyword.
      carry: The position of the carried argument, or ``None``.
      keys: The positions of the random keys.
    """

    args: list[Any]
    kwargs: dict[str, Any]
    names: list[str]
    argnums: int | tuple[int, ...]
    batch: list[Any]
    places: list[int | str]
    carry: int | None
    keys: tuple[int, ...]

    def batch_names(self) -> list[str]:
        """The names of the batch arguments, for messages."""
        return [p if isinstance(p, str) else self.names[p] for p in self.places]

    def named(self) -> list[tuple[str, Any]]:
        """All arguments but the batch arguments, with their names."""
        return [*zip(self.names, self.args, strict=True), *self.kwargs.items()]

    def differentiated(self) -> Any:
        """The arguments in `argnums`: one, or a tuple of them."""
        return jax.tree.map(lambda i: self.args[i], self.argnums)

    def for_microbatch(
        self, part: list[Any], carry: Any, number: Any
    ) -> tuple[list[Any], dict[str, Any]]:
        """The arguments with which the micro-batch with this `number` is run."""
        args, kwargs = list(self.args), dict(self.kwargs)
        for place, argument in zip(self.places, part, strict=True):
            if isinstance(place, str):
                kwargs[place] = argument
            else:
                args[place] = argument
        if self.carry is not None:
            args[self.carry] = carry
        for position in self.keys:
            args[position] = jax.tree.map(
                lambda key: jax.random.fold_in(key, number), args[position]
            )
        return args, kwargs


def arrays_in(tree: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The arrays in `tree`, and how to build it from others in their places.

    In the list ``None`` stands for what is no array, and stays what it is.
    """
    leaves, structure = jax.tree.flatten(tree)

    def rebuild(arrays: list[Any]) -> Any:
        pairs = zip(arrays, leaves, strict=True)
        return jax.tree.unflatten(structure, [x if a is None else a for a, x in pairs])

    return [x if isinstance(x, jax.Array) else None for x in leaves], rebuild


class Roles(NamedTuple):
    """The roles that `value_and_grad` was told, to be found in each call."""

    argnums: int | tuple[int, ...]
    batch_argnums: tuple[int, ...]
    batch_argnames: tuple[str, ...]
    carry_argnum: tuple[int, ...]
    rng_argnums: tuple[int, ...]

    @classmethod
    def of(
        cls,
        argnums: int | Sequence[int],
        batch_argnums: int | Sequence[int],
        batch_argnames: str | Sequence[str],
        carry_argnum: int | None,
        rng_argnums: int | Sequence[int],
    ) -> "Roles":
        """Checks their types.

        Raises:
          TypeError: A position that is no int, or a name that is no str.
        """
        differentiated = as_positions("argnums", argnums)
        carry = () if carry_argnum is None else carry_argnum
        return cls(
            argnums=differentiated
            if isinstance(argnums, Iterable)
            else differentiated[0],
            batch_argnums=as_positions("batch_argnums", batch_argnums),
            batch_argnames=_names("batch_argnames", batch_argnames),
            carry_argnum=as_positions("carry_argnum", carry),
            rng_argnums=as_positions("rng_argnums", rng_argnums),
        )

    def bind(
        self, fun: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Call:
        """Takes a call of `fun` apart.

        Raises:
          TypeError: A key that is none.
          ValueError: An argument that the call does not have, or with two roles.
        """
        one = isinstance(self.argnums, int)
        positions = {
            role: from_the_front(role, given, len(args))
            for role, given in {
                "argnums": (self.argnums,) if one else self.argnums,
                "batch_argnums": self.batch_argnums,
                "carry_argnum": self.carry_argnum,
                "rng_argnums": self.rng_argnums,
            }.items()
        }
        names = parameter_names(fun, len(args))
        _check_disjoint(positions, names)
        for name in self.batch_argnames:
            if name not in kwargs:
                raise ValueError(
                    f"`batch_argnames` names the keyword argument {name!r}, but the "
                    f"function was called with {sorted(kwargs) or 'none'}. Pass it by "
                    "keyword, or give its position in `batch_argnums`"
                )
        batch = [args[i] for i in positions["batch_argnums"]]
        batch += [kwargs[name] for name in self.batch_argnames]
        for i in positions["rng_argnums"]:
            _check_keys(names[i], args[i])
        for i in positions["argnums"]:
            _checks.no_module(names[i], args[i])
        argnums = positions["argnums"]
        is_batch = positions["batch_argnums"]
        return Call(
            args=[None if i in is_batch else x for i, x in enumerate(args)],
            kwargs={k: x for k, x in kwargs.items() if k not in self.batch_argnames},
            names=names,
            argnums=argnums[0] if one else argnums,
            batch=jax.tree.map(jnp.asarray, batch),
            places=[*positions["batch_argnums"], *self.batch_argnames],
            carry=next(iter(positions["carry_argnum"]), None),
            keys=positions["rng_argnums"],
        )


def as_positions(role: str, value: Any) -> tuple[int, ...]:
    """One position or several, as a tuple of ints."""
    try:
        if isinstance(value, Iterable):
            return tuple(operator.index(i) for i in value)
        return (operator.index(value),)
    except TypeError:
        raise TypeError(
            f"`{role}` must be an int or several ints, positions of arguments; got "
            f"{value!r}"
        ) from None


def _names(role: str, value: Any) -> tuple[str, ...]:
    names = (value,) if isinstance(value, str) else value
    if isinstance(names, Iterable):
        names = tuple(names)
        if all(isinstance(name, str) for name in names):
            return names
    raise TypeError(
        f"`{role}` must be a name or several names of keyword arguments; got {value!r}"
    )


def from_the_front(role: str, given: Any, count: int) -> tuple[int, ...]:
    """Positions of which the negative ones were counted from the end."""
    for i in given:
        if not -count <= i < count:
            hint = ""
            if role == "batch_argnums":
                hint = (
                    "; for a batch that is passed by keyword use "
                    "`batch_argnums=()` and `batch_argnames`"
                )
            raise ValueError(
                f"`{role}` names the positional argument {i}, but the function was "
                f"called with {count}{hint}"
            )
    return tuple(i % count for i in given)


def parameter_names(fun: Callable[..., Any], count: int) -> list[str]:
    """What `fun` calls its positional arguments, or ``args[i]``."""
    positional = (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
    )
    try:
        parameters = list(inspect.signature(fun).parameters.values())
    except (TypeError, ValueError):  # Not everything that is callable tells.
        parameters = []
    names = [p.name for p in parameters if p.kind in positional][:count]
    return names + [f"args[{i}]" for i in range(len(names), count)]


def _check_disjoint(positions: dict[str, tuple[int, ...]], names: list[str]) -> None:
    """Raises where one argument has two roles, or one role twice."""
    seen: dict[int, str] = {}
    for role, given in positions.items():
        for i in given:
            if i in seen:
                who = f"`{seen[i]}` and `{role}` both name"
                if seen[i] == role:
                    who = f"`{role}` twice names"
                raise ValueError(
                    f"{who} argument {i}, `{names[i]}`; an argument has one role"
                )
            seen[i] = role


def is_key(leaf: Any) -> bool:
    """Whether `leaf` is one random key, typed, or looks like one of the raw kind."""
    if not hasattr(leaf, "dtype"):
        return False
    dtype, shape = _window.dtype_of(leaf), jnp.shape(leaf)
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return shape == ()
    if dtype != jnp.uint32:
        return False
    raw = jax.eval_shape(jax.random.PRNGKey, 0)
    return (shape, dtype) == (raw.shape, raw.dtype)


def _check_keys(name: str, keys: Any) -> None:
    """Raises unless every leaf is one random key, typed or raw."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(keys):
        if not is_key(leaf):
            raise TypeError(
                f"{_checks.named(name, path)} is in `rng_argnums` and must be "
                "one random key, from jax.random.key or jax.random.PRNGKey; got shape "
                f"{jnp.shape(leaf)} and dtype {_window.dtype_of(leaf)}"
            )
