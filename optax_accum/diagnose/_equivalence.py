"""Whether k micro-batches give what the global batch gives, for one's own loss."""

import dataclasses
import functools
import inspect
import textwrap
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from optax_accum import _validate
from optax_accum._types import Tree
from optax_accum._value_and_grad import settings_of, value_and_grad
from optax_accum.diagnose import _probes, _problem

_P = ParamSpec("_P")
_T = TypeVar("_T")

_HERE = str(Path(__file__).parents[1])
_MOST_LEAVES = 12  # that are printed
_WIDE = 1e-2  # a tolerance, as that of bfloat16 and float16


@dataclasses.dataclass(frozen=True, repr=False)
class EquivalenceReport:
    """The result of `check_equivalence`; ``print(report)`` shows all of it.

    A report is true if the two agree: use ``assert report, str(report)`` as a test.

    Attributes:
      num_microbatches: How many there were.
      value: The value of `fun` on the global batch.
      microbatched_value: Its value from the micro-batches.
      value_error: The relative error between the two.
      leaves: The ``path`` and relative ``error`` of every leaf of the gradient.
      tolerance: The largest relative error that counts as equal.
      cause: If they differ, the likely cause: a named tuple of a ``name`` and a
        ``message``, which says what to do. The names, in the order of the probes:

        - ``"skipped"``: `skip` rejected micro-batches.
        - ``"not finite"``: there is a NaN or an infinity.
        - ``"hidden state"``: the same call gives two different results.
        - ``"randomness"``: a different random key gives a different result.
        - ``"carry"``: the loss depends on the carry.
        - ``"factor"``: the results differ by one factor; `reduction` is wrong.
        - ``"floor"``: a denominator is more than the count, such as
          ``jnp.maximum(count, 1)``.
        - ``"weights"``: micro-batches need different weights.
        - ``"constant term"``: a term is added once per micro-batch.
        - ``"groups"``: neighbouring examples belong together, but are split up.
        - ``"order"``: the order of the examples matters, without such groups.
        - ``"denominators"``: several losses are each divided by a count of its own.
        - ``"dependence"``: examples depend on each other in some other way.
          `oa.microbatch` makes a contrastive loss exact, but not BatchNorm.
        - ``"unknown"``: none of these.
    """

    num_microbatches: int
    value: float
    microbatched_value: float
    value_error: float
    leaves: tuple[_problem.LeafError, ...]
    tolerance: float
    cause: _probes.Cause | None

    @property
    def equivalent(self) -> bool:
        """Whether value and gradient agree within the tolerance."""
        errors = [self.value_error, *(leaf.error for leaf in self.leaves)]
        return all(error <= self.tolerance for error in errors)

    def __bool__(self) -> bool:
        """Whether they agree."""
        return self.equivalent

    def __repr__(self) -> str:
        """As it prints."""
        return str(self)

    def __str__(self) -> str:
        """Values, leaves with the largest errors first, and causes."""
        one = self.num_microbatches == 1
        who = (
            "1 micro-batch is" if one else f"{self.num_microbatches} micro-batches are"
        )
        verdict = "the same as" if self.equivalent else "NOT the same as"
        lines = [
            f"{who} {verdict} the global batch (tolerance {self.tolerance:.1e})",
            f"value: {self.value:.6g} (global batch), {self.microbatched_value:.6g} "
            f"(micro-batches), relative error {self.value_error:.1e}",
            "gradient, relative error per leaf:",
        ]
        # A NaN is the largest of all.
        shown = sorted(
            self.leaves, key=lambda leaf: -np.nan_to_num(leaf.error, nan=np.inf)
        )
        shown, rest = shown[:_MOST_LEAVES], shown[_MOST_LEAVES:]
        width = max((len(leaf.path) for leaf in shown), default=0)
        for path, error in shown:
            mark = "" if error <= self.tolerance else "  differs"
            lines.append(f"  {path.ljust(width)}  {error:.1e}{mark}")
        if rest:
            differ = sum(not leaf.error <= self.tolerance for leaf in rest)
            lines.append(f"  and {len(rest)} more, of which {differ or 'none'} differ")
        if self.tolerance > _WIDE:
            lines.append(
                "A tolerance this wide hides the effect of a little padding; check in "
                "float32 as well"
            )
        if self.cause:
            what = f"{self.cause.name}: {self.cause.message}"
            lines.append("what the probes suggest:")
            lines += textwrap.wrap(
                what, 80, initial_indent="  ", subsequent_indent="  "
            )
        return "\n".join(lines)


def _with_one_batch(check: Callable[_P, _T]) -> Callable[_P, _T]:
    """Says what to do with a second batch argument that was passed by position."""

    @functools.wraps(check)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        too_many = len(args) + ("num_microbatches" in kwargs) > 4
        if too_many or any(np.ndim(x) for x in jax.tree.leaves(args[3:4])):
            raise TypeError(
                "`check_equivalence` takes `fun`, `params`, `batch` and "
                f"`num_microbatches`; got {len(args)} arguments by position. Pass "
                "further arguments of `fun` in `args`, and name the positions of all "
                "that are split: check_equivalence(loss, params, x, 4, args=(y,), "
                "batch_argnums=(1, 2))"
            )
        return check(*args, **kwargs)

    return checked


@_with_one_batch
def check_equivalence(
    fun: Callable[..., Tree],
    params: Tree,
    batch: Tree,
    num_microbatches: int | None = None,
    *,
    args: Sequence[Tree] = (),
    kwargs: Mapping[str, Tree] | None = None,
    tolerance: float | None = None,
    **options: Any,
) -> EquivalenceReport:
    """Checks whether your loss is the same in micro-batches, and diagnoses why not.

    Use it once before training, or in a test. A loss that is a sum or a weighted mean
    over examples is the same. BatchNorm, contrastive losses, means over masks and
    dropout are not, and without a check training silently converges to a different
    result. This compares value and gradient (not auxiliary outputs or a carry); if
    they differ, it computes a few more gradients to find the cause.

    Args:
      fun: The loss, as `value_and_grad` takes it.
      params: Its first argument.
      batch: Its second argument: real examples, enough for all micro-batches. Use a
        batch with padding, or the effect of padding does not show.
      num_microbatches: K; or pass the option `microbatch_size`.
      args: Its further positional arguments, such as a random key.
      kwargs: Its keyword arguments.
      tolerance: The largest relative error that counts as equal. By default the square
        root of the machine epsilon of the narrowest dtype that `fun` and its gradient
        compute in: 3.5e-4 for float32, 0.09 for bfloat16.
      **options: Those of `value_and_grad`: `weight`, `reduction`, `batch_argnums`, ...
        Pass keyword arguments of `fun` in `kwargs`.

    Returns:
      An `EquivalenceReport`, which is true if the two agree.

      The error of a leaf is ‖a − b‖ / max(‖a‖, ‖b‖). If micro-batches cancel in a leaf
      or in the value, only rounding remains: it also counts as equal if the difference
      is within the tolerance of the sum of their norms. A leaf that is zero except for
      rounding, such as a bias before a normalization, is compared to a hundredth of the
      average for leaves of its size.

    Raises:
      TypeError: As `value_and_grad` (`fun` does not return a real scalar, say); an
        option does not exist; `args` is not a tuple or list; a second batch is passed
        by position, not in `args`.
      ValueError: As `value_and_grad`; `tolerance` is not in [0, 1); the batch has
        weight 0.

    Examples:
      A mean over valid tokens, whose number differs between micro-batches:

      >>> import jax.numpy as jnp, optax_accum as oa
      >>> def loss(w, batch):
      ...     errors = batch["mask"] * (batch["x"] @ w - 1) ** 2
      ...     return errors.sum() / batch["mask"].sum()
      >>> x = jnp.arange(24.0).reshape(8, 3)
      >>> batch = {"x": x, "mask": jnp.array([1.0, 1, 1, 1, 1, 0, 1, 0])}
      >>> report = oa.diagnose.check_equivalence(loss, jnp.ones(3), batch, 2)
      >>> bool(report), report.cause.name
      (False, 'weights')

      With the missing weights:

      >>> def count(w, batch):
      ...     return batch["mask"].sum()
      >>> report = oa.diagnose.check_equivalence(
      ...     loss, jnp.ones(3), batch, 2, weight=count
      ... )
      >>> assert report, str(report)

    Note:
      It cannot run inside a `jax.jit`: it compiles everything again, and fetches all
      gradients. Use a small model and a few examples.
    """
    if not isinstance(args, tuple | list):
        raise TypeError(
            "`args` must be a tuple or list of the arguments of `fun` after `batch`; "
            f"got {type(args).__name__}. For a single one pass args=(key,)"
        )
    for name in options.keys() - inspect.signature(value_and_grad).parameters:
        raise TypeError(
            f"`check_equivalence` got {name!r}, which is not an option of "
            "`value_and_grad`. Arguments of `fun` go into `args` and `kwargs`: "
            f"args=(key,), or kwargs={{{name!r}: ...}}"
        )
    options.pop("local", None)  # Where sums stay makes no difference to what they are.
    function = value_and_grad(fun, num_microbatches=num_microbatches, **options)
    problem = _problem.Problem.of(
        settings_of(function), (params, batch, *args), dict(kwargs or {})
    )
    if tolerance is not None:
        meaning = "the largest relative error that counts as equal"
        tolerance = _validate.fraction("tolerance", tolerance, meaning)
    else:
        tolerance = float(np.sqrt(jnp.finfo(problem.narrowest_dtype()).eps))

    whole = problem.whole()
    try:
        parts = problem.in_parts()
    except (TypeError, ValueError) as error:
        # What this library refuses has said already what to do.
        if not traceback.extract_tb(error.__traceback__)[-1].filename.startswith(_HERE):
            error.add_note(
                f"`fun` takes the {problem.split.examples} examples of the batch, but "
                f"not the {problem.split.size} of a micro-batch. If it takes pairs or "
                "groups of them together, give these an axis of their own: the batch "
                "axis then counts groups"
            )
        raise
    if whole.weight == 0:
        raise ValueError(
            "`weight` is 0 for this batch, so there is nothing to compare. Use a batch "
            "that counts"
        )
    errors, sizes = _problem.compare(whole, parts), None
    gradient = problem.raw_gradient()
    if not errors.worst <= tolerance and whole.is_finite() and parts.is_finite():
        # If parts cancel, only their rounding remains: small compared to the parts.
        sizes = problem.sizes(gradient, whole.weight)
        beside_parts = _problem.compare(whole, parts, sizes)
        errors = errors.replaced_within(tolerance, beside_parts)
    report = EquivalenceReport(
        num_microbatches=problem.num_microbatches,
        value=whole.value,
        microbatched_value=parts.value,
        value_error=errors.value,
        leaves=errors.leaves,
        tolerance=tolerance,
        cause=None,
    )
    if report.equivalent:
        return report
    seen = _probes.Comparison(problem, gradient, whole, parts, sizes, tolerance)
    return dataclasses.replace(report, cause=_probes.find_cause(seen))
