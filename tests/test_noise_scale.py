"""The noise scale: unbiased, the same in every way of training, and what follows it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import optax_accum as oa
from optax_accum import _tree, _window
from optax_accum._overwrite import Overwritten
from optax_accum.noise import _noise_scale
from tests.support.devices import (
    AXIS,
    COUNT,
    INSIDE,
    inside,
    mesh,
    parametrized,
    stacked,
)
from tests.support.hlo import compiled, exchanges, large_copies, nbytes, temporaries
from tests.support.training import WAYS, micro_batches, promoting, slow, stepper
from tests.support.xla import optimized

UNEVEN = np.array([1.0, 5.0, 9.0, 2.0, 15.0])
DIM, TRACE = 8, 6.0
SIGNAL = 0.5  # ‖G‖²
TRUE = TRACE / SIGNAL


def by_hand(grads, weights):
    """The formulas in NumPy's float64: signal and noise."""
    vectors = [
        np.concatenate(
            [np.ravel(np.asarray(x, np.float64)) for x in jax.tree.leaves(g)]
        )
        for g in grads
    ]
    b = np.asarray(weights, np.float64)
    mean = sum(w * v for w, v in zip(b, vectors, strict=True)) / b.sum()
    squares = sum(w * v @ v for w, v in zip(b, vectors, strict=True))
    noise = (squares - b.sum() * mean @ mean) / (len(b) - 1)
    return mean @ mean - noise / b.sum(), noise


def sample_gradients(key, shape, weights):
    """Means over as many units as `weights` say: ``[*shape, len(weights), DIM]``."""
    mean = np.sqrt(SIGNAL / DIM)
    deviation = np.sqrt(TRACE / DIM)
    normal = jax.random.normal(key, (*shape, len(weights), DIM))
    scale = jnp.asarray(deviation / np.sqrt(weights), jnp.float32)
    return mean + normal * scale.reshape(*[1] * len(shape), -1, 1)


def estimate(grads, weights, reduction="mean"):
    """Through the library's own sums."""
    sums = _window.NoiseSums.empty(jnp.zeros([]))
    total = jnp.zeros(grads.shape[1:])
    for g, w in zip(grads, weights, strict=True):
        sums = sums.add(g, jnp.float32(w), reduction)
        total = total + jnp.float32(w if reduction == "mean" else 1) * g
    weight = jnp.float32(sum(weights))
    square = _tree.squared_norm(total, jnp.float32) / weight**2
    window = _window.Window.empty((), weight, weight, overwritten=Overwritten())
    return _noise_scale.of_window(window._replace(weight=weight, noise=sums), square)


# --- The estimate ---


def test_the_estimate_is_unbiased_with_uneven_weights():
    grads = sample_gradients(jax.random.key(0), (20_000,), UNEVEN)
    found = jax.vmap(lambda g: estimate(g, UNEVEN))(grads)
    for got, wanted in ((found.noise, TRACE), (found.signal, SIGNAL)):
        error = got.mean() - wanted
        assert abs(error) < 4 * got.std() / np.sqrt(len(got))
        assert abs(error) < 0.03 * wanted  # and that is a sharp test

    def equal_size_formula(grads):
        """McCandlish's, with the mean size for every micro-batch."""
        small, large = UNEVEN.mean(), UNEVEN.sum()
        mean = jnp.tensordot(jnp.asarray(UNEVEN / large, jnp.float32), grads, 1)
        squares = (grads**2).sum(-1).mean()
        return (squares - (mean**2).sum()) / (1 / small - 1 / large)

    naive = jax.vmap(equal_size_formula)(grads).mean()
    assert 2.6 < naive / TRACE < 2.8


def test_the_noise_scale_is_a_ratio_of_averages():
    """And an average of ratios is not."""
    grads = sample_gradients(jax.random.key(1), (4000,), UNEVEN)
    samples = jax.vmap(lambda g: estimate(g, UNEVEN))(grads)

    def add(average, sample):
        return average.add(sample, 0.999), None

    average, _ = jax.lax.scan(add, oa.noise.NoiseScale.empty(), samples)
    assert int(average.count) == 4000
    np.testing.assert_allclose(average.batch_size, TRUE, rtol=0.1)
    ratios = samples.noise / samples.signal
    assert abs(ratios.mean() / TRUE - 1) > 0.2


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.99])
def test_the_averages_are_corrected_for_their_start(decay):
    values = np.random.default_rng(0).normal(size=(12, 2)).astype(np.float32)
    average = oa.noise.NoiseScale.empty()
    raw = np.zeros(2)
    for n, (signal, noise) in enumerate(values, start=1):
        sample = oa.noise.NoiseScale(
            jnp.float32(signal), jnp.float32(noise), jnp.int32(1)
        )
        average = average.add(sample, decay)
        raw = decay * raw + (1 - decay) * np.array([signal, noise])
        expected = raw / (1 - decay**n)
        np.testing.assert_allclose(average[:2], expected, rtol=1e-4, atol=1e-5)
        assert int(average.count) == n


def test_a_decay_that_rounds_to_one_averages_all():
    """In float32 it is 1; the average is then the mean of all."""
    average = oa.noise.NoiseScale.empty()
    for x in (1.0, 2.0, 6.0):
        sample = oa.noise.NoiseScale(jnp.float32(x), jnp.float32(-x), jnp.int32(1))
        average = jax.jit(oa.noise.NoiseScale.add, static_argnums=2)(
            average, sample, 0.999999999
        )
    np.testing.assert_allclose(average[:2], (3, -3), rtol=1e-6)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("decay", [np.float64(0.9), 0.9])
def test_averages_keep_their_dtype(decay):
    average = oa.noise.NoiseScale.empty()
    added = average.add(oa.noise.NoiseScale.empty(jnp.float64), decay)
    assert [x.dtype for x in added] == [x.dtype for x in average]


def test_debug_nans_finds_nothing_in_a_good_window():
    """Someone may look for NaN with jax_debug_nans."""
    grads, weights = micro_batches(PARAMS, 2)
    tx = oa.accumulate(optax.sgd(0.1), noise_decay=0.9)
    state = tx.init(PARAMS)
    with jax.debug_nans(True):
        for g, w, boundary in zip(grads, weights, (False, True), strict=True):
            _, state = tx.update(g, state, PARAMS, weight=w, boundary=boundary)
    assert int(oa.noise.estimate(state).count) == 1


def test_an_empty_sample_changes_no_average():
    average = oa.noise.NoiseScale(jnp.float32(2), jnp.float32(6), jnp.int32(3))
    nothing = estimate(jnp.ones((1, DIM)), [4.0])
    assert np.isnan(nothing.signal)
    assert np.isnan(nothing.noise)
    assert int(nothing.count) == 0
    jax.tree.map(np.testing.assert_array_equal, average.add(nothing, 0.9), average)
    assert float(average.batch_size) == 3
    assert np.isnan(oa.noise.NoiseScale.empty().batch_size)


def test_the_signal_may_be_negative():
    grads = jnp.asarray([[1.0], [-1.0]])
    found = estimate(grads, [1.0, 1.0])
    assert float(found.signal) == -1
    assert float(found.noise) == 2
    assert float(found.batch_size) == -2


@pytest.mark.parametrize("reduction", ["ratio", "sum"])
def test_gradients_of_sums_give_the_same_estimate(reduction):
    grads = sample_gradients(jax.random.key(2), (), UNEVEN)
    sums = grads * jnp.asarray(UNEVEN, jnp.float32)[:, None]
    found = estimate(sums, UNEVEN, reduction)
    np.testing.assert_allclose(found[:2], by_hand(grads, UNEVEN), rtol=1e-4)


def test_the_squared_norm_handles_complex_narrow_and_integer_leaves():
    tree = {
        "c": jnp.array([3 + 4j, 1j]),
        "b": jnp.full(1000, 2.0, jnp.bfloat16),
        "i": jnp.ones(3, jnp.int32),
    }
    assert float(_tree.squared_norm(tree, jnp.float32)) == 26 + 4000


# --- Across steps ---

PARAMS = {"w": jnp.ones((3, 4)), "b": jnp.zeros(5)}


def run(tx, grads, weights, way="update_params", params=PARAMS, **options):
    state = tx.init(params)
    step = jax.jit(stepper(tx, way))
    for g, w in zip(grads, weights, strict=True):
        params, state = step(params, state, g, weight=w, **options)
    return params, state


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("reduction", ["mean", "ratio", slow("sum")])
def test_estimates_of_windows_are_averaged(way, reduction):
    decay, k, windows = 0.7, 4, 3
    grads, weights = micro_batches(PARAMS, k * windows)
    given = grads
    if reduction != "mean":
        given = [
            jax.tree.map(lambda x, w=w: x * w, g)
            for g, w in zip(grads, weights, strict=True)
        ]
    tx = oa.accumulate(optax.sgd(0.1), k, reduction=reduction, noise_decay=decay)
    _, state = run(tx, given, weights, way)
    raw = np.zeros(2)
    for n in range(windows):
        part = slice(n * k, (n + 1) * k)
        raw = decay * raw + (1 - decay) * np.array(by_hand(grads[part], weights[part]))
    found = oa.noise.estimate(state)
    np.testing.assert_allclose(found[:2], raw / (1 - decay**windows), rtol=1e-4)
    assert int(found.count) == windows


@pytest.mark.parametrize("way", WAYS)
def test_noise_decay_changes_nothing_else(way):
    grads, weights = micro_batches(PARAMS, 6)
    inner = promoting(optax.adamw(1e-2))
    plain = run(oa.accumulate(inner, 3), grads, weights, way)
    measured = run(oa.accumulate(inner, 3, noise_decay=0.9), grads, weights, way)
    assert plain[1].noise == ()
    without = measured[1]._replace(
        noise=(), window=measured[1].window._replace(noise=plain[1].window.noise)
    )
    jax.tree.map(np.testing.assert_array_equal, plain, (measured[0], without))


def test_without_noise_decay_the_program_reduces_nothing():
    tx = oa.accumulate(optax.sgd(0.1), 4)
    state = tx.init(PARAMS)
    assert state.noise == ()
    text = jax.jit(tx.update_params).lower(PARAMS, state, PARAMS).as_text()
    assert "reduce" not in text
    asked = oa.accumulate(optax.sgd(0.1), 4, noise_decay=0.9)
    state = asked.init(PARAMS)
    text = jax.jit(asked.update_params).lower(PARAMS, state, PARAMS).as_text()
    assert "reduce" in text


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("inner", [optax.sgd(0.1, momentum=0.9), optax.adamw(1e-3)])
def test_noise_decay_adds_no_copies(way, inner):
    params = {"w": jnp.zeros((1024, 512)), "b": jnp.zeros(1000)}
    tx = oa.accumulate(promoting(inner), 4, noise_decay=0.99)
    state = tx.init(params)
    program = compiled(
        stepper(tx, way), params, state, jax.tree.map(jnp.copy, params), donate=(0, 1)
    )
    assert temporaries(program) < 0.01 * nbytes(params)
    assert large_copies(program, 1000) == []


@pytest.mark.parametrize(
    ("skip", "on_skip", "bad"),
    [(None, "shrink", 0), (oa.skip_not_finite, "shrink", 1)],
    ids=["weight 0", "skipped"],
)
def test_micro_batches_without_weight_are_excluded(skip, on_skip, bad):
    grads, weights = micro_batches(PARAMS, 4)
    nan = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), grads[0])
    tx = oa.accumulate(optax.sgd(0.1), 5, noise_decay=0.9, skip=skip, on_skip=on_skip)
    given = [*grads[:2], nan, *grads[2:]]
    _, state = run(tx, given, [*weights[:2], jnp.float32(bad), *weights[2:]])
    found = oa.noise.estimate(state)
    np.testing.assert_allclose(found[:2], by_hand(grads, weights), rtol=1e-4)


def test_micro_batches_rejected_while_waiting_are_excluded():
    grads, weights = micro_batches(PARAMS, 4)
    nan = jax.tree.map(lambda x: jnp.full_like(x, jnp.inf), grads[0])
    tx = oa.accumulate(
        optax.sgd(0.1),
        4,
        noise_decay=0.9,
        skip=oa.skip_not_finite,
        on_skip="wait",
    )
    _, state = run(tx, [nan, *grads], [jnp.float32(3), *weights])
    found = oa.noise.estimate(state)
    np.testing.assert_allclose(found[:2], by_hand(grads, weights), rtol=1e-4)


@pytest.mark.parametrize("every_k", [1, 2])
def test_windows_of_one_micro_batch_give_no_estimate(every_k):
    grads, weights = micro_batches(PARAMS, 3)
    tx = oa.accumulate(optax.sgd(0.1), every_k, noise_decay=0.9)
    state = tx.init(PARAMS)
    params = PARAMS
    for g, w in zip(grads, weights, strict=True):
        params, state = jax.jit(
            lambda *args, w=w: tx.update_params(*args, weight=w, boundary=True)
        )(g, state, params)
    found = oa.noise.estimate(state)
    assert int(found.count) == 0
    assert np.isnan(found.batch_size)
    assert int(oa.gradient_step(state)) == 3


def test_a_nan_in_the_estimate_does_not_outlive_its_window():
    grads, weights = micro_batches(PARAMS, 4)
    nan = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), grads[0])
    inner = optax.chain(promoting(optax.zero_nans()), optax.sgd(0.1))
    tx = oa.accumulate(inner, 2, noise_decay=0.9)
    _, state = run(tx, [nan, *grads[1:]], weights)
    found = oa.noise.estimate(state)
    np.testing.assert_allclose(found[:2], by_hand(grads[2:], weights[2:]), rtol=1e-4)
    assert int(found.count) == 1


def test_an_empty_window_changes_no_average():
    grads, weights = micro_batches(PARAMS, 2)
    tx = oa.accumulate(optax.sgd(0.1), 2, noise_decay=0.9)
    params, state = run(tx, grads, weights)
    before = oa.noise.estimate(state)
    for g in grads:
        params, state = jax.jit(stepper(tx))(params, state, g, weight=jnp.float32(0))
    jax.tree.map(np.testing.assert_array_equal, before, oa.noise.estimate(state))


@pytest.mark.parametrize("boundary", [True, jnp.array(True)])
def test_windows_closed_by_the_caller_are_measured(boundary):
    grads, weights = micro_batches(PARAMS, 3)
    tx = oa.accumulate(optax.sgd(0.1), noise_decay=0.9)
    params, state = PARAMS, tx.init(PARAMS)
    for i, (g, w) in enumerate(zip(grads, weights, strict=True)):
        closes = boundary if i == 2 else jnp.array(False)
        params, state = tx.update_params(g, state, params, weight=w, boundary=closes)
    found = oa.noise.estimate(state)
    np.testing.assert_allclose(found[:2], by_hand(grads, weights), rtol=1e-4)


def test_bfloat16_parameters_are_measured_in_float32():
    """There the updates and the inner state are computed in turn."""
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    grads, weights = micro_batches(params, 4)
    tx = oa.accumulate(promoting(optax.adamw(1e-3)), 4, noise_decay=0.9)
    _, state = run(tx, grads, weights, params=params)
    found = oa.noise.estimate(state)
    np.testing.assert_allclose(found[:2], by_hand(grads, weights), rtol=1e-4)


@pytest.mark.usefixtures("float64")
def test_float64_is_measured_in_float64():
    params = jax.tree.map(lambda x: x.astype(jnp.float64), PARAMS)
    grads, weights = micro_batches(params, 3)
    tx = oa.accumulate(optax.sgd(0.1), 3, noise_decay=0.9)
    _, state = run(tx, grads, weights, params=params)
    found = oa.noise.estimate(state)
    assert found.signal.dtype == jnp.float64
    np.testing.assert_allclose(found[:2], by_hand(grads, weights), rtol=1e-12)


def test_a_state_without_the_noise_scale_is_refused():
    old = oa.accumulate(optax.sgd(0.1), 2)
    new = oa.accumulate(optax.sgd(0.1), 2, noise_decay=0.9)
    grads, weights = micro_batches(PARAMS, 2)
    params, state = run(old, grads, weights)
    with pytest.raises(ValueError, match="made without this `noise_decay`") as error:
        new.update_params(grads[0], state, params)
    assert "state._replace(window=new.window, noise=new.noise)" in str(error.value)
    start = new.init(params)
    state = state._replace(window=start.window, noise=start.noise)
    new.update_params(grads[0], state, params)
    # And back: what is not measured any more is kept.
    _, kept = old.update_params(grads[0], state, params)
    jax.tree.map(np.testing.assert_array_equal, kept.noise, state.noise)
    sums = kept.window.noise, state.window.noise
    jax.tree.map(np.testing.assert_array_equal, *sums)


# --- Inside one step, and over devices ---

X = jnp.asarray(np.random.default_rng(3).normal(size=(12, 3)), jnp.float32)
MASK = jnp.asarray(np.arange(12) % 5 > 0)
WEIGHTS = {"w": jnp.ones((3, 2)), "b": jnp.full(2, 0.3)}


def loss(params, x, mask):
    wrong = (jnp.tanh(x @ params["w"] + params["b"][None]) - 0.5) ** 2
    total = jnp.where(mask, wrong.sum(-1), 0).sum()
    return total / jnp.maximum(mask.sum(), 1).astype(total.dtype)


def count(params, x, mask):
    del params, x
    return mask.sum()


def parts(k, x=X, mask=MASK):
    """The gradients and weights of strided micro-batches."""
    grads = [jax.grad(loss)(WEIGHTS, x[i::k], mask[i::k]) for i in range(k)]
    return grads, [float(mask[i::k].sum()) for i in range(k)]


def in_step(k, **options):
    return oa.value_and_grad(
        loss,
        num_microbatches=k,
        batch_argnums=(1, 2),
        weight=count,
        noise_scale=True,
        **options,
    )


@pytest.mark.parametrize("k", [slow(2), 4])
def test_in_one_step_the_estimate_is_that_of_the_equations(k):
    _, info = jax.jit(in_step(k))(WEIGHTS, X, MASK)
    np.testing.assert_allclose(info.noise_scale[:2], by_hand(*parts(k)), rtol=1e-4)
    assert int(info.noise_scale.count) == 1


@pytest.mark.slow
def test_in_one_step_equal_weights_and_sums_are_measured():
    def total(params, x):
        return len(x) * loss(params, x, jnp.ones(len(x), bool))

    every = jnp.ones(12, bool)
    expected = by_hand(*parts(3, mask=every))
    for reduction, fun in (("sum", total), ("ratio", total)):
        f = oa.value_and_grad(
            fun,
            num_microbatches=3,
            reduction=reduction,
            noise_scale=True,
        )
        _, info = jax.jit(f)(WEIGHTS, X)
        np.testing.assert_allclose(info.noise_scale[:2], expected, rtol=1e-4)
    f = oa.value_and_grad(
        lambda p, x: total(p, x) / len(x),
        microbatch_size=5,  # 5, 5 and 2
        noise_scale=True,
    )
    _, info = jax.jit(f)(WEIGHTS, X)
    cut = [X[:5], X[5:10], X[10:]]
    grads = [jax.grad(loss)(WEIGHTS, x, jnp.ones(len(x), bool)) for x in cut]
    np.testing.assert_allclose(
        info.noise_scale[:2], by_hand(grads, [5, 5, 2]), rtol=1e-4
    )


def test_in_one_step_one_micro_batch_gives_nan():
    (_, grads), info = jax.jit(in_step(1))(WEIGHTS, X, MASK)
    assert np.isnan(info.noise_scale.signal)
    assert np.isnan(info.noise_scale.batch_size)
    assert int(info.noise_scale.count) == 0
    assert np.isfinite(grads["w"]).all()


def test_in_one_step_rejected_micro_batches_are_excluded():
    x = X.at[0].set(jnp.nan)  # in the first of four
    _, info = jax.jit(in_step(4, skip=oa.skip_not_finite))(
        WEIGHTS, x, MASK.at[0].set(True)
    )
    grads, weights = parts(4)
    expected = by_hand(grads[1:], weights[1:])
    np.testing.assert_allclose(info.noise_scale[:2], expected, rtol=1e-4)
    assert int(info.skipped) == 1


def test_without_noise_scale_the_info_has_none():
    f = oa.value_and_grad(
        lambda p, x: (x @ p).mean(), num_microbatches=2, return_info=True
    )
    _, info = f(jnp.ones(3), X)
    assert info.noise_scale == ()


def device_data():
    x = np.random.default_rng(4).normal(size=(COUNT * 4, 3)).astype(np.float32)
    mask = np.random.default_rng(5).random(COUNT * 4) < 0.7
    mask[:4] = True
    return jnp.asarray(x), jnp.asarray(mask)


def device_parts(k):
    """Of every device's contiguous part its strided micro-batches."""
    x, mask = device_data()
    pairs = zip(jnp.split(x, COUNT), jnp.split(mask, COUNT), strict=True)
    both = [parts(k, *pair) for pair in pairs]
    grads = [g for gs, _ in both for g in gs]
    weights = [w for _, ws in both for w in ws]
    counted = [i for i, w in enumerate(weights) if w]
    return [grads[i] for i in counted], [weights[i] for i in counted]


@pytest.mark.several_devices
@pytest.mark.parametrize("k", [slow(1), 2])
@pytest.mark.parametrize("scatter", [False, True])
def test_in_one_step_a_mesh_gives_the_estimate_of_one_device(k, scatter):
    # So that a leaf can be cut and another cannot.
    f = jax.jit(in_step(k, mesh=mesh(), axis_name=AXIS, scatter=scatter))
    _, info = f(WEIGHTS, *device_data())
    expected = by_hand(*device_parts(k))
    np.testing.assert_allclose(info.noise_scale[:2], expected, rtol=1e-4)


@pytest.mark.several_devices
def test_scattered_gradients_give_the_same_estimate():
    params = jnp.ones((COUNT, 2)), jnp.ones(COUNT + 1)

    def fun(params, x):
        a, b = params
        return ((x * a.sum() + b.sum()) ** 2 * a.sum()).mean()

    x = jnp.arange(4.0 * COUNT).reshape(-1, 1)
    scales = []
    for scatter in (False, True):
        f = oa.value_and_grad(
            fun,
            num_microbatches=2,
            mesh=mesh(),
            axis_name=AXIS,
            scatter=scatter,
            noise_scale=True,
        )
        scales.append(jax.jit(f)(params, x)[1].noise_scale)
    np.testing.assert_allclose(*scales, rtol=1e-4)


@pytest.mark.several_devices
@parametrized(INSIDE)
def test_in_one_step_every_device_has_the_same_estimate(way):
    f = in_step(2, axis_name=AXIS)
    x, mask = device_data()
    if way == "pmap":
        x, mask = x.reshape(COUNT, 4, 3), mask.reshape(COUNT, 4)
    info = inside(way, lambda *args: f(*args)[1], (None, 0, 0), (None,))(
        WEIGHTS, x, mask
    )
    expected = *by_hand(*device_parts(2)), 1
    for got, wanted in zip(info.noise_scale, expected, strict=True):
        np.testing.assert_allclose(np.ravel(got), wanted, rtol=1e-4)


@pytest.mark.several_devices
def test_gradients_sharded_over_another_axis_are_refused():
    if COUNT % 2:
        pytest.skip("needs an even number of devices")
    tx = oa.accumulate(optax.sgd(0.1), 2, axis_name=AXIS, noise_decay=0.9)
    two_axes = jax.make_mesh(
        (COUNT // 2, 2), (AXIS, "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2
    )
    params = jnp.ones(4)
    state = oa.sharding.stack_windows(tx.init(params), COUNT // 2)
    specs = oa.sharding.window_specs(state, AXIS)
    specs = specs._replace(window=specs.window._replace(grads=P(AXIS, "model")))

    def step(params, state):
        grads = jax.lax.pcast(params, AXIS, to="varying")
        return tx.update_params(grads, state, params)

    mapped = jax.shard_map(
        step, mesh=two_axes, in_specs=(P("model"), specs), out_specs=(P("model"), specs)
    )
    with pytest.raises(ValueError, match="differs between the devices of 'model'"):
        jax.jit(mapped)(params, state)


@pytest.mark.several_devices
@parametrized(INSIDE)
@pytest.mark.parametrize("every_k", [slow(1), 2])
def test_windows_on_devices_give_the_estimate_of_one_device(way, every_k):
    """k·D samples, in the one exchange that there is."""
    tx = oa.accumulate(optax.sgd(0.0), every_k, axis_name=AXIS, noise_decay=0.9)

    def step(params, state, x, mask):
        local = (
            jax.lax.pcast(params, AXIS, to="varying") if way == "checked" else params
        )
        grads = jax.grad(loss)(local, x, mask)
        return tx.update_params(grads, state, params, weight=mask.sum())

    x, mask = device_data()
    split = x.reshape(COUNT, 4, 3), mask.reshape(COUNT, 4)
    state = tx.init(WEIGHTS)
    if way == "pmap":
        mapped = inside(way, step, (0, 0, 0, 0), (0, 0))
        params, state = stacked((WEIGHTS, state))
    else:
        mapped = inside(way, step, (None, "state", 0, 0), (None, "state"))
        params, state = WEIGHTS, oa.sharding.stack_windows(state, COUNT)
    for i in range(every_k):
        cut = [a[:, i::every_k] for a in split]
        if way != "pmap":
            cut = [a.reshape(-1, *a.shape[2:]) for a in cut]
        program = optimized(mapped.lower(params, state, *cut))
        params, state = jax.block_until_ready(mapped(params, state, *cut))
    found = oa.noise.estimate(state)
    for got, wanted in zip(found, (*by_hand(*device_parts(every_k)), 1), strict=True):
        np.testing.assert_allclose(np.ravel(got), wanted, rtol=1e-4)
    place = "entry" if every_k == 1 else "branch"
    assert sum(exchanges(program).values()) == 1, exchanges(program)
    assert f"all-reduce, {place}" in exchanges(program) or every_k == 1


@pytest.mark.several_devices
def test_the_noise_scale_adds_no_exchange_in_one_step():
    f = jax.jit(in_step(2, mesh=mesh(), axis_name=AXIS))
    program = optimized(f.lower(WEIGHTS, *device_data()))
    assert exchanges(program) == {"all-reduce, entry": 1}


def test_windows_with_noise_sums_can_be_stacked_and_summed():
    grads, weights = micro_batches(PARAMS, 3)
    tx = oa.accumulate(optax.sgd(0.1), 2, noise_decay=0.9)
    _, state = run(tx, grads, weights)  # an open window, after a closed one
    rows = oa.sharding.stack_windows(state, 4, rescale=False)
    assert rows.window.noise.squares.shape == (4,)
    assert rows.noise.estimate.noise.shape == ()
    summed = oa.sharding.sum_windows(rows, rescale=False)
    jax.tree.map(np.testing.assert_array_equal, summed, state)
    everything = oa.sharding.stack_windows(state, 4, all_leaves=True, rescale=False)
    assert everything.noise.estimate.noise.shape == (4,)
    summed = oa.sharding.sum_windows(everything, rescale=False)
    jax.tree.map(np.testing.assert_array_equal, summed, state)
    specs = oa.sharding.window_specs(state, AXIS)
    both = specs.window.noise.samples, specs.noise.estimate.count
    assert [str(s) for s in both] == [
        str(jax.sharding.PartitionSpec(AXIS)),
        str(jax.sharding.PartitionSpec()),
    ]


@pytest.mark.parametrize("k", [slow(2), 4])
def test_across_steps_and_in_one_step_the_estimates_agree(k):
    """Streaming, in one step, and by hand, on the same micro-batches."""
    _, info = jax.jit(in_step(k))(WEIGHTS, X, MASK)
    tx = oa.accumulate(optax.sgd(0.1), k, noise_decay=0.9)
    grads, weights = parts(k)
    _, state = run(tx, grads, [jnp.float32(w) for w in weights], params=WEIGHTS)
    np.testing.assert_allclose(oa.noise.estimate(state), info.noise_scale, rtol=1e-5)


# --- A k that follows ---


def quadratic(tx, true_scale, size, steps, seed=0):
    """Gradients of micro-batches of `size` units, at parameters that do not move."""
    dim = 50
    deviation = np.sqrt(true_scale / dim / size)  # ‖G‖ = 1
    mean = jnp.full(dim, 1 / np.sqrt(dim), jnp.float32)

    def step(carry, key):
        params, state = carry
        grads = mean + jnp.float32(deviation) * jax.random.normal(key, (dim,))
        params, state = tx.update_params(grads, state, params, weight=size)
        return (params, state), state.noise.k

    keys = jax.random.split(jax.random.key(seed), steps)
    params = jnp.zeros(dim)
    return jax.jit(lambda: jax.lax.scan(step, (params, tx.init(params)), keys))()


@pytest.mark.parametrize("powers_of_two", [True, False])
@pytest.mark.parametrize("true_k", [slow(3), 10, slow(50)])
def test_adaptive_k_settles_at_the_noise_scale(true_k, powers_of_two):
    every_k = oa.noise.adaptive_k(2, 1000, powers_of_two=powers_of_two)
    tx = oa.accumulate(optax.sgd(0.0), every_k, noise_decay=0.95)
    (_, state), ks = quadratic(tx, 4.0 * true_k, 4, 6000)
    late = np.asarray(ks)[3000:]
    assert true_k / 2 <= late.min()
    assert late.max() <= true_k * 2
    np.testing.assert_allclose(
        oa.noise.estimate(state).batch_size, 4 * true_k, rtol=0.5
    )
    if powers_of_two:
        assert {int(k) & int(k - 1) for k in late} == {0}
    assert len(set(late.tolist())) <= 4  # it has settled


def test_adaptive_k_follows_the_noise_scale_during_training():
    """A quadratic bowl with known noise: as it descends, the signal gets less."""
    dim, size, rate = 50, 4, 0.01
    tx = oa.accumulate(optax.sgd(rate), oa.noise.adaptive_k(2, 4096), noise_decay=0.8)

    def step(carry, key):
        params, state = carry
        noise = jax.random.normal(key, (dim,)) / jnp.sqrt(jnp.float32(size))
        params, state = tx.update_params(params + noise, state, params, weight=size)
        true = dim / jnp.sum(params**2)  # tr Σ / ‖G‖²
        return (params, state), (true, state.noise.k)

    start = jnp.full(dim, 2.0)
    keys = jax.random.split(jax.random.key(0), 6000)
    _, (true, k) = jax.jit(lambda: jax.lax.scan(step, (start, tx.init(start)), keys))()
    wanted = np.asarray(true) / size
    late = slice(4000, None)
    assert wanted[-1] > 4 * wanted[0]
    ratio = np.asarray(k)[late] / wanted[late]
    assert 0.5 <= np.median(ratio) <= 2


@pytest.mark.slow
def test_adaptive_k_stays_within_its_bounds():
    def last_k(every_k, true_k):
        tx = oa.accumulate(optax.sgd(0.0), every_k, noise_decay=0.9)
        return int(quadratic(tx, 4.0 * true_k, 4, 800)[1][-1])

    assert last_k(oa.noise.adaptive_k(3, 12), 500) == 12
    assert last_k(oa.noise.adaptive_k(3, 12), 0.1) == 3
    assert last_k(oa.noise.adaptive_k(2, 500, multiple=4), 8) in (16, 32, 64)


def test_adaptive_k_doubles_to_its_maximum_without_signal():
    adaptive = oa.noise.adaptive_k(2, 64)
    k = jnp.int32(2)
    lost = oa.noise.NoiseScale(jnp.float32(-1), jnp.float32(3), jnp.int32(1))
    for wanted in (4, 8, 16, 32, 64, 64):
        k = adaptive.next(k, lost, jnp.float32(1))
        assert int(k) == wanted
    assert k.dtype == jnp.int32


def test_adaptive_k_waits_for_the_first_estimate():
    adaptive = oa.noise.adaptive_k(2, 64)
    k = adaptive.next(jnp.int32(5), oa.noise.NoiseScale.empty(), jnp.float32(1))
    assert int(k) == 5


@pytest.mark.parametrize(("wanted", "k"), [(11.9, 8), (12.1, 16), (5.4, 8), (5.2, 4)])
def test_adaptive_k_has_a_hysteresis(wanted, k):
    adaptive = oa.noise.adaptive_k(2, 64, hysteresis=0.5)
    scale = oa.noise.NoiseScale(jnp.float32(1), jnp.float32(wanted), jnp.int32(1))
    assert int(adaptive.next(jnp.int32(8), scale, jnp.float32(1))) == k


@pytest.mark.several_devices
@parametrized(INSIDE)
def test_adaptive_k_is_the_same_on_all_devices(way):
    """And one device may begin with windows of one, because there are others."""
    every_k = oa.noise.adaptive_k(1, 64)
    tx = oa.accumulate(optax.sgd(0.0), every_k, axis_name=AXIS, noise_decay=0.9)
    dim, true_k = 50, 8
    deviation = np.sqrt(true_k * COUNT / dim)

    def step(params, state, normal):
        normal = normal.reshape(dim)
        grads = jnp.float32(1 / np.sqrt(dim)) + jnp.float32(deviation) * normal
        return tx.update_params(grads, state, params)

    state, params = tx.init(jnp.zeros(dim)), jnp.zeros(dim)
    if way == "pmap":
        mapped = inside(way, step, (0, 0, 0), (0, 0))
        params, state = stacked((params, state))
    else:
        mapped = inside(way, step, (None, "state", 0), (None, "state"))
        state = oa.sharding.stack_windows(state, COUNT)
    random = np.random.default_rng(0)
    programs = []
    for _ in range(150):
        normal = jnp.asarray(random.normal(size=(COUNT, 1, dim)), jnp.float32)
        params, state = jax.block_until_ready(mapped(params, state, normal))
        programs.append(0 if way == "pmap" else mapped._cache_size())
    ks = np.ravel(state.noise.k)
    assert len(set(ks.tolist())) == 1
    assert true_k / 2 <= ks[0] <= true_k * 2
    # The first call takes arrays that are not spread over the devices yet.
    assert programs[-1] == programs[1]


def test_adaptive_k_compiles_once():
    tx = oa.accumulate(optax.sgd(0.0), oa.noise.adaptive_k(2, 32))
    assert tx.init(PARAMS).noise.k.shape == ()
    step: Any = jax.jit(stepper(tx))
    params, state = PARAMS, tx.init(PARAMS)
    grads, weights = micro_batches(PARAMS, 20)
    ks = set()
    for g, w in zip(grads, weights, strict=True):
        params, state = step(params, state, g, weight=w)
        ks.add(int(state.noise.k))
    assert len(ks) > 1
    assert step._cache_size() == 1


# --- What cannot be ---


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (
            lambda: oa.noise.adaptive_k(0, 4),
            ValueError,
            "`min_k` must be an int >= 1; got 0",
        ),
        (lambda: oa.noise.adaptive_k(2.0, 4), TypeError, "`min_k` must be an int >= 1"),
        (
            lambda: oa.noise.adaptive_k(8, 4),
            ValueError,
            "`max_k` must not be less than",
        ),
        (
            lambda: oa.noise.adaptive_k(2, 4, multiple=0),
            ValueError,
            "`multiple` must be pos",
        ),
        (
            lambda: oa.noise.adaptive_k(2, 4, hysteresis=1.5),
            ValueError,
            "`hysteresis` is how far off k may be",
        ),
        (
            lambda: oa.accumulate(optax.sgd(1), oa.noise.adaptive_k(1, 4)),
            ValueError,
            "noise cannot be measured on one micro-batch.*Use min_k=2",
        ),
        (
            lambda: oa.accumulate(optax.sgd(1), 2, noise_decay=1.0),
            ValueError,
            "`noise_decay` is the decay of the averages.*got 1.0",
        ),
        (
            lambda: oa.accumulate(optax.sgd(1), 2, noise_decay=True),
            TypeError,
            "`noise_decay` is the decay.*got True",
        ),
        (
            lambda: oa.noise.NoiseScale.empty().add((), 0.9),
            TypeError,
            "`sample` must be an `oa.noise.NoiseScale`.*got tuple",
        ),
        (
            lambda: oa.noise.estimate(oa.accumulate(optax.sgd(1), 2).init(PARAMS)),
            ValueError,
            "holds no noise scale.*noise_decay=0.99",
        ),
        (lambda: oa.noise.estimate(3), ValueError, "`opt_state` must hold the state"),
    ],
)
def test_wrong_settings_are_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()


def test_a_decay_of_1_and_a_multiple_of_another_type_are_refused():
    average = oa.noise.NoiseScale.empty()
    with pytest.raises(ValueError, match="`decay` is how much of the averages"):
        average.add(average, 1.0)
    with pytest.raises(ValueError, match="`multiple` must be positive"):
        oa.noise.adaptive_k(2, 4, multiple="2")
