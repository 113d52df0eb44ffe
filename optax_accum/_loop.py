"""All micro-batches of one call, one after another.

A call goes one way: its arguments are taken apart, the batch is split, a `lax.scan`
runs `fun` and its gradient on one micro-batch after another and adds them to a
`Window`, devices sum their windows, and the window is divided once.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap
from jax.sharding import PartitionSpec as P

from optax_accum import (
    _accumulators,
    _arguments,
    _backward,
    _carry,
    _derivative,
    _flow,
    _obstacle,
    _outputs,
    _skip,
    _split,
    _tree,
    _validate,
    _window,
)
from optax_accum._backward import Pullback
from optax_accum._derivative import Result
from optax_accum._microbatching import Microbatching
from optax_accum._overwrite import Overwritten
from optax_accum._types import (
    Args,
    Batch,
    DType,
    Grads,
    Kwargs,
    Params,
    Reduction,
    Scalar,
    Skip,
    Tree,
)
from optax_accum._window import Window
from optax_accum.noise import _noise_scale
from optax_accum.sharding import _collectives


class MicrobatchInfo(NamedTuple):
    """Weight, skips and noise scale of a batch: `value_and_grad` with `return_info`.

    Attributes:
      weight: ``f32[]`` (``f64[]`` in double precision), the sum W of the micro-batches'
        weights: how many examples or tokens the result averages over. Pass it to
        `accumulate` as `weight`.
      skipped: ``i32[]``, how many micro-batches `skip` rejected.
      noise_scale: The `oa.noise.NoiseScale` of this batch, with ``count`` 1, or 0 (and
        NaN) if fewer than two micro-batches had any weight; ``()`` without
        `noise_scale`.
    """

    weight: Scalar
    skipped: Scalar
    noise_scale: Any = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Microbatching):
    """The options of `value_and_grad`, checked."""

    has_aux: bool
    holomorphic: bool
    allow_int: bool
    reduction: Reduction
    weight_takes_aux: bool
    skip: Skip | None
    overwritten: Overwritten
    accumulator_dtype: DType
    aux: Tree
    returns_info: bool
    noise_scale: bool

    @property
    def has_extra(self) -> bool:
        """Whether the value comes with auxiliary outputs or a carry."""
        return self.has_aux or self.roles.carry_argnum is not None

    def __call__(self, args: Args, kwargs: Kwargs) -> Any:
        """What the user gets."""
        result, info = self.run(args, kwargs)
        return (result, info) if self.returns_info else result

    def run(self, args: Args, kwargs: Kwargs) -> tuple[Any, MicrobatchInfo]:
        """The result of one call, and the info."""
        return self.run_bound(self.roles.bind(self.fun, args, kwargs))

    def run_bound(self, call: _arguments.Call) -> tuple[Any, MicrobatchInfo]:
        """As `run`, of arguments that are bound to their roles."""
        split, number = self.checked(call)
        outputs = _outputs.Outputs(self.has_aux, call.carry_name, self.holomorphic)
        obstacle = self._obstacle(call)
        numbers = _tree.numbered(call.args)
        spec = self.devices.result_spec
        specs = Result(
            value=spec,
            grads=self.devices.gradient_specs(
                _tree.keep_inexact(call.differentiated), self.overwritten
            ),
            rest=(
                _accumulators.specs(self.aux, self.devices.axis_name, spec),
                P(),
                spec,
            ),
        )

        def on_device(call: _arguments.Call, number: int | Scalar | None) -> Result:
            loop = _Loop(self, call, split, outputs, number)
            return self.in_place_if_possible(loop.run, obstacle)

        run, arrays = self.on_devices(on_device, call, split, number, specs)
        is_whole = not self.devices.local and (
            self.devices.mesh is not None or not self.devices.scatter
        )
        if is_whole and not jax.config.jax_disable_jit:  # type: ignore[attr-defined]
            result = _derivative.run_with_derivative(
                run,
                call.batch,
                arrays,
                jax.tree.map(lambda i: numbers[i], call.argnums),
            )
        else:
            result = run(call.batch, arrays)
        aux, written, info = result.rest
        carry = _carry.after(call.carry, written)
        grads = _tree.fill_float0(result.grads, call.differentiated)
        return (outputs.pack(result.value, aux, carry), grads), info

    def _obstacle(self, call: _arguments.Call) -> str | None:
        """Why gradients cannot be added in place, whatever the program, or ``None``."""
        if self.skip is not None:
            return "`skip` reads every micro-batch's gradient"
        if self.noise_scale:
            return "`noise_scale` reads every micro-batch's gradient"
        if self.holomorphic:
            return "the loss is complex, as `holomorphic` says"
        return _obstacle.in_parameters(call.differentiated, self.overwritten)


class _Microbatch(NamedTuple):
    """What one micro-batch gives."""

    value: Scalar
    grads: Grads | Pullback  # ``None`` for what has no gradient
    aux: Tree
    carry: Tree
    weight: Scalar  # 0 if it was rejected
    rejected: Scalar
    counted: Scalar  # whether it contributes


class _Runner(NamedTuple):
    """How micro-batches of one size run: the whole ones, or the smaller last one.

    Attributes:
      size: How many examples one has.
      run: ``run(carry, index)`` runs one.
      weight: ``weight(carry, index)``, its weight, without running it. (If it runs,
        the weight is computed twice, which depends on the arguments alone.)
    """

    size: int
    run: Any
    weight: Callable[[Tree, Scalar], Scalar]


class _Totals(NamedTuple):
    """What goes from micro-batch to micro-batch."""

    window: Window
    aux: Tree  # what the accumulators carry
    carry: list[Any]  # the leaves that `fun` writes, and None for the others


def _check_reads(settings: Settings, grads: Grads) -> None:
    """Raises if an option reads gradients that have yet to be summed over devices."""
    asked = {"skip": settings.skip is not None, "noise_scale": settings.noise_scale}
    for option in (name for name, is_asked in asked.items() if is_asked):
        for path, g in jax.tree_util.tree_leaves_with_path(grads):
            if _tree.unreduced(g):
                raise ValueError(
                    f"`{option}` reads every micro-batch's gradient, and "
                    f"{_validate.named('grads', path)} is unreduced, because the "
                    "parameter is tagged `reduced`: its sum over the devices is made "
                    "later. Leave the tag out, with jax.reshard(params, P()), or "
                    f"leave out `{option}`"
                )


@dataclasses.dataclass(frozen=True)
class _Loop:
    """All micro-batches of one call on one device."""

    settings: Settings
    call: _arguments.Call
    split: _split.Split
    outputs: _outputs.Outputs
    number: int | Scalar | None  # of micro-batches to run, or ``None`` for all
    is_in_place: bool = False  # whether gradients are added by the backward pass

    def run(self, is_in_place: bool) -> Result:
        """The result.

        Raises:
          NotInPlaceError: Gradients cannot be added in place, as they should be.
        """
        return dataclasses.replace(self, is_in_place=is_in_place)._run()

    def _run(self) -> Result:
        """One micro-batch after another, the sum over devices, and the division."""
        split, settings = self.split, self.settings
        before = _tree.strongly_typed(self.call.carry)
        runners = [self._runner(take, size) for take, size in split.takes]
        whole, last = runners[0], runners[-1]

        index = split.indices[0]
        is_written = _carry.is_written([r.run for r in runners], before, index)
        carry, shapes = _carry.first(whole.run, before, is_written, index)
        program = whole.run.trace(_tree.filled(before, carry), index).jaxpr.jaxpr
        if settings.devices.axis_name is not None:
            _collectives.check_local_loss(
                settings.devices.axis_name, shapes.value, program
            )
        if isinstance(shapes.grads, Pullback):
            _obstacle.check(shapes.grads, program, is_masked=self._may_have_weight_0)
            shapes = shapes._replace(grads=shapes.grads.like)
        accumulators = _accumulators.plan("aux", settings.aux, shapes.aux, split)
        leaves_out = self._may_leave_out(accumulators, program)

        def step(runner: _Runner, totals: _Totals, index: Scalar) -> _Totals:
            def run(totals: _Totals) -> _Totals:
                new = runner.run(_tree.filled(before, totals.carry), index)
                return self._add(totals, new, accumulators, index, runner.size)

            if not leaves_out:
                return run(totals)
            weight = runner.weight(_tree.filled(before, totals.carry), index)
            runs = _anywhere(weight != 0)
            return lax.cond(runs, run, lambda totals: totals, totals)

        totals = settings.loop(
            functools.partial(step, whole),
            functools.partial(step, last),
            self._start(shapes, accumulators, carry),
            split,
            self.number,
        )
        return self._finish(totals, shapes, accumulators, before)

    def _runner(self, take: Callable[[Batch, Scalar], Batch], size: int) -> _Runner:
        """Micro-batches of `size` examples; `take` takes one out of the batch."""

        def arguments(carry: Tree, index: Scalar) -> tuple[list[Any], Kwargs]:
            return self._arguments(take(self.call.batch, index), carry, index)

        # Under `jax.jit`, the loop reuses the trace that the shapes need.
        @jax.jit
        def run(carry: Tree, index: Scalar) -> _Microbatch:
            return self._microbatch(*arguments(carry, index), carry, size)

        def weight(carry: Tree, index: Scalar) -> Scalar:
            return jnp.asarray(self._weight(*arguments(carry, index), size))

        return _Runner(size, run, weight)

    @property
    def _may_have_weight_0(self) -> bool:
        """Whether a micro-batch may have weight 0, and so contribute nothing."""
        return self.settings.weight is not None and self.settings.reduction == "mean"

    def _may_leave_out(self, accumulators: Tree, program: Any) -> bool:
        """Whether a micro-batch of weight 0 need not run at all.

        Its weight must be known before, and nothing may need what it would give.
        """
        settings = self.settings
        return (
            self._may_have_weight_0
            and not settings.weight_takes_aux
            and settings.skip is None
            and not any(
                accumulator.keeps_all for accumulator in jax.tree.leaves(accumulators)
            )
            and not _flow.has_refs(program)
            and not _collectives.may_exchange(program)
        )

    @property
    def _examples_per_weight(self) -> int:
        """How many examples a weight of 1 stands for in the window.

        Without `weight`, a whole micro-batch of a mean has the constant weight 1, and
        the compiler drops the multiplication. `_finish` converts W into examples.
        """
        settings = self.settings
        is_counted = settings.weight is None and settings.reduction == "mean"
        return self.split.size if is_counted else 1

    @property
    def _all_count(self) -> bool:
        """Whether every micro-batch contributes for certain."""
        return not self._may_have_weight_0 and self.settings.skip is None

    def _arguments(
        self, part: Batch, carry: Tree, index: Scalar
    ) -> tuple[list[Any], Kwargs]:
        """The arguments with which one micro-batch runs."""
        number = self.settings.devices.global_index(index, self.split.num_microbatches)
        args, kwargs = self.call.for_microbatch(part, carry, number)
        for i in jax.tree.leaves(self.call.argnums):
            # With this, `jax.grad` gives this device's gradient, not the sum of all.
            own = _tree.differentiated(args[i])
            varied = _collectives.vary(self.settings.devices.axis_name, own)
            args[i] = _tree.merge(varied, args[i])
        return args, kwargs

    def _weight(self, args: list[Any], kwargs: Kwargs, size: int, **more: Tree) -> Any:
        """The weight of a micro-batch, as it was given."""
        if self.settings.weight is None:
            return size / self._examples_per_weight
        return self.call.apply(self.settings.weight, args, kwargs | more)

    def _microbatch(
        self, args: list[Any], kwargs: Kwargs, carry: Tree, size: int
    ) -> _Microbatch:
        """Value and gradient on one micro-batch of `size` examples."""
        call, settings = self.call, self.settings

        def unpacked(own: Params) -> tuple[Scalar, Any]:
            whole = list(args)
            for i, x in _pairs(call.argnums, own):
                whole[i] = _tree.merge(x, args[i])
            result = call.apply(settings.fun, whole, kwargs)
            value, *rest = self.outputs.unpack(result, carry)
            return value, rest

        own = call._replace(args=args).differentiated
        grads: Grads | Pullback
        if self.is_in_place:
            value, function, (aux, new_carry) = jax.vjp(unpacked, own, has_aux=True)
            grads = Pullback(function, _backward.one_like(value), own)
        else:
            (value, (aux, new_carry)), grads = jax.value_and_grad(
                unpacked,
                has_aux=True,
                holomorphic=settings.holomorphic,
                allow_int=settings.allow_int,
            )(own)
            grads = _tree.keep_inexact(grads)
            _check_reads(settings, grads)

        more = {"aux": lax.stop_gradient(aux)} if settings.weight_takes_aux else {}
        weight, known_weight = _validate.weight(
            self._weight(args, kwargs, size, **more),
            _tree.scalar_dtype((value, own, aux)),
        )
        weight, rejected, _ = _skip.ask(
            settings.skip, weight, grads, None, _tree.keep_inexact(own)
        )
        counted: bool | Scalar = True
        if not known_weight or settings.skip is not None:
            counted = _window.counts(weight, settings.reduction, rejected)
        if counted is not True:
            new_carry = jax.tree.map(
                lambda new, old: jnp.where(counted, new, old), new_carry, carry
            )
        return _Microbatch(
            value=value,
            grads=grads,
            aux=aux,
            carry=new_carry,
            weight=weight,
            rejected=jnp.asarray(rejected),
            counted=jnp.asarray(counted),
        )

    def _start(
        self,
        shapes: _Microbatch,
        accumulators: Tree,
        carry: list[Any],
    ) -> _Totals:
        _validate.accumulator_fits(
            "params", shapes.grads, self.settings.accumulator_dtype
        )
        window = Window.empty(
            shapes.grads,
            shapes.value,
            shapes.weight,
            accumulator_dtype=self.settings.accumulator_dtype,
            measure_noise=self.settings.noise_scale,
            overwritten=self.settings.overwritten,
        )
        if self.is_in_place:
            self.settings.may_add_in_place(
                _obstacle.in_sums("grads", window.grads, shapes.grads)
            )
        aux = jax.tree.map(lambda a: a.start(shapes.weight), accumulators)
        return _Totals(window, aux, carry)

    def _add(
        self,
        totals: _Totals,
        new: _Microbatch,
        accumulators: Tree,
        index: int | Scalar,
        size: int,
    ) -> _Totals:
        part = _accumulators.Part(
            index,
            size,
            new.weight,
            new.counted,
            self.settings.last_number(self.split, self.number),
        )
        return _Totals(
            window=totals.window.add(
                new.grads,
                new.value,
                new.weight,
                reduction=self.settings.reduction,
                # After `jax.jit` it is not a Python bool any more.
                counted=True if self._all_count else new.counted,
                is_weighted=self._may_have_weight_0
                or size != self._examples_per_weight,
                rejected=new.rejected,
                overwritten=self.settings.overwritten,
            ),
            aux=jax.tree.map(
                lambda a, carried, output: a.add(carried, output, part),
                accumulators,
                totals.aux,
                new.aux,
            ),
            carry=_tree.kept_like(totals.carry, new.carry),
        )

    def _finish(
        self,
        totals: _Totals,
        shapes: _Microbatch,
        accumulators: Tree,
        before: Tree,
    ) -> Result:
        settings, devices = self.settings, self.settings.devices
        own = totals.window
        if settings.weight is None and settings.skip is None and self.number is None:
            # Known before; what nothing asks for, XLA takes out of the loop.
            weight = jnp.full_like(
                own.weight, self.split.examples / self._examples_per_weight
            )
            own = own._replace(weight=_tree.vary_like(weight, own.weight))
        total = own.over_devices(devices, settings.overwritten)
        kept = _tree.kept_like(totals.carry, before)
        carry = devices.merge_carry(totals.carry, kept, own.weight, total.weight)

        def finish(a: _accumulators.Accumulator, carried: Tree) -> Tree:
            carried = a.over_devices(carried, devices.reduced_over)
            output = a.finish(carried, total.weight)
            return output if a.is_local else devices.as_rows(output)

        aux = jax.tree.map(finish, accumulators, totals.aux)
        # An exchange has a buffer of its own.
        in_place = self.is_in_place and devices.reduced_over is None
        value, grads = _tree.cast_like(
            total.result(settings.reduction, settings.overwritten, in_place=in_place),
            (shapes.value, shapes.grads),
        )
        grads = settings.overwritten.unless_empty(
            grads, _tree.keep_inexact(self.call.differentiated), total.weight
        )
        weight = total.weight
        if self._examples_per_weight != 1:
            weight = jnp.round(
                weight * self._examples_per_weight
            )  # a number of examples
        info = MicrobatchInfo(weight, total.skipped, self._noise_scale(total, shapes))
        value, grads, info = devices.as_rows((value, grads, info))
        return Result(value, grads, (aux, carry, info))

    def _noise_scale(self, total: Window, shapes: _Microbatch) -> Any:
        """The noise scale of the batch, if it was asked for."""
        if not self.settings.noise_scale:
            return ()
        gradients, whole = map(
            self.settings.overwritten.gradients, (total.grads, shapes.grads)
        )
        square = self.settings.devices.squared_norm(
            gradients, whole, total.weight.dtype
        )
        scale = _noise_scale.of_window(total, square / total.weight**2)
        return scale._replace(noise=scale.noise * self._examples_per_weight)


def _pairs(argnums: int | tuple[int, ...], own: Params) -> Any:
    """What is differentiated of each argument, with its position."""
    if isinstance(argnums, tuple):
        return zip(argnums, own, strict=True)
    return [(argnums, own)]


@custom_vmap
def _anywhere(happens: Scalar) -> Scalar:
    """`happens`; under `jax.vmap` whether any does, to have one branch."""
    return happens


@_anywhere.def_vmap
def _anywhere_mapped(size: int, is_mapped: Any, happens: Any) -> tuple[Scalar, bool]:
    del size, is_mapped
    return _anywhere(jnp.any(happens)), False
