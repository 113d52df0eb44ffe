"""`nnx.value_and_grad` with a pullback in place of the gradient."""

import functools
from typing import Any

import jax
from flax import nnx
from flax.nnx.filterlib import Filter

from optax_accum import _backward, _outputs, _value_and_grad
from optax_accum._types import Function, Params, Scalar, Tree
from optax_accum._value_and_grad import settings_of
from optax_accum.flax import _module
from optax_accum.flax._functional import STATE, Loss, taken_apart


def value_and_pullback(
    loss_fn: Function, *, has_aux: bool = False, wrt: Filter = nnx.Param
) -> Function:
    """Like `nnx.value_and_grad`, with a pullback in place of the gradient.

    Use it to save memory with `Optimizer.update`, which takes the pullback: the
    backward pass then adds to the open window layer by layer, and the gradient itself
    never exists. With layers in a scan (`nnx.scan`, `jax.lax.scan`) that saves as much
    memory as the parameters take.

    Other variables that `loss_fn` writes (statistics of BatchNorm, counts of random
    streams) are in the module afterwards, as after `nnx.value_and_grad`.

    Args:
      loss_fn: ``loss_fn(model, batch, ...)`` returns a real scalar, or with `has_aux` a
        pair of it and auxiliary outputs.
      has_aux: Whether `loss_fn` returns ``(value, aux)``.
      wrt: Which of the module's variables to differentiate with respect to: those of
        the optimizer's `wrt`.

    Returns:
      A function with the arguments of `loss_fn` that returns ``(value, pullback)`` or
      ``((value, aux), pullback)``. The pullback is that of `jax.vjp` with respect to
      ``nnx.as_pure(nnx.state(model, wrt))``: ``pullback(cotangent)`` is a tuple of one
      gradient.

    Raises:
      TypeError: At the call, the first argument is not a module; `loss_fn` does not
        return a real scalar.
      ValueError: At the call, `loss_fn` reads none of the variables that `wrt` selects,
        adds variables to the module, removes some or changes their types, changes a
        plain attribute, or writes values to parameters that depend on the batch; a
        further argument shares parameters with the module.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_accum as oa
      >>> import optax_accum.flax as oaf
      >>> from flax import nnx
      >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
      >>> tx = oa.accumulate(optax.sgd(0.1), every_k=2)
      >>> optimizer = oaf.Optimizer(model, tx, wrt=nnx.Param)
      >>> def loss_fn(model, x):
      ...     return jnp.mean(model(x) ** 2)
      >>> @nnx.jit
      ... def step(model, optimizer, x):
      ...     loss, pullback = oaf.value_and_pullback(loss_fn)(model, x)
      ...     optimizer.update(model, pullback, weight=len(x), value=loss)
      >>> x = jnp.arange(10.0).reshape(5, 2)
      >>> for part in (x[:3], x[3:]):  # three examples, and two
      ...     step(model, optimizer, part)
      ...     print(optimizer.micro_step, optimizer.has_updated)
      1 False
      0 True

    Note:
      Make the pullback and use it in the same compiled function. Between two, it
      carries the activations of every layer.
    """
    # For what `Loss` reads of them; nothing is split.
    settings = settings_of(
        _value_and_grad.value_and_grad(
            loss_fn, 0, has_aux, num_microbatches=1, batch_argnums=()
        )
    )
    outputs = _outputs.Outputs(has_aux, STATE)

    @functools.wraps(loss_fn)
    def value_and_pullback_of_batch(model: Any, *args: Any, **kwargs: Any) -> Any:
        _module.check_module(model)
        others, call = taken_apart(settings.roles.bind(loss_fn, (None, *args), kwargs))
        nodes = _module.Nodes(model, others)
        _module.check_not_shared(nodes, wrt)
        graphdef, params, state = _module.split(nodes, wrt)
        structure = jax.tree.structure(params)
        loss = Loss(settings, wrt, graphdef)
        call = call.with_carry(STATE, state)

        def of_params(pure: Params) -> tuple[Scalar, Tree]:
            args = [
                jax.tree.unflatten(structure, jax.tree.leaves(pure)),
                *call.args[1:],
            ]
            result = call.apply(loss.value, args, call.kwargs)
            value, aux, after = outputs.unpack(result, state)
            return value, (aux, after)

        result: Any = jax.vjp(of_params, nnx.as_pure(params), has_aux=True)
        value, pullback, (aux, after) = result
        if not _backward.outputs_of(pullback):
            raise ValueError(
                "`loss_fn` must depend on variables of its first argument that `wrt` "
                f"selects, here {wrt!r}, but depends on none. Use the module that is "
                "passed as an argument, not one from outside of the function"
            )
        _module.update(nodes, state, after)
        return ((value, aux) if has_aux else value), pullback

    return value_and_pullback_of_batch
