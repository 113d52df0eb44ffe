"""Linen's `TrainState`, for windows of micro-batches."""

import dataclasses
import difflib
import functools
from collections.abc import Iterable, Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
from flax import serialization, struct
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training import train_state
from jax.typing import ArrayLike

from optax_accum import _validate
from optax_accum._accumulate import Boundary
from optax_accum._types import DEFAULT_WEIGHT, Grads, Params, Scalar, Tree
from optax_accum.flax import _accumulating


class TrainState(_accumulating.Counts, train_state.TrainState):
    """A Flax `TrainState` whose `tx` accumulates: `apply_gradients` is a micro-step.

    Use it, and subclass it, as Flax's own. Make it with `create`.

    Attributes:
      step: ``i32[]``, how many micro-steps were made, over all windows. Fold it into
        dropout keys; log, evaluate and save by `gradient_step`.
      apply_fn: As in Flax, usually ``model.apply``.
      params: The parameters.
      tx: `oa.accumulate`, or a transformation with one in it.
      opt_state: Its state, for queries such as ``oa.accumulated(state.opt_state)``.
      batch_stats: The collection of that name, or ``None`` if the model has none.

    Examples:
      >>> import flax.linen as nn, jax, jax.numpy as jnp, optax, optax_accum as oa
      >>> from optax_accum.flax import TrainState
      >>> model = nn.Dense(1)
      >>> x = jnp.arange(10.0).reshape(5, 2)
      >>> state = TrainState.create(
      ...     apply_fn=model.apply,
      ...     params=model.init(jax.random.key(0), x)["params"],
      ...     tx=oa.accumulate(optax.sgd(0.1), every_k=2),
      ... )
      >>> def loss(params, x):
      ...     return jnp.mean(model.apply({"params": params}, x) ** 2)
      >>> for part in (x[:3], x[3:]):  # three examples, and two
      ...     grads = jax.grad(loss)(state.params, part)
      ...     state = state.apply_gradients(grads=grads, weight=len(part))
      ...     print(state.micro_step, state.gradient_step, state.has_updated)
      1 0 False
      0 1 True
    """

    # No plain default: a subclass that declares it again could have none after it.
    batch_stats: Tree = struct.field(default_factory=lambda: None, kw_only=True)

    @classmethod
    def create(cls, *, apply_fn: Any, params: Params, tx: Any, **kwargs: Any) -> Self:
        """Makes a new state at step 0; `tx` must have `oa.accumulate` in it.

        Args:
          apply_fn: As in Flax.
          params: The parameters.
          tx: An Optax gradient transformation.
          **kwargs: Further fields: `batch_stats`, and those of a subclass.

        Returns:
          A `TrainState`.

        Raises:
          ValueError: `tx` does not accumulate.
        """
        state = super().create(apply_fn=apply_fn, params=params, tx=tx, **kwargs)
        _accumulating.check(state.opt_state)
        if _has_overwritten(params) and _accumulating.takes_all(tx):
            state = state.replace(opt_state=tx.init(params))
        # A counter that is an array from the start is not compiled for twice.
        return state.replace(step=jnp.zeros([], jnp.int32))

    def apply_gradients(
        self,
        *,
        grads: Grads,
        weight: ArrayLike = DEFAULT_WEIGHT,
        boundary: Boundary = None,
        value: ArrayLike | None = None,
        extra_args: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> Self:
        """Adds gradients to the window, and at the boundary updates `params`.

        Off the boundary it does not touch `params`, if `tx` is an `oa.accumulate`.

        Flax's ``_overwrite_with_gradient`` (fp8) gets its next values at the boundary.
        If `tx` is an `optax.chain`, it gets them at every micro-step that counts.

        Args:
          grads: A tree like `params`. Or the pullback of the loss with respect to
            `params`, ``jax.vjp(loss_fn, state.params)[1]``, whose backward pass adds
            the gradient straight to the window, as in `oa.accumulate`. If `tx` is an
            `optax.chain` with `oa.accumulate` in it, the gradient is computed first.
          weight: As in `oa.accumulate`: over how many examples or tokens this
            micro-batch's mean was taken. By default 1.
          boundary: As in `oa.accumulate`: whether the window ends here, or ``None``
            to let the count decide.
          value: The micro-batch's loss. At the boundary its mean over the window is
            ``opt_state.window.loss / opt_state.window.weight``. Pass it on every
            micro-step of a window or on none.
          extra_args: Further arguments of `tx`, by name.
          **kwargs: Fields to replace, as in Flax. `batch_stats` stay as they were if
            the micro-batch has weight 0, or `skip` rejects it. (With statistics that
            are averaged over devices, use ``state.replace(batch_stats=...)`` instead:
            each device only knows whether its own micro-batch counts.)

        Returns:
          The next state.

        Raises:
          TypeError: A keyword that is not a field.
          ValueError: As ``update`` of `oa.accumulate`; the structure or a shape of
            `batch_stats` changes; inside an `optax.chain`, overwritten leaves have an
            axis of devices.
        """
        self._check_fields(kwargs)
        is_apart = False
        if _has_overwritten(self.params) and not _accumulating.takes_all(self.tx):
            # What stands around `oa.accumulate` is not to see what is overwritten.
            grads = _accumulating.as_gradients(grads)
            is_apart = _has_overwritten(grads)
            if is_apart:
                _check_no_rows(
                    grads[OVERWRITE_WITH_GRADIENT], self.params[OVERWRITE_WITH_GRADIENT]
                )
        params, opt_state = _accumulating.apply(
            self.tx,
            grads["params"] if is_apart else grads,
            self.opt_state,
            self.params["params"] if is_apart else self.params,
            weight=weight,
            boundary=boundary,
            value=value,
            **(extra_args or {}),
        )
        counted = functools.partial(
            _accumulating.counted, self.tx, weight, self.opt_state, opt_state
        )
        if is_apart:
            is_counted = counted()
            overwritten = jax.tree.map(
                lambda new, old: jnp.where(is_counted, new, old),
                grads[OVERWRITE_WITH_GRADIENT],
                self.params[OVERWRITE_WITH_GRADIENT],
            )
            params = {"params": params, OVERWRITE_WITH_GRADIENT: overwritten}
        if kwargs.get("batch_stats") is not None and self.batch_stats is not None:
            kwargs["batch_stats"] = _select(
                counted(), kwargs["batch_stats"], self.batch_stats
            )
        return self.replace(
            step=self.step + 1, params=params, opt_state=opt_state, **kwargs
        )

    def _check_fields(self, names: Iterable[str]) -> None:
        """Raises for a field that a state does not have."""
        fields = {field.name for field in dataclasses.fields(self)}
        arguments = ("grads", "weight", "boundary", "value", "extra_args")
        for name in set(names) - fields:
            near = difflib.get_close_matches(name, (*arguments, *fields), n=1)
            advice = (
                f"Did you mean `{near[0]}`?"
                if near
                else "An argument of `tx` belongs in `extra_args`"
            )
            raise TypeError(
                f"`{name}` is not an argument of `apply_gradients`, nor a field of "
                f"{type(self).__name__}. {advice}"
            )


def _has_overwritten(tree: Tree) -> bool:
    """Whether Flax's collection of that name is in it."""
    return not isinstance(tree, jax.Array) and OVERWRITE_WITH_GRADIENT in tree


def _check_no_rows(new: Tree, old: Tree) -> None:
    """Raises where the values of several devices would take the place of one."""
    got, needed = (list(map(jnp.shape, jax.tree.leaves(tree))) for tree in (new, old))
    if got != needed:
        raise ValueError(
            f"`grads[{OVERWRITE_WITH_GRADIENT!r}]` has leaves of the shapes {got}, and "
            f"`params` of {needed}. If the first axis is that of devices, only "
            "`oa.accumulate` itself can join them. Put the chain into it: "
            "tx=oa.accumulate(optax.chain(...), mesh=mesh, axis_name=...)"
        )


def _select(counted: bool | Scalar, new: Tree, old: Tree) -> Tree:
    """The next statistics, in the containers of the new ones, frozen or not."""
    as_dicts = [serialization.to_state_dict(stats) for stats in (new, old)]
    _validate.same_structure(
        "batch_stats",
        as_dicts[0],
        "state.batch_stats",
        as_dicts[1],
        'Pass the whole collection, as `mutable="batch_stats"` returns it',
    )
    leaves = []
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(as_dicts[0]),
        jax.tree.leaves(as_dicts[1]),
        strict=True,
    ):
        if jnp.shape(x) != jnp.shape(y):
            raise ValueError(
                f"{_validate.named('batch_stats', path)} has shape {jnp.shape(x)}, but "
                f"in the state it has {jnp.shape(y)}. If it is an auxiliary output of "
                "`oa.value_and_grad`, which stacks one for each micro-batch, pass the "
                "statistics as an argument of the loss instead, with `carry_argnum`"
            )
        leaves.append(jnp.where(counted, x, y))
    return jax.tree.unflatten(jax.tree.structure(new), leaves)
