"""A function whose batch runs in micro-batches: how it is cut, and the loop.

`value_and_grad` and `microbatch` share this.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_accum import _arguments, _split, _tree, _validate, _whole
from optax_accum._backward import NotInPlaceError
from optax_accum._types import Batch, Function, Scalar, Specs, Tree
from optax_accum.sharding import _collectives
from optax_accum.sharding._data_parallel import DataParallel

# ``step(carried, i)`` runs micro-batch i, and returns what is carried on.
Step = Callable[[Tree, Scalar], Tree]


def checked_options(
    num_microbatches: Any, microbatch_size: Any, unroll: Any, in_place: Any
) -> dict[str, Any]:
    """These options of `Microbatching`.

    Raises:
      TypeError: One of another type.
      ValueError: One out of range; both sizes, or none.
    """
    if (num_microbatches is None) == (microbatch_size is None):
        raise ValueError(
            "exactly one of `num_microbatches` and `microbatch_size` is needed; got "
            f"num_microbatches={num_microbatches!r} and "
            f"microbatch_size={microbatch_size!r}"
        )
    sizes = {"num_microbatches": num_microbatches, "microbatch_size": microbatch_size}
    for name, size in sizes.items():
        if size is not None:
            sizes[name] = _validate.whole_number(name, size)
    if not isinstance(unroll, bool):
        unroll = _validate.whole_number("unroll", unroll, "a bool or an int >= 1")
    if in_place not in (None, True, False):
        raise TypeError(f"`in_place` must be None, True or False; got {in_place!r}")
    return {**sizes, "unroll": unroll, "in_place": in_place}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Microbatching:
    """The options that say how a function runs in micro-batches, checked."""

    fun: Function
    roles: _arguments.Roles
    num_microbatches: int | None
    microbatch_size: int | None
    num_real_microbatches: int | Scalar | None
    unroll: int | bool
    weight: Function | None
    in_place: bool | None
    devices: DataParallel
    functions: dict[str, Function]  # the user's, by what to call them in a message

    who: ClassVar[str] = "the loss"  # what to call `fun` in a message
    # What to do inside of an axis of devices with the options that name it.
    inside_axis: ClassVar[str] = "Leave `mesh` out, and keep `axis_name`"

    @classmethod
    def named(cls, fun: Function, weight: Function | None) -> dict[str, Function]:
        """The user's functions, as `functions` has them."""
        return {cls.who: fun} | ({} if weight is None else {"`weight`": weight})

    def split(self, call: _arguments.Call) -> _split.Split:
        """How the batch of a call is split."""
        return _split.plan(
            call,
            self.num_microbatches,
            self.microbatch_size,
            self.devices.num_shards,
        )

    def is_split(self, split: _split.Split) -> bool:
        """Whether there is more than one micro-batch."""
        # A symbolic number is not known to be greater than 1, but to differ from it.
        return split.num_microbatches * self.devices.num_shards != 1

    @property
    def is_unrolled(self) -> bool:
        """Whether one round of the loop is several micro-batches, or all."""
        return self.unroll is True or self.unroll > 1

    def checked(
        self, call: _arguments.Call
    ) -> tuple[_split.Split, int | Scalar | None]:
        """How to split the batch of a call, and how many micro-batches to run.

        Raises:
          TypeError: A `num_real_microbatches` of another type.
          ValueError: What `value_and_grad` says of a call's arguments.
        """
        self.devices.check_place(self.inside_axis)
        self._check_weight(call)
        split = self.split(call)
        if self.is_split(split):
            examples = split.examples * self.devices.num_shards
            _whole.check(call, self.roles, self.functions, examples)
        for name, argument in call.named():
            self.devices.check_whole(name, argument)
        number = self.num_real_microbatches
        if number is not None:
            number = _validate.real_microbatches(number, split.num_microbatches)
        if isinstance(number, jax.Array) and self.is_unrolled:
            raise ValueError(
                f"`unroll={self.unroll}` needs to know the number of micro-batches, "
                "and `num_real_microbatches` is traced. Leave one of the two out"
            )
        return split, number

    def _check_weight(self, call: _arguments.Call) -> None:
        """Raises if the user's `weight` does not take the arguments of this call."""
        if self.weight is None or self.weight is not self.functions.get("`weight`"):
            return  # `optax_accum.flax` has put a function of its own around it.
        try:
            signature = inspect.signature(self.weight)
        except (TypeError, ValueError):  # Some have no signature.
            return
        for more in ({}, {"aux": None}):
            try:
                call.apply(signature.bind, call.args, call.kwargs | more)
            except TypeError:
                continue
            return
        raise TypeError(
            "`weight` is called as `fun` is, with the arguments "
            f"({', '.join([*call.names, *call.kwargs])}); got a function of "
            f"{signature}. Give it the parameters of `fun`, in the same order"
        )

    def on_devices(
        self,
        on_device: Callable[[_arguments.Call, int | Scalar | None], Any],
        call: _arguments.Call,
        split: _split.Split,
        number: int | Scalar | None,
        specs: Specs,
    ) -> tuple[Callable[[Batch, list[Any]], Any], list[Any]]:
        """``run(batch, arrays)``, compiled, and the arrays of `call`.

        Args:
          on_device: Makes the result of a device, from its own call and the number.
          call: The call.
          split: How its batch is split.
          number: How many micro-batches are to run, or ``None`` for all.
          specs: How the results are sharded on the mesh, if there is one.

        Raises:
          ValueError: A random key is read that is not an argument.
        """
        given = call.args, call.kwargs, number

        def run_on_device(batch: Batch, arrays: list[Any]) -> Any:
            args, kwargs, number = _tree.filled(given, arrays)
            return on_device(
                call._replace(args=args, kwargs=kwargs, batch=batch), number
            )

        # Arrays come as arguments, even outside of any `jax.jit`: what a compiled
        # function closes over, JAX keeps. Other leaves stay as they are.
        @jax.jit
        def run(batch: Batch, arrays: list[Any]) -> Any:
            return self.devices.on_each_device(
                run_on_device, batch, arrays, split.axes, specs
            )

        arrays = _tree.arrays_in(given)
        shows_values = jax.config.jax_disable_jit  # type: ignore[attr-defined]
        if self.is_split(split) and not shows_values:
            _whole.check_traced(self.who, run, call.batch, arrays)
        return run, arrays

    def in_place_if_possible(
        self, run: Callable[[bool], Any], obstacle: str | None
    ) -> Any:
        """``run(True)``, in place; or ``run(False)``, if something is in the way.

        Args:
          run: Raises `NotInPlaceError` if something else is.
          obstacle: What is known to be in the way, or ``None``.
        """
        if self.in_place is False:
            obstacle = "`in_place` is False"
        if self.may_add_in_place(obstacle):
            try:
                return run(True)
            except NotInPlaceError as error:
                self.may_add_in_place(str(error))
        return run(False)

    def may_add_in_place(self, obstacle: str | None) -> bool:
        """Whether gradients may be added in place: there is no `obstacle`.

        Raises:
          ValueError: There is one, and ``in_place=True``.
        """
        if obstacle is not None and self.in_place:
            raise ValueError(
                f"`in_place=True` is not possible here: {obstacle}. Leave `in_place` "
                "out, and gradients are computed first and then added"
            )
        return obstacle is None

    def last_number(
        self, split: _split.Split, number: int | Scalar | None
    ) -> int | Scalar:
        """The number of the last micro-batch that runs, -1 if none does."""
        count = split.num_microbatches
        if isinstance(number, jax.Array):
            return jnp.clip(number, 0, count) - 1
        return (count if number is None else number) - 1

    def loop(
        self,
        step: Step,
        last_step: Step,
        totals: Tree,
        split: _split.Split,
        number: int | Scalar | None,
    ) -> Tree:
        """`totals` after all micro-batches, or after the first `number` of them.

        Args:
          step: Runs a whole micro-batch.
          last_step: Runs the smaller last one, if there is one.
          totals: What goes from micro-batch to micro-batch, before the first.
          split: How the batch is split.
          number: An int, an array that says it when it runs, or ``None`` for all.
        """
        last = jnp.asarray(split.whole, jnp.int32)
        if isinstance(number, jax.Array):
            # The number, and so all that is summed up, may differ between devices.
            def vary(totals: Tree) -> Tree:
                totals = _collectives.vary(self.devices.axis_name, totals)
                return _tree.vary_like(totals, number)

            totals = lax.fori_loop(
                np.int32(0),
                jnp.minimum(number, split.whole).astype(jnp.int32),
                lambda index, totals: vary(step(totals, index)),
                vary(totals),
            )
            if not split.remainder:
                return totals
            return lax.cond(
                number > split.whole,
                lambda totals: vary(last_step(totals, last)),
                lambda totals: totals,
                totals,
            )
        count = split.num_microbatches if number is None else number
        totals, _ = lax.scan(
            lambda totals, index: (step(totals, index), None),
            totals,
            split.indices[:count],
            unroll=self.unroll,
        )
        return last_step(totals, last) if count > split.whole else totals
