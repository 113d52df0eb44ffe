"""Accumulation for NNX modules: across steps, and inside one."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax import lax

from optax_accum import _arguments, _microbatch, _outputs, _queries
from optax_accum.flax import _accumulating


class Optimizer(nnx.Optimizer):
    """`nnx.Optimizer` whose `tx` accumulates: `update` is a micro-step.

    Args:
      model: An NNX module.
      tx: `oa.accumulate`, or a transformation with one in it.
      wrt: Which of the module's variables to train, e.g. ``nnx.Param``.

    Attributes:
      step: ``u32[]``, how many micro-steps were made, over all windows.
      opt_state: The state of `tx`, which the queries take, as they take the
        `Optimizer` itself: ``oa.accumulated(optimizer)``.

    Raises:
      ValueError: `tx` does not accumulate.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, optax_accum as oa
      >>> from flax import nnx
      >>> from optax_accum.flax import Optimizer
      >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
      >>> tx = oa.accumulate(optax.sgd(0.1), every_k=2)
      >>> optimizer = Optimizer(model, tx, wrt=nnx.Param)
      >>> @nnx.jit
      ... def step(model, optimizer, x):
      ...     loss, grads = nnx.value_and_grad(lambda m: jnp.mean(m(x) ** 2))(model)
      ...     optimizer.update(model, grads, weight=len(x), value=loss)
      >>> x = jnp.arange(10.0).reshape(5, 2)
      >>> for part in (x[:3], x[3:]):  # three examples, and two
      ...     step(model, optimizer, part)
      ...     print(optimizer.micro_step, optimizer.has_updated)
      1 False
      0 True
    """

    def __init__(self, model: Any, tx: Any, *, wrt: Any, **kwargs: Any):
        """Makes the state of `tx`."""
        super().__init__(model, tx, wrt=wrt, **kwargs)
        _accumulating.check(self.opt_state)

    def update(
        self,
        model: Any,
        grads: Any,
        /,
        *,
        weight: Any = 1.0,
        boundary: Any = None,
        value: Any = None,
        **extra_args: Any,
    ) -> None:
        """One micro-step: `grads` goes into the window, whose end updates `model`.

        With `tx` an `oa.accumulate` this is `update_params`, which does not touch the
        parameters off the boundary. (Unlike Flax's it returns no updates: there are
        none.)

        Args:
          model: The module.
          grads: As `nnx.grad` and `value_and_grad` return them.
          weight: As in `oa.accumulate`: over how many examples or tokens this
            micro-batch's mean was taken.
          boundary: As in `oa.accumulate`: whether the window ends here, or ``None``
            for the count to decide.
          value: The micro-batch's loss, reduced over the window for whatever in `tx`
            asks for it.
          **extra_args: Further arguments of `tx`.

        Raises:
          ValueError: As ``update`` of `oa.accumulate`.
        """
        params, opt_state = _accumulating.apply(
            self.tx,
            nnx.as_pure(nnx.state(grads, self.wrt)),
            nnx.as_pure(self.opt_state),
            nnx.as_pure(nnx.state(model, self.wrt)),
            **nnx.as_pure(
                dict(weight=weight, boundary=boundary, value=value, **extra_args)
            ),
        )
        nnx.update(model, params)
        nnx.update(self.opt_state, nnx.state(opt_state))
        self.step[...] += 1

    @property
    def micro_step(self) -> jax.Array:
        """How many micro-steps the open window has seen, ``i32[]``."""
        return _queries.micro_step(self.opt_state)

    @property
    def gradient_step(self) -> jax.Array:
        """How many updates were made, ``i32[]``."""
        return _queries.gradient_step(self.opt_state)

    @property
    def has_updated(self) -> jax.Array:
        """Whether the last micro-step made an update, ``bool[]``: the time to log."""
        return _queries.has_updated(self.opt_state)


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
      TypeError: As `oa.value_and_grad`; at the call, a first argument that is no
        module.
      ValueError: As `oa.value_and_grad`; a `carry_argnum`; at the call, a `loss_fn`
        that adds variables to the module, or takes some away.

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
    """
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
        graphdef, params, state = _split(model, wrt)

        def merge(params, state):
            if axis_name is not None:
                state = _of_this_device(state, axis_name)
            return nnx.merge(graphdef, params, *state, copy=True)

        @functools.wraps(loss_fn)
        def functional(params, *args_and_state, **kwargs):
            *args, state = args_and_state
            model = merge(params, state)
            result = loss_fn(model, *args, **kwargs)
            after = _state_after(model, wrt, params, state)
            if axis_name is not None:
                after = state[0], after[1]
            if not has_aux:
                return result, after
            value, aux = _outputs.pair(result, "(value, aux)")
            return value, (aux, after)

        settings = dict(options, carry_argnum=len(args) + 1)
        for role in ("batch_argnums", "rng_argnums"):
            if role in options:
                settings[role] = _from_the_front(role, options[role], len(args) + 1)
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


def _split(model: Any, wrt: Any) -> tuple[Any, Any, tuple[Any, Any]]:
    """How `model` is built, its parameters, and its state: its keys, and the rest."""
    if not isinstance(model, nnx.Pytree):
        raise TypeError(
            "the first argument must be an NNX module; got a "
            f"{type(model).__name__}. For a tree of parameters there is "
            "optax_accum.value_and_grad; several modules go into one"
        )
    graphdef, *states = nnx.split(model, wrt, nnx.RngKey, ...)
    params, keys, rest = states
    return graphdef, params, (keys, rest)


def _state_after(model: Any, wrt: Any, params: Any, state: Any) -> tuple[Any, Any]:
    """The state of `model` after `loss_fn`; raises if it is made of other variables."""
    _, params_after, after = _split(model, wrt)
    old, new = _paths(params, *state), _paths(params_after, *after)
    if old != new:
        changes = [f"added {path}" for path in sorted(new - old)]
        changes += [f"took away {path}" for path in sorted(old - new)]
        raise ValueError(
            "`loss_fn` must leave the module with the variables that it had, but it "
            f"{', '.join(changes)}. Take what is for one call alone out again, by "
            "nnx.capture or nnx.pop(model, nnx.Intermediate), and return it as "
            "auxiliary output"
        )
    return after


def _paths(*states: Any) -> set[str]:
    flat = [path for state in states for path, _ in nnx.to_flat_state(state)]
    return {".".join(map(str, path)) for path in flat}


def _of_this_device(state: tuple[Any, Any], axis_name: Any) -> tuple[Any, Any]:
    """The state with keys of this device's own."""
    keys, rest = state
    index = lax.axis_index(axis_name)

    def fold(key):
        each = jax.numpy.ravel(key)
        return jax.vmap(jax.random.fold_in, (0, None))(each, index).reshape(key.shape)

    return jax.tree.map(fold, keys), rest


def _from_the_front(role: str, given: Any, count: int) -> tuple[int, ...]:
    """Positions that stay what they are with one argument more at the end."""
    return tuple(
        i + count if -count <= i < 0 else i
        for i in _arguments.as_positions(role, given)
    )
