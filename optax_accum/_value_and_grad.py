"""`jax.value_and_grad` whose batch runs in micro-batches.

A call goes one way: its arguments are taken apart, the batch is split, a `lax.scan`
runs `fun` and its gradient on one micro-batch after another and adds them to a
`Window`, devices sum their windows, and the window is divided once.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec as P

from optax_accum import (
    _accumulators,
    _arguments,
    _derivative,
    _eager,
    _flow,
    _outputs,
    _skip,
    _split,
    _tree,
    _validate,
    _whole,
    _window,
)
from optax_accum._derivative import Result
from optax_accum._overwrite import Overwrite, Overwritten
from optax_accum._types import (
    AnyMesh,
    Args,
    AxisName,
    Batch,
    BatchAxis,
    DType,
    Function,
    Grads,
    Kwargs,
    Reduction,
    Scalar,
    Skip,
    Tree,
)
from optax_accum._window import Window
from optax_accum.noise import _noise_scale
from optax_accum.sharding import _collectives
from optax_accum.sharding._data_parallel import DataParallel


class MicrobatchInfo(NamedTuple):
    """What `value_and_grad` returns besides its result, with `return_info`.

    Attributes:
      weight: ``f32[]`` (``f64[]`` in double precision), the sum W of the
        micro-batches' weights: how many examples or tokens the result stands for. It
        is the `weight` under which `accumulate` takes the gradient.
      skipped: ``i32[]``, how many micro-batches `skip` rejected.
      noise_scale: The `oa.noise.NoiseScale` of this batch, of ``count`` 1, or 0 (and
        NaN) if fewer than two micro-batches had any weight; ``()`` if it was not asked
        for.
    """

    weight: Scalar
    skipped: Scalar
    noise_scale: Any = ()


def value_and_grad(
    fun: Function,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    *,
    holomorphic: bool = False,
    allow_int: bool = False,
    # the batch
    num_microbatches: int | None = None,
    microbatch_size: int | None = None,
    batch_argnums: int | Sequence[int] = 1,
    batch_argnames: str | Sequence[str] = (),
    batch_axis: BatchAxis = 0,
    num_real_microbatches: int | Scalar | None = None,
    unroll: int | bool = 1,
    # how it counts
    reduction: Reduction = "mean",
    weight: Function | None = None,
    skip: Skip | None = None,
    overwrite: Overwrite | None = None,
    accumulator_dtype: DType = None,
    # other arguments and outputs
    aux: Tree = "stack",
    carry_argnum: int | None = None,
    rng_argnums: int | Sequence[int] = (),
    rng_argnames: str | Sequence[str] = (),
    return_info: bool = False,
    noise_scale: bool = False,
    # devices that share the batch
    axis_name: AxisName | None = None,
    mesh: AnyMesh | None = None,
    scatter: bool = False,
) -> Function:
    """`jax.value_and_grad` whose batch runs in micro-batches, one after another.

    The same call and the same result, in the memory of one micro-batch and of one sum
    as large as the gradient. The batch arguments are cut into K micro-batches, `fun`
    and its gradient run on each inside one `jax.lax.scan`, and the sums are divided
    once:

        value = Σ wᵢ·vᵢ / Σ wᵢ        gradient = Σ wᵢ·gᵢ / Σ wᵢ

    with wᵢ the number of examples in micro-batch i, or what `weight` says. If `fun` is
    a mean over the examples, these are the value and the gradient of the whole batch.

    Call it under `jax.jit`; outside of it the loop is compiled again at every call, and
    a warning says so once.

    Args:
      fun: The function to differentiate, returning a real scalar, or a complex one with
        `holomorphic`. It sees one micro-batch at a time.
      argnums: As in `jax.value_and_grad`. A tree with leaves that JAX does not take,
        such as a whole Equinox model, is differentiated as by
        `equinox.filter_value_and_grad`: the gradient is ``None`` for all leaves but
        floating and complex arrays.
      has_aux: As in `jax.value_and_grad`.
      holomorphic: As in `jax.value_and_grad`: value and gradient are complex. Weights
        are real all the same.
      allow_int: As in `jax.value_and_grad`: integers and random keys among what is
        differentiated get a gradient of dtype float0.
      num_microbatches: K, which must divide the number of examples. Exactly one of
        this and `microbatch_size` is needed.
      microbatch_size: How many examples make a micro-batch. If it does not divide the
        batch, the rest runs as one smaller micro-batch.
      batch_argnums: The positions, in the signature of `fun`, of the batch arguments:
        trees of arrays with the same number of examples. Any other argument is passed
        whole to every micro-batch; one with as many entries as examples is refused.
      batch_argnames: Batch arguments by name; the two add up.
      batch_axis: The axis of the examples in the leaves of the batch arguments: an int
        for all, or a tuple with one entry per batch argument (those of `batch_argnums`,
        then those of `batch_argnames`), as `in_axes` of `jax.vmap`: an int, ``None``,
        or a tree of these that is a prefix of the argument. What has ``None`` is not
        split and reaches every micro-batch whole.
      num_real_microbatches: How many micro-batches are to run, the first ones, if not
        all: an int, or an integer scalar array, which may be traced; see below.
      unroll: As in `jax.lax.scan`: how many micro-batches make one round of the loop,
        or whether to have no loop at all. It is for convolutions on CPUs, which are
        slow inside a loop; it costs time to compile, and memory.
      reduction: ``"mean"`` if `fun` is a mean over the weight; ``"ratio"`` if it is a
        sum to be divided by the total weight once (Σ gᵢ / Σ wᵢ); ``"sum"`` if it is
        not to be divided (Σ gᵢ).
      weight: ``weight(*args, **kwargs)``, called as `fun` is, returns a scalar >= 0:
        how many units (valid tokens, say) this micro-batch's mean was taken over. By
        default the number of its examples. If it has a parameter called ``aux`` that
        `fun` has not, it is given the auxiliary output of `fun` by that name; the
        result is a constant to derivatives.
      skip: ``skip(grads, None, params) -> (bool, info)`` rejects a micro-batch:
        `oa.skip_not_finite`, or one of Optax's predicates.
      overwrite: As in `oa.accumulate`: which leaves of the gradient are no gradients.
      accumulator_dtype: The dtype of the sums. By default at least float32 and never
        less than the gradient's own. The result has the parameters' dtypes.
      aux: What becomes of auxiliary outputs: ``"stack"``, ``"concat"``, ``"mean"``,
        ``"sum"``, ``"last"``, or a tree of these; see below.
      carry_argnum: An argument that is handed from micro-batch to micro-batch, such as
        BatchNorm's statistics; see below.
      rng_argnums: Arguments that are random keys, or trees of them. Micro-batch i gets
        ``jax.random.fold_in(key, i)``. Only raw keys, of `jax.random.PRNGKey`, must be
        named; see below.
      rng_argnames: Such arguments by name; the two add up.
      return_info: Whether to return ``(result, MicrobatchInfo)``.
      noise_scale: Whether to measure the noise scale, for one norm per micro-batch, and
        return it in the `MicrobatchInfo`.
      axis_name: The axis of devices, or several, that share the batch; see below.
      mesh: The mesh with that axis, for a call from plain `jax.jit`.
      scatter: Whether each device keeps only its part of the gradients.

    Returns:
      A function with the arguments of `fun` that returns what `jax.value_and_grad`
      would, in the same dtypes. With `return_info` or `noise_scale` the pair of that
      and a `MicrobatchInfo`.

    Raises:
      TypeError: An option of another type. At the call: `fun` does not return a real
        scalar, or a carry of another type than it took.
      ValueError: Options that do not fit each other. At the call: a size that does not
        fit the batch; leaves with different numbers of examples; an argument with two
        roles, or none of that position or name; an argument that looks like a batch
        or a raw key and is not named as one, or a closure over such a thing; an `aux`
        that is not a prefix.

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

    Note: Micro-batches of weight 0
      In a ``"mean"`` they contribute nothing, even if their gradient is NaN, and leave
      a carry as it was. In a ``"ratio"`` or ``"sum"`` a weight is a share of the
      denominator and no mask: gradient, value and carry count, whatever it is. What is
      to be left out of these is rejected, by `skip`, whose micro-batches contribute
      nothing to any reduction. If the weights of a mean or ratio are all 0, so are
      value and gradient.

    Note: Auxiliary outputs and carries
      ``"stack"`` gives all outputs on a new first axis; ``"concat"`` one entry per
      example along axis 0, in the order of the batch; ``"mean"`` their mean, weighted
      as the loss is; ``"sum"`` their sum, without those of weight 0; ``"last"`` the
      last micro-batch's. A tree of policies is a prefix of the auxiliary output.

      With `carry_argnum`, `fun` returns the next carry as well: ``(value, carry)``, or
      ``(value, (aux, carry))`` with `has_aux`. The result has the same form, with the
      last carry. Leaves that `fun` returns as they came stay the very same arrays, and
      go neither round the loop nor over the devices.

    Note: Random keys
      Typed keys (`jax.random.key`) are found wherever they are, in any argument that is
      not differentiated, carried or a batch argument, and each is folded with the
      number of the micro-batch. To draw the same in all micro-batches, make the
      argument a batch argument with ``None`` in `batch_axis`. A key per example is a
      part of the batch.

    Note: Order of the examples
      Equal micro-batches are strided: micro-batch i holds the examples i, i + K,
      i + 2K, ... A batch that is sharded over devices is so split without
      communication, if every micro-batch can be sharded as the batch was. With a
      smaller last micro-batch they are contiguous.

    Note: Micro-batches that do not run
      With `num_real_microbatches` the micro-batches from that number on are not run at
      all. W is that of the others; ``"stack"`` and ``"concat"`` have zeros for those
      that did not run, and ``"last"`` is the last one that did. With 0 everything is
      zeros, and a carry stays as it is. A number outside of 0 to K is an error, or, if
      it is traced, the nearest of these. What goes through the loop of a traced number
      cannot be differentiated in reverse mode. With `mesh` the number is that of every
      device.
      Inside `jax.pmap` or `jax.shard_map` each device may have its own, unless `fun`
      exchanges anything with the others, who would wait for it forever.

    Note: Across devices
      Inside `jax.pmap` or `jax.shard_map` each device calls this with its own part of
      the batch, which is what the sizes are about; with `mesh` the call has the whole
      batch. `fun` returns its own loss, without psum or pmean.

      Everything is reduced over `axis_name` once, after the last micro-batch: one
      all-reduce for each dtype of the sums, or with `scatter` one reduce-scatter for
      each leaf, unless the compiler joins them (`oa.sharding.scatter_specs` says which
      part each device keeps). What `fun` and its gradient exchange, they exchange in
      every micro-batch. The mesh's other axes stay with the compiler.

      The result is that of all micro-batches of all devices, as if they had run one
      after another, the first device's first: ``"last"`` is the last device's, and
      random keys are folded with the number among all. ``"stack"`` and ``"concat"``
      leave every device's outputs where they are; with `mesh` they are one array,
      sharded along axis 0. A carry's floating leaves are averaged over the devices, by
      weight; its other leaves are those of the last device with any weight.

      On an Explicit mesh, parameters that are tagged ``reduced`` get gradients that are
      ``unreduced``, as from JAX, and `jax.reshard` sums them once; `skip` and
      `noise_scale` would read them before that, and are refused.

    Note: Differentiating again
      `jax.grad` of the value with respect to `argnums` is the gradient that has been
      computed already, in the same memory. (So weights and carries are constants, as
      they are to the gradient.) Any other derivative goes through the loop, and keeps
      what every micro-batch needs for its backward pass: it is right, but saves no
      memory. These are derivatives of the gradient, of auxiliary outputs and of a
      carry; all derivatives of a call if something else is differentiated as well, such
      as the batch or what `fun` closes over; and those of a `fun` with a `jax.Ref`.
      (There, a NaN in a micro-batch of weight 0 makes a derivative NaN, as with
      `jnp.where`.)

    References:
      Goyal et al., Accurate, Large Minibatch SGD, 2017, section 3
      (https://arxiv.org/abs/1706.02677): the gradient of a large batch in parts.
    """
    if (num_microbatches is None) == (microbatch_size is None):
        raise ValueError(
            "exactly one of `num_microbatches` and `microbatch_size` is needed; got "
            f"{num_microbatches!r} and {microbatch_size!r}"
        )
    _validate.one_of("reduction", reduction, _window.REDUCTIONS)
    _accumulators.check_policies(aux)
    if not has_aux and aux != "stack":
        raise ValueError(
            f"`aux={aux!r}` says what becomes of auxiliary outputs, but `has_aux` "
            "is False. Pass has_aux=True, or leave `aux` out"
        )
    weight_takes_aux = weight is not None and _arguments.takes_more(weight, fun, "aux")
    if weight_takes_aux and not has_aux:
        raise ValueError(
            "`weight` has a parameter called `aux`, for the auxiliary output of `fun`, "
            "but `has_aux` is False. Return (value, aux) from `fun` and pass "
            "has_aux=True, or give the parameter another name"
        )
    roles = _arguments.Roles.of(
        argnums,
        batch_argnums,
        batch_argnames,
        batch_axis,
        carry_argnum,
        rng_argnums,
        rng_argnames,
    )
    sizes = {"num_microbatches": num_microbatches, "microbatch_size": microbatch_size}
    for name, size in sizes.items():
        if size is not None:
            sizes[name] = _validate.whole_number(name, size)
    if not isinstance(unroll, bool):
        unroll = _validate.whole_number("unroll", unroll, "a bool or an int >= 1")
    settings = Settings(
        fun=fun,
        roles=roles,
        has_aux=has_aux,
        holomorphic=holomorphic,
        allow_int=allow_int,
        **sizes,
        num_real_microbatches=num_real_microbatches,
        unroll=unroll,
        reduction=reduction,
        weight=weight,
        weight_takes_aux=weight_takes_aux,
        skip=skip,
        overwritten=Overwritten(overwrite),
        accumulator_dtype=_validate.accumulator_dtype(accumulator_dtype),
        aux=aux,
        returns_info=return_info or noise_scale,
        noise_scale=noise_scale,
        devices=DataParallel.of(axis_name, mesh, scatter),
        functions={"the loss": fun} | ({} if weight is None else {"`weight`": weight}),
    )

    calls = _eager.Calls("`value_and_grad`", "jax.jit(oa.value_and_grad(...))")

    @functools.wraps(fun)
    def value_and_grad_of_batch(*args: Any, **kwargs: Any) -> Any:
        calls.note(args, kwargs)
        return settings(args, kwargs)

    # For `grad`, `optax_accum.flax` and `check_equivalence`, which vary them.
    value_and_grad_of_batch.settings = settings  # type: ignore[attr-defined]
    return value_and_grad_of_batch


def grad(
    fun: Function,
    argnums: int | Sequence[int] = 0,
    has_aux: bool = False,
    **options: Any,
) -> Function:
    """`jax.grad` whose batch runs in micro-batches: `value_and_grad` without the value.

    Args:
      fun: As in `value_and_grad`.
      argnums: As in `value_and_grad`.
      has_aux: As in `value_and_grad`.
      **options: The keyword arguments of `value_and_grad`.

    Returns:
      A function that returns what `jax.grad` would: ``grads``, or ``(grads, aux)`` with
      `has_aux`; if there is a carry, it takes the place of ``aux``, or ``(aux, carry)``
      does. With `return_info` or `noise_scale` the pair of that and a `MicrobatchInfo`.

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
    settings = settings_of(value_and_grad(fun, argnums, has_aux, **options))

    calls = _eager.Calls("`grad`", "jax.jit(oa.grad(...))")

    @functools.wraps(fun)
    def grad_of_batch(*args: Any, **kwargs: Any) -> Any:
        calls.note(args, kwargs)
        (value, grads), info = settings.run(args, kwargs)
        result = (grads, value[1]) if settings.has_extra else grads
        return (result, info) if settings.returns_info else result

    return grad_of_batch


def settings_of(function: Function) -> "Settings":
    """The options of what `value_and_grad` returned."""
    return function.settings  # type: ignore[attr-defined]


@dataclasses.dataclass(frozen=True)
class Settings:
    """The options of `value_and_grad`, checked."""

    fun: Function
    roles: _arguments.Roles
    has_aux: bool
    holomorphic: bool
    allow_int: bool
    num_microbatches: int | None
    microbatch_size: int | None
    num_real_microbatches: int | Scalar | None
    unroll: int | bool
    reduction: Reduction
    weight: Function | None
    weight_takes_aux: bool
    skip: Skip | None
    overwritten: Overwritten
    accumulator_dtype: DType
    aux: Tree
    returns_info: bool
    noise_scale: bool
    devices: DataParallel
    functions: dict[str, Function]  # the user's, by what to call them in a message

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

    def split(self, call: _arguments.Call) -> _split.Split:
        """How the batch of a call is split."""
        return _split.plan(
            call,
            self.num_microbatches,
            self.microbatch_size,
            self.devices.num_shards,
        )

    def run_bound(self, call: _arguments.Call) -> tuple[Any, MicrobatchInfo]:
        """As `run`, of arguments that are bound to their roles."""
        self.devices.check_place()
        split = self.split(call)
        shards = self.devices.num_shards
        is_split = split.num_microbatches * shards > 1
        if is_split:
            _whole.check(call, self.roles, self.functions, split.examples * shards)
        for name, argument in call.named():
            self.devices.check_whole(name, argument)
        outputs = _outputs.Outputs(self.has_aux, call.carry_name, self.holomorphic)
        number = self.num_real_microbatches
        if number is not None:
            number = _validate.real_microbatches(number, split.num_microbatches)
        if isinstance(number, jax.Array) and (self.unroll is True or self.unroll > 1):
            raise ValueError(
                f"`unroll={self.unroll}` needs to know the number of micro-batches, "
                "and `num_real_microbatches` is traced. Leave one of the two out"
            )
        given = call.args, call.kwargs, number
        arrays, numbers = _tree.arrays_in(given), _tree.numbered(call.args)

        def loop(batch: Batch, arrays: list[Any]) -> Result:
            args, kwargs, number = _tree.filled(given, arrays)
            mine = call._replace(args=args, kwargs=kwargs, batch=batch)
            return _Loop(self, mine, split, outputs, number).run()

        # Arrays come as arguments, even outside of any `jax.jit`: what a compiled
        # function closes over, JAX keeps. What is not an array stays what it is.
        @jax.jit
        def run(batch: Batch, arrays: list[Any]) -> Result:
            specs = Result(
                value=P(),
                grads=self.devices.gradient_specs(
                    _tree.keep_inexact(call.differentiated), self.overwritten
                ),
                rest=(_accumulators.specs(self.aux, self.devices.axis_name), P(), P()),
            )
            return self.devices.on_each_device(loop, batch, arrays, split.axes, specs)

        is_a_part = self.devices.scatter and self.devices.mesh is None
        shows_values = jax.config.jax_disable_jit  # type: ignore[attr-defined]
        if is_split and not shows_values:
            _whole.check_traced(run, call.batch, arrays)
        if not is_a_part and not shows_values:
            result = _derivative.run_with_derivative(
                run,
                call.batch,
                arrays,
                jax.tree.map(lambda i: numbers[i], call.argnums),
            )
        else:
            result = run(call.batch, arrays)
        aux, written, info = result.rest
        # What `fun` has not written is not an output, and stays the very same arrays.
        carry = _tree.filled(_tree.as_jax_arrays(call.carry), written)
        grads = _tree.fill_float0(result.grads, call.differentiated)
        return (outputs.pack(result.value, aux, carry), grads), info


class _Microbatch(NamedTuple):
    """What one micro-batch gives."""

    value: Scalar
    grads: Grads  # ``None`` for what has no gradient
    aux: Tree
    carry: Tree
    weight: Scalar  # 0 if it was rejected
    rejected: Scalar
    counted: Scalar  # whether it contributes


class _Totals(NamedTuple):
    """What goes from micro-batch to micro-batch."""

    window: Window
    aux: list[Tree]  # what each leaf's accumulator carries
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

    def run(self) -> Result:
        """One micro-batch after another, the sum over devices, and the division."""
        call, split = self.call, self.split
        before = _tree.strongly_typed(call.carry)

        # Under `jax.jit`, the loop reuses the trace that the shapes need.
        @jax.jit
        def microbatch(carry: Tree, index: Scalar) -> _Microbatch:
            part = split.take(call.batch, index)
            return self._microbatch(part, carry, index, split.size)

        @jax.jit
        def remainder(carry: Tree) -> _Microbatch:
            part = split.take_remainder(call.batch)
            return self._microbatch(part, carry, split.whole, split.remainder)

        indices = jnp.arange(split.whole, dtype=jnp.int32)
        is_written = _is_written(microbatch, before, indices[0])
        if split.remainder:
            also = _is_written(remainder, before)
            is_written = [a or b for a, b in zip(is_written, also, strict=True)]
        carry, shapes = self._first_carry(microbatch, before, is_written, indices[0])
        accumulators = _accumulators.plan(self.settings.aux, shapes.aux, split)

        def step(totals: _Totals, index: Scalar) -> _Totals:
            new = microbatch(_tree.filled(before, totals.carry), index)
            return self._add(totals, new, accumulators, index, split.size)

        def last_step(totals: _Totals) -> _Totals:
            new = remainder(_tree.filled(before, totals.carry))
            return self._add(totals, new, accumulators, split.whole, split.remainder)

        totals = self._start(shapes, accumulators, carry)
        if isinstance(self.number, jax.Array):
            totals = self._some(self.number, step, last_step, totals)
        else:
            number = split.num_microbatches if self.number is None else self.number
            totals, _ = lax.scan(
                lambda totals, index: (step(totals, index), None),
                totals,
                indices[:number],
                unroll=self.settings.unroll,
            )
            if number > split.whole:
                totals = last_step(totals)
        return self._finish(totals, shapes, accumulators, before)

    def _some(
        self,
        number: Scalar,
        step: Callable[[_Totals, Scalar], _Totals],
        last_step: Callable[[_Totals], _Totals],
        totals: _Totals,
    ) -> _Totals:
        """As many micro-batches as `number` says when it runs."""
        whole, axis_name = self.split.whole, self.settings.devices.axis_name

        def vary(totals: _Totals) -> _Totals:
            # The number, and so all that is summed up, may differ between devices.
            return _tree.vary_like(_collectives.vary(axis_name, totals), number)

        totals = lax.fori_loop(
            np.int32(0),
            jnp.minimum(number, whole).astype(jnp.int32),
            lambda index, totals: vary(step(totals, index)),
            vary(totals),
        )
        if not self.split.remainder:
            return totals
        return lax.cond(
            number > whole, lambda t: vary(last_step(t)), lambda t: t, totals
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

    def _microbatch(
        self, part: Batch, carry: Tree, index: int | Scalar, size: int
    ) -> _Microbatch:
        """Value and gradient on one micro-batch of `size` examples."""
        call, settings = self.call, self.settings
        number = settings.devices.global_index(index, self.split.num_microbatches)
        args, kwargs = call.for_microbatch(part, carry, number)
        parts = list(args)
        for i in jax.tree.leaves(call.argnums):
            # So that `jax.grad` gives this device's gradient, and not the sum of all.
            own = _tree.differentiated(args[i])
            parts[i] = _collectives.vary(settings.devices.axis_name, own)
            args[i] = _tree.merge(parts[i], args[i])

        def unpacked(*parts: Any, **kwargs: Any) -> tuple[Scalar, Any]:
            whole = list(parts)
            for i in jax.tree.leaves(call.argnums):
                whole[i] = _tree.merge(parts[i], args[i])
            result = call.apply(settings.fun, whole, kwargs)
            value, *rest = self.outputs.unpack(result, carry)
            return value, rest

        (value, (aux, new_carry)), grads = jax.value_and_grad(
            unpacked,
            call.argnums,
            has_aux=True,
            holomorphic=settings.holomorphic,
            allow_int=settings.allow_int,
        )(*parts, **kwargs)
        grads = _tree.keep_inexact(grads)
        _check_reads(settings, grads)

        given = size / self._examples_per_weight
        if settings.weight is not None:
            more = {"aux": lax.stop_gradient(aux)} if settings.weight_takes_aux else {}
            given = call.apply(settings.weight, args, kwargs | more)
        dtype = _tree.scalar_dtype((value, grads, aux))
        weight, is_positive = _validate.weight(given, dtype)
        params = _tree.keep_inexact(jax.tree.map(lambda i: parts[i], call.argnums))
        weight, rejected, _ = _skip.ask(settings.skip, weight, grads, None, params)
        counted: bool | Scalar = True
        if not is_positive or settings.skip is not None:
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

    def _first_carry(
        self, microbatch: Any, before: Tree, is_written: list[bool], index: Scalar
    ) -> tuple[list[Any], _Microbatch]:
        """What is written, in the type in which it comes back, and what comes back."""
        axis_name = self.settings.devices.axis_name
        leaves = jax.tree.leaves(before)
        carry = [x if w else None for x, w in zip(leaves, is_written, strict=True)]
        while True:
            whole = _tree.filled(before, carry)
            shapes = jax.eval_shape(microbatch, whole, index)
            after = _tree.kept_like(carry, shapes.carry)
            cast = jax.tree.map(_tree.vary_like, carry, after)
            # By leaves: not every container knows its equals.
            types = [list(map(jax.typeof, jax.tree.leaves(c))) for c in (cast, carry)]
            if types[0] == types[1]:
                break
            carry = cast
        if axis_name is not None:
            jaxpr = microbatch.trace(whole, index).jaxpr.jaxpr
            _collectives.check_local_loss(axis_name, shapes.value, jaxpr)
        return carry, shapes

    def _start(
        self,
        shapes: _Microbatch,
        accumulators: list[_accumulators.Accumulator],
        carry: list[Any],
    ) -> _Totals:
        _validate.accumulator_fits(shapes.grads, self.settings.accumulator_dtype)
        window = Window.empty(
            shapes.grads,
            shapes.value,
            shapes.weight,
            accumulator_dtype=self.settings.accumulator_dtype,
            measure_noise=self.settings.noise_scale,
            overwritten=self.settings.overwritten,
        )
        aux = [accumulator.start(shapes.weight) for accumulator in accumulators]
        return _Totals(window, aux, carry)

    def _add(
        self,
        totals: _Totals,
        new: _Microbatch,
        accumulators: list[_accumulators.Accumulator],
        index: int | Scalar,
        size: int,
    ) -> _Totals:
        part = _accumulators.Part(index, size, new.weight, new.counted)
        rows = zip(accumulators, totals.aux, jax.tree.leaves(new.aux), strict=True)
        return _Totals(
            window=totals.window.add(
                new.grads,
                new.value,
                new.weight,
                reduction=self.settings.reduction,
                rejected=new.rejected,
                overwritten=self.settings.overwritten,
            ),
            aux=[a.add(carried, output, part) for a, carried, output in rows],
            carry=_tree.kept_like(totals.carry, new.carry),
        )

    def _finish(
        self,
        totals: _Totals,
        shapes: _Microbatch,
        accumulators: list[_accumulators.Accumulator],
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
        finished = [
            a.finish(a.over_devices(carried, devices.axis_name), total.weight)
            for a, carried in zip(accumulators, totals.aux, strict=True)
        ]
        value, grads = _tree.cast_like(
            total.result(settings.reduction, settings.overwritten),
            (shapes.value, shapes.grads),
        )
        grads = settings.overwritten.unless_empty(
            grads, _tree.keep_inexact(self.call.differentiated), total.weight
        )
        aux = jax.tree.unflatten(jax.tree.structure(shapes.aux), finished)
        weight = total.weight
        if self._examples_per_weight != 1:
            weight = jnp.round(
                weight * self._examples_per_weight
            )  # a number of examples
        info = MicrobatchInfo(weight, total.skipped, self._noise_scale(total, shapes))
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


def _is_written(microbatch: Any, carry: Tree, *args: Any) -> list[bool]:
    """For each leaf of `carry`, whether `microbatch` returns anything else for it.

    What it does not write, such as a frozen part of a model, goes neither round the
    loop nor over the devices.
    """
    if not jax.tree.leaves(carry):
        return []
    sources = _flow.of_call(microbatch, carry, *args)
    shapes = jax.eval_shape(microbatch, carry, *args)
    numbers = jax.tree.leaves(_tree.numbered(shapes).carry)
    return [sources[number].same != i for i, number in enumerate(numbers)]
