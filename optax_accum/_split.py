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
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from optax_accum import _tree
from optax_accum._arguments import Call
from optax_accum._types import Batch, Scalar


class Split(NamedTuple):
    """A batch of ``B = whole * size + remainder`` examples.

    Attributes:
      whole: K, without the remainder.
      size: M.
      remainder: How many examples the last, smaller micro-batch has, or 0.
      axes: The axis of the examples in each leaf of the batch, from 0 on.
    """

    whole: int
    size: int
    remainder: int
    axes: tuple[int, ...]

    @property
    def num_microbatches(self) -> int:
        """The number of micro-batches, a smaller last one counted."""
        return self.whole + bool(self.remainder)

    @property
    def indices(self) -> jax.Array:
        """``i32[K]``, the numbers of the whole micro-batches."""
        return jnp.arange(self.whole, dtype=jnp.int32)

    @property
    def examples(self) -> int:
        """B."""
        return self.whole * self.size + self.remainder

    def take(self, batch: Batch, index: Scalar) -> Batch:
        """The whole micro-batch at `index`: arrays ``[B, ...]`` become ``[M, ...]``."""

        def take_leaf(x: jax.Array, axis: int) -> jax.Array:
            return self.part(self.apart(x, axis), index, self.size, axis)

        return self.map(take_leaf, batch)

    def take_remainder(self, batch: Batch, index: Scalar | None = None) -> Batch:
        """The examples after the last whole micro-batch."""
        del index
        start = self.whole * self.size
        return self.map(
            lambda x, axis: lax.slice_in_dim(x, start, None, axis=axis), batch
        )

    @property
    def takes(self) -> list[tuple[Any, int]]:
        """For micro-batches of each size ``take(batch, index)``, and the size."""
        whole, last = (self.take, self.size), (self.take_remainder, self.remainder)
        return [whole, last] if self.remainder else [whole]

    def apart(self, x: jax.Array, axis: int) -> jax.Array:
        """`x`, ``[B, ...]``, in a shape in which micro-batches can be read and written.

        Example i + j·K is at ``[j, i]``, without a remainder.
        """
        if self.remainder:
            return x
        shape = *x.shape[:axis], self.size, self.whole, *x.shape[axis + 1 :]
        return x.reshape(shape)

    def joined(self, x: jax.Array, axis: int) -> jax.Array:
        """The reverse of `apart`."""
        if self.remainder:
            return x
        return x.reshape(*x.shape[:axis], self.examples, *x.shape[axis + 2 :])

    def empty(self, part: jax.ShapeDtypeStruct, axis: int) -> jax.Array:
        """Zeros for all micro-batches, `apart`; `part` is like a whole one."""
        if self.remainder:
            shape = *part.shape[:axis], self.examples, *part.shape[axis + 1 :]
            return _tree.zeros_like(part.update(shape=shape))
        zeros = _tree.zeros_like(part)
        axes = [i if i <= axis else i + 1 for i in range(zeros.ndim)]
        shape = *part.shape[: axis + 1], self.whole, *part.shape[axis + 1 :]
        return lax.broadcast_in_dim(zeros, shape, axes)

    def part(self, x: jax.Array, number: int | Scalar, size: int, axis: int) -> Any:
        """The micro-batch of that number and `size` in `x`, which is `apart`."""
        if self.remainder:
            return lax.dynamic_slice_in_dim(x, number * self.size, size, axis)
        return lax.dynamic_index_in_dim(x, number, axis + 1, keepdims=False)

    def put(
        self, x: jax.Array, part: jax.Array, number: int | Scalar, axis: int
    ) -> jax.Array:
        """`x`, which is `apart`, with that `part` in it."""
        if self.remainder:
            return lax.dynamic_update_slice_in_dim(x, part, number * self.size, axis)
        return lax.dynamic_update_index_in_dim(x, part, number, axis + 1)

    def map(
        self, function: Callable[[jax.Array, int], jax.Array], batch: Batch
    ) -> Batch:
        """``function(leaf, axis)`` of every leaf."""
        return [function(x, axis) for x, axis in zip(batch, self.axes, strict=True)]


def plan(
    call: Call,
    num_microbatches: int | None,
    microbatch_size: int | None,
    shards: int = 1,
) -> Split:
    """How to split the batch of `call`.

    With several `shards`, how each of as many devices splits its part of it.

    Raises:
      ValueError: leaves without examples or with different numbers of them, or a size
        that does not go with their number.
    """
    examples = _count_examples(call)
    axes = [axis for axis in call.axes if axis is not None]
    holds = f"`{call.batch_names[0]}` holds {_examples(examples)} along axis {axes[0]}"
    if examples % shards:
        near = [examples // shards * shards, (examples // shards + 1) * shards]
        raise ValueError(
            f"the {shards} devices do not divide the batch: {holds}. Use "
            f"{_alternatives([n for n in near if n])} examples; fill up with padding "
            "that the loss masks out and `weight` does not count"
        )
    own = examples // shards
    if microbatch_size is not None:
        sizes = _by_size(microbatch_size, own, shards, holds)
    else:
        assert num_microbatches is not None
        sizes = _by_number(num_microbatches, own, shards, holds)
    pairs = zip(call.batch, axes, strict=True)
    split = Split(*sizes, tuple(axis % x.ndim for x, axis in pairs))
    _check_sharding(call, split, shards)
    return split


def _by_size(size: int, own: int, shards: int, holds: str) -> tuple[int, int, int]:
    """``(whole, size, remainder)`` on each device, which has `own` examples."""
    if size > own * shards:
        raise ValueError(
            f"`microbatch_size={size}` is more than the batch has: {holds}. Use at "
            f"most {own * shards}, which is the whole batch at once. If the last "
            f"batch of an epoch is smaller, use microbatch_size=min({size}, len(x))"
        )
    if size % shards:
        raise ValueError(
            f"`microbatch_size={size}` is not a multiple of {shards}, the number of "
            f"devices that share every micro-batch: {holds}. Use a multiple of "
            f"{shards} up to {own * shards}"
        )
    whole, remainder = divmod(own, size // shards)
    return whole, size // shards, remainder


def _by_number(number: int, own: int, shards: int, holds: str) -> tuple[int, int, int]:
    """``(whole, size, remainder)`` on each device, which has `own` examples."""
    if own % number != 0:
        if not isinstance(own, int):
            raise ValueError(
                f"`num_microbatches={number}` does not divide every batch of symbolic "
                f"size: {holds}. Give it a size that it divides, as in "
                f'jax.export.symbolic_shape("{number}*b, ...")'
            )
        divisors = [n for n in range(1, own + 1) if own % n == 0]
        each = f", {own} on each of {shards} devices" if shards > 1 else ""
        sizes = f"multiple of {shards}" if shards > 1 else "size"
        raise ValueError(
            f"`num_microbatches={number}` does not divide the batch: {holds}{each}. "
            f"Use {_alternatives(divisors)}, or `microbatch_size`, which takes any "
            f"{sizes} up to {own * shards}. If the examples are along a different "
            "axis, pass `batch_axis`"
        )
    return number, own // number, 0


def _count_examples(call: Call) -> int:
    """How many examples all leaves have."""
    if not call.batch:
        names = [f"`{call.name_of(place)}`" for place in call.places]
        raise ValueError(
            "the batch arguments hold no array to split; `batch_argnums` and "
            f"`batch_argnames` name {', '.join(names) or 'none'}. A batch that `fun` "
            "closes over cannot be split: make it an argument"
        )
    axes = [axis for axis in call.axes if axis is not None]
    leaves = list(zip(call.batch_names, call.batch, axes, strict=True))
    for name, leaf, axis in leaves:
        if not -leaf.ndim <= axis < leaf.ndim:
            raise ValueError(_lacks_axis(call, name, leaf, axis))
    counts = [leaf.shape[axis] for _, leaf, axis in leaves]
    for (name, _, axis), count in zip(leaves, counts, strict=True):
        if count == counts[0]:
            continue
        along, at = f" along `batch_axis={axis}`", ["", ""]
        if len(set(axes)) > 1:
            along, at = "", [f" along axis {a}" for a in (axes[0], axis)]
        raise ValueError(
            "all leaves of the batch arguments must have the same number of "
            f"examples{along}; `{leaves[0][0]}` has {counts[0]}{at[0]}, but `{name}` "
            f"has {count}{at[1]}. {_other_axes(call, axes, counts)}"
        )
    if not counts[0]:
        raise ValueError(f"the batch is empty: `{leaves[0][0]}` has 0 examples")
    return counts[0]


def _other_axes(call: Call, axes: list[int], counts: list[int]) -> str:
    """Which `batch_axis` fits leaves of which these `counts` along `axes` differ."""
    everywhere = set.intersection(*(set(x.shape) for x in call.batch)) - {0, 1}
    likely = [n for n in everywhere if n in counts] or [*everywhere]
    if len(likely) == 1:
        (n,) = likely
        fitting: list[int | None] = [
            axis if x.shape[axis] == n else x.shape.index(n)
            for x, axis in zip(call.batch, axes, strict=True)
        ]
        found = f"All have {n} entries along some axis; if these are the examples"
    else:
        usual = max(counts, key=counts.count)
        pairs = zip(axes, counts, strict=True)
        fitting = [axis if count == usual else None for axis, count in pairs]
        found = "If all examples share one of them, give it None"
    rest = iter(fitting)
    every = [None if axis is None else next(rest) for axis in call.axes]
    return f"{found}: {call.shown_axes(every)}"


def _lacks_axis(call: Call, name: str, leaf: jax.Array, axis: int) -> str:
    """What to say of a leaf that does not have the axis of the examples."""
    what = "is a scalar" if leaf.ndim == 0 else f"has shape {leaf.shape}"
    needs = f"`{name}` {what}, but needs its examples along `batch_axis={axis}`"
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return (
            f"{needs}. Pass a random key in an argument of its own, outside of the "
            "batch: each micro-batch then gets its own key"
        )
    places = iter(call.batch_names)
    shared = [None if a is None or next(places) == name else a for a in call.axes]
    remedy = "pass it in an argument that is not in `batch_argnums` or `batch_argnames`"
    if any(a is not None for a in shared):
        remedy = f"give it None: {call.shown_axes(shared)}. Or {remedy}"
    return f"{needs}. If all examples share it, {remedy}"


def _check_sharding(call: Call, split: Split, devices: int) -> None:
    """Raises where an explicit mesh cannot hold a micro-batch."""
    for name, leaf, axis in zip(call.batch_names, call.batch, split.axes, strict=True):
        axes = _tree.axes_of(_tree.spec(leaf)[axis])
        shards = math.prod(jax.typeof(leaf).sharding.mesh.shape[a] for a in axes)
        for size in (split.size * devices, split.remainder * devices):
            if size % shards:
                raise ValueError(
                    f"`{name}` is sharded over {shards} devices "
                    f"along axis {axis}, and a micro-batch of {size} examples "
                    "cannot be. Choose `num_microbatches` or `microbatch_size` to make "
                    f"every micro-batch a multiple of {shards}"
                )


def _examples(count: int) -> str:
    return f"{count} example" if count == 1 else f"{count} examples"


def _alternatives(numbers: list[int]) -> str:
    *others, last = map(str, numbers)
    return f"{', '.join(others)} or {last}" if others else last
