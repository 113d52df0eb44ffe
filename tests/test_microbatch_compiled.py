"""What both passes of `oa.microbatch` cost, read from the compiled program."""

import functools

import jax
import jax.numpy as jnp
import pytest

import optax_accum as oa
from tests.support import hlo
from tests.support.training import needs_in_place, slow

pytestmark = pytest.mark.core

K = 16
SCALARS = 512  # bytes: the loops' counters, and their alignment
RAGGED = {"microbatch_size": 5}  # with a remainder


def shape(*dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype)


# In one model the parameters are large, in the other one the activations.
LAYERS, WIDTH, OUT = 8, 256, 8
LARGE = shape(LAYERS, WIDTH, WIDTH), shape(64, WIDTH)
MANY = shape(4, 64, 64), shape(2048, 64)
EXAMPLES, FEATURES = MANY[1].shape


def scanned(params, x):
    """Layers in a scan, each rematerialised."""

    @jax.checkpoint
    def layer(h, w):
        return jnp.tanh(h @ w), None

    h, _ = jax.lax.scan(layer, x, params)
    return h[:, :OUT]


def unrolled(params, x):
    for w in params:
        x = jnp.tanh(x @ w)
    return x[:, :OUT]


def contrastive(encode, params, x):
    z = encode(params, x)
    return -jnp.mean(jnp.diag(jax.nn.log_softmax(z @ z.T)))


def decorrelated(encode, params, x):
    """Barlow Twins' loss, which needs little memory for itself."""
    z = encode(params, x)
    return jnp.sum((z.T @ z / len(x) - jnp.eye(z.shape[1])) ** 2)


def by_hand(params, x):
    """A scan over micro-batches, whose backward pass runs each again."""
    parts = x.reshape(K, len(x) // K, -1)
    z = jax.lax.map(jax.checkpoint(lambda part: scanned(params, part)), parts)
    return z.reshape(len(x), -1)


@functools.cache
def in_parts(fun, **options):
    if "microbatch_size" not in options:
        options["num_microbatches"] = options.get("num_microbatches", K)
    return oa.microbatch(fun, **options)


def large(encode, wrt=0):
    """The step of the model with large parameters, differentiated as `wrt` says."""
    return _compiled(contrastive, encode, wrt, LARGE)


def many(encode, wrt=0):
    """The step of the model with many examples."""
    return _compiled(decorrelated, encode, wrt, MANY)


@functools.cache
def _compiled(loss, encode, wrt, given):
    step = functools.partial(loss, encode)
    gradient = step if wrt is None else jax.value_and_grad(step, wrt)
    return hlo.compiled(gradient, *given, donate=())


def count(program, name):
    return len(hlo.operations(program, name))


@needs_in_place
@pytest.mark.parametrize(
    "options", [{}, slow({"in_place": True}), RAGGED | {"in_place": True}], ids=str
)
def test_temporaries_are_half_those_of_a_checkpointed_scan(options):
    """The gradient of a micro-batch, as large as the parameters, is nowhere."""
    ours = large(in_parts(scanned, **options))
    assert hlo.temporaries(ours) <= 0.5 * hlo.temporaries(large(by_hand))
    assert hlo.temporaries(ours) < 0.5 * hlo.nbytes(LARGE[0])
    assert hlo.large_copies(ours, LARGE[0].size) == []


def test_what_is_not_in_place_costs_what_a_checkpointed_scan_does():
    ours, theirs = large(in_parts(scanned, in_place=False)), large(by_hand)
    assert hlo.temporaries(ours) <= hlo.temporaries(theirs) + SCALARS
    assert hlo.large_copies(ours, WIDTH * WIDTH) == []
    # The same loops and the same work.
    for name in ("while", "dot"):
        assert count(ours, name) == count(theirs, name)


@pytest.mark.parametrize("options", [{}, slow({"in_place": False})], ids=str)
def test_temporaries_are_far_below_those_of_the_whole_batch(options):
    ours = many(in_parts(unrolled, **options))
    assert hlo.temporaries(ours) < 0.25 * hlo.temporaries(many(unrolled))


@pytest.mark.parametrize(
    "options",
    [
        {"microbatch_size": 100},
        slow({"microbatch_size": 1100}),  # no loop: one, and a smaller one
        slow({"unroll": 4}),
        {"unroll": True, "num_microbatches": 4},
    ],
    ids=str,
)
def test_nothing_is_kept_for_the_backward_pass_without_a_loop(options):
    """XLA would take a second run outside of a loop for the first one, and keep it."""
    ours = many(in_parts(unrolled, **options))
    size = options.get(
        "microbatch_size", EXAMPLES // options.get("num_microbatches", K)
    )
    one = hlo.temporaries(many(unrolled)) * size / EXAMPLES
    outputs = 4 * EXAMPLES * OUT
    assert hlo.temporaries(ours) < 1.25 * one + 2 * outputs + hlo.nbytes(MANY[0])


def test_more_micro_batches_need_less_memory():
    held = [
        hlo.temporaries(many(in_parts(unrolled, num_microbatches=k)))
        for k in (4, K, 64)
    ]
    assert held == sorted(held, reverse=True)
    assert held[-1] < 0.3 * held[0]


def test_there_is_one_loop_for_each_pass():
    ours = many(in_parts(unrolled))
    assert count(ours, "while") == 2
    # For each layer: forward, forward again, and backward, but not to the batch.
    layers, *_ = MANY[0].shape
    own = 4 * layers - 1
    loss = many(lambda _, x: x[:, :OUT], 1)
    assert count(ours, "dot") == own + count(loss, "dot")


def test_a_smaller_last_micro_batch_needs_no_further_loop():
    assert count(many(in_parts(unrolled, microbatch_size=300)), "while") == 2


def test_one_micro_batch_needs_no_loop():
    assert count(many(in_parts(unrolled, num_microbatches=1)), "while") == 0


@pytest.mark.parametrize(
    ("size", "traces"),
    [({"num_microbatches": 1}, 1), ({"num_microbatches": K}, 1), (RAGGED, 2)],
    ids=str,
)
def test_fun_is_traced_once_per_size_for_both_passes(size, traces):
    seen = []

    def counted(params, x, mean, key):
        seen.append(x.shape)
        z = scanned(params, x) * jax.random.uniform(key)
        return {"z": z, "sum": z.sum(0)}, mean + z.mean(0)

    encode = oa.microbatch(
        counted,
        carry_argnum=2,
        rng_argnums=3,
        outputs={"z": "concat", "sum": "sum"},
        **size,
    )

    def loss(params, x, mean, key):
        outputs, mean = encode(params, x, mean, key)
        value = contrastive(lambda *_: outputs["z"], params, x)
        return value + outputs["sum"].sum(), mean

    key = jax.eval_shape(jax.random.key, 0)
    step = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
    step.lower(*LARGE, shape(OUT), key)
    assert len(seen) == len(set(seen)) == traces


class TestWhatIsNotDifferentiatedCostsNothing:
    def test_the_batch(self):
        ours, both = (many(in_parts(unrolled), wrt) for wrt in (0, (0, 1)))
        # The gradient of the batch would be written part by part.
        rows = f"f32[{EXAMPLES // K},{K},{FEATURES}]"
        assert any(rows in t for t in hlo.operations(both, "dynamic-update-slice"))
        assert not any(rows in t for t in hlo.operations(ours, "dynamic-update-slice"))
        assert count(ours, "while") == count(both, "while")
        assert count(ours, "dot") == count(both, "dot") - 1
        # Where it is wanted, it costs no more than itself.
        assert hlo.temporaries(both) <= hlo.temporaries(ours) + (
            EXAMPLES // K * FEATURES * 4 + SCALARS
        )

    def test_the_parameters(self):
        ours = large(in_parts(scanned), 1)
        assert hlo.temporaries(ours) < 0.25 * hlo.nbytes(LARGE[0])
        assert hlo.large_copies(ours, LARGE[0].size) == []

    def test_some_of_the_parameters(self):
        frozen, trained = LARGE[0], shape(OUT, OUT)

        def encode(params, x):
            return scanned(params["frozen"], x) @ params["trained"]

        def loss(trained, frozen, x):
            params = {"frozen": frozen, "trained": trained}
            return contrastive(in_parts(encode), params, x)

        step = jax.value_and_grad(loss)
        ours = hlo.compiled(step, trained, frozen, LARGE[1], donate=())
        assert hlo.temporaries(ours) < 0.25 * hlo.nbytes(frozen)

    def test_outputs(self):
        """Of two heads, of which the loss uses one, only that runs."""

        def one_head(params, x):
            return x @ params[0]

        def two_heads(params, x):
            return {"used": one_head(params, x), "unused": unrolled(params, x)}

        def used(params, x):
            return in_parts(two_heads)(params, x)["used"]

        ours, alone = many(used), many(in_parts(one_head))
        for name in ("dot", "while"):
            assert count(ours, name) == count(alone, name)


class TestOnlyForward:
    def test_there_is_one_loop(self):
        ours = many(in_parts(unrolled), None)
        assert count(ours, "while") == 1
        assert count(ours, "dot") == count(many(unrolled, None), "dot")

    @pytest.mark.parametrize("m", [EXAMPLES // K, slow(120)])
    def test_memory_is_that_of_one_micro_batch_and_the_outputs(self, m):
        ours = hlo.compiled(in_parts(unrolled, microbatch_size=m), *MANY, donate=())
        one = hlo.compiled(unrolled, MANY[0], shape(m, FEATURES), donate=())
        outputs = EXAMPLES * OUT * 4
        assert ours.memory_analysis().output_size_in_bytes == outputs
        # What is input and output there is taken and put here.
        own = hlo.temporaries(one) + 4 * m * (FEATURES + OUT)
        # XLA does not write in place after a loop.
        last = outputs if EXAMPLES % m else 0
        assert hlo.temporaries(ours) <= own + last + SCALARS

    def test_carries_are_not_kept(self):
        """The backward pass needs each of them, the forward pass the last one."""
        carry = shape(WIDTH, WIDTH)

        def fun(params, x, carry):
            return unrolled(params, x) * carry[:1, :1], carry + 1

        def loss(params, x, carry):
            z, carry = in_parts(fun, carry_argnum=2)(params, x, carry)
            return decorrelated(lambda *_: z, params, x), carry

        step = jax.value_and_grad(loss, has_aux=True)
        program, differentiated = (
            hlo.compiled(f, *MANY, carry, donate=()) for f in (loss, step)
        )
        assert hlo.temporaries(differentiated) > K * hlo.nbytes(carry)
        assert hlo.temporaries(program) < 4 * hlo.nbytes(carry)
