"""k micro-batches give the update of the global batch, for any Optax optimizer."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import optax_accum as oa
from tests.support import catalogue
from tests.support.training import (
    WAYS,
    differentiated,
    micro_batches,
    promoting,
    slow,
    stepper,
    weighted_mean,
)

K, WINDOWS = 3, 3
TRANSFORMATIONS = catalogue.transformations()

pytestmark = [
    pytest.mark.core,
    pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning"),
]


def loss(params):
    return sum(jnp.sum(jnp.sin(x) ** 2) for x in jax.tree.leaves(params))


# What runs with pullbacks usually: what takes gradients in other ways than the rest.
WITH_PULLBACKS = (
    "optax.adafactor",
    "optax.adamw",
    "optax.lbfgs",
    "optax.novograd",
    "optax.polyak_sgd",
    "optax.sgd",
    "optax.contrib.muon",
)


def has_gradient(params, grads):
    """A loss whose gradient is `grads`, wherever it is taken."""
    return optax.tree.vdot(params, grads)


def slow_parts(names):
    """What is no optimizer of Optax's own is slow: their parts, what is contributed.

    Most are slow with pullbacks: once a window is full, nothing knows how it was.
    """
    usual = {name for name in catalogue.optimizers() if ".contrib." not in name}
    usual |= {"optax.contrib.muon", "optax.clip_by_global_norm"}
    cases = []
    for takes, few in (("gradients", usual), ("pullbacks", WITH_PULLBACKS)):
        marks = {name: () if name in few else pytest.mark.slow for name in names}
        cases += [pytest.param(n, takes, marks=marks[n]) for n in names]
    return cases


@pytest.mark.parametrize(("name", "takes"), slow_parts(TRANSFORMATIONS))
def test_any_transformation_updates_as_with_the_global_batch(name, takes):
    """Three windows of uneven weights against the weighted mean gradients."""
    inner = promoting(TRANSFORMATIONS[name]())
    tx = oa.accumulate(inner, every_k=K)
    params = catalogue.example_params()
    grads, weights = micro_batches(params, K * WINDOWS)
    values = [jnp.float32(3.0 - 0.2 * i) for i in range(K * WINDOWS)]

    def extra(grads, value):
        return catalogue.extra_args(name, loss, params, grads, value)

    @jax.jit
    def global_step(params, state, grads, value):
        updates, state = inner.update(grads, state, params, **extra(grads, value))
        return optax.apply_updates(params, updates), state

    @jax.jit
    def micro_step(params, state, grads, weight, value):
        _, grads = differentiated(takes, has_gradient, params, grads)
        step = stepper(tx, "update")
        return step(params, state, grads, weight=weight, **extra(grads, value))

    expected, inner_state = params, inner.init(params)
    state = tx.init(params)
    for start in range(0, K * WINDOWS, K):
        window = slice(start, start + K)
        mean = weighted_mean(grads[window], weights[window])
        mean_value = weighted_mean(values[window], weights[window])
        expected, inner_state = global_step(expected, inner_state, mean, mean_value)
        for g, w, v in zip(grads[window], weights[window], values[window], strict=True):
            params, state = micro_step(params, state, g, w, v)
    # Float32, but for what takes the sign of a difference or divides by a small one.
    chex.assert_trees_all_close(params, expected, rtol=2e-5, atol=2e-6)
    chex.assert_trees_all_equal_dtypes(state.inner_state, inner_state)
    assert oa.gradient_step(state) == WINDOWS


def test_introspection_finds_every_optimizer_of_optax():
    """Introspection finds what a reader of Optax's documentation would name."""
    assert len(catalogue.optimizers()) >= 40
    for name in ("optax.sgd", "optax.adamw", "optax.lbfgs", "optax.contrib.muon"):
        assert name in catalogue.optimizers()
    assert set(catalogue.optimizers()) <= set(TRANSFORMATIONS)


@pytest.mark.slow
@pytest.mark.parametrize("name", catalogue.optimizers())
def test_update_params_equals_update(name):
    tx = oa.accumulate(promoting(TRANSFORMATIONS[name]()), every_k=2)
    params = catalogue.example_params()
    grads, weights = micro_batches(params, 4)
    results = []
    for way in WAYS:
        step = jax.jit(
            lambda p, s, g, w, way=way: stepper(tx, way)(
                p, s, g, weight=w, **catalogue.extra_args(name, loss, p, g, w)
            )
        )
        p, state = params, tx.init(params)
        for g, w in zip(grads, weights, strict=True):
            p, state = step(p, state, g, w)
        results.append(p)
    chex.assert_trees_all_close(*results, rtol=1e-6, atol=1e-7)


SHARING = ("prodigy", "dog", "dowg", "cocob", "mechanize")


@pytest.mark.parametrize("init", ["eager", "compiled"])
@pytest.mark.parametrize(
    "name",
    [
        name
        if name == "optax.lbfgs" or name.removeprefix("optax.contrib.") in SHARING
        else slow(name)
        for name in TRANSFORMATIONS
    ],
)
def test_the_first_state_can_be_donated_with_the_parameters(name, init):
    """It holds no buffer of theirs, and none twice, as some optimizers' states do."""
    tx = oa.accumulate(promoting(TRANSFORMATIONS[name]()), every_k=2)
    params = catalogue.example_params()
    state = (tx.init if init == "eager" else jax.jit(tx.init))(params)
    arrays = [x for x in jax.tree.leaves((params, state)) if isinstance(x, jax.Array)]
    buffers = [x.unsafe_buffer_pointer() for x in arrays if _is_number(x)]
    assert len(buffers) == len(set(buffers))


def _is_number(x):
    """Whether `x` is no random key, which has no buffer to point to."""
    return not jnp.issubdtype(x.dtype, jax.dtypes.prng_key) and x.size
