"""`oa.microbatch` for functions of NNX modules."""

import dataclasses
import functools
from typing import Any

from flax import nnx

from optax_accum import _eager, _microbatch
from optax_accum._types import Function
from optax_accum.flax import _module
from optax_accum.flax._functional import STATE, OfState, taken_apart


def microbatch(fun: Function, **options: Any) -> Function:
    """Like `oa.microbatch`, for functions of NNX modules.

    Use it for losses that are not sums over examples, such as contrastive ones: encode
    in micro-batches, and compute the loss from all outputs at once, under
    `nnx.value_and_grad` and `nnx.jit`. `fun` must treat every example by itself;
    BatchNorm has the statistics of one micro-batch.

    Arguments may be modules, random streams (`nnx.Rngs`) and variables. Their state
    (running statistics of BatchNorm, counts of random streams) is carried from one
    micro-batch to the next and written back once. The backward pass gives each
    micro-batch the same state again: it draws the same dropout, and writes nothing.

    Args:
      fun: Any function of modules and arrays that returns a tree of arrays, such as
        ``lambda model, x: model(x)``. It sees one micro-batch at a time.
      **options: The keyword arguments of `oa.microbatch`: `num_microbatches` or
        `microbatch_size`; `batch_argnums`, by default 1; `outputs`, `weight`, which is
        called as `fun` is, ... There is no `carry_argnum`: modules carry their state.

    Returns:
      A function with the arguments of `fun` that returns what `fun` does, in the same
      dtypes.

    Raises:
      TypeError: As `oa.microbatch`; `fun` is a module.
      ValueError: As `oa.microbatch`; `carry_argnum` is given; at the call, `fun` adds
        variables to a module, removes some or changes their types, changes a plain
        attribute, or writes to parameters.

    Examples:
      >>> import jax, jax.numpy as jnp, optax_accum.flax as oaf
      >>> from flax import nnx
      >>> class Encoder(nnx.Module):
      ...     def __init__(self, rngs):
      ...         self.linear = nnx.Linear(2, 3, rngs=rngs)
      ...         self.norm = nnx.BatchNorm(3, rngs=rngs)
      ...         self.dropout = nnx.Dropout(0.5, rngs=rngs)
      ...     def __call__(self, x):
      ...         return self.dropout(self.norm(self.linear(x)))
      >>> encode = oaf.microbatch(lambda model, x: model(x), num_microbatches=4)
      >>> def loss_fn(model, x):
      ...     z = encode(model, x)
      ...     return -jnp.mean(jnp.diag(jax.nn.log_softmax(z @ z.T)))
      >>> model = Encoder(nnx.Rngs(0))
      >>> x = jnp.arange(16.0).reshape(8, 2)
      >>> value, grads = nnx.jit(nnx.value_and_grad(loss_fn))(model, x)
      >>> print(model.dropout.rngs.count[...])  # once for every micro-batch
      4

    Note:
      `nnx.grad` decides what is differentiated: parameters of all modules, or of LoRA
      alone. Variables that `fun` writes are constants to derivatives. A micro-batch of
      weight 0 leaves the modules as they were. Over several devices (`mesh`), floating
      variables that `fun` writes are averaged over them, by weight, and random keys are
      folded with the device's index.
    """
    if isinstance(fun, nnx.Module):
        raise TypeError(
            f"`fun` must be a function of the module; got the module itself, a "
            f"{type(fun).__name__}. Pass lambda model, x: model(x), and the module as "
            "an argument of the call, where nnx.grad sees it"
        )
    if options.get("carry_argnum") is not None:
        raise ValueError(
            f"`carry_argnum={options['carry_argnum']!r}` cannot be used with modules, "
            "which carry their own state. Put the carry into a module, or pass it as "
            "an nnx.Variable"
        )
    settings = _microbatch.microbatch(fun, **options).settings  # type: ignore[attr-defined]
    calls = _eager.Calls("`microbatch`", "nnx.jit(oaf.microbatch(...))", fun)

    @functools.wraps(fun)
    def in_microbatches(*args: Any, **kwargs: Any) -> Any:
        calls.note(args, kwargs)
        others, call = taken_apart(settings.roles.bind(fun, args, kwargs))
        # All are alike: it is for `nnx.grad` to say what is differentiated.
        nodes = _module.Nodes(None, others)
        graphdef, nothing, state = _module.split(nodes, nnx.Nothing())
        of_state = OfState(settings, nnx.Nothing(), graphdef)

        def of_arguments(*args: Any, **kwargs: Any) -> Any:
            return of_state.run(nothing, kwargs.pop(STATE), args, kwargs)

        functional = dataclasses.replace(
            settings,
            fun=of_arguments,
            weight=settings.weight and functools.partial(of_state.weight, nothing),
        )
        outputs, after = functional.run_bound(call.with_carry(STATE, state))
        _module.check_params_only_read(state, after)
        _module.update(nodes, state, after)
        return outputs

    return in_microbatches
