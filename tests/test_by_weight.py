"""Windows that end by their weight: `every_k=oa.by_weight(target)`."""

import functools
from fractions import Fraction
from typing import Any

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training import train_state
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_accum as oa
import optax_accum.flax as oaf
from tests.support import devices, hlo
from tests.support.devices import AXIS, COUNT
from tests.support.errors import refused, saying
from tests.support.training import (
    NAN,
    PARAMS,
    SGD,
    TAKES,
    WAYS,
    alone,
    differentiated,
    micro_batches,
    promoting,
    slow,
    stepper,
    weighted_mean,
)
from tests.support.xla import optimized

core = pytest.mark.core
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
BAD_TARGET = ("`target` must be a positive number", "got")
NO_WEIGHT = ("`weight` is needed on every call", "`every_k=oa.by_weight")
# With an epsilon, without which Adam does not see how large a gradient is.
INNER = promoting(optax.adam(optax.linear_schedule(0.1, 0.01, 4), eps=0.1))
close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-6)
# Of so many tokens each. For a target of 1000 they make windows of 3, 2, 1 and 4
# micro-batches, and leave one open.
TOKENS = (500, 300, 400, 700, 300, 1300, 1, 250, 0, 750, 600)
TARGET = 1000


def windows_of(weights, target):
    """The numbers of the micro-batches of each closed window, by counting.

    `target` is a number, or a schedule of how many windows are closed.
    """
    scheduled = jax.jit(target) if callable(target) else lambda _: target
    windows: list[list[int]] = []
    window, total = [], 0
    for i, weight in enumerate(weights):
        window.append(i)
        total += weight
        if total >= scheduled(len(windows)):
            windows.append(window)
            window, total = [], 0
    return windows


def weights_of(windows, weights):
    return [sum(weights[i] for i in window) for window in windows]


def training(tx, weights, grads=None, way="update_params", jitted=True):
    """Parameters, state, and the weights of the closed windows.

    A weight may be a pair of it and the micro-step's `boundary`.
    """
    grads = grads or [PARAMS] * len(weights)
    params, state, closed = PARAMS, tx.init(PARAMS), []
    step = stepper(tx, way)
    traced = jax.jit(step) if jitted else step
    static = jax.jit(step, static_argnames="boundary") if jitted else step
    for g, given in zip(grads, weights, strict=True):
        weight, boundary = given if isinstance(given, tuple) else (given, None)
        run = traced if isinstance(boundary, jax.Array) else static
        params, state = run(params, state, g, weight=weight, boundary=boundary)
        if oa.has_updated(state):
            closed.append(float(state.window.weight))
    return params, state, closed


def global_batches(inner, grads, weights, windows, reduction="mean"):
    """Plain Optax, on the gradients of the windows."""

    def gradient(window):
        g, w = [grads[i] for i in window], [weights[i] for i in window]
        if reduction == "mean":
            return weighted_mean(g, w)
        total = jax.tree.map(lambda *leaves: sum(leaves), *g)
        divisor = sum(w) if reduction == "ratio" else 1
        return jax.tree.map(lambda x: x / divisor, total)

    inner = inner._replace(update=jax.jit(inner.update))
    return alone(inner, *map(gradient, windows))[0]


# --- Which windows ---


@pytest.mark.parametrize(
    "reduction", [pytest.param("mean", marks=core), slow("ratio"), slow("sum")]
)
@pytest.mark.parametrize("way", ["update_params", slow("update")])
def test_windows_of_so_much_weight_equal_the_global_batches(reduction, way):
    """Adam with a schedule, and micro-batches of traced weights."""
    grads, _ = micro_batches(PARAMS, len(TOKENS))
    tx = oa.accumulate(INNER, oa.by_weight(TARGET), reduction=reduction)
    weights = [jnp.float32(w) for w in TOKENS]
    params, state, closed = training(tx, weights, grads, way)
    assert closed == [1200, 1000, 1300, 1001]
    windows = windows_of(TOKENS, TARGET)
    close(params, global_batches(INNER, grads, TOKENS, windows, reduction))
    assert oa.gradient_step(state) == 4
    assert oa.micro_step(state) == 1
    assert state.window.weight == 600


@core
@pytest.mark.parametrize("jitted", [True, slow(False)])
@pytest.mark.parametrize("kind", [int, slow(float), np.float32, np.array, jnp.int32])
def test_weights_may_be_any_numbers_in_and_out_of_jit(kind, jitted):
    tx = oa.accumulate(SGD, oa.by_weight(TARGET))
    weights = [kind(weight) for weight in TOKENS[:6]]
    _, _, closed = training(tx, weights, jitted=jitted)
    assert closed == [1200, 1000, 1300]


@pytest.mark.parametrize("way", [slow("update"), "update_params"])
def test_a_weight_that_is_a_constant_of_the_program_counts(way):
    tx = oa.accumulate(SGD, oa.by_weight(TARGET))
    step = jax.jit(functools.partial(stepper(tx, way), weight=400))
    params, state, ends = PARAMS, tx.init(PARAMS), []
    for _ in range(6):
        params, state = step(params, state, PARAMS)
        ends.append(bool(oa.has_updated(state)))
    assert ends == [False, False, True] * 2


LENGTH = 24


@functools.cache
def scanned(target):
    """``weights[LENGTH] -> (W, has_updated)`` after every micro-step, compiled once."""
    tx = oa.accumulate(optax.identity(), oa.by_weight(target))
    params = jnp.zeros([])

    def body(state, weight):
        _, state = tx.update(params, state, params, weight=weight)
        return state, (state.window.weight, state.has_updated)

    return jax.jit(lambda weights: jax.lax.scan(body, tx.init(params), weights)[1])


def padded(weights):
    return np.pad(np.float32(weights), (0, LENGTH - len(weights)))


@core
@hypothesis.given(st.lists(st.integers(0, 600), min_size=1, max_size=LENGTH))
@hypothesis.settings(max_examples=30)
def test_windows_end_where_counting_ends_them(weights):
    totals, ends = map(np.asarray, scanned(TARGET)(padded(weights)))
    windows = windows_of(weights, TARGET)
    assert np.flatnonzero(ends).tolist() == [window[-1] for window in windows]
    assert totals[ends].tolist() == weights_of(windows, weights)


def test_a_window_starts_from_0_after_one_that_has_closed():
    """By hand one writes first what also counts the window that has closed."""
    weights = (700, 601, 252, 600, 414, 149, 900)
    by_weight = oa.accumulate(SGD, oa.by_weight(TARGET))
    _, _, closed = training(by_weight, weights)
    assert closed == [1301, 1266, 1049]

    by_hand = oa.accumulate(SGD)
    step = jax.jit(stepper(by_hand))
    params, state, wrong = PARAMS, by_hand.init(PARAMS), []
    for weight in weights:
        boundary = state.window.weight + weight >= TARGET
        params, state = step(params, state, PARAMS, weight=weight, boundary=boundary)
        if oa.has_updated(state):
            wrong.append(int(state.window.weight))
    assert wrong == [1301, 252, 1014, 149, 900]


# --- Schedules ---


LINEAR = optax.linear_schedule(100, 500, 4)


@pytest.mark.usefixtures("loose_promotion")
@pytest.mark.parametrize(
    "schedule",
    [
        optax.piecewise_constant_schedule(100.0, {1: 2, 3: 2.5}),
        lambda step: 500 - 100 * jnp.minimum(step, 4),
        slow(LINEAR),
        slow(lambda step: 100 * (step + 1)),
        slow(lambda step: jnp.asarray(100 * (step + 1), jnp.int32)),
    ],
    ids=["piecewise", "a smaller one later", "linear", "a ramp", "integers"],
)
@pytest.mark.parametrize("jitted", [True, slow(False)])
def test_a_schedule_says_what_each_window_is_to_have(schedule, jitted):
    """After so many updates; of equal micro-batches, whose windows come out even."""
    weights = [50] * 30
    windows = windows_of(weights, schedule)
    tx = oa.accumulate(SGD, oa.by_weight(schedule))
    _, state, closed = training(tx, weights, jitted=jitted)
    assert closed == weights_of(windows, weights)
    assert oa.gradient_step(state) == len(closed) >= 4
    assert len(set(closed)) > 2


def test_a_ramp_that_float32_rounds_ends_windows_of_whole_numbers():
    """Its third target is 150.00002."""
    tx = oa.accumulate(SGD, oa.by_weight(optax.linear_schedule(50, 350, 6)))
    _, _, closed = training(tx, [50] * 28)
    assert closed == [50, 100, 150, 200, 250, 300, 350]


@pytest.mark.parametrize("jitted", [True, False])
def test_nothing_is_compiled_again_while_the_target_grows(jitted):
    traces = []

    def target(step):
        traces.append(step)
        return 100 * (step + 1)

    tx = oa.accumulate(SGD, oa.by_weight(target))
    _, state, closed = training(tx, [60] * 20, jitted=jitted)
    assert len(traces) == 1
    assert closed == [120, 240, 300, 420]
    training(tx, [30] * 2, jitted=jitted)
    assert len(traces) == (2 if jitted else 1)  # `training` has a jit of its own.
    assert oa.gradient_step(state) == 4


@pytest.mark.parametrize("target", [0, slow(-5)])
def test_a_scheduled_target_of_no_weight_ends_every_window_at_once(target):
    """As a warmup from 0 has it. Of no weight there is still no update."""
    tx = oa.accumulate(SGD, oa.by_weight(lambda step: target + 0 * step))
    _, state, closed = training(tx, (3, 0, 2))
    assert closed == [3, 2]
    assert oa.gradient_step(state) == 2
    tx = oa.accumulate(SGD, oa.by_weight(optax.linear_schedule(0, 100, 2)))
    _, _, closed = training(tx, (0, 0, 30, 30, 30, 90, 20))
    assert closed == [30, 60, 110]


# --- The caller, and what does not count ---


@pytest.mark.parametrize("true", [True, slow(jnp.asarray(True))])
def test_a_caller_closes_a_window_early(true):
    tx = oa.accumulate(SGD, oa.by_weight(TARGET))
    weights = (600, (100, true), 600, 300, 100, (0, true), 1000)
    _, state, closed = training(tx, weights)
    assert closed == [700, 1000, 1000]  # The window of weight 0 makes no update.
    assert oa.micro_step(state) == 0
    assert oa.gradient_step(state) == 3


@pytest.mark.parametrize("false", [slow(False), jnp.asarray(False)])
def test_a_caller_keeps_a_window_open_past_its_target(false):
    tx = oa.accumulate(SGD, oa.by_weight(TARGET))
    grads, _ = micro_batches(PARAMS, 5)
    weights = (900, (300, false), (500, false), 0, 1000)
    params, _, closed = training(tx, weights, grads)
    assert closed == [1700, 1000]
    numbers = (900, 300, 500, 0, 1000)
    windows = [[0, 1, 2, 3], [4]]
    close(params, global_batches(SGD, grads, numbers, windows))


@core
@pytest.mark.parametrize("takes", TAKES)
def test_weight_0_brings_a_window_no_nearer(takes):
    """Also if its gradient is NaN, and if it is the first of its window."""

    def loss(params, x):
        return jnp.sum((params["w"] * x + params["b"][None]) ** 2) / 10

    @jax.jit
    def step(params, state, x, weight):
        value, grads = differentiated(takes, loss, params, x)
        return tx.update_params(grads, state, params, weight=weight, value=value)

    tx = oa.accumulate(INNER, oa.by_weight(10))
    xs = [jnp.nan, 1.0, jnp.nan, jnp.nan, 0.5, -1.0, jnp.nan, 2.0, 0.1]
    weights = [0, 6, 0, 0, 5, 12, 0, 9, 1]
    params, state, ends = PARAMS, tx.init(PARAMS), []
    for x, weight in zip(xs, weights, strict=True):
        params, state = step(params, state, jnp.float32(x), jnp.float32(weight))
        ends.append(bool(oa.has_updated(state)))
    windows = windows_of(weights, 10)
    assert np.flatnonzero(ends).tolist() == [w[-1] for w in windows] == [4, 5, 8]

    # `alone`, at the parameters of each window.
    wanted, inner_state = PARAMS, INNER.init(PARAMS)
    gradient, update = jax.jit(jax.grad(loss)), jax.jit(INNER.update)
    for window in windows:
        grads = [gradient(wanted, xs[i]) for i in window if weights[i]]
        mean = weighted_mean(grads, [weights[i] for i in window if weights[i]])
        updates, inner_state = update(mean, inner_state, wanted)
        wanted = optax.apply_updates(wanted, updates)
    close(params, wanted)


@pytest.mark.parametrize("on_skip", [slow("shrink"), "wait"])
@pytest.mark.parametrize("reduction", ["mean", slow("ratio"), slow("sum")])
def test_what_skip_rejects_brings_a_window_no_nearer(reduction, on_skip):
    grads, _ = micro_batches(PARAMS, 8)
    weights = (400, 700, 2000, 300, 500, 900, 200, 1000)
    rejected = {0, 2, 5}
    grads = [NAN if i in rejected else g for i, g in enumerate(grads)]
    options: Any = {"reduction": reduction, "on_skip": on_skip}
    tx = oa.accumulate(INNER, oa.by_weight(TARGET), skip=oa.skip_not_finite, **options)
    params, state, closed = training(tx, weights, grads)
    counted = [0 if i in rejected else w for i, w in enumerate(weights)]
    windows = windows_of(counted, TARGET)
    assert closed == weights_of(windows, counted) == [1000, 1700]
    kept = [[i for i in window if i not in rejected] for window in windows]
    close(params, global_batches(INNER, grads, counted, kept, reduction))
    assert state.window.skipped == 3


@pytest.mark.parametrize("on_skip", ["shrink", "wait"])
def test_what_on_skip_waits_for_does_not_close_a_window_kept_open(on_skip: Any):
    """As it does not count as a micro-step."""
    tx = oa.accumulate(
        SGD, oa.by_weight(TARGET), skip=oa.skip_not_finite, on_skip=on_skip
    )
    weights = (900, (300, False), 100, 400)
    grads = [PARAMS, PARAMS, NAN, PARAMS]
    _, state, closed = training(tx, weights, grads)
    assert closed == ([1200] if on_skip == "shrink" else [1600])
    assert oa.micro_step(state) == (1 if on_skip == "shrink" else 0)


def test_a_weight_of_nan_is_seen():
    """A window that never ends would say nothing."""
    tx = oa.accumulate(SGD, oa.by_weight(TARGET))
    params, state, _ = training(tx, [jnp.float32(w) for w in (400, jnp.nan)])
    assert oa.gradient_step(state) == 1
    assert all(bool(jnp.isnan(x).all()) for x in jax.tree.leaves(params))


# --- Rounding ---


@pytest.mark.parametrize(
    ("weight", "count"),
    [
        *((0.1, 10), (1 / 28, 28)),
        *(pytest.param(*x, marks=pytest.mark.slow) for x in ((0.1, 30), (0.7, 10))),
    ],
)
@pytest.mark.parametrize("jitted", [True, slow(False)])
def test_shares_make_a_whole(weight, count, jitted):
    """In float32 all but the first add up to a little less."""
    tx = oa.accumulate(SGD, oa.by_weight(round(weight * count)))
    _, state, closed = training(tx, [weight] * 3 * count, jitted=jitted)
    assert oa.gradient_step(state) == 3
    np.testing.assert_allclose(closed, round(weight * count), rtol=1e-6)


@core
@pytest.mark.parametrize("target", [slow(1_000_000), slow(8_000_000), 16_000_000])
def test_a_window_that_lacks_one_token_of_millions_is_open(target):
    half = target // 2
    weights = (half, half - 1, 1, half, half + 1, target, target - 1, 1)
    tx = oa.accumulate(SGD, oa.by_weight(target))
    _, _, closed = training(tx, weights)
    assert closed == [target, target + 1, target, target]


@pytest.mark.parametrize("target", [slow(1), 1000])
def test_a_window_that_lacks_more_than_rounding_is_open(target):
    tx = oa.accumulate(SGD, oa.by_weight(target))
    _, state, closed = training(tx, (target * (1 - 5e-6), target))
    assert oa.gradient_step(state) == 1
    np.testing.assert_allclose(closed, 2 * target, rtol=1e-5)


@pytest.mark.parametrize("number", [np.float32(1000), np.int64(1000), Fraction(1000)])
def test_a_target_may_be_any_number(number):
    _, _, closed = training(oa.accumulate(SGD, oa.by_weight(number)), (400, 600, 10))
    assert closed == [1000]


@pytest.mark.usefixtures("float64")
def test_windows_in_double_precision_are_exact_beyond_float32():
    params = jnp.zeros(2, jnp.float64)
    tx = oa.accumulate(optax.sgd(0.1), oa.by_weight(2**30))
    state, ends = tx.init(params), []
    for weight in (2**30 - 1, 1, 2**30):
        _, state = tx.update(params, state, params, weight=weight)
        ends.append(bool(oa.has_updated(state)))
    assert ends == [False, True, True]


# --- Around and inside other things ---


@pytest.mark.parametrize("wrap", ["chain", slow("named_chain"), "apply_if_finite"])
def test_other_transformations_hand_the_weight_on(wrap):
    make: Any = {
        "chain": lambda tx: optax.chain(optax.clip(1e9), tx, optax.identity()),
        "named_chain": lambda tx: optax.named_chain(("a", optax.scale(1.0)), ("b", tx)),
        "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    }[wrap]
    grads, _ = micro_batches(PARAMS, len(TOKENS))
    tx = promoting(make(oa.accumulate(INNER, oa.by_weight(TARGET))))
    params, state = PARAMS, tx.init(PARAMS)
    for g, weight in zip(grads, TOKENS, strict=True):
        updates, state = jax.jit(tx.update)(g, state, params, weight=weight)
        params = optax.apply_updates(params, updates)
    windows = windows_of(TOKENS, TARGET)
    close(params, global_batches(INNER, grads, TOKENS, windows))
    assert oa.gradient_step(state) == 4


def test_the_noise_scale_of_windows_by_weight_is_that_of_the_same_windows():
    grads, _ = micro_batches(PARAMS, len(TOKENS))
    ends = [window[-1] for window in windows_of(TOKENS, TARGET)]
    by_weight = oa.accumulate(SGD, oa.by_weight(TARGET), noise_decay=0.9)
    by_hand = oa.accumulate(SGD, noise_decay=0.9)
    _, state, _ = training(by_weight, TOKENS, grads)
    marked = [(w, jnp.asarray(i in ends)) for i, w in enumerate(TOKENS)]
    _, wanted, _ = training(by_hand, marked, grads)
    chex.assert_trees_all_equal(state, wanted)
    assert oa.noise.estimate(state).count == 3  # One micro-batch alone shows none.


def test_models_under_vmap_close_their_windows_at_different_weights():
    tx = oa.accumulate(SGD, oa.by_weight(10))

    def step(state, weight):
        _, state = tx.update(PARAMS, state, PARAMS, weight=weight)
        return state, state.has_updated

    weights = jnp.asarray([[5.0, 10.0, 1.0], [5.0, 4.0, 1.0], [5.0, 6.0, 1.0]])
    states = jax.vmap(lambda _: tx.init(PARAMS))(jnp.arange(3))
    ends = []
    for row in weights:
        states, ended = jax.jit(jax.vmap(step))(states, row)
        ends.append(ended.tolist())
    assert ends == [[False, True, False], [True, False, False], [False, True, False]]


@core
@pytest.mark.parametrize("way", [slow("update"), "update_params"])
@pytest.mark.parametrize("target", [TARGET, slow(LINEAR)])
def test_the_inner_optimizer_is_in_a_branch_without_copies(way, target):
    params = {
        "in": jax.ShapeDtypeStruct((512, 256), jnp.float32),
        "out": jax.ShapeDtypeStruct((256, 384), jnp.float32),
    }
    adamw = promoting(optax.adamw(1e-3))
    tx = oa.accumulate(adamw, oa.by_weight(target))

    def step(params, state, grads, weight):
        return stepper(tx, way)(params, state, grads, weight=weight)

    state = jax.eval_shape(tx.init, params)
    weight = jax.ShapeDtypeStruct((), jnp.float32)
    program = hlo.compiled(step, params, state, params, weight)
    assert len(hlo.operations(program, "conditional")) == 1
    assert hlo.temporaries(program) < 0.01 * hlo.nbytes(params)
    assert hlo.large_copies(program, 256 * 384) == []


def test_a_state_of_another_every_k_continues():
    """Its open window counts, and back again."""
    by_count = oa.accumulate(INNER, 3)
    by_weight = oa.accumulate(INNER, oa.by_weight(TARGET))
    chex.assert_trees_all_equal(by_count.init(PARAMS), by_weight.init(PARAMS))
    grads, _ = micro_batches(PARAMS, 8)
    weights = (400, 100, 500, 300, 700, 900, 50, 20)
    params, state = PARAMS, by_count.init(PARAMS)
    for i, (g, weight) in enumerate(zip(grads, weights, strict=True)):
        tx = by_weight if 3 < i < 6 else by_count
        params, state = tx.update_params(g, state, params, weight=weight)
    windows = [[0, 1, 2], [3, 4], [5, 6, 7]]
    close(params, global_batches(INNER, grads, weights, windows))
    assert oa.gradient_step(state) == 3


# --- Devices ---

several_devices = pytest.mark.several_devices
STEPS = 9
DEVICES_TARGET = 3.5 * COUNT
ADAMW = promoting(devices.CLIPPED_ADAMW)


def examples(steps, **options):
    return jax.device_get(devices.examples(steps, **options))


def counts(mask):
    """The weight of every micro-step, over all devices."""
    return mask.sum(1).tolist()


def global_batches_of_examples(inner, x, mask, windows):
    """Plain Optax, on the examples of all devices together.

    One program for all windows: it gets every example, and which of them are meant.
    """
    examples = np.nan_to_num(x).reshape(-1, x.shape[-1])

    @jax.jit
    def update(params, state, mask):
        grads = jax.grad(devices.loss)(params, jnp.asarray(examples), mask)
        updates, state = inner.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params, state = devices.PARAMS, jax.jit(inner.init)(devices.PARAMS)
    for window in windows:
        is_meant = np.isin(np.arange(len(mask)), window)[:, None]
        params, state = update(params, state, np.ravel(mask & is_meant))
    return params


def everywhere(x):
    """A value that all devices must have."""
    assert len(np.unique(np.asarray(x))) == 1
    return np.asarray(x).ravel()[0]


@several_devices
@pytest.mark.parametrize(
    "way", [slow("pmap"), pytest.param("checked", marks=core), slow("unchecked")]
)
@pytest.mark.parametrize("update", ["update_params", slow("update")])
@pytest.mark.parametrize("takes", ["gradients", slow("pullbacks")])
@pytest.mark.parametrize("is_scheduled", [slow(False), True])
def test_windows_of_all_devices_end_by_their_weight(way, update, takes, is_scheduled):
    """Uneven weights, and a device with nothing but NaN in every micro-step."""
    x, mask = examples(STEPS)
    target: Any = DEVICES_TARGET
    if is_scheduled:
        target = optax.linear_schedule(1.5 * COUNT, 4.5 * COUNT, 2)
    tx = oa.accumulate(ADAMW, oa.by_weight(target), axis_name=AXIS)
    step, (params, state) = devices.windows(way, tx, update, takes)
    ends = []
    for i in range(STEPS):
        batch = devices.whole(way, (x[i], mask[i]))
        params, state = step(params, state, *batch, None)
        ends.append(everywhere(oa.has_updated(state)))
    windows = windows_of(counts(mask), target)
    assert np.flatnonzero(ends).tolist() == [window[-1] for window in windows]
    assert len({len(window) for window in windows}) > 1 or not is_scheduled
    assert everywhere(oa.gradient_step(state)) == len(windows) > 1
    close(
        devices.result(way, params),
        global_batches_of_examples(ADAMW, x, mask, windows),
    )


@several_devices
@pytest.mark.slow
@pytest.mark.parametrize("kind", [AUTO, EXPLICIT])
@pytest.mark.parametrize("scatter", [pytest.param(False, marks=core), True])
def test_windows_of_rows_end_by_their_weight(kind, scatter):
    """From plain `jax.jit`, on a mesh."""
    x, mask = examples(STEPS)
    every_k = oa.by_weight(DEVICES_TARGET)
    tx, step = devices.rows(ADAMW, every_k, devices.mesh(kind), scatter=scatter)
    params = jax.device_put(
        jax.tree.map(np.asarray, devices.PARAMS), NamedSharding(devices.mesh(kind), P())
    )
    state, ends = tx.init(params), []
    for i in range(STEPS):
        params, state = jax.block_until_ready(step(params, state, x[i], mask[i]))
        ends.append(bool(oa.has_updated(state)))
    windows = windows_of(counts(mask), DEVICES_TARGET)
    assert np.flatnonzero(ends).tolist() == [window[-1] for window in windows]
    close(jax.device_get(params), global_batches_of_examples(ADAMW, x, mask, windows))


def program_inside(way, every_k, update, **static):
    """A compiled micro-step."""
    tx = oa.accumulate(ADAMW, every_k, axis_name=AXIS)
    return devices.window_program(way, tx, update, **static)


def assert_exchanges_one_number(program):
    """In every micro-step, and the rest in the boundary's branch."""
    assert hlo.exchanges(program) == {"all-reduce, entry": 1, "all-reduce, branch": 1}
    (number,) = [x for x in hlo.collectives(program) if x.place == "entry"]
    assert number.nbytes == 4


@several_devices
@pytest.mark.parametrize(
    "way", [slow("pmap"), pytest.param("checked", marks=core), slow("unchecked")]
)
@pytest.mark.parametrize("update", ["update_params", slow("update")])
def test_every_micro_step_exchanges_one_number(way, update):
    assert_exchanges_one_number(program_inside(way, oa.by_weight(10), update))


@pytest.mark.slow
@several_devices
@pytest.mark.parametrize("way", devices.INSIDE)
@pytest.mark.parametrize("update", WAYS)
def test_on_devices_there_is_as_little_memory_as_by_count(way, update):
    by_weight, by_count = (
        program_inside(way, every_k, update) for every_k in (oa.by_weight(10), 3)
    )
    assert hlo.temporaries(by_weight) <= hlo.temporaries(by_count) + 1024
    copies = [
        hlo.large_copies(x, devices.LARGE["w"].size) for x in (by_weight, by_count)
    ]
    assert copies[0] == copies[1]


@several_devices
@pytest.mark.parametrize("boundary", [slow(True), False])
def test_a_boundary_of_the_caller_needs_no_number(boundary):
    every_k = oa.by_weight(10)
    program = program_inside("checked", every_k, "update_params", boundary=boundary)
    places = {place.split(", ")[1] for place in hlo.exchanges(program)}
    assert sum(hlo.exchanges(program).values()) == boundary
    assert places == ({"entry"} if boundary else set())


@pytest.mark.slow
@several_devices
@pytest.mark.parametrize("kind", [pytest.param(AUTO, marks=core), EXPLICIT])
def test_every_micro_step_on_rows_exchanges_one_number(kind):
    mesh = devices.mesh(kind)
    tx, step = devices.rows(ADAMW, oa.by_weight(DEVICES_TARGET), mesh)
    params = jax.device_put(devices.PARAMS, NamedSharding(mesh, P()))
    batch = jax.device_put(
        tuple(a[0] for a in devices.examples(1)), NamedSharding(mesh, P(AXIS))
    )
    assert_exchanges_one_number(optimized(step.lower(params, tx.init(params), *batch)))


@pytest.mark.slow
@several_devices
@pytest.mark.skipif(COUNT < 3, reason="needs 3 devices")
@pytest.mark.parametrize("number", [100, 1])
@pytest.mark.parametrize("jitted", [True, False])
def test_three_devices_share_a_number(number, jitted):
    """Of which a third is rounded: ten of 3 · (1 / 3) are a little less than ten."""
    mesh = Mesh(jax.devices()[:3], (AXIS,))
    options = {"mesh": mesh, "axis_name": AXIS}
    tx = oa.accumulate(SGD, oa.by_weight(10 * number), **options)
    grads = jax.tree.map(lambda p: jnp.stack([p] * 3), PARAMS)
    step: Any = functools.partial(stepper(tx), weight=number)
    step = jax.jit(step) if jitted else step
    params, state, ends = PARAMS, tx.init(PARAMS), []
    for _ in range(30):
        params, state = jax.block_until_ready(step(params, state, grads))
        ends.append(bool(oa.has_updated(state)))
    assert ends == ([False] * 9 + [True]) * 3


@pytest.mark.slow
@several_devices
@pytest.mark.skipif(COUNT % 4 != 0, reason="needs 4, 8, ... devices")
def test_windows_over_two_axes_end_by_the_weight_of_both():
    mesh = jax.make_mesh((2, COUNT // 2), ("a", "b"), axis_types=(AUTO, AUTO))
    tx = oa.accumulate(SGD, oa.by_weight(COUNT), axis_name=("a", "b"))
    state = oa.sharding.stack_windows(tx.init(PARAMS), COUNT)

    @jax.jit
    def step(state, weight):
        specs = oa.sharding.window_specs(state, ("a", "b"))

        def inside(state, weight):
            return tx.update(PARAMS, state, PARAMS, weight=weight[0])[1]

        return jax.shard_map(
            inside,
            mesh=mesh,
            in_specs=(specs, P(("a", "b"))),
            out_specs=specs,
            check_vma=False,
        )(state, weight)

    ends = []
    for total in (COUNT - 1, 1, COUNT):
        weight = jnp.zeros(COUNT).at[total % COUNT].set(total)
        state = jax.block_until_ready(step(state, weight))
        ends.append(bool(oa.has_updated(state)))
    assert ends == [False, True, True]


@core
@several_devices
@pytest.mark.skipif(COUNT < 4, reason="needs 4 devices")
@pytest.mark.parametrize("number", [2, slow(1)])
def test_a_window_left_open_continues_on_other_devices(number):
    """It ends at its target on any number of them, whatever `micro_step` counts."""
    x, mask = examples(7, count=4)
    x = np.nan_to_num(x)
    windows = windows_of(counts(mask), 17)
    moment = windows[1][0] + 1
    assert moment <= windows[1][-1]  # Inside the second window.

    def run(mesh, params, state, micro_steps):
        tx, step = devices.rows(SGD, oa.by_weight(17), mesh)
        place = NamedSharding(mesh, P())
        params = jax.device_put(jax.tree.map(np.array, params), place)
        if state is None:
            state = tx.init(params)
        else:
            one = oa.sharding.sum_windows(state, rescale=False)
            assert oa.micro_step(one) == 1
            state = oa.sharding.stack_windows(one, mesh.size, rescale=False)
            specs = oa.sharding.window_specs(state, AXIS)
            places = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
            state = jax.device_put(jax.device_get(state), places)
        ends = []
        for i in micro_steps:
            params, state = jax.block_until_ready(step(params, state, x[i], mask[i]))
            ends.append(bool(oa.has_updated(state)))
        return params, state, ends

    meshes = [Mesh(jax.devices()[:count], (AXIS,)) for count in (4, number)]
    *saved, before = run(meshes[0], devices.PARAMS, None, range(moment))
    params, _, after = run(meshes[1], *jax.device_get(saved), range(moment, 7))
    assert np.flatnonzero(before + after).tolist() == [w[-1] for w in windows]
    close(jax.device_get(params), global_batches_of_examples(SGD, x, mask, windows))


@pytest.mark.slow
@several_devices
def test_a_device_that_skips_brings_no_weight_in():
    x, mask = examples(4)
    x, mask = np.nan_to_num(x, nan=1.0), np.ones_like(mask)
    x[0, :3] = np.nan  # All that the first device has.
    each = 3 * COUNT
    every_k = oa.by_weight(2 * each)
    tx = oa.accumulate(ADAMW, every_k, axis_name=AXIS, skip=oa.skip_not_finite)
    step, (params, state) = devices.windows("checked", tx)
    ends = []
    for i in range(4):
        params, state = step(params, state, x[i], mask[i], None)
        ends.append(bool(oa.has_updated(state)))
    assert ends == [False, False, True, False]
    mask[0, :3] = False
    close(params, global_batches_of_examples(ADAMW, x, mask, [[0, 1, 2]]))


# --- Flax ---


CHAINED = {
    "alone": lambda tx: tx,
    "chain": lambda tx: promoting(optax.chain(optax.identity(), tx)),
}


class Model(nnx.Module):
    """`PARAMS` as an NNX module."""

    def __init__(self):
        self.w, self.b = nnx.Param(PARAMS["w"]), nnx.Param(PARAMS["b"])


def test_a_linen_train_state_ends_windows_by_weight():
    tx = oa.accumulate(SGD, oa.by_weight(TARGET))
    state = oaf.TrainState.create(apply_fn=None, params=PARAMS, tx=tx)

    @jax.jit
    def step(state, weight):
        return state.apply_gradients(grads=PARAMS, weight=weight)

    ends = []
    for weight in TOKENS:
        state = step(state, weight)
        ends.append(bool(state.has_updated))
    assert np.flatnonzero(ends).tolist() == [2, 4, 5, 9]


def test_an_nnx_optimizer_ends_windows_by_weight():
    model = Model()
    tx = oa.accumulate(SGD, oa.by_weight(TARGET))
    optimizer = oaf.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, weight):
        optimizer.update(model, nnx.state(model, nnx.Param), weight=weight)

    ends = []
    for weight in TOKENS:
        step(model, optimizer, weight)
        ends.append(bool(optimizer.has_updated))
    assert np.flatnonzero(ends).tolist() == [2, 4, 5, 9]


@pytest.mark.usefixtures("loose_promotion")
@pytest.mark.parametrize("wrap", CHAINED)
def test_flax_tells_of_a_forgotten_weight(wrap):
    tx = CHAINED[wrap](oa.accumulate(SGD, oa.by_weight(8)))
    state = oaf.TrainState.create(apply_fn=None, params=PARAMS, tx=tx)
    with pytest.raises(ValueError, match=saying(*NO_WEIGHT)):
        state.apply_gradients(grads=PARAMS)
    model = Model()
    optimizer = oaf.Optimizer(model, tx, wrt=nnx.Param)
    with pytest.raises(ValueError, match=saying(*NO_WEIGHT)):
        optimizer.update(model, nnx.state(model, nnx.Param))


def test_that_flax_keeps_the_weight_to_itself_is_told():
    tx = oa.accumulate(SGD, oa.by_weight(8))
    state = train_state.TrainState.create(apply_fn=None, params=PARAMS, tx=tx)
    with pytest.raises(ValueError, match=saying(*NO_WEIGHT, "accum.flax.TrainState")):
        state.apply_gradients(grads=PARAMS, weight=3)


def test_flax_gives_no_weight_to_others_unless_there_is_one():
    """A transformation before `oa.accumulate` keeps its own default."""
    seen = []

    def update(updates, state, params=None, *, weight=3, **others):
        del params, others
        seen.append(weight)
        return updates, state

    before = optax.GradientTransformationExtraArgs(lambda _: (), update)
    tx = optax.chain(before, oa.accumulate(SGD, 2))
    state = oaf.TrainState.create(apply_fn=None, params=PARAMS, tx=tx)
    state = state.apply_gradients(grads=PARAMS)
    state.apply_gradients(grads=PARAMS, weight=5)
    assert seen == [3, 5]


# --- Errors ---


@pytest.mark.parametrize("jitted", [True, False])
@pytest.mark.parametrize(
    ("wrap", "way", "given"),
    [
        ("alone", "update_params", {}),
        ("alone", "update", {"boundary": True}),
        ("chain", "update", {}),
    ],
)
def test_a_forgotten_weight_is_told(wrap, way, given, jitted):
    tx = CHAINED[wrap](oa.accumulate(SGD, oa.by_weight(TARGET)))
    step: Any = functools.partial(stepper(tx, way), **given)
    step = jax.jit(step) if jitted else step
    with pytest.raises(ValueError, match=saying(*NO_WEIGHT)):
        step(PARAMS, tx.init(PARAMS), PARAMS)


@pytest.mark.parametrize("target", [0, np.inf])
def test_a_target_is_positive_and_finite(target):
    with pytest.raises(ValueError, match=saying(*BAD_TARGET)):
        oa.by_weight(target)


@pytest.mark.parametrize(
    "target", [jnp.array(1000), oa.by_weight(1000)], ids=["array", "by_weight"]
)
def test_a_target_is_a_number_or_a_schedule(target):
    with pytest.raises(TypeError, match=saying(*BAD_TARGET)):
        oa.by_weight(target)


def test_a_schedule_returns_one_real_number():
    tx = oa.accumulate(SGD, oa.by_weight(lambda _: jnp.ones(2)))
    with pytest.raises(TypeError, match=saying("`target` as a schedule", "shape (2,)")):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, weight=1)


@pytest.mark.parametrize("every_k", [1000.0, 1e6, np.float32(1000), "1000"])
def test_a_float_as_every_k_is_told_of_by_weight(every_k):
    with refused("`every_k` must be an int >= 1", "oa.by_weight(...)", "got"):
        oa.accumulate(SGD, every_k=every_k)


def test_by_weight_without_its_target_is_told():
    tx = oa.accumulate(SGD, oa.by_weight)
    with refused("`target` must be a positive number", "schedule"):
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, weight=1)
