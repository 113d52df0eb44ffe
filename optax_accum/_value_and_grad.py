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
    """Like `jax.value_and_grad`, but runs the batch in micro-batches to save memory.

    Use it if your step receives the whole batch. It needs the memory of one micro-batch
    and of one sum as large as the gradient. The batch arguments are split into K
    micro-batches, `fun` and its gradient run on each inside one `jax.lax.scan`, and the
    sums are divided once:

        value = Σ wᵢ·vᵢ / Σ wᵢ        gradient = Σ wᵢ·gᵢ / Σ wᵢ

    wᵢ is the number of examples in micro-batch i, or what `weight` returns. If `fun` is
    a mean over the examples, these are the value and the gradient of the whole batch.

    Call it under `jax.jit`. Outside, every call compiles the loop again (and the second
    one warns).

    Args:
      fun: The function to differentiate. It sees one micro-batch at a time and returns
        a real scalar, or a complex one with `holomorphic`.
      argnums: As in `jax.value_and_grad`. If a tree has leaves that JAX does not take,
        as an Equinox model has, only its floating and complex arrays are
        differentiated; the gradient of other leaves is ``None``.
      has_aux: As in `jax.value_and_grad`.
      holomorphic: As in `jax.value_and_grad`. Weights are real all the same.
      allow_int: As in `jax.value_and_grad`: integers and random keys in the arguments
        to differentiate get a gradient of dtype float0.
      num_microbatches: K, which must divide the number of examples. Pass exactly one of
        this and `microbatch_size`.
      microbatch_size: How many examples make a micro-batch. If it does not divide the
        batch, the rest runs as one smaller micro-batch.
      batch_argnums: The positions of the batch arguments in the signature of `fun`:
        trees of arrays with the same number of examples. Any other argument is passed
        whole to every micro-batch; one with as many entries as examples is refused.
      batch_argnames: Further batch arguments, by name.
      batch_axis: The axis of the examples: an int, or a tuple with one entry per batch
        argument (first those of `batch_argnums`, then those of `batch_argnames`). An
        entry is as in `in_axes` of `jax.vmap`: an int, ``None``, or a tree of these
        that is a prefix of the argument. Leaves with ``None`` are not split.
      num_real_microbatches: How many micro-batches to run, if not all: an int, or an
        integer scalar array, which may be traced. The first ones run; see
        "Micro-batches that do not run".
      unroll: As in `jax.lax.scan`: how many micro-batches run per iteration of the
        loop, or ``True`` for no loop. It speeds up convolutions on CPUs, and costs
        compile time and memory.
      reduction: ``"mean"`` if `fun` is a mean over the weight; ``"ratio"`` if it is a
        sum, to divide by the total weight once (Σ gᵢ / Σ wᵢ); ``"sum"`` for the plain
        sum (Σ gᵢ).
      weight: ``weight(*args, **kwargs)``, called as `fun` is, returns a scalar >= 0:
        how many units (valid tokens, say) this micro-batch's mean was taken over. By
        default the number of its examples. A parameter called ``aux``, if `fun` has
        none, receives the auxiliary output of `fun`. The weight is a constant to
        derivatives.
      skip: ``skip(grads, None, params) -> (bool, info)`` rejects a micro-batch if the
        bool is true: `oa.skip_not_finite`, or one of Optax's predicates.
      overwrite: As in `oa.accumulate`: which parameters have their next value in place
        of a gradient.
      accumulator_dtype: The dtype of the sums, by default that of the gradient and at
        least float32. The result has the parameters' dtypes.
      in_place: Whether the backward pass adds each gradient straight into the sum, and
        no micro-batch's gradient ever exists. ``None``: if possible. ``True``: raises
        an error, with the reason, if it is not. ``False``: never. See "Gradients in
        place".
      aux: How to combine auxiliary outputs: ``"stack"``, ``"concat"``, ``"mean"``,
        ``"sum"``, ``"ratio"``, ``"last"``, a function of two of them, or a tree of
        these; see "Auxiliary outputs and carries".
      carry_argnum: The position of an argument that is carried from micro-batch to
        micro-batch, such as BatchNorm's statistics; see there.
      rng_argnums: The positions of arguments that are random keys, or trees of them.
        Micro-batch i gets ``jax.random.fold_in(key, i)``. Only raw keys, from
        `jax.random.PRNGKey`, must be named; see "Random keys".
      rng_argnames: Further such arguments, by name.
      return_info: Whether to return ``(result, MicrobatchInfo)``.
      noise_scale: Whether to measure the noise scale, at the cost of one norm per
        micro-batch, and to return it in the `MicrobatchInfo`.
      axis_name: The axis of devices, or several, that share the batch; see "Across
        devices".
      mesh: The mesh with that axis, for a call from plain `jax.jit`.
      scatter: Whether each device keeps only its part of the gradients.
      local: Whether to exchange nothing and return each device's own result along a
        leading axis, for `oa.accumulate` with the same `mesh`.

    Returns:
      A function with the arguments of `fun` that returns what `jax.value_and_grad`
      would, in the same dtypes; or with `return_info` or `noise_scale`, a pair of that
      and a `MicrobatchInfo`.

    Raises:
      TypeError: An option has the wrong type. At the call: `fun` does not return a real
        scalar, or changes the type of its carry; `weight` takes other arguments.
      ValueError: Options contradict each other. At the call: the size does not fit the
        batch; leaves have different numbers of examples; an argument has two roles, or
        a position or name does not exist; an argument or a closure looks like a batch
        or a raw key, but is not named as one; `aux` is not a prefix; ``in_place=True``
        is not possible.

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

      A mean over valid tokens, whose number differs between micro-batches:

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
      The backward pass adds each gradient straight into its sum. If that is not
      possible, the gradient is computed first and then added, with the same result:

      * before JAX 0.11, and with `skip` and `noise_scale`, which read gradients;
      * for leaves whose sum has a different dtype (bfloat16 parameters), or is narrower
        than float32;
      * for all leaves, if one is overwritten, not floating or tagged ``reduced``;
      * if `fun` exchanges data between devices, and `weight` may be 0 on one of them;
      * if `fun` has a `jax.Ref` or a gather with a `fill_value`, is `holomorphic`, or
        names an axis of `jax.vmap`, and wherever else JAX cannot add in place.

    Note: Micro-batches of weight 0
      In a ``"mean"`` they contribute nothing, even if their gradient is NaN, and leave
      a carry as it was. If the weight depends on the arguments alone, they do not even
      run, unless their output is needed: by the policies ``"stack"``, ``"concat"`` and
      ``"last"``, by `skip`, or by a different device.

      In a ``"ratio"`` or ``"sum"`` the weight only adds to the denominator: gradient,
      value and carry always count. To leave out a micro-batch there, reject it with
      `skip`. If the weights of a mean or ratio are all 0, so are value and gradient.

    Note: Auxiliary outputs and carries
      * ``"stack"``: all outputs, along a new first axis;
      * ``"concat"``: one entry per example along axis 0, in the order of the batch;
      * ``"mean"``: their mean, weighted as the loss is; ``"sum"``: their sum;
      * ``"ratio"``: for tuples ``(sum, count)``, such as metrics with counts of their
        own: the sum of all sums over the sum of all counts, NaN if that is 0;
      * ``"last"``: the last micro-batch's;
      * a function, such as ``jnp.maximum``: called as ``combine(a, b)`` with the result
        so far and the next output, it returns one of the same type. It must be
        associative.

      A tree of policies is a prefix of the auxiliary output. Means, sums, ratios and
      functions leave out rejected micro-batches and, with ``reduction="mean"``, those
      of weight 0. Without any other they give zeros, and a ratio NaN.

      With `carry_argnum`, `fun` returns the next carry as well: ``(value, carry)``, or
      ``(value, (aux, carry))`` with `has_aux`. The result has the same form, with the
      last carry. Leaves that `fun` returns unchanged stay the same arrays, and are not
      exchanged between devices.

    Note: Random keys
      Typed keys (`jax.random.key`) are recognised in every argument that is not
      differentiated, carried or a batch argument, and folded with the number of the
      micro-batch. To draw the same in all micro-batches, make the key a batch argument
      with ``None`` in `batch_axis`. A key per example is a part of the batch.

    Note: Order of the examples
      Equal micro-batches are strided: micro-batch i has the examples i, i + K,
      i + 2K, ... This splits a batch that is sharded over devices without
      communication, if every micro-batch can be sharded like the batch. With a smaller
      last micro-batch they are contiguous.

    Note: Micro-batches that do not run
      With `num_real_microbatches` only that many run, and only these count.
      ``"stack"`` and ``"concat"`` have zeros for the others, and ``"last"`` is the last
      one that ran. With 0 everything is zeros (a ``"ratio"`` NaN), and a carry stays as
      it is. A number outside of 0 to K is an error, or, if it is traced, clipped. A
      loop of a traced number has no reverse mode for derivatives through it. With
      `mesh` the number is that of every device. Inside `jax.pmap` or `jax.shard_map`
      each device may have its own, unless `fun` exchanges data with the others, which
      would wait forever.

    Note: Across devices
      Inside `jax.pmap` or `jax.shard_map` each device passes its own part of the batch,
      and sizes refer to that part. With `mesh` the call has the whole batch. `fun`
      returns its own loss, without psum or pmean.

      Everything is reduced over `axis_name` once, after the last micro-batch: in one
      all-reduce for each dtype of the sums, or with `scatter` one reduce-scatter for
      each leaf, unless the compiler joins them (`oa.sharding.scatter_specs` says which
      part each device keeps). Exchanges inside `fun` and its gradient happen in every
      micro-batch. The mesh's other axes are left to the compiler.

      The result is as if all micro-batches of all devices had run one after another,
      the first device's first: ``"last"`` is the last device's, and random keys are
      folded with the number among all. ``"stack"`` and ``"concat"`` stay on their
      device; with `mesh` they are one array, sharded along axis 0. A carry's floating
      leaves are averaged over the devices, by weight; its other leaves are those of the
      last device with any weight.

      With `local` the D devices of `mesh` exchange nothing. Results have a leading axis
      of devices, sharded over them: the value is ``[D]``, a gradient ``[D, ...]``, and
      so are the fields of `MicrobatchInfo`. Pass these to `oa.accumulate` with the same
      `mesh` and `axis_name`. Only a carry is still reduced.

      On an Explicit mesh, parameters that are tagged ``reduced`` get gradients that are
      ``unreduced``, as from JAX, and `jax.reshard` sums them once. `skip` and
      `noise_scale` would read them before that, and are refused.

    Note: Differentiating again
      `jax.grad` of the value with respect to `argnums` returns the gradient that is
      already computed, in the same memory. (Weights and carries are constants.) Any
      other derivative goes through the loop and keeps the activations of all
      micro-batches: it is correct, but saves no memory. These are derivatives of the
      gradient, of auxiliary outputs and of a carry; all derivatives of a call if
      anything else is differentiated as well, such as the batch or a closure of `fun`;
      those of a call with `local`; and those of a `fun` with a `jax.Ref`. (There, a NaN
      in a micro-batch of weight 0 makes a derivative NaN, as with `jnp.where`.)

    References:
      Goyal et al., Accurate, Large Minibatch SGD, 2017, section 3
      (https://arxiv.org/abs/1706.02677): the gradient of a large batch in parts.
    """
    roles = _arguments.Roles.of(
        argnums,
        batch_argnums,
        batch_argnames,
        batch_axis,
        carry_argnum,
        rng_argnums,
        rng_argnames,
    )
    _validate.one_of("reduction", reduction, _window.REDUCTIONS)
    _accumulators.check_policies("aux", aux)
    if not has_aux and aux != "stack":
        raise ValueError(
            f"`aux={aux!r}` combines auxiliary outputs, but `has_aux` is False. Pass "
            "has_aux=True, or leave `aux` out"
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
                "differ in weight, and `accumulate` needs each one's, `info.weight`"
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

    calls = _eager.Calls("`value_and_grad`", "jax.jit(oa.value_and_grad(...))", fun)

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
    """Like `jax.grad`, but runs the batch in micro-batches to save memory.

    It is `value_and_grad` without the value.

    Args:
      fun: As in `value_and_grad`.
      argnums: As in `value_and_grad`.
      has_aux: As in `value_and_grad`.
      **options: The keyword arguments of `value_and_grad`.

    Returns:
      A function that returns what `jax.grad` would: ``grads``, or ``(grads, aux)`` with
      `has_aux`. With a carry, ``aux`` becomes ``carry`` or ``(aux, carry)``. With
      `return_info` or `noise_scale`, a pair of that and a `MicrobatchInfo`.

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

    calls = _eager.Calls("`grad`", "jax.jit(oa.grad(...))", fun)

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
