"""A function on one micro-batch, traced: all that it reads becomes an argument.

A `jax.custom_vjp` must not close over tracers, and users' functions do. So the function
is traced, and what it closes over becomes an argument.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from optax_accum import _arguments, _carry, _outputs, _split, _tree, _validate
from optax_accum._microbatching import Microbatching
from optax_accum._types import Batch, Scalar, Tree


class Shared(NamedTuple):
    """What all micro-batches are given, whole.

    Attributes:
      arguments: The arrays among the arguments, with ``None`` for other leaves.
      closed_over: What the function closes over.
      carry: The leaves of the carry that it only reads, and ``None`` for the others.
    """

    arguments: list[Any]
    closed_over: list[Any]
    carry: list[Any]


class Inputs(NamedTuple):
    """All that the outputs of a call depend on.

    Attributes:
      shared: What all micro-batches are given.
      batch: The leaves that are split.
      carry: The leaves of the carry that the function writes, as they are before the
        first micro-batch, and ``None`` for the others.
      number: How many micro-batches are to run, if an array says it.
    """

    shared: Shared
    batch: list[Any]
    carry: list[Any]
    number: Scalar | None


class Ran(NamedTuple):
    """What the function gives on one micro-batch."""

    outputs: Tree
    carry: Tree
    weight: Scalar


class Program(NamedTuple):
    """The function on micro-batches of one size.

    Attributes:
      take: ``take(batch, index)`` takes one out of the batch.
      size: How many examples it has.
      jaxpr: The traced function, which closes over nothing.
      reads: Which of `Shared.closed_over` are its first arguments.
      structure: That of the `Ran` that it returns.
    """

    take: Any
    size: int
    jaxpr: Any
    reads: list[int]
    structure: Any

    def __call__(
        self, carry: list[Any], index: Scalar, shared: Shared, part: Batch
    ) -> Ran:
        # What is written to the carry is a constant to the next micro-batch.
        carry = _tree.merge(lax.stop_gradient(carry), shared.carry)
        constants = [shared.closed_over[i] for i in self.reads]
        function = core.jaxpr_as_fun(core.ClosedJaxpr(self.jaxpr, []))
        leaves = jax.tree.leaves((carry, index, shared.arguments, part))
        outputs = function(*constants, *leaves)
        return jax.tree.unflatten(self.structure, outputs)


class Traced(NamedTuple):
    """A function, traced on micro-batches.

    Attributes:
      programs: For whole micro-batches, and if there is one for the smaller last one.
      shapes: What a whole micro-batch gives.
    """

    programs: list[Program]
    shapes: Ran


def trace(
    options: Microbatching,
    call: _arguments.Call,
    split: _split.Split,
    number: int | Scalar | None,
) -> tuple[Inputs, Traced]:
    """Traces the function on one micro-batch of each size."""
    # The carry is an argument of its own.
    given = (
        [None if i == call.carry_place else x for i, x in enumerate(call.args)],
        call.kwargs,
    )
    arrays = [_varied(x, call.batch) for x in _tree.arrays_in(given)]

    # Under `jax.jit`, one trace serves all who ask.
    @jax.jit
    def run(carry: Tree, index: Scalar, arrays: list[Any], part: Batch) -> Ran:
        args, kwargs = _tree.filled(given, arrays)
        own = call._replace(args=args, kwargs=kwargs)
        number = options.devices.global_index(index, split.num_microbatches)
        args, kwargs = own.for_microbatch(part, carry, number)
        outputs, new_carry = _unpacked(
            call, call.apply(options.fun, args, kwargs), carry
        )
        dtype = _tree.scalar_dtype((outputs, carry, arrays, part))
        if options.weight is None:  # A size may be symbolic, and then not a number.
            weight = jnp.asarray(part[0].shape[split.axes[0]], dtype)
            return Ran(outputs, new_carry, weight)
        weight, known_weight = _validate.weight(
            call.apply(options.weight, args, kwargs), dtype
        )
        if not known_weight:
            # A micro-batch without weight leaves the carry as it was.
            new_carry = jax.tree.map(
                lambda new, old: jnp.where(weight != 0, new, old), new_carry, carry
            )
        return Ran(outputs, new_carry, lax.stop_gradient(weight))

    index = split.indices[0]
    takes = [(take, size, take(call.batch, index)) for take, size in split.takes]
    runs = [_given(run, arrays, part) for _, _, part in takes]
    before = _tree.strongly_typed(call.carry)
    is_written = _carry.is_written(runs, before, index)
    rows = zip(jax.tree.leaves(before), is_written, strict=True)
    read = [None if is_ else _varied(x, call.batch) for x, is_ in rows]
    before = _tree.filled(before, read)
    carry, shapes = _carry.first(runs[0], before, is_written, index)
    closed_over: dict[int, Any] = {}  # by identity
    programs = []
    for take, size, part in takes:
        args = _tree.filled(before, carry), index, arrays, part
        traced, ran = jax.make_jaxpr(run, return_shape=True)(*args)
        closed_over |= {id(x): x for x in traced.consts}
        reads = [[*closed_over].index(id(x)) for x in traced.consts]
        structure = jax.tree.structure(ran)
        jaxpr = _without_constants(traced, jax.tree.leaves(args))
        programs.append(Program(take, size, jaxpr, reads, structure))
    shared = Shared(arrays, [*closed_over.values()], read)
    array = number if isinstance(number, jax.Array) else None
    return Inputs(shared, call.batch, carry, array), Traced(programs, shapes)


def _without_constants(traced: Any, args: list[Any]) -> Any:
    """The traced function of `args`, with its constants as arguments before these."""

    def run(constants: list[Any], args: list[Any]) -> list[Any]:
        return core.jaxpr_as_fun(core.ClosedJaxpr(traced.jaxpr, constants))(*args)

    return jax.make_jaxpr(run)(traced.consts, args).jaxpr


def _given(run: Any, arrays: list[Any], part: Batch) -> Any:
    """A `jax.jit` of ``run(carry, index)``, given the rest."""
    return jax.jit(lambda carry, index: run(carry, index, arrays, part))


def _unpacked(call: _arguments.Call, result: Any, carry: Tree) -> tuple[Tree, Tree]:
    """The outputs and the carry that the function returned for this `carry`."""
    if call.carry_name is None:
        return _tree.as_arrays(result), None
    result, new_carry = _outputs.pair(result, "(outputs, carry)", "`carry_argnum`")
    new_carry = _outputs.checked_carry(call.carry_name, carry, new_carry)
    return _tree.as_arrays(result), new_carry


def _varied(x: Any, batch: Batch) -> Any:
    """`x` as something that varies over devices as the batch does.

    Its gradient then stays local in the loop, and is summed once, after it.
    """
    is_floating = isinstance(x, jax.Array) and _tree.is_inexact(x)
    return _tree.vary_like(x, *batch) if is_floating else x
