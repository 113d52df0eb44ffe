"""What becomes of the outputs of micro-batches: one accumulator per policy.

=========  ====================================================================
policy     result
=========  ====================================================================
"stack"    all of them, ``[K, ...]``
"concat"   their axis 0 is that of the examples: one axis 0, in the batch's order
"mean"     their mean, weighted
"sum"      their sum
"ratio"    of pairs ``(sum, count)``: the sum of all over the count of all
"last"     the last one
a function ``combine(a, b)`` of the outputs so far and of the next one
=========  ====================================================================

``"stack"``, ``"concat"`` and ``"last"`` keep what came. The others leave out
micro-batches that do not count (`_window.counts`), as all sums here do.

An accumulator serves one node of the outputs: a leaf, a pair, or whatever a function
combines. What it carries from micro-batch to micro-batch it starts, adds to, joins with
the other devices', and turns into the result. If it is `differentiable`, all of that is
linear, and the backward pass of `add` is `cotangent`.
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

Policy = str | Callable[[Tree, Tree], Tree]


class Part(NamedTuple):
    """Which micro-batch an output is of."""

    number: int | Scalar
    size: int
    weight: Scalar
    counted: bool | Scalar
    last: int | Scalar  # the number of the last one that runs


class Accumulator(Protocol):
    """How one node of the outputs is accumulated."""

    # Whether outputs of micro-batches of weight 0 are part of the result.
    keeps_all: ClassVar[bool]
    # Whether each device keeps its own part of the result.
    is_local: ClassVar[bool]

    def start(self, weight: Leaf) -> Tree:
        """What is carried before the first micro-batch; `weight` is like theirs."""

    def add(self, carried: Tree, output: Tree, part: Part) -> Tree:
        """With the output of one more micro-batch."""

    def cotangent(self, carried: Tree, part: Part) -> jax.Array:
        """The output's cotangent, from that of what is `carried` in the end."""

    def over_devices(self, carried: Tree, axis_name: AxisName | None) -> Tree:
        """What the devices of `axis_name`, if there is one, carry together."""

    def finish(self, carried: Tree, weight: Scalar) -> Tree:
        """The result; `weight` is W, of all devices."""


@dataclasses.dataclass(frozen=True)
class _OfNode:
    """What every accumulator knows of its node."""

    policy: Policy
    path: str
    shape: Any  # of a whole micro-batch's output
    split: Split

    is_local: ClassVar[bool] = False
    keeps_all: ClassVar[bool] = True
    differentiable: ClassVar[bool] = True

    @staticmethod
    def is_node(tree: Tree) -> bool:
        """Whether the policy is of all of `tree`, and not of each leaf in it."""
        del tree
        return False

    @property
    def _what(self) -> str:
        """Which policy its output has, for a message."""
        if callable(self.policy):
            return f"{self.path} has a function as its policy"
        return f'{self.path} has the policy "{self.policy}"'

    def _check_like_others(self, output: Tree) -> None:
        """Raises if `output` is shaped as the smaller last micro-batch is."""
        got, needed = (
            [jnp.shape(x) for x in jax.tree.leaves(tree)]
            for tree in (output, self.shape)
        )
        if got != needed:
            raise ValueError(
                f"{self._what}, but the last micro-batch, which is smaller, gave shape "
                f"{', '.join(map(str, got))} and the others "
                f'{", ".join(map(str, needed))}. Use "concat" for outputs with one '
                "entry per example, or a `microbatch_size` that divides the batch"
            )


class _Reduced(_OfNode):
    """A sum, in at least float32, that is divided once."""

    keeps_all = False
    reduction: ClassVar[_window.Reduction]
    numpy: ClassVar[Callable[[Any], jax.Array]]  # gives a result its dtype

    def start(self, weight: Leaf) -> jax.Array:
        if jnp.issubdtype(self.shape.dtype, jax.dtypes.extended):
            raise TypeError(
                f"{self._what}, but {self.shape.dtype} cannot be added up. Use "
                '"stack" or "last"'
            )
        dtype = _tree.at_least_float32(self._result().dtype)
        return _tree.vary_like(_tree.zeros_like(self.shape, dtype), weight)

    def add(self, carried: jax.Array, output: jax.Array, part: Part) -> jax.Array:
        self._check_like_others(output)
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


class Ratio(_OfNode):
    """Sums over counts, such as metrics with denominators of their own."""

    keeps_all = False
    differentiable = False

    @staticmethod
    def is_node(tree: Tree) -> bool:
        return type(tree) is tuple and len(tree) == 2 and jax.tree_util.all_leaves(tree)

    def start(self, weight: Leaf) -> Tree:
        if not self.is_node(self.shape):
            raise ValueError(
                f"{self._what}, which needs a tuple of two arrays, (sum, count); got "
                f"{_validate.shown_type(self.shape)}. If it is already a mean, use "
                '"mean", which is weighted as the loss is'
            )
        total, count = self.shape
        if jnp.broadcast_shapes(total.shape, count.shape) != total.shape:
            raise ValueError(
                f"{self._what}, which needs one count, or one per sum; got sums "
                f"of shape {total.shape} and counts of shape {count.shape}. The order "
                "is (sum, count)"
            )
        return tuple(part.start(weight) for part in self._parts)

    def add(self, carried: Tree, output: Tree, part: Part) -> Tree:
        each = zip(self._parts, carried, output, strict=True)
        return tuple(own.add(s, x, part) for own, s, x in each)

    def over_devices(self, carried: Tree, axis_name: AxisName | None) -> Tree:
        return _collectives.sum_over(axis_name, carried)

    def finish(self, carried: Tree, weight: Scalar) -> jax.Array:
        del weight
        total, count = carried
        dtype = jax.eval_shape(jnp.mean, self.shape[0]).dtype
        wide = _tree.at_least_float32(dtype)
        return (total.astype(wide) / count.astype(wide)).astype(dtype)

    @property
    def _parts(self) -> list[Sum]:
        return [Sum(self.policy, self.path, x, self.split) for x in self.shape]


class Combined(_OfNode):
    """What a user's function makes of the outputs."""

    keeps_all = False
    differentiable = False

    @staticmethod
    def is_node(tree: Tree) -> bool:
        del tree
        return True

    def start(self, weight: Leaf) -> Tree:
        self._check()
        empty = jax.tree.map(_tree.zeros_like, self.shape), jnp.zeros([], bool)
        return _tree.vary_like(empty, weight)

    def add(self, carried: Tree, output: Tree, part: Part) -> Tree:
        self._check_like_others(output)
        return self._add(carried, (output, jnp.asarray(part.counted)))

    def over_devices(self, carried: Tree, axis_name: AxisName | None) -> Tree:
        if axis_name is None:
            return carried
        rows = _collectives.of_each_device(axis_name, carried)
        first = jax.tree.map(lambda x: x[0], rows)
        others = jax.tree.map(lambda x: x[1:], rows)
        add = lambda so_far, row: (self._add(so_far, row), None)  # noqa: E731
        return lax.scan(add, first, others)[0]

    def finish(self, carried: Tree, weight: Scalar) -> Tree:
        del weight
        return carried[0]

    def _add(self, carried: Tree, new: Tree) -> Tree:
        """Pairs of outputs, and whether there are any."""
        (outputs, has_any), (output, has_new) = carried, new
        both = self._combine(outputs, output)
        with_new = _select(has_any, both, output)
        return _select(has_new, with_new, outputs), has_any | has_new

    @property
    def _combine(self) -> Callable[[Tree, Tree], Tree]:
        assert callable(self.policy)
        return self.policy

    def _check(self) -> None:
        needed = (
            f"{self._what}; it is called as combine(a, b) with two outputs, and must "
            "return one of the same type"
        )
        try:
            both = jax.eval_shape(self._combine, self.shape, self.shape)
        except Exception as error:
            advice = (
                'For the mean or the sum of all, pass "mean" or "sum"; for the '
                "largest, jnp.maximum"
            )
            if not jax.tree_util.all_leaves([self.shape]):
                advice = (
                    "It is called with the whole output, a tree. If it takes arrays, "
                    "pass a tree of policies that is built like the output"
                )
            raise TypeError(
                f"{needed}; it raised {type(error).__name__}. {advice}"
            ) from error
        types = [jax.tree.map(_validate.shown_type, x) for x in (self.shape, both)]
        if types[0] != types[1]:
            raise TypeError(f"{needed}; got {types[1]} for outputs {types[0]}")


class Last(_OfNode):
    """The last micro-batch's output; over devices, the last device's."""

    def start(self, weight: Leaf) -> jax.Array:
        del weight
        return _tree.zeros_like(self.shape)

    def add(self, carried: jax.Array, output: jax.Array, part: Part) -> jax.Array:
        del carried
        if output.shape != self.shape.shape and isinstance(part.last, jax.Array):
            raise ValueError(
                f"{self._what}, but the last micro-batch, which is smaller, gave shape "
                f"{output.shape} and the others {self.shape.shape}. With a traced "
                "`num_real_microbatches`, either may be the last one. Use a "
                "`microbatch_size` that divides the batch"
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


class _Kept(_OfNode):
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
        self._check_like_others(output)
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
                f"{self._what}, which needs one entry per example along axis 0; a "
                f"micro-batch of {examples} examples gave shape {shape}. "
                f"{self._remedy(shape)}"
            )

    def _remedy(self, shape: tuple[int, ...]) -> str:
        if shape:
            return (
                'Use "stack", "mean", "sum" or "last", or move the examples to axis 0 '
                "in `fun`"
            )
        return (
            'For a sum or a mean over the examples, use "sum" or "mean". A loss that '
            "compares examples would only compare those of one micro-batch: return "
            "the embeddings, and compute the loss from all of them"
        )


def _select(condition: Scalar, tree: Tree, other: Tree) -> Tree:
    return jax.tree.map(lambda x, y: jnp.where(condition, x, y), tree, other)


_BY_NAME: dict[str, type[_OfNode]] = {
    "stack": Stack,
    "concat": Concat,
    "mean": Mean,
    "sum": Sum,
    "ratio": Ratio,
    "last": Last,
}


def _class_of(policy: Policy) -> type[_OfNode]:
    return Combined if callable(policy) else _BY_NAME[policy]


_AS = {"aux": " as auxiliary output", "outputs": ""}


def check_policies(option: str, policies: Tree) -> None:
    """Raises unless all leaves of `policies`, the value of an option, are policies."""
    is_aux = option == "aux"
    names = [name for name, x in _BY_NAME.items() if is_aux or x.differentiable]
    for policy in jax.tree.leaves(policies):
        if not (is_aux and callable(policy)):
            or_else = ", or a function of two outputs, such as jnp.maximum" * is_aux
            _validate.one_of(option, policy, tuple(names), or_else)


def plan(option: str, policies: Tree, shapes: Tree, split: Split) -> Tree:
    """A tree of accumulators, of all nodes of `shapes`, a whole micro-batch's outputs.

    Args:
      option: Which option has the `policies`.
      policies: A tree of policies, a prefix of `shapes`.
      shapes: The types of the outputs.
      split: How the batch is split.

    Raises:
      ValueError: `policies` is not a prefix of `shapes`.
    """
    try:
        jax.tree.broadcast(policies, shapes)
    except ValueError as error:
        raise ValueError(
            f"`{option}` must be a policy, or a tree of policies that is a prefix of "
            f"what `fun` returns{_AS[option]}; got {policies!r} for "
            f"{jax.tree.structure(shapes)}"
        ) from error

    def accumulators(path: Any, policy: Policy, tree: Tree) -> Tree:
        if not jax.tree.leaves(tree):
            return tree
        of = _class_of(policy)
        return jax.tree_util.tree_map_with_path(
            lambda rest, node: of(
                policy, _validate.named(option, path + rest), node, split
            ),
            tree,
            is_leaf=of.is_node,
        )

    return jax.tree_util.tree_map_with_path(accumulators, policies, shapes)


def specs(policies: Tree, axis_name: AxisName | None, spec: P) -> Specs:
    """Where the results lie on a mesh: for ``out_specs``.

    `spec` is for those of which devices do not keep their own part.
    """
    return jax.tree.map(
        lambda policy: P(axis_name) if _class_of(policy).is_local else spec, policies
    )
