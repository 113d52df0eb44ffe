"""Equinox models: static leaves, filtered gradients, donation, files."""

import functools
from collections.abc import Callable
from typing import Any

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_accum as oa
from tests.support import hlo
from tests.support.training import slow
from tests.support.xla import optimized

pytestmark = pytest.mark.usefixtures("loose_promotion")
is_trained = eqx.is_inexact_array


class Network(eqx.Module):
    """Arrays that are trained and one that is not, functions, a number, a None."""

    layers: list
    activation: Callable
    dropout: eqx.nn.Dropout
    offsets: jax.Array
    scale: float
    nothing: None = None

    def __init__(self, key, width=8):
        first, second = jax.random.split(key)
        self.layers = [
            eqx.nn.Linear(4, width, key=first),
            eqx.nn.Linear(width, 2, use_bias=False, key=second),
        ]
        self.activation = jnp.tanh
        self.dropout = eqx.nn.Dropout(0.3)
        self.offsets = jnp.arange(4)
        self.scale = 2.0

    def __call__(self, x, key):
        first, second = self.layers
        x = self.activation(first(x + self.offsets))
        return self.scale * second(self.dropout(x, key=key))


def loss_fn(model, batch):
    x, y, keys = batch
    return jnp.mean((jax.vmap(model)(x, keys) - y) ** 2)


def batch_of(count, seed):
    """Inputs, outputs, and for each example a key."""
    random = np.random.default_rng(seed)
    x, y = random.normal(size=(count, 4)), random.normal(size=(count, 2))
    keys = jax.random.split(jax.random.key(seed), count)
    return jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32), keys


SIZES = (3, 3, 1)  # of the micro-batches of one window
WINDOWS = [batch_of(sum(SIZES), seed) for seed in range(3)]
INNER = optax.adamw(1e-2, weight_decay=0.1)


def parts(batch):
    """A window's micro-batches."""
    start = 0
    for size in SIZES:
        yield jax.tree.map(lambda x: x[start : start + size], batch)  # noqa: B023
        start += size


@pytest.fixture
def model():
    return Network(jax.random.key(0))


def trained(model):
    return eqx.filter(model, is_trained)


@functools.cache
def in_global_batches():
    """The model after every window, by Equinox and Optax alone."""

    @eqx.filter_jit
    def step(model, state, batch):
        grads = eqx.filter_grad(loss_fn)(model, batch)
        updates, state = INNER.update(grads, state, trained(model))
        return eqx.apply_updates(model, updates), state

    model = Network(jax.random.key(0))
    state, models = INNER.init(trained(model)), []
    for batch in WINDOWS:
        model, state = step(model, state, batch)
        models.append(model)
    return models


WHOLE = oa.accumulate(INNER)
COUNTED = oa.accumulate(INNER, len(SIZES))


@functools.cache  # the tests share what they compile
def stepper(tx, way="update_params", donate="none"):
    """``step(batch, model, state, boundary=None) -> (model, state)``."""

    @eqx.filter_jit(donate=donate)
    def step(batch, model, state, boundary=None):
        loss, grads = eqx.filter_value_and_grad(loss_fn)(model, batch)
        params, static = eqx.partition(model, is_trained)
        arguments = {"weight": len(batch[0]), "boundary": boundary, "value": loss}
        if way == "update_params":
            params, state = tx.update_params(grads, state, params, **arguments)
            return eqx.combine(params, static), state
        updates, state = tx.update(grads, state, params, **arguments)
        return eqx.apply_updates(model, updates), state

    return step


@pytest.mark.parametrize(
    ("way", "donate"), [("update", "none"), ("update_params", "all-except-first")]
)
def test_across_steps_training_equals_global_batches(model, way, donate):
    step, state = stepper(WHOLE, way, donate), WHOLE.init(trained(model))
    for batch, expected in zip(WINDOWS, in_global_batches(), strict=True):
        for part, boundary in oa.with_boundaries(parts(batch)):
            model, state = step(part, model, state, boundary)
        chex.assert_trees_all_close(trained(model), trained(expected), rtol=2e-5)
        np.testing.assert_allclose(state.window.weight, sum(SIZES))
    assert model.activation is jnp.tanh
    np.testing.assert_array_equal(model.offsets, jnp.arange(4))


def test_the_boundary_under_filter_jit_may_be_counted_or_traced(model):
    expected = in_global_batches()[0]
    for tx, traced in ((COUNTED, False), (WHOLE, True)):
        now = model, tx.init(trained(model))
        for part, is_last in oa.with_boundaries(parts(WINDOWS[0])):
            now = stepper(tx)(part, *now, jnp.array(is_last) if traced else None)
        chex.assert_trees_all_close(trained(now[0]), trained(expected), rtol=2e-5)


@pytest.mark.parametrize(
    "options", [slow({"num_microbatches": 7}), {"microbatch_size": 3}]
)
def test_in_one_step_training_equals_global_batches(model, options):
    @eqx.filter_jit
    def step(model, state, batch):
        params, static = eqx.partition(model, is_trained)

        def loss_of(params, batch):
            return loss_fn(eqx.combine(params, static), batch)

        loss, grads = oa.value_and_grad(loss_of, **options)(params, batch)
        updates, state = INNER.update(grads, state, params)
        return eqx.apply_updates(model, updates), state, loss

    state = INNER.init(trained(model))
    for batch, expected in zip(WINDOWS, in_global_batches(), strict=True):
        before = loss_fn(model, batch)
        model, state, loss = step(model, state, batch)
        np.testing.assert_allclose(loss, before, rtol=1e-5)
        chex.assert_trees_all_close(trained(model), trained(expected), rtol=2e-5)


def named_loss(model, batch):
    """Of a model with names among its leaves, and with Python's numbers."""
    named, _ = model
    return loss_fn(named, batch)


@pytest.mark.parametrize(
    "options",
    [
        {"num_microbatches": 8},
        {"microbatch_size": 3, "skip": oa.skip_not_finite, "noise_scale": True},
        {"num_microbatches": 2, "mesh": True},
        slow({"num_microbatches": 2, "mesh": True, "scatter": True}),
    ],
)
def test_a_whole_model_is_differentiated_as_by_equinox(options):
    model = Network(jax.random.key(0)), {"name": "net", "on": True, "rate": 0.1}
    batch = batch_of(16, 0)
    if options.get("mesh"):
        mesh = jax.make_mesh((jax.device_count(),), ("data",))
        options = options | {"mesh": mesh, "axis_name": "data"}
    wanted = eqx.filter_jit(eqx.filter_value_and_grad(named_loss))(model, batch)
    got = eqx.filter_jit(oa.value_and_grad(named_loss, **options))(model, batch)
    got = got[0] if "skip" in options else got
    chex.assert_trees_all_equal_shapes_and_dtypes(got, wanted)
    chex.assert_trees_all_close(got, wanted, rtol=1e-5, atol=1e-6)
    assert got[1][0].scale is None
    assert got[1][1]["rate"] is None


def test_a_model_of_which_all_leaves_are_arrays_is_differentiated_as_by_jax(model):
    """Without a leaf that JAX refuses, integers raise and numbers have a gradient."""

    def loss(model, batch):
        return jnp.mean(model["layer"](batch[0][0]) ** 2) * model["scale"]

    layer = {"layer": model.layers[1], "scale": 2.0}
    batch = (jnp.ones((4, 8)),)
    wanted = jax.value_and_grad(loss)(layer, batch)
    got = jax.jit(oa.value_and_grad(loss, num_microbatches=2))(layer, batch)
    chex.assert_trees_all_close(got, wanted, rtol=1e-6)
    with pytest.raises(TypeError, match="real- or complex-valued inputs"):
        oa.value_and_grad(loss, num_microbatches=2)(layer | {"scale": 2}, batch)


def test_windows_take_the_gradient_of_a_whole_model(model):
    """Each micro-step runs micro-batches of its own; together they are one batch."""
    gradient = oa.value_and_grad(loss_fn, microbatch_size=1, return_info=True)

    @eqx.filter_jit
    def step(batch, model, state):
        (loss, grads), info = gradient(model, batch)
        params, static = eqx.partition(model, is_trained)
        params, state = COUNTED.update_params(
            grads, state, params, weight=info.weight, value=loss
        )
        return eqx.combine(params, static), state

    state = COUNTED.init(trained(model))
    for part in parts(WINDOWS[0]):
        model, state = step(part, model, state)
    chex.assert_trees_all_close(
        trained(model), trained(in_global_batches()[0]), rtol=2e-5
    )


def test_a_whole_model_is_checked_for_equivalence(model):
    report = oa.diagnose.check_equivalence(loss_fn, model, batch_of(8, 0), 4)
    assert report, str(report)


def test_static_leaves_have_neither_accumulator_nor_gradient(model):
    grads = eqx.filter_jit(eqx.filter_grad(loss_fn))(model, WINDOWS[0])
    assert grads.activation is None
    assert grads.offsets is None
    tx = oa.accumulate(INNER, 2)
    state = tx.init(trained(model))
    assert state.window.grads.activation is None
    assert state.window.grads.offsets is None
    updates, state = tx.update(grads, state, trained(model))
    chex.assert_trees_all_equal_structs(
        trained(model), updates, state.window.grads, oa.accumulated(state)
    )


def test_a_part_of_the_model_can_be_trained_alone(model):
    """A specification in place of a predicate, as for fine-tuning."""
    spec = jax.tree.map(lambda _: False, model)
    spec = eqx.tree_at(lambda m: m.layers[1].weight, spec, True)
    params, rest = eqx.partition(model, spec)

    @jax.jit
    def gradient(params, batch):
        def loss_of(params):
            return loss_fn(eqx.combine(params, rest), batch)

        return jax.grad(loss_of)(params)

    inner = optax.sgd(0.1)
    tx = oa.accumulate(inner, len(SIZES))
    now, state = params, tx.init(params)
    assert [x.shape for x in jax.tree.leaves(state.window.grads)] == [(2, 8)]
    for part in parts(WINDOWS[0]):
        grads = gradient(now, part)
        now, state = tx.update_params(grads, state, now, weight=len(part[0]))
    updates, _ = inner.update(gradient(params, WINDOWS[0]), inner.init(params))
    chex.assert_trees_all_close(now, eqx.apply_updates(params, updates), rtol=2e-5)


@pytest.mark.parametrize("boundary", [None, slow(False)])
def test_a_donated_window_is_free_of_temporaries_and_copies(boundary):
    params = trained(Network(jax.random.key(0), width=4096))
    tx = oa.accumulate(optax.adamw(1e-3), None if boundary is False else 4)
    state = tx.init(params)

    def step(grads, params, state, boundary):
        return tx.update_params(grads, state, params, weight=3, boundary=boundary)

    def compiled(donate):
        step_: Any = eqx.filter_jit(step, donate=donate)
        return optimized(step_.lower(params, params, state, boundary).lowered)

    program, size = compiled("all-except-first"), hlo.nbytes(params)
    assert hlo.temporaries(program) < 0.01 * size
    assert hlo.large_copies(program, 2 * 4096) == []
    assert program.memory_analysis().alias_size_in_bytes > 3.99 * size  # and moments
    assert compiled("none").memory_analysis().alias_size_in_bytes == 0


def test_a_python_boundary_is_static_and_leaves_no_branch(model):
    state = WHOLE.init(trained(model))
    for boundary, branches in ((True, 0), (False, 0), (jnp.array(True), 1)):
        lowered = stepper(WHOLE).lower(WINDOWS[0], model, state, boundary)
        assert lowered.as_text().count("stablehlo.case") == branches


@pytest.mark.parametrize("seen", range(1, len(SIZES)))
def test_a_model_saved_inside_a_window_resumes_with_the_same_bits(
    model, seen, tmp_path
):
    step = stepper(COUNTED)
    batches = [part for batch in WINDOWS[:2] for part in parts(batch)]
    saved_at = len(SIZES) + seen
    now = model, COUNTED.init(trained(model))
    for i, part in enumerate(batches):
        if i == saved_at:
            assert oa.micro_step(now[1]) == seen
            eqx.tree_serialise_leaves(tmp_path / "training.eqx", now)
        now = step(part, *now)

    fresh = Network(jax.random.key(9))
    template = fresh, COUNTED.init(trained(fresh))
    read = eqx.tree_deserialise_leaves(tmp_path / "training.eqx", template)
    for part in batches[saved_at:]:
        read = step(part, *read)
    assert eqx.tree_equal(read, now)
    assert oa.gradient_step(read[1]) == 2


class Normalised(eqx.Module):
    """A layer and BatchNorm, whose statistics are in a state beside the model."""

    layer: eqx.nn.Linear
    norm: eqx.nn.BatchNorm

    def __init__(self, key):
        self.layer = eqx.nn.Linear(4, 2, key=key)
        self.norm = eqx.nn.BatchNorm(2, axis_name="batch", mode="batch")

    def __call__(self, x, statistics):
        return self.norm(self.layer(x), statistics)


def normalised_loss(model, batch, statistics):
    forward = jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
    prediction, statistics = forward(batch[0], statistics)
    return jnp.mean((prediction - batch[1]) ** 2), statistics


def test_batch_norm_statistics_carry_over_across_steps():
    model, statistics = eqx.nn.make_with_state(Normalised)(jax.random.key(0))

    @eqx.filter_jit
    def step(batch, model, state, statistics):
        gradient = eqx.filter_grad(normalised_loss, has_aux=True)
        grads, statistics = gradient(model, batch, statistics)
        params, static = eqx.partition(model, is_trained)
        params, state = COUNTED.update_params(
            grads, state, params, weight=len(batch[0])
        )
        return eqx.combine(params, static), state, statistics

    forward = eqx.filter_jit(normalised_loss)
    now = model, COUNTED.init(trained(model)), statistics
    expected = statistics
    for part in parts(WINDOWS[0]):
        now = step(part, *now)
        _, expected = forward(model, part, expected)
    assert oa.has_updated(now[1])
    chex.assert_trees_all_close(
        jax.tree.leaves(now[2]), jax.tree.leaves(expected), rtol=1e-5
    )


def test_batch_norm_statistics_are_a_carry_in_one_step():
    model, statistics = eqx.nn.make_with_state(Normalised)(jax.random.key(0))
    params, static = eqx.partition(model, is_trained)

    def loss_of(params, batch, statistics):
        return normalised_loss(eqx.combine(params, static), batch, statistics)

    batch = WINDOWS[0][:2]
    f = oa.value_and_grad(loss_of, microbatch_size=3, carry_argnum=2)
    (_, after), _ = eqx.filter_jit(f)(params, batch, statistics)
    forward = eqx.filter_jit(normalised_loss)
    for part in parts(batch):
        _, statistics = forward(model, part, statistics)
    chex.assert_trees_all_close(
        jax.tree.leaves(after), jax.tree.leaves(statistics), rtol=1e-5
    )
