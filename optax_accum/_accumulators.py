"""What becomes of the outputs of micro-batches: one accumulator per policy.

=========  ====================================================================
policy     result
=========  ====================================================================
"stack"    all of them, ``[K, ...]``
"concat"   their axis 0 is that of the examples: one axis 0, in the batch's order
"mean"     their mean, weighted
"sum"      their sum
"last"     the last one
=========  ====================================================================

``"mean"`` and ``"sum"`` leave out micro-batches that do not count (`_window.counts`),
as all sums here do; the others keep what came.

An accumulator serves one leaf of the outputs. What it carries from micro-batch to
micro-batch it starts, adds to, joins with the other devices', and turns into the
result. All of that is linear, and the backward pass of `add` is `cotangent`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec as P

from optax_accum import _tree, _validate, _window
from optax_accum._split import Split
from optax_accum._types import AxisName, Leaf, Scalar, Specs, Tree
from optax_accum.sharding import _collectives


class Part(NamedTuple):
    """Which micro-batch an output is of."""

    number: int | Scalar
    size: int
    weight: Scalar
    counted: bool | Scalar
    last: int | Scalar  # the number of the last one that runs


class Accumulator(Protocol):
    """How one leaf of the outputs is accumulated."""

    # Whether outputs of micro-batches of weight 0 are part of the result.
    keeps_all: ClassVar[bool]
    # Whether each device keeps its own part of the result.
    is_local: ClassVar[bool]

    def start(self, weight: Leaf) -> Tree:
        """What is carried before the first micro-batch; `weight` is like theirs."""

    def add(self, carried: Tree, output: jax.Array, part: Part) -> Tree:
        """With the output of one more micro-batch."""

    def cotangent(self, carried: Tree, part: Part) -> jax.Array:
        """The output's cotangent, from that of what is `carried` in the end."""

    def over_devices(self, carried: Tree, axis_name: AxisName | None) -> Tree:
        """What the devices of `axis_name`, if there is one, carry together."""

    def finish(self, carried: Tree, weight: Scalar) -> jax.Array:
        """The result; `weight` is W, of all devices."""


@dataclasses.dataclass(frozen=True)
class _OfLeaf:
    """What every accumulator knows of its leaf."""

    path: str
    shape: jax.ShapeDtypeStruct  # of a whole micro-batch's output
    split: Split

    is_local: ClassVar[bool] = False
    keeps_all: ClassVar[bool] = True


class _Reduced(_OfLeaf):
    """A sum, in at least float32, that is divided once."""

    keeps_all = False
    reduction: ClassVar[_window.Reduction]
    numpy: ClassVar[Callable[[Any], jax.Array]]  # gives a result its dtype

    def start(self, weight: Leaf) -> jax.Array:
        if jnp.issubdtype(self.shape.dtype, jax.dtypes.extended):
            raise TypeError(
                f'{self.path} has the policy "{self.reduction}", but '
                f'{self.shape.dtype} cannot be added up. Use "stack" or "last"'
            )
        dtype = _tree.at_least_float32(self._result().dtype)
        return _tree.vary_like(_tree.zeros_like(self.shape, dtype), weight)

    def add(self, carried: jax.Array, output: jax.Array, part: Part) -> jax.Array:
        return _window.add(
            carried, output, part.weight, self.reduction, counted=part.counted
        )

    def cotangent(self, carried: jax.Array, part: Part) -> jax.Array:
        return _window.contributions(
            carried, part.weight, self.reduction, counted=part.counted
        ).astype(self.shape.dtype)

    def over_devices(self, carried: jax.Array, axis_name: AxisName | None) -> jax.Array:
        return _collectives.sum_over(axis_name, carried)

    def finish(self, carried: jax.Array, weight: Scalar) -> jax.Array:
        result = _window.divide(carried, weight, self.reduction)
        return _tree.cast_like(result, self._result())

    def _result(self) -> jax.ShapeDtypeStruct:
        return jax.eval_shape(type(self).numpy, self.shape)


class Mean(_Reduced):
    """The weighted mean."""

    reduction, numpy = "mean", jnp.mean


class Sum(_Reduced):
    """The sum."""

    reduction, numpy = "sum", jnp.sum


class Last(_OfLeaf):
    """The last micro-batch's output; over devices, the last device's."""

    def start(self, weight: Leaf) -> jax.Array:
        del weight
        return _tree.zeros_like(self.shape)

    def add(self, carried: jax.Array, output: jax.Array, part: Part) -> jax.Array:
        del carried
        if output.shape != self.shape.shape and isinstance(part.last, jax.Array):
            raise ValueError(
                f'{self.path} has the policy "last", but the last micro-batch, which '
                f"is smaller, gave shape {output.shape} and the others "
                f"{self.shape.shape}, and `num_real_microbatches` is traced, so that "
                "either may be the last one. Use a `microbatch_size` that divides the "
                "batch"
            )
        return output

    def cotangent(self, carried: jax.Array, part: Part) -> jax.Array:
        if part.size == self.split.size and carried.shape != self.shape.shape:
            return _tree.zeros_like(self.shape)  # The last one is smaller.
        is_last = part.number == part.last
        return jnp.where(is_last, carried, jnp.zeros_like(carried))

    def over_devices(self, carried: jax.Array, axis_name: AxisName | None) -> jax.Array:
        if axis_name is None:
            return carried
        last = _collectives.last_device(axis_name)
        return _collectives.of_device(axis_name, last, carried)

    def finish(self, carried: jax.Array, weight: Scalar) -> jax.Array:
        del weight
        return carried


class _Kept(_OfLeaf):
    """Every output, in one array that is written in place."""

    is_local = True

    def over_devices(self, carried: jax.Array, axis_name: AxisName | None) -> jax.Array:
        del axis_name
        return carried


class Stack(_Kept):
    """All outputs on a new first axis."""

    def start(self, weight: Leaf) -> jax.Array:
        del weight
        return lax.broadcast(
            _tree.zeros_like(self.shape), (self.split.num_microbatches,)
        )

    def add(self, carried: jax.Array, output: jax.Array, part: Part) -> jax.Array:
        if output.shape != self.shape.shape:
            raise ValueError(
                f'{self.path} has the policy "stack", but the last micro-batch, which '
                f"is smaller, gave shape {output.shape} and the others "
                f'{self.shape.shape}. Use "concat" for outputs with one entry per '
                "example, or a `microbatch_size` that divides the batch"
            )
        return lax.dynamic_update_index_in_dim(carried, output, part.number, 0)

    def cotangent(self, carried: jax.Array, part: Part) -> jax.Array:
        return lax.dynamic_index_in_dim(carried, part.number, 0, keepdims=False)

    def finish(self, carried: jax.Array, weight: Scalar) -> jax.Array:
        del weight
        return carried


class Concat(_Kept):
    """The examples' outputs along axis 0, in the order of the batch."""

    def start(self, weight: Leaf) -> jax.Array:
        del weight
        self._check(self.shape.shape, self.split.size)
        return self.split.empty(self.shape, 0)

    def add(self, carried: jax.Array, output: jax.Array, part: Part) -> jax.Array:
        self._check(output.shape, part.size)
        return self.split.put(carried, output, part.number, 0)

    def cotangent(self, carried: jax.Array, part: Part) -> jax.Array:
        return self.split.part(carried, part.number, part.size, 0)

    def finish(self, carried: jax.Array, weight: Scalar) -> jax.Array:
        del weight
        return self.split.joined(carried, 0)

    def _check(self, shape: tuple[int, ...], examples: int) -> None:
        if shape[:1] != (examples,):
            raise ValueError(
                f'{self.path} has the policy "concat", which needs one entry per '
                f"example along axis 0; a micro-batch of {examples} examples gave "
                f"shape {shape}. {self._remedy(shape)}"
            )

    def _remedy(self, shape: tuple[int, ...]) -> str:
        if shape:
            return (
                'Use "stack", "mean", "sum" or "last", or move the examples to axis 0 '
                "in `fun`"
            )
        return (
            'A sum or a mean over the examples has "sum" or "mean". A loss that '
            "compares examples would compare those of one micro-batch only: return "
            "what it is made of, and compute it from all outputs"
        )


POLICIES: dict[str, type[_OfLeaf]] = {
    "stack": Stack,
    "concat": Concat,
    "mean": Mean,
    "sum": Sum,
    "last": Last,
}


_AS = {"aux": " as auxiliary output", "outputs": ""}


def check_policies(option: str, policies: Tree) -> None:
    """Raises unless all leaves of `policies`, the value of an option, are policies."""
    for policy in jax.tree.leaves(policies):
        _validate.one_of(option, policy, tuple(POLICIES))


def plan(option: str, policies: Tree, shapes: Tree, split: Split) -> list[Accumulator]:
    """An accumulator for each leaf of `shapes`, the outputs of a whole micro-batch.

    Args:
      option: Which option has the `policies`.
      policies: A tree of policies, a prefix of `shapes`.
      shapes: The types of the outputs.
      split: How the batch is split.

    Raises:
      ValueError: `policies` is not a prefix of `shapes`.
    """
    try:
        matched = jax.tree.leaves(jax.tree.broadcast(policies, shapes))
    except ValueError as error:
        raise ValueError(
            f"`{option}` must be a policy, or a tree of policies that is a prefix of "
            f"what `fun` returns{_AS[option]}; got {policies!r} for "
            f"{jax.tree.structure(shapes)}"
        ) from error
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    accumulators: list[Any] = [
        POLICIES[policy](_validate.named(option, path), leaf, split)
        for policy, (path, leaf) in zip(matched, leaves, strict=True)
    ]
    return accumulators


def specs(policies: Tree, axis_name: AxisName | None, spec: P) -> Specs:
    """Where the results lie on a mesh: for ``out_specs``.

    `spec` is for those of which devices do not keep their own part.
    """
    return jax.tree.map(
        lambda policy: P(axis_name) if POLICIES[policy].is_local else spec, policies
    )
