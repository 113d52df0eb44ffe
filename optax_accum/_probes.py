"""Why micro-batches differ from the global batch: a few gradients that tell.

Let r be the gradient of the whole batch and gᵢ those of the micro-batches. Of a loss
that is a sum over examples, divided by whatever does not depend on the parameters, r
is a combination Σ cᵢ·gᵢ, and the numbers cᵢ are the same at all parameters. They are
fitted at some parameters and tried at others:

* cᵢ as they were used, times one factor: the reduction is another one;
* other cᵢ >= 0: a mean of unequal means, and these are the weights that it lacks;
* none that fit: the examples depend on each other.

What randomness and hidden state do is asked before, by running the same again.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize

from optax_accum import _arguments, _microbatch, _split, _window

_SAMPLES = 16384  # entries of one leaf that the fit looks at
_PARTS_ONLY = ("microbatch_size", "skip", "axis_name", "mesh", "scatter")
_REPORTS = ("return_info", "noise_scale")


class Cause(NamedTuple):
    """What a probe suggests.

    Attributes:
      name: In a word.
      message: What was seen, and what to do.
    """

    name: str
    message: str


class Result(NamedTuple):
    """One gradient, on the host."""

    value: float
    grads: Any
    skipped: int

    def sample(self) -> np.ndarray:
        """Entries of the gradient, and the value, as one vector."""
        return np.append(_sample(self.grads), np.float64(self.value))


@dataclasses.dataclass(frozen=True)
class Problem:
    """A loss with its arguments and the options of `value_and_grad`."""

    fun: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    options: dict[str, Any]  # all of them
    roles: _arguments.Roles
    call: _arguments.Call
    split: _split.Split

    @classmethod
    def of(
        cls,
        fun: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        options: dict[str, Any],
    ) -> "Problem":
        """Checks them as `value_and_grad` does.

        Raises:
          TypeError: As `value_and_grad`.
          ValueError: As `value_and_grad`.
        """
        options = {k: v for k, v in options.items() if k not in _REPORTS}
        _microbatch.value_and_grad(fun, **options)
        roles = _arguments.Roles.of(
            options.get("argnums", 0),
            options.get("batch_argnums", 1),
            options.get("batch_argnames", ()),
            options.get("carry_argnum"),
            options.get("rng_argnums", ()),
        )
        call = roles.bind(fun, args, kwargs)
        split = _split.plan(
            call.batch,
            call.batch_names(),
            options.get("batch_axis", 0),
            options.get("num_microbatches"),
            options.get("microbatch_size"),
        )
        return cls(fun, args, kwargs, options, roles, call, split)

    @property
    def num_microbatches(self) -> int:
        """K, a smaller last micro-batch counted."""
        return self.split.whole + bool(self.split.tail)

    @property
    def reduction(self) -> str:
        """As given, or its default."""
        return self.options.get("reduction", "mean")

    def in_parts(self) -> Result:
        """As `value_and_grad` computes it with these options."""
        return self._run(self.options)

    def whole(self) -> Result:
        """The whole batch as one micro-batch, on one device, and nothing skipped."""
        return self._run(self._at_once())

    def with_batch(self, batch: list[Any]) -> "Problem":
        """The same on another batch."""
        args, kwargs = list(self.args), dict(self.kwargs)
        for place, argument in zip(self.call.places, batch, strict=True):
            if isinstance(place, str):
                kwargs[place] = argument
            else:
                args[place] = argument
        return dataclasses.replace(
            self,
            args=tuple(args),
            kwargs=kwargs,
            call=self.call._replace(batch=batch),
        )

    def with_argument(self, position: int, argument: Any) -> "Problem":
        """The same with another argument that is no batch."""
        args = list(self.args)
        args[position] = argument
        return dataclasses.replace(self, args=tuple(args))

    def microbatches(self) -> list[list[Any]]:
        """The batch arguments of each micro-batch."""
        indices = jnp.arange(self.split.whole)
        parts = [self.split.take(self.call.batch, i) for i in indices]
        if self.split.tail:
            parts.append(self.split.take_tail(self.call.batch))
        return parts

    def narrowest_dtype(self) -> Any:
        """The narrowest floating dtype that `fun` or its gradient computes in."""
        arrays, function = self._traceable(self._at_once())
        jaxpr = jax.jit(function).trace(arrays).jaxpr.jaxpr
        dtypes = {d for d in _dtypes(jaxpr) if jnp.issubdtype(d, jnp.inexact)}
        return min(dtypes, key=lambda d: -jnp.finfo(d).eps, default=jnp.float32)

    def raw_gradient(self) -> Callable[["Problem"], np.ndarray]:
        """A function for value and gradient of `fun` on a whole batch, as a vector.

        Not divided by anything; a sample of the entries. It is compiled once.
        """
        options = self._at_once() | {"reduction": "sum", "weight": None}
        _, function = self._traceable(options)
        jitted = jax.jit(function)

        def vector(problem: "Problem") -> np.ndarray:
            arrays, _ = problem._traceable(options)
            result, _ = jitted(arrays)
            value, grads = self._unpack(result)
            return np.append(_sample(grads), np.float64(value))

        return vector

    def _at_once(self) -> dict[str, Any]:
        kept = {k: v for k, v in self.options.items() if k not in _PARTS_ONLY}
        return kept | {"num_microbatches": 1}

    def _run(self, options: dict[str, Any]) -> Result:
        function = _microbatch.value_and_grad(self.fun, **options, return_info=True)
        result, info = function(*self.args, **self.kwargs)
        value, grads = jax.device_get(self._unpack(result))
        return Result(float(value), grads, int(info.skipped))

    def _unpack(self, result: Any) -> tuple[Any, Any]:
        """Value and gradient, without what else there is."""
        value, grads = result
        has_extra = self.options.get("has_aux") or self.call.carry is not None
        return (value[0] if has_extra else value), grads

    def _traceable(self, options: dict[str, Any]) -> tuple[list[Any], Callable]:
        """The arrays among the arguments, and the gradient as a function of them."""
        function = _microbatch.value_and_grad(self.fun, **options, return_info=True)
        leaves, structure = jax.tree.flatten((self.args, self.kwargs))
        is_array = [isinstance(x, jax.Array | np.ndarray) for x in leaves]
        arrays = [x for x, array in zip(leaves, is_array, strict=True) if array]

        def of_arrays(arrays):
            given = iter(arrays)
            merged = [
                next(given) if array else x
                for x, array in zip(leaves, is_array, strict=True)
            ]
            args, kwargs = jax.tree.unflatten(structure, merged)
            return function(*args, **kwargs)

        return arrays, of_arrays


# --- The probes ---


def find_causes(
    problem: Problem, whole: Result, parts: Result, tolerance: float
) -> tuple[Cause, ...]:
    """Asks for one reason after the other, the plainest first."""
    probes = (
        _skipped,
        _not_finite,
        _hidden_state,
        _randomness,
        _unsplit_argument,
        _factor,
        _weights,
        _constant_term,
        _dependence,
    )
    for probe in probes:
        causes = probe(problem, whole, parts, tolerance)
        if causes:
            return tuple(causes)
    return (
        Cause(
            "unknown",
            "none of the probes explains the difference. Whether it is rounding shows "
            "in float64, under jax.enable_x64(True)",
        ),
    )


def _skipped(problem: Problem, _: Result, parts: Result, __: float) -> list[Cause]:
    if not parts.skipped:
        return []
    return [
        Cause(
            "skipped",
            f"`skip` rejected {parts.skipped} of {problem.num_microbatches} "
            "micro-batches, and what it rejects is missing in the result. Leave `skip` "
            "out to compare the rest",
        )
    ]


def _not_finite(_: Problem, whole: Result, parts: Result, __: float) -> list[Cause]:
    finite = [
        bool(np.isfinite(_entries(r)).all() and np.isfinite(r.value))
        for r in (whole, parts)
    ]
    if all(finite):
        return []
    if finite[0]:
        return [
            Cause(
                "not finite",
                "micro-batches give a NaN or an infinity, and the global batch does "
                "not. A mean over a mask divides by 0 in a micro-batch that is all "
                "padding: divide by jnp.maximum(count, 1), and pass the count as "
                "`weight`",
            )
        ]
    return [
        Cause(
            "not finite",
            "the gradient of the global batch has a NaN or an infinity in it; mend "
            "that first",
        )
    ]


def _hidden_state(
    problem: Problem, whole: Result, _: Result, tolerance: float
) -> list[Cause]:
    moved = _distance(whole, problem.whole())
    if moved <= tolerance:
        return []
    return [
        Cause(
            "hidden state",
            "the same call twice, on the global batch, gives two results, "
            f"{moved:.1e} apart: `fun` depends on something that is not among its "
            "arguments, such as numpy.random. Pass a random key, and name it in "
            "`rng_argnums`",
        )
    ]


def _randomness(
    problem: Problem, whole: Result, _: Result, tolerance: float
) -> list[Cause]:
    for position, argument in enumerate(problem.args):
        if position in problem.call.places:
            continue
        other = jax.tree.map(
            lambda x: jax.random.fold_in(x, 1) if _arguments.is_key(x) else x, argument
        )
        if not any(map(_arguments.is_key, jax.tree.leaves(argument))):
            continue
        moved = _distance(whole, problem.with_argument(position, other).whole())
        if moved <= tolerance:
            continue
        name = problem.call.names[position]
        found = f"the loss is random: another `{name}` moves it by {moved:.1e}. "
        if position not in problem.call.keys:
            advice = (
                f"And all micro-batches draw the same, because `{name}` is not in "
                f"`rng_argnums`: pass rng_argnums={position}"
            )
        else:
            advice = (
                "Micro-batches draw their own, as they should, and so cannot draw what "
                "the global batch draws; equal they are on average. Check again with "
                "the dropout off: this hides every other cause"
            )
        return [Cause("randomness", found + advice)]
    return []


def _unsplit_argument(
    problem: Problem, whole: Result, _: Result, tolerance: float
) -> list[Cause]:
    """Whether an argument that looks like a batch is one, and was not named."""
    axis = problem.options.get("batch_axis", 0)
    examples = _batch_size(problem)
    special = {*problem.call.places, *problem.call.keys, problem.call.carry}
    special |= set(jax.tree.leaves(problem.call.argnums))
    for position, argument in enumerate(problem.args):
        shapes = [jnp.shape(x) for x in jax.tree.leaves(argument)]
        looks_like_it = shapes and all(
            -len(s) <= axis < len(s) and s[axis] == examples for s in shapes
        )
        if position in special or not looks_like_it:
            continue
        batch_argnums = (*problem.roles.batch_argnums, position)
        options = problem.options | {"batch_argnums": batch_argnums}
        try:
            other = Problem.of(problem.fun, problem.args, problem.kwargs, options)
            mended = _distance(whole, other.in_parts()) <= tolerance
        except (TypeError, ValueError):  # Then it is no batch.
            continue
        if mended:
            name = problem.call.names[position]
            return [
                Cause(
                    "unsplit argument",
                    f"`{name}` has {examples} entries along axis {axis}, as the batch "
                    "has examples, but reaches every micro-batch whole. Split it as "
                    f"well, and the results agree: batch_argnums={batch_argnums}",
                )
            ]
    return []


def _factor(
    problem: Problem, whole: Result, parts: Result, tolerance: float
) -> list[Cause]:
    a, b = _entries(whole), _entries(parts)
    factor = float(a @ b / (a @ a)) if a @ a else 0.0
    if factor == 0 or relative_error(factor * a, b) > tolerance:
        return []
    return [_reduction_cause(problem, factor)]


def _reduction_cause(problem: Problem, factor: float) -> Cause:
    k = problem.num_microbatches
    found = f"the micro-batches' gradient is {factor:.4g} times the global batch's"
    if np.isclose(factor, k, rtol=1e-2):
        advice = (
            f", and there are {k} micro-batches: `fun` is a mean, and "
            f'reduction="{problem.reduction}" adds it up. Use reduction="mean"'
        )
    elif np.isclose(factor, 1 / k, rtol=1e-2):
        advice = (
            f", one over the number of micro-batches: `fun` is a sum, and "
            f'reduction="{problem.reduction}" averages it. Use reduction="sum", or '
            '"ratio" with a `weight` to divide by'
        )
    else:
        advice = (
            ": `fun` or `weight` divides by something else than the weight of a "
            "micro-batch"
        )
    return Cause("factor", found + advice)


def _weights(problem: Problem, _: Result, __: Result, tolerance: float) -> list[Cause]:
    """Whether r is a combination of the gᵢ, at these and at other parameters."""
    gradient = problem.raw_gradient()
    k = problem.num_microbatches
    batches = problem.microbatches()

    def equations(point: Problem) -> tuple[np.ndarray, np.ndarray]:
        columns = [gradient(point.with_batch(batch)) for batch in batches]
        target = gradient(point)
        scale = np.linalg.norm(target) or 1.0
        return np.stack(columns, 1) / scale, target / scale

    fitted = [equations(problem)]
    # Enough equations for k unknowns, were the model ever so small.
    while sum(map(len, (t for _, t in fitted))) < 2 * k:
        fitted.append(equations(_elsewhere(problem, len(fitted))))
    tried = equations(_elsewhere(problem, len(fitted)))
    everything = [*fitted, tried]

    def explains(coefficients: np.ndarray) -> bool:
        return all(
            np.linalg.norm(columns @ coefficients - target) <= tolerance
            for columns, target in everything
        )

    if explains(np.ones(k)):
        return [
            Cause(
                "factor",
                "the global batch's gradient is the sum of the micro-batches': `fun` "
                f'is a sum, and reduction="{problem.reduction}" averages it. Use '
                'reduction="sum", or "ratio" with a `weight` to divide by',
            )
        ]
    coefficients, _ = optimize.nnls(
        np.concatenate([columns for columns, _ in fitted]),
        np.concatenate([target for _, target in fitted]),
    )
    if not explains(coefficients):
        return []
    shares = ", ".join(f"{c:.3g}" for c in coefficients[:8]) + ", ..." * (k > 8)
    given = (
        "what `weight` says is another share"
        if problem.options.get("weight")
        else "without `weight` each counts by its number of examples"
    )
    return [
        Cause(
            "weights",
            "the micro-batches' gradients add up to the global batch's if they are "
            f"weighted by {shares}: `fun` averages over something of which they hold "
            f"different amounts, such as valid tokens, and {given}. Pass `weight=`, a "
            "function that counts it",
        )
    ]


def _constant_term(
    problem: Problem, whole: Result, parts: Result, tolerance: float
) -> list[Cause]:
    """Whether they differ by what does not grow if the batch is taken twice."""
    if problem.reduction == "mean":
        return []
    axis = problem.options.get("batch_axis", 0)
    twice = jax.tree.map(
        lambda x: jnp.concatenate([x, x], axis % x.ndim), problem.call.batch
    )
    gradient = problem.raw_gradient()
    term = 2 * gradient(problem) - gradient(problem.with_batch(twice))
    difference = parts.sample() - whole.sample()
    factor = float(term @ difference / (term @ term)) if term @ term else 0.0
    unexplained = np.linalg.norm(difference - factor * term)
    if factor <= 0 or unexplained > tolerance * np.linalg.norm(whole.sample()):
        return []
    return [
        Cause(
            "constant term",
            "a part of `fun` does not depend on the batch, such as a penalty on the "
            f'weights, and reduction="{problem.reduction}" adds it once per '
            "micro-batch. Leave it out of `fun` and add its gradient to the result",
        )
    ]


def _dependence(
    problem: Problem, _: Result, parts: Result, tolerance: float
) -> list[Cause]:
    axis = problem.options.get("batch_axis", 0)
    order = np.random.default_rng(0).permutation(_batch_size(problem))
    exchanged = jax.tree.map(
        lambda x: jnp.take(x, order, axis % x.ndim), problem.call.batch
    )
    moved = _distance(parts, problem.with_batch(exchanged).in_parts())
    alone = problem.split.size == 1
    if moved <= tolerance and not alone:
        return []
    seen = (
        f"exchanging examples between micro-batches moves the result by {moved:.1e}"
        if moved > tolerance
        else "an example alone gives something else than among others"
    )
    return [
        Cause(
            "dependence",
            f"examples depend on each other: {seen}, and no weights make up for it. "
            "BatchNorm and losses that compare examples see one micro-batch at a time, "
            "and no accumulation makes that the global batch. Larger micro-batches "
            "come nearer; LayerNorm, GroupNorm or fixed statistics have no such bond",
        )
    ]


# --- What they measure with ---


def relative_error(a: Any, b: Any, typical: float = 0.0) -> float:
    """‖a − b‖ over the larger norm, which is taken for at least √n·`typical`."""
    x, y = _wide(a), _wide(b)
    norms = np.linalg.norm(x), np.linalg.norm(y), np.sqrt(x.size) * typical
    difference = float(np.linalg.norm(x - y))
    return 0.0 if difference == 0 else float(difference / max(norms))


def typical_entry(leaves: list[Any]) -> float:
    """The root mean square of all entries."""
    entries = sum(np.size(x) for x in leaves)
    squares = sum(float(np.sum(np.abs(_wide(x)) ** 2)) for x in leaves)
    return float(np.sqrt(squares / entries)) if entries else 0.0


def _distance(a: Result, b: Result) -> float:
    """How far two gradients are apart, as a whole, or the values, if that is more."""
    values = relative_error(a.value, b.value)
    return max(relative_error(_entries(a), _entries(b)), values)


def _entries(result: Result) -> np.ndarray:
    """The gradient as one vector of float64."""
    leaves = jax.tree.leaves(_window.keep_inexact(result.grads))
    return np.concatenate([_real(x) for x in leaves] or [np.zeros(0)])


def _sample(grads: Any) -> np.ndarray:
    """As `_entries`, but of a large leaf not all."""
    leaves = [
        np.asarray(x).ravel()[:: -(-np.size(x) // _SAMPLES) or 1]
        for x in jax.tree.leaves(_window.keep_inexact(grads))
    ]
    return np.concatenate([_real(x) for x in leaves] or [np.zeros(0)])


def _wide(x: Any) -> np.ndarray:
    x = np.asarray(x)
    return x.astype(np.complex128 if np.iscomplexobj(x) else np.float64).ravel()


def _real(x: Any) -> np.ndarray:
    return _wide(x).view(np.float64)


def _elsewhere(problem: Problem, seed: int) -> Problem:
    """The same at parameters that are a tenth of their size away."""
    random = np.random.default_rng(seed)

    def move(x):
        if not _window.is_inexact(x):
            return x
        x = jnp.asarray(x)
        size = float(jnp.sqrt(jnp.mean(jnp.abs(x) ** 2))) if x.size else 0.0
        noise = jnp.asarray(random.normal(size=x.shape), x.dtype)
        return x + noise * jnp.asarray(0.1 * (size or 0.1), x.dtype)

    for position in jax.tree.leaves(problem.call.argnums):
        moved = jax.tree.map(move, problem.args[position])
        problem = problem.with_argument(position, moved)
    return problem


def _batch_size(problem: Problem) -> int:
    split = problem.split
    return split.whole * split.size + split.tail


def _dtypes(jaxpr: Any) -> set[Any]:
    """The dtypes of all that is computed in `jaxpr`, inner functions included."""
    found = set()
    for equation in jaxpr.eqns:
        found |= {v.aval.dtype for v in equation.outvars if hasattr(v.aval, "dtype")}
        for parameter in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                found |= _dtypes(inner)
    return found
