"""Micro-batches by their number of tokens: the plan, and the training that it makes."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import optax_accum as oa
from tests.support import devices
from tests.support.errors import refused
from tests.support.training import promoting

# --- Plans ---


@st.composite
def problems(draw):
    """Lengths, and the arguments of `token_batches`."""
    multiple_of = draw(st.sampled_from([1, 4, 8]))
    row_length = multiple_of * draw(st.integers(1, 6))
    max_tokens = row_length * draw(st.integers(1, 5)) + draw(
        st.integers(0, row_length - 1)
    )
    lengths = draw(st.lists(st.integers(0, row_length), min_size=1, max_size=40))
    return lengths, {
        "max_tokens": max_tokens,
        "row_length": row_length,
        "multiple_of": multiple_of,
        "num_devices": draw(st.sampled_from([1, 2, 3])),
        "num_shapes": draw(st.integers(1, 6)),
    }


def documents_of(lengths):
    """Random tokens from 1 on, of which no two documents are likely to be alike."""
    random = np.random.default_rng(len(lengths))
    return [random.integers(1, 2**15, n).astype(np.int32) for n in lengths]


def used(plan):
    """How many rows hold anything."""
    return sum(bool(row) for batch in plan for row in batch.documents)


@given(problems())
def test_every_document_is_in_one_row_and_none_is_cut(problem):
    lengths, options = problem
    plan = oa.token_batches(lengths, **options)
    rows = [row for batch in plan for row in batch.documents]
    numbers = sorted(number for row in rows for number in row)
    assert numbers == [i for i, length in enumerate(lengths) if length]
    for batch in plan:
        assert len(batch.documents) == len(batch.lengths) == batch.shape[0]
        for row, planned in zip(batch.documents, batch.lengths, strict=True):
            assert planned == tuple(lengths[number] for number in row)
            assert sum(planned) <= batch.shape[1]
    assert sum(batch.num_tokens for batch in plan) == sum(lengths)


@given(problems())
def test_no_device_has_more_tokens_than_the_budget(problem):
    lengths, options = problem
    devices = options["num_devices"]
    for batch in oa.token_batches(lengths, **options):
        rows, length = batch.shape
        assert rows % devices == 0
        assert rows // devices * length <= options["max_tokens"]
        assert length % options["multiple_of"] == 0


@given(problems(), problems())
def test_the_shapes_do_not_depend_on_the_lengths(problem, other):
    """One size for all but the last micro-batch, and `num_shapes` for that."""
    lengths, options = problem
    length = options["row_length"]
    rows = options["num_devices"] * (options["max_tokens"] // length)

    def last_shape(lengths):
        *full, last = oa.token_batches(lengths, **options)
        assert {batch.shape for batch in full} <= {(rows, length)}
        return last.shape

    # With one token more each time the last micro-batch has every shape there is.
    shapes = {last_shape([1] * n) for n in range(1, rows * length + 1)}
    assert (rows, length) in shapes
    assert len(shapes) <= options["num_shapes"]
    assert last_shape(lengths) in shapes
    assert last_shape([min(n, length) for n in other[0]]) in shapes
    _, empty = oa.token_batches([1], **options, num_batches=2)
    assert empty.shape == min(shapes)


@given(problems())
def test_the_same_arguments_give_the_same_plan(problem):
    lengths, options = problem
    plan = oa.token_batches(lengths, **options)
    assert plan == oa.token_batches(np.array(lengths, np.int32), **options)
    assert plan == oa.token_batches(tuple(lengths), **options)


@given(problems(), st.data())
def test_packed_documents_come_out_again(problem, data):
    lengths, options = problem
    documents = documents_of(lengths)
    for batch in oa.token_batches(lengths, **options):
        packed, segments = batch.pack(documents), batch.segment_ids
        positions = batch.positions
        for array in (packed, segments, positions):
            assert array.shape == batch.shape
            assert array.dtype == np.int32
        for row, numbers in enumerate(batch.documents):
            for segment, number in enumerate(numbers, start=1):
                (columns,) = np.nonzero(segments[row] == segment)
                np.testing.assert_array_equal(packed[row, columns], documents[number])
                np.testing.assert_array_equal(
                    positions[row, columns], np.arange(lengths[number])
                )
                assert columns[-1] - columns[0] + 1 == lengths[number]
            assert segments[row].max() == len(numbers)
        padding = segments == 0
        assert not packed[padding].any()
        assert not positions[padding].any()
        assert (~padding).sum() == batch.num_tokens

        bounds = st.integers(0, batch.shape[0])
        part = slice(*sorted((data.draw(bounds), data.draw(bounds))))
        chex.assert_trees_all_equal(
            (packed[part], segments[part], positions[part]),
            (
                batch.select_rows(part).pack(documents),
                batch.select_rows(part).segment_ids,
                batch.select_rows(part).positions,
            ),
        )
        assert batch.select_rows(part).shape == packed[part].shape


# --- How well they are packed ---


def fewest_rows(lengths, row_length):
    """By trying everything."""
    best = len(lengths)

    def place(i, spaces):
        nonlocal best
        if len(spaces) >= best:
            return
        if i == len(lengths):
            best = len(spaces)
            return
        for j, space in enumerate(spaces):
            if space >= lengths[i]:
                place(i + 1, [*spaces[:j], space - lengths[i], *spaces[j + 1 :]])
        place(i + 1, [*spaces, row_length - lengths[i]])

    place(0, [])
    return best


@given(st.lists(st.integers(1, 12), min_size=1, max_size=8))
def test_few_documents_take_at_most_half_as_many_rows_again_as_the_fewest(lengths):
    plan = oa.token_batches(lengths, 12, multiple_of=12)
    assert used(plan) <= 1.5 * fewest_rows(lengths, 12)


@given(
    st.lists(st.lists(st.integers(1, 99), max_size=4, unique=True), min_size=60),
    st.randoms(use_true_random=False),
)
def test_rows_cut_in_pieces_take_at_most_11_9_as_many_rows_and_4(rows, random):
    """The pieces of rows without padding, whose fewest rows are known."""
    lengths: list[int] = []
    for cuts in rows:
        lengths += np.diff([0, *sorted(cuts), 100]).tolist()
    random.shuffle(lengths)
    plan = oa.token_batches(lengths, 100, multiple_of=100)
    assert used(plan) <= 11 / 9 * len(rows) + 4


def test_a_document_goes_where_it_fits_best():
    (batch,) = oa.token_batches([6, 7, 3], 20, row_length=10, multiple_of=10)
    assert batch.documents == ((1, 2), (0,))


def test_rows_that_are_full_to_the_last_make_no_further_micro_batch():
    plan = oa.token_batches([8] * 6, 16, row_length=8, multiple_of=8)
    assert [batch.shape for batch in plan] == [(2, 8)] * 3


def test_documents_without_tokens_are_in_no_row():
    (batch,) = oa.token_batches([0, 3, 0], 8, row_length=4, multiple_of=4)
    assert batch.documents == ((1,),)
    (batch,) = oa.token_batches([0, 0], 8, row_length=4, multiple_of=4)
    assert (batch.documents, batch.num_tokens) == (((),), 0)
    assert not batch.segment_ids.any()


def test_a_row_is_as_long_as_the_budget_by_default():
    (batch,) = oa.token_batches([700], max_tokens=1000)
    assert batch.shape == (1, 768)
    assert batch.documents == ((0,),)


def last_shapes(length, numbers, max_tokens, **options):
    """Of the last micro-batch, of so many documents of one length."""
    plans = (oa.token_batches([length] * n, max_tokens, **options) for n in numbers)
    return [plan[-1].shape for plan in plans]


def test_the_last_micro_batch_shrinks_in_equal_steps():
    whole_rows = {"row_length": 100, "multiple_of": 100}
    shapes = last_shapes(100, range(1, 10), 800, **whole_rows)
    assert shapes == [(n, 100) for n in (2, 2, 4, 4, 6, 6, 8, 8, 2)]
    shapes = last_shapes(100, range(1, 5), 300, **whole_rows)
    assert shapes == [(n, 100) for n in (1, 2, 3, 1)]
    shapes = last_shapes(100, range(1, 8), 300, **whole_rows, num_devices=2)
    assert shapes == [(n, 100) for n in (2, 2, 4, 4, 6, 6, 2)]
    shapes = last_shapes(10, (1, 3, 5, 7), 80, multiple_of=8)
    assert shapes == [(1, length) for length in (24, 40, 64, 80)]


def test_a_few_rows_become_shorter_and_not_fewer():
    """In units of `multiple_of`: 2, 3, 4 and 5 of these."""
    options = {"row_length": 100, "multiple_of": 20}
    numbers = (1, 6, 7, 9, 10, 12, 13, 15, 16)
    lengths = (40, 40, 60, 60, 80, 80, 100, 100, 40)
    shapes = last_shapes(20, numbers, 300, **options)
    assert shapes == [(3, length) for length in lengths]
    # Not shorter than the longest document.
    assert last_shapes(70, (1, 2, 3), 300, **options) == [(3, 80)] * 3
    # For two shapes two rows are enough.
    shapes = last_shapes(100, (1, 2), 200, num_shapes=2, **options)
    assert shapes == [(1, 100), (2, 100)]


def test_more_micro_batches_than_needed_are_empty():
    plan = oa.token_batches([3] * 5, 8, row_length=4, multiple_of=4, num_batches=5)
    assert [batch.num_tokens for batch in plan] == [6, 6, 3, 0, 0]
    assert [batch.shape for batch in plan] == [(2, 4), (2, 4), (1, 4), (1, 4), (1, 4)]
    assert all(type(n) is int for n in plan[0].shape + plan[0].documents[0])


# --- Packing ---


def two_rows():
    (batch,) = oa.token_batches([2, 3], 8, row_length=4, multiple_of=4)
    assert batch.documents == ((1,), (0,))
    return batch


@pytest.mark.parametrize("dtype", ["uint8", "float32", "bfloat16", "bool"])
def test_anything_per_token_is_packed_in_its_own_dtype(dtype):
    documents = [jnp.ones((n, 2), dtype) for n in (2, 3)]
    packed = two_rows().pack(documents)
    assert packed.shape == (2, 4, 2)
    assert packed.dtype == jnp.dtype(dtype)
    assert packed.astype(int).sum() == 2 * 5


def test_the_rest_of_a_row_is_filled_with_the_padding():
    packed = two_rows().pack([[1, 2], [3, 4, 5]], padding=-100)
    np.testing.assert_array_equal(packed, [[3, 4, 5, -100], [1, 2, -100, -100]])


def test_only_the_documents_of_the_rows_are_read():
    part = two_rows().select_rows(slice(1, 2))
    np.testing.assert_array_equal(part.pack({0: [1, 2]}), [[1, 2, 0, 0]])
    with pytest.raises(KeyError):
        part.pack({1: [1, 2, 3]})


def test_a_micro_batch_of_padding_has_the_dtype_of_the_others():
    plan = oa.token_batches([3], 4, multiple_of=4, num_batches=2)
    documents = [np.ones((3, 5), np.float16)]
    for given_documents in (documents, dict(enumerate(documents))):
        packed = plan[1].pack(given_documents)
        assert packed.shape == (1, 4, 5)
        assert packed.dtype == np.float16
        assert not packed.any()
    with refused("`documents` must have at least one document", "got none"):
        plan[1].pack({})


def test_a_micro_batch_of_padding_has_the_dtype_of_the_others_in_lists():
    plan = oa.token_batches([0, 3], 4, multiple_of=4, num_batches=2)
    documents = [[], [1, 2, 3]]  # of the first, NumPy would make floats
    assert plan[1].pack(documents).dtype == plan[0].pack(documents).dtype == int


@pytest.mark.parametrize("fewer", [slice(1, None), slice(0, 3), slice(0, 0)])
def test_documents_of_another_batch_are_refused_though_all_are_as_long(fewer):
    documents = np.arange(16).reshape(4, 4)
    plan = oa.token_batches([4] * 4, 8, row_length=4, multiple_of=4)
    part = documents[fewer]
    for batch in [*plan, plan[0].select_rows(slice(0, 1))]:
        with refused("must be all 4", f"got {len(part)}", "a dict from their numbers"):
            batch.pack(part)
        some = {i: documents[i] for (i,) in batch.documents}
        np.testing.assert_array_equal(batch.pack(some), batch.pack(documents))


@pytest.mark.parametrize(
    ("dtype", "padding"),
    [
        ("uint8", -100),
        ("uint8", np.int64(-100)),
        ("bool", -100),
        ("int32", 0.5),
        ("int32", np.nan),
        ("int32", -np.inf),
    ],
)
def test_a_padding_that_would_become_another_is_refused(dtype, padding):
    documents = [np.ones(n, dtype) for n in (2, 3)]
    with refused("`padding` is", f"which {dtype}", "cannot represent", "Cast"):
        two_rows().pack(documents, padding)


@pytest.mark.parametrize(
    ("dtype", "padding"), [("bool", True), ("int32", -1.0), ("float16", -np.inf)]
)
def test_a_padding_of_another_type_but_that_value_is_taken(dtype, padding):
    documents = [np.zeros(n, dtype) for n in (2, 3)]
    assert two_rows().pack(documents, padding)[0, -1] == padding


@pytest.mark.parametrize("document", [0.5, "some text", {"tokens": np.ones(2)}])
def test_a_document_that_is_no_array_is_refused(document):
    with refused("one entry per token", f"type {type(document).__name__}", "np.full"):
        two_rows().pack([document] * 2)


@pytest.mark.parametrize("part", [1, (slice(0, 1), slice(None))])
def test_rows_takes_a_slice(part):
    with refused("`part` must be a slice", "index[0]"):
        two_rows().select_rows(part)


def test_a_document_that_is_not_as_planned_is_refused():
    batch = two_rows()
    with refused("`documents[0]`", "(2,)", "got (4,)", "order of `lengths`"):
        batch.pack([np.ones(4), np.ones(3)])
    with refused("`documents[0]`", "(2, 5)", "got (2, 1)"):
        batch.pack([np.ones((2, 1)), np.ones((3, 5))])
    with refused("`documents[0]` is float32", "float64", "Cast them"):
        batch.pack([np.ones(2, np.float32), np.ones(3)])


# --- Errors ---


@pytest.mark.parametrize(
    ("lengths", "words"),
    [
        ([], ["got none"]),
        (np.zeros(0, int), ["got none"]),
        ([[1, 2, 3], [4]], ["the documents themselves", "[len(d) for d in documents]"]),
        ([[1, 2], [3, 4]], ["the documents themselves"]),
        ([np.ones(3), np.ones(4)], ["the documents themselves"]),
        ([jnp.ones(3), jnp.ones(4)], ["the documents themselves"]),
        (["some", "text"], ["the documents themselves"]),
        (7, ["got 7 of type int"]),
        ((n for n in [1]), ["of type generator"]),
        ([1.0, 2.0], ["dtype float64"]),
        ([True], ["dtype bool"]),
        ([3, None], ["dtype object"]),
        ([3, -1], ["got -1 for document 1"]),
    ],
)
def test_lengths_that_are_not_ints_are_refused(lengths, words):
    with refused("`lengths` must be one int >= 0 per document", *words):
        oa.token_batches(lengths, 128)


def test_a_document_longer_than_a_row_is_named():
    with refused(
        "`lengths[1]` is 200", "128 tokens", "documents are not split", "drop"
    ):
        oa.token_batches([130, 200, 5], 256, row_length=128)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_tokens": 100}, ["`max_tokens`", "`multiple_of=128`", "got 100"]),
        ({"max_tokens": 0}, ["`max_tokens`", "got 0"]),
        ({"max_tokens": 1e3}, ["`max_tokens`", "got 1000.0 of type float"]),
        ({"row_length": 100}, ["`row_length`", "a multiple of", "got 100", "Pass 128"]),
        ({"row_length": 640}, ["`row_length`", "<= `max_tokens`", "got 640", "512"]),
        ({"row_length": 0}, ["`row_length`", "got 0"]),
        ({"num_devices": 0}, ["`num_devices`", "got 0"]),
        ({"num_shapes": 0}, ["`num_shapes`", "got 0"]),
        ({"multiple_of": 0}, ["`multiple_of`", "got 0"]),
        ({"num_batches": 1}, ["`num_batches` is 1", "need 2", "Raise it"]),
        ({"num_batches": 0}, ["`num_batches`", "got 0"]),
    ],
)
def test_options_that_do_not_fit_are_refused(options, words):
    with refused(*words):
        oa.token_batches([500, 400], **({"max_tokens": 512} | options))


# --- Training ---

VOCABULARY, LONGEST = 11, 16
# With an epsilon, without which Adam does not see how large a gradient is.
ADAM = promoting(optax.adam(0.1, eps=0.1))
close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=2e-6)


def initial_params():
    normal = np.random.default_rng(0).normal
    shapes = {
        "embedding": (VOCABULARY, 6),
        "position": (LONGEST, 6),
        "query": (6, 6),
        "out": (6, VOCABULARY),
    }
    return {k: jnp.asarray(normal(size=s), jnp.float32) for k, s in shapes.items()}


def logits(params, tokens, positions, mask):
    """Attention to what `mask` ``bool[rows, length, length]`` admits."""
    x = params["embedding"][tokens] + params["position"][positions]
    scores = jnp.einsum("bik,kl,bjl->bij", x, params["query"], x)
    attention = jax.nn.softmax(jnp.where(mask, scores, -1e9))
    return (x + attention @ x) @ params["out"]


def cross_entropy(logits, targets):
    log_p = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]


def is_target(segments):
    """Whether the next token is of the same document."""
    return (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)


def num_targets(params, batch):
    del params
    return is_target(batch["segments"]).sum()


def loss(params, batch):
    """The mean over the targets of a micro-batch."""
    tokens, segments = batch["tokens"], batch["segments"]
    mask = segments[:, :, None] == segments[:, None, :]
    mask &= jnp.tri(tokens.shape[1], dtype=bool)[None]
    each = cross_entropy(
        logits(params, tokens, batch["positions"], mask)[:, :-1], tokens[:, 1:]
    )
    total = jnp.sum(jnp.where(is_target(segments), each, 0))
    return total / jnp.maximum(num_targets(params, batch), 1).astype(total.dtype)


@jax.jit
@jax.grad
def mean_gradient(params, tokens, lengths):
    """Of the mean over all targets, of documents that are each by themselves."""

    def total(tokens, length):
        causal = jnp.tri(LONGEST, dtype=bool)[None]  # so what follows does not matter
        out = logits(params, tokens[None], jnp.arange(LONGEST)[None], causal)
        each = cross_entropy(out[:, :-1], tokens[None, 1:])[0]
        return jnp.sum(jnp.where(jnp.arange(1, LONGEST) < length, each, 0))

    number = (lengths - 1).sum().astype(jnp.float32)
    return jax.vmap(total)(tokens, lengths).sum() / number


def global_batches(count=9, updates=3):
    """Documents of uneven lengths, some of a single token; one has no target."""
    random = np.random.default_rng(1)
    lengths = random.integers(1, LONGEST + 1, (updates, count))
    lengths[:, 0], lengths[:, 1] = 1, LONGEST
    return [
        [random.integers(0, VOCABULARY, n).astype(np.int32) for n in row]
        for row in lengths
    ]


def arrays(batch, documents):
    """What the model gets of a micro-batch."""
    return {
        "tokens": batch.pack(documents),
        "segments": batch.segment_ids,
        "positions": batch.positions,
    }


def trained_by_document(updates):
    """Plain Optax on the mean over each whole global batch."""
    params = initial_params()
    state = ADAM.init(params)
    for documents in updates:
        tokens = np.stack([np.resize(tokens, LONGEST) for tokens in documents])
        lengths = np.array([len(tokens) for tokens in documents])
        grads = mean_gradient(params, tokens, lengths)
        params, state = updated(params, state, grads)
    return params


@jax.jit
def updated(params, state, grads):
    changes, state = ADAM.update(grads, state, params)
    return optax.apply_updates(params, changes), state


def planned(documents, rows=3, **options):
    """Micro-batches of `rows` rows on every device."""
    lengths = [len(tokens) for tokens in documents]
    return oa.token_batches(
        lengths,
        max_tokens=rows * LONGEST,
        row_length=LONGEST,
        multiple_of=8,
        **options,
    )


@pytest.mark.core
def test_micro_batches_by_budget_train_as_the_global_batch():
    tx = oa.accumulate(ADAM)

    @functools.partial(jax.jit, static_argnames="boundary")
    def step(params, state, batch, boundary):
        grads = jax.grad(loss)(params, batch)
        weight = num_targets(params, batch)
        return tx.update_params(grads, state, params, weight=weight, boundary=boundary)

    updates = global_batches()
    params = initial_params()
    state = tx.init(params)
    for documents in updates:
        plan = planned(documents, rows=2)
        assert len(plan) > 2
        for batch, boundary in oa.with_boundaries(plan):
            params, state = step(params, state, arrays(batch, documents), boundary)
    assert oa.gradient_step(state) == len(updates)
    close(params, trained_by_document(updates))


def test_stacked_micro_batches_inside_one_step_train_as_the_global_batch():
    """As many for every update, those that hold nothing do not run."""
    ran: list[None] = []
    compiled: list[None] = []

    def seen(params, batch):
        jax.debug.callback(lambda: ran.append(None))
        return loss(params, batch)

    number = 6
    gradient = oa.grad(seen, num_microbatches=number, weight=num_targets)

    @jax.jit
    def step(params, state, batch):
        compiled.append(None)
        return updated(params, state, gradient(params, batch))

    def stacked(*micro_batches):
        return np.stack(micro_batches, axis=1).reshape(-1, LONGEST)

    updates = global_batches()
    params = initial_params()
    state = ADAM.init(params)
    holding_any = 0
    for documents in updates:
        plan = planned(documents, rows=2, num_shapes=1, num_batches=number)
        holding_any += sum(batch.num_tokens > 0 for batch in plan)
        batch = jax.tree.map(stacked, *(arrays(batch, documents) for batch in plan))
        params, state = step(params, state, batch)
    jax.block_until_ready(params)
    jax.effects_barrier()
    assert len(ran) == holding_any < number * len(updates)
    assert len(compiled) == 1
    close(params, trained_by_document(updates))


@pytest.mark.several_devices
def test_micro_batches_by_budget_train_as_the_global_batch_on_several_devices():
    """Each device packs its own rows; the last micro-batch leaves devices empty."""
    mesh = devices.mesh()
    over: dict[str, Any] = {"mesh": mesh, "axis_name": devices.AXIS}
    tx = oa.accumulate(ADAM, **over)
    gradient = oa.value_and_grad(
        loss,
        num_microbatches=1,
        weight=num_targets,
        local=True,
        return_info=True,
        **over,
    )

    @jax.jit
    def step(params, state, batch, boundary):
        (value, grads), info = gradient(params, batch)
        return tx.update_params(
            grads, state, params, weight=info.weight, value=value, boundary=boundary
        )

    sharding = NamedSharding(mesh, P(devices.AXIS))

    def on_devices(batch, documents, name):
        def own(index):
            return arrays(batch.select_rows(index[0]), documents)[name]

        return jax.make_array_from_callback(batch.shape, sharding, own)

    count = devices.COUNT
    updates = global_batches(count=3 * count)
    params = jax.device_put(initial_params(), NamedSharding(mesh, P()))
    state = tx.init(params)
    empty = 0
    for documents in updates:
        plan = planned(documents, rows=1, num_devices=count)
        assert len(plan) > 1
        for batch, boundary in oa.with_boundaries(plan):
            mine = batch.select_rows(slice(-(batch.shape[0] // count), None))
            empty += mine.num_tokens == 0
            given_arrays = {
                name: on_devices(batch, documents, name)
                for name in ("tokens", "segments", "positions")
            }
            params, state = jax.block_until_ready(
                step(params, state, given_arrays, boundary)
            )
    assert empty
    assert oa.gradient_step(state) == len(updates)
    close(jax.device_get(params), trained_by_document(updates))
