"""`jax.value_and_grad` whose batch runs in micro-batches: its options, checked."""

import functools
from collections.abc import Sequence
from typing import Any

from optax_accum import (
    _accumulators,
    _arguments,
    _eager,
    _microbatching,
    _validate,
    _window,
)
from optax_accum._loop import Settings
from optax_accum._overwrite import Overwrite, Overwritten
from optax_accum._types import (
    AnyMesh,
    AxisName,
    BatchAxis,
    DType,
    Function,
    Reduction,
    Scalar,
    Skip,
    Tree,
)
from optax_accum.sharding._data_parallel import DataParallel


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
    in_place: bool | None = None,
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
    local: bool = False,
) -> Function:
    """`jax.value_and_grad` whose batch runs in micro-batches, one after another.

    The same call and the same result, in the memory of one micro-batch and of one sum
    as large as the gradient, to which the backward pass adds in place. The batch
    arguments are cut into K micro-batches, `fun` and its gradient run on each inside
    one `jax.lax.scan`, and the sums are divided once:

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
      in_place: Whether the backward pass adds each gradient straight into the sum, so
        that no micro-batch's gradient is ever held. ``None``: wherever that is
        possible. ``True``: an error, with the reason, if it is not. ``False``: never.
        See "Gradients in place" below.
      aux: What becomes of auxiliary outputs: ``"stack"``, ``"concat"``, ``"mean"``,
        ``"sum"``, ``"ratio"``, ``"last"``, a function that combines two of them, or a
        tree of these; see below.
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
      local: Whether to exchange nothing, and return a row for each device of `mesh`,
        for `oa.accumulate` with the same `mesh`; see below.

    Returns:
      A function with the arguments of `fun` that returns what `jax.value_and_grad`
      would, in the same dtypes. With `return_info` or `noise_scale` the pair of that
      and a `MicrobatchInfo`.

    Raises:
      TypeError: An option of another type. At the call: `fun` does not return a real
        scalar, or a carry of another type than it took.
      ValueError: Options that do not fit each other. At the call: ``in_place=True``
        where that is not possible; a size that does not
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

    Note: Gradients in place
      The backward pass adds each gradient straight into its sum, so that a whole
      gradient never exists. If that is not possible, it is computed first and then
      added, with the same result:

      * before JAX 0.11, and with `skip` and `noise_scale`, which read gradients;
      * for leaves whose sum has another dtype, as those of bfloat16 parameters do, or
        is narrower than float32;
      * for all leaves, if one is overwritten, not floating or tagged ``reduced``;
      * if `fun` exchanges data between devices, and `weight` may be 0 on one of them;
      * if `fun` has a `jax.Ref` or a gather with a `fill_value`, is `holomorphic`, or
        names an axis of `jax.vmap`, and wherever else JAX cannot add in place.

    Note: Micro-batches of weight 0
      In a ``"mean"`` they contribute nothing, even if their gradient is NaN, and leave
      a carry as it was. If their weight depends on the arguments alone, they do not
      run at all, unless something needs what they return: an output that is stacked,
      concatenated or the last one's, `skip`, or another device.

      In a ``"ratio"`` or ``"sum"`` a weight is a share of the denominator and no mask:
      gradient, value and carry count, whatever it is. What is to be left out of these
      is rejected, by `skip`, whose micro-batches contribute nothing to any reduction.
      If the weights of a mean or ratio are all 0, so are value and gradient.

    Note: Auxiliary outputs and carries
      ``"stack"`` gives all outputs on a new first axis; ``"concat"`` one entry per
      example along axis 0, in the order of the batch; ``"mean"`` their mean, weighted
      as the loss is; ``"sum"`` their sum; ``"last"`` the last micro-batch's.
      ``"ratio"`` is for metrics with counts of their own: each is a tuple
      ``(sum, count)``, and becomes the sum of all over the count of all, NaN if there
      was nothing to count. A function, such as ``jnp.maximum``, is called as
      ``combine(a, b)`` with the result so far and the next output, and returns another
      of their type. It must be associative. A tree of policies is a prefix of the
      auxiliary output; a function in it gets the part at its place.

      Means, sums, ratios and functions leave out what `skip` rejects and, with
      ``reduction="mean"``, micro-batches of weight 0. If none is left they give zeros,
      and a ratio NaN.

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
      zeros (a ``"ratio"`` NaN), and a carry stays as it is. A number outside of 0 to K
      is an error, or, if it is traced, the nearest of these. What goes through the loop
      of a traced number cannot be differentiated in reverse mode. With `mesh` the
      number is that of every device.
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

      With `local` the D devices of `mesh` exchange nothing, and each has its own
      result: whatever would be reduced has a leading axis of devices instead, which is
      sharded over them. The value is ``[D]``, the gradient of a parameter ``[...]`` is
      ``[D, ...]``, and so is what `MicrobatchInfo` holds. `oa.accumulate` with the same
      `mesh` and `axis_name` takes these. Only a carry is reduced all the same.

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
      as the batch or what `fun` closes over; those of a call with `local`; and those of
      a `fun` with a `jax.Ref`.
      (There, a NaN in a micro-batch of weight 0 makes a derivative NaN, as with
      `jnp.where`.)

    References:
      Goyal et al., Accurate, Large Minibatch SGD, 2017, section 3
      (https://arxiv.org/abs/1706.02677): the gradient of a large batch in parts.
    """
    _validate.one_of("reduction", reduction, _window.REDUCTIONS)
    _accumulators.check_policies("aux", aux)
    if not has_aux and aux != "stack":
        raise ValueError(
            f"`aux={aux!r}` says what becomes of auxiliary outputs, but `has_aux` "
            "is False. Pass has_aux=True, or leave `aux` out"
        )
    _validate.function("weight", weight, _validate.A_WEIGHT)
    _validate.function("skip", skip, _validate.A_SKIP)
    weight_takes_aux = weight is not None and _arguments.takes_more(weight, fun, "aux")
    if weight_takes_aux and not has_aux:
        raise ValueError(
            "`weight` has a parameter called `aux`, for the auxiliary output of `fun`, "
            "but `has_aux` is False. Return (value, aux) from `fun` and pass "
            "has_aux=True, or give the parameter another name"
        )
    for name, option in {"weight": weight, "skip": skip}.items():
        if local and option is not None and not (return_info or noise_scale):
            raise ValueError(
                f"`local=True` and `{name}` need `return_info=True`: devices may "
                "differ in weight, and `accumulate` needs that of each, `info.weight`"
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
    settings = Settings(
        fun=fun,
        roles=roles,
        has_aux=has_aux,
        holomorphic=holomorphic,
        allow_int=allow_int,
        **_microbatching.checked_options(
            num_microbatches, microbatch_size, unroll, in_place
        ),
        num_real_microbatches=num_real_microbatches,
        reduction=reduction,
        weight=weight,
        weight_takes_aux=weight_takes_aux,
        skip=skip,
        overwritten=Overwritten(overwrite),
        accumulator_dtype=_validate.accumulator_dtype(accumulator_dtype),
        aux=aux,
        returns_info=return_info or noise_scale,
        noise_scale=noise_scale,
        devices=DataParallel.of(axis_name, mesh, scatter, local),
        functions=Settings.named(fun, weight),
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


def settings_of(function: Function) -> Settings:
    """The options of what `value_and_grad` returned."""
    return function.settings  # type: ignore[attr-defined]
