"""What the loop of `oa.value_and_grad` costs, read from the compiled program."""

import functools
import itertools

import jax
import jax.numpy as jnp
import pytest
from optax import microbatching

import optax_accum as oa
from tests.support import hlo
from tests.support.training import slow

pytestmark = pytest.mark.core

B = 256
SIZES = (128, 512, 384, 16)  # of which no two matrices share a shape
SCALARS = 512  # bytes: the loop's counters, W, and their alignment


def shape(*dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype)


def make_params(dtype=jnp.float32):
    pairs = itertools.pairwise(SIZES)
    return [shape(*pair, dtype=dtype) for pair in pairs]


def make_batch(*lead):
    lead = lead or (B,)
    return {"x": shape(*lead, SIZES[0]), "y": shape(*lead, SIZES[-1])}


def loss(params, batch):
    h = batch["x"].astype(params[0].dtype)
    for w in params[:-1]:
        h = jnp.tanh(h @ w)
    return jnp.mean((h @ params[-1]).astype(jnp.float32) * batch["y"])


def by_hand(k, fun=loss):
    """The scan that everybody writes, over micro-batches that come split."""

    def run(params, batches):
        def body(carry, batch):
            value, grads = jax.value_and_grad(fun)(params, batch)
            add = functools.partial(jax.tree.map, lambda s, g: s + g.astype(s.dtype))
            return add(carry, (value, grads)), None

        zeros = [jnp.zeros(p.shape, jnp.float32) for p in params]
        start = jnp.zeros([]), zeros
        (value, grads), _ = jax.lax.scan(body, start, batches)
        mean = [(g / k).astype(p.dtype) for g, p in zip(grads, params, strict=True)]
        return value / k, mean

    return run


def program(fun, params, batch):
    return hlo.compiled(fun, params, batch, donate=())


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("k", [slow(2), 8, slow(32)])
def test_temporaries_are_those_of_a_scan_by_hand(k, dtype):
    params = make_params(dtype)
    ours = program(oa.value_and_grad(loss, num_microbatches=k), params, make_batch())
    scan = program(by_hand(k), params, make_batch(k, B // k))
    assert hlo.temporaries(ours) <= hlo.temporaries(scan) + SCALARS
    # The same loop and the same work; nothing is multiplied by a weight.
    assert len(hlo.operations(ours, "while")) == len(hlo.operations(scan, "while"))
    flops, by_scan = (p.cost_analysis()["flops"] for p in (ours, scan))
    assert flops <= by_scan + 64


@pytest.mark.parametrize("k", [slow(2), 8, slow(32)])
def test_temporaries_are_below_those_of_optax_microbatch(k):
    params, batch = make_params(), make_batch()
    theirs = microbatching.microbatch(
        jax.value_and_grad(loss),
        argnums=1,
        microbatch_size=B // k,
        accumulator=microbatching.AccumulationType.MEAN,
    )
    ours = program(oa.value_and_grad(loss, num_microbatches=k), params, batch)
    assert hlo.temporaries(ours) < hlo.temporaries(program(theirs, params, batch))


def test_more_micro_batches_need_less_memory():
    params = make_params()
    batch = {"x": shape(8 * B, SIZES[0]), "y": shape(8 * B, SIZES[-1])}
    held = [
        hlo.temporaries(
            program(oa.value_and_grad(loss, num_microbatches=k), params, batch)
        )
        for k in (1, 2, 8, 32)
    ]
    assert held == sorted(held, reverse=True)
    assert held[-1] < 0.15 * held[0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"weight": lambda _, batch: jnp.sum(batch["y"][:, 0] > 0)},
        {"skip": oa.skip_not_finite},
        {"reduction": "ratio"},
    ],
    ids=["plain", "weight", "skip", "ratio"],
)
@pytest.mark.parametrize(
    "size",
    [
        {"num_microbatches": 8},
        slow({"microbatch_size": B // 8}),
        {"microbatch_size": 30},
    ],
)
def test_neither_the_batch_nor_the_parameters_are_copied(size, options):
    params, batch = make_params(), make_batch()
    f = oa.value_and_grad(loss, **size, **options)
    compiled = program(f, params, batch)
    assert hlo.large_copies(compiled, B * SIZES[-1]) == []
    # Beside the sums, less than a few micro-batches' activations and one gradient.
    activations = (B // 8) * sum(SIZES) * 4
    assert hlo.temporaries(compiled) < 2 * hlo.nbytes(params) + 6 * activations


def test_scanning_over_a_transposed_batch_would_copy_it():
    """The instrument sees what is avoided."""

    def transposed(params, batch):
        def split(x):
            return x.reshape(B // 8, 8, -1).swapaxes(0, 1)

        return by_hand(8)(params, jax.tree.map(split, batch))

    compiled = program(transposed, make_params(), make_batch())
    assert hlo.large_copies(compiled, B * SIZES[-1]) != []


@pytest.mark.parametrize(
    ("size", "traces"),
    [
        ({"num_microbatches": 1}, 1),
        ({"num_microbatches": 8}, 1),
        ({"microbatch_size": B // 4}, 1),
        ({"microbatch_size": 30}, 2),  # with a smaller last one
    ],
    ids=str,
)
def test_fun_is_traced_once_per_shape(size, traces):
    seen = []

    def counted(params, batch, carry, key):
        seen.append(batch["x"].shape)
        noise = jax.random.uniform(key)
        return loss(params, batch) * noise, ({"noise": noise}, carry + noise)

    params, batch = make_params(), make_batch()
    f = oa.value_and_grad(
        counted, has_aux=True, aux="mean", carry_argnum=2, rng_argnums=3, **size
    )
    key = jax.eval_shape(jax.random.key, 0)
    lowered = jax.jit(f).lower(params, batch, shape(), key)
    assert len(seen) == len(set(seen)) == traces
    lowered.compile()
    jax.jit(jax.vmap(f, (0, None, None, None))).lower(
        jax.tree.map(lambda p: shape(3, *p.shape), params), batch, shape(), key
    )
    assert len(seen) == 2 * traces


def test_one_micro_batch_needs_no_loop():
    params, batch = make_params(), make_batch()
    ours = program(oa.value_and_grad(loss, num_microbatches=1), params, batch)
    plain = program(jax.value_and_grad(loss), params, batch)
    assert hlo.operations(ours, "while") == []
    assert hlo.temporaries(ours) <= hlo.temporaries(plain) + SCALARS


def test_aux_sums_and_means_are_not_stacked():
    """A statistic as large as the parameters is held once, not once per micro-batch."""

    def with_statistic(params, batch):
        return loss(params, batch), params[0] * batch["x"][0, 0]

    params, batch = make_params(), make_batch()

    def held(policy):
        f = oa.value_and_grad(
            with_statistic, has_aux=True, num_microbatches=8, aux=policy
        )
        compiled = program(f, params, batch).memory_analysis()
        return compiled.temp_size_in_bytes + compiled.output_size_in_bytes

    statistic = hlo.nbytes(params[0])
    for policy in ("mean", "sum", "last"):
        assert held(policy) < held("stack") - 6 * statistic


@pytest.mark.parametrize(("unroll", "loops"), [(4, 1), (True, 0)])
def test_an_unrolled_program_has_fewer_loops(unroll, loops):
    f = oa.value_and_grad(loss, num_microbatches=8, unroll=unroll)
    ours = program(f, make_params(), make_batch())
    assert len(hlo.operations(ours, "while")) == loops
    rounds = unroll if loops else 8
    assert len(hlo.operations(ours, "dot")) == rounds * len(
        hlo.operations(
            program(jax.value_and_grad(loss), make_params(), make_batch()), "dot"
        )
    )


def test_a_number_known_to_run_time_costs_no_temporaries():
    params = make_params()

    def some(params, batch, number):
        f = oa.value_and_grad(loss, num_microbatches=8, num_real_microbatches=number)
        return f(params, batch)

    ours = hlo.compiled(some, params, make_batch(), shape(dtype=jnp.int32), donate=())
    every = program(oa.value_and_grad(loss, num_microbatches=8), params, make_batch())
    assert hlo.temporaries(ours) <= hlo.temporaries(every) + SCALARS
    assert len(hlo.operations(ours, "while")) == 1


@pytest.mark.parametrize("dtype", [jnp.float32, slow(jnp.bfloat16)])
def test_the_gradient_of_the_value_costs_no_more_than_the_gradient(dtype):
    """For frameworks that call `jax.value_and_grad` of a loss themselves."""
    params, batch = make_params(dtype), make_batch()
    f = oa.value_and_grad(loss, num_microbatches=8)
    theirs = program(
        jax.value_and_grad(lambda params, batch: f(params, batch)[0]), params, batch
    )
    ours = program(f, params, batch)
    assert hlo.temporaries(theirs) <= 1.1 * hlo.temporaries(ours) + SCALARS
    assert len(hlo.operations(theirs, "while")) == 1
    assert len(hlo.operations(theirs, "dot")) == len(hlo.operations(ours, "dot"))
