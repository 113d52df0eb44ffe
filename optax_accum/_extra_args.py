"""The keyword arguments that go past `accumulate` to the inner optimizer."""

import difflib
import dis
import functools
import inspect
import types
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import optax

from optax_accum._closures import cells_of, globals_of
from optax_accum._types import Grads, Kwargs

OWN = ("weight", "boundary", "value")
SYNONYMS = {"loss": ["value"], "batch_size": ["weight"], "num_tokens": ["weight"]}

# Stands among names for all that cannot be found out.
_ANYTHING = "**"


def check_names(given: Kwargs, taken: frozenset[str], *, is_chained: bool) -> None:
    """Raises for what is neither an argument of `accumulate` nor of the optimizer.

    Args:
      given: The extra arguments.
      taken: What the inner optimizer takes, from `names_taken`.
      is_chained: Whether the call came through an `optax.chain`, say, which hands
        all arguments to all its parts. Then only what looks like a typo is refused, as
        if the optimizer may take anything.
    """
    if given.keys() <= taken:
        return
    # A line search hands the rest to the function in which it searches.
    taken = taken | frozenset(_names(x for x in given.values() if callable(x)))
    only_slips = is_chained or _ANYTHING in taken
    for name in given.keys() - taken:
        near = difflib.get_close_matches(name, (*OWN, *sorted(taken)), n=1, cutoff=0.8)
        if only_slips and not (near and near[0] in OWN):
            continue
        near = near or SYNONYMS.get(name, [])
        advice = (
            f"Did you mean `{near[0]}`?"
            if near
            else "Leave it out, or make the inner optimizer an "
            "optax.GradientTransformationExtraArgs that names it"
        )
        raise TypeError(
            f"`{name}` is not an argument of `accumulate`'s update, which takes "
            f"`weight`, `boundary` and `value`, nor of the inner optimizer. {advice}"
        )


def check_grad(grad: Grads, grads: Grads) -> None:
    """Raises unless the extra argument `grad` is the gradient that is accumulated."""
    pairs = zip(*map(jax.tree.leaves, (grad, grads)), strict=False)
    sizes = {len(jax.tree.leaves(tree)) for tree in (grad, grads)}
    if len(sizes) > 1 or not all(x is y for x, y in pairs):
        raise ValueError(
            "`grad` must be the same object as `grads`: update(grads, state, params, "
            "grad=grads); got other arrays. The inner optimizer gets the window's "
            "gradient in its place. If a transformation before `accumulate` changes "
            "the gradient, put it inside: oa.accumulate(optax.chain(...)). Pass it "
            "only once to a function under jax.jit, where two arguments are two arrays"
        )


def names_taken(inner: optax.GradientTransformation) -> frozenset[str]:
    """The keyword arguments that `inner.update`, or what it leads to, may take."""
    if not isinstance(inner, optax.GradientTransformationExtraArgs):
        return frozenset()
    return frozenset(_names([inner.update]))


def _names(start: Iterable[Any]) -> Iterator[str]:
    """The names of parameters, and the strings, in all functions that lead from here.

    One that takes what it needs out of ``extra_args`` holds the name as a string.
    `_ANYTHING` is among the names if a function that is not Optax's reads its
    ``**kwargs``, because what it calls may be anywhere, and if a factory makes the
    optimizer at every update, as in `optax.inject_hyperparams`.
    """
    for node in reached(start):
        if inspect.isfunction(node):
            yield from _names_in(node.__code__)
            if _reads_its_kwargs(node) or "inner_factory" in node.__code__.co_freevars:
                yield _ANYTHING


def reached(start: Iterable[Any]) -> Iterator[Any]:
    """All functions that lead from here, and the objects whose methods they are.

    A transformation around others hands on what it is given; the others are in its
    closure.
    """
    seen: set[int] = set()
    ahead = list(start)
    while ahead:
        node = ahead.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        yield node
        if isinstance(node, functools.partial):
            ahead += [node.func, *node.args, *node.keywords.values()]
        elif inspect.ismethod(node):
            ahead += [node.__func__, node.__self__]
        elif inspect.isfunction(node):
            ahead += [*cells_of(node).values(), *(node.__defaults__ or ())]
            ahead += [f for f in globals_of(node).values() if _is_beside(f, node)]
        elif isinstance(node, dict):
            ahead += node.values()
        elif isinstance(node, tuple | list):
            ahead += node
        elif callable(node) and not isinstance(node, type):
            ahead += [*getattr(node, "__dict__", {}).values(), type(node).__call__]


def _names_in(code: types.CodeType) -> Iterator[str]:
    yield from code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    for constant in code.co_consts:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, types.CodeType):
            yield from _names_in(constant)


def _reads_its_kwargs(f: types.FunctionType) -> bool:
    """Whether `f` is not Optax's nor ours, and does anything with its ``**kwargs``."""
    code = f.__code__
    package = (f.__module__ or "").partition(".")[0]  # Of what `exec` makes: None.
    is_known = package in ("optax", __name__.partition(".")[0])
    if is_known or not code.co_flags & inspect.CO_VARKEYWORDS:
        return False
    names = code.co_varnames[code.co_argcount + code.co_kwonlyargcount :]
    kwargs = names[bool(code.co_flags & inspect.CO_VARARGS)]
    return any(
        "LOAD" in i.opname
        and kwargs in (i.argval if isinstance(i.argval, tuple) else (i.argval,))
        for i in dis.get_instructions(code)
    )


def _is_beside(f: Any, other: Any) -> bool:
    """Whether `f` is a function of the module of `other`."""
    return inspect.isfunction(f) and f.__module__ == other.__module__
