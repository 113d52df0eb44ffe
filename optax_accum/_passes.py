"""A function in micro-batches, with a derivative of its own.

The forward pass runs `fun` on one micro-batch after another and keeps the outputs only.
The backward pass runs each again, and adds its gradient straight into one sum. That is
exact for whatever is made of the outputs, such as a loss that compares all examples
with each other.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec as P

from optax_accum import (
    _accumulators,
    _arguments,
    _carry,
    _flow,
    _obstacle,
    _program,
    _split,
    _tree,
    _validate,
    _window,
)
from optax_accum._accumulators import Accumulator, Part
from optax_accum._backward import Pullback
from optax_accum._microbatching import Microbatching
from optax_accum._program import Inputs, Program, Ran, Shared
from optax_accum._types import Args, Batch, DType, Kwargs, Scalar, Tree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Microbatching):
    """The options of `microbatch`, checked."""

    outputs: Tree
    accumulator_dtype: DType

    who: ClassVar[str] = "the function"
    inside_axis: ClassVar[str] = (
        "Leave `mesh` and `axis_name` out: outputs are each device's own there, and "
        "the loss gathers them"
    )

    def without_functions(self) -> "Settings":
        """These, without what may hold arrays."""
        nothing: Any = {"fun": None, "weight": None, "num_real_microbatches": None}
        return dataclasses.replace(self, functions={}, **nothing)

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
        specs = _accumulators.specs(self.outputs, self.devices.axis_name, P()), P()

        def on_device(
            call: _arguments.Call, number: int | Scalar | None
        ) -> tuple[Tree, list[Any]]:
            return _run(self, call, split, number)

        run, arrays = self.on_devices(on_device, call, split, number, specs)
        outputs, written = run(call.batch, arrays)
        if call.carry_place is None:
            return outputs
        return outputs, _carry.after(call.carry, written)


def _run(
    settings: Settings,
    call: _arguments.Call,
    split: _split.Split,
    number: int | Scalar | None,
) -> tuple[Tree, list[Any]]:
    """All micro-batches of one device: the outputs, and the carry's written leaves."""
    inputs, traced = _program.trace(settings, call, split, number)
    shapes = traced.shapes.outputs
    plan = _accumulators.plan("outputs", settings.outputs, shapes, split)
    accumulators = jax.tree.leaves(plan)
    known_number = None if isinstance(number, jax.Array) else number
    passes = _Passes(
        settings=settings.without_functions(),
        split=split,
        known_number=known_number,
        is_weighted=settings.weight is not None,
        traced=traced,
        accumulators=accumulators,
    )
    totals = passes.differentiable(inputs)
    weight = settings.devices.reduce("sum", totals.weight, totals.weight)
    finished = [
        a.finish(a.over_devices(carried, settings.devices.axis_name), weight)
        for a, carried in zip(accumulators, totals.outputs, strict=True)
    ]
    carry = settings.devices.merge_carry(
        totals.carry, inputs.carry, totals.weight, weight
    )
    # A constant to derivatives, as it is in the loop.
    carry = lax.stop_gradient(carry)
    return jax.tree.unflatten(jax.tree.structure(shapes), finished), carry


class _Totals(NamedTuple):
    """What the forward pass carries from micro-batch to micro-batch."""

    outputs: list[Tree]  # what each leaf's accumulator carries
    carry: list[Any]  # the leaves that `fun` writes, and None for the others
    weight: Scalar
    carries: list[Any]  # the `carry` of every micro-batch, if the backward pass follows


class _Sums(NamedTuple):
    """What the backward pass carries from micro-batch to micro-batch."""

    shared: Shared  # S, of what all micro-batches are given
    batch: list[Any]  # the gradients of the examples, `Split.apart`


@dataclasses.dataclass(frozen=True)
class _Passes:
    """Both passes of one call on one device.

    Each is a function of `Inputs` and of no other array. The backward pass takes them
    as two trees: `own` has the leaves that are differentiated, and ``None`` elsewhere,
    and `others` the reverse.

    JAX keeps the backward pass for as long as the program, and so all that is in here:
    neither an array nor a function of the user's, which may close over one.
    """

    settings: Settings
    split: _split.Split
    known_number: Any  # how many micro-batches to run, or ``None`` for all
    is_weighted: bool  # whether the user gave a weight
    traced: _program.Traced
    accumulators: list[Accumulator]

    def differentiable(self, inputs: Inputs) -> _Totals:
        """The forward pass, whose derivative is the backward pass."""

        @jax.custom_vjp
        def run(inputs: Inputs) -> _Totals:
            return self._forward(inputs)

        def forward(primals: Any) -> tuple[_Totals, Any]:
            inputs, own, others = _taken_apart(primals)
            totals = self._forward(inputs, own)
            return totals._replace(carries=[]), (own, others, totals.carries)

        def backward(saved: Any, cotangents: _Totals) -> tuple[Inputs]:
            own, others, carries = saved
            gradients = functools.partial(
                self._gradients, own, others, carries, cotangents.outputs
            )
            return (self.settings.in_place_if_possible(gradients, _obstacle.in_jax()),)

        run.defvjp(forward, backward, symbolic_zeros=True)
        return run(inputs)

    def _loop(self, step: Any, totals: Any, inputs: Inputs) -> Any:
        """`totals` after ``step(program, totals, index)`` of every micro-batch."""
        programs = self.traced.programs
        return self.settings.loop(
            functools.partial(step, programs[0]),
            functools.partial(step, programs[-1]),
            totals,
            self.split,
            self._number(inputs),
        )

    def _number(self, inputs: Inputs) -> int | Scalar | None:
        """How many micro-batches to run, or ``None`` for all."""
        return self.known_number if inputs.number is None else inputs.number

    def _part(
        self, program: Program, index: Scalar, weight: Scalar, inputs: Inputs
    ) -> Part:
        """Which micro-batch this is."""
        last = self.settings.last_number(self.split, self._number(inputs))
        counted = weight != 0 if self.is_weighted else True
        return Part(index, program.size, weight, counted, last)

    # --- Forward ---

    def _forward(self, inputs: Inputs, own: Inputs | None = None) -> _Totals:
        """One micro-batch after another, with what a derivative of `own` needs."""
        shapes = self.traced.shapes
        keeps_carries = own is not None
        start = _Totals(
            outputs=[a.start(shapes.weight) for a in self.accumulators],
            carry=inputs.carry,
            weight=_tree.vary_like(_tree.zeros_like(shapes.weight), shapes.weight),
            carries=jax.tree.map(self._stack, inputs.carry) if keeps_carries else [],
        )

        def step(program: Program, totals: _Totals, index: Scalar) -> _Totals:
            part = program.take(inputs.batch, index)
            if own is not None and _flow.has_own_rules(program.jaxpr):
                # A second derivative is that of the rules, as if nothing were split.
                run = _of_primals(program, totals.carry, index, inputs, part)
                ran, _ = jax.vjp(run, _primals(own, part))
            else:
                ran = program(totals.carry, index, inputs.shared, part)
            info = self._part(program, index, ran.weight, inputs)
            rows = zip(
                self.accumulators,
                totals.outputs,
                jax.tree.leaves(ran.outputs),
                strict=True,
            )
            carries = jax.tree.map(
                lambda xs, x: lax.dynamic_update_index_in_dim(xs, x, index, 0),
                totals.carries,
                totals.carry if keeps_carries else [],
            )
            return _Totals(
                outputs=[a.add(carried, output, info) for a, carried, output in rows],
                carry=_tree.kept_like(totals.carry, ran.carry),
                weight=totals.weight + ran.weight,
                carries=carries,
            )

        return self._loop(step, start, inputs)

    def _stack(self, x: jax.Array) -> jax.Array:
        """Place for something like `x` from every micro-batch."""
        return lax.broadcast(_tree.zeros(x), (self.split.num_microbatches,))

    # --- Backward ---

    def _gradients(
        self,
        own: Inputs,
        others: Inputs,
        carries: list[Any],
        cotangents: list[Any],
        in_place: bool,
    ) -> Inputs:
        """Each micro-batch again, one after another, and backward.

        Args:
          own: What is differentiated.
          others: The other inputs.
          carries: The leaves of the carry that each micro-batch was given.
          cotangents: Of what each of the accumulators carries in the end.
          in_place: Whether the backward pass adds to the sum by itself.
        """
        inputs = _tree.merge(own, others)
        shapes = jax.tree.leaves(self.traced.shapes.outputs)
        active = {
            i: cotangent
            for i, cotangent in enumerate(cotangents)
            if not isinstance(cotangent, SymbolicZero) and _tree.is_inexact(shapes[i])
        }
        # Those of weight 0 are selected away only if every output is a sum or a mean.
        # What has an entry for each of them keeps it, and its gradient counts.
        masks = self.is_weighted and not any(
            self.accumulators[i].keeps_all for i in active
        )

        def step(program: Program, sums: _Sums, index: Scalar) -> _Sums:
            part = program.take(inputs.batch, index)
            carry = jax.tree.map(
                lambda xs: lax.dynamic_index_in_dim(xs, index, 0, keepdims=False),
                carries,
            )

            run = _of_primals(program, carry, index, inputs, part)

            def outputs(primals: _Primals) -> tuple[list[jax.Array], Scalar]:
                ran = run(primals)
                leaves = jax.tree.leaves(ran.outputs)
                return [leaves[i] for i in active], ran.weight

            primals = _primals(own, part)
            results, function, weight = jax.vjp(outputs, primals, has_aux=True)
            info = self._part(program, index, weight, inputs)
            rows = zip(active.items(), results, strict=True)
            parts = [
                _tree.vary_like(self.accumulators[i].cotangent(x, info), result)
                for (i, x), result in rows
            ]
            pullback = Pullback(function, parts, primals)
            if in_place:
                _obstacle.check(pullback, program.jaxpr, is_masked=masks)
            counted = info.counted if masks else True
            return self._added(sums, pullback, index, counted, in_place)

        def guarded_step(program: Program, sums: _Sums, index: Scalar) -> _Sums:
            if not self._needs_branch(program):
                return step(program, sums, index)
            return lax.cond(
                _tree.opaque_true(),
                lambda sums: step(program, sums, index),
                lambda sums: sums,
                sums,
            )

        sums = self._loop(guarded_step, self._no_sums(own, in_place), inputs)
        rows = zip(sums.batch, self.split.axes, strict=True)
        batch = [None if x is None else self.split.joined(x, axis) for x, axis in rows]
        shared = _tree.cast_like(sums.shared, own.shared)
        return Inputs(shared, batch, [None] * len(own.carry), number=None)

    def _needs_branch(self, program: Program) -> bool:
        """Whether a step has to be in a branch to be run again.

        Outside of a compiled loop XLA would take the second run for the first one, and
        keep all activations from then on. It does not if the second is in a branch.
        """
        if self.split.num_microbatches == 1:
            return False  # There is nothing to be saved.
        is_last = program is not self.traced.programs[0]
        return is_last or self.split.whole == 1 or self.settings.is_unrolled

    def _no_sums(self, own: Inputs, in_place: bool) -> _Sums:
        """Before the first micro-batch."""
        dtype = self.settings.accumulator_dtype
        _validate.accumulator_fits("arguments", own.shared.arguments, dtype)
        sums = _window.zeros(own.shared, dtype)
        sums = jax.tree.map(_tree.vary_like, sums, own.shared)
        if in_place:
            self.settings.may_add_in_place(
                _obstacle.in_sums("arguments", sums.arguments, own.shared.arguments)
            )
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
        # The gradient of this micro-batch's own examples starts from zeros.
        before = sums.shared, _tree.zeros(pullback.like[1])
        if in_place:
            shared, part = pullback.added_to(before, None, counted=counted)
        else:
            one = jnp.ones([])
            shared, part = _window.add(
                before, pullback.gradients(), one, "sum", counted=counted
            )
        rows = zip(sums.batch, part, self.split.axes, strict=True)
        batch = [
            None if x is None else self.split.put(x, g, index, axis)
            for x, g, axis in rows
        ]
        return _Sums(shared, batch)


_Primals = tuple[Shared, list[Any]]


def _primals(own: Inputs, part: Batch) -> _Primals:
    """What is differentiated of one micro-batch; ``None`` for all other leaves."""
    return own.shared, _tree.kept_like(own.batch, part)


def _of_primals(
    program: Program, carry: list[Any], index: Scalar, inputs: Inputs, part: Batch
) -> Callable[[_Primals], Ran]:
    """`program` as a function of `_primals`."""

    def run(primals: _Primals) -> Ran:
        shared, own_part = primals
        shared = _tree.merge(shared, inputs.shared)
        return program(carry, index, shared, _tree.merge(own_part, part))

    return run


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


def _check_reverse_mode(call: _arguments.Call) -> None:
    """Raises under `jax.jvp`, if its tracers come to here.

    JAX itself refuses, but speaks of a `custom_vjp`. Under `jax.jvp` of `jax.grad`,
    which works, the tracers are those of `jax.grad`.
    """
    leaves = jax.tree.leaves((call.args, call.kwargs, call.batch))
    kinds = {type(x).__name__ for x in leaves if isinstance(x, jax.core.Tracer)}
    if "JVPTracer" in kinds and "LinearizeTracer" not in kinds:
        raise TypeError(
            "`oa.microbatch` was called under jax.jvp (or jax.jacfwd), but only has a "
            "reverse mode, for jax.grad and jax.vjp. Forward mode has no backward "
            "pass to save memory in: use the function itself there"
        )
