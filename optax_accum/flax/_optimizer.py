"""NNX's `Optimizer`, for windows of micro-batches."""

from typing import Any

import jax
from flax import nnx
from flax.nnx.filterlib import Filter
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from optax_accum import _backward, _validate
from optax_accum._accumulate import Boundary
from optax_accum._types import DEFAULT_WEIGHT, AxisName, Params
from optax_accum.flax import _accumulating, _module
from optax_accum.sharding import window_specs


class Optimizer(_accumulating.Counts, nnx.Optimizer):
    """An `nnx.Optimizer` whose `tx` accumulates: each `update` is a micro-step.

    Args:
      model: An NNX module.
      tx: `oa.accumulate`, or a transformation with one in it.
      wrt: Which of the module's variables to train, e.g. ``nnx.Param``.

    Attributes:
      step: ``u32[]``, how many micro-steps were made, over all windows.
      opt_state: The state of `tx`. Queries such as ``oa.accumulated(optimizer)`` take
        it, or the `Optimizer` itself.

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

    def __init__(self, model: Any, tx: Any, *, wrt: Filter, **kwargs: Any):
        """Makes the state of `tx`."""
        super().__init__(model, tx, wrt=wrt, **kwargs)
        _accumulating.check(self.opt_state)

    def update(
        self,
        model: nnx.Pytree,
        grads: nnx.State,
        /,
        *,
        weight: ArrayLike = DEFAULT_WEIGHT,
        boundary: Boundary = None,
        value: ArrayLike | None = None,
        **extra_args: Any,
    ) -> None:
        """Adds gradients to the window, and at the boundary updates the model.

        Off the boundary it does not touch the parameters, if `tx` is an
        `oa.accumulate`. Unlike Flax's, it returns nothing.

        Args:
          model: The module.
          grads: As `nnx.grad` and `value_and_grad` return them. Or a pullback, from
            `value_and_pullback` with the same `wrt`, whose backward pass adds the
            gradient straight to the window. If `tx` is an `optax.chain` with
            `oa.accumulate` in it, the gradient is computed first.
          weight: As in `oa.accumulate`: over how many examples or tokens this
            micro-batch's mean was taken. By default 1.
          boundary: As in `oa.accumulate`: whether the window ends here, or ``None``
            to let the count decide.
          value: The micro-batch's loss. At the boundary its mean over the window is
            ``opt_state.window.loss / opt_state.window.weight``. Pass it on every
            micro-step of a window or on none.
          **extra_args: Further arguments of `tx`.

        Raises:
          TypeError: `model` is not a module.
          ValueError: As ``update`` of `oa.accumulate`; a pullback is with respect to
            other variables than the optimizer's `wrt` selects.
        """
        if isinstance(model, nnx.State) or not isinstance(model, nnx.Pytree):
            raise TypeError(
                f"`model` must be the module and `grads` its gradients; got a "
                f"{type(model).__name__} and a {type(grads).__name__}. The order is "
                "update(model, grads)"
            )
        mode = {"graph": self.graph} if hasattr(self, "graph") else {}  # Flax 0.12.8 on
        params = nnx.as_pure(nnx.state(model, self.wrt, **mode))
        if _backward.is_pullback(grads):
            _check_wrt(grads, params)
        else:
            maker = "optax_accum.flax.value_and_pullback(loss_fn)(model, batch)"
            _validate.not_a_function(grads, maker=maker)
            grads = nnx.as_pure(nnx.state(grads, self.wrt, **mode))
        params, opt_state = _accumulating.apply(
            self.tx,
            grads,
            nnx.as_pure(self.opt_state),
            params,
            **nnx.as_pure(
                dict(weight=weight, boundary=boundary, value=value, **extra_args)
            ),
        )
        nnx.update(model, params)
        nnx.update(self.opt_state, nnx.state(opt_state, **mode))
        self.step[...] += 1


def _check_wrt(pullback: Any, params: Params) -> None:
    """Raises unless it was taken with respect to something built like `params`."""
    wrt = _backward.arguments_of(pullback)
    if len(wrt) == 1:
        _validate.same_structure(
            "grads",
            wrt[0],
            "model",
            params,
            "A pullback is made by optax_accum.flax.value_and_pullback(loss_fn, "
            "wrt=...), with the `wrt` of this optimizer",
        )


def window_sharding(optimizer: Optimizer, axis_name: AxisName) -> nnx.StateSharding:
    """Returns how an `Optimizer` is sharded, for ``in_specs`` of `nnx.shard_map`.

    Args:
      optimizer: An `Optimizer`, or an `nnx.Optimizer` whose `tx` accumulates. Its
        `opt_state` must come from `oa.sharding.stack_windows`.
      axis_name: The axis, or several, of `oa.accumulate`.

    Returns:
      An `nnx.StateSharding`: the open windows are sharded over `axis_name`, the rest is
      the same on all devices, as in `oa.sharding.window_specs`.

    Raises:
      ValueError: As `oa.sharding.window_specs`.

    Examples:
      >>> import jax, optax, optax_accum as oa, optax_accum.flax as oaf
      >>> from flax import nnx
      >>> from jax.sharding import PartitionSpec as P
      >>> D = jax.device_count()
      >>> mesh = jax.make_mesh((D,), ("data",))
      >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
      >>> tx = oa.accumulate(optax.sgd(0.1), every_k=2, axis_name="data")
      >>> optimizer = oaf.Optimizer(model, tx, wrt=nnx.Param)
      >>> stacked = oa.sharding.stack_windows(optimizer.opt_state, D)
      >>> optimizer.opt_state = nnx.data(stacked)
      >>> in_specs = (P(), oaf.window_sharding(optimizer, "data"), P("data"))
    """
    specs = window_specs(nnx.as_pure(optimizer.opt_state), axis_name)
    leaves = jax.tree_util.tree_leaves_with_path(
        specs, is_leaf=lambda x: isinstance(x, PartitionSpec)
    )
    local = {_module.names_of(path) for path, spec in leaves if spec != PartitionSpec()}

    def is_local(path: tuple[Any, ...], variable: Any) -> bool:
        del variable
        return path[0] == "opt_state" and tuple(map(str, path[1:])) in local

    filters: dict[Any, Any] = {is_local: PartitionSpec(axis_name)}
    return nnx.StateSharding({**filters, ...: PartitionSpec()})
