"""Accumulation for NNX modules: across steps, and inside one."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec

from optax_accum import _arguments, _microbatch, _outputs, _stacked, _window
from optax_accum.flax import _accumulating


class Optimizer(_accumulating.Counts, nnx.Optimizer):
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
          value: The micro-batch's loss. At the boundary its mean over the window is
            ``opt_state.value / opt_state.weight``. Give it on every micro-step of a
            window or on none.
          **extra_args: Further arguments of `tx`.

        Raises:
          TypeError: `model` is no module.
          ValueError: As ``update`` of `oa.accumulate`.
        """
        if isinstance(model, nnx.State) or not isinstance(model, nnx.Pytree):
            raise TypeError(
                f"`model` must be the module and `grads` its gradients; got a "
                f"{type(model).__name__} and a {type(grads).__name__}. The order is "
                "update(model, grads)"
            )
        mode = {"graph": self.graph} if hasattr(self, "graph") else {}  # Flax 0.12.8 on
        params, opt_state = _accumulating.apply(
            self.tx,
            nnx.as_pure(nnx.state(grads, self.wrt, **mode)),
            nnx.as_pure(self.opt_state),
            nnx.as_pure(nnx.state(model, self.wrt, **mode)),
            **nnx.as_pure(
                dict(weight=weight, boundary=boundary, value=value, **extra_args)
            ),
        )
        nnx.update(model, params)
        nnx.update(self.opt_state, nnx.state(opt_state, **mode))
        self.step[...] += 1


def window_sharding(optimizer: Optimizer, axis_name: Any) -> nnx.StateSharding:
    """What of an `Optimizer` is each device's own: for ``in_specs`` of `nnx.shard_map`.

    Args:
      optimizer: An `Optimizer`, or an `nnx.Optimizer` whose `tx` accumulates; its
        `opt_state` went through `oa.stack_windows`.
      axis_name: The axis, or several, of `oa.accumulate`.

    Returns:
      An `nnx.StateSharding`: the open windows' rows over `axis_name`, and all else the
      same on all devices, as `oa.window_specs` has them.

    Raises:
      ValueError: As `oa.window_specs`.

    Examples:
      >>> import jax, optax, optax_accum as oa, optax_accum.flax as oaf
      >>> from flax import nnx
      >>> from jax.sharding import PartitionSpec as P
      >>> D = jax.device_count()
      >>> mesh = jax.make_mesh((D,), ("data",))
      >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
      >>> tx = oa.accumulate(optax.sgd(0.1), every_k=2, axis_name="data")
      >>> optimizer = oaf.Optimizer(model, tx, wrt=nnx.Param)
      >>> optimizer.opt_state = nnx.data(oa.stack_windows(optimizer.opt_state, D))
      >>> in_specs = (P(), oaf.window_sharding(optimizer, "data"), P("data"))
    """
    specs = _stacked.window_specs(nnx.as_pure(optimizer.opt_state), axis_name)
    leaves = jax.tree_util.tree_leaves_with_path(
        specs, is_leaf=lambda x: isinstance(x, PartitionSpec)
    )
    local = {_names(path) for path, spec in leaves if spec != PartitionSpec()}

    def is_local(path, variable):
        del variable
        return path[0] == "opt_state" and tuple(map(str, path[1:])) in local

    filters: dict[Any, Any] = {is_local: PartitionSpec(axis_name)}
    return nnx.StateSharding({**filters, ...: PartitionSpec()})


def _names(path: Any) -> tuple[str, ...]:
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in path)


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
        graphdef, params, state = _split(model, wrt)

        count = 1 + len(args)
        settings: dict[str, Any] = {"batch_argnums": 1} | options
        for role in ("batch_argnums", "rng_argnums"):
            given = _arguments.as_positions(role, settings.get(role, ()))
            settings[role] = _arguments.from_the_front(role, given, count)
        settings["carry_argnum"] = count
        names = _arguments.parameter_names(loss_fn, count)
        for name, argument in [*zip(names[1:], args, strict=True), *kwargs.items()]:
            _check_no_streams(name, argument)

        def merge(params, state):
            if axis_name is not None:
                state = _of_this_device(state, axis_name)
            return nnx.merge(graphdef, params, *state, copy=True)

        @functools.wraps(loss_fn)
        def functional(params, *args_and_state, **kwargs):
            *args, state = args_and_state
            model = merge(params, state)
            result = loss_fn(model, *args, **kwargs)
            after = _state_after(model, wrt, graphdef, params, state)
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


def _split(model: Any, wrt: Any) -> tuple[Any, Any, tuple[Any, Any]]:
    """How `model` is built, its parameters, and its state: its keys, and the rest."""
    if not isinstance(model, nnx.Pytree):
        raise TypeError(
            "the first argument must be an NNX module; got a "
            f"{type(model).__name__}. For a tree of parameters there is "
            "optax_accum.value_and_grad; several modules go into one"
        )
    graphdef, *states = nnx.split(model, wrt, nnx.Any(nnx.RngKey, _is_key), ...)
    params, keys, rest = states
    return graphdef, params, (keys, rest)


def _is_key(path: Any, value: Any) -> bool:
    del path
    dtype = getattr(value, "dtype", None)
    return dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)


def _check_no_streams(name: str, argument: Any) -> None:
    """Raises where an argument is to be changed, by drawing from it."""
    for node in jax.tree.leaves(argument, is_leaf=lambda x: isinstance(x, nnx.Pytree)):
        if isinstance(node, nnx.Pytree) and nnx.state(node, nnx.RngState):
            raise TypeError(
                f"`{name}` has random streams of its own, whose counts would be lost. "
                "Put it into the module; or pass a key, named in `rng_argnums`, and "
                "make nnx.Rngs of it in the loss"
            )


def _state_after(
    model: Any, wrt: Any, graphdef: Any, params: Any, state: Any
) -> tuple[Any, Any]:
    """The state of `model` after `loss_fn`; raises if anything else has changed."""
    graphdef_after, params_after, after = _split(model, wrt)
    old, new = _types_of(params, *state), _types_of(params_after, *after)
    changes = [f"added {path}" for path in sorted(new.keys() - old.keys())]
    changes += [f"took away {path}" for path in sorted(old.keys() - new.keys())]
    changes += [
        f"changed the type of {path} from {old[path][0]} to {new[path][0]}"
        for path in sorted(old.keys() & new.keys())
        if old[path] != new[path]
    ]
    if changes:
        raise ValueError(
            "`loss_fn` must leave the module with the variables that it had, but it "
            f"{', '.join(changes)}. Take what is for one call alone out again, by "
            "nnx.capture or nnx.pop(model, nnx.Intermediate), and return it as "
            "auxiliary output"
        )
    pairs = zip(_flat(params).items(), _flat(params_after).values(), strict=True)
    written = [path for (path, x), y in pairs if _value(x) is not _value(y)]
    if written:
        raise ValueError(
            "`loss_fn` must only read what it is differentiated with respect to, but "
            f"it wrote to {', '.join(written)}. Make it a variable of another kind "
            "than `wrt`, an nnx.Variable say"
        )
    if graphdef != graphdef_after:
        raise ValueError(
            "`loss_fn` must leave what is no variable in the module as it was, but it "
            "has changed an attribute. Keep what changes in an nnx.Variable, and take "
            "another view of the module before: nnx.view(model, deterministic=True)"
        )
    return after


def _flat(*states: Any) -> dict[str, Any]:
    """The variables by their paths."""
    return {
        ".".join(map(str, path)): variable
        for state in states
        for path, variable in nnx.to_flat_state(state)
    }


def _types_of(*states: Any) -> dict[str, tuple[str, Any]]:
    """For each variable what to call its type, and what its type is."""

    def type_of(variable):
        leaves, structure = jax.tree.flatten(_value(variable))
        shapes = [
            jax.ShapeDtypeStruct(jnp.shape(x), _window.dtype_of(x)) for x in leaves
        ]
        shown = ", ".join(f"{x.dtype}[{','.join(map(str, x.shape))}]" for x in shapes)
        name = type(variable).__name__
        return f"{name} {shown}", (name, structure, shapes)

    return {path: type_of(variable) for path, variable in _flat(*states).items()}


def _value(variable: Any) -> Any:
    is_variable = isinstance(variable, nnx.Variable)
    return variable.get_raw_value() if is_variable else variable


def _of_this_device(state: tuple[Any, Any], axis_name: Any) -> tuple[Any, Any]:
    """The state with keys of this device's own."""
    keys, rest = state
    index = lax.axis_index(axis_name)

    def fold(key):
        each = jnp.ravel(key)
        return jax.vmap(jax.random.fold_in, (0, None))(each, index).reshape(key.shape)

    return jax.tree.map(fold, keys), rest
