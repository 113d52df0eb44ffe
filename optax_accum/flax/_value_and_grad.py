"""`nnx.value_and_grad` with a batch in micro-batches."""

import dataclasses
import functools
from typing import Any

from flax import nnx
from flax.nnx.filterlib import Filter

from optax_accum import (
    _eager,
    _value_and_grad,
)
from optax_accum._types import Function
from optax_accum._value_and_grad import settings_of
from optax_accum.flax import _module
from optax_accum.flax._functional import STATE, Loss, taken_apart


def value_and_grad(
    loss_fn: Function,
    *,
    has_aux: bool = False,
    wrt: Filter = nnx.Param,
    **options: Any,
) -> Function:
    """Like `nnx.value_and_grad`, but runs the batch in micro-batches to save memory.

    Variables other than parameters (running statistics of BatchNorm, counts of random
    streams) are carried from one micro-batch to the next and written back to the
    module, so dropout differs between micro-batches. So are those of `nnx.Rngs`,
    modules and variables in the other arguments. Variables that `loss_fn` only reads,
    such as a frozen base, stay the same arrays. Micro-batch i has the examples i,
    i + K, i + 2K, ... (with a smaller last one they are contiguous).

    Args:
      loss_fn: ``loss_fn(model, batch, ...)`` returns a real scalar, or with `has_aux` a
        pair of it and auxiliary outputs. It sees one micro-batch at a time.
      has_aux: Whether `loss_fn` returns ``(value, aux)``.
      wrt: Which of the module's variables to differentiate with respect to.
      **options: The keyword arguments of `oa.value_and_grad`: `num_microbatches` or
        `microbatch_size`; `batch_argnums`, where the module is 0; `weight`, which is
        called as `loss_fn` is; `aux`, `reduction`, `skip`, `mesh`, ... There is no
        `carry_argnum`: the module carries its state.

    Returns:
      A function with the arguments of `loss_fn` that returns ``(value, grads)`` or
      ``((value, aux), grads)``; with `return_info` or `noise_scale`, a pair of that and
      an `oa.MicrobatchInfo`. `grads` is an `nnx.State`, as from `nnx.value_and_grad`.

    Raises:
      TypeError: As `oa.value_and_grad`; `argnums` is given; at the call, the first
        argument is not a module.
      ValueError: As `oa.value_and_grad`; `carry_argnum` is given; at the call,
        `loss_fn` adds variables to the module, removes some or changes their types,
        changes a plain attribute, or writes values to parameters that depend on the
        batch; a further argument shares parameters with the module.

    Examples:
      >>> import jax, jax.numpy as jnp, optax_accum.flax as oaf
      >>> from flax import nnx
      >>> class Model(nnx.Module):
      ...     def __init__(self, rngs):
      ...         self.linear = nnx.Linear(2, 3, rngs=rngs)
      ...         self.norm = nnx.BatchNorm(3, rngs=rngs)
      ...         self.dropout = nnx.Dropout(0.5, rngs=rngs)
      ...     def __call__(self, x):
      ...         return self.dropout(self.norm(self.linear(x)))
      >>> def loss_fn(model, x):
      ...     return jnp.mean(model(x) ** 2)
      >>> model = Model(nnx.Rngs(0))
      >>> in_parts = nnx.jit(oaf.value_and_grad(loss_fn, num_microbatches=4))
      >>> value, grads = in_parts(model, jnp.arange(16.0).reshape(8, 2))
      >>> print(model.dropout.rngs.count[...])  # once for every micro-batch
      4

    Note:
      A micro-batch of weight 0 leaves the module as it was. Over several devices
      (`axis_name`), floating variables that `loss_fn` writes are averaged over them, by
      weight, and random keys are folded with the device's index.

      Every micro-batch starts from the same parameters, even if `loss_fn` writes to
      them (`nnx.WeightNorm`); the module keeps what the last one wrote.
    """
    if "argnums" in options:
        raise TypeError(
            "`argnums` cannot be used with a module, which is argument 0. Select the "
            "variables to differentiate with `wrt`"
        )
    if options.get("carry_argnum") is not None:
        raise ValueError(
            f"`carry_argnum={options['carry_argnum']!r}` cannot be used with a module, "
            "which carries its own state. Put the carry into the module, as an "
            "nnx.Variable"
        )
    settings = settings_of(
        _value_and_grad.value_and_grad(loss_fn, 0, has_aux, **options)
    )

    calls = _eager.Calls(
        "`value_and_grad`", "nnx.jit(oaf.value_and_grad(...))", loss_fn
    )

    @functools.wraps(loss_fn)
    def value_and_grad_of_batch(model: Any, *args: Any, **kwargs: Any) -> Any:
        calls.note(args, kwargs)
        _module.check_module(model)
        others, call = taken_apart(settings.roles.bind(loss_fn, (None, *args), kwargs))
        nodes = _module.Nodes(model, others)
        _module.check_not_shared(nodes, wrt)
        graphdef, params, state = _module.split(nodes, wrt)
        call = call._replace(args=[params, *call.args[1:]])
        loss = Loss(settings, wrt, graphdef)
        functional = dataclasses.replace(
            settings,
            fun=loss.value,
            weight=None if settings.weight is None else loss.weight,
        )
        (value, grads), info = functional.run_bound(call.with_carry(STATE, state))
        value, after = value
        if has_aux:
            aux, after = after
            value = value, aux
        _module.update(nodes, state, after)
        result = value, grads
        return (result, info) if settings.returns_info else result

    return value_and_grad_of_batch
