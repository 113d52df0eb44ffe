"""`jax.value_and_grad` whose batch runs in micro-batches."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from optax_accum import (
    _arguments,
    _aux,
    _checks,
    _devices,
    _distributed,
    _noise_scale,
    _outputs,
    _split,
    _types,
    _window,
)


class MicrobatchInfo(NamedTuple):
    """What `value_and_grad` knows beside its result, for whoever asks.

    Attributes:
      weight: ``f32[]`` (``f64[]`` in double precision), the sum W of the
        micro-batches' weights: how many examples or tokens the result stands for. It
        is the `weight` under which `accumulate` takes the gradient.
      skipped: ``i32[]``, how many micro-batches `skip` rejected.
      noise_scale: The `oa.NoiseScale` of this batch, of ``count`` 1, or 0 (and NaN)
        where fewer than two micro-batches had any weight; ``()`` where it was not asked
        for.
    """

    weight: jax.Array
    skipped: jax.Array
    noise_scale: Any = ()


def value_and_grad(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    num_microbatches: int | None = None,
    microbatch_size: int | None = None,
    batch_argnums: int | Sequence[int] = 1,
    batch_argnames: str | Sequence[str] = (),
    batch_axis: int = 0,
    reduction: _window.Reduction = "mean",
    weight: Callable[..., Any] | None = None,
    aux: Any = "stack",
    carry_argnum: int | None = None,
    rng_argnums: int | Sequence[int] = (),
    accumulator_dtype: Any = None,
    skip: Callable[[Any, Any, Any], tuple[Any, Any]] | None = None,
    return_info: bool = False,
    noise_scale: bool = False,
    axis_name: Any = None,
    mesh: Any = None,
    scatter: bool = False,
) -> Callable[..., Any]:
    """`jax.value_and_grad` whose batch runs in micro-batches, one after another.

    The same call and the same result, in the memory of one micro-batch and of one sum
    as large as the gradient. The batch arguments are cut into K micro-batches, `fun`
    and its gradient run on each inside one `jax.lax.scan`, and the sums are divided
    once:

        value = Σ wᵢ·vᵢ / Σ wᵢ        gradient = Σ wᵢ·gᵢ / Σ wᵢ

    with wᵢ the number of examples in micro-batch i, or what `weight` says. For a
    `fun` that is a mean over the examples, these are the value and the gradient of
    the whole batch.

    Call it under `jax.jit`, where it is traced once. Outside of it the loop is
    compiled anew at every call.

    Args:
      fun: The function to differentiate, returning a real scalar, or a pair as
        `has_aux` and `carry_argnum` say. It sees one micro-batch at a time.
      argnums: As in `jax.value_and_grad`: which positional arguments to differentiate
        with respect to.
      has_aux: As in `jax.value_and_grad`: whether `fun` returns ``(value, aux)``.
      num_microbatches: K, which must divide the number of examples. Exactly one of
        this and `microbatch_size` is needed.
      microbatch_size: How many examples make a micro-batch, any number up to that of
        the batch. Where it does not divide the batch, the rest runs as one smaller
        micro-batch, under its own weight.
      batch_argnums: Which positional arguments are batches: trees of arrays, all with
        the same number of examples along `batch_axis`. Name them all: every other
        argument reaches `fun` whole, and where that broadcasts, no error tells.
      batch_argnames: Which keyword arguments are.
      batch_axis: The axis of the examples in every leaf of the batch arguments.
      reduction: ``"mean"`` for a `fun` that is a mean over the weight (the default;
        result Σ wᵢ·gᵢ / Σ wᵢ); ``"ratio"`` for a sum that is to be divided by the total
        weight once (Σ gᵢ / Σ wᵢ); ``"sum"`` for one that is not (Σ gᵢ).
      weight: ``weight(*args, **kwargs)``, called as `fun` is, returns a scalar >= 0:
        how many units (valid tokens, say) this micro-batch's mean was taken over.
        By default the number of its examples. What is computed at run time is not
        checked. A micro-batch of weight 0 contributes
        nothing, even if its gradient is NaN; if all weights are 0, so are value and
        gradient.
      aux: What becomes of auxiliary outputs: one policy for all leaves, or a tree of
        them that is a prefix of `aux`. ``"stack"``: all of them on a new first axis.
        ``"concat"``: one entry per example along axis 0, in the order of the batch.
        ``"mean"``: their mean, weighted as the loss is. ``"sum"``: their sum.
        ``"last"``: the last micro-batch's. Weight 0 counts in neither mean nor sum.
      carry_argnum: Which argument is handed from micro-batch to micro-batch, such as
        the statistics of BatchNorm. `fun` returns its next value: ``(value, carry)``,
        or ``(value, (aux, carry))`` with `has_aux`. A micro-batch of weight 0 leaves
        it as it was.
      rng_argnums: Which arguments are random keys, typed or raw, or trees of them.
        Micro-batch i gets ``jax.random.fold_in(key, i)``: its dropout is its own, and
        the same at every call with the same key.
      accumulator_dtype: The dtype of the sums. By default at least float32 and never
        less than the gradient's own.
      skip: ``skip(grads, None, params) -> (bool, info)`` rejects a micro-batch, which
        then has weight 0; the others give their own mean. `oa.skip_not_finite` is one,
        and Optax's predicates fit. It sees one micro-batch's gradients and the
        arguments in `argnums`.
      return_info: Whether to return ``(result, MicrobatchInfo)``, with the total
        weight and the number of micro-batches that were skipped.
      noise_scale: Whether to measure the noise scale as well, for one norm per
        micro-batch; it is in the `MicrobatchInfo`. With `scatter` the devices exchange
        one number more after the gradients.
      axis_name: The axis of devices, or several, that share the batch. Inside
        `jax.pmap` or `jax.shard_map` each device calls this with its own part, of which
        the sizes above speak, and with parameters that are the same on all of them.
        `fun` returns its own loss, without psum or pmean; everything is reduced over
        the axis once, after the last micro-batch.
      mesh: The mesh with that axis, for a call from plain `jax.jit` with the whole
        batch, of which the sizes then speak. The loop runs inside a `jax.shard_map`
        over `axis_name`; the mesh's other axes stay with the compiler.
      scatter: Whether each device is to keep only its part of the gradients: a
        reduce-scatter instead of the all-reduce. `oa.scatter_specs` says which part.

    Returns:
      A function with the arguments of `fun` that returns what `jax.value_and_grad`
      would, in the same dtypes: ``(value, grads)``; ``((value, aux), grads)`` with
      `has_aux`; ``((value, carry), grads)`` or ``((value, (aux, carry)), grads)`` with
      `carry_argnum`. With `return_info` the pair of that and a `MicrobatchInfo`.

    Raises:
      TypeError: A size, a position, a name, `batch_axis`, `weight`, `skip`,
        `noise_scale` or `accumulator_dtype` of another type. At the call: `fun` does
        not return a real scalar, or a carry of another type than it took; a random key
        that is none; a `mesh` that is none.
      ValueError: Neither or both sizes, or one < 1; an unknown `reduction` or policy;
        float64 sums where JAX has none; a `mesh` without that axis, or `scatter`
        without one.
        At the call: a size that does not go with the batch; batch leaves that
        differ in their number of examples or have none; an argument with two roles or
        with none of that position or name; an `aux` that is no prefix.

    Examples:
      >>> import jax, jax.numpy as jnp, optax_accum as oa
      >>> def loss(w, x, y):
      ...     return jnp.mean((x @ w - y) ** 2)
      >>> w, x, y = jnp.ones(2), jnp.arange(10.0).reshape(5, 2), jnp.ones(5)
      >>> print(*jax.value_and_grad(loss)(w, x, y))
      96.0 [ 96. 112.]
      >>> in_parts = oa.value_and_grad(loss, microbatch_size=2, batch_argnums=(1, 2))
      >>> print(*jax.jit(in_parts)(w, x, y))
      96.0 [ 96. 112.]

      A mean over valid tokens, of which micro-batches hold different numbers:

      >>> def token_loss(w, x, mask):
      ...     return jnp.sum(mask * (x @ w) ** 2) / jnp.maximum(mask.sum(), 1)
      >>> mask = jnp.arange(5) < 2
      >>> in_parts = oa.value_and_grad(
      ...     token_loss,
      ...     num_microbatches=5,
      ...     batch_argnums=(1, 2),
      ...     weight=lambda w, x, mask: mask.sum(),
      ... )
      >>> print(jax.jit(in_parts)(w, x, mask)[0], token_loss(w, x, mask))
      13.0 13.0

    Note:
      Where the micro-batches are equal, they are strided: micro-batch i holds the
      examples i, i + K, i + 2K, ... A batch that is sharded over devices is so split
      without communication, if every micro-batch can be sharded as the batch was. With
      a smaller last micro-batch they are contiguous. What `fun` and its gradient
      exchange, they exchange in every micro-batch.

      `jax.grad` of the value goes through the loop, and keeps what every micro-batch
      needs for its backward pass: right, but without any memory saved. (A NaN in a
      micro-batch of weight 0 makes that NaN, as it does with `jnp.where`.)

      Over several devices the result is that of all micro-batches of all devices, as if
      they had run one after another, the first device's first: ``"last"`` is the last
      device's, and random keys are folded with the number among all. ``"stack"`` and
      ``"concat"`` leave every device's outputs where they are; with `mesh` they are one
      array, sharded along axis 0. A carry's floating leaves are averaged over the
      devices, by weight; its other leaves are those of the last device with any weight.
      What is exchanged is one all-reduce for each dtype of the sums, or with `scatter`
      one reduce-scatter for each leaf, unless the compiler joins them.

      The result has the parameters' dtypes, as that of `jax.value_and_grad` has: the
      gradient of bfloat16 parameters is summed in float32 and rounded once.

    References:
      Goyal et al., Accurate, Large Minibatch SGD, 2017, section 3
      (https://arxiv.org/abs/1706.02677): the gradient of a large batch in parts.
    """
    if (num_microbatches is None) == (microbatch_size is None):
        raise ValueError(
            "exactly one of `num_microbatches` and `microbatch_size` is needed; got "
            f"{num_microbatches!r} and {microbatch_size!r}"
        )
    if not isinstance(noise_scale, bool):
        raise TypeError(
            "`noise_scale` must be True or False, because this measures one batch; got "
            f"{noise_scale!r}. A decay is for averages, in oa.NoiseScale.add"
        )
    if noise_scale and not return_info:
        raise ValueError(
            "`noise_scale=True` measures what is returned in the `MicrobatchInfo`, but "
            "`return_info` is False. Pass return_info=True"
        )
    _checks.one_of("reduction", reduction, _window.REDUCTIONS)
    _aux.check_policies(aux)
    if not has_aux and aux != "stack":
        raise ValueError(
            f"`aux={aux!r}` says what becomes of auxiliary outputs, but `has_aux` "
            "is False. Pass has_aux=True, or leave `aux` out"
        )
    microbatched = _Microbatched(
        fun=fun,
        roles=_arguments.Roles.of(
            argnums, batch_argnums, batch_argnames, carry_argnum, rng_argnums
        ),
        has_aux=has_aux,
        num_microbatches=_checks.size("num_microbatches", num_microbatches),
        microbatch_size=_checks.size("microbatch_size", microbatch_size),
        batch_axis=_checks.axis(batch_axis),
        reduction=reduction,
        weight=_checks.weight_function(weight),
        policies=aux,
        accumulator_dtype=_checks.accumulator_dtype(accumulator_dtype),
        skip=_checks.predicate(skip),
        noise_scale=noise_scale,
        devices=_devices.Devices.of(axis_name, mesh, scatter),
    )

    @functools.wraps(fun)
    def value_and_grad_of_batch(*args, **kwargs):
        result, info = microbatched.run(args, kwargs)
        return (result, info) if return_info else result

    return value_and_grad_of_batch


def grad(
    fun: Callable[..., Any],
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    **options: Any,
) -> Callable[..., Any]:
    """`jax.grad` whose batch runs in micro-batches: `value_and_grad` without the value.

    Args:
      fun: As in `value_and_grad`.
      argnums: As in `value_and_grad`.
      has_aux: As in `value_and_grad`.
      **options: The keyword arguments of `value_and_grad`.

    Returns:
      A function that returns what `jax.grad` would: ``grads``, or ``(grads, aux)`` with
      `has_aux`; where there is a carry, it takes the place of ``aux``, or ``(aux,
      carry)`` does. With `return_info` the pair of that and a `MicrobatchInfo`.

    Raises:
      TypeError: As `value_and_grad`.
      ValueError: As `value_and_grad`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax_accum as oa
      >>> def loss(w, x):
      ...     return jnp.mean((x @ w) ** 2)
      >>> w, x = jnp.ones(2), jnp.arange(8.0).reshape(4, 2)
      >>> print(jax.jit(oa.grad(loss, num_microbatches=2))(w, x))
      [62. 76.]
      >>> print(jax.grad(loss)(w, x))
      [62. 76.]
    """
    with_value = value_and_grad(fun, argnums, has_aux, **options)
    has_extra = has_aux or options.get("carry_argnum") is not None

    def without_value(result):
        value, grads = result
        return (grads, value[1]) if has_extra else grads

    @functools.wraps(fun)
    def grad_of_batch(*args, **kwargs):
        result = with_value(*args, **kwargs)
        if options.get("return_info"):
            return without_value(result[0]), result[1]
        return without_value(result)

    return grad_of_batch


class _Part(NamedTuple):
    """What one micro-batch gives."""

    value: jax.Array
    grads: Any
    aux: Any
    carry: Any
    weight: jax.Array
    rejected: jax.Array


class _Totals(NamedTuple):
    """What goes from micro-batch to micro-batch: the sums, and the carry."""

    value: jax.Array
    grads: Any
    aux: list[Any]
    weight: jax.Array
    skipped: jax.Array
    noise: _noise_scale.Sums | None
    carry: Any


@dataclasses.dataclass(frozen=True)
class _Microbatched:
    """The settings of `value_and_grad`, and how it runs."""

    fun: Callable[..., Any]
    roles: _arguments.Roles
    has_aux: bool
    num_microbatches: int | None
    microbatch_size: int | None
    batch_axis: int
    reduction: str
    weight: Callable[..., Any] | None
    policies: Any
    accumulator_dtype: Any
    skip: Callable[[Any, Any, Any], tuple[Any, Any]] | None
    noise_scale: bool
    devices: _devices.Devices

    def run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """All micro-batches of one call."""
        self.devices.check_place()
        call = self.roles.bind(self.fun, args, kwargs)
        split = _split.plan(
            call.batch,
            call.batch_names(),
            self.batch_axis,
            self.num_microbatches,
            self.microbatch_size,
            self.devices.shards,
        )
        for name, argument in call.named():
            self.devices.check_whole(name, argument)
        carried = None if call.carry is None else call.names[call.carry]
        outputs = _outputs.Outputs(self.has_aux, carried)
        arrays, rebuild = _arguments.arrays_in((call.args, call.kwargs))

        def run_on_device(batch, arrays):
            args, kwargs = rebuild(arrays)
            mine = call._replace(args=args, kwargs=kwargs, batch=batch)
            return self._run(mine, split, outputs)

        # Arrays come as arguments, even outside of any `jax.jit`: what a compiled
        # function closes over, JAX keeps. What is no array stays what it is.
        @jax.jit
        def run(batch, arrays):
            aux_specs = _aux.specs(self.policies, self.devices.axis_name)
            grads_specs = self.devices.gradient_specs(call.differentiated())
            result_specs = outputs.pack(P(), aux_specs, P()), grads_specs
            return self.devices.run(
                run_on_device, batch, arrays, self.batch_axis, (result_specs, P())
            )

        return run(call.batch, arrays)

    def _run(
        self, call: _arguments.Call, split: _split.Split, outputs: _outputs.Outputs
    ) -> tuple[Any, Any]:
        """All micro-batches on one device, and the sums over all devices."""
        devices = self.devices
        carry_before = None if call.carry is None else call.args[call.carry]
        carry_before = _window.cast_like(carry_before, carry_before)
        call = self._with_local_parameters(call)
        count = split.whole + bool(split.tail)

        # Under `jax.jit`, the trace that tells the shapes serves the loop as well.
        @jax.jit
        def microbatch(carry, index):
            part, number = split.take(call.batch, index), devices.number(index, count)
            return self._differentiate(call, outputs, part, carry, number, split.size)

        @jax.jit
        def tail_microbatch(carry):
            part, number = split.take_tail(call.batch), devices.number(count - 1, count)
            return self._differentiate(call, outputs, part, carry, number, split.tail)

        # A mean may count in whole micro-batches: XLA then multiplies nothing by 1.
        unit = split.size if self.weight is None and self.reduction == "mean" else 1
        indices = jnp.arange(split.whole, dtype=jnp.int32)
        carry, shapes = self._first_carry(microbatch, carry_before, indices[0])
        auxiliaries = _aux.Auxiliaries.plan(self.policies, shapes.aux, split)

        def body(totals, index):
            part = microbatch(totals.carry, index)
            totals = self._add(totals, part, auxiliaries, unit)
            return totals, auxiliaries.kept(part.aux)

        start = self._start(shapes, auxiliaries, carry)
        totals, stacks = lax.scan(body, start, indices)
        tails = None
        if split.tail:
            part = tail_microbatch(totals.carry)
            auxiliaries.check_examples(part.aux, split.tail)
            tails = auxiliaries.kept(part.aux)
            totals = self._add(totals, part, auxiliaries, unit)

        totals = self._over_devices(totals, auxiliaries, carry_before, split)
        weight = totals.weight
        aux = auxiliaries.finish(totals.aux, stacks, tails, weight, split)
        sums = totals.value, totals.grads
        value, grads = _window.cast_like(
            _window.close(sums, weight / unit, self.reduction),
            (shapes.value, shapes.grads),
        )
        result = outputs.pack(value, aux, totals.carry), grads
        noise_scale = self._estimate(totals, shapes, unit)
        return result, MicrobatchInfo(weight, totals.skipped, noise_scale)

    def _with_local_parameters(self, call: _arguments.Call) -> _arguments.Call:
        """`call` with parameters of which `jax.grad` gives this device's gradient."""
        args = list(call.args)
        for i in jax.tree.leaves(call.argnums):
            args[i] = _distributed.vary(self.devices.axis_name, args[i])
        return call._replace(args=args)

    def _first_carry(self, microbatch: Any, carry: Any, index: jax.Array) -> Any:
        """The carry in the type that it comes back in, and what a micro-batch gives."""
        while True:
            shapes = jax.eval_shape(microbatch, carry, index)
            cast = jax.tree.map(_types.vary_like, carry, shapes.carry)
            # By leaves: not every container knows its equals.
            types = [list(map(jax.typeof, jax.tree.leaves(c))) for c in (cast, carry)]
            if types[0] == types[1]:
                break
            carry = cast
        if self.devices.axis_name is not None:
            jaxpr = microbatch.trace(carry, index).jaxpr.jaxpr
            _distributed.check_local_loss(self.devices.axis_name, shapes.value, jaxpr)
        return carry, shapes

    def _over_devices(
        self,
        totals: _Totals,
        auxiliaries: _aux.Auxiliaries,
        carry_before: Any,
        split: _split.Split,
    ) -> _Totals:
        """The sums of all devices: the one place where these exchange anything."""
        devices, weight = self.devices, totals.weight
        if self.weight is None and self.skip is None:
            # Known before; what nobody asks for, XLA takes out of the loop.
            weight = jnp.full_like(weight, split.whole * split.size + split.tail)
            total = weight * devices.size()
        else:
            total = devices.total(weight)
        # Counted in the dtype of the sums, which are then exchanged together.
        skipped = devices.total(totals.skipped.astype(weight.dtype))
        return _Totals(
            value=devices.total(totals.value),
            grads=devices.total_gradients(totals.grads),
            aux=auxiliaries.over_devices(totals.aux, devices.axis_name),
            weight=total,
            skipped=skipped.astype(totals.skipped.dtype),
            noise=self._noise_over_devices(totals.noise),
            carry=devices.merge_carry(totals.carry, carry_before, weight, total),
        )

    def _differentiate(
        self,
        call: _arguments.Call,
        outputs: _outputs.Outputs,
        part: list[Any],
        carry: Any,
        number: Any,
        size: int,
    ) -> _Part:
        """Value and gradient on one micro-batch of `size` examples."""
        args, kwargs = call.for_microbatch(part, carry, number)

        def unpacked(*args, **kwargs):
            value, *rest = outputs.unpack(self.fun(*args, **kwargs), carry)
            return value, rest

        (value, (aux, new_carry)), grads = jax.value_and_grad(
            unpacked, call.argnums, has_aux=True
        )(*args, **kwargs)

        given = size if self.weight is None else self.weight(*args, **kwargs)
        dtype = _window.weight_dtype((value, grads, aux))
        weight, nonempty = _checks.weight(given, dtype)
        rejected = jnp.zeros([], bool)
        if self.skip is not None:
            params = jax.tree.map(lambda i: args[i], call.argnums)
            rejected, _ = _checks.skip_result(self.skip(grads, None, params))
            weight, nonempty = jnp.where(rejected, 0, weight), False
        if not nonempty:
            new_carry = jax.tree.map(
                lambda new, old: jnp.where(weight != 0, new, old), new_carry, carry
            )
        return _Part(value, grads, aux, new_carry, weight, rejected)

    def _start(self, shapes: _Part, auxiliaries: _aux.Auxiliaries, carry) -> _Totals:
        _checks.accumulator_fits(shapes.grads, self.accumulator_dtype)
        value = _window.zeros(shapes.value)
        grads = _window.zeros(shapes.grads, self.accumulator_dtype)
        return _Totals(
            value=_types.vary_like(value, shapes.weight),
            grads=_types.vary_like(grads, shapes.weight),
            aux=auxiliaries.start(shapes.weight),
            weight=_window.zeros(shapes.weight),
            skipped=_types.zeros_like(shapes.rejected, jnp.int32),
            noise=self._start_noise(shapes),
            carry=carry,
        )

    def _add(
        self, totals: _Totals, part: _Part, auxiliaries: _aux.Auxiliaries, unit: int
    ) -> _Totals:
        weight, relative = part.weight, part.weight / unit
        return _Totals(
            value=_window.add(totals.value, part.value, relative, self.reduction),
            grads=_window.add(totals.grads, part.grads, relative, self.reduction),
            aux=auxiliaries.add(totals.aux, part.aux, weight),
            weight=_window.add(totals.weight, weight, weight, "sum"),
            skipped=totals.skipped + part.rejected.astype(jnp.int32),
            noise=self._add_noise(totals.noise, part),
            carry=part.carry,
        )

    # --- The noise scale, where it was asked for ---

    def _start_noise(self, shapes: _Part) -> _noise_scale.Sums | None:
        if not self.noise_scale:
            return None
        empty = _noise_scale.Sums.empty(shapes.weight.dtype)
        return _types.vary_like(empty, shapes.weight, *jax.tree.leaves(shapes.grads))

    def _add_noise(self, sums: Any, part: _Part) -> _noise_scale.Sums | None:
        return sums and sums.add(part.grads, part.weight, self.reduction)

    def _noise_over_devices(self, sums: Any) -> _noise_scale.Sums | None:
        """The sums of all devices, in one dtype with the others."""
        return sums and self.devices.total(sums.in_one_dtype())

    def _estimate(self, totals: _Totals, shapes: _Part, unit: int) -> Any:
        if totals.noise is None:
            return ()
        weight = totals.weight
        square = self.devices.squared_norm(totals.grads, shapes.grads, weight.dtype)
        return _noise_scale.of_batch(
            totals.noise, square / (weight / unit) ** 2, weight
        )
