"""`oa.microbatch` against the whole batch at once, in float64.

The losses are no sums over examples. Each is computed from what an encoder makes of the
examples, which runs in micro-batches or, for the oracle, as it is.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import optax_accum as oa
from tests.support.training import promoting, slow

pytestmark = pytest.mark.core

FEATURES, HIDDEN, OUT = 3, 4, 4
ARGUMENTS = (0, 1, 2, 3)  # parameters, temperature, and both halves of the batch
FLOAT32 = float(jnp.finfo("float32").eps)


# --- Encoders, of float32 or wider ---


def encode(params, x):
    """Each parameter has a first axis: 1, or as long as x, for one of each example."""
    w, b, v = (params[name].astype(x.dtype) for name in "wbv")
    return (jnp.tanh(x[:, None] @ w + b) @ v)[:, 0]


def both(params, x, y):
    return encode(params, x), encode(params, y)


def overlaps(params, x, y):
    """What batch Dice needs of each class: how much agrees, and of how much."""
    masks, targets = (
        jax.nn.sigmoid(encode(params, x)),
        jax.nn.sigmoid(y @ MIX.astype(y.dtype)),
    )
    return (masks * targets).sum(0), (masks + targets).sum(0)


def routed(params, x, y):
    """A mixture of linear experts, and what the router did."""
    probabilities = jax.nn.softmax(encode(params, x))
    chosen = jax.nn.one_hot(jnp.argmax(probabilities, -1), OUT, dtype=x.dtype)
    experts = (probabilities * chosen).sum(-1) * y.sum(-1)
    return experts, {"probabilities": probabilities.mean(0), "counts": chosen.sum(0)}


def scores(params, x, y):
    return (encode(params, x) * (y @ MIX.astype(y.dtype))).sum(-1)


MIX = np.linspace(-1, 1, FEATURES * OUT).reshape(FEATURES, OUT).astype(np.float32)


# --- Losses of all outputs ---


def info_nce(outputs, temperature, x, y):
    del x, y
    a, b = (z / jnp.linalg.norm(z, axis=1, keepdims=True) for z in outputs)
    logits = a @ b.T * jnp.exp(temperature)
    rows, columns = (jax.nn.log_softmax(logits, axis) for axis in (0, 1))
    return -jnp.mean(jnp.diag(rows) + jnp.diag(columns)) / 2


def batch_dice(outputs, temperature, x, y):
    del x, y
    agree, total = outputs
    return 1 - jnp.mean((2 * agree + jnp.exp(temperature)) / (total + 1))


def barlow_twins(outputs, temperature, x, y):
    del x, y
    a, b = (
        (z - z.mean(0, keepdims=True)) / jnp.sqrt(z.var(0, keepdims=True) + 1e-2)
        for z in outputs
    )
    correlation = a.T @ b / len(a)
    off = correlation - jnp.diag(jnp.diag(correlation))
    return ((1 - jnp.diag(correlation)) ** 2).sum() + temperature * (off**2).sum()


def balanced(outputs, temperature, x, y):
    result, router = outputs
    fractions = router["counts"] / router["counts"].sum()
    balance = OUT * (fractions * router["probabilities"]).sum()
    return jnp.mean((result - (x * y).sum(-1)) ** 2) + temperature * balance


def pairwise_rank(outputs, temperature, x, y):
    del y
    gain = x[:, 0]  # How relevant each is.
    margin = (outputs[:, None] - outputs[None]) * jnp.exp(temperature)
    pairs = jax.nn.relu(gain[:, None] - gain[None])
    return (pairs * jax.nn.softplus(-margin)).sum() / pairs.sum()


def listwise_rank(outputs, temperature, x, y):
    targets = jax.nn.softmax(x[:, 0] + y[:, 0])
    return -(targets * jax.nn.log_softmax(outputs * jnp.exp(temperature))).sum()


class Case(NamedTuple):
    """A loss: ``head(fun(params, x, y), temperature, x, y)``."""

    fun: Callable[..., Any]
    outputs: Any
    head: Callable[..., Any]


CASES = {
    "InfoNCE": Case(both, "concat", info_nce),
    "batch Dice": Case(overlaps, "sum", batch_dice),
    "Barlow Twins": Case(both, "concat", barlow_twins),
    "MoE": Case(
        routed, ("concat", {"probabilities": "mean", "counts": "sum"}), balanced
    ),
    "pairwise rank": Case(scores, "concat", pairwise_rank),
    "listwise rank": Case(scores, "concat", listwise_rank),
}


def loss_of(case, **size):
    """``loss(params, temperature, x, y)``; with a `size`, in micro-batches."""
    fun = case.fun
    if size:
        fun = oa.microbatch(fun, batch_argnums=(1, 2), outputs=case.outputs, **size)

    def loss(params, temperature, x, y):
        return case.head(fun(params, x, y), temperature, x, y)

    return loss


def make(seed, examples, dtype="float32"):
    """Parameters, temperature, x and y."""
    random = np.random.default_rng(seed)
    shapes = {"w": (1, FEATURES, HIDDEN), "b": (1, 1, HIDDEN), "v": (1, HIDDEN, OUT)}
    params = {name: random.normal(size=shape) for name, shape in shapes.items()}
    x, y = random.normal(size=(2, examples, FEATURES))
    wide = "float64" if dtype == "float64" else "float32"
    return (
        {name: jnp.asarray(p, dtype) for name, p in params.items()},
        *(jnp.asarray(z, wide) for z in (0.5, x, y)),
    )


# --- The oracle ---


class Oracle(NamedTuple):
    """What the unsplit loss gives in float64, and how near to it others can come.

    Each is a value and its gradients, ``(value, (params, temperature, x, y))``.

    Attributes:
      exact: Value and gradients.
      condition: By how much they change, in the 2-norm of each leaf, if all inputs are
        off by a small part of what they are, divided by that part.
      terms: The 2-norm of the sum of all examples' parts, each without its sign.
    """

    exact: Any
    condition: Any
    terms: Any


DIRECTIONS, STEP = 4, 1e-6


@functools.cache
def _around(name):
    """Values and gradients for several inputs at once, and the latters' terms."""
    loss = loss_of(CASES[name])

    def run(params, *others):
        # With parameters of its own, each example has a gradient of its own.
        apart = {k: jnp.repeat(p, len(others[1]), 0) for k, p in params.items()}
        value, (parts, *grads) = jax.value_and_grad(loss, ARGUMENTS)(apart, *others)

        def summed(parts):
            return value, (jax.tree.map(lambda g: g.sum(0)[None], parts), *grads)

        return summed(parts), summed(jax.tree.map(abs, parts))

    return jax.jit(jax.vmap(run))


def oracle(name, given):
    random = np.random.default_rng(0)

    def around(x):
        signs = random.choice([-1, 1], (1 + DIRECTIONS, *x.shape))
        signs[0] = 0
        return np.asarray(x).astype(np.float64) * (1 + STEP * signs)

    with jax.enable_x64(True):
        results, terms = jax.device_get(_around(name)(*jax.tree.map(around, given)))
    return Oracle(
        exact=jax.tree.map(lambda r: r[0], results),
        condition=jax.tree.map(lambda r: max(map(norm, r[1:] - r[0])) / STEP, results),
        terms=jax.tree.map(lambda t: norm(t[0]), terms),
    )


def norm(x):
    return np.linalg.norm(np.ravel(x))


def assert_as_near_as_rounding_allows(got, given, wanted, roundings=8):
    """`got` is a value and its gradients with respect to `given`."""
    inputs = given[1].dtype  # of what is computed in between
    unit = float(jnp.finfo(inputs).eps)
    results = (given[1], given)
    chex.assert_trees_all_equal_shapes_and_dtypes(got, results)
    rows = map(jax.tree.leaves, (got, results, *wanted))
    for g, like, exact, condition, terms in zip(*rows, strict=True):
        error = norm(np.asarray(g).astype(np.float64) - exact)
        bound = roundings * unit * (condition + terms)
        if like.dtype == jnp.bfloat16:
            # Each micro-batch's gradient is rounded, and so is their sum.
            bound += float(jnp.finfo(like.dtype).eps) * terms
        assert error <= bound, (error, bound)


def problem(name, seed):
    """The number of examples, a dtype, how they run: for each loss others."""
    random = np.random.default_rng([seed, *name.encode()])
    examples = int(random.choice([6, 8]))
    if random.random() < 0.5:
        size = {"microbatch_size": int(random.integers(1, examples + 1))}
    else:
        divisors = [n for n in range(1, examples + 1) if examples % n == 0]
        size = {"num_microbatches": int(random.choice(divisors))}
    dtype = random.choice(["float32", "bfloat16", "float64"])
    return examples, str(dtype), size | {"in_place": [None, False][random.integers(2)]}


# Their outputs are kept as InfoNCE's are.
VARIANTS = ("Barlow Twins", "pairwise rank", "listwise rank")


@pytest.mark.parametrize("name", [slow(x) if x in VARIANTS else x for x in CASES])
@hypothesis.settings(max_examples=hypothesis.settings().max_examples // 2)
@given(seed=st.integers(0, 2**32 - 1))
def test_any_split_gives_the_gradient_of_the_whole_batch(name, seed):
    examples, dtype, options = problem(name, seed)
    hypothesis.note(f"{examples} examples in {dtype}, {options}")
    with jax.enable_x64(dtype == "float64"):
        given = make(seed, examples, dtype)
        loss = loss_of(CASES[name], **options)
        got = jax.jit(jax.value_and_grad(loss, ARGUMENTS))(*given)
    assert_as_near_as_rounding_allows(got, given, oracle(name, given))


def test_bfloat16_gradients_are_summed_in_float32():
    """Many of them, each of which is little beside their sum."""
    k, name = 256, "InfoNCE"
    given, unit = make(0, k, "bfloat16"), float(jnp.finfo("bfloat16").eps) / 2
    wanted = oracle(name, given)
    exact, terms = (part[1][0] for part in (wanted.exact, wanted.terms))

    def errors(dtype):
        loss = loss_of(CASES[name], num_microbatches=k, accumulator_dtype=dtype)
        grads = jax.jit(jax.grad(loss))(*given)
        return {
            leaf: norm(np.asarray(g).astype(np.float64) - exact[leaf])
            for leaf, g in grads.items()
        }

    wide, narrow = errors(None), errors("bfloat16")
    for leaf, error in wide.items():
        # The sum is rounded once. So is each gradient, some up and some down.
        assert error <= unit * (norm(exact[leaf]) + terms[leaf] / k**0.5)
    assert norm([*narrow.values()]) > 4 * norm([*wide.values()])


# --- From here on in float64, where nothing but a mistake shows ---


def in_float64(test):
    return pytest.mark.usefixtures("float64")(test)


def assert_equal(got, wanted):
    chex.assert_trees_all_equal_shapes_and_dtypes(got, wanted)
    chex.assert_trees_all_close(got, wanted, rtol=1e-12, atol=1e-13)


def differentiated(loss, *args, argnums=None):
    argnums = tuple(range(len(args))) if argnums is None else argnums
    return jax.jit(jax.value_and_grad(loss, argnums))(*args)


def differ(got, wanted):
    return max(
        norm(g - w) / norm(w)
        for g, w in zip(*map(jax.tree.leaves, (got, wanted)), strict=True)
    )


SIZES = pytest.mark.parametrize(
    "size",
    [slow({"num_microbatches": 4}), {"microbatch_size": 5}],
    ids=["dividing", "ragged"],
)


@in_float64
def test_no_accumulation_of_contrastive_losses_is_that_of_the_whole_batch():
    given = make(0, 12, "float64")
    case = CASES["InfoNCE"]
    value, grads = differentiated(loss_of(case), *given)
    halves = loss_of(case, num_microbatches=2)
    assert_equal(differentiated(halves, *given), (value, grads))
    # The negatives are then those of a micro-batch.
    accumulated = oa.value_and_grad(
        loss_of(case), num_microbatches=2, batch_argnums=(2, 3)
    )
    other, other_grads = jax.jit(accumulated)(*given)
    assert abs(other - value) > 0.1 * abs(value)
    assert differ(other_grads, grads[0]) > 0.1


@in_float64
@SIZES
@pytest.mark.parametrize("name", ["InfoNCE", "MoE"])
def test_several_updates_give_the_parameters_of_the_whole_batch(name, size):
    optimizer = promoting(optax.adamw(0.05, weight_decay=0.1))
    batches = [make(seed, 12, "float64")[2:] for seed in range(5)]

    def trained(loss):
        @jax.jit
        def step(variables, state, x, y):
            grads = jax.grad(lambda v: loss(*v, x, y))(variables)
            updates, state = optimizer.update(grads, state, variables)
            return optax.apply_updates(variables, updates), state

        variables = make(0, 1, "float64")[:2]
        state = optimizer.init(variables)
        for batch in batches:
            variables, state = step(variables, state, *batch)
        return variables, state

    before = make(0, 1, "float64")[:2]
    wanted = trained(loss_of(CASES[name]))
    assert_equal(trained(loss_of(CASES[name], **size)), wanted)
    assert differ(wanted[0], before) > 0.01


@in_float64
@SIZES
@pytest.mark.parametrize("towers", ["separate", "shared"])
def test_each_tower_may_run_in_micro_batches_of_its_own(towers, size):
    first, temperature, x, y = make(0, 12, "float64")
    second = make(1, 1, "float64")[0]

    def loss(encoders, first, second, temperature, x, y):
        other = first if towers == "shared" else second
        outputs = encoders[0](first, x), encoders[1](other, y)
        return info_nce(outputs, temperature, x, y)

    given = first, second, temperature, x, y
    wanted = differentiated(functools.partial(loss, (encode, encode)), *given)
    # They need not be split alike.
    encoders = oa.microbatch(encode, **size), oa.microbatch(encode, num_microbatches=3)
    assert_equal(differentiated(functools.partial(loss, encoders), *given), wanted)


@in_float64
@SIZES
def test_parameters_may_be_closed_over(size):
    params, temperature, x, y = make(0, 12, "float64")

    def loss(params, temperature, x, y, *, size):
        scaled = jax.tree.map(lambda p: p * temperature, params)

        def encoder(x, y):
            # What is differentiated, and what is made of it.
            return encode(params, x), encode(scaled, y)

        if size:
            encoder = oa.microbatch(encoder, batch_argnums=(0, 1), **size)
        return info_nce(encoder(x, y), temperature, x, y)

    given = params, temperature, x, y
    wanted = differentiated(functools.partial(loss, size=None), *given)
    assert_equal(differentiated(functools.partial(loss, size=size), *given), wanted)


@in_float64
@SIZES
def test_complex_parameters_have_the_gradient_of_the_whole_batch(size):
    random = np.random.default_rng(0)
    parts = random.normal(size=(2, FEATURES, OUT))
    w = jnp.asarray(parts[0] + 1j * parts[1])
    x = jnp.asarray(random.normal(size=(12, FEATURES)))

    def fun(w, x):
        z = jnp.tanh(x.astype(w.dtype) @ w)
        return z * jax.lax.complex(jnp.cos(z.real), jnp.sin(z.real))

    def loss(fun, w, x):
        z = fun(w, x)
        return -jnp.mean(jnp.diag(jax.nn.log_softmax(jnp.real(z @ z.conj().T))))

    wanted = differentiated(functools.partial(loss, fun), w, x)
    ours = functools.partial(loss, oa.microbatch(fun, **size))
    assert_equal(differentiated(ours, w, x), wanted)


def parts_of(size, examples):
    """Which examples make which micro-batch, as documented: strided, or contiguous."""
    index = np.arange(examples)
    if "num_microbatches" in size:
        k = size["num_microbatches"]
        return [index[i::k] for i in range(k)]
    return np.split(index, range(0, examples, size["microbatch_size"])[1:])


def joined(outputs, parts):
    """What the micro-batches gave, in the order of the batch."""
    return jnp.concatenate(outputs)[np.argsort(np.concatenate(parts))]


@in_float64
@pytest.mark.parametrize(
    "size", [{"num_microbatches": 4}, {"microbatch_size": 8}], ids=str
)
def test_each_output_has_a_policy_of_its_own(size):
    """Each of them is what it is by hand, and so is its part of the gradient."""
    params, temperature, x, y = make(0, 12, "float64")
    # With a remainder of four, the last micro-batch counts for little or for nothing.
    weights = np.array([3.0, 0.5, 0, 1] * 2 + [0.5, 1, 0, 0])

    def fun(params, x, weights):
        z = encode(params, x)
        total = (weights[:, None] * z).sum(0)
        mean = total / jnp.where(weights.sum() > 0, weights.sum(), 1)
        return {
            "all": z,
            "ends": [z[0], jnp.cos(z).mean(0)],
            "sum": z.sum(0) ** 2,
            "mean": mean**2,
        }

    def weight(params, x, weights):
        del params, x
        return weights.sum()

    policies = {"all": "concat", "ends": ["last", "stack"]}
    in_parts = oa.microbatch(
        fun,
        batch_argnums=(1, 2),
        outputs=policies | {"sum": "sum", "mean": "mean"},
        weight=weight,
        **size,
    )

    def by_hand(params, x, weights):
        parts = parts_of(size, 12)
        ran = [fun(params, x[part], weights[part]) for part in parts]
        ws = [jax.lax.stop_gradient(weights[part].sum()) for part in parts]
        # Those of weight 0 are no part of sums and means.
        pairs = [(w, jnp.where(w > 0, 1.0, 0), r) for w, r in zip(ws, ran, strict=True)]
        total = jnp.where(sum(ws) > 0, sum(ws), 1)
        return {
            "all": joined([r["all"] for r in ran], parts),
            "ends": [ran[-1]["ends"][0], jnp.stack([r["ends"][1] for r in ran])],
            "sum": sum(counts * r["sum"] for _, counts, r in pairs),
            "mean": sum(w * r["mean"] for w, _, r in pairs) / total,
        }

    def loss(run, params, temperature, x, weights):
        outputs = run(params, x, weights)
        last, stacked = outputs["ends"]
        logits = outputs["all"] @ stacked.T * temperature
        value = (
            jnp.mean(jax.nn.logsumexp(logits, 1) * y[:, 0])
            + jnp.sin(last * outputs["sum"]).sum()
            + jnp.cos(outputs["mean"] * stacked[0]).sum()
        )
        return value, outputs

    def differentiated_with(run):
        function = functools.partial(loss, run)
        return jax.jit(jax.value_and_grad(function, ARGUMENTS, has_aux=True))

    ours, wanted = map(differentiated_with, (in_parts, by_hand))
    for w in (weights, weights[::-1].copy(), np.zeros(12)):
        given = params, temperature, x, jnp.asarray(w)
        assert_equal(ours(*given), wanted(*given))


@in_float64
@SIZES
def test_load_is_balanced_over_the_whole_batch(size):
    """N Σ f_e P_e over the tokens that are no padding, of which some have few."""
    params, _, x, _ = make(0, 16, "float64")
    is_token = jnp.arange(16) % 7 > jnp.arange(16) % 3

    def router(params, x, is_token):
        probabilities = jax.nn.softmax(encode(params, x))
        chosen = jax.nn.one_hot(jnp.argmax(probabilities, -1), OUT, dtype=jnp.int32)
        count = jnp.maximum(is_token.sum(), 1).astype(x.dtype)
        valid = jnp.where(is_token[:, None], probabilities, 0)
        return valid.sum(0) / count, jnp.where(is_token[:, None], chosen, 0).sum(0)

    def tokens(params, x, is_token):
        del params, x
        return is_token.sum()

    in_parts = oa.microbatch(
        router, batch_argnums=(1, 2), outputs=("mean", "sum"), weight=tokens, **size
    )

    def balance(router, params, x, is_token):
        mean, counts = router(params, x, is_token)
        return OUT * (counts / counts.sum() * mean).sum(), counts

    def run(router):
        function = functools.partial(balance, router)
        grad = jax.value_and_grad(function, (0, 1), has_aux=True)
        return jax.jit(grad)(params, x, is_token)

    wanted = run(router)
    assert_equal(run(in_parts), wanted)
    # The mean of the micro-batches' own balances is another number.
    alone = jax.jit(functools.partial(balance, router))
    each = [alone(params, x[part], is_token[part])[0] for part in parts_of(size, 16)]
    assert abs(np.mean(each) - wanted[0][0]) > 0.01


@in_float64
@SIZES
def test_a_carry_goes_from_micro_batch_to_micro_batch(size):
    """BatchNorm's running mean, with which each micro-batch is normalised."""
    params, temperature, x, y = make(0, 12, "float64")

    def fun(params, x, mean):
        h = encode(params, x)
        return jnp.tanh(h - mean), 0.9 * mean + 0.1 * h.mean(0, keepdims=True)

    def by_hand(params, x, mean):
        outputs, parts = [], parts_of(size, 12)
        for part in parts:
            z, mean = fun(params, x[part], jax.lax.stop_gradient(mean))
            outputs.append(z)
        return joined(outputs, parts), jax.lax.stop_gradient(mean)

    def loss(run, params, x, mean):
        z, mean = run(params, x, mean)
        # A constant to derivatives, in what comes after as well.
        return info_nce((z, jnp.roll(z * mean, 1, 0)), temperature, x, y), mean

    def run(function):
        loss_and_mean = jax.value_and_grad(
            functools.partial(loss, function), (0, 1), has_aux=True
        )
        return jax.jit(loss_and_mean)(params, x, jnp.ones((1, OUT)))

    in_parts = oa.microbatch(fun, carry_argnum=2, **size)
    assert_equal(run(in_parts), run(by_hand))
