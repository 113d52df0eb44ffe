"""What has to change with the batch: decays that look back over as many examples."""

import math

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

import optax_accum as oa
from tests.support.errors import refused
from tests.support.training import promoting

STEP_NEAR_ONE = 2.0**-24  # between 1 and the next lower number of float32
positive = st.floats(1e-3, 1e6)


def test_a_larger_batch_forgets_more_per_update():
    assert oa.rescale_decay(0.9, from_batch=32, to_batch=64) == pytest.approx(0.81)
    assert oa.rescale_decay(0.81, from_batch=64, to_batch=32) == pytest.approx(0.9)
    assert oa.rescale_decay(0.9, from_batch=32, to_batch=32) == 0.9


def test_without_an_average_there_is_none_for_any_batch():
    assert oa.rescale_decay(0, from_batch=32, to_batch=2) == 0
    schedule = oa.rescale_decay(0.0, from_batch=32, to_batch=lambda step: step + 1)
    assert schedule(jnp.int32(3)) == 0


def test_batches_may_be_fractions_and_numpy_numbers():
    rescaled = oa.rescale_decay(
        np.float32(0.25), from_batch=np.int64(2), to_batch=np.float64(0.5)
    )
    assert rescaled == 0.25**0.25
    assert isinstance(rescaled, float)


@hypothesis.given(st.floats(0.01, 0.9999), positive, positive, positive)
def test_after_as_many_tokens_as_much_is_forgotten(decay, before, after, tokens):
    rescaled = oa.rescale_decay(decay, from_batch=before, to_batch=after)
    kept_before = tokens / before * math.log(decay)
    hypothesis.assume(0 < rescaled < 1 and abs(math.log(rescaled)) > 1e-6)
    kept_after = tokens / after * math.log(rescaled)
    assert kept_after == pytest.approx(kept_before, rel=1e-8)


def test_adam_with_another_batch_has_the_second_moment_of_the_same_tokens():
    params, grads = jnp.zeros(3), jnp.array([1.0, -2.0, 0.5])

    def second_moment(batch, tokens):
        b2 = oa.rescale_decay(0.95, from_batch=4, to_batch=batch)
        adam = promoting(optax.scale_by_adam(b2=b2))
        state = adam.init(params)
        for _ in range(tokens // batch):
            _, state = adam.update(grads, state, params)
        return state.nu

    for batch in (1, 2, 8):
        np.testing.assert_allclose(
            second_moment(batch, 16), second_moment(4, 16), rtol=1e-5
        )


@pytest.mark.parametrize(
    ("decay", "from_batch"), [(0.999, 64), (0.95, 512), (0.9, 1), (0.9999, 8)]
)
def test_a_schedule_is_as_exact_as_float32_can_be(decay, from_batch):
    """To one step of float32, also near 1, where few are left."""
    batches = np.unique(np.geomspace(1, 8 * from_batch, 200).round()).astype(int)
    schedule = jax.jit(
        oa.rescale_decay(
            decay,
            from_batch=from_batch,
            to_batch=lambda step: jnp.asarray(batches)[step],
        )
    )
    for step, batch in enumerate(batches):
        got = schedule(jnp.int32(step))
        assert got.dtype == jnp.float32
        exact = decay ** (int(batch) / from_batch)
        assert float(got) == pytest.approx(exact, abs=1.01 * STEP_NEAR_ONE)


@pytest.mark.usefixtures("loose_promotion")  # Optax's schedules need it
@pytest.mark.parametrize(
    "to_batch",
    [
        lambda step: 64 * optax.piecewise_constant_schedule(2, {3: 2, 5: 2})(step),
        lambda step: 100 + step,  # an integer array
        lambda _: 96,
        lambda _: np.float64(96),
    ],
    ids=["optax", "integer", "constant", "numpy"],
)
def test_a_schedule_takes_what_the_batch_is_at_that_update(to_batch):
    schedule = oa.rescale_decay(0.95, from_batch=128, to_batch=to_batch)
    for step in range(7):
        expected = 0.95 ** (float(to_batch(jnp.int32(step))) / 128)
        got = jax.jit(schedule)(jnp.int32(step))
        assert got.dtype == jnp.float32
        assert got.shape == ()
        assert float(got) == pytest.approx(expected, rel=1e-6)


def test_a_ramp_of_windows_trains_as_its_global_batches_would():
    """Every window with its own `b2`, as if an Adam of its own made each update."""
    size, updates = 2, 5

    def ramp(step):
        return jnp.where(step < 2, 1, jnp.where(step < 4, 2, 4))

    b2 = oa.rescale_decay(0.9, from_batch=4, to_batch=lambda step: size * ramp(step))
    inner = optax.inject_hyperparams(optax.adamw)(0.1, b2=b2)
    tx = oa.accumulate(promoting(inner), every_k=ramp)
    step = jax.jit(tx.update_params)

    params = expected = jnp.array([1.0, -2.0, 3.0])
    state = tx.init(params)
    expected_state = optax.adamw(0.1).init(params)
    random = np.random.default_rng(0)
    for n in range(updates):
        k = int(ramp(n))
        window = [jnp.asarray(random.normal(size=3), jnp.float32) for _ in range(k)]
        for grads in window:
            params, state = step(grads, state, params)
        b2_of_window = 0.9 ** (size * k / 4)
        assert state.inner_state.hyperparams["b2"] == pytest.approx(b2_of_window)

        adamw = promoting(optax.adamw(0.1, b2=b2_of_window))
        mean = jnp.mean(jnp.stack(window), axis=0)
        change, expected_state = adamw.update(mean, expected_state, expected)
        expected = optax.apply_updates(expected, change)
        assert oa.gradient_step(state) == n + 1
        np.testing.assert_allclose(params, expected, rtol=1e-5)


@pytest.mark.usefixtures("loose_promotion")
@pytest.mark.parametrize("start", [0, 1e-9, 1])
def test_a_ramp_from_next_to_nothing_starts_with_an_update(start):
    tokens = optax.linear_schedule(start, 1e6, 10)
    b2 = oa.rescale_decay(0.999, from_batch=1e6, to_batch=tokens)
    adam = optax.inject_hyperparams(optax.adam)(0.01, b2=b2)
    tx = oa.accumulate(adam, oa.by_weight(tokens))
    params = jnp.zeros(2, "float32")
    grads = jnp.ones(2, "float32")
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params, weight=3)
    np.testing.assert_allclose(updates, -0.01, rtol=1e-5)


@pytest.mark.usefixtures("loose_promotion")
def test_decays_near_one_survive_parameters_in_bfloat16():
    b2 = oa.rescale_decay(0.999, from_batch=1, to_batch=lambda _: 0.5)
    adamw = optax.inject_hyperparams(optax.adamw, hyperparam_dtype=jnp.float32)
    tx = oa.accumulate(adamw(0.1, b2=b2), every_k=2)
    params = jnp.ones(3, jnp.bfloat16)
    state = tx.init(params)
    for _ in range(2):
        params, state = tx.update_params(jnp.ones_like(params), state, params)
    assert state.inner_state.hyperparams["b2"] == np.float32(0.999**0.5)
    np.testing.assert_allclose(np.float32(params), 0.9, rtol=1e-2)


@pytest.mark.parametrize("batch", [0, -32, math.nan, math.inf])
@pytest.mark.parametrize("name", ["from_batch", "to_batch"])
def test_a_batch_that_is_not_a_positive_number_is_refused(name, batch):
    batches = {"from_batch": 32, "to_batch": 32} | {name: batch}
    with refused(f"`{name}`", "positive number", f"got {batch}"):
        oa.rescale_decay(0.9, **batches)


@pytest.mark.parametrize("decay", [1, 1.5, -0.1, math.nan, "0.9", lambda _: 0.9])
def test_a_decay_that_is_not_between_0_and_1_is_refused(decay):
    with refused("`decay`", "at least 0 and less than 1", "got"):
        oa.rescale_decay(decay, from_batch=32, to_batch=64)


def test_a_batch_in_place_of_its_size_is_refused():
    with refused("`to_batch`", "or a schedule", "an array, float32[8,4]"):
        oa.rescale_decay(0.9, from_batch=32, to_batch=jnp.ones((8, 4), "float32"))
    with refused("`from_batch`", "positive number", "function"):
        oa.rescale_decay(0.9, from_batch=lambda _: 32, to_batch=64)
    with refused("`from_batch`", "got True"):
        oa.rescale_decay(0.9, from_batch=True, to_batch=64)


def test_which_batch_is_which_must_be_said():
    with pytest.raises(TypeError, match="positional"):
        oa.rescale_decay(0.9, 32, 64)
