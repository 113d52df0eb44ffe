"""How many micro-batches a step needs to fit into memory, known before it runs.

The compiler knows how much memory a program takes. The planner compiles the step for
some numbers of micro-batches, as few as it can, and runs none of them.
"""

import dataclasses
import inspect
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from optax_accum import _validate
from optax_accum.diagnose import _memory
from optax_accum.diagnose._memory import show_size

Step = Any  # a function; or lowered or compiled, by JAX or by Flax, which has its own
Argument = Any  # of the step: arrays or their shapes, in any structure

_logger = logging.getLogger("optax_accum")


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

    def __str__(self) -> str:
        """As it is logged."""
        takes = "too much to compile"
        if self.memory is not None:
            takes = show_size(self.memory.total)
        verdict = "fits" if self.fits else "does not fit"
        return (
            f"{_micro_batches(self.num_microbatches)}: {takes}, {verdict} "
            f"(compiled in {self.seconds:.1f} s)"
        )


@dataclasses.dataclass(frozen=True, repr=False)
class MicrobatchPlan:
    """The result of `plan_microbatches`; ``print(plan)`` shows it as a table.

    Attributes:
      num_microbatches: The fewest micro-batches that fit.
      step: The step compiled for them, ready to be called with arrays like `args`.
      candidates: All numbers that were tried, each a named tuple of
        ``num_microbatches``, ``memory`` (bytes on each device: ``arguments``,
        ``outputs``, ``temporaries``, ``aliased``, ``total``), ``fits`` and ``seconds``
        (to compile).
      memory_limit: The bytes that a device has for the step.
      headroom: The fraction of them that must stay free.
    """

    num_microbatches: int
    step: Step
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


def plan_microbatches(
    make_step: Callable[[int], Step],
    *args: Argument,
    batch_size: int | None = None,
    candidates: Iterable[int] | None = None,
    memory_limit: int | None = None,
    headroom: float = 0.1,
) -> MicrobatchPlan:
    """Finds the fewest micro-batches with which a training step fits into memory.

    Use it before training, instead of trying sizes until one runs out of memory. The
    step is compiled for a few numbers of micro-batches, and never run. On each device
    it takes

        arguments + outputs + temporaries − aliased

    bytes, as XLA reports. The search doubles its way through the candidates until one
    fits, then bisects; each candidate is compiled at most once.

    Args:
      make_step: ``make_step(num_microbatches)`` returns the training step, a function
        of `args`: a `jax.jit` or `jax.pmap` with its donated arguments, or a plain
        function. If the shapes of its arguments depend on the number, as in a step for
        `accumulate`, return ``step.lower(...)``, and pass no `args`.
      *args: The arguments of the step, arrays or `jax.ShapeDtypeStruct` (with a
        sharding, if there are several devices).
      batch_size: How many examples the global batch has. Its divisors are the
        candidates, unless you pass `candidates`.
      candidates: The numbers of micro-batches to choose from.
      memory_limit: The bytes that the step may take on each device: ``16 * 2**30`` for
        16 GiB. By default the memory that the device reports, minus what arrays other
        than `args` use. CPUs report nothing.
      headroom: The fraction of `memory_limit` to leave free, for what the compiler does
        not know: fragmentation, libraries, other programs.

    Returns:
      A `MicrobatchPlan`: the number, the compiled step, and all that was tried.

    Raises:
      TypeError: An option has the wrong type; `make_step` takes more than a number, or
        does not return a function; the step is already lowered, and there are `args`.
      ValueError: Neither `batch_size` nor `candidates` is given; candidates are < 1 or
        do not divide `batch_size`; `memory_limit` is missing, or below 1024; `headroom`
        is not in [0, 1); nothing fits (the message shows what was tried).

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
      ...     make_step, w, x, batch_size=4096, memory_limit=8 * 2**20
      ... )
      >>> plan.num_microbatches > 1 and plan.candidates[0].fits
      False
      >>> new_w = plan.step(jnp.ones((256, 256)), jnp.ones((4096, 256)))

    Note:
      To see each candidate as it is compiled, use
      ``logging.basicConfig(level=logging.INFO)``; the logger is ``"optax_accum"``.

      With several processes, all must call it, with the same arguments. They agree on
      the smallest limit.

      If memory does not fall with the number of micro-batches, the plan fits, and the
      next smaller number that was tried does not.
    """
    _check_makes_steps(make_step)
    numbers = _numbers(batch_size, candidates)
    _validate.fraction("headroom", headroom, "the fraction of the memory to leave free")
    limit = _memory.agreed(_limit(memory_limit, args))
    usable = limit * (1 - headroom)

    tried: list[Candidate] = []
    sizes: dict[int, float] = {}
    fewest, fitting = None, None
    while (number := next_to_try(numbers, sizes, usable)) is not None:
        _logger.info("compiling the step with %s", _micro_batches(number))
        start = time.perf_counter()
        step = make_step(number)
        compiled = _compile(step, args)
        seconds = time.perf_counter() - start
        memory = None if compiled is None else _memory.Memory.of(compiled)
        sizes[number] = float("inf") if memory is None else memory.total
        tried.append(Candidate(number, memory, sizes[number] <= usable, seconds))
        _logger.info("%s", tried[-1])
        if tried[-1].fits:
            # Nothing is tried above what fits, so this is the fewest so far.
            fewest, fitting = number, compiled
        if memory and memory.arguments > usable and not _has_arguments(step):
            break  # They are the same for every number, so no other one fits.

    tried.sort()
    if fewest is None:
        raise ValueError(
            f"nothing fits into `memory_limit` of {show_size(limit)}, less `headroom` "
            f"{headroom:.0%}. {_remedy(tried, usable)}:\n"
            f"{_table(tried, limit, headroom)}"
        )
    return MicrobatchPlan(fewest, fitting, tuple(tried), limit, headroom)


def _check_makes_steps(make_step: Callable[[int], Step]) -> None:
    """Raises for what takes more than a number, such as the step itself."""
    try:
        signature = inspect.signature(make_step)
    except (TypeError, ValueError):  # Some have no signature.
        return
    try:
        signature.bind(1)
    except TypeError as error:
        raise TypeError(
            "`make_step` must take the number of micro-batches alone and return the "
            f"training step; got a function with the arguments {signature}. Write a "
            "function of k that returns the step with num_microbatches=k"
        ) from error


def _numbers(batch_size: int | None, candidates: Iterable[int] | None) -> list[int]:
    """The numbers to choose from, the smallest first."""
    size = batch_size
    if size is not None:
        size = _validate.whole_number("batch_size", size)
    if candidates is None and size is not None:
        return [n for n in range(1, size + 1) if size % n == 0]
    numbers = sorted(
        {_validate.whole_number("candidates", n) for n in candidates or ()}
    )
    if not numbers:
        raise ValueError(
            "`batch_size` or `candidates` is needed: the size of the global batch, of "
            "which all divisors are tried, or the numbers of micro-batches to choose "
            f"from; got batch_size={batch_size} and candidates={candidates}"
        )
    wrong = [n for n in numbers if size is not None and size % n]
    if wrong:
        raise ValueError(
            f"`candidates` {', '.join(map(str, wrong))} do not divide `batch_size="
            f"{size}`. Leave `candidates` out for all of its divisors, or leave "
            "`batch_size` out for steps that take any number"
        )
    return numbers


def _limit(memory_limit: int | None, args: tuple[Argument, ...]) -> int:
    """The bytes that the step may take on each of this process's devices."""
    if memory_limit is None:
        return _memory.available(args)
    limit = _validate.whole_number("memory_limit", memory_limit)
    if limit < 1024:
        raise ValueError(
            f"`memory_limit` is {limit} bytes, less than any step takes. It counts "
            f"bytes: for {limit} GiB pass {limit} * 2**30"
        )
    return limit


def next_to_try(
    numbers: Sequence[int], sizes: Mapping[int, float], limit: float
) -> int | None:
    """Which of the ascending `numbers` to measure next, or ``None`` at the end.

    `sizes` has what was measured so far. The search asks at distances that double,
    until something fits, and then bisects down to a neighbour that does not. If nothing
    fits up to the last, it halves the gaps next to the smallest size.

    If sizes fall, the first number that fits is found. If they do not, one that fits,
    and the next smaller one that was measured does not.
    """
    tried = [i for i, number in enumerate(numbers) if number in sizes]
    fitting = [i for i in tried if sizes[numbers[i]] <= limit]
    last = len(numbers) - 1
    if fitting:
        below = max((i for i in tried if i < fitting[0]), default=-1)
        index = (below + fitting[0] + 1) // 2
    elif last not in tried:
        index = min(2 ** len(tried) - 1, last)
    else:
        smallest = min(tried, key=lambda i: sizes[numbers[i]])
        below = max((i for i in tried if i < smallest), default=smallest)
        above = min((i for i in tried if i > smallest), default=smallest)
        wider = max(
            (below, smallest), (smallest, above), key=lambda gap: gap[1] - gap[0]
        )
        index = sum(wider) // 2
    # The middle of a gap with nothing in it is one of its ends.
    return None if index in tried else numbers[index]


def _has_arguments(step: Step) -> bool:
    """Whether `step` is lowered or compiled already, with arguments of its own."""
    return hasattr(step, "compile") or hasattr(step, "memory_analysis")


def _compile(step: Step, args: tuple[Argument, ...]) -> Step | None:
    """`step` compiled, or ``None`` where the compiler ran out of memory."""
    if args and _has_arguments(step):
        raise TypeError(
            "`make_step` returned a step that is already lowered, with its arguments; "
            f"got {len(args)} more in `args`. Leave these out"
        )
    if hasattr(step, "memory_analysis"):
        return step
    if not _has_arguments(step):
        if not callable(step):
            raise TypeError(
                "`make_step` must return the training step itself, a function of "
                f"`args`, not the result of calling it; got {type(step).__name__}"
            )
        step = step if hasattr(step, "lower") else jax.jit(step)
        step = step.lower(*args)
    try:
        return step.compile()
    except jax.errors.JaxRuntimeError as error:
        # XLA may refuse to compile what does not fit the device.
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None


def _remedy(candidates: Sequence[Candidate], usable: float) -> str:
    """What to do where nothing fits."""
    memories = [c.memory for c in candidates if c.memory is not None]
    if not memories:
        return "Use a device with more memory, or a smaller model"
    least = min(memories, key=lambda m: m.total)
    kept = least.total - least.temporaries
    found = f"The least is {show_size(least.total)}"
    if kept > usable:
        return (
            f"{found}, of which {show_size(kept)} are arguments and outputs, which "
            "more micro-batches do not change: donate them, or shard the parameters or "
            "the optimizer's state"
        )
    return (
        f"{found}. If more micro-batches do not lower the temporaries, these are "
        "the sum of the gradients and one micro-batch's activations: use "
        "jax.checkpoint, give it more memory, or the step a smaller model"
    )


def _micro_batches(number: int) -> str:
    return f"{number} micro-batch" if number == 1 else f"{number} micro-batches"


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


def _table(candidates: Sequence[Candidate], limit: int, headroom: float) -> str:
    """All that was tried, in bytes per device."""
    rows: list[tuple[str, ...]] = [_HEADINGS]
    for number, memory, fits, seconds in candidates:
        sizes = ["?"] * 4 if memory is None else [show_size(size) for size in memory]
        total = "out of memory" if memory is None else show_size(memory.total)
        verdict = "yes" if fits else "no"
        rows.append((str(number), *sizes, total, verdict, f"{seconds:.1f} s"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
    title = f"limit: {show_size(limit * (1 - headroom))} per device"
    if headroom:
        title += f", {show_size(limit)} less {headroom:.0%} headroom"
    return "\n".join([title, *lines])
