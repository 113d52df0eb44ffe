"""Traced functions: where their outputs come from, and what is inside of them.

After `nnx.remat` or `jax.jit` a value that was not written to is a new tracer. Only the
traced program shows that it is still the same.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.extend import core

# The primitives that only call another function.
_CALLS = (
    "jit",
    "pjit",
    "closed_call",
    "remat",
    "remat2",
    "checkpoint",
    "custom_jvp_call",
    "custom_vjp_call",
)

# Those whose outputs have the values of their inputs.
_IDENTITIES = ("copy", "name", "optimization_barrier", "pvary", "stop_gradient")

# Those whose functions have refs that are seen nowhere else.
_WITH_OWN_REFS = ("run_state", "pallas_call")


class Source(NamedTuple):
    """Where one output comes from.

    Attributes:
      same: The position of the input that it is, unchanged, or ``None``.
      needs: The positions of all inputs on which it may depend.
    """

    same: int | None
    needs: frozenset[int]


_CONSTANT = Source(None, frozenset())


def sources(jaxpr: Any, inputs: list[Source] | None = None) -> list[Source]:
    """For each output of `jaxpr`, its `Source` among the inputs.

    What `jaxpr` closes over is constant. An operation that is not known is taken to
    make something new of all its operands.

    Args:
      jaxpr: A traced function.
      inputs: The sources of its inputs in a function around it, to look for those.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    if inputs is None:
        inputs = _inputs(len(jaxpr.invars))
    known = dict(zip(jaxpr.invars, inputs, strict=True))

    def source(atom: Any) -> Source:
        is_literal = hasattr(atom, "val")
        return _CONSTANT if is_literal else known.get(atom, _CONSTANT)

    for equation in jaxpr.eqns:
        made = _made(equation, [source(v) for v in equation.invars])
        known.update(zip(equation.outvars, made, strict=True))
    return [source(v) for v in jaxpr.outvars]


def of_call(function: Any, *args: Any) -> list[Source]:
    """For each leaf of what a `jax.jit` returns, its `Source` among those of `args`."""
    jaxpr = function.trace(*args).jaxpr.jaxpr
    inputs = _inputs(len(jax.tree.leaves(args)))
    # Tracers that it closes over may come first.
    closed_over = [_CONSTANT] * (len(jaxpr.invars) - len(inputs))
    return sources(jaxpr, [*closed_over, *inputs])


def called(equation: Any) -> Any:
    """The function that `equation` merely calls, such as a `jax.jit`, or ``None``."""
    if equation.primitive.name not in _CALLS:
        return None
    inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
    inner = getattr(inner, "jaxpr", inner)
    takes_all = inner is not None and len(inner.invars) == len(equation.invars)
    return inner if takes_all else None


def with_inner(jaxpr: Any) -> Iterator[Any]:
    """`jaxpr`, and those of all functions that are called anywhere in it."""
    yield jaxpr
    for equation in jaxpr.eqns:
        for function in functions_in(equation):
            yield from with_inner(function)


def functions_in(equation: Any) -> Iterator[Any]:
    """The functions that `equation` calls."""
    for parameter in jax.tree.leaves(
        list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
    ):
        function = getattr(parameter, "jaxpr", parameter)
        if isinstance(function, core.Jaxpr):
            yield function


def equations_in(jaxpr: Any) -> Iterator[Any]:
    """Those of `jaxpr`, and of all functions that are called anywhere in it."""
    for part in with_inner(jaxpr):
        yield from part.eqns


def dtypes_in(jaxpr: Any) -> set[Any]:
    """The dtypes of all that is computed in `jaxpr`, inner functions included."""
    return {
        variable.aval.dtype
        for equation in equations_in(jaxpr)
        for variable in equation.outvars
        if hasattr(variable.aval, "dtype")
    }


def has_own_rules(jaxpr: Any) -> bool:
    """Whether anything in `jaxpr` has a reverse mode of its own."""
    return any(e.primitive.name == "custom_vjp_call" for e in equations_in(jaxpr))


def has_refs(jaxpr: Any) -> bool:
    """Whether `jaxpr` takes, makes or calls anything with a `jax.Ref`.

    Those that stay inside of one operation, as in a Pallas kernel, do not count.
    """
    variables = [
        *jaxpr.invars,
        *jaxpr.constvars,
        *(variable for equation in jaxpr.eqns for variable in equation.outvars),
    ]
    if any(hasattr(variable.aval, "inner_aval") for variable in variables):
        return True
    return any(
        has_refs(function)
        for equation in jaxpr.eqns
        if equation.primitive.name not in _WITH_OWN_REFS
        for function in functions_in(equation)
    )


def _inputs(count: int) -> list[Source]:
    """The sources of so many inputs: each is itself."""
    return [Source(i, frozenset([i])) for i in range(count)]


def _made(equation: Any, given: list[Source]) -> list[Source]:
    """The sources of an equation's results, from those of its operands."""
    function = called(equation)
    if function is not None:
        return sources(function, given)
    name = equation.primitive.name
    if name in _IDENTITIES:
        return given
    if name in _RULES:
        return _RULES[name](equation, given)
    return [_made_of(given)] * len(equation.outvars)


def _made_of(given: list[Source]) -> Source:
    """Something new of all that is `given`."""
    return Source(None, frozenset().union(*(source.needs for source in given)))


def _one_of(cases: list[Source], choice: Source) -> Source:
    """One of the `cases`: if all are the same input, that input."""
    if cases[0].same is not None and all(c.same == cases[0].same for c in cases):
        return cases[0]
    return _made_of([*cases, choice])


def _through(inner: list[Source], given: list[Source]) -> list[Source]:
    """What a function with the sources `inner` makes of `given`."""
    return [
        _made_of([given[i] for i in source.needs])
        if source.same is None
        else given[source.same]
        for source in inner
    ]


def _select(equation: Any, given: list[Source]) -> list[Source]:
    del equation
    return [_one_of(given[1:], given[0])]


def _cond(equation: Any, given: list[Source]) -> list[Source]:
    branches = [sources(branch, given[1:]) for branch in equation.params["branches"]]
    return [_one_of(list(each), given[0]) for each in zip(*branches, strict=True)]


def _scan(equation: Any, given: list[Source]) -> list[Source]:
    body = equation.params["jaxpr"].jaxpr
    # JAX's versions say in different ways how the operands divide. What a loop goes
    # through, and what it stacks, has one axis less inside.
    num_carry = _count_as_they_are(equation.outvars, body.outvars)
    num_before = _count_as_they_are(equation.invars, body.invars)
    return _looped(sources(body), given, num_before - num_carry, num_carry)


def _count_as_they_are(outside: list[Any], inside: list[Any]) -> int:
    """How many variables of a loop have the same rank in its body."""
    pairs = zip(outside, inside, strict=True)
    return sum(len(x.aval.shape) == len(y.aval.shape) for x, y in pairs)


def _looped(
    body: list[Source], given: list[Source], num_consts: int, num_carry: int
) -> list[Source]:
    """What a loop makes of its constants, its first carry, and what it goes through.

    A carry that each iteration returns as it came is the first one. An output that is
    one of the arrays that the loop goes through, entry by entry, is that array.
    """
    end = num_consts + num_carry
    given = list(given)
    while True:
        after = _through(body, given)
        carry = [
            old if source.same == i else _made_of([old, new])
            for i, (old, new, source) in enumerate(
                zip(given[num_consts:end], after, body[:num_carry], strict=False),
                num_consts,
            )
        ]
        if carry == given[num_consts:end]:
            break
        given[num_consts:end] = carry
    outputs = [
        new if source.same is None or source.same >= end else _made_of([new])
        for new, source in zip(after[num_carry:], body[num_carry:], strict=True)
    ]
    return [*carry, *outputs]


def _while(equation: Any, given: list[Source]) -> list[Source]:
    params = equation.params
    cut, end = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    body = sources(params["body_jaxpr"])
    carry = _looped(body, given[cut:], end - cut, len(given) - end)
    (goes_on,) = sources(params["cond_jaxpr"], [*given[:cut], *carry])
    return [
        source if source.same is not None else _made_of([source, goes_on])
        for source in carry
    ]


def _shard_map(equation: Any, given: list[Source]) -> list[Source]:
    places = equation.params["in_specs"]
    inner = sources(equation.params["jaxpr"])
    moved = [
        source.same is not None and places[source.same] != place
        for source, place in zip(inner, equation.params["out_specs"], strict=True)
    ]
    return [
        _made_of([source]) if is_moved else source
        for source, is_moved in zip(_through(inner, given), moved, strict=True)
    ]


_RULES = {
    "select_n": _select,
    "cond": _cond,
    "scan": _scan,
    "while": _while,
    "shard_map": _shard_map,
}
