"""What docs/numerics.md says about rounding."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_accum as oa
from tests.support.training import ADAM, PARAMS, feed, micro_batches, slow

U32, U16 = 2.0**-24, 2.0**-9  # the error of one rounding, in float32 and bfloat16
K = 1024


def remember(dtype=jnp.float32):
    """An optimizer whose state is what it was given."""

    def init(params):
        return params.astype(dtype)

    def update(updates, state, params=None):
        del params
        return updates, updates.astype(state.dtype)

    return optax.GradientTransformation(init, update)


def last_state(tx, grads):
    """The state after one micro-step for each row of `grads`."""
    params = jnp.zeros_like(grads[0])

    def micro_step(state, g):
        return tx.update(g, state, params)[1], None

    return jax.jit(lambda *start: jax.lax.scan(micro_step, *start)[0])(
        tx.init(params), grads
    )


def given(grads, **options):
    """What the optimizer is given at the end of a window over the rows of `grads`."""
    tx = oa.accumulate(remember(), len(grads), **options)
    return last_state(tx, grads).inner_state


def multi_steps(grads, **options):
    with jax.numpy_dtype_promotion("standard"):
        tx = optax.MultiSteps(remember(), len(grads), **options)
        return last_state(tx, grads).inner_opt_state


def in_step(grads, **options):
    """The gradient of a loss whose gradient on one example is that example."""

    def loss(params, batch):
        return jnp.mean(batch @ params)

    gradient = oa.grad(loss, microbatch_size=1, **options)
    return jax.jit(gradient)(jnp.zeros_like(grads[0]), grads)


def normal(mean, k=K, dtype=jnp.float32):
    """Gradients of 256 elements around `mean`; around 0 they cancel."""
    noise = np.random.default_rng(0).normal(mean, size=(k, 256))
    return jnp.asarray(noise.astype(np.float32), dtype)


def error(result, grads):
    """Of the mean in `result`, relative to that in float64, in the 2-norm."""
    exact = np.asarray(grads, np.float64).mean(0)
    difference = np.asarray(result, np.float64) - exact
    return np.linalg.norm(difference) / np.linalg.norm(exact)


@pytest.mark.parametrize("way", [given, in_step])
@pytest.mark.parametrize(("dtype", "sum_of_ones"), [(None, 4096), (jnp.bfloat16, 256)])
def test_sums_of_ones_stall_at_256_in_bfloat16_and_not_in_float32(
    way, dtype, sum_of_ones
):
    ones = jnp.ones((4096, 2), jnp.bfloat16)
    total = way(ones, accumulator_dtype=dtype, reduction="sum")
    # In one step the loss is the example's, and so is the sum.
    np.testing.assert_array_equal(np.asarray(total, np.float64), sum_of_ones)


@pytest.mark.parametrize("way", [given, in_step, multi_steps])
@pytest.mark.parametrize("mean", [0, 1])
def test_float32_sums_err_by_less_than_root_k_roundings(way, mean):
    grads = normal(mean)
    assert 0 < error(way(grads), grads) < K**0.5 * U32


@pytest.mark.usefixtures("float64")
def test_float64_sums_of_float32_gradients_err_by_less_than_1e_15():
    grads = normal(1)
    tx = oa.accumulate(remember(jnp.float64), K, accumulator_dtype=jnp.float64)
    assert error(last_state(tx, grads).inner_state, grads) < 1e-15


class TestBfloat16Gradients:
    grads = normal(1, dtype=jnp.bfloat16)

    def test_the_inner_optimizer_sees_the_float32_mean_of_bfloat16_gradients(self):
        assert error(given(self.grads), self.grads) < K**0.5 * U32

    @pytest.mark.parametrize("way", [in_step, multi_steps])
    def test_oa_grad_and_multi_steps_round_the_mean_to_bfloat16(self, way):
        assert U16 / 4 < error(way(self.grads), self.grads) < 2 * U16


class TestBfloat16Sums:
    @pytest.mark.parametrize("mean", [0, 1])
    @pytest.mark.parametrize("k", [slow(4), slow(64), 256])
    def test_bfloat16_sums_of_up_to_256_err_by_at_most_about_root_k_roundings(
        self, k, mean
    ):
        grads = normal(mean, k)
        narrow = given(grads, accumulator_dtype=jnp.bfloat16)
        assert U16 / 2 < error(narrow, grads) < 1.5 * k**0.5 * U16

    def test_bfloat16_sums_stall_beyond_256_and_a_running_mean_does_not(self):
        grads = normal(1, 4 * K)
        narrow = given(grads, accumulator_dtype=jnp.bfloat16)
        running = multi_steps(grads, accumulator_dtype=jnp.bfloat16)
        assert error(narrow, grads) > 0.5
        assert error(running, grads) < 0.1


def test_float16_sums_overflow():
    grads = jnp.full((K, 2), 100, jnp.float16)
    np.testing.assert_array_equal(given(grads), 100)
    assert jnp.isinf(given(grads, accumulator_dtype=jnp.float16)).all()


def test_the_order_of_a_sum_changes_its_rounding():
    """Which is why no bit-identity with the global batch is promised."""
    large, small = jnp.float32([1e8]), jnp.float32([1])
    one_way = given(jnp.stack([large, small, -large]), reduction="sum")
    another = given(jnp.stack([large, -large, small]), reduction="sum")
    assert (one_way, another) == (0, 1)


def test_weights_beyond_float32_integers_cost_one_rounding():
    tx = oa.accumulate(optax.identity())
    one = jnp.ones(1)
    add = jax.jit(functools.partial(tx.update, boundary=False))
    _, state = add(one, tx.init(one), one, weight=2**24)
    _, state = add(one, state, one, weight=1)
    assert state.window.weight == 2**24
    np.testing.assert_allclose(oa.accumulated(state), 1, rtol=2 * U32)


class TestBitForBit:
    grads, weights = micro_batches(PARAMS, 3)

    def test_a_window_of_one_has_the_bits_of_the_optimizer_alone(self):
        tx = oa.accumulate(ADAM, 1)
        params, state = PARAMS, tx.init(PARAMS)
        alone, inner_state = PARAMS, ADAM.init(PARAMS)
        step = jax.jit(tx.update)
        step_alone = jax.jit(ADAM.update)
        for g in self.grads:
            updates, state = step(g, state, params)
            params = optax.apply_updates(params, updates)
            updates, inner_state = step_alone(g, inner_state, alone)
            alone = optax.apply_updates(alone, updates)
        chex.assert_trees_all_equal((params, state.inner_state), (alone, inner_state))

    @pytest.mark.parametrize("place", [0, 3])
    def test_a_micro_batch_of_weight_0_changes_no_bit(self, place):
        batches = [
            (g, {"weight": w}) for g, w in zip(self.grads, self.weights, strict=True)
        ]
        padded = list(batches)
        nothing = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), PARAMS)
        padded.insert(place, (nothing, {"weight": jnp.float32(0)}))
        without, _ = feed(oa.accumulate(ADAM, 3), batches)
        with_it, _ = feed(oa.accumulate(ADAM, 4), padded)
        chex.assert_trees_all_equal(with_it, without)
