"""Why micro-batches differ from the global batch: a few gradients that tell.

Let r be the gradient of the whole batch and gᵢ those of its parts. Of a loss that is a
sum over examples, divided by whatever does not depend on the parameters, r is a
combination Σ cᵢ·gᵢ, and the numbers cᵢ are the same at all parameters. They are fitted
at some parameters and tried at others, for two halves of the batch: two unknowns, which
even a tiny model determines.

* All cᵢ are 1: the loss is a sum.
* Other cᵢ >= 0 with the sum 1: a mean of unequal means, which weights correct.
* Other cᵢ >= 0 with a larger sum: what the means divide by has a floor.
* None that fit: the examples depend on each other. Then the batch is cut and filled
  otherwise, to see what binds them: their neighbours, or only what their masks count.

What randomness, hidden state and a carry do is asked before, by running the same again.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from optax_accum import _arguments
from optax_accum._types import Batch, Tree
from optax_accum.diagnose._problem import Problem, Result, Sizes, compare

Equations = list[tuple[np.ndarray, np.ndarray]]  # matrix and right-hand side, each


class Cause(NamedTuple):
    """What the probes suggest.

    Attributes:
      name: In a word or two.
      message: What was seen, and what to do.
    """

    name: str
    message: str


class Comparison(NamedTuple):
    """A problem on which the whole batch and its micro-batches do not agree."""

    problem: Problem
    gradient: Callable[[Problem], Result]  # of `fun` on a whole batch, not divided
    whole: Result
    parts: Result
    sizes: Sizes | None
    tolerance: float

    def moved(self, a: Result, b: Result) -> float:
        """How far `a` and `b` are apart; 0 if not by more than the tolerance."""
        worst = compare(a, b, self.sizes).worst
        return 0.0 if worst <= self.tolerance else worst


def find_cause(seen: Comparison) -> Cause:
    """Asks for one reason after the other, the plainest first."""
    for probe in (
        _skipped,
        _not_finite,
        _hidden_state,
        _randomness,
        _carry,
        _factor,
        _weights,
        _constant_term,
        _order,
        _denominators,
        _dependence,
    ):
        cause = probe(seen)
        if cause is not None:
            return cause
    return Cause(
        "unknown",
        "none of the probes explains the difference. To see whether it is rounding, "
        "check again in float64, under jax.enable_x64(True)",
    )


def _skipped(seen: Comparison) -> Cause | None:
    if not seen.parts.skipped:
        return None
    return Cause(
        "skipped",
        f"`skip` rejected {seen.parts.skipped} of {seen.problem.num_microbatches} "
        "micro-batches, which are missing in the result. Leave `skip` out to compare "
        "all of them",
    )


def _not_finite(seen: Comparison) -> Cause | None:
    if not seen.whole.is_finite():
        return Cause(
            "not finite",
            "value or gradient of the global batch has a NaN or an infinity in it; "
            "fix that first",
        )
    if seen.parts.is_finite():
        return None
    found = (
        "micro-batches give a NaN or an infinity, and the global batch does not. A "
        "mean over a mask divides by 0 in a micro-batch that is all padding: "
    )
    advice = "divide by jnp.maximum(count, 1), and pass the count as `weight`"
    if seen.problem.settings.reduction != "mean":
        advice = (
            'let `fun` be a sum, without any division, and use reduction="ratio" with '
            "the count as `weight`"
        )
    return Cause("not finite", found + advice)


def _hidden_state(seen: Comparison) -> Cause | None:
    moved = seen.moved(seen.whole, seen.problem.whole())
    if not moved:
        return None
    return Cause(
        "hidden state",
        "the same call twice, on the global batch, gives two results, "
        f"{moved:.1e} apart: `fun` depends on more than its arguments, such as "
        "numpy.random. Pass a random key",
    )


def _randomness(seen: Comparison) -> Cause | None:
    problem = seen.problem
    for place, name, argument in problem.others():
        if not any(_arguments.is_key(x) for x in jax.tree.leaves(argument)):
            continue
        other = problem.with_argument(place, _other(argument))
        moved = seen.moved(seen.whole, other.whole())
        if not moved:
            continue
        found = f"the loss is random: a new `{name}` changes it by {moved:.1e}. "
        advice = (
            "Micro-batches draw their own random numbers, as they should, so the "
            "results only agree on average. Check again with the dropout off: it "
            "hides every other cause"
        )
        return Cause("randomness", found + advice)
    return None


def _other(argument: Tree) -> Tree:
    """The same with other random keys."""
    return jax.tree.map(
        lambda x: _arguments.fold_in(x, 1) if _arguments.is_key(x) else x, argument
    )


def _carry(seen: Comparison) -> Cause | None:
    problem = seen.problem
    if problem.call.carry_place is None:
        return None
    if seen.moved(seen.whole, problem.with_one_carry().in_parts()):
        return None
    name = problem.call.carry_name
    return Cause(
        "carry",
        f"the loss depends on `{name}`, its carry, which every micro-batch gets from "
        "the one before. With the first carry for all of them, the results agree",
    )


def _factor(seen: Comparison) -> Cause | None:
    a, b = seen.whole.entries(), seen.parts.entries()
    factor = float(a @ b / (a @ a)) if a @ a else 0.0
    if factor == 0 or abs(factor - 1) <= seen.tolerance:
        return None
    if compare(seen.whole.times(factor), seen.parts).worst > seen.tolerance:
        return None
    problem = seen.problem
    k = problem.num_microbatches * problem.settings.devices.num_shards
    floor = _floor_of_weight(problem, factor)
    if floor is not None:
        return floor
    found = f"the micro-batches' result is {factor:.4g} times the global batch's"
    if np.isclose(factor, k, rtol=1e-2):
        advice = (
            f", and there are {k} micro-batches: `fun` is a mean, and "
            f'reduction="{problem.settings.reduction}" adds it up. Use reduction="mean"'
        )
    elif np.isclose(factor, 1 / k, rtol=1e-2):
        advice = f", one over the number of micro-batches: {_is_a_sum(problem)}"
    else:
        advice = (
            ": `fun` or `weight` divides by something other than the weight of a "
            "micro-batch"
        )
    return Cause("factor", found + advice)


def _floor_of_weight(problem: Problem, factor: float) -> Cause | None:
    """Whether `weight` explains the factor: taken twice, a part weighs less than 2x."""
    if problem.settings.weight is None or problem.settings.reduction == "sum":
        return None
    parts = [problem.with_batch(part) for part in problem.microbatches()]
    weight, own = problem.weight(), sum(part.weight() for part in parts)
    floored = sum(part.repeated().weight() < 1.999 * part.weight() for part in parts)
    if not floored or not np.isclose(factor * own, weight, rtol=1e-2):
        return None
    advice = "a micro-batch that is all padding then has weight 0 and is left out"
    if problem.settings.reduction == "ratio":
        advice = 'reduction="ratio" divides once, by their sum, and needs no floor'
    return Cause(
        "floor",
        f"`weight` is {weight:.6g} for the global batch, but {own:.6g} for all "
        f"micro-batches together: in {floored} of {problem.num_microbatches} it is "
        "more than the count, because of a floor such as jnp.maximum(count, 1) or an "
        f"epsilon. Return the count itself: {advice}",
    )


def _is_a_sum(problem: Problem) -> str:
    return (
        f'`fun` is a sum, and reduction="{problem.settings.reduction}" averages it. '
        'Use reduction="sum", or "ratio" with a `weight` to divide by'
    )


def _weights(seen: Comparison) -> Cause | None:
    """Whether the whole is a combination of its halves, at all parameters."""
    problem = seen.problem
    if problem.num_microbatches < 2:
        return None
    points = [problem, *map(problem.elsewhere, range(1, 4))]
    wholes = [seen.gradient(point).sample() for point in points]

    def equations(parts: list[Batch]) -> Equations:
        """For every point the parts as columns, and what they are to add up to."""
        found = []
        for point, whole in zip(points, wholes, strict=True):
            results = [seen.gradient(point.with_batch(part)) for part in parts]
            columns = np.stack([result.sample() for result in results], 1)
            scale = max(np.linalg.norm(whole), *np.linalg.norm(columns, axis=0))
            found.append((columns / (scale or 1), whole / (scale or 1)))
        return found

    in_halves = equations(problem.in_two(problem.num_microbatches // 2))
    if not _is_finite(in_halves):
        return Cause(
            "unknown",
            "to find the cause, the probes need the gradient at parameters a tenth "
            "away from these, and it is not finite there. Check at other parameters",
        )
    if _explains(np.ones(2), in_halves, seen.tolerance):
        found = "the global batch's gradient is the sum of its parts': "
        return Cause("factor", found + _is_a_sum(problem))
    if _combination(in_halves, seen.tolerance) is None:
        return None
    # Halves may happen to be alike in what counts. A part and the rest are less so.
    unequal = equations(problem.in_two(1))
    if _is_finite(unequal) and _combination(unequal, seen.tolerance) is None:
        return None
    in_parts = equations(problem.microbatches())
    shares = _combination(in_parts, seen.tolerance)
    return _weights_cause(problem, shares, seen.tolerance)


def _is_finite(equations: Equations) -> bool:
    """Whether all parts' gradients are."""
    return all(np.isfinite(columns).all() for columns, _ in equations)


def _explains(coefficients: np.ndarray, equations: Equations, tolerance: float) -> bool:
    """Whether the parts, multiplied by `coefficients`, add up at every point."""
    return all(
        np.linalg.norm(columns @ coefficients - whole) <= tolerance
        for columns, whole in equations
    )


def _combination(equations: Equations, tolerance: float) -> np.ndarray | None:
    """The coefficients >= 0 that explain all equations, where they can be told.

    They are fitted to all points but the last, and tried at all. A part without any
    gradient has 0.
    """
    columns = np.concatenate([columns for columns, _ in equations[:-1]])
    wholes = np.concatenate([whole for _, whole in equations[:-1]])
    if not np.isfinite(columns).all():
        return None
    coefficients, _, rank, _ = np.linalg.lstsq(columns, wholes, rcond=tolerance)
    if rank < columns.any(0).sum() or coefficients.min() < -tolerance:
        return None
    return coefficients if _explains(coefficients, equations, tolerance) else None


def _weights_cause(
    problem: Problem, shares: np.ndarray | None, tolerance: float
) -> Cause | None:
    used = np.array([problem.with_batch(p).weight() for p in problem.microbatches()])
    found = "the micro-batches' gradients add up to the global batch's if they are "
    if shares is None:  # Too many to be told apart.
        found += "weighted otherwise"
    else:
        if problem.settings.reduction == "mean" and np.allclose(
            shares, used / used.sum(), rtol=1e-2, atol=1e-3
        ):
            return None
        shown = ", ".join(f"{c:.3g}" for c in shares[:8])
        found += f"weighted by {shown}{', ...' * (len(shares) > 8)}"
        if shares.sum() > 1 + 3 * tolerance:
            return Cause(
                "floor",
                f"{found}, which is {shares.sum():.4g} together and not 1: `fun` "
                "divides by more than the count, because of a floor such as "
                "jnp.maximum(count, 1) or an epsilon, and no weight undoes that. Let "
                '`fun` be the sum, without any division, and use reduction="ratio" '
                "with the count as `weight`",
            )
    found += (
        ": `fun` averages over something that they contain in different amounts, such "
        "as valid tokens"
    )
    if problem.settings.reduction != "mean":
        advice = (
            f', and reduction="{problem.settings.reduction}" adds the means up. Use '
            'reduction="mean", with `weight=`, a function that counts it'
        )
    elif problem.settings.weight is not None:
        advice = ", and `weight` counts something else. Let it count the same"
    else:
        advice = (
            ", and without `weight` each counts by its number of examples. Pass "
            "`weight=`, a function that counts it"
        )
    return Cause("weights", found + advice)


def _constant_term(seen: Comparison) -> Cause | None:
    """Whether they differ by what does not grow if the batch is taken twice."""
    problem = seen.problem
    if problem.settings.reduction == "mean":
        return None
    twice = seen.gradient(problem.repeated())
    term = 2 * seen.gradient(problem).sample() - twice.sample()
    whole = seen.whole.sample()
    difference = seen.parts.sample() - whole
    factor = float(term @ difference / (term @ term)) if term @ term else 0.0
    unexplained = np.linalg.norm(difference - factor * term)
    if factor <= 0 or unexplained > seen.tolerance * np.linalg.norm(whole):
        return None
    return Cause(
        "constant term",
        "a part of `fun` does not depend on the batch, such as a penalty on the "
        f'weights, and reduction="{problem.settings.reduction}" adds it once per '
        "micro-batch. Leave it out of `fun` and add its gradient to the result",
    )


def _order(seen: Comparison) -> Cause | None:
    """Whether examples depend on their neighbours: the order of the batch matters."""
    problem = seen.problem
    moved = seen.moved(seen.whole, problem.shuffled().whole())
    if not moved:
        return None
    examples = problem.split.examples
    for size in range(2, examples):
        if examples % size or not _agrees(seen, size):
            continue
        groups = examples // size
        return Cause(
            "groups",
            f"`fun` takes groups of {size} neighbouring examples together, and "
            "micro-batches split them up; whole groups give the same result as the "
            "batch. Let the batch axis count groups: reshape it in every leaf from "
            f"{examples} to ({groups}, {size}), and merge the two axes again inside "
            f"`fun`. The number of micro-batches then divides {groups}",
        )
    return Cause(
        "order",
        "the order of the examples matters: shuffling the global batch changes the "
        f"result by {moved:.1e}. If `fun` draws dropout from a key that is not an "
        "argument, make it one. If it takes some examples together, such as neighbours "
        "or one half and the other, give these an axis of their own: the batch axis "
        "then counts groups",
    )


def _agrees(seen: Comparison, size: int) -> bool:
    """Whether micro-batches of `size` neighbouring examples do."""
    try:
        parts = seen.problem.in_runs_of(size).in_parts()
    except (TypeError, ValueError):  # Groups of a different size do not fit.
        return False
    return not seen.moved(seen.whole, parts)


def _denominators(seen: Comparison) -> Cause | None:
    """Whether micro-batches agree once as much counts in all of them."""
    names = seen.problem.what_counts()
    if not names:
        return None
    alike = seen.problem.with_counts_alike()
    if seen.moved(alike.whole(), alike.in_parts()):
        return None
    shown = ", ".join(names[:3]) + ", ..." * (len(names) > 3)
    return Cause(
        "denominators",
        f"the results agree if all micro-batches have equal counts in {shown}: `fun` "
        "seems to add losses with different denominators, for which one `weight` is "
        "not enough. Count on the global batch first, pass the totals, as in "
        "fun(params, batch, totals), and divide by them. The rest is a sum, exact with "
        'reduction="sum"',
    )


def _dependence(seen: Comparison) -> Cause | None:
    problem = seen.problem
    moved = seen.moved(seen.parts, problem.shuffled().in_parts())
    if moved:
        how = (
            "exchanging examples between micro-batches changes the result by "
            f"{moved:.1e}"
        )
    elif problem.split.size == 1:
        how = "an example alone gives a different result than among others"
    else:
        return None
    size = f"num_microbatches={problem.settings.num_microbatches}"
    if problem.settings.num_microbatches is None:
        size = f"microbatch_size={problem.settings.microbatch_size}"
    return Cause(
        "dependence",
        f"examples depend on each other: {how}. Compute a loss of all outputs "
        f"(contrastive, Dice) from oa.microbatch(encode, {size})(params, batch), under "
        "jax.value_and_grad. Several denominators, or statistics: compute them on the "
        'global batch, pass them to `fun`, and use reduction="sum". BatchNorm stays '
        "different: use LayerNorm, or larger micro-batches",
    )
