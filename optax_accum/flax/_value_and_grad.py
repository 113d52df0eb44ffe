"""`nnx.value_and_grad` whose batch runs in micro-batches."""

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
    """`nnx.value_and_grad` of a loss over a module, whose batch runs in micro-batches.

    Whatever is not a parameter (running statistics of BatchNorm, counts of random
    streams) is carried from one micro-batch to the next and written back to the module,
    so dropout differs between micro-batches. The same holds for `nnx.Rngs`, modules and
    variables among the other arguments. What `loss_fn` only reads, such as a frozen
    base, stays the very same arrays. Micro-batch i holds the examples i, i + K,
    i + 2K, ... (with a smaller last one they are contiguous).

    Args:
      loss_fn: ``loss_fn(model, batch, ...)`` returns a real scalar, or with `has_aux` a
        pair of it and auxiliary outputs. It sees one micro-batch at a time.
      has_aux: Whether `loss_fn` returns ``(value, aux)``.
      wrt: Which of the module's variables to differentiate with respect to.
      **options: The keyword arguments of `oa.value_and_grad`: `num_microbatches` or
        `microbatch_size`; `batch_argnums`, counted with the module as 0; `weight`,
        which is called as `loss_fn` is; `aux`, `reduction`, `skip`, `mesh`, ... What
        the module needs takes the place of `carry_argnum`.

    Returns:
      A function with the arguments of `loss_fn` that returns ``(value, grads)`` or
      ``((value, aux), grads)``, with `return_info` or `noise_scale` the pair of that
      and an `oa.MicrobatchInfo`. `grads` is an `nnx.State`, as from
      `nnx.value_and_grad`.

    Raises:
      TypeError: As `oa.value_and_grad`; an `argnums`; at the call, a first argument
        that is not a module.
      ValueError: As `oa.value_and_grad`; a `carry_argnum`; at the call, a `loss_fn`
        that adds variables to the module, takes some away or changes their types, that
        changes a plain attribute, or that writes to its parameters what depends on the
        batch; another argument that shares parameters with the module.

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

      Every micro-batch starts from the same parameters, also where `loss_fn` writes to
      them (`nnx.WeightNorm`); what the last one wrote is in the module in the end.
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

    calls = _eager.Calls("`value_and_grad`", "nnx.jit(oaf.value_and_grad(...))")

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
