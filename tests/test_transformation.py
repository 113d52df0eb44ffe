"""What `accumulate` returns, wherever it is passed, copied and printed."""

from typing import Any

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest

import optax_accum as oa
from tests.support.training import (
    PARAMS,
    feed,
    micro_batches,
    promoting,
    stepper,
)


def sgd_init(params):
    del params
    return optax.EmptyState()


def sgd_update(updates, state, params=None):
    del params
    return jax.tree.map(lambda u: -0.1 * u, updates), state


SGD = optax.GradientTransformation(sgd_init, sgd_update)  # functions with a name
TX = oa.accumulate(SGD, every_k=2)


class Trainer(eqx.Module):
    """A module with a transformation as its field."""

    tx: oa.AccumulateTransformation


def flattened(tx):
    leaves, structure = jax.tree.flatten(tx)
    return jax.tree.unflatten(structure, leaves)


WAYS = {
    "itself": lambda tx: tx,
    "_replace": lambda tx: tx._replace(),
    "jax.tree.flatten": flattened,
    "jax.tree.map": lambda tx: jax.tree.map(lambda function: function, tx),
    "a module's field": lambda tx: flattened(Trainer(tx)).tx,
}


def two_micro_steps(tx, step):
    params, state = PARAMS, tx.init(PARAMS)
    for weight in (1.0, 3.0):
        params, state = step(params, state, weight)
    return params, state


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())
def test_update_params_survives_replace_flattening_and_mapping(way):
    def step_with(tx):
        return lambda p, s, w: tx.update_params(PARAMS, s, p, weight=w)

    tx = way(TX)
    assert isinstance(tx, oa.AccumulateTransformation)
    assert repr(tx) == repr(TX)
    chex.assert_trees_all_equal(
        two_micro_steps(tx, step_with(tx)), two_micro_steps(TX, step_with(TX))
    )


def test_a_transformation_may_be_an_argument_of_eqx_filter_jit():
    @eqx.filter_jit
    def step(params, state, weight, tx, trainer):
        params, state = tx.update_params(PARAMS, state, params, weight=weight)
        updates, state = trainer.tx.update(PARAMS, state, params, weight=weight)
        return optax.apply_updates(params, updates), state

    params, state = step(PARAMS, TX.init(PARAMS), 1.0, TX, Trainer(TX))
    assert oa.gradient_step(state) == 1
    chex.assert_trees_all_close(params, jax.tree.map(lambda p: 0.9 * p, PARAMS))


def test_a_transformation_may_be_a_static_argument_of_jit():
    step: Any = jax.jit(lambda tx, *args: tx.update_params(*args), static_argnums=0)
    _, state = step(TX, PARAMS, TX.init(PARAMS), PARAMS)
    _, state = step(flattened(TX), PARAMS, state, PARAMS)
    assert oa.has_updated(state)
    assert step._cache_size() == 1


def test_update_params_uses_a_replaced_update():
    """Nothing that was wrapped around `update` is gone around."""
    called = []

    def update(grads, state, params=None, **kwargs):
        called.append(kwargs)
        return TX.update(grads, state, params, **kwargs)

    tx = TX._replace(update=update)
    params, state = tx.update_params(PARAMS, TX.init(PARAMS), PARAMS, boundary=True)
    assert called == [{"weight": 1.0, "boundary": True, "value": None}]
    assert oa.has_updated(state)
    chex.assert_trees_all_close(params, jax.tree.map(lambda p: 0.9 * p, PARAMS))


def test_a_transformation_prints_in_one_line():
    text = repr(oa.accumulate(optax.adam(1e-3), every_k=8, reduction="ratio"))
    assert text == "accumulate(..., every_k=8, reduction='ratio', on_skip='shrink')"


def test_the_methods_have_docstrings_with_their_arguments():
    """What an editor completes, and what the API page has as headings."""
    for method in ("init", "update", "update_params"):
        assert "Args:" in getattr(oa.AccumulateTransformation, method).__doc__


# --- How often the inner optimizer is traced ---


def traces_of_one_compilation(dtype, boundary):
    traced = []

    def update(updates, state, params=None):
        traced.append(True)
        return SGD.update(updates, state, params)

    tx = oa.accumulate(optax.GradientTransformation(sgd_init, update), 2)
    params = jax.tree.map(lambda p: p.astype(dtype), PARAMS)
    state = jax.eval_shape(tx.init, params)

    def step(params, state):
        return tx.update_params(params, state, params, boundary=boundary)

    with jax.numpy_dtype_promotion("standard"):
        jax.jit(step).lower(params, state)
    return len(traced)


@pytest.mark.parametrize("boundary", [None, True])
def test_the_inner_optimizer_is_traced_once(boundary):
    assert traces_of_one_compilation(jnp.float32, boundary) == 1


def test_the_inner_optimizer_is_traced_twice_for_bfloat16_parameters():
    """The updates are computed in float32, and have the dtype that bfloat16 gives."""
    assert traces_of_one_compilation(jnp.bfloat16, None) == 2


class TestWithoutJit:
    """A loop that is not under `jax.jit` compiles once, and not at every call."""

    def counting(self):
        traces = []

        def update(updates, state, params=None, **extra_args):
            del params
            traces.append(sorted(extra_args))
            return jax.tree.map(lambda u: -u, updates), state

        inner = optax.GradientTransformationExtraArgs(
            lambda _: optax.EmptyState(), update
        )
        return inner, traces

    @pytest.mark.parametrize("way", ["update", "update_params"])
    @pytest.mark.parametrize("boundary", [None, True, False, "array"])
    def test_a_second_call_traces_nothing(self, boundary, way):
        inner, traces = self.counting()
        tx = oa.accumulate(inner, every_k=2)
        if boundary == "array":
            boundary = jnp.array(True)
        params, state, seen = PARAMS, tx.init(PARAMS), []
        for i in range(4):
            params, state = stepper(tx, way)(
                params, state, PARAMS, weight=i + 1, value=1.0, boundary=boundary
            )
            seen.append(len(traces))
        assert seen[0] == seen[-1]

    def test_the_result_is_that_of_jit(self):
        grads, weights = micro_batches(PARAMS, 4)
        tx = oa.accumulate(promoting(optax.adam(0.1)), every_k=2)
        params, state = PARAMS, tx.init(PARAMS)
        for g, w in zip(grads, weights, strict=True):
            params, state = tx.update_params(g, state, params, weight=w)
        pairs = zip(grads, weights, strict=True)
        expected = feed(tx, [(g, {"weight": w}) for g, w in pairs])
        chex.assert_trees_all_close((params, state), expected, rtol=1e-6)

    def test_a_negative_weight_is_refused_as_a_number(self):
        tx = oa.accumulate(optax.sgd(0.1), every_k=2)
        with pytest.raises(ValueError, match="`weight` must be finite and >= 0"):
            tx.update(PARAMS, tx.init(PARAMS), PARAMS, weight=-1)

    @pytest.mark.usefixtures("first_warning")
    def test_a_schedule_that_asks_for_values_works_and_warns_once(self):
        tx = oa.accumulate(optax.sgd(1.0), lambda step: 1 if step < 2 else 3)

        def train():
            params, state, updated = PARAMS, tx.init(PARAMS), []
            for _ in range(5):
                params, state = tx.update_params(PARAMS, state, params)
                updated.append(bool(oa.has_updated(state)))
            return updated

        with pytest.warns(UserWarning, match="outside of `jax.jit`") as warned:
            updated = train()
        assert len(warned) == 1
        assert updated == [True, True, False, False, True]
