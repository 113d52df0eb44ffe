"""In the company of Optax, JAX's transformations, devices and checkpoints."""

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_accum as oa
from tests.support.training import (
    PARAMS,
    SGD,
    WAYS,
    alone,
    feed,
    micro_batches,
    promoting,
    stepper,
    weighted_mean,
)

ADAM = promoting(optax.adam(0.1))
K = 3
GRADS, WEIGHTS = micro_batches(PARAMS, 2 * K)
BATCHES = [(g, {"weight": w}) for g, w in zip(GRADS, WEIGHTS, strict=True)]
MEANS = [
    weighted_mean(GRADS[i : i + K], WEIGHTS[i : i + K]) for i in range(0, 2 * K, K)
]
EXPECTED, _ = alone(ADAM, *MEANS)


class TestOptax:
    def test_clipping_inside_sees_the_gradient_of_the_window(self):
        inner = promoting(optax.chain(optax.clip_by_global_norm(0.1), optax.adam(0.1)))
        params, _ = feed(oa.accumulate(inner, K), BATCHES)
        chex.assert_trees_all_close(params, alone(inner, *MEANS)[0], rtol=1e-6)

    def test_what_follows_in_a_chain_sees_the_updates(self):
        tx = optax.chain(oa.accumulate(ADAM, K), optax.scale(0.5))
        params, _ = feed(tx, BATCHES, "update")
        expected, _ = alone(optax.chain(ADAM, optax.scale(0.5)), *MEANS)
        chex.assert_trees_all_close(params, expected, rtol=1e-6)

    def test_weight_boundary_and_value_pass_through_a_chain(self):
        """Weight, boundary and value, through `chain` and through `masked`."""
        tx = optax.chain(
            optax.identity(),
            optax.masked(oa.accumulate(ADAM), {"w": True, "b": True}),
        )
        batches = [
            (g, {**kwargs, "value": jnp.float32(1), "boundary": i % K == K - 1})
            for i, (g, kwargs) in enumerate(BATCHES)
        ]
        params, state = feed(tx, batches, "update")
        chex.assert_trees_all_close(params, EXPECTED, rtol=1e-6)
        assert oa.gradient_step(state) == 2

    def test_groups_of_parameters_have_windows_of_their_own(self):
        tx = optax.partition(
            {"often": oa.accumulate(SGD, 1), "rarely": oa.accumulate(SGD, 2 * K)},
            {"w": "often", "b": "rarely"},
        )
        params, _ = feed(tx, BATCHES, "update")
        often = sum(g["w"] for g in GRADS)
        np.testing.assert_allclose(params["w"], PARAMS["w"] - 0.1 * often, rtol=1e-5)
        rarely = weighted_mean(GRADS, WEIGHTS)["b"]
        np.testing.assert_allclose(params["b"], PARAMS["b"] - 0.1 * rarely, rtol=1e-5)

    def test_frozen_parameters_get_no_accumulator(self):
        tx = optax.masked(oa.accumulate(ADAM, K), {"w": True, "b": False})
        state = tx.init(PARAMS)
        accumulators = jax.tree.leaves(state.inner_state.window.grads)
        assert [a.shape for a in accumulators] == [PARAMS["w"].shape]

    @pytest.mark.parametrize("way", WAYS)
    def test_injected_hyperparameters_move_once_per_update(self, way):
        inner = promoting(
            optax.inject_hyperparams(optax.adam)(optax.linear_schedule(0.1, 0.0, 4))
        )
        params, state = feed(oa.accumulate(inner, K), BATCHES, way)
        assert state.inner_state.count == 2
        chex.assert_trees_all_close(params, alone(inner, *MEANS)[0], rtol=1e-6)

    def test_nested_accumulation_is_a_mean_of_means(self):
        """Means of means: of equal weights the mean of all."""
        tx = oa.accumulate(oa.accumulate(ADAM, 2), K)
        params, state = feed(tx, [(g, {}) for g in GRADS])
        expected, _ = alone(ADAM, weighted_mean(GRADS, [1] * 2 * K))
        chex.assert_trees_all_close(params, expected, rtol=1e-6)
        assert state.inner_state.gradient_step == 1


class TestTransformations(chex.TestCase):
    @chex.variants(
        with_jit=True, without_jit=True, with_device=True, without_device=True
    )
    def test_update_runs_with_and_without_jit(self):
        tx = oa.accumulate(SGD, K)
        update = self.variant(tx.update)
        params, state = PARAMS, tx.init(PARAMS)
        for g, kwargs in BATCHES:
            updates, state = update(g, state, params, **kwargs)
            params = optax.apply_updates(params, updates)
        chex.assert_trees_all_close(params, alone(SGD, *MEANS)[0], rtol=1e-6)


@pytest.mark.parametrize("way", WAYS)
def test_windows_close_inside_a_scan(way):
    tx = oa.accumulate(ADAM, K, skip=oa.skip_not_finite)
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *GRADS)

    def body(carry, batch):
        params, state = carry
        grads, weight = batch
        carry = stepper(tx, way)(params, state, grads, weight=weight, value=weight)
        return carry, oa.has_updated(carry[1])

    start = (PARAMS, tx.init(PARAMS))
    (params, _), updated = jax.jit(lambda *args: jax.lax.scan(body, start, args))(
        stacked, jnp.stack(WEIGHTS)
    )
    chex.assert_trees_all_close(params, EXPECTED, rtol=1e-6)
    assert updated.tolist() == [False, False, True] * 2


@pytest.mark.parametrize("way", WAYS)
def test_models_under_vmap_close_their_windows_at_different_times(way):
    """Several models at once, their windows closing at different times."""
    tx = oa.accumulate(ADAM)
    models = [jax.tree.map(lambda p, s=s: p * s, PARAMS) for s in (1.0, 2.0)]
    params = jax.tree.map(lambda *x: jnp.stack(x), *models)
    state = jax.vmap(tx.init)(params)

    def step(params, state, boundary, grads, weight):
        return stepper(tx, way)(params, state, grads, weight=weight, boundary=boundary)

    step = jax.jit(jax.vmap(step, in_axes=(0, 0, 0, None, None)))
    ends = jnp.array([[0, 0, 1, 0, 0, 1], [0, 1, 0, 0, 0, 1]], bool)
    for i, (g, kwargs) in enumerate(BATCHES):
        params, state = step(params, state, ends[:, i], g, kwargs["weight"])
    uneven = [weighted_mean(GRADS[p], WEIGHTS[p]) for p in (slice(2), slice(2, 6))]
    expected = [
        alone(ADAM, *MEANS, params=models[0])[0],
        alone(ADAM, *uneven, params=models[1])[0],
    ]
    expected = jax.tree.map(lambda *x: jnp.stack(x), *expected)
    chex.assert_trees_all_close(params, expected, rtol=1e-5)


@pytest.mark.parametrize("stop", range(2 * K))
def test_a_restored_run_ends_with_the_same_bits_in_the_same_program(stop):
    """Bit for bit the uninterrupted run, in the program that is already compiled."""
    tx = oa.accumulate(ADAM, K, skip=oa.skip_not_finite)
    chex.clear_trace_counter()
    step = jax.jit(chex.assert_max_traces(stepper(tx), n=1))
    straight = resumed = (PARAMS, tx.init(PARAMS))
    for i, (g, kwargs) in enumerate(BATCHES):
        straight = step(*straight, g, value=jnp.float32(i), **kwargs)
        resumed = step(*resumed, g, value=jnp.float32(i), **kwargs)
        if i == stop:
            saved = flax.serialization.to_bytes(resumed)
            blank = jax.tree.map(jnp.zeros_like, (PARAMS, tx.init(PARAMS)))
            resumed = flax.serialization.from_bytes(blank, saved)
    chex.assert_trees_all_equal(resumed, straight)


@pytest.mark.parametrize("way", WAYS)
def test_lookahead_is_synchronized_by_updates(way):
    """Its gradients are those of the fast parameters alone."""
    inner = promoting(optax.lookahead(optax.adam(0.1), 2, slow_step_size=0.5))
    params = optax.LookaheadParams.init_synced(PARAMS)
    grads, weights = micro_batches(PARAMS, 9)
    windows = [slice(i, i + 3) for i in (0, 3, 6)]
    means = [weighted_mean(grads[w], weights[w]) for w in windows]
    expected, _ = alone(inner, *means, params=params)
    pairs = zip(grads, weights, strict=True)
    batches = [(g, {"weight": w}) for g, w in pairs]
    got, _ = feed(oa.accumulate(inner, every_k=3), batches, way, params=params)
    chex.assert_trees_all_close(got, expected, rtol=1e-5)
