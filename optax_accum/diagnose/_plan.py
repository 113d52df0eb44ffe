"""How many micro-batches a step needs to fit into memory, known before it runs.

The compiler knows how much memory a program takes. The planner compiles the step for
some numbers of micro-batches, as few as it can, and runs none of them.
"""

import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax

from optax_accum import _checks
from optax_accum.diagnose import _memory

_logger = logging.getLogger("optax_accum")
_show = _memory.show_size


class Candidate(NamedTuple):
    """One number of micro-batches that was tried.

    Attributes:
      num_microbatches: How many.
      memory: The bytes that the step takes on each device, or ``None`` where the
        compiler itself ran out of memory.
      fits: Whether that is within the plan's limit.
      seconds: How long it took to compile.
    """

    num_microbatches: int
    memory: _memory.Memory | None
    fits: bool
    seconds: float


@dataclasses.dataclass(frozen=True, repr=False)
class MicrobatchPlan:
    """What `plan_microbatches` found. ``print(plan)`` shows it as a table.

    Attributes:
      num_microbatches: The fewest micro-batches that fit.
      step: The step compiled for them, ready to be called with arrays like `args`.
      candidates: All numbers that were tried, each a named tuple of
        ``num_microbatches``, ``memory`` (bytes on each device: ``arguments``,
        ``outputs``, ``temporaries``, ``aliased``, ``total``), ``fits`` and ``seconds``
        (to compile).
      memory_limit: The bytes that a device has for the step.
      headroom: The part of them that is to stay free.
    """

    num_microbatches: int
    step: Any
    candidates: tuple[Candidate, ...]
    memory_limit: int
    headroom: float

    def __str__(self) -> str:
        """The number, and the table."""
        table = _table(self.candidates, self.memory_limit, self.headroom)
        return f"{_micro_batches(self.num_microbatches)}: the fewest that fit\n{table}"

    def __repr__(self) -> str:
        """As it prints."""
        return str(self)

    def plot(self, ax: Any = None) -> Any:
        """Draws the memory of all candidates against the limit.

        Args:
          ax: The Matplotlib axes to draw on; by default new ones.

        Returns:
          The axes.

        Raises:
          ImportError: Matplotlib is not installed.
        """
        if ax is None:
            try:
                import matplotlib.pyplot as plt  # noqa: PLC0415 - an optional extra
            except ImportError as error:
                raise ImportError(
                    "`plot` needs Matplotlib: pip install matplotlib"
                ) from error
            _, ax = plt.subplots()
        _draw(self, ax)
        return ax


def plan_microbatches(
    make_step: Callable[[int], Any],
    *args: Any,
    batch_size: int | None = None,
    candidates: Iterable[int] | None = None,
    memory_limit: int | str | None = None,
    headroom: float = 0.1,
) -> MicrobatchPlan:
    """Finds the fewest micro-batches with which a training step fits into memory.

    The step is compiled, for a few numbers of micro-batches, and not run: nothing of it
    is allocated, and nothing runs out of memory. On each device it takes

        arguments + outputs + temporaries − aliased

    bytes, as XLA says of the compiled program. The search doubles its way through the
    candidates until one fits, then bisects; each candidate is compiled at most once.

    Args:
      make_step: ``make_step(num_microbatches)`` returns the training step, a function
        of `args`: a `jax.jit` or `jax.pmap` with its donated arguments, or a function
        that is then jitted without any. Where the shapes of the arguments change with
        the number, as those of a micro-batch do that `accumulate` takes by itself, it
        returns a step that is lowered already, ``step.lower(...)``, and there are no
        `args`.
      *args: The arguments of the step, arrays or `jax.ShapeDtypeStruct` (with a
        sharding, where there are several devices).
      batch_size: How many examples the global batch has. Its divisors are the
        candidates, unless `candidates` names some of them.
      candidates: The numbers of micro-batches to choose from.
      memory_limit: The bytes that the step may take on each device, or a text such as
        ``"16GiB"`` or ``"800 MB"``. By default what the device reports, less what is in
        use by others than `args`. A CPU reports nothing.
      headroom: The part of `memory_limit` to be left free, for what the compiler does
        not know: fragments, libraries, other programs.

    Returns:
      A `MicrobatchPlan`: the number, the compiled step, and all that was tried.

    Raises:
      TypeError: A size, a number or a function of another type.
      ValueError: Neither `batch_size` nor `candidates`; candidates that are < 1 or do
        not divide `batch_size`; a `memory_limit` that cannot be read, is needed, or is
        below the bytes of the arguments alone; `headroom` not in [0, 1); nothing fits:
        then the message has the table.

    Examples:
      >>> import jax, jax.numpy as jnp, optax_accum as oa
      >>> def loss(w, x):
      ...     return jnp.mean(jnp.tanh(jnp.tanh(x @ w) @ w) ** 2)
      >>> def make_step(num_microbatches):
      ...     grad = oa.grad(loss, num_microbatches=num_microbatches)
      ...     return jax.jit(lambda w, x: w - grad(w, x), donate_argnums=0)
      >>> w = jax.ShapeDtypeStruct((256, 256), jnp.float32)
      >>> x = jax.ShapeDtypeStruct((4096, 256), jnp.float32)
      >>> plan = oa.diagnose.plan_microbatches(
      ...     make_step, w, x, batch_size=4096, memory_limit="8MiB"
      ... )
      >>> plan.num_microbatches > 1 and plan.candidates[0].fits
      False
      >>> new_w = plan.step(jnp.ones((256, 256)), jnp.ones((4096, 256)))

    Note:
      Each candidate is logged when it is compiled, to the logger ``"optax_accum"``:
      ``logging.basicConfig(level=logging.INFO)`` shows it.

      In several processes all must call it, with the same arguments. They agree on the
      smallest limit, and so decide alike.

      Where memory does not fall with the number of micro-batches, the plan is one that
      fits, while the next smaller number that was tried does not.
    """
    if not callable(make_step):
        raise TypeError(
            "`make_step` must be a function of the number of micro-batches that "
            f"returns the training step; got {type(make_step).__name__}"
        )
    numbers = _candidates(batch_size, candidates)
    _checks.fraction("headroom", headroom, "the part of the memory to leave free")
    limit = (
        _memory.available(args)
        if memory_limit is None
        else _memory.parse_size("memory_limit", memory_limit)
    )
    if limit < 1024:
        raise ValueError(
            f"`memory_limit` is {limit} bytes, less than any step takes. A number "
            "counts bytes; for more of them pass a text, such as '16GiB'"
        )
    limit = _memory.agreed(limit)
    usable = limit * (1 - headroom)
    budget = f"`memory_limit` of {_show(limit)}, less `headroom` {headroom:.0%}"

    tried: list[Candidate] = []
    fitting: dict[int, Any] = {}

    def measure(number: int) -> float:
        _logger.info("compiling the step with %s", _micro_batches(number))
        start = time.perf_counter()
        step = make_step(number)
        compiled = _compile(step, args)
        seconds = time.perf_counter() - start
        memory = None if compiled is None else _memory.Memory.of(compiled)
        size = float("inf") if memory is None else memory.total
        candidate = Candidate(number, memory, size <= usable, seconds)
        _logger.info("%s", _sentence(candidate))
        tried.append(candidate)
        if candidate.fits:
            # The best so far; what fits with more micro-batches is not needed.
            fitting.clear()
            fitting[number] = compiled
        if memory and memory.arguments > usable and not _has_arguments(step):
            raise ValueError(
                f"{budget}, is less than the arguments of the step alone take: "
                f"{_show(memory.arguments)} on each device. No number of micro-batches "
                "helps; shard the parameters or the optimizer's state, or keep less of "
                "it"
            )
        return size

    number = search(numbers, measure, usable)
    ordered = tuple(sorted(tried))
    if number is None:
        table = _table(ordered, limit, headroom)
        raise ValueError(
            f"nothing fits into {budget}. {_remedy(ordered, usable)}:\n{table}"
        )
    return MicrobatchPlan(number, fitting[number], ordered, limit, headroom)


def search(
    candidates: Sequence[int], memory: Callable[[int], float], limit: float
) -> int | None:
    """The first of `candidates` whose `memory` is within `limit`.

    `memory` is asked at most once for each: at distances that double, until one fits,
    and then by bisection down to a neighbour that does not. If none fits, the gaps
    beside the smallest figure are halved, until something fits or it has no gaps.

    Where `memory` falls, this is the first that fits. Where it does not, it is one that
    fits, and the next smaller one that was asked does not. Only where nothing that was
    asked fits it is ``None``.
    """
    sizes: dict[int, float] = {}

    def fits(index: int) -> bool:
        sizes[index] = memory(candidates[index])
        return sizes[index] <= limit

    index = _double(len(candidates), fits)
    while index is None:
        smallest = min(sizes, key=lambda i: sizes[i])
        middle = _untried_beside(smallest, sizes)
        if middle is None:
            return None
        index = middle if fits(middle) else None

    low, high = max((i for i in sizes if i < index), default=-1), index
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            high = middle
        else:
            low = middle
    return candidates[high]


def _double(count: int, fits: Callable[[int], bool]) -> int | None:
    """The first index that fits among 0, 1, 3, 7, ... and the last."""
    index = 0
    while not fits(index):
        if index == count - 1:
            return None
        index = min(2 * index + 1, count - 1)
    return index


def _untried_beside(index: int, tried: Iterable[int]) -> int | None:
    """The middle of the larger gap beside `index`, or ``None`` where there is none."""
    below = max((i for i in tried if i < index), default=index)
    above = min((i for i in tried if i > index), default=index)
    width, middle = max(
        (index - below, (below + index) // 2), (above - index, (index + above) // 2)
    )
    return middle if width > 1 else None


def _candidates(batch_size: Any, given: Iterable[int] | None) -> list[int]:
    """The numbers to choose from, the smallest first."""
    if batch_size is None and given is None:
        raise ValueError(
            "`batch_size` or `candidates` is needed: the size of the global batch, of "
            "which all divisors are tried, or the numbers of micro-batches to choose "
            "from; got neither"
        )
    size = _checks.size("batch_size", batch_size)
    if given is None:
        assert size is not None
        return [n for n in range(1, size + 1) if size % n == 0]
    if not isinstance(given, Iterable):
        raise TypeError(
            "`candidates` must be several numbers of micro-batches; got "
            f"{given!r} of type {type(given).__name__}"
        )
    numbers = sorted({_checks.count("candidates", n) for n in given})
    if not numbers:
        raise ValueError("`candidates` is empty; at least one number is needed")
    wrong = [n for n in numbers if size is not None and size % n]
    if wrong:
        raise ValueError(
            f"`candidates` {', '.join(map(str, wrong))} do not divide `batch_size="
            f"{size}`. Leave `candidates` out for all of its divisors, or leave "
            "`batch_size` out for steps that take any number"
        )
    return numbers


def _remedy(candidates: Sequence[Candidate], usable: float) -> str:
    """What to do where nothing fits."""
    memories = [c.memory for c in candidates if c.memory is not None]
    if not memories:
        return "Give it more memory, or the step a smaller model"
    least = min(memories, key=lambda m: m.total)
    kept = least.total - least.temporaries
    found = f"The least is {_show(least.total)}"
    if kept > usable:
        return (
            f"{found}, of which {_show(kept)} are arguments and outputs, which more "
            "micro-batches do not change: donate them, shard the parameters or the "
            "optimizer's state, or keep less of it"
        )
    return (
        f"{found}. Where more micro-batches do not lower the temporaries, these are "
        "the sum of the gradients and one micro-batch's activations: use "
        "jax.checkpoint, give it more memory, or the step a smaller model"
    )


def _has_arguments(step: Any) -> bool:
    """Whether `step` is lowered or compiled already, with arguments of its own."""
    return hasattr(step, "compile") or hasattr(step, "memory_analysis")


def _compile(step: Any, args: Any) -> Any:
    """`step` compiled, or ``None`` where the compiler ran out of memory."""
    if _has_arguments(step):
        if args:
            raise TypeError(
                "`make_step` returned a step that is lowered already, with arguments "
                f"of its own, and there are {len(args)} more in `args`. Leave these out"
            )
        if hasattr(step, "memory_analysis"):
            return step
    else:
        if not callable(step):
            raise TypeError(
                "`make_step` must return the training step for a number of "
                "micro-batches, a function or what `.lower(...)` gives; got "
                f"{type(step).__name__}"
            )
        step = step if hasattr(step, "lower") else jax.jit(step)
        try:
            step = step.lower(*args)
        except TypeError as error:
            error.add_note(
                "plan_microbatches called make_step(num_microbatches), and what it "
                f"returned with the {len(args)} `args`. `make_step` must return the "
                "training step; one whose arguments change with the number is returned "
                "as step.lower(...)"
            )
            raise
    try:
        return step.compile()
    except jax.errors.JaxRuntimeError as error:
        # XLA may refuse to compile what does not fit the device.
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None


_HEADINGS = (
    "micro-batches",
    "arguments",
    "outputs",
    "temporaries",
    "aliased",
    "total",
    "fits",
    "compiled in",
)


def _sentence(candidate: Candidate) -> str:
    number, memory, fits, seconds = candidate
    takes = "too much to compile" if memory is None else _show(memory.total)
    verdict = "fits" if fits else "does not fit"
    compiled = f"compiled in {seconds:.1f} s"
    return f"{_micro_batches(number)}: {takes}, {verdict} ({compiled})"


def _micro_batches(number: int) -> str:
    return f"{number} micro-batch" if number == 1 else f"{number} micro-batches"


def _table(candidates: Sequence[Candidate], limit: int, headroom: float) -> str:
    """All that was tried, in bytes per device."""
    rows: list[tuple[str, ...]] = [_HEADINGS]
    for number, memory, fits, seconds in candidates:
        sizes = ["?"] * 4 if memory is None else [_show(size) for size in memory]
        total = "out of memory" if memory is None else _show(memory.total)
        verdict = "yes" if fits else "no"
        rows.append((str(number), *sizes, total, verdict, f"{seconds:.1f} s"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    title = f"limit: {_show(limit * (1 - headroom))} per device"
    if headroom:
        title += f", {_show(limit)} less {headroom:.0%} headroom"
    return "\n".join([title, *lines])


def _draw(plan: MicrobatchPlan, ax: Any) -> None:
    """Stacked bars, and the limit as a line across them."""
    known = [c for c in plan.candidates if c.memory is not None]
    names = [str(c.num_microbatches) for c in known]
    largest = max(plan.memory_limit, *(c.memory.total for c in known if c.memory))
    unit, name = next(
        (1024**power, f"{letter}iB")
        for power, letter in ((3, "G"), (2, "M"), (1, "K"))
        if largest >= 1024**power or power == 1
    )
    bottom = [0.0] * len(known)
    for label, part, color in (
        ("arguments", lambda m: m.arguments, "#5f6368"),
        ("outputs, not aliased", lambda m: m.outputs - m.aliased, "#bdc1c6"),
        ("temporaries", lambda m: m.temporaries, "#1a73e8"),
    ):
        heights = [part(c.memory) / unit for c in known]
        ax.bar(names, heights, bottom=bottom, label=label, color=color)
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    usable = plan.memory_limit * (1 - plan.headroom) / unit
    ax.axhline(usable, color="#d93025", ls="--", label="what may be used")
    ax.set(xlabel="micro-batches", ylabel=f"{name} per device")
    ax.legend(frameon=False)
