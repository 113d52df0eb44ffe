"""Rejected micro-batches: weight 0, or as if they had never come."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import AxisType

import optax_accum as oa
from tests.support import devices
from tests.support.devices import AXIS, COUNT
from tests.support.training import (
    ADAM,
    NAN,
    PARAMS,
    SGD,
    WAYS,
    alone,
    feed,
    micro_batches,
    slow,
    stepper,
    weighted_mean,
)

GRADS, WEIGHTS = micro_batches(PARAMS, 4)
BATCHES = [(g, {"weight": w}) for g, w in zip(GRADS, WEIGHTS, strict=True)]
BAD = (NAN, {"weight": jnp.float32(7)})


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("place", [0, slow(1), 2])
@pytest.mark.parametrize("predicate", [oa.skip_not_finite, optax.skip_not_finite])
def test_on_skip_shrink_counts_a_rejected_micro_batch_with_weight_0(
    predicate, place, way
):
    batches = list(BATCHES[:2])
    batches.insert(place, BAD)
    tx = oa.accumulate(ADAM, 3, skip=predicate)
    params, state = feed(tx, batches, way)
    expected, _ = alone(ADAM, weighted_mean(GRADS[:2], WEIGHTS[:2]))
    chex.assert_trees_all_close(params, expected, rtol=1e-6)
    assert (state.micro_step, state.gradient_step, state.window.skipped) == (0, 1, 1)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("place", [0, slow(1), 2])
def test_on_skip_wait_holds_the_window_open(place, way):
    batches = list(BATCHES[:2])
    batches.insert(place, BAD)
    tx = oa.accumulate(ADAM, 3, skip=oa.skip_not_finite, on_skip="wait")
    params, state = feed(tx, batches, way)
    chex.assert_trees_all_equal(params, PARAMS)
    assert (state.micro_step, state.gradient_step, state.window.skipped) == (2, 0, 1)
    params, state = feed(tx, BATCHES[2:3], way, params, state)
    expected, _ = alone(ADAM, weighted_mean(GRADS[:3], WEIGHTS[:3]))
    chex.assert_trees_all_close(params, expected, rtol=1e-6)
    assert (state.micro_step, state.gradient_step) == (0, 1)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("on_skip", ["shrink", "wait"])
@pytest.mark.parametrize("every_k", [1, 2])
def test_a_window_of_rejected_micro_batches_updates_nothing(every_k, on_skip, way):
    tx = oa.accumulate(ADAM, every_k, skip=oa.skip_not_finite, on_skip=on_skip)
    start = tx.init(PARAMS)
    params, state = feed(tx, [BAD, BAD], way)
    chex.assert_trees_all_equal(params, PARAMS)
    chex.assert_trees_all_equal(state.inner_state, start.inner_state)
    assert (state.micro_step, state.gradient_step, state.window.skipped) == (0, 0, 2)


@pytest.mark.parametrize("on_skip", ["shrink", "wait"])
def test_has_updated_is_false_on_a_rejected_micro_step(on_skip):
    tx = oa.accumulate(SGD, 1, skip=oa.skip_not_finite, on_skip=on_skip)
    _, state = feed(tx, BATCHES[:1])
    assert oa.has_updated(state)
    _, state = feed(tx, [BAD], state=state)
    assert not oa.has_updated(state)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("on_skip", ["shrink", "wait"])
@pytest.mark.parametrize("boundary", [True, jnp.array(True)])
def test_a_boundary_of_the_caller_closes_despite_a_rejection(boundary, on_skip, way):
    """The epoch's last micro-batch is rejected; the epoch is over all the same."""
    tx = oa.accumulate(SGD, 4, skip=oa.skip_not_finite, on_skip=on_skip)
    params, state = feed(tx, BATCHES[:2], way)
    params, state = stepper(tx, way)(params, state, NAN, boundary=boundary)
    expected, _ = alone(SGD, weighted_mean(GRADS[:2], WEIGHTS[:2]))
    chex.assert_trees_all_close(params, expected, rtol=1e-6)
    assert (state.micro_step, state.gradient_step) == (0, 1)


def test_on_skip_wait_does_not_close_a_window_held_beyond_its_count():
    """A rejected micro-step never happened, so it cannot be the boundary either."""
    tx = oa.accumulate(SGD, 2, skip=oa.skip_not_finite, on_skip="wait")
    held = [(g, {"boundary": False, **w}) for g, w in BATCHES[:3]]
    _, state = feed(tx, [*held, BAD])
    assert (state.micro_step, state.gradient_step) == (3, 0)


def test_optaxs_skip_large_updates_can_be_the_skip():
    def predicate(updates, gradient_step, params):
        return optax.skip_large_updates(updates, gradient_step, params, 10.0)

    tx = oa.accumulate(SGD, 2, skip=predicate)
    state = tx.init(PARAMS)
    assert state.skip_state == {"norm_squared": 0, "should_skip": False}
    large = jax.tree.map(lambda x: 10 * jnp.ones_like(x), PARAMS)
    _, state = jax.jit(tx.update)(large, state, PARAMS)
    np.testing.assert_allclose(state.skip_state["norm_squared"], 900)
    assert state.skip_state["should_skip"]
    assert state.window.skipped == 1


def test_skip_sees_the_gradient_step_and_the_parameters():
    def predicate(updates, gradient_step, params):
        del updates
        return (gradient_step == 1) & (params["b"][0] != 0), ()

    tx = oa.accumulate(SGD, 1, skip=predicate)
    _, state = feed(tx, BATCHES)
    assert (state.gradient_step, state.window.skipped) == (1, 3)


class TestSkipNotFinite:
    @pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
    @pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.complex64])
    def test_one_value_that_is_not_finite_is_found(self, bad, dtype):
        updates = {"a": jnp.ones((3, 5), dtype), "b": jnp.ones(7, dtype).at[4].set(bad)}
        assert oa.skip_not_finite(updates)[0]
        assert optax.skip_not_finite(updates, 0, None)[0]

    @pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.float16])
    def test_a_nan_of_a_narrow_dtype_is_found(self, dtype):
        assert not oa.skip_not_finite(jnp.ones(3, dtype))[0]
        assert oa.skip_not_finite(jnp.array([1, jnp.nan], dtype))[0]

    @pytest.mark.several_devices
    @pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
    @pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
    def test_one_value_is_found_in_a_gradient_of_which_devices_have_parts(
        self, kind, bad
    ):
        """XLA's maximum over devices may lose a NaN."""
        mesh = devices.mesh(kind)
        parts = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(AXIS))
        x = jnp.full((2 * COUNT, 3), jnp.finfo(jnp.float32).max)
        skip = jax.jit(lambda x: oa.skip_not_finite(x)[0])
        assert not skip(jax.device_put(x, parts))
        assert skip(jax.device_put(x.at[3, 1].set(bad), parts))
        assert skip(jax.device_put(jnp.full_like(x, bad), parts))

    def test_a_large_complex_number_is_finite(self):
        largest = jnp.finfo(jnp.float32).max
        assert not oa.skip_not_finite(lax.complex(largest, largest))[0]

    @pytest.mark.parametrize("imaginary", [jnp.nan, jnp.inf])
    def test_an_imaginary_nan_or_infinity_is_found(self, imaginary):
        assert oa.skip_not_finite(jnp.array([1 + 2j, complex(0, imaginary)]))[0]

    def test_finite_gradients_pass(self):
        largest = jnp.finfo(jnp.float32).max
        updates = {
            "a": jnp.array([largest, -largest, 0.0]),
            "none": None,
            "empty": jnp.zeros((0, 3)),
            "integer": jnp.arange(3),
            "float0": np.zeros(3, jax.dtypes.float0),
        }
        assert not oa.skip_not_finite(updates)[0]

    def test_an_empty_tree_passes(self):
        assert not oa.skip_not_finite({})[0]
