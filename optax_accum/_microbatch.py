"""A function whose batch runs in micro-batches, forward and backward: its options."""

import functools
from collections.abc import Sequence
from typing import Any

from optax_accum import _accumulators, _arguments, _eager, _microbatching, _validate
from optax_accum._passes import Settings
from optax_accum._types import (
    AnyMesh,
    AxisName,
    BatchAxis,
    DType,
    Function,
    Scalar,
    Tree,
)
from optax_accum.sharding._data_parallel import DataParallel


def microbatch(
    fun: Function,
    *,
    # the batch
    num_microbatches: int | None = None,
    microbatch_size: int | None = None,
    batch_argnums: int | Sequence[int] = 1,
    batch_argnames: str | Sequence[str] = (),
    batch_axis: BatchAxis = 0,
    num_real_microbatches: int | Scalar | None = None,
    unroll: int | bool = 1,
    # outputs
    outputs: Tree = "concat",
    weight: Function | None = None,
    # other arguments
    carry_argnum: int | None = None,
    rng_argnums: int | Sequence[int] = (),
    rng_argnames: str | Sequence[str] = (),
    # the backward pass
    accumulator_dtype: DType = None,
    in_place: bool | None = None,
    # devices that share the batch
    axis_name: AxisName | None = None,
    mesh: AnyMesh | None = None,
) -> Function:
    """`fun` in micro-batches: the same outputs and derivative, in less memory.

    For losses that are not sums over examples, such as contrastive ones: encode in
    micro-batches, and compute the loss from all outputs at once. `value_and_grad`
    cannot make such a loss exact; this does.

    `fun` must treat every example by itself, as an encoder with LayerNorm does, or
    return sums or means over examples. Whatever compares examples belongs in the loss.
    (BatchNorm in `fun` has the statistics of one micro-batch.)

    The forward pass runs `fun` on one micro-batch after another and keeps its outputs
    only. The backward pass runs each micro-batch again, with the cotangents of its own
    outputs, and adds its gradient straight into one sum. So the memory is that of one
    micro-batch, the outputs, one gradient and what is carried, and the time that of
    `jax.checkpoint`: one more forward pass. As `fun` runs twice, it must be pure.

    Put `jax.jit` around the training step. Outside of it the loops are compiled again
    at every call.

    Args:
      fun: Any function of arrays that returns a tree of arrays. It sees one micro-batch
        at a time. It may close over arrays, also over what is differentiated.
      num_microbatches: K, which must divide the number of examples. Exactly one of
        this and `microbatch_size` is needed.
      microbatch_size: How many examples make a micro-batch. If it does not divide the
        batch, the rest runs as one smaller micro-batch.
      batch_argnums: As in `value_and_grad`: the positions of the batch arguments. For a
        function of the batch alone, 0.
      batch_argnames: As in `value_and_grad`.
      batch_axis: The axis of the examples in the leaves of the batch arguments, as in
        `value_and_grad`.
      num_real_microbatches: How many micro-batches are to run, the first ones, if not
        all: an int, or an integer scalar array, which may be traced. Outputs of those
        that do not run are zeros, under ``"concat"`` and ``"stack"``.
      unroll: As in `value_and_grad`.
      outputs: What becomes of the outputs: ``"concat"``, ``"stack"``, ``"sum"``,
        ``"mean"``, ``"last"``, or a tree of these that is a prefix of them; see below.
      weight: ``weight(*args, **kwargs)``, called as `fun` is, returns a scalar >= 0:
        how many units a ``"mean"`` of this micro-batch was taken over. By default the
        number of its examples. It is a constant to derivatives.
      carry_argnum: An argument that is handed from micro-batch to micro-batch, such as
        BatchNorm's statistics; see below.
      rng_argnums: As in `value_and_grad`.
      rng_argnames: As in `value_and_grad`.
      accumulator_dtype: The dtype of the gradient's sum. By default at least float32.
        The gradient has the arguments' dtypes.
      in_place: Whether the backward pass adds each gradient straight into the sum:
        ``None`` if possible, ``True`` or an error that says why not, ``False`` never.
        See "Gradients in place" in `value_and_grad`.
      axis_name: The axis of `mesh`, or several, over which the batch is sharded.
      mesh: The mesh with that axis, for a call from plain `jax.jit`; see below.

    Returns:
      A function with the arguments of `fun` that returns what `fun` does, in the same
      dtypes, or with `carry_argnum` ``(outputs, carry)``.

    Raises:
      TypeError: An option of another type. At the call: a carry of another type than it
        took; a random key under ``"sum"`` or ``"mean"``; under `jax.jvp`, as this has a
        reverse mode only.
      ValueError: As `value_and_grad`; an `axis_name` without `mesh`. At the call: an
        output without an entry for each example under ``"concat"``, or of different
        shapes under ``"stack"``. When it is differentiated: ``in_place=True`` where
        that is not possible.

    Examples:
      >>> import jax, jax.numpy as jnp, optax_accum as oa
      >>> def encode(w, x):
      ...     return jnp.tanh(x @ w)
      >>> def loss(w, x, encode):
      ...     z = encode(w, x)
      ...     return -jnp.mean(jnp.diag(jax.nn.log_softmax(z @ z.T)))
      >>> w, x = jnp.ones((2, 3)) / 4, jnp.arange(12.0).reshape(6, 2) / 12
      >>> print(jax.grad(loss)(w, x, encode).round(3)[0])
      [-0.051 -0.051 -0.051]
      >>> in_parts = oa.microbatch(encode, num_microbatches=3)
      >>> step = jax.jit(lambda w, x: jax.grad(loss)(w, x, in_parts))
      >>> print(step(w, x).round(3)[0])
      [-0.051 -0.051 -0.051]

    Note: Outputs
      ``"concat"`` gives one entry per example along axis 0, in the order of the batch;
      ``"stack"`` all outputs on a new first axis; ``"sum"`` their sum; ``"mean"`` their
      mean, weighted; ``"last"`` the last micro-batch's. Sums and means leave out
      micro-batches of weight 0, even if they are NaN. Their gradient is left out as
      well, unless an output with another policy is differentiated, too.

    Note: What is differentiated
      Gradients go to all floating arguments, the batch included, and to what `fun`
      closes over. What is not differentiated costs nothing. If two calls share
      parameters, as two towers may, each has a sum of its own; one call with both
      batches has one.

      The derivative is exact, and so are derivatives of the gradient: `jax.jvp` of
      `jax.grad`, which needs little more memory, and `jax.grad` of `jax.grad`, which
      keeps what every micro-batch needs, and a known number of them. Without a gradient
      there is no forward mode (`jax.jvp`). It needs no backward pass: use `fun` itself.

      `value_and_grad` around a loss with this in it splits the batch again, and its
      micro-batches have a loss each: use `jax.value_and_grad`.

    Note: Carries
      `fun` returns ``(outputs, carry)``. The carry goes from micro-batch to micro-batch
      in the forward pass alone. In the backward pass each micro-batch is given the
      carry that it had in the forward pass, as a constant: no derivative goes through
      it, and all K are kept. Micro-batches of weight 0 leave it as it was. Leaves that
      `fun` returns as they came are arguments like any other: they are differentiated,
      and stay the very same arrays.

    Note: Random keys
      As in `value_and_grad`. Both passes draw the same, bit for bit.

    Note: Order of the examples
      As in `value_and_grad`: equal micro-batches are strided, and the outputs are in
      the order of the batch.

    Note: Across devices
      Inside `jax.pmap` or `jax.shard_map` each device runs this on its own part of the
      batch, and has its own outputs, sums included. The loss gathers them, and
      gradients are reduced as without this function. Give each device a random key of
      its own. Under ``check_vma=True``, where `jax.grad` itself sums the gradient of
      parameters that all devices share, it does so once, after the last micro-batch;
      but in every one for what `fun` closes over. Make that an argument, or cast it
      with ``jax.lax.pcast(params, axis_name, to="varying")``.

      From plain `jax.jit` on a sharded batch the compiler reduces the gradient in every
      micro-batch. With `mesh` and `axis_name` it does so once, after the last one; the
      outputs are sharded as the batch was, and sums and means are those of all devices.
      ``"stack"`` is sharded along axis 0: all of the first device's, then the next's.
      (What `fun` closes over may not be placed on a mesh with Explicit axes then: JAX
      wants it as an argument.)

    References:
      Gao et al., Scaling Deep Contrastive Learning Batch Size under Memory Limited
      Setup, 2021 (https://arxiv.org/abs/2101.06983), "gradient caching".
    """
    _accumulators.check_policies("outputs", outputs)
    _validate.function("weight", weight, _validate.A_WEIGHT)
    roles = _arguments.Roles.of(
        (),
        batch_argnums,
        batch_argnames,
        batch_axis,
        carry_argnum,
        rng_argnums,
        rng_argnames,
    )
    if axis_name is not None and mesh is None:
        raise ValueError(
            f"`axis_name={axis_name!r}` needs `mesh`, for a call from plain jax.jit. "
            "Inside jax.pmap or jax.shard_map leave it out: outputs are each device's "
            "own there, and the loss gathers them"
        )
    settings = Settings(
        fun=fun,
        roles=roles,
        **_microbatching.checked_options(
            num_microbatches, microbatch_size, unroll, in_place
        ),
        num_real_microbatches=num_real_microbatches,
        outputs=outputs,
        weight=weight,
        accumulator_dtype=_validate.accumulator_dtype(accumulator_dtype),
        devices=DataParallel.of(axis_name, mesh),
        functions=Settings.named(fun, weight),
    )
    calls = _eager.Calls("`microbatch`", "jax.jit(oa.microbatch(...))")

    @functools.wraps(fun)
    def in_microbatches(*args: Any, **kwargs: Any) -> Any:
        calls.note(args, kwargs)
        return settings(args, kwargs)

    # For `optax_accum.flax`, which varies them.
    in_microbatches.settings = settings  # type: ignore[attr-defined]
    return in_microbatches
