"""Micro-batches by their number of tokens: which document goes into which row."""

import bisect
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from optax_accum import _validate


@dataclasses.dataclass(frozen=True)
class TokenBatch:
    """A plan for one micro-batch of packed documents, from `token_batches`.

    It has the documents' numbers, not the documents, and stays on the host. It is not
    a pytree; pass JAX the arrays that it makes.

    Attributes:
      documents: The numbers of the documents in every row, from left to right; ``()``
        for a row that is all padding.
      lengths: Their lengths, in the same layout.
      shape: ``(rows, length)``, the shape of what `pack` returns. Device d of D has the
        d-th of D equal parts of the rows, as in a sharding along axis 0.
      num_documents: How many documents the whole global batch has.

    Examples:
      >>> import numpy as np, optax_accum as oa
      >>> documents = [np.array([1, 2, 3]), np.array([4]), np.array([5, 6])]
      >>> (batch,) = oa.token_batches(
      ...     [3, 1, 2], max_tokens=8, row_length=4, multiple_of=4
      ... )
      >>> print(batch.documents, batch.num_tokens)
      ((0, 1), (2,)) 6
      >>> print(batch.pack(documents))
      [[1 2 3 4]
       [5 6 0 0]]
      >>> print(batch.segment_ids)
      [[1 1 1 2]
       [1 1 0 0]]
      >>> print(batch.positions)
      [[0 1 2 0]
       [0 1 0 0]]

      A token predicts the next one if that belongs to the same document:

      >>> segments = batch.segment_ids
      >>> print((segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0))
      [[ True  True False]
       [ True False False]]
    """

    documents: tuple[tuple[int, ...], ...]
    lengths: tuple[tuple[int, ...], ...]
    shape: tuple[int, int]
    num_documents: int

    @property
    def num_tokens(self) -> int:
        """How many tokens it holds, without padding."""
        return sum(map(sum, self.lengths))

    @property
    def segment_ids(self) -> np.ndarray:
        """``i32[rows, length]``: 1, 2, ... for a row's documents, 0 for padding."""
        segments = np.zeros(self.shape, np.int32)
        for place in self._places():
            segments[place.row, place.columns] = place.segment
        return segments

    @property
    def positions(self) -> np.ndarray:
        """``i32[rows, length]``: each document's tokens counted from 0."""
        positions = np.zeros(self.shape, np.int32)
        for place in self._places():
            positions[place.row, place.columns] = np.arange(place.length)
        return positions

    def pack(
        self, documents: Sequence[Any] | Mapping[int, Any], padding: Any = 0
    ) -> np.ndarray:
        """Packs the documents into rows, as planned.

        Args:
          documents: All documents of the global batch, or a mapping from a document's
            number to it. Each is an array ``[length, ...]``: its tokens, or anything
            else with an entry per token, such as a loss mask. Only those of this
            micro-batch are read; if it has none, one other, for the dtype.
          padding: The value that fills the rest of the rows.

        Returns:
          An array ``[rows, length, ...]`` of the documents' dtype.

        Raises:
          TypeError: Documents have different dtypes, or are not arrays.
          ValueError: The number of documents differs from the plan; a document differs
            from its planned length, or from the others in its further axes; there are
            none; their dtype cannot represent `padding`.
        """
        self._check_number(documents)
        like = self._like(documents)
        padding = _padding(padding, like.dtype)
        packed = np.full((*self.shape, *like.shape[1:]), padding, like.dtype)
        for place in self._places():
            array = np.asarray(documents[place.document])
            _check_document(array, place, like)
            packed[place.row, place.columns] = array
        return packed

    def select_rows(self, part: slice) -> "TokenBatch":
        """Returns the plan of some of the rows, such as those of one process.

        Every process plans from the lengths of all documents, and then loads and packs
        only the documents of its own devices:

            jax.make_array_from_callback(
                batch.shape,
                sharding,
                lambda index: batch.select_rows(index[0]).pack(documents),
            )

        Args:
          part: Which rows, ``slice(0, 4)``.

        Returns:
          A `TokenBatch`; ``batch.select_rows(part).pack(documents)`` is
          ``batch.pack(documents)[part]``.

        Raises:
          TypeError: `part` is not a slice.
        """
        if not isinstance(part, slice):
            raise TypeError(
                f"`part` must be a slice of the rows; got {part!r}. In a callback of "
                "jax.make_array_from_callback it is index[0]. For row i pass "
                "slice(i, i + 1)"
            )
        documents = self.documents[part]
        shape = len(documents), self.shape[1]
        return TokenBatch(documents, self.lengths[part], shape, self.num_documents)

    def _places(self) -> Iterator["_Place"]:
        """Where each document is."""
        for row, lengths in enumerate(self.lengths):
            start = 0
            for i, length in enumerate(lengths):
                columns = slice(start, start + length)
                yield _Place(row, columns, length, i + 1, self.documents[row][i])
                start += length

    def _check_number(self, documents: Sequence[Any] | Mapping[int, Any]) -> None:
        """Raises if `documents` are those of a part only, or of another global batch.

        Their numbers would be those of others, and with equal lengths nothing else
        would show it.
        """
        if isinstance(documents, Mapping) or len(documents) == self.num_documents:
            return
        raise ValueError(
            f"`documents` must be all {self.num_documents} of the global batch, in the "
            f"order of `lengths`; got {len(documents)}. If you have only some of them, "
            "pass a dict from their numbers (see `TokenBatch.documents`) to them"
        )

    def _like(self, documents: Sequence[Any] | Mapping[int, Any]) -> np.ndarray:
        """A document, for its dtype and its axes after the first."""
        for place in self._places():
            return np.asarray(documents[place.document])
        # This micro-batch is all padding; any other document will do, but not an empty
        # list, which has no dtype of its own.
        numbers = documents if isinstance(documents, Mapping) else range(len(documents))
        like = None
        for number in numbers:
            like = np.asarray(documents[number])
            if like.size:
                break
        if like is None:
            raise ValueError(
                "`documents` must have at least one document, for the dtype; got none. "
                "This micro-batch is all padding: pass any other document"
            )
        return like


class _Place(NamedTuple):
    """Where a document is, as what segment of its row."""

    row: int
    columns: slice
    length: int
    segment: int
    document: int


def _check_document(array: np.ndarray, place: _Place, like: np.ndarray) -> None:
    """Raises unless a document is as long as planned, and else like another one."""
    name, needed = f"`documents[{place.document}]`", (place.length, *like.shape[1:])
    if array.ndim == 0:
        raise TypeError(
            f"{name} must be an array with one entry per token; got "
            f"{_validate.shown(array.item())}. Tokenize strings, pack each array of a "
            "dict separately, and repeat a value that each document has once: "
            "np.full(length, value)"
        )
    if array.shape != needed:
        raise ValueError(
            f"{name} must have the shape {needed}: the length that `token_batches` was "
            f"given, and the other documents' axes; got {array.shape}. Pass the whole "
            "global batch, in the order of `lengths`"
        )
    if array.dtype != like.dtype:
        raise TypeError(
            f"{name} is {array.dtype} and a different one is {like.dtype}; they must "
            "have one dtype. Cast them first"
        )


def _padding(value: Any, dtype: np.dtype) -> np.ndarray:
    """`value` in this dtype, unless it would become another one."""
    with np.errstate(invalid="ignore", over="ignore"):
        padding = np.asarray(value).astype(dtype)
    if dtype.kind in "biu" and not np.array_equal(padding, value):
        raise ValueError(
            f"`padding` is {value!r}, which {dtype}, the documents' dtype, cannot "
            "represent. Cast the documents to a dtype that can"
        )
    return padding


def token_batches(
    lengths: Sequence[int] | np.ndarray,
    max_tokens: int,
    *,
    row_length: int | None = None,
    num_devices: int = 1,
    num_shapes: int = 4,
    multiple_of: int = 128,
    num_batches: int | None = None,
) -> list[TokenBatch]:
    """Packs documents of different lengths into micro-batches of a number of tokens.

    Use it if examples differ in length, to fill memory with little padding. Each
    micro-batch has up to `max_tokens` on each device. Documents are packed side by side
    into its rows, and never split; segment ids (for attention) and positions (for the
    embedding) separate them. With weights the update is that of the global batch.

    A micro-batch has the shape ``[num_devices * R, row_length]`` with R = `max_tokens`
    // `row_length`. Only the last one may be smaller: with four shapes 3/4, 2/4 or 1/4
    as large. It has fewer rows, or shorter ones if there are few. The shapes depend on
    the options alone, so the training step is compiled at most `num_shapes` times. All
    devices have the same number of micro-batches, of the same shapes.

    Plan on the host, outside of `jax.jit`: 100,000 documents take less than a second.
    The same arguments give the same plan in every process.

    Args:
      lengths: How many tokens each document has, an int >= 0. Documents without tokens
        are left out.
      max_tokens: The most tokens in a micro-batch on one device, including padding.
      row_length: The number of tokens in a row, a multiple of `multiple_of`; no
        document may be longer. By default all tokens are in one row. Attention over
        shorter rows is cheaper.
      num_devices: How many devices share the global batch.
      num_shapes: How many shapes there may be, an int >= 1. With 1 all micro-batches
        have the same shape and can be stacked.
      multiple_of: Every row's length is a multiple of this int.
      num_batches: How many micro-batches to make, by default as few as needed. Surplus
        ones have the smallest shape and are all padding, of weight 0.

    Returns:
      A list of at least one `TokenBatch`.

    Raises:
      TypeError: `lengths` are not ints (but the documents, say); an option is not an
        int.
      ValueError: There are no lengths, a negative one, or one longer than a row;
        `row_length` is not a multiple of `multiple_of`, or more than `max_tokens`;
        more micro-batches are needed than `num_batches`.

    Examples:
      >>> import optax_accum as oa
      >>> lengths = [500, 20, 300, 120, 700, 130, 40, 60]
      >>> for batch in oa.token_batches(lengths, max_tokens=1024):
      ...     print(batch.shape, batch.documents, batch.num_tokens)
      (1, 1024) ((4, 2, 1),) 1020
      (1, 1024) ((0, 5, 3, 7, 6),) 850

      Each is one micro-step, and the last one closes the window:

      >>> import jax, jax.numpy as jnp, optax
      >>> def loss(params, tokens, mask):  # a mean over the tokens
      ...     return jnp.sum(mask * (params - tokens) ** 2) / mask.sum() / 2
      >>> tx = oa.accumulate(optax.sgd(1.0))
      >>> @jax.jit
      ... def step(params, state, tokens, mask, boundary):
      ...     grads = jax.grad(loss)(params, tokens, mask)
      ...     return tx.update_params(
      ...         grads, state, params, weight=mask.sum(), boundary=boundary
      ...     )
      >>> documents = [jnp.full(n, float(n)) for n in lengths]
      >>> params = jnp.zeros([])
      >>> state = tx.init(params)
      >>> plan = oa.token_batches(lengths, max_tokens=1024)
      >>> for batch, boundary in oa.with_boundaries(plan):
      ...     tokens, mask = batch.pack(documents), batch.segment_ids > 0
      ...     params, state = step(params, state, tokens, mask, boundary)
      >>> print(f"{params:.1f} {jnp.concatenate(documents).mean():.1f}")
      463.6 463.6

    Note: How documents are packed
      By best fit in decreasing order: the longest document first, each into the fullest
      row in which it fits. That takes at most 11/9 of the fewest rows possible, plus 4
      (Johnson, Demers, Ullman, Garey and Graham, "Worst-case performance bounds for
      simple one-dimensional packing algorithms", SIAM Journal on Computing 3, 1974).
      The documents of the last micro-batch are packed once more, into the smallest
      shape in which they fit.

      So the micro-batches of a plan are not random samples: the first have the longest
      documents. Plan one global batch at a time. A noise scale measured on these
      micro-batches is wrong if gradients depend on the length.

    Note: Inside one step
      `oa.value_and_grad` takes micro-batches of one shape: pass ``num_shapes=1``, and
      the same `num_batches` at every update, to compile only once. Its micro-batch i of
      K has the examples i, i + K, ...:

          stacked = np.stack([batch.pack(documents) for batch in plan], axis=1)
          tokens = stacked.reshape(-1, stacked.shape[-1])

      If `weight` counts the tokens of a micro-batch from its arguments, micro-batches
      of padding do not run.
    """
    multiple_of = _validate.whole_number("multiple_of", multiple_of)
    num_devices = _validate.whole_number("num_devices", num_devices)
    num_shapes = _validate.whole_number("num_shapes", num_shapes)
    max_tokens = _validate.whole_number("max_tokens", max_tokens)
    row_length = _row_length(row_length, max_tokens, multiple_of)
    sizes = _lengths(lengths, row_length)
    shapes = _shapes(max_tokens // row_length, row_length, num_shapes, multiple_of)
    shapes = [(num_devices * rows, length) for rows, length in shapes]

    rows = _pack([i for i, size in enumerate(sizes) if size], sizes, row_length)
    most = shapes[0][0]
    # The last micro-batch may have as many rows as the others.
    num_full = max(len(rows) - 1, 0) // most
    batches = [
        _batch(rows[i * most : (i + 1) * most], sizes, shapes[0])
        for i in range(num_full)
    ]
    batches.append(_last_batch(rows[num_full * most :], sizes, shapes))
    if num_batches is not None:
        num_batches = _validate.whole_number("num_batches", num_batches)
        if num_batches < len(batches):
            raise ValueError(
                f"`num_batches` is {num_batches}, but these documents need "
                f"{len(batches)} micro-batches. Raise it or `max_tokens`, or put fewer "
                "documents into a global batch"
            )
        empty = _batch([], sizes, shapes[-1])
        batches += [empty] * (num_batches - len(batches))
    return batches


def _shapes(
    rows: int, length: int, most: int, multiple_of: int
) -> list[tuple[int, int]]:
    """`most` shapes at most, in equal steps from the largest down.

    Equal steps leave less padding than halves: if the remainder is anything between
    nothing and a micro-batch, 1/8 of one on average with four shapes, and not 1/6.
    """
    units = length // multiple_of
    parts = range(most, 0, -1)
    if rows >= min(most, units):
        shapes = [(-(-rows * part // most), length) for part in parts]
    else:
        shapes = [(rows, -(-units * part // most) * multiple_of) for part in parts]
    return list(dict.fromkeys(shapes))


def _pack(documents: list[int], sizes: list[int], row_length: int) -> list[list[int]]:
    """The documents in rows: the longest first, each where it fits best.

    Few rows have different spaces left. A sorted list of these finds the smallest that
    is large enough, without a look at every row.
    """
    rows: list[list[int]] = []
    spaces: list[int] = []
    rows_with: dict[int, list[list[int]]] = {}  # which have that space
    for document in sorted(documents, key=sizes.__getitem__, reverse=True):
        size = sizes[document]
        i = bisect.bisect_left(spaces, size)
        if i < len(spaces):
            space = spaces[i]
            row = rows_with[space].pop()
            if not rows_with[space]:
                del spaces[i], rows_with[space]
        else:
            space, row = row_length, list[int]()
            rows.append(row)
        row.append(document)
        left = space - size
        if left not in rows_with:
            bisect.insort(spaces, left)
            rows_with[left] = []
        rows_with[left].append(row)
    return rows


def _batch(
    rows: list[list[int]], sizes: list[int], shape: tuple[int, int]
) -> TokenBatch:
    """A micro-batch of these rows, and of empty ones below."""
    rows = rows + [[]] * (shape[0] - len(rows))
    lengths = tuple(tuple(sizes[document] for document in row) for row in rows)
    return TokenBatch(tuple(map(tuple, rows)), lengths, shape, len(sizes))


def _last_batch(
    rows: list[list[int]], sizes: list[int], shapes: list[tuple[int, int]]
) -> TokenBatch:
    """A micro-batch of the smallest shape in which the documents of these rows fit."""
    documents = [document for row in rows for document in row]
    longest = max((sizes[document] for document in documents), default=0)
    for shape in reversed(shapes[1:]):
        if longest <= shape[1]:
            packed = _pack(documents, sizes, shape[1])
            if len(packed) <= shape[0]:
                return _batch(packed, sizes, shape)
    return _batch(rows, sizes, shapes[0])


def _row_length(value: Any, max_tokens: int, multiple_of: int) -> int:
    """The number of tokens in a row."""
    if max_tokens < multiple_of:
        raise ValueError(
            f"`max_tokens` must be at least `multiple_of={multiple_of}`, the length of "
            f"the shortest row; got {max_tokens}. Raise it, or lower `multiple_of`"
        )
    largest = max_tokens // multiple_of * multiple_of
    if value is None:
        return largest
    needed = f"a multiple of `multiple_of={multiple_of}` and <= `max_tokens`"
    number = _validate.whole_number("row_length", value, f"an int >= 1, {needed}")
    if number % multiple_of or number > max_tokens:
        nearest = min(-(-number // multiple_of) * multiple_of, largest)
        raise ValueError(
            f"`row_length` must be {needed}, {max_tokens}; got {number}. Pass "
            f"{nearest}, or change `multiple_of`"
        )
    return number


def _lengths(value: Any, row_length: int) -> list[int]:
    """The lengths as ints, none of them longer than a row."""
    needed = "`lengths` must be one int >= 0 per document, its number of tokens"
    try:
        sizes = np.asarray(value)
    except ValueError:  # of different lengths
        sizes = None
    if sizes is None or sizes.ndim > 1 or sizes.dtype.kind in "US":
        raise TypeError(
            f"{needed}; got the documents themselves. Pass [len(d) for d in documents]"
        )
    if sizes.ndim == 0:
        raise TypeError(f"{needed}; got {_validate.shown(value)}. Pass a list of them")
    if sizes.size == 0:
        raise ValueError(f"{needed}; got none. Leave out a batch without documents")
    if sizes.dtype.kind not in "iu":
        raise TypeError(f"{needed}; got dtype {sizes.dtype}")
    shortest, longest = int(sizes.argmin()), int(sizes.argmax())
    if sizes[shortest] < 0:
        raise ValueError(f"{needed}; got {sizes[shortest]} for document {shortest}")
    if sizes[longest] > row_length:
        raise ValueError(
            f"`lengths[{longest}]` is {sizes[longest]}, but a row has {row_length} "
            "tokens, and documents are not split. Raise `row_length` or `max_tokens`, "
            "or truncate or drop the document"
        )
    return sizes.tolist()
