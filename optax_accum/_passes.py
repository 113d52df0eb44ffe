"""A function in micro-batches, with a derivative of its own.

The forward pass runs `fun` on one micro-batch after another and keeps the outputs only.
The backward pass runs each again, and adds its gradient straight into one sum. That is
exact for whatever is made of the outputs, such as a loss that compares all examples
with each other.
"""

import dataclasses
import functools
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec as P

from optax_accum import (
    _accumulators,
    _arguments,
    _backward,
    _obstacle,
    _program,
    _split,
    _tree,
    _whole,
    _window,
)
from optax_accum._accumulators import Accumulator, Part
from optax_accum._backward import Pullback
from optax_accum._batching import Batching
from optax_accum._program import Inputs, Program, Whole
from optax_accum._types import Args, Batch, DType, Kwargs, Scalar, Tree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Batching):
    """The options of `microbatch`, checked."""

    outputs: Tree
    accumulator_dtype: DType

    inside_axis: ClassVar[str] = (
        "Leave `mesh` and `axis_name` out: outputs are each device's own there, and "
        "the loss gathers them"
    )

    def __call__(self, args: Args, kwargs: Kwargs) -> Any:
        """What the user gets."""
        call = self.roles.bind(self.fun, args, kwargs)
        for name, argument in call.named():
            _arguments.check_no_nnx_module(name, argument, "microbatch")
        return self.run_bound(call)

    def run_bound(self, call: _arguments.Call) -> Any:
        """As `__call__`, of arguments that are bound to their roles."""
        _check_reverse_mode(call)
        split, number = self.checked(call)
        given = call.args, call.kwargs, number
        arrays = _tree.arrays_in(given)

        def on_device(batch: Batch, arrays: list[Any]) -> tuple[Tree, list[Any]]:
            args, kwargs, number = _tree.filled(given, arrays)
            mine = call._replace(args=args, kwargs=kwargs, batch=batch)
            return _run(self, mine, split, number)

        @jax.jit
        def run(batch: Batch, arrays: list[Any]) -> tuple[Tree, list[Any]]:
            specs = _accumulators.specs(self.outputs, self.devices.axis_name), P()
            return self.devices.on_each_device(
                on_device, batch, arrays, split.axes, specs
            )

        shows_values = jax.config.jax_disable_jit  # type: ignore[attr-defined]
        if self.is_split(split) and not shows_values:
            _whole.check_traced(run, call.batch, arrays)
        outputs, written = run(call.batch, arrays)
        if call.carry_place is None:
            return outputs
        # What `fun` has not written is not an output, and stays the very same arrays.
        return outputs, _tree.filled(_tree.as_jax_arrays(call.carry), written)


def _run(
    settings: Settings,
    call: _arguments.Call,
    split: _split.Split,
    number: int | Scalar | None,
) -> tuple[Tree, list[Any]]:
    """All micro-batches of one device: the outputs, and the carry's written leaves."""
    array = number if isinstance(number, jax.Array) else None
    traced = _program.trace(settings, call, split, array)
    accumulators = _accumulators.plan(
        "outputs", settings.outputs, traced.shapes.outputs, split
    )
    passes = _Passes(
        settings=settings,
        split=split,
        number=number if array is None else None,
        traced=traced,
        accumulators=accumulators,
    )
    totals = passes.differentiable(traced.inputs)
    # These are constants to derivatives.
    own, carry = lax.stop_gradient((totals.weight, totals.carry))
    weight = settings.devices.reduce("sum", own, own)
    finished = [
        a.finish(a.over_devices(carried, settings.devices.axis_name), weight)
        for a, carried in zip(accumulators, totals.outputs, strict=True)
    ]
    before = traced.inputs.carry
    carry = settings.devices.merge_carry(carry, before, own, weight)
    structure = jax.tree.structure(traced.shapes.outputs)
    return jax.tree.unflatten(structure, finished), carry


class _Totals(NamedTuple):
    """What goes from micro-batch to micro-batch in the forward pass."""

    outputs: list[Tree]  # what each leaf's accumulator carries
    carry: list[Any]  # the leaves that `fun` writes, and None for the others
    weight: Scalar
    seen: list[Any]  # the `carry` that each micro-batch was given, if it is asked for


class _Sums(NamedTuple):
    """What goes from micro-batch to micro-batch in the backward pass."""

    whole: Whole  # S, of what every micro-batch is given whole
    batch: list[Any]  # the gradients of the examples, `Split.apart`


@dataclasses.dataclass(frozen=True)
class _Passes:
    """Both passes of one call on one device.

    A pass is a function of `Inputs`, and depends on no other array. For a gradient
    these are in two parts: `own` has what it is asked for, and ``None`` elsewhere, and
    `others` the rest.
    """

    settings: Settings
    split: _split.Split
    number: Any  # how many micro-batches to run, if that is known
    traced: _program.Traced  # of which `inputs` are not to be used here
    accumulators: list[Accumulator]

    def differentiable(self, inputs: Inputs) -> _Totals:
        """The forward pass, whose derivative is the backward pass."""

        @jax.custom_vjp
        def run(inputs: Inputs) -> _Totals:
            return self._forward(inputs, keeps_seen=False)

        def forward(primals: Any) -> tuple[_Totals, Any]:
            inputs, own, others = _taken_apart(primals)
            totals = self._forward(inputs, keeps_seen=True)
            return totals._replace(seen=[]), (own, others, totals.seen)

        def backward(saved: Any, cotangents: _Totals) -> tuple[Inputs]:
            own, others, seen = saved
            return (self._backward(own, others, seen, cotangents.outputs),)

        run.defvjp(forward, backward, symbolic_zeros=True)
        return run(inputs)

    def _loop(self, step: Any, totals: Any, number: Scalar | None) -> Any:
        """`totals` after ``step(program, totals, index)`` of every micro-batch."""
        programs = self.traced.programs
        return self.settings.loop(
            functools.partial(step, programs[0]),
            functools.partial(step, programs[-1]),
            totals,
            self.split,
            self.number if number is None else number,
        )

    def _part(
        self, program: Program, index: Scalar, weight: Scalar, number: Scalar | None
    ) -> Part:
        """Which micro-batch this is."""
        count: Any = self.split.num_microbatches
        if number is not None:
            count = jnp.clip(number, 0, count)
        elif self.number is not None:
            count = self.number
        counted = True if self.settings.weight is None else weight != 0
        return Part(index, program.size, weight, counted, count - 1)

    # --- Forward ---

    def _forward(self, inputs: Inputs, *, keeps_seen: bool) -> _Totals:
        """One micro-batch after another."""
        shapes = self.traced.shapes
        start = _Totals(
            outputs=[a.start(shapes.weight) for a in self.accumulators],
            carry=inputs.carry,
            weight=_tree.vary_like(_tree.zeros_like(shapes.weight), shapes.weight),
            seen=jax.tree.map(self._stack, inputs.carry) if keeps_seen else [],
        )

        def step(program: Program, totals: _Totals, index: Scalar) -> _Totals:
            part = program.take(inputs.batch, index)
            ran = program(totals.carry, index, inputs.whole, part)
            place = self._part(program, index, ran.weight, inputs.number)
            rows = zip(
                self.accumulators,
                totals.outputs,
                jax.tree.leaves(ran.outputs),
                strict=True,
            )
            seen = jax.tree.map(
                lambda xs, x: lax.dynamic_update_index_in_dim(xs, x, index, 0),
                totals.seen,
                totals.carry if keeps_seen else [],
            )
            return _Totals(
                outputs=[a.add(carried, output, place) for a, carried, output in rows],
                carry=_tree.kept_like(totals.carry, ran.carry),
                weight=totals.weight + ran.weight,
                seen=seen,
            )

        return self._loop(step, start, inputs.number)

    def _stack(self, x: jax.Array) -> jax.Array:
        """Place for something like `x` from every micro-batch."""
        return lax.broadcast(_tree.zeros(x), (self.split.num_microbatches,))

    # --- Backward ---

    def _backward(
        self, own: Inputs, others: Inputs, seen: list[Any], cotangents: list[Any]
    ) -> Inputs:
        """The gradients of `own`, added in place if nothing is in the way."""
        reason = _obstacle.in_jax()
        if self.settings.in_place is False:
            reason = "`in_place` is False"
        for program in self.traced.programs:
            reason = reason or _obstacle.in_forward_pass(program.jaxpr)
        gradients = functools.partial(self._gradients, own, others, seen, cotangents)
        if self.settings.check_in_place(reason):
            try:
                return gradients(in_place=True)
            except _backward.NotInPlaceError as error:
                reason = str(error)
            self.settings.check_in_place(reason)
        return gradients(in_place=False)

    def _gradients(
        self,
        own: Inputs,
        others: Inputs,
        seen: list[Any],
        cotangents: list[Any],
        *,
        in_place: bool,
    ) -> Inputs:
        """Each micro-batch again, one after another, and backward.

        Args:
          own: What the gradients are asked of.
          others: The other inputs.
          seen: The leaves of the carry that each micro-batch was given.
          cotangents: Of what each of the accumulators carries in the end.
          in_place: Whether the backward pass adds to the sum by itself.
        """
        inputs = _tree.merge(own, others)
        active = {
            i: cotangent
            for i, cotangent in enumerate(cotangents)
            if not isinstance(cotangent, SymbolicZero)
            and self.accumulators[i].is_inexact
        }
        # NaN is kept out of sums, but not out of what has an entry for each.
        masks = self.settings.weight is not None and not any(
            self.accumulators[i].keeps_all for i in active
        )

        def step(program: Program, sums: _Sums, index: Scalar) -> _Sums:
            part = program.take(inputs.batch, index)
            carry = jax.tree.map(
                lambda xs: lax.dynamic_index_in_dim(xs, index, 0, keepdims=False), seen
            )

            def outputs(mine: Any) -> tuple[list[jax.Array], Scalar]:
                whole, own_part = mine
                ran = program(
                    carry,
                    index,
                    _tree.merge(whole, others.whole),
                    _tree.merge(own_part, part),
                )
                leaves = jax.tree.leaves(ran.outputs)
                return [leaves[i] for i in active], ran.weight

            mine = own.whole, _tree.kept_like(own.batch, part)
            results, function, weight = jax.vjp(outputs, mine, has_aux=True)
            place = self._part(program, index, weight, inputs.number)
            rows = zip(active.items(), results, strict=True)
            parts = [
                _tree.vary_like(self.accumulators[i].cotangent(x, place), result)
                for (i, x), result in rows
            ]
            pullback = Pullback(function, parts, mine)
            counted = place.counted if masks else True
            if in_place:
                _check_in_place(pullback, program, masks)
            return self._added(sums, pullback, index, counted, in_place)

        def step_apart(program: Program, sums: _Sums, index: Scalar) -> _Sums:
            if self._is_apart(program):
                return step(program, sums, index)
            return lax.cond(
                _tree.opaque_true(),
                lambda sums: step(program, sums, index),
                lambda sums: sums,
                sums,
            )

        sums = self._loop(step_apart, self._no_sums(own, in_place), inputs.number)
        rows = zip(sums.batch, self.split.axes, strict=True)
        batch = [None if x is None else self.split.joined(x, axis) for x, axis in rows]
        whole = _tree.cast_like(sums.whole, own.whole)
        return Inputs(whole, batch, [None] * len(own.carry), number=None)

    def _is_apart(self, program: Program) -> bool:
        """Whether XLA sees this in a loop, and so apart from the forward pass.

        It would merge the two, and keep all activations in between; but not of what is
        in a branch.
        """
        if self.split.num_microbatches == 1:
            return True  # There is nothing to be saved.
        is_last = program is not self.traced.programs[0]
        is_alone = is_last or self.split.whole == 1
        return not is_alone and not self.settings.is_unrolled

    def _no_sums(self, own: Inputs, in_place: bool) -> _Sums:
        """Before the first micro-batch."""
        sums = _window.zeros(own.whole, self.settings.accumulator_dtype)
        sums = jax.tree.map(_tree.vary_like, sums, own.whole)
        if in_place:
            self.settings.check_in_place(_obstacle.in_sums(sums, own.whole))
        rows = zip(own.batch, self.split.axes, strict=True)
        batch = [
            None if x is None else self.split.apart(_tree.zeros(x), axis)
            for x, axis in rows
        ]
        return _Sums(sums, batch)

    def _added(
        self,
        sums: _Sums,
        pullback: Pullback,
        index: Scalar,
        counted: bool | Scalar,
        in_place: bool,
    ) -> _Sums:
        """With one more micro-batch in them."""
        # What is of the micro-batch's own examples is added to nothing.
        before = sums.whole, _tree.zeros(pullback.like[1])
        if in_place:
            whole, part = pullback.added_to(before, None, counted=counted)
        else:
            one = jnp.ones([])
            whole, part = _window.add(
                before, pullback.gradients(), one, "sum", counted=counted
            )
        rows = zip(sums.batch, part, self.split.axes, strict=True)
        batch = [
            None if x is None else self.split.put(x, g, index, axis)
            for x, g, axis in rows
        ]
        return _Sums(whole, batch)


def _taken_apart(primals: Any) -> tuple[Inputs, Inputs, Inputs]:
    """``(inputs, own, others)`` from what `jax.custom_vjp` says of the inputs."""
    leaves, structure = jax.tree.flatten(
        primals, is_leaf=lambda x: hasattr(x, "perturbed")
    )
    values = [leaf.value for leaf in leaves]
    is_own = [leaf.perturbed and _tree.is_inexact(leaf.value) for leaf in leaves]
    pairs = list(zip(values, is_own, strict=True))
    own = [x if is_ else None for x, is_ in pairs]
    others = [None if is_ else x for x, is_ in pairs]
    inputs, own, others = (
        jax.tree.unflatten(structure, xs) for xs in (values, own, others)
    )
    return inputs, own, others


def _check_in_place(pullback: Pullback, program: Program, masks: bool) -> None:
    """Raises `NotInPlaceError` if `pullback` cannot add in place."""
    reason = _obstacle.in_program(pullback, program.jaxpr, is_masked=masks)
    if reason is not None:
        raise _backward.NotInPlaceError(reason)


def _check_reverse_mode(call: _arguments.Call) -> None:
    """Raises under `jax.jvp`, as far as its tracers come to here.

    JAX itself refuses, but not before the program is compiled.
    """
    for x in jax.tree.leaves((call.args, call.kwargs, call.batch)):
        if isinstance(x, jax.core.Tracer) and type(x).__name__ == "JVPTracer":
            raise TypeError(
                "`oa.microbatch` was called under jax.jvp (or jax.jacfwd), and has a "
                "reverse mode only, for jax.grad and jax.vjp. Forward mode needs no "
                "backward pass, and so nothing of this: use the function itself there"
            )
