"""Dtypes and leaves: what is summed in what, and what passes through."""

import functools
from typing import ClassVar

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_accum as oa
from tests.support import catalogue
from tests.support.training import (
    ADAM,
    SGD,
    WAYS,
    alone,
    feed,
    micro_batches,
    promoting,
    slow,
    stepper,
)

FLOAT16 = slow(jnp.float16)


def test_bfloat16_ones_sum_exactly():
    """In bfloat16 itself they would sum to 256 and stay there."""
    count = 4096
    tx = oa.accumulate(optax.identity(), count, reduction="sum")
    one = jnp.ones(3, jnp.bfloat16)

    def body(state, _):
        updates, state = tx.update(one, state, one)
        return state, updates

    _, updates = jax.lax.scan(body, tx.init(one), length=count)
    assert updates.dtype == jnp.bfloat16
    np.testing.assert_array_equal(updates[-1].astype(jnp.float32), count)


@pytest.mark.parametrize(
    ("own", "accumulator"),
    [
        (jnp.bfloat16, jnp.float32),
        (jnp.float16, jnp.float32),
        (jnp.float8_e4m3fn, jnp.float32),
        (jnp.float32, jnp.float32),
        (jnp.complex64, jnp.complex64),
    ],
)
def test_the_accumulator_is_at_least_float32(own, accumulator):
    state = oa.accumulate(optax.identity(), 2).init(jnp.zeros(3, own))
    assert state.window.grads.dtype == accumulator
    assert state.window.weight.dtype == state.window.loss.dtype == jnp.float32


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("dtype", [jnp.float64, jnp.complex128])
def test_double_precision_is_kept(dtype):
    """Sums, weights and result, to the last digits."""
    tx = oa.accumulate(SGD, 3)
    params = jnp.ones(4, dtype)
    random = np.random.default_rng(0)
    grads = [jnp.asarray(random.normal(size=4), dtype) for _ in range(3)]
    weights = [0.1, 0.2, 0.7]
    state = tx.init(params)
    assert state.window.grads.dtype == dtype
    assert state.window.weight.dtype == jnp.float64
    result = params
    for g, w in zip(grads, weights, strict=True):
        result, state = tx.update_params(g, state, result, weight=w)
    mean = sum(g * w for g, w in zip(grads, weights, strict=True)) / sum(weights)
    np.testing.assert_allclose(result, params - 0.1 * mean, rtol=1e-14)


@pytest.mark.parametrize("way", WAYS)
def test_complex_gradients_are_weighted(way):
    params = jnp.array([1 + 2j, 3 - 1j], jnp.complex64)
    grads = [params * (1 + 1j), params * 2j]
    weights = [jnp.float32(1), jnp.float32(3)]
    tx = oa.accumulate(SGD, 2)
    batches = [(g, {"weight": w}) for g, w in zip(grads, weights, strict=True)]
    result, _ = feed(tx, batches, way, params)
    expected = params - 0.1 * (grads[0] + 3 * grads[1]) / 4
    np.testing.assert_allclose(result, expected, rtol=1e-6)


@pytest.mark.parametrize("way", ["update_params", slow("update")])
@pytest.mark.parametrize("grads_dtype", [FLOAT16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("params_dtype", [FLOAT16, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("inner", [slow(SGD), ADAM], ids=["sgd", "adam"])
def test_updates_and_state_have_the_inner_optimizers_dtypes(
    inner, params_dtype, grads_dtype, way
):
    inner = promoting(inner)
    params = {"w": jnp.ones((2, 3), params_dtype)}
    grads = {"w": jnp.full((2, 3), 0.5, grads_dtype)}
    tx = oa.accumulate(inner, 2)
    state = tx.init(params)
    alone_updates, _ = inner.update(grads, inner.init(params), params)
    for _ in range(4):
        updates, new_state = tx.update(grads, state, params)
        chex.assert_trees_all_equal_dtypes(updates, alone_updates)
        chex.assert_trees_all_equal_dtypes(new_state, state)
        with jax.numpy_dtype_promotion("standard"):
            params, state = stepper(tx, way)(params, state, grads)
        assert params["w"].dtype == params_dtype
    chex.assert_trees_all_equal_dtypes(state.inner_state, inner.init(params))


@pytest.mark.filterwarnings("ignore:.*is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:scatter inputs have incompatible:FutureWarning")
@pytest.mark.slow
@pytest.mark.parametrize("name", catalogue.optimizers())
def test_any_optimizer_takes_bfloat16_parameters(name):
    """Also those that do not take gradients wider than their moments."""
    inner = promoting(catalogue.optimizers()[name]())
    tx = oa.accumulate(inner, 2)
    params = catalogue.example_params(jnp.bfloat16)

    def loss(params):
        return sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in jax.tree.leaves(params))

    def step(update, state, value):
        extra = catalogue.extra_args(name, loss, params, params, value)
        return update(params, state, params, **extra)

    value = jax.ShapeDtypeStruct((), jnp.float32)
    state, inner_state = (jax.eval_shape(t.init, params) for t in (tx, inner))
    updates, after = jax.eval_shape(functools.partial(step, tx.update), state, value)
    alone, _ = jax.eval_shape(functools.partial(step, inner.update), inner_state, value)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, alone)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


@pytest.mark.parametrize("way", WAYS)
def test_the_inner_optimizer_computes_in_the_accumulators_dtype(way):
    """An update that bfloat16 would lose on the way."""

    def update(updates, state, params=None):
        del params
        return jax.tree.map(lambda g: (g - 1) * 1024, updates), state

    inner = optax.GradientTransformation(lambda _: (), update)
    tx = oa.accumulate(inner, 2)
    zero, one = jnp.zeros(2, jnp.bfloat16), jnp.ones(2, jnp.bfloat16)
    # The mean is 1 + 2^-9, which rounds to 1 in bfloat16.
    batches = [(one, {}), (one + jnp.bfloat16(2**-7), {"weight": 1 / 3})]
    result, _ = feed(tx, batches, way, zero)
    np.testing.assert_allclose(result.astype(jnp.float32), 2.0, rtol=1e-2)


def test_a_requested_accumulator_dtype_is_used():
    tx = oa.accumulate(SGD, 2, accumulator_dtype=jnp.bfloat16)
    params = jnp.zeros(3)
    state = tx.init(params)
    for _ in range(3):
        assert state.window.grads.dtype == jnp.bfloat16
        params, state = tx.update_params(jnp.ones(3), state, params)
    np.testing.assert_allclose(params, -0.1, rtol=1e-6)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("reduction", ["mean", "ratio", "sum"])
@pytest.mark.parametrize("sums_dtype", [jnp.bfloat16, jnp.float16])
def test_the_inner_optimizer_computes_in_float32_on_narrow_sums(
    sums_dtype, reduction, way
):
    """Only the sum is rounded, not the mean, nor what is computed from it."""

    def update(updates, state, params=None):
        del state, params
        return updates, jax.tree.map(lambda g: g / 3, updates)

    inner = optax.GradientTransformation(jnp.zeros_like, update)
    tx = oa.accumulate(inner, 2, reduction=reduction, accumulator_dtype=sums_dtype)
    one = jnp.ones(2)
    batches = [(one, {"weight": 1}), (0 * one, {"weight": 2})]
    _, state = feed(tx, batches, way, one)
    mean = 1 if reduction == "sum" else 1 / 3
    np.testing.assert_allclose(state.inner_state, mean / 3, rtol=1e-6)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, FLOAT16])
@pytest.mark.parametrize("closing", ["python", slow("traced weight"), slow("skip")])
def test_a_python_boundary_of_narrow_parameters_is_that_of_the_count(
    closing, dtype, way
):
    """To the bit: both compute the updates first, and the state second."""
    params = {"w": jnp.linspace(-1, 1, 6).reshape(2, 3).astype(dtype)}
    inner = promoting(optax.adamw(0.1))
    skip = oa.skip_not_finite if closing == "skip" else None
    grads, weights = micro_batches(params, 4)
    weighted = [{} if closing == "python" else {"weight": w} for w in weights]
    counted = feed(
        oa.accumulate(inner, 2, skip=skip),
        list(zip(grads, weighted, strict=True)),
        way,
        params,
    )
    closed = feed(
        oa.accumulate(inner, skip=skip),
        [
            (g, {**w, "boundary": i % 2 == 1})
            for i, (g, w) in enumerate(zip(grads, weighted, strict=True))
        ],
        way,
        params,
    )
    chex.assert_trees_all_equal(counted[0], closed[0])
    chex.assert_trees_all_equal(counted[1].inner_state, closed[1].inner_state)
    assert closed[1].gradient_step == 2


class TestPassingThrough:
    """Leaves that are not accumulated reach the inner optimizer as they came."""

    params: ClassVar = {
        "w": jnp.ones(3),
        "count": jnp.arange(3),
        "flag": jnp.array([True, False]),
        "none": None,
        "masked": optax.MaskedNode(),
        "empty": {},
        "size0": jnp.zeros((0, 2)),
    }
    float0 = np.zeros(3, jax.dtypes.float0)

    def grads(self, integer):
        scale = 2.0
        return {
            **self.params,
            "w": jnp.full(3, scale),
            "count": integer,
            "flag": np.zeros(2, jax.dtypes.float0),
        }

    def test_leaves_without_gradients_get_no_accumulator(self):
        state = oa.accumulate(optax.identity(), 2).init(self.params)
        assert state.window.grads["count"] is None
        assert state.window.grads["flag"] is None
        assert len(jax.tree.leaves(state.window.grads)) == 2

    @pytest.mark.parametrize("every_k", [1, 2])
    @pytest.mark.parametrize("integer", [float0, jnp.arange(3)])
    def test_updates_of_leaves_without_gradients_come_from_the_inner_optimizer(
        self, integer, every_k
    ):
        tx = oa.accumulate(optax.identity(), every_k)
        state = tx.init(self.params)
        grads = self.grads(integer)
        for step in range(1, 3):
            updates, state = jax.jit(tx.update)(grads, state, self.params)
            chex.assert_trees_all_equal_structs(updates, grads)
            assert updates["count"].dtype == integer.dtype
            closes = step % every_k == 0
            np.testing.assert_array_equal(updates["w"], 2.0 if closes else 0.0)
            if integer.dtype == jnp.int32:
                expected = integer if closes else jnp.zeros_like(integer)
                np.testing.assert_array_equal(updates["count"], expected)

    def test_float0_updates_leave_their_parameters_alone(self):
        """What `jax.grad(..., allow_int=True)` gives, straight into `update_params`."""

        def loss(params):
            return jnp.sum(params["w"] * params["n"].astype(jnp.float32))

        params = {"w": jnp.ones(3), "n": jnp.arange(3)}
        inner = optax.masked(SGD, {"w": True, "n": False})
        tx = oa.accumulate(inner, 2)
        state = tx.init(params)
        for _ in range(2):
            grads = jax.grad(loss, allow_int=True)(params)
            params, state = tx.update_params(grads, state, params)
        np.testing.assert_array_equal(params["n"], jnp.arange(3))
        np.testing.assert_allclose(params["w"], 1 - 0.1 * np.arange(3), rtol=1e-6)

    def test_a_none_gradient_leaves_its_parameter_alone(self):
        """An integer parameter may have None for a gradient."""
        params = {"w": jnp.ones(3), "n": jnp.arange(3)}
        tx = oa.accumulate(SGD, 1)
        params, _ = tx.update_params(
            {"w": jnp.ones(3), "n": None}, tx.init(params), params
        )
        np.testing.assert_array_equal(params["n"], jnp.arange(3))

    def test_a_tree_without_any_gradient_still_closes_its_window(self):
        tx = oa.accumulate(SGD, 2)
        params: dict = {"none": None, "empty": {}}
        state = tx.init(params)
        for _ in range(2):
            params, state = tx.update_params(params, state, params)
        assert state.gradient_step == 1


@pytest.mark.parametrize("way", WAYS)
def test_a_tree_of_several_dtypes_sums_each_leaf_in_its_own(way):
    params = {
        "half": jnp.ones(2, jnp.bfloat16),
        "single": jnp.ones(2),
        "complex": jnp.ones(2, jnp.complex64),
    }
    grads = [jax.tree.map(lambda p, s=s: p * s, params) for s in (1, 3)]
    tx = oa.accumulate(SGD, 2)
    result, _ = feed(tx, [(g, {}) for g in grads], way, params)
    expected, _ = alone(SGD, weighted_mean_of(grads), params=params)
    chex.assert_trees_all_close(result, expected, rtol=1e-2)
    chex.assert_trees_all_close(result["single"], expected["single"], rtol=1e-6)
    chex.assert_trees_all_equal_dtypes(result, params)


def weighted_mean_of(grads):
    return jax.tree.map(lambda *g: sum(g) / len(g), *grads)


@pytest.mark.parametrize("every_k", [1, 2])
def test_python_scalars_may_be_parameters(every_k):
    tx = oa.accumulate(SGD, every_k)
    params = {"a": 1.0}
    state = tx.init(params)
    for _ in range(every_k):
        params, state = tx.update_params({"a": 2.0}, state, params)
    np.testing.assert_allclose(params["a"], 0.8, rtol=1e-6)


def test_numpy_arrays_are_treated_as_jax_arrays():
    """float64 in NumPy is float32 here; nothing warns and nothing is refused."""
    tx = oa.accumulate(SGD, 2)
    params = {"w": np.ones(3)}
    state = tx.init(params)
    for _ in range(2):
        params, state = tx.update_params({"w": np.ones(3)}, state, params)
    assert state.window.grads["w"].dtype == jnp.float32
    np.testing.assert_allclose(params["w"], 0.9, rtol=1e-6)


def test_init_accepts_shapes():
    params = {"w": jax.ShapeDtypeStruct((2, 3), jnp.bfloat16)}
    tx = oa.accumulate(ADAM, 2, skip=oa.skip_not_finite)
    state = jax.eval_shape(tx.init, params)
    real = tx.init({"w": jnp.zeros((2, 3), jnp.bfloat16)})
    chex.assert_trees_all_equal_shapes_and_dtypes(state, real)
    assert isinstance(state, oa.AccumulateState)


def test_the_first_state_can_be_donated():
    """No array is in it twice."""
    params = {"a": jnp.ones(3), "b": jnp.ones(3)}
    tx = oa.accumulate(ADAM, 2, skip=oa.skip_not_finite)
    step = jax.jit(stepper(tx), donate_argnums=(0, 1))
    params, state = step(params, tx.init(params), {"a": jnp.ones(3), "b": jnp.ones(3)})
    assert state.micro_step == 1


@pytest.mark.parametrize("every_k", [1, 2])
def test_types_of_the_state_never_change(every_k):
    """Not even weakly: the second micro-step compiles nothing."""
    params = {"a": jnp.ones(3)}
    # A weakly typed inner state, as Python scalars make one.
    inner = optax.GradientTransformation(
        lambda _: {"scale": jnp.asarray(1.0)}, lambda u, s, _=None: (u, s)
    )
    tx = oa.accumulate(inner, every_k)
    state = tx.init(params)
    expected = jax.tree.map(jax.typeof, state)
    for _ in range(2):
        params, state = jax.jit(stepper(tx))(params, state, params)
        assert jax.tree.map(jax.typeof, state) == expected
