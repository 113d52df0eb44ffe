"""How a batch is split into micro-batches.

``B`` examples, ``K`` micro-batches of ``M`` and, if M does not divide B, a remainder of
the last ``B - K·M``.

Without a remainder the split is strided: micro-batch i holds the examples i, i + K,
i + 2K, ... A batch that is sharded over devices is then split where it lies, and every
device works on every micro-batch; contiguous parts would have to be gathered first.
With a remainder the parts are contiguous: leaving it out would copy the rest.

Micro-batches are cut out inside the loop. Scanning over a transposed batch would hold
a copy of it.
"""

import math
from typing import Any, NamedTuple

import jax
from jax import lax

from optax_accum import _tree, _validate
from optax_accum._types import Batch, Scalar


class Split(NamedTuple):
    """A batch of ``B = whole * size + remainder`` examples, along `axis`."""

    whole: int  # K, without the remainder
    size: int  # M
    remainder: int
    axis: int

    @property
    def num_microbatches(self) -> int:
        """The number of micro-batches, a smaller last one counted."""
        return self.whole + bool(self.remainder)

    @property
    def examples(self) -> int:
        """B."""
        return self.whole * self.size + self.remainder

    def take(self, batch: Batch, index: Scalar) -> Batch:
        """The whole micro-batch at `index`: arrays ``[B, ...]`` become ``[M, ...]``."""

        def take_leaf(x: jax.Array) -> jax.Array:
            axis = self.axis % x.ndim
            if self.remainder:
                start = index * self.size
                return lax.dynamic_slice_in_dim(x, start, self.size, axis)
            shape = *x.shape[:axis], self.size, self.whole, *x.shape[axis + 1 :]
            return lax.dynamic_index_in_dim(
                x.reshape(shape), index, axis + 1, keepdims=False
            )

        return jax.tree.map(take_leaf, batch)

    def take_remainder(self, batch: Batch) -> Batch:
        """The examples after the last whole micro-batch."""

        def take_leaf(x: jax.Array) -> jax.Array:
            axis = self.axis % x.ndim
            return lax.slice_in_dim(x, self.whole * self.size, None, axis=axis)

        return jax.tree.map(take_leaf, batch)


def plan(
    batch: list[Batch],
    names: list[str],
    axis: int,
    num_microbatches: int | None,
    microbatch_size: int | None,
    shards: int = 1,
) -> Split:
    """How to split the trees of arrays in `batch`, arguments called `names`.

    With several `shards`, how each of as many devices splits its part of them.

    Raises:
      ValueError: leaves without examples or with different numbers of them, or a size
        that does not go with their number.
    """
    leaves = [
        (_validate.named(argument, path), leaf)
        for argument, tree in zip(names, batch, strict=True)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    ]
    if not leaves:
        raise ValueError(
            "the batch arguments hold no array to split; `batch_argnums` and "
            f"`batch_argnames` lead to {', '.join(f'`{n}`' for n in names) or 'none'}"
        )
    examples = _count_examples(leaves, axis)
    holds = f"{leaves[0][0]} holds {_examples(examples)} along axis {axis}"
    if examples % shards:
        near = [examples // shards * shards, (examples // shards + 1) * shards]
        raise ValueError(
            f"the {shards} devices do not divide the batch: {holds}. Use "
            f"{_alternatives([n for n in near if n])} examples; what is padding can "
            "count for nothing, with `weight`"
        )
    own = examples // shards
    if microbatch_size is not None:
        sizes = _by_size(microbatch_size, own, shards, holds)
    else:
        assert num_microbatches is not None
        sizes = _by_number(num_microbatches, own, shards, holds)
    split = Split(*sizes, axis)
    _check_sharding(leaves, split, shards)
    return split


def _by_size(size: int, own: int, shards: int, holds: str) -> tuple[int, int, int]:
    """``(whole, size, remainder)`` on each device, which has `own` examples."""
    if size > own * shards:
        raise ValueError(
            f"`microbatch_size={size}` is more than the batch has: {holds}. Use at "
            f"most {own * shards}, which is the whole batch at once; where the last "
            f"batch of an epoch is smaller, microbatch_size=min({size}, len(x))"
        )
    if size % shards:
        raise ValueError(
            f"`microbatch_size={size}` does not divide over the {shards} devices, and "
            f"each needs as many examples of every micro-batch: {holds}. Use a "
            f"multiple of {shards} up to {own * shards}"
        )
    whole, remainder = divmod(own, size // shards)
    return whole, size // shards, remainder


def _by_number(number: int, own: int, shards: int, holds: str) -> tuple[int, int, int]:
    """``(whole, size, remainder)`` on each device, which has `own` examples."""
    if own % number:
        divisors = [n for n in range(1, own + 1) if own % n == 0]
        each = f", {own} on each of {shards} devices" if shards > 1 else ""
        sizes = f"multiple of {shards}" if shards > 1 else "size"
        raise ValueError(
            f"`num_microbatches={number}` does not divide the batch: {holds}{each}. "
            f"Use {_alternatives(divisors)}, or `microbatch_size`, which takes any "
            f"{sizes} up to {own * shards}"
        )
    return number, own // number, 0


def _count_examples(leaves: list[tuple[str, Any]], axis: int) -> int:
    """How many examples all leaves have."""
    for name, leaf in leaves:
        if not -leaf.ndim <= axis < leaf.ndim:
            what = "is a scalar" if leaf.ndim == 0 else f"has shape {leaf.shape}"
            raise ValueError(
                f"{name} {what}, but every leaf of a batch argument needs its examples "
                f"along `batch_axis={axis}`. Pass what all examples share in an "
                "argument that is not in `batch_argnums` or `batch_argnames`"
            )
        first, other = leaves[0][1].shape[axis], leaf.shape[axis]
        if other != first:
            raise ValueError(
                "all leaves of the batch arguments must have the same number of "
                f"examples along `batch_axis={axis}`; {leaves[0][0]} has {first}, but "
                f"{name} has {other}"
            )
    if not first:
        raise ValueError(f"the batch is empty: {leaves[0][0]} has 0 examples")
    return first


def _check_sharding(leaves: list[tuple[str, Any]], split: Split, devices: int) -> None:
    """Raises where an explicit mesh cannot hold a micro-batch."""
    for name, leaf in leaves:
        axes = _tree.axes_of(_tree.spec(leaf)[split.axis % leaf.ndim])
        shards = math.prod(jax.typeof(leaf).sharding.mesh.shape[a] for a in axes)
        for size in (split.size * devices, split.remainder * devices):
            if size % shards:
                raise ValueError(
                    f"{name} is sharded over {shards} devices "
                    f"along axis {split.axis}, and a micro-batch of {size} examples "
                    "cannot be. Choose `num_microbatches` or `microbatch_size` so that "
                    f"every micro-batch is a multiple of {shards}"
                )


def _examples(count: int) -> str:
    return f"{count} example" if count == 1 else f"{count} examples"


def _alternatives(numbers: list[int]) -> str:
    *others, last = map(str, numbers)
    return f"{', '.join(others)} or {last}" if others else last
