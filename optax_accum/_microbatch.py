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
    """Runs `fun` in micro-batches, with exact outputs and derivatives in less memory.

    Use it for losses that are not sums over examples, such as contrastive ones: encode
    in micro-batches, and compute the loss from all outputs at once. `value_and_grad`
    cannot make such a loss exact.

    `fun` must treat every example by itself, as an encoder with LayerNorm does, or
    return sums or means over examples. Compare examples in the loss. (BatchNorm in
    `fun` has the statistics of one micro-batch.)

    The forward pass runs `fun` on one micro-batch after another and only keeps its
    outputs. The backward pass runs each micro-batch again and adds its gradient
    straight into one sum. This needs the memory of one micro-batch, the outputs, one
    gradient and the carries, and the time of `jax.checkpoint`: one more forward pass.
    As `fun` runs twice, it must be pure.

    Put `jax.jit` around the training step. Outside, every call compiles the loops
    again.

    Args:
      fun: Any function of arrays that returns a tree of arrays. It sees one micro-batch
        at a time. It may close over arrays, including differentiated ones.
      num_microbatches: K, which must divide the number of examples. Pass exactly one of
        this and `microbatch_size`.
      microbatch_size: How many examples make a micro-batch. If it does not divide the
        batch, the rest runs as one smaller micro-batch.
      batch_argnums: As in `value_and_grad`: the positions of the batch arguments. For a
        function of the batch alone, 0.
      batch_argnames: As in `value_and_grad`.
      batch_axis: The axis of the examples in the leaves of the batch arguments, as in
        `value_and_grad`.
      num_real_microbatches: How many micro-batches to run, if not all: an int, or an
        integer scalar array, which may be traced. The first ones run. Under
        ``"concat"`` and ``"stack"``, outputs of the others are zeros.
      unroll: As in `value_and_grad`.
      outputs: How to combine the outputs: ``"concat"``, ``"stack"``, ``"sum"``,
        ``"mean"``, ``"last"``, or a tree of these that is a prefix of the outputs; see
        "Outputs".
      weight: ``weight(*args, **kwargs)``, called as `fun` is, returns a scalar >= 0:
        how many units a ``"mean"`` of this micro-batch was taken over. By default the
        number of its examples. It is a constant to derivatives.
      carry_argnum: The position of an argument that is carried from micro-batch to
        micro-batch, such as BatchNorm's statistics; see "Carries".
      rng_argnums: As in `value_and_grad`.
      rng_argnames: As in `value_and_grad`.
      accumulator_dtype: The dtype of the gradient's sum, by default at least float32.
        The gradient has the arguments' dtypes.
      in_place: Whether the backward pass adds each gradient straight into the sum, as
        in `value_and_grad`.
      axis_name: The axis of `mesh`, or several, over which the batch is sharded.
      mesh: The mesh with that axis, for a call from plain `jax.jit`; see "Across
        devices".

    Returns:
      A function with the arguments of `fun` that returns what `fun` does, in the same
      dtypes, or with `carry_argnum` ``(outputs, carry)``.

    Raises:
      TypeError: An option has the wrong type. At the call: `fun` changes the type of
        its carry; a random key is under ``"sum"`` or ``"mean"``; it is under `jax.jvp`,
        for which there is no forward mode.
      ValueError: As `value_and_grad`; `axis_name` without `mesh`. At the call: an
        output has no entry for each example under ``"concat"``, or different shapes
        under ``"stack"``. When it is differentiated: ``in_place=True`` is not possible.

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
      ``"stack"`` all outputs along a new first axis; ``"sum"`` their sum; ``"mean"``
      their mean, weighted; ``"last"`` the last micro-batch's. Sums and means leave out
      micro-batches of weight 0, even if they are NaN. Their gradient is left out as
      well, unless an output with a different policy is also differentiated.

    Note: What is differentiated
      Gradients go to all floating arguments, including the batch, and to arrays that
      `fun` closes over. Arguments that you do not differentiate cost nothing. If two
      calls share parameters, as two towers may, each has a sum of its own; one call
      with both batches has one.

      Use `jax.value_and_grad` around the loss. `oa.value_and_grad` would split the
      batch again, and compute a loss for each of its micro-batches.

      The derivative is exact, and so are derivatives of the gradient: `jax.jvp` of
      `jax.grad`, which needs little more memory, and `jax.grad` of `jax.grad`, which
      keeps the activations of all micro-batches, and needs a known number of them.
      Forward mode alone (`jax.jvp`) needs no backward pass: use `fun` itself.

    Note: Carries
      `fun` returns ``(outputs, carry)``. The carry goes from micro-batch to micro-batch
      in the forward pass. In the backward pass each micro-batch gets the same carry
      again, as a constant: no derivative goes through it, and all K are kept.
      Micro-batches of weight 0 leave it as it was. Leaves that `fun` returns unchanged
      are arguments like any other: they are differentiated, and stay the same arrays.

    Note: Random keys
      As in `value_and_grad`. Both passes draw the same, bit for bit.

    Note: Order of the examples
      As in `value_and_grad`: equal micro-batches are strided, and the outputs are in
      the order of the batch.

    Note: Across devices
      Inside `jax.pmap` or `jax.shard_map` each device runs this on its own part of the
      batch, and has its own outputs, including sums. Gather them in the loss, and
      reduce gradients as without this function. Give each device its own random key.
      Under ``check_vma=True``, where `jax.grad` itself sums the gradient of parameters
      that all devices share, it does so once, after the last micro-batch; but in every
      micro-batch for arrays that `fun` closes over. Make these arguments, or cast them
      with ``jax.lax.pcast(params, axis_name, to="varying")``.

      From plain `jax.jit` on a sharded batch the compiler reduces the gradient in every
      micro-batch. With `mesh` and `axis_name` it does so once, after the last one; the
      outputs are sharded as the batch was, and sums and means are those of all devices.
      ``"stack"`` is sharded along axis 0: all of the first device's, then the next's.
      (Arrays on a mesh with Explicit axes must then be arguments, not in a closure.)

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
            "own, and the loss gathers them"
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
    calls = _eager.Calls("`microbatch`", "jax.jit(oa.microbatch(...))", fun)

    @functools.wraps(fun)
    def in_microbatches(*args: Any, **kwargs: Any) -> Any:
        calls.note(args, kwargs)
        return settings(args, kwargs)

    # For `optax_accum.flax`, which varies them.
    in_microbatches.settings = settings  # type: ignore[attr-defined]
    return in_microbatches
