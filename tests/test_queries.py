"""Questions to a state, wherever it is."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import optax_accum as oa
from tests.support.training import (
    PARAMS,
    SGD,
    feed,
    micro_batches,
    promoting,
    weighted_mean,
)

GRADS, WEIGHTS = micro_batches(PARAMS, 3)
WRAPPED = {
    "bare": lambda tx: tx,
    "chain": lambda tx: optax.chain(optax.clip(1e9), tx),
    "named_chain": lambda tx: optax.named_chain(("a", optax.identity()), ("b", tx)),
    "masked": lambda tx: optax.masked(tx, {"w": True, "b": True}),
    "partition": lambda tx: optax.partition(
        {"a": tx, "b": optax.set_to_zero()}, {"w": "a", "b": "b"}
    ),
    "inject_hyperparams": lambda tx: optax.inject_hyperparams(
        lambda scale: optax.chain(optax.scale(scale), tx)
    )(scale=1.0),
    "apply_if_finite": lambda tx: optax.apply_if_finite(tx, 3),
    "flatten": optax.flatten,
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
def test_queries_find_the_state_inside_other_transformations(wrap):
    tx = promoting(wrap(oa.accumulate(SGD, 2)))
    state = tx.init(PARAMS)
    seen = []
    for g in GRADS:
        _, state = jax.jit(tx.update)(g, state, PARAMS)
        counts = (oa.micro_step(state), oa.gradient_step(state), oa.has_updated(state))
        seen.append(tuple(int(c) for c in counts))
    assert seen == [(1, 0, 0), (0, 1, 1), (1, 1, 0)]
    chex.assert_shape(oa.has_updated(state), ())
    assert oa.has_updated(state).dtype == bool


def test_queries_find_the_state_in_a_linen_train_state():
    model = nn.Dense(2)
    params = model.init(jax.random.key(0), jnp.ones((1, 3)))
    state = TrainState.create(
        apply_fn=model.apply, params=params, tx=oa.accumulate(SGD, 2)
    )
    state = state.apply_gradients(grads=params)
    assert oa.micro_step(state) == 1
    assert not oa.has_updated(state)
    state = state.apply_gradients(grads=params)
    assert oa.gradient_step(state) == 1
    assert oa.has_updated(state)


@pytest.mark.usefixtures("loose_promotion")
def test_queries_find_the_state_in_an_nnx_optimizer():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, oa.accumulate(SGD, 2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        grads = nnx.grad(lambda m: jnp.sum(m(jnp.ones((1, 3))) ** 2))(model)
        optimizer.update(model, grads)

    seen = []
    for _ in range(3):
        step(model, optimizer)
        state = optimizer.opt_state
        seen.append((int(oa.micro_step(state)), bool(oa.has_updated(state))))
    assert seen == [(1, False), (0, True), (1, False)]
    assert oa.gradient_step(optimizer.opt_state) + 1 > 1
    gradient = oa.accumulated(optimizer.opt_state)
    assert all(jnp.any(g != 0) for g in jax.tree.leaves(gradient))


def test_one_of_several_states_can_be_queried():
    tx = optax.chain(oa.accumulate(SGD, 2), oa.accumulate(SGD, 3))
    _, state = tx.update(PARAMS, tx.init(PARAMS), PARAMS)
    assert oa.micro_step(state[1]) == 1
    nested = oa.accumulate(oa.accumulate(SGD, 2), 3).init(PARAMS)
    assert oa.micro_step(nested) == 0


class TestAccumulated:
    def test_accumulated_is_zero_on_an_empty_window(self):
        """Neither before the first micro-step nor after an update."""
        tx = oa.accumulate(SGD, 2)
        zeros = jax.tree.map(jnp.zeros_like, PARAMS)
        chex.assert_trees_all_equal(oa.accumulated(tx.init(PARAMS)), zeros)
        _, state = feed(tx, [(g, {}) for g in GRADS[:2]])
        chex.assert_trees_all_equal(oa.accumulated(state), zeros)

    @pytest.mark.parametrize("reduction", ["mean", "ratio", "sum"])
    def test_accumulated_is_the_gradient_that_closing_now_would_give(self, reduction):
        tx = oa.accumulate(SGD, 8, reduction=reduction)
        pairs = zip(GRADS, WEIGHTS, strict=True)
        batches = [(g, {"weight": w}) for g, w in pairs]
        _, state = feed(tx, batches)
        gradient = oa.accumulated(state, reduction=reduction)
        zeros = jax.tree.map(jnp.zeros_like, PARAMS)
        params, _ = tx.update_params(
            zeros, state, PARAMS, weight=0.0, boundary=jnp.array(True)
        )
        stepped = jax.tree.map(lambda p, g: p - 0.1 * g, PARAMS, gradient)
        chex.assert_trees_all_close(params, stepped, rtol=1e-6)
        if reduction == "mean":
            mean = weighted_mean(GRADS, WEIGHTS)
            chex.assert_trees_all_close(gradient, mean, rtol=1e-6)

    def test_accumulated_refuses_stacked_states_and_takes_them_under_vmap(self):
        tx = oa.accumulate(SGD, 4)
        states = [feed(tx, [(g, {}) for g in GRADS[:n]])[1] for n in (1, 2)]
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *states)
        with pytest.raises(ValueError, match="is a stack of"):
            oa.accumulated(stacked)
        each = jax.vmap(oa.accumulated)(stacked)
        second = jax.tree.map(lambda x: x[1], each)
        chex.assert_trees_all_close(second, oa.accumulated(states[1]), rtol=1e-6)

    def test_accumulated_is_none_for_leaves_without_gradients(self):
        params = {"w": jnp.ones(2), "n": jnp.arange(2)}
        state = oa.accumulate(optax.identity(), 2).init(params)
        assert oa.accumulated(state)["n"] is None
        np.testing.assert_array_equal(oa.accumulated(state)["w"], 0)
