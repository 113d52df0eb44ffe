"""A function in micro-batches, with a derivative of its own.

The forward pass runs `fun` on one micro-batch after another and keeps the outputs only.
The backward pass runs each again, and adds its gradient straight into one sum. That is
exact for whatever is made of the outputs, such as a loss that compares all examples
with each other.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.extend import core
from jax.sharding import PartitionSpec as P

from optax_accum import (
    _accumulators,
    _arguments,
    _backward,
    _carry,
    _obstacle,
    _outputs,
    _split,
    _tree,
    _validate,
    _whole,
    _window,
)
from optax_accum._accumulators import Part
from optax_accum._backward import Pullback
from optax_accum._batching import Batching
from optax_accum._types import Args, Batch, DType, Function, Kwargs, Scalar, Tree


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Batching):
    """The options of `microbatch`, checked."""

    outputs: Tree
    weight: Function | None
    accumulator_dtype: DType

    def __call__(self, args: Args, kwargs: Kwargs) -> Any:
        """What the user gets."""
        return self.run_bound(self.roles.bind(self.fun, args, kwargs))

    def run_bound(self, call: _arguments.Call) -> Any:
        """As `__call__`, of arguments that are bound to their roles."""
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
    devices = settings.devices
    passes, inputs = _traced(settings, call, split, number)
    totals = passes.differentiable(inputs)
    # These are constants to derivatives.
    own, carry = lax.stop_gradient((totals.weight, totals.carry))
    weight = devices.reduce("sum", own, own)
    finished = [
        a.finish(a.over_devices(carried, devices.axis_name), weight)
        for a, carried in zip(passes.accumulators, totals.outputs, strict=True)
    ]
    before = _tree.kept_like(carry, inputs.carry)
    carry = devices.merge_carry(carry, before, own, weight)
    return jax.tree.unflatten(
        jax.tree.structure(passes.shapes.outputs), finished
    ), carry


class _Inputs(NamedTuple):
    """All that the passes are a function of.

    Attributes:
      arrays: Those among the arguments, with ``None`` for what is not one.
      closed_over: What `fun` closes over.
      batch: The leaves that are split.
      carry: The carry before the first micro-batch.
      number: How many micro-batches are to run, if an array says it.
    """

    arrays: list[Any]
    closed_over: list[Any]
    batch: list[Any]
    carry: Tree
    number: Scalar | None


class _Ran(NamedTuple):
    """What `fun` gives on one micro-batch."""

    outputs: Tree
    carry: Tree
    weight: Scalar


class _Program(NamedTuple):
    """`fun` on micro-batches of one size, traced, so that it closes over nothing.

    Attributes:
      take: ``take(batch, index)`` takes one out of the batch.
      size: How many examples it has.
      jaxpr: The traced program.
      closed_over: Which of `_Inputs.closed_over` it reads.
      structure: That of the `_Ran` that it returns.
    """

    take: Any
    size: int
    jaxpr: Any
    closed_over: list[int]
    structure: Any

    def __call__(
        self,
        carry: Tree,
        index: Scalar,
        arrays: list[Any],
        part: Batch,
        closed_over: list[Any],
    ) -> _Ran:
        own = [closed_over[i] for i in self.closed_over]
        function = core.jaxpr_as_fun(core.ClosedJaxpr(self.jaxpr, own))
        outputs = function(*jax.tree.leaves((carry, index, arrays, part)))
        return jax.tree.unflatten(self.structure, outputs)


class _Totals(NamedTuple):
    """What goes from micro-batch to micro-batch in the forward pass."""

    outputs: list[Tree]  # what each leaf's accumulator carries
    carry: list[Any]  # the leaves that `fun` writes, and None for the others
    weight: Scalar
    seen: list[Any]  # with which carry each micro-batch ran, for the backward pass


class _Sums(NamedTuple):
    """What goes from micro-batch to micro-batch in the backward pass."""

    whole: Tree  # S, of what every micro-batch is given whole
    batch: list[Any]  # the gradients of the examples


def _traced(
    settings: Settings,
    call: _arguments.Call,
    split: _split.Split,
    number: int | Scalar | None,
) -> tuple["_Passes", _Inputs]:
    """`fun` on a micro-batch as a traced program, and all that it depends on."""
    given = _without_carry(call)
    arrays, before = _tree.arrays_in(given), _tree.strongly_typed(call.carry)
    # What varies over devices gives gradients that stay local until the sum is whole.
    arrays = [_varied(x, call.batch) for x in arrays]
    number_of_all = split.num_microbatches

    # Under `jax.jit`, one trace serves all who ask.
    @jax.jit
    def run(carry: Tree, index: Scalar, arrays: list[Any], part: Batch) -> _Ran:
        args, kwargs = _tree.filled(given, arrays)
        mine = call._replace(args=args, kwargs=kwargs)
        own = settings.devices.global_index(index, number_of_all)
        args, kwargs = mine.for_microbatch(part, carry, own)
        result = call.apply(settings.fun, args, kwargs)
        new_carry = None
        if call.carry_name is not None:
            result, new_carry = _outputs.pair(
                result, "(outputs, carry)", "a `carry_argnum`"
            )
            new_carry = _outputs.checked_carry(call.carry_name, carry, new_carry)
        outputs = _tree.as_arrays(result)
        size = part[0].shape[split.axes[0]]
        weight, known = _validate.weight(
            size
            if settings.weight is None
            else call.apply(settings.weight, args, kwargs),
            _tree.scalar_dtype((outputs, arrays, part)),
        )
        if not known:
            # One without weight leaves the carry as it was.
            new_carry = jax.tree.map(
                lambda new, old: jnp.where(weight != 0, new, old), new_carry, carry
            )
        return _Ran(outputs, new_carry, weight)

    index = split.indices[0]
    takes: list[tuple[Any, int]] = [(split.take, split.size)]
    if split.remainder:
        takes.append((lambda batch, _: split.take_remainder(batch), split.remainder))
    parts = [take(call.batch, index) for take, _ in takes]
    is_written = [False] * len(jax.tree.leaves(before))
    for part in parts:
        also = _carry.is_written(run, before, index, arrays, part)
        is_written = [a or b for a, b in zip(is_written, also, strict=True)]
    leaves, shapes = _carry.first(run, before, is_written, index, arrays, parts[0])
    carry = _tree.filled(before, leaves)
    closed_over: dict[int, Any] = {}  # by identity
    programs = []
    for part, (take, size) in zip(parts, takes, strict=True):
        traced, ran = jax.make_jaxpr(run, return_shape=True)(carry, index, arrays, part)
        closed_over |= {id(x): x for x in traced.consts}
        places = {i: n for n, i in enumerate(closed_over)}
        programs.append(
            _Program(
                take=take,
                size=size,
                jaxpr=traced.jaxpr,
                closed_over=[places[id(x)] for x in traced.consts],
                structure=jax.tree.structure(ran),
            )
        )
    traced_number = number if isinstance(number, jax.Array) else None
    passes = _Passes(
        settings=settings,
        split=split,
        number=None if isinstance(number, jax.Array) else number,
        programs=programs,
        shapes=shapes,
        accumulators=_accumulators.plan(
            "outputs", settings.outputs, shapes.outputs, split
        ),
        seen=[
            _accumulators.Stack("carry", shape, split) if w else None
            for shape, w in zip(jax.tree.leaves(shapes.carry), is_written, strict=True)
        ],
    )
    inputs = _Inputs(
        arrays=arrays,
        closed_over=[*closed_over.values()],
        batch=call.batch,
        carry=carry,
        number=traced_number,
    )
    return passes, inputs


def _without_carry(call: _arguments.Call) -> tuple[list[Any], Kwargs]:
    """The arguments of `call`, with ``None`` for the carry."""
    args = [None if i == call.carry_place else x for i, x in enumerate(call.args)]
    return args, call.kwargs


def _varied(x: Any, batch: Batch) -> Any:
    """`x` as something that varies over devices as the batch does.

    Its gradient then stays local in the loop, and is summed once, after it.
    """
    is_array = isinstance(x, jax.Array) and _tree.is_inexact(x)
    return _tree.vary_like(x, *batch) if is_array else x


@dataclasses.dataclass(frozen=True)
class _Passes:
    """Both passes of one call on one device; what they depend on is in `_Inputs`."""

    settings: Settings
    split: _split.Split
    number: int | None  # how many micro-batches to run, if that is known
    programs: list[_Program]  # for whole micro-batches, and for the smaller last one
    shapes: _Ran  # of a whole micro-batch
    accumulators: list[_accumulators.Accumulator]
    seen: list[Any]  # accumulators for the leaves of the carry that `fun` writes

    def differentiable(self, inputs: _Inputs) -> _Totals:
        """The forward pass, whose derivative is the backward pass."""

        @jax.custom_vjp
        def run(inputs: _Inputs) -> _Totals:
            return self.forward(inputs, sees=False)

        def forward(given: Any) -> tuple[_Totals, Any]:
            inputs = _mapped(lambda x: x.value, given)
            own = _mapped(lambda x: x.value if _is_moving(x) else None, given)
            others = _mapped(lambda x: None if _is_moving(x) else x.value, given)
            totals = self.forward(inputs, sees=True)
            return totals._replace(seen=[]), (own, others, totals.seen)

        def backward(saved: Any, cotangents: _Totals) -> tuple[_Inputs]:
            own, others, seen = saved
            return (self.backward(own, others, seen, cotangents.outputs),)

        run.defvjp(forward, backward, symbolic_zeros=True)
        return run(inputs)

    def _loop(self, step: Any, totals: Any, number: Scalar | None) -> Any:
        """``step(program, totals, index)`` of all micro-batches."""
        whole, last = self.programs[0], self.programs[-1]
        return self.settings.loop(
            functools.partial(step, whole),
            functools.partial(step, last),
            totals,
            self.split,
            self.number if number is None else number,
        )

    def forward(self, inputs: _Inputs, *, sees: bool) -> _Totals:
        """One micro-batch after another; with `sees` all that `backward` needs."""
        leaves = jax.tree.leaves(inputs.carry)
        pairs = list(zip(leaves, self.seen, strict=True))
        weight = self.shapes.weight
        start = _Totals(
            outputs=[a.start(weight) for a in self.accumulators],
            carry=[None if a is None else x for x, a in pairs],
            weight=_tree.vary_like(_tree.zeros_like(weight), weight),
            seen=[a and a.start(weight) for a in self.seen] if sees else [],
        )

        def step(program: _Program, totals: _Totals, index: Scalar) -> _Totals:
            carry = _tree.filled(inputs.carry, totals.carry)
            part = program.take(inputs.batch, index)
            ran = program(carry, index, inputs.arrays, part, inputs.closed_over)
            place = self._part(program, index, ran.weight, inputs.number)
            rows = zip(
                self.accumulators,
                totals.outputs,
                jax.tree.leaves(ran.outputs),
                strict=True,
            )
            seen = zip(self.seen, totals.seen, totals.carry, strict=False)
            return _Totals(
                outputs=[a.add(carried, y, place) for a, carried, y in rows],
                carry=_tree.kept_like(totals.carry, ran.carry),
                weight=totals.weight + ran.weight,
                seen=[a and a.add(carried, x, place) for a, carried, x in seen],
            )

        return self._loop(step, start, inputs.number)

    def _part(
        self, program: _Program, index: Scalar, weight: Scalar, number: Scalar | None
    ) -> Part:
        """Which micro-batch this is."""
        count: Any = self.split.num_microbatches
        if number is not None:
            count = jnp.clip(number, 0, count)
        elif self.number is not None:
            count = self.number
        counted = True if self.settings.weight is None else weight != 0
        return Part(index, program.size, weight, counted, count - 1)

    def backward(
        self, own: _Inputs, others: _Inputs, seen: list[Any], cotangents: list[Any]
    ) -> _Inputs:
        """The gradients of what is in `own`, in place if nothing is in the way."""
        settings = self.settings
        reason = _obstacle.in_jax()
        if settings.in_place is False:
            reason = "`in_place` is False"
        for program in self.programs:
            reason = reason or _obstacle.in_forward_pass(program.jaxpr)
        is_in_place = settings.check_in_place(reason)
        run = functools.partial(self._backward, own, others, seen, cotangents)
        if is_in_place:
            try:
                return run(in_place=True)
            except _backward.NotInPlaceError as error:
                reason = str(error)
            settings.check_in_place(reason)
        return run(in_place=False)

    def _backward(
        self,
        own: _Inputs,
        others: _Inputs,
        seen: list[Any],
        cotangents: list[Any],
        *,
        in_place: bool,
    ) -> _Inputs:
        inputs = _tree.merge(own, others)
        axes = self.split.axes
        active = [
            (i, a, cotangent)
            for i, (a, cotangent) in enumerate(
                zip(self.accumulators, cotangents, strict=True)
            )
            if not isinstance(cotangent, SymbolicZero) and a.is_inexact
        ]
        # NaN is kept out of a sum, but not out of what keeps an entry for each.
        masks = self.settings.weight is not None and not any(
            a.keeps_all for _, a, _ in active
        )
        whole = own.arrays, own.closed_over
        start = _Sums(
            whole=jax.tree.map(
                _tree.vary_like,
                _window.zeros(whole, self.settings.accumulator_dtype),
                whole,
            ),
            batch=[
                None if x is None else self.split.apart(_tree.zeros(x), axis)
                for x, axis in zip(own.batch, axes, strict=True)
            ],
        )
        if in_place:
            self.settings.check_in_place(_obstacle.in_sums(start.whole, whole))

        def step(program: _Program, sums: _Sums, index: Scalar) -> _Sums:
            part = program.take(inputs.batch, index)
            mine = [
                x if y is not None else None
                for x, y in zip(part, own.batch, strict=True)
            ]
            carry = _tree.filled(
                inputs.carry,
                [
                    a and lax.dynamic_index_in_dim(x, index, 0, keepdims=False)
                    for a, x in zip(self.seen, seen, strict=True)
                ],
            )

            def outputs(given: Any) -> tuple[list[jax.Array], Scalar]:
                (arrays, closed_over), mine = given
                ran = program(
                    carry,
                    index,
                    _tree.merge(arrays, others.arrays),
                    _tree.merge(mine, part),
                    _tree.merge(closed_over, others.closed_over),
                )
                leaves = jax.tree.leaves(ran.outputs)
                return [leaves[i] for i, _, _ in active], ran.weight

            given = whole, mine
            ys, function, weight = jax.vjp(outputs, given, has_aux=True)
            place = self._part(program, index, weight, inputs.number)
            pullback = Pullback(
                function,
                [
                    _tree.vary_like(a.cotangent(cotangent, place), y)
                    for (_, a, cotangent), y in zip(active, ys, strict=True)
                ],
                given,
            )
            counted = place.counted if masks else True
            empty = _tree.zeros(mine)
            if in_place:
                reason = _obstacle.in_program(pullback, program.jaxpr, is_masked=masks)
                if reason is not None:
                    raise _backward.NotInPlaceError(reason)
                new, parts = pullback.added_to(
                    (sums.whole, empty), None, counted=counted
                )
            else:
                grads, parts = pullback.gradients()
                new = _window.add(sums.whole, grads, weight, "sum", counted=counted)
                parts = _window.add(empty, parts, weight, "sum", counted=counted)
            batch = [
                x if x is None else self.split.put(x, g, index, axis)
                for x, g, axis in zip(sums.batch, parts, axes, strict=True)
            ]
            return _Sums(new, batch)

        sums = self._loop(step, start, inputs.number)
        arrays, closed_over = _tree.cast_like(sums.whole, whole)
        batch = [
            x if x is None else self.split.joined(x, axis)
            for x, axis in zip(sums.batch, axes, strict=True)
        ]
        return _Inputs(arrays, closed_over, batch, None, None)


def _is_moving(primal: Any) -> bool:
    """Whether something is differentiated with respect to this input."""
    return primal.perturbed and _tree.is_inexact(primal.value)


def _mapped(function: Any, given: Any) -> Any:
    return jax.tree.map(function, given, is_leaf=lambda x: hasattr(x, "perturbed"))
