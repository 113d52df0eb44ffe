"""The inner optimizer on the gradient of a whole window.

It computes in the accumulator's dtype, and what it returns has the dtypes that it alone
would have given for gradients of the incoming dtype.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import optax

from optax_accum import _tree, _validate
from optax_accum._types import Grads, Params, Scalar, Tree, Updates
from optax_accum._window import Devices, Window


class Arguments(NamedTuple):
    """What a micro-step gives the inner optimizer besides the window.

    Attributes:
      grads: Its gradient, for the leaves that are not accumulated.
      params: The parameters.
      takes_value: Whether the optimizer gets the window's value.
      extra_args: Everything else. A `grad` becomes the window's.
    """

    grads: Grads
    params: Params
    takes_value: bool
    extra_args: dict[str, Any]


class BoundOptimizer(NamedTuple):
    """The inner optimizer with everything but the window.

    Attributes:
      update: ``(grads, inner_state, value) -> (updates, inner_state)``.
      shapes: The updates, as a tree of `jax.ShapeDtypeStruct`.
    """

    update: Callable[[Grads, Tree, Scalar], tuple[Updates, Tree]]
    shapes: Updates


def bind(
    optimizer: optax.GradientTransformationExtraArgs,
    arguments: Arguments,
    window: Window,
    inner_state: Tree,
    devices: Devices,
    *,
    has_branch: bool,
) -> BoundOptimizer:
    """Binds the arguments and finds out the types of the updates.

    Args:
      optimizer: The inner optimizer.
      arguments: What it is given besides the window.
      window: The window, before its division.
      inner_state: The optimizer's state.
      devices: Those that share the window.
      has_branch: Whether it will run in a branch.
    """

    def call(grads: Grads, inner_state: Tree, value: Scalar) -> tuple[Updates, Tree]:
        extra_args = dict(arguments.extra_args)
        grads = _tree.merge(grads, arguments.grads)
        if arguments.takes_value:
            extra_args["value"] = value
        if "grad" in extra_args:
            extra_args["grad"] = grads
        return optimizer.update(grads, inner_state, arguments.params, **extra_args)

    # The trace that gave the shapes serves again, unless each call stands for itself.
    inputs = jax.tree.leaves((window, inner_state))
    if has_branch or any(isinstance(x, jax.core.Tracer) for x in inputs):
        call = jax.jit(call, inline=True)

    def shapes_for(grads: Grads) -> Updates:
        def over_devices(grads: Grads, value: Scalar) -> tuple[Updates, Tree]:
            grads, value = devices.sum(grads, value)
            return call(grads, inner_state, value)

        return jax.eval_shape(over_devices, grads, window.loss)[0]

    own = _tree.as_arrays(_tree.keep_inexact(arguments.grads))
    try:
        shapes = shapes_for(own)
    except Exception:
        if arguments.params is not None:
            _validate.inner_state(optimizer, inner_state, arguments.params)
        raise
    rounds_first = False
    if _tree.dtypes_of(own) != _tree.dtypes_of(window.grads):
        try:
            shapes_for(window.grads)
        except TypeError:
            # Some, like `optax.novograd`, branch between a gradient and a moment, and
            # only take gradients of the parameters' dtype.
            rounds_first = True

    def update(grads: Grads, inner_state: Tree, value: Scalar) -> tuple[Updates, Tree]:
        grads = _tree.cast_like(grads, own) if rounds_first else grads
        updates, new_state = call(grads, inner_state, value)
        _validate.same_structure(
            "inner_state",
            new_state,
            "inner.init(params)",
            inner_state,
            "An optimizer whose state changes its structure cannot run inside "
            "`accumulate`; put it next to it, in an `optax.chain`",
        )
        new_state = _tree.cast_like(new_state, inner_state)
        new_state = _tree.placed_like(new_state, inner_state)
        return _tree.cast_like(updates, shapes), new_state

    return BoundOptimizer(update, shapes)
