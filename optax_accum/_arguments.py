"""Which argument of a function is what: a batch, a carry, a key, or none of these."""

import inspect
import operator
import sys
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_accum import _tree, _validate
from optax_accum._types import (
    Args,
    Batch,
    BatchAxis,
    Function,
    Kwargs,
    Leaf,
    Params,
    Scalar,
    Tree,
)

Place = int | str  # a position or a keyword


class BatchArgument(NamedTuple):
    """How a batch argument is taken apart into its leaves.

    Attributes:
      place: Its position or name.
      structure: That of its tree.
      leaf_names: What to call each leaf in a message.
      axes: The axis of the examples in each leaf, or ``None`` if it is not split.
    """

    place: Place
    structure: Any
    leaf_names: list[str]
    axes: list[int | None]


class Call(NamedTuple):
    """One call's arguments, taken apart by their roles.

    Parameters that have a position are among `args`, however they were passed. In the
    place of a batch argument stands the list of its leaves, with ``None`` for those
    that are split.

    Attributes:
      args: The arguments with a position.
      kwargs: All others.
      names: The name of each of `args`.
      num_positional: How many of `args` were passed by position.
      argnums: What to differentiate with respect to, counted from the front.
      batch: The leaves that are split, of all batch arguments.
      batch_arguments: How to build these arguments from them.
      carry_place: The position of the carried argument, or ``None``.
      key_places: The positions or names of the arguments named as random keys.
    """

    args: list[Any]
    kwargs: Kwargs
    names: list[str]
    num_positional: int
    argnums: int | tuple[int, ...]
    batch: Batch
    batch_arguments: list[BatchArgument]
    carry_place: int | None
    key_places: list[Place]

    @property
    def places(self) -> list[Place]:
        """Where the batch arguments stand."""
        return [argument.place for argument in self.batch_arguments]

    @property
    def rest(self) -> list[Place]:
        """Where the arguments stand that have no role."""
        taken = {*jax.tree.leaves(self.argnums), self.carry_place}
        taken |= {*self.places, *self.key_places}
        return [place for place in self.by_place() if place not in taken]

    @property
    def axes(self) -> list[int | None]:
        """The axis of the examples, or ``None``, of every leaf of a batch argument."""
        return [axis for argument in self.batch_arguments for axis in argument.axes]

    @property
    def axis(self) -> int:
        """The axis of the examples, or 0 if it is not the same in all leaves."""
        axes = {axis for axis in self.axes if axis is not None}
        return axes.pop() if len(axes) == 1 else 0

    @property
    def batch_names(self) -> list[str]:
        """What to call each leaf of `batch` in a message."""
        return [
            name
            for argument in self.batch_arguments
            for name, axis in zip(argument.leaf_names, argument.axes, strict=True)
            if axis is not None
        ]

    @property
    def carry(self) -> Tree:
        """The carried argument, or ``None``."""
        return None if self.carry_place is None else self.args[self.carry_place]

    @property
    def carry_name(self) -> str | None:
        """Its name, if there is one."""
        return None if self.carry_place is None else self.names[self.carry_place]

    @property
    def differentiated(self) -> Params:
        """What is differentiated of the arguments in `argnums`: one, or a tuple."""
        return jax.tree.map(lambda i: _tree.differentiated(self.args[i]), self.argnums)

    def name_of(self, place: Place) -> str:
        """The name of the argument there."""
        return _name(place, self.names)

    def by_place(self) -> dict[Place, Any]:
        """All arguments."""
        return dict([*enumerate(self.args), *self.kwargs.items()])

    def named(self) -> list[tuple[str, Any]]:
        """All that reaches every micro-batch whole, with its name."""
        values = self.by_place()
        whole: list[tuple[str, Any]] = []
        for argument in self.batch_arguments:
            leaves = values.pop(argument.place)
            whole += zip(argument.leaf_names, leaves, strict=True)
        return [(self.name_of(place), x) for place, x in values.items()] + whole

    def build_batch(self, part: Batch) -> list[tuple[Place, Tree]]:
        """Place and value of each batch argument, with `part` for what is split."""
        values, parts = self.by_place(), iter(part)
        built = []
        for place, structure, _, axes in self.batch_arguments:
            pairs = zip(values[place], axes, strict=True)
            leaves = [x if axis is None else next(parts) for x, axis in pairs]
            built.append((place, jax.tree.unflatten(structure, leaves)))
        return built

    def for_microbatch(
        self, part: Batch, carry: Tree, number: Scalar
    ) -> tuple[list[Any], Kwargs]:
        """The arguments with which the micro-batch with this `number` is run."""
        values = self.by_place() | dict(self.build_batch(part))
        if self.carry_place is not None:
            values[self.carry_place] = carry
        for place in self.key_places:
            values[place] = jax.tree.map(
                lambda key: fold_in(key, number), values[place]
            )
        for place in self.rest:
            values[place] = jax.tree.map(
                lambda x: fold_in(x, number) if is_typed_key(x) else x, values[place]
            )
        args = [values[i] for i in range(len(self.args))]
        return args, {name: values[name] for name in self.kwargs}

    def with_carry(self, name: str, carry: Tree) -> "Call":
        """With one argument more, `carry`, that is passed by `name`."""
        args, names = [*self.args, carry], [*self.names, name]
        return self._replace(args=args, names=names, carry_place=len(self.args))

    def apply(self, function: Function, args: Args, kwargs: Kwargs) -> Any:
        """`function` of these arguments, passed as the call passed them."""
        by_name = dict(zip(self.names, args, strict=True))
        for name in self.names[: self.num_positional]:
            del by_name[name]
        return function(*args[: self.num_positional], **by_name, **kwargs)

    def shown_axes(self, axes: list[int | None]) -> str:
        """The `batch_axis` that gives the leaves of the batch arguments these axes."""
        if len(set(axes)) == 1:
            return f"batch_axis={axes[0]}"
        rest, entries = iter(axes), []
        for argument in self.batch_arguments:
            own = [next(rest) for _ in argument.axes]
            is_tree = len(set(own)) != 1
            entries.append(
                jax.tree.unflatten(argument.structure, own) if is_tree else own[0]
            )
        return f"batch_axis={tuple(entries)!r}"


class Roles(NamedTuple):
    """The roles that `value_and_grad` was told, to be found in each call."""

    argnums: int | tuple[int, ...]
    batch_argnums: tuple[int, ...]
    batch_argnames: tuple[str, ...]
    batch_axis: BatchAxis
    carry_argnum: int | None
    rng_argnums: tuple[int, ...]
    rng_argnames: tuple[str, ...]

    @classmethod
    def of(
        cls,
        argnums: int | Sequence[int],
        batch_argnums: int | Sequence[int],
        batch_argnames: str | Sequence[str],
        batch_axis: BatchAxis,
        carry_argnum: int | None,
        rng_argnums: int | Sequence[int],
        rng_argnames: str | Sequence[str],
    ) -> "Roles":
        """Checks their types.

        Raises:
          TypeError: A position or an axis that is not an int, or a name that is not a
            str.
          ValueError: A `batch_axis` with more or fewer entries than batch arguments.
        """
        several = as_positions("argnums", argnums)
        if carry_argnum is not None:
            (carry_argnum,) = as_positions("carry_argnum", [carry_argnum])
        batch_argnums = as_positions("batch_argnums", batch_argnums)
        batch_argnames = as_names(batch_argnames)
        return cls(
            argnums=several if isinstance(argnums, Iterable) else several[0],
            batch_argnums=batch_argnums,
            batch_argnames=batch_argnames,
            batch_axis=_check_axis(batch_axis, batch_argnums, batch_argnames),
            carry_argnum=carry_argnum,
            rng_argnums=as_positions("rng_argnums", rng_argnums),
            rng_argnames=as_names(rng_argnames),
        )

    def bind(self, fun: Function, args: Args, kwargs: Kwargs) -> Call:
        """Takes a call of `fun` apart.

        Raises:
          TypeError: What is named as a key and is not one; an NNX module.
          ValueError: An argument that the call does not have, or with two roles.
        """
        in_place, others, names = _bind_positions(fun, args, kwargs)
        several = (self.argnums,) if isinstance(self.argnums, int) else self.argnums
        carried = () if self.carry_argnum is None else (self.carry_argnum,)
        positions = {
            role: from_the_front(role, given, len(in_place), len(args))
            for role, given in {
                "argnums": several,
                "batch_argnums": self.batch_argnums,
                "carry_argnum": carried,
                "rng_argnums": self.rng_argnums,
            }.items()
        }
        places = self._batch_places(positions["batch_argnums"], names, others)
        named_keys = [
            _place_of("rng_argnames", name, names, others) for name in self.rng_argnames
        ]
        roles = {**positions, "batch_argnums": places, "rng_argnames": named_keys}
        _check_disjoint(roles, names)
        argnums = positions["argnums"]
        key_places = [*positions["rng_argnums"], *named_keys]
        for i in argnums:
            check_no_nnx_module(names[i], in_place[i], "value_and_grad")
        values = dict[Place, Any]([*enumerate(in_place), *others.items()])
        for place in key_places:
            _check_keys(_name(place, names), values[place])
        values = {place: _with_jax_keys(value) for place, value in values.items()}
        axes = self.batch_axis
        entries = (axes,) * len(places) if isinstance(axes, int) else axes
        batch, batch_arguments = [], []
        for place, entry in zip(places, entries, strict=True):
            name = _name(place, names)
            argument, leaves = _take_apart(place, name, values[place], entry)
            pairs = list(zip(leaves, argument.axes, strict=True))
            batch += [jnp.asarray(x) for x, axis in pairs if axis is not None]
            values[place] = [x if axis is None else None for x, axis in pairs]
            batch_arguments.append(argument)
        return Call(
            args=[values[i] for i in range(len(in_place))],
            kwargs={name: values[name] for name in others},
            names=names,
            num_positional=len(args),
            argnums=argnums[0] if isinstance(self.argnums, int) else argnums,
            batch=batch,
            batch_arguments=batch_arguments,
            carry_place=next(iter(positions["carry_argnum"]), None),
            key_places=key_places,
        )

    def _batch_places(
        self, positions: tuple[int, ...], names: list[str], others: Kwargs
    ) -> list[Place]:
        """Where the batch arguments stand, first those that are named by position."""
        places: list[Place] = [*positions]
        for name in self.batch_argnames:
            place = _place_of("batch_argnames", name, names, others)
            if place not in positions:
                places.append(place)
            elif not isinstance(self.batch_axis, int):
                raise ValueError(
                    f"`batch_argnums` and `batch_argnames` both name `{name}`, so it "
                    f"has two entries in `batch_axis={self.batch_axis!r}`. Name it "
                    "once; for names alone pass batch_argnums=()"
                )
            # Otherwise naming the default position as well is not a mistake.
        return places


def _bind_positions(
    fun: Function, args: Args, kwargs: Kwargs
) -> tuple[list[Any], Kwargs, list[str]]:
    """``(args, kwargs, names)`` with all parameters in place that have a position.

    What was passed by name moves to its position, so a role finds it either way.
    """
    kinds = inspect.Parameter
    try:
        signature = inspect.signature(fun)
        bound = signature.bind(*args, **kwargs)
        known = [
            p.name
            for p in signature.parameters.values()
            if p.kind in (kinds.POSITIONAL_ONLY, kinds.POSITIONAL_OR_KEYWORD)
        ]
    except (TypeError, ValueError):
        # Some callables have no signature, and a wrong call is `fun`'s to refuse.
        known, in_place, others = [], list(args), dict(kwargs)
    else:
        in_place, others = list(bound.args), dict(bound.kwargs)
    names = known[: len(in_place)]
    names += [f"args[{i}]" for i in range(len(names), len(in_place))]
    return in_place, others, names


def takes_more(function: Function, fun: Function, name: str) -> bool:
    """Whether `function` has a parameter called `name`, and `fun` has not."""
    try:
        own, others = (inspect.signature(f).parameters for f in (function, fun))
    except (TypeError, ValueError):  # Some have no signature.
        return False
    return name in own and name not in others


def as_positions(role: str, value: Any) -> tuple[int, ...]:
    """One position or several, as a tuple of ints."""
    try:
        if isinstance(value, Iterable):
            return tuple(operator.index(i) for i in value)
        return (operator.index(value),)
    except TypeError:
        got, names, hint = repr(value), role.replace("nums", "names"), ""
        if names.endswith("_argnames"):
            hint = f". Pass names in `{names}`"
        if any(isinstance(x, jax.Array) for x in jax.tree.leaves(value)):
            got = _validate.shown_kind(value)
            hint = (
                ". The arguments of `fun` go to what is returned: f(fun)(params, batch)"
            )
        raise TypeError(
            f"`{role}` must be an int or several ints, positions of arguments; got "
            f"{got}{hint}"
        ) from None


def as_names(value: str | Sequence[str]) -> tuple[str, ...]:
    """One name or several, as a tuple."""
    return (value,) if isinstance(value, str) else tuple(value)


def _check_axis(value: Any, argnums: Sequence[int], argnames: Sequence[str]) -> Any:
    """An int, or a tuple of an entry for each batch argument."""
    axis = _validate.as_int(value)
    if axis is not None:
        return axis
    if not isinstance(value, tuple | list):
        raise TypeError(
            "`batch_axis` must be an int, or a tuple with one entry per batch "
            "argument: an int, None if the argument is not split, or a tree of these "
            f"that is a prefix of it; got {value!r}. For one argument that is a dict: "
            "batch_axis=({...},)"
        )
    for leaf in jax.tree.leaves(value):
        if _validate.as_int(leaf) is None:
            raise TypeError(
                f"`batch_axis` must hold ints, or None for parts not to split; got "
                f"{leaf!r} in {value!r}"
            )
    if len(value) != len(argnums) + len(argnames):
        raise ValueError(
            f"`batch_axis={value!r}` has {len(value)} entries, and needs one per batch "
            f"argument, first those of `batch_argnums={tuple(argnums)}`, then those of "
            f"`batch_argnames={tuple(argnames)}`. The axes of a tree are one entry: "
            "batch_axis=((0, 1),) for one argument that is a pair"
        )
    if not jax.tree.leaves(value):
        raise ValueError(
            f"`batch_axis={value!r}` leaves nothing to split. Give the axis of the "
            "examples for at least one array"
        )
    return tuple(value)


def _take_apart(
    place: Place, name: str, value: Tree, entry: Tree
) -> tuple[BatchArgument, list[Any]]:
    """A batch argument whose entry in `batch_axis` is `entry`, and its leaves."""
    pairs, structure = jax.tree_util.tree_flatten_with_path(value)
    axes: list[int | None] = []

    def extend(axis: int | None, part: Tree) -> None:
        axes.extend([axis] * len(jax.tree.leaves(part)))

    try:
        jax.tree.map(extend, entry, value, is_leaf=lambda x: x is None)
    except ValueError as error:
        raise ValueError(
            f"`batch_axis` has {entry!r} for `{name}`, which is not a prefix of it: it "
            f"is a {structure}"
        ) from error
    leaf_names = [name + jax.tree_util.keystr(path) for path, _ in pairs]
    leaves = [leaf for _, leaf in pairs]
    return BatchArgument(place, structure, leaf_names, axes), leaves


def from_the_front(
    role: str, given: Iterable[int], count: int, num_positional: int
) -> tuple[int, ...]:
    """Positions of which the negative ones were counted from the end.

    Args:
      role: What to call them in a message.
      given: The positions.
      count: How many arguments have a position.
      num_positional: How many of them were passed by position.
    """
    found = []
    for i in given:
        position = i + num_positional if i < 0 else i
        if not 0 <= position < count:
            hint = ""
            if role == "batch_argnums":
                hint = (
                    ". A batch that `fun` closes over cannot be split: make it an "
                    "argument, f(params, x, y) with batch_argnums=(1, 2). If `fun` "
                    "takes the batch alone, pass batch_argnums=0; if the batch is "
                    "passed by keyword, batch_argnums=() and `batch_argnames`"
                )
            arguments = "1 argument" if count == 1 else f"{count} arguments"
            raise ValueError(
                f"`{role}` names the positional argument {i}, but the function was "
                f"called with {arguments}{hint}"
            )
        found.append(position)
    return tuple(found)


def _name(place: Place, names: list[str]) -> str:
    """What the argument there is called."""
    return place if isinstance(place, str) else names[place]


def _place_of(role: str, name: str, names: list[str], kwargs: Kwargs) -> Place:
    """Where the argument called `name` stands."""
    if name in kwargs:
        return name
    if name in names:
        return names.index(name)
    raise ValueError(
        f"`{role}` names the argument {name!r}, but the function was called "
        f"with {', '.join([*names, *kwargs])}. Give its name in the signature of "
        f"`fun`, or its position in `{role.removesuffix('names')}nums`"
    )


def _check_disjoint(places: dict[str, Sequence[Any]], names: list[str]) -> None:
    """Raises where one argument has two roles, or one role twice."""
    seen: dict[Place, str] = {}
    for role, given in places.items():
        for i in given:
            if i in seen:
                who = f"`{seen[i]}` and `{role}` both name"
                if seen[i] == role:
                    who = f"`{role}` twice names"
                raise ValueError(
                    f"{who} {_shown_place(i, names)}; an argument has one role"
                )
            seen[i] = role


def _shown_place(place: Place, names: list[str]) -> str:
    if isinstance(place, str):
        return f"the argument `{place}`"
    return f"argument {place}, `{names[place]}`"


def is_key(leaf: Leaf) -> bool:
    """Whether `leaf` holds typed random keys, or looks like one of the raw kind."""
    return is_typed_key(leaf) or is_raw_key(leaf)


def is_typed_key(leaf: Leaf) -> bool:
    """Whether `leaf` is a random key from `jax.random.key`, or an array of them."""
    dtype = getattr(leaf, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def is_raw_key(leaf: Leaf) -> bool:
    """Whether `leaf` looks like one of `jax.random.PRNGKey`, or like several."""
    if not _tree.is_array(leaf) or leaf.dtype != jnp.uint32:
        return False
    shape = _shape_of_raw_key()
    return leaf.shape[-len(shape) :] == shape


def fold_in(key: jax.Array, number: int | Scalar) -> jax.Array:
    """A key, or each of an array of them, folded with `number`."""
    fold: Function = jax.random.fold_in
    own_axes = 0 if is_typed_key(key) else len(_shape_of_raw_key())
    for _ in range(key.ndim - own_axes):
        fold = jax.vmap(fold, (0, None))
    return fold(key, number)


def _shape_of_raw_key() -> tuple[int, ...]:
    """That of the default implementation."""
    return jax.eval_shape(jax.random.PRNGKey, 0).shape


def _with_jax_keys(argument: Tree) -> Tree:
    """`argument` with raw keys of NumPy's as JAX's: they would be constants else."""

    def is_numpys(x: Leaf) -> bool:
        return is_raw_key(x) and not isinstance(x, jax.Array)

    if not any(map(is_numpys, jax.tree.leaves(argument))):
        return argument  # Itself: NNX's modules are not to be copied.
    return jax.tree.map(lambda x: jnp.asarray(x) if is_numpys(x) else x, argument)


def _check_keys(name: str, keys: Tree) -> None:
    """Raises unless every leaf is a random key: typed ones, or a raw one."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(keys):
        if not is_key(leaf):
            raise TypeError(
                f"{_validate.named(name, path)} is in `rng_argnums` or `rng_argnames` "
                "and must be a random key, from jax.random.key or jax.random.PRNGKey; "
                f"got shape {jnp.shape(leaf)} and dtype {_tree.dtype_of(leaf)}"
            )


def check_no_nnx_module(name: str, value: Tree, function: str) -> None:
    """Raises for an NNX module, or random streams, with more than parameters.

    To JAX it is a tree, whose statistics and counts are leaves like its parameters, and
    what is written to it is lost.

    Args:
      name: What the argument is called.
      value: The argument.
      function: The function of `optax_accum.flax` that takes it.
    """
    nnx = sys.modules.get("flax.nnx")  # loaded if there is a module
    if nnx is None:
        return
    for node in jax.tree.leaves(value, is_leaf=lambda x: isinstance(x, nnx.Pytree)):
        if isinstance(node, nnx.Pytree) and nnx.state(node, nnx.Not(nnx.Param)):
            what = "is" if node is value else "holds"
            raise TypeError(
                f"`{name}` {what} an NNX module, a {type(node).__name__}, with "
                f"variables that are not parameters. optax_accum.flax.{function} "
                "takes it as it is; elsewhere split it first, with "
                "nnx.split(model, nnx.Param, ...)"
            )
