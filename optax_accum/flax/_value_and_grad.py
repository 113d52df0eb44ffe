"""`nnx.value_and_grad` whose batch runs in micro-batches."""

import functools
from collections.abc import Callable
from typing import Any

from flax import nnx

from optax_accum import _arguments, _microbatch, _outputs
from optax_accum.flax import _module


def value_and_grad(
    loss_fn: Callable[..., Any],
    *,
    has_aux: bool = False,
    wrt: Any = nnx.Param,
    **options: Any,
) -> Callable[..., Any]:
    """`nnx.value_and_grad` of a loss over a module, whose batch runs in micro-batches.

    What in the module is no parameter goes from micro-batch to micro-batch, as if they
    were run one after another, and is in the module in the end: the running statistics
    of BatchNorm, the counts of random streams. Dropout is drawn anew for each.
    Micro-batch i holds the examples i, i + K, i + 2K, ... (with a smaller last one
    they are contiguous).

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
      ``((value, aux), grads)``, with `return_info` the pair of that and an
      `oa.MicrobatchInfo`. `grads` is an `nnx.State`, as `nnx.value_and_grad` returns.

    Raises:
      TypeError: As `oa.value_and_grad`; an `argnums`; at the call, a first argument
        that is no module, or another one that has random streams.
      ValueError: As `oa.value_and_grad`; a `carry_argnum`; at the call, a `loss_fn`
        that adds variables to the module, takes some away or changes their types, or
        writes to what it is differentiated with respect to, or to what is no variable.

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
      (`axis_name`), floating variables are averaged over them, by weight, and the
      module's random keys are folded with the device's index.

      Modules among the other arguments are only read.
    """
    if "argnums" in options:
        raise TypeError(
            "`argnums` cannot be used with a module, which is argument 0. Say with "
            "`wrt` which of its variables to differentiate with respect to"
        )
    if options.get("carry_argnum") is not None:
        raise ValueError(
            f"`carry_argnum={options['carry_argnum']!r}` cannot be used with a module, "
            "which carries its own state. Put what is to be carried into the module, "
            "as an nnx.Variable"
        )
    # Where the carry stands is known at the call; all else is checked now.
    _microbatch.value_and_grad(loss_fn, 0, has_aux, **options)
    axis_name = options.get("axis_name")
    return_info = options.get("return_info", False)

    @functools.wraps(loss_fn)
    def value_and_grad_of_batch(model, *args, **kwargs):
        graphdef, params, state = _module.split(model, wrt)

        count = 1 + len(args)
        settings: dict[str, Any] = {"batch_argnums": 1} | options
        for role in ("batch_argnums", "rng_argnums"):
            given = _arguments.as_positions(role, settings.get(role, ()))
            settings[role] = _arguments.from_the_front(role, given, count)
        settings["carry_argnum"] = count
        names = _arguments.parameter_names(loss_fn, count)
        for name, argument in [*zip(names[1:], args, strict=True), *kwargs.items()]:
            _module.check_no_streams(name, argument)

        def merge(params, state):
            if axis_name is not None:
                state = _module.of_this_device(state, axis_name)
            return nnx.merge(graphdef, params, *state, copy=True)

        @functools.wraps(loss_fn)
        def functional(params, *args_and_state, **kwargs):
            *args, state = args_and_state
            model = merge(params, state)
            result = loss_fn(model, *args, **kwargs)
            after = _module.state_after(model, wrt, graphdef, params, state)
            if axis_name is not None:
                after = state[0], after[1]
            if not has_aux:
                return result, after
            value, aux = _outputs.pair(result, "(value, aux)")
            return value, (aux, after)

        if options.get("weight") is not None:

            def weight(params, *args_and_state, **kwargs):
                *args, state = args_and_state
                return options["weight"](merge(params, state), *args, **kwargs)

            settings["weight"] = weight

        run = _microbatch.value_and_grad(functional, 0, has_aux, **settings)
        result = run(params, *args, state, **kwargs)
        result, info = result if return_info else (result, None)
        (value, after), grads = result
        if has_aux:
            aux, after = after
            value = value, aux
        nnx.update(model, *after)
        return ((value, grads), info) if return_info else (value, grads)

    return value_and_grad_of_batch
