"""What becomes of the auxiliary outputs of micro-batches.

=========  ====================================================================
policy     result
=========  ====================================================================
"stack"    all of them, ``[K, ...]``
"concat"   their axis 0 is that of the examples: one axis 0, in the batch's order
"mean"     their mean, with the weights of the loss
"sum"      their sum
"last"     the last one
=========  ====================================================================

``"mean"`` and ``"sum"`` leave out micro-batches of weight 0, as all sums here do; the
others hand on what came.
"""

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from optax_accum import _checks, _distributed, _types, _window
from optax_accum._split import Split

AuxPolicy = Literal["stack", "concat", "mean", "sum", "last"]
POLICIES: tuple[str, ...] = get_args(AuxPolicy)
_RESULT = {"mean": jnp.mean, "sum": jnp.sum}  # what gives a result its dtype


class Auxiliaries(NamedTuple):
    """The policy of each leaf of `aux`, and its path.

    What is carried and kept, `policies` and `paths` are lists with one entry per leaf.

    Attributes:
      policies: One of `POLICIES` for each leaf.
      paths: Their names in error messages.
      shapes: `aux` of a whole micro-batch, as a tree of `jax.ShapeDtypeStruct`.
    """

    policies: list[str]
    paths: list[str]
    shapes: Any

    @classmethod
    def plan(cls, policies: Any, shapes: Any, split: Split) -> "Auxiliaries":
        """Finds each leaf's policy in `policies`, a prefix of the tree `shapes`."""
        try:
            matched = jax.tree.leaves(jax.tree.broadcast(policies, shapes))
        except ValueError as error:
            raise ValueError(
                "`aux` must be a policy, or a tree of policies that is a prefix of "
                f"what `fun` returns as auxiliary output; got {policies!r} for "
                f"{jax.tree.structure(shapes)}"
            ) from error
        leaves = jax.tree_util.tree_leaves_with_path(shapes)
        paths = [_checks.named("aux", path) for path, _ in leaves]
        for policy, path, (_, leaf) in zip(matched, paths, leaves, strict=True):
            if policy in _RESULT and jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
                raise TypeError(
                    f'{path} has the policy "{policy}", but {leaf.dtype} cannot be '
                    'added up. Use "stack" or "last"'
                )
        plan = cls(matched, paths, shapes)
        plan.check_examples(shapes, split.size)
        return plan

    def check_examples(self, aux: Any, examples: int) -> None:
        """Raises where a leaf to be concatenated has another number of examples."""
        for policy, path, leaf in zip(
            self.policies, self.paths, jax.tree.leaves(aux), strict=True
        ):
            if policy == "concat" and (leaf.ndim == 0 or leaf.shape[0] != examples):
                raise ValueError(
                    f'{path} has the policy "concat", which needs one entry per '
                    f"example along axis 0; a micro-batch of {examples} examples gave "
                    f'shape {leaf.shape}. Use "stack", "mean", "sum" or "last", or '
                    "move the examples to axis 0 in `fun`"
                )

    def start(self, weight: Any) -> list[Any]:
        """What is carried before the first micro-batch; `weight` is like theirs."""

        def start_leaf(policy, leaf):
            if policy == "last":
                return _types.zeros_like(leaf)
            if policy in _RESULT:
                dtype = _result(policy, leaf).dtype
                zeros = _types.zeros_like(leaf, _window.at_least_float32(dtype))
                return _types.vary_like(zeros, weight)
            return None

        return self._map(start_leaf, jax.tree.leaves(self.shapes))

    def add(self, carried: list[Any], aux: Any, weight: jax.Array) -> list[Any]:
        """What is carried, with one more micro-batch in it."""

        def add_leaf(policy, total, leaf):
            if policy == "last":
                return leaf
            if policy in _RESULT:
                return _window.add(total, leaf, weight, policy)
            return None

        return self._map(add_leaf, carried, jax.tree.leaves(aux))

    def over_devices(self, carried: list[Any], axis_name: Any) -> list[Any]:
        """What is carried, of all devices of `axis_name`."""
        if axis_name is None:
            return carried

        def total(policy, leaf):
            if policy == "last":
                last = _distributed.last_device(axis_name)
                return _distributed.of_device(axis_name, last, leaf)
            return _distributed.sum_over(axis_name, leaf)

        return self._map(total, carried)

    def kept(self, aux: Any) -> list[Any]:
        """What is kept of every micro-batch."""
        return self._map(
            lambda policy, leaf: leaf if policy in ("stack", "concat") else None,
            jax.tree.leaves(aux),
        )

    def finish(
        self,
        carried: list[Any],
        stacks: list[Any],
        tails: list[Any] | None,
        weight: jax.Array,
        split: Split,
    ) -> Any:
        """The results, as a tree.

        Args:
          carried: From the last `add`.
          stacks: From `kept`, with a first axis of whole micro-batches.
          tails: From `kept` of the tail, if there is one.
          weight: W, of all devices.
          split: How the batch was split.
        """

        def finish_leaf(policy, path, leaf, total, stack, tail):
            if policy == "last":
                return total
            if policy in _RESULT:
                result = _window.close(total, weight, policy)
                return _window.cast_like(result, _result(policy, leaf))
            if policy == "concat":
                return split.join(stack, tail)
            return stack if tail is None else _append(stack, tail, path)

        leaves, structure = jax.tree.flatten(self.shapes)
        if tails is None:
            tails = [None] * len(leaves)
        return jax.tree.unflatten(
            structure,
            self._map(finish_leaf, self.paths, leaves, carried, stacks, tails),
        )

    def _map(self, function: Any, *lists: list[Any]) -> list[Any]:
        return [function(*row) for row in zip(self.policies, *lists, strict=True)]


def _result(policy: str, leaf: Any) -> jax.ShapeDtypeStruct:
    """A scalar in the dtype that the mean or the sum of `leaf` has in JAX."""
    return jax.eval_shape(_RESULT[policy], leaf)


def specs(policies: Any, axis_name: Any) -> Any:
    """Where the results lie on a mesh: for ``out_specs``."""

    def spec(policy):
        return P(axis_name) if policy in ("stack", "concat") else P()

    return jax.tree.map(spec, policies)


def check_policies(policies: Any) -> None:
    """Raises unless all leaves of `policies` are policies."""
    for policy in jax.tree.leaves(policies):
        _checks.one_of("aux", policy, POLICIES)


def _append(stack: jax.Array, tail: jax.Array, path: str) -> jax.Array:
    if stack.shape[1:] != tail.shape:
        raise ValueError(
            f'{path} has the policy "stack", but the last micro-batch, which is '
            f"smaller, gave shape {tail.shape} and the others {stack.shape[1:]}. Use "
            '"concat" for outputs with one entry per example, or a `microbatch_size` '
            "that divides the batch"
        )
    return jnp.concatenate([stack, tail[None]])
