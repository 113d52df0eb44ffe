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

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy import optimize

from optax_accum import _arguments
from optax_accum._problem import Problem, Result, relative_error


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
    whole: Result
    parts: Result
    tolerance: float

    def moved(self, again: Result) -> float:
        """How far another run of the whole batch is from the first, 0 if not at all."""
        distance = self.whole.distance(again)
        return 0.0 if distance <= self.tolerance else distance


def find_cause(seen: Comparison) -> Cause:
    """Asks for one reason after the other, the plainest first."""
    for probe in (
        _skipped,
        _not_finite,
        _hidden_state,
        _randomness,
        _unsplit_argument,
        _factor,
        _weights,
        _constant_term,
        _dependence,
    ):
        cause = probe(seen)
        if cause is not None:
            return cause
    return Cause(
        "unknown",
        "none of the probes explains the difference. Whether it is rounding shows in "
        "float64, under jax.enable_x64(True)",
    )


def _skipped(seen: Comparison) -> Cause | None:
    if not seen.parts.skipped:
        return None
    return Cause(
        "skipped",
        f"`skip` rejected {seen.parts.skipped} of {seen.problem.num_microbatches} "
        "micro-batches, and what it rejects is missing in the result. Leave `skip` out "
        "to compare the rest",
    )


def _not_finite(seen: Comparison) -> Cause | None:
    if not seen.whole.is_finite():
        return Cause(
            "not finite",
            "value or gradient of the global batch has a NaN or an infinity in it; "
            "mend that first",
        )
    if seen.parts.is_finite():
        return None
    return Cause(
        "not finite",
        "micro-batches give a NaN or an infinity, and the global batch does not. A "
        "mean over a mask divides by 0 in a micro-batch that is all padding: divide by "
        "jnp.maximum(count, 1), and pass the count as `weight`",
    )


def _hidden_state(seen: Comparison) -> Cause | None:
    moved = seen.moved(seen.problem.whole())
    if not moved:
        return None
    return Cause(
        "hidden state",
        "the same call twice, on the global batch, gives two results, "
        f"{moved:.1e} apart: `fun` depends on something that is not among its "
        "arguments, such as numpy.random. Pass a random key, and name it in "
        "`rng_argnums`",
    )


def _randomness(seen: Comparison) -> Cause | None:
    problem = seen.problem
    for position, argument in enumerate(problem.args):
        is_key = [_arguments.is_key(x) for x in jax.tree.leaves(argument)]
        if position in problem.call.places or not any(is_key):
            continue
        moved = seen.moved(problem.with_argument(position, _other(argument)).whole())
        if not moved:
            continue
        name = problem.call.names[position]
        found = f"the loss is random: another `{name}` moves it by {moved:.1e}. "
        if position in problem.call.keys:
            advice = (
                "Micro-batches draw their own, as they should, and so cannot draw what "
                "the global batch draws; equal they are on average. Check again with "
                "the dropout off: this hides every other cause"
            )
        else:
            advice = (
                f"And all micro-batches draw the same, because `{name}` is not in "
                f"`rng_argnums`: pass rng_argnums={position}"
            )
        return Cause("randomness", found + advice)
    return None


def _other(argument: Any) -> Any:
    """The same with other random keys."""
    return jax.tree.map(
        lambda x: jax.random.fold_in(x, 1) if _arguments.is_key(x) else x, argument
    )


def _unsplit_argument(seen: Comparison) -> Cause | None:
    """Whether an argument that looks like a batch is one, and was not named."""
    problem = seen.problem
    axis, examples = problem.batch_axis, problem.batch_size
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
        try:
            mended = problem.with_options(batch_argnums=batch_argnums).in_parts()
        except (TypeError, ValueError):  # Then it is no batch.
            continue
        if not seen.moved(mended):
            name = problem.call.names[position]
            return Cause(
                "unsplit argument",
                f"`{name}` has {examples} entries along axis {axis}, as the batch "
                "has examples, but reaches every micro-batch whole. Split it as well, "
                f"and the results agree: batch_argnums={batch_argnums}",
            )
    return None


def _factor(seen: Comparison) -> Cause | None:
    a, b = seen.whole.entries(), seen.parts.entries()
    factor = float(a @ b / (a @ a)) if a @ a else 0.0
    if factor == 0 or relative_error(factor * a, b) > seen.tolerance:
        return None
    k = seen.problem.num_microbatches
    found = f"the micro-batches' gradient is {factor:.4g} times the global batch's"
    if np.isclose(factor, k, rtol=1e-2):
        advice = (
            f", and there are {k} micro-batches: `fun` is a mean, and "
            f'reduction="{seen.problem.reduction}" adds it up. Use reduction="mean"'
        )
    elif np.isclose(factor, 1 / k, rtol=1e-2):
        advice = f", one over the number of micro-batches: {_is_a_sum(seen.problem)}"
    else:
        advice = (
            ": `fun` or `weight` divides by something else than the weight of a "
            "micro-batch"
        )
    return Cause("factor", found + advice)


def _is_a_sum(problem: Problem) -> str:
    return (
        f'`fun` is a sum, and reduction="{problem.reduction}" averages it. Use '
        'reduction="sum", or "ratio" with a `weight` to divide by'
    )


def _weights(seen: Comparison) -> Cause | None:
    """Whether r is a combination of the gᵢ, at these and at other parameters."""
    problem = seen.problem
    k = problem.num_microbatches
    gradient = problem.raw_gradient()
    batches = problem.microbatches()

    def equations(point: Problem) -> tuple[np.ndarray, np.ndarray]:
        columns = [gradient(point.with_batch(batch)) for batch in batches]
        target = gradient(point)
        scale = np.linalg.norm(target) or 1.0
        return np.stack(columns, 1) / scale, target / scale

    fitted = [equations(problem)]
    # Enough equations for k unknowns, were the model ever so small.
    while sum(len(target) for _, target in fitted) < 2 * k:
        fitted.append(equations(problem.elsewhere(len(fitted))))
    tried = equations(problem.elsewhere(len(fitted)))

    def explains(coefficients: np.ndarray) -> bool:
        return all(
            np.linalg.norm(columns @ coefficients - target) <= seen.tolerance
            for columns, target in [*fitted, tried]
        )

    if explains(np.ones(k)):
        found = "the global batch's gradient is the sum of the micro-batches': "
        return Cause("factor", found + _is_a_sum(problem))
    coefficients, _ = optimize.nnls(
        np.concatenate([columns for columns, _ in fitted]),
        np.concatenate([target for _, target in fitted]),
    )
    if not explains(coefficients):
        return None
    shares = ", ".join(f"{c:.3g}" for c in coefficients[:8]) + ", ..." * (k > 8)
    given = (
        "what `weight` says is another share"
        if problem.options.get("weight")
        else "without `weight` each counts by its number of examples"
    )
    return Cause(
        "weights",
        "the micro-batches' gradients add up to the global batch's if they are "
        f"weighted by {shares}: `fun` averages over something of which they hold "
        f"different amounts, such as valid tokens, and {given}. Pass `weight=`, a "
        "function that counts it",
    )


def _constant_term(seen: Comparison) -> Cause | None:
    """Whether they differ by what does not grow if the batch is taken twice."""
    problem = seen.problem
    if problem.reduction == "mean":
        return None
    gradient = problem.raw_gradient()
    twice = problem.map_batch(lambda x, axis: jnp.concatenate([x, x], axis))
    term = 2 * gradient(problem) - gradient(twice)
    whole = seen.whole.sample()
    difference = seen.parts.sample() - whole
    factor = float(term @ difference / (term @ term)) if term @ term else 0.0
    unexplained = np.linalg.norm(difference - factor * term)
    if factor <= 0 or unexplained > seen.tolerance * np.linalg.norm(whole):
        return None
    return Cause(
        "constant term",
        "a part of `fun` does not depend on the batch, such as a penalty on the "
        f'weights, and reduction="{problem.reduction}" adds it once per micro-batch. '
        "Leave it out of `fun` and add its gradient to the result",
    )


def _dependence(seen: Comparison) -> Cause | None:
    problem = seen.problem
    order = np.random.default_rng(0).permutation(problem.batch_size)
    exchanged = problem.map_batch(lambda x, axis: jnp.take(x, order, axis))
    moved = seen.parts.distance(exchanged.in_parts())
    if moved > seen.tolerance:
        how = (
            f"exchanging examples between micro-batches moves the result by {moved:.1e}"
        )
    elif problem.split.size == 1:
        how = "an example alone gives something else than among others"
    else:
        return None
    return Cause(
        "dependence",
        f"examples depend on each other: {how}, and no weights make up for it. "
        "BatchNorm and losses that compare examples see one micro-batch at a time, and "
        "no accumulation makes that the global batch. Larger micro-batches come "
        "nearer; LayerNorm, GroupNorm or fixed statistics have no such bond",
    )
