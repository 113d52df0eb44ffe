"""`oa.value_and_grad` on batches, trees, dtypes and weights that nobody thought of.

The model is linear under a tanh, one number per example:

    f_j = tanh(Σ_leaf <p_leaf, x_j,leaf>)

so that float64 NumPy can tell the gradient in closed form.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import optax_accum as oa

pytestmark = pytest.mark.core

shapes = st.lists(st.integers(1, 3), max_size=2).map(tuple)
trees = st.recursive(
    st.tuples(shapes, st.sampled_from(["float32", "bfloat16"])).map(
        lambda leaf: jax.ShapeDtypeStruct(*leaf)
    ),
    lambda children: (
        st.lists(children, min_size=1, max_size=3)
        | st.dictionaries(st.sampled_from("abc"), children, min_size=1, max_size=3)
    ),
    max_leaves=4,
)


@st.composite
def problems(draw):
    """Shapes of the parameters, a seed, the number of examples, how they run."""
    examples = draw(st.integers(1, 13))
    if draw(st.booleans()):
        size = {"microbatch_size": draw(st.integers(1, examples))}
    else:
        divisors = [n for n in range(1, examples + 1) if examples % n == 0]
        size = {"num_microbatches": draw(st.sampled_from(divisors))}
    # Added in place, where that is possible, and after.
    options = size | {"in_place": draw(st.sampled_from([None, False]))}
    return draw(trees), draw(st.integers(0, 2**16)), examples, options


def make(tree, seed, examples, axis=0):
    """Parameters, and a batch built like them with its examples along `axis`."""
    random = np.random.default_rng(seed)
    # Numbers of few bits, so that bfloat16 holds them exactly.
    leaves, structure = jax.tree.flatten(tree)
    params = [random.integers(-4, 5, x.shape) / 8 for x in leaves]
    batch = [random.integers(-4, 5, (examples, *x.shape)) / 8 for x in leaves]
    cast = [jnp.asarray(p, x.dtype) for p, x in zip(params, leaves, strict=True)]
    arrays = [np.moveaxis(x, 0, axis).astype(np.float32) for x in batch]
    return params, batch, *(jax.tree.unflatten(structure, t) for t in (cast, arrays))


def outputs(params, batch, axis=0):
    """f, one number per example."""

    def product(p, x):
        x = jnp.moveaxis(x, axis, 0)
        return (x * p.astype(jnp.float32)[None]).reshape(len(x), -1).sum(1)

    return jnp.tanh(sum(jax.tree.leaves(jax.tree.map(product, params, batch))))


def oracle(params, batch, weights, divisor):
    """Value and gradients of Σ_j weights_j·f_j / divisor, in float64 NumPy.

    With every gradient comes the sum of its terms' absolute values: a result may be
    wrong by as much as that times the rounding of its dtype.
    """
    sums = [
        (x * p[None]).reshape(len(x), -1).sum(1)
        for p, x in zip(params, batch, strict=True)
    ]
    f = np.tanh(sum(sums))
    factor = weights * (1 - f**2) / divisor
    grads = [
        (np.tensordot(factor, x, 1), np.tensordot(factor, abs(x), 1)) for x in batch
    ]
    return (weights * f).sum() / divisor, grads


def assert_close(got, wanted, params):
    value, grads = got
    np.testing.assert_allclose(value, wanted[0], rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_equal_structs(grads, params)
    leaves = zip(
        jax.tree.leaves(grads), wanted[1], jax.tree.leaves(params), strict=True
    )
    for g, (exact, terms), p in leaves:
        assert (g.shape, g.dtype) == (p.shape, p.dtype)
        # A bfloat16 gradient is rounded in each micro-batch and once at the end.
        roundings = 1 if g.dtype == jnp.bfloat16 else 16
        error = abs(np.asarray(g, np.float64) - exact)
        assert (error <= roundings * float(jnp.finfo(g.dtype).eps) * terms + 1e-7).all()


@given(problems(), st.sampled_from(["mean", "ratio", "sum"]), st.sampled_from([0, -1]))
def test_any_batch_in_any_parts_equals_the_whole_batch(problem, reduction, axis):
    tree, seed, examples, options = problem
    numpy_params, numpy_batch, params, batch = make(tree, seed, examples, axis)
    reduce = jnp.mean if reduction == "mean" else jnp.sum

    def fun(params, batch):
        f = outputs(params, batch, axis)
        return reduce(f), f

    f = oa.value_and_grad(
        fun,
        has_aux=True,
        aux="concat",
        batch_axis=axis,
        reduction=reduction,
        return_info=True,
        **options,
    )
    ((value, joined), grads), info = jax.jit(f)(params, batch)
    divisor = 1 if reduction == "sum" else examples
    wanted = oracle(numpy_params, numpy_batch, np.ones(examples), divisor)
    assert_close((value, grads), wanted, params)
    assert info == oa.MicrobatchInfo(examples, 0)
    each = [oracle(numpy_params, numpy_batch, w, 1)[0] for w in np.eye(examples)]
    np.testing.assert_allclose(joined, each, rtol=1e-5, atol=1e-6)


@given(problems(), st.sampled_from(["mean", "ratio"]), st.data())
def test_any_weights_give_the_weighted_mean(problem, reduction, data):
    """Masked means: zero weights, all zero, and NaN where nothing is valid."""
    tree, seed, examples, options = problem
    numpy_params, numpy_batch, params, batch = make(tree, seed, examples)
    weight = st.sampled_from([0.0, 0.0, 0.5, 1.0, 3.0])
    weights = np.array(
        data.draw(st.lists(weight, min_size=examples, max_size=examples))
    )

    def fun(params, batch, weights):
        total = (weights * outputs(params, batch)).sum()
        return total / weights.sum() if reduction == "mean" else total

    def count(params, batch, weights):
        del params, batch
        return weights.sum()

    f = oa.value_and_grad(
        fun, batch_argnums=(1, 2), reduction=reduction, weight=count, **options
    )
    got = jax.jit(f)(params, batch, weights.astype(np.float32))
    total = weights.sum()
    assert_close(got, oracle(numpy_params, numpy_batch, weights, total or 1), params)


@given(problems(), st.data())
def test_any_bad_example_is_left_out_with_its_micro_batch(problem, data):
    """`skip` leaves out the micro-batches with a NaN, and counts them."""
    tree, seed, examples, options = problem
    numpy_params, numpy_batch, params, batch = make(tree, seed, examples)
    bad = np.array(
        data.draw(st.lists(st.booleans(), min_size=examples, max_size=examples))
    )

    def poisoned(params, batch, bad):
        nan = jnp.where(bad.any(), jnp.nan, 0.0)
        first = jax.tree.leaves(params)[0].astype(jnp.float32)
        return jnp.mean(outputs(params, batch)) + nan * first.sum()

    f = oa.value_and_grad(
        poisoned,
        batch_argnums=(1, 2),
        skip=oa.skip_not_finite,
        return_info=True,
        **options,
    )
    got, info = jax.jit(f)(params, batch, bad)
    # Which examples share a micro-batch is documented: strided, or contiguous.
    m = options.get("microbatch_size") or examples // options["num_microbatches"]
    whole, tail = divmod(examples, m)
    index = np.arange(examples)
    part = index // m if tail else index % whole
    kept = ~np.isin(part, part[bad])
    assert info == oa.MicrobatchInfo(int(kept.sum()), len(np.unique(part[bad])))
    wanted = oracle(numpy_params, numpy_batch, kept.astype(float), kept.sum() or 1)
    assert_close(got, wanted, params)
