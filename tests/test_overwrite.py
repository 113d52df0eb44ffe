"""Leaves that are no gradients, though `jax.grad` returns them: fp8's, and others."""

from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.linen import fp8_ops

import optax_accum as oa
from optax_accum.flax import TrainState
from tests.support import devices
from tests.support.devices import AXIS, COUNT
from tests.support.errors import saying
from tests.support.training import WAYS, promoting, slow, stepper

FP8 = fp8_ops.OVERWRITE_WITH_GRADIENT
MODEL: Any = nn.Dense(16, dot_general_cls=fp8_ops.Fp8DirectDotGeneralOp)
X = jax.random.normal(jax.random.key(0), (12, 16)).at[5].mul(50)
with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
    VARIABLES: Any = MODEL.init(jax.random.key(1), X)


@pytest.fixture(autouse=True)
def flax_as_it_is():
    """Flax's fp8 relies on JAX's usual promotion."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def loss(variables, x):
    return jnp.mean((MODEL.apply(variables, x) - 1) ** 2)


def histories(variables):
    """What does not depend on how the mean over the batch scales its gradient."""
    (stats,) = variables[FP8].values()
    return {k: v for k, v in stats.items() if not k.startswith("output_grad")}


def split(x, *sizes):
    return jnp.split(x, np.cumsum(sizes)[:-1])


@pytest.mark.parametrize("size", [3, slow(5)])
def test_in_one_step_fp8_statistics_are_those_of_the_whole_batch(size):
    wanted = jax.grad(loss)(VARIABLES, X)
    f = jax.jit(oa.grad(loss, microbatch_size=size))
    got = f(VARIABLES, X)
    chex.assert_trees_all_close(histories(got), histories(wanted), rtol=1e-6)
    # Of the output's gradient, whose size goes by the micro-batch's mean, it is the
    # largest that a micro-batch has met: what the next ones are to be scaled by.
    (stats,), (whole,) = got[FP8].values(), wanted[FP8].values()
    name = "output_grad_amax_history"
    assert stats[name][0] >= whole[name][0] > 0


@pytest.mark.parametrize("way", WAYS)
def test_across_steps_they_are_those_of_the_window(way):
    """Two windows, of uneven micro-batches; the history moves on once for each."""
    inner = optax.adamw(0.1)
    tx = oa.accumulate(inner, every_k=3)
    step = jax.jit(stepper(tx, way))
    got, state = VARIABLES, tx.init(VARIABLES)
    wanted, inner_state = VARIABLES, inner.init(VARIABLES["params"])
    for x in (X, 3 * X[::-1]):
        grads = jax.grad(loss)(wanted, x)
        updates, inner_state = inner.update(
            grads["params"], inner_state, wanted["params"]
        )
        trained = optax.apply_updates(wanted["params"], updates)
        wanted = {"params": trained, FP8: grads[FP8]}
        for part in split(x, 2, 7, 3):
            before = got
            grads = jax.grad(loss)(got, part)
            got, state = step(got, state, grads, weight=len(part))
            if not oa.has_updated(state):
                chex.assert_trees_all_equal(got, before)
    # Added to the parameter, an update gives the value up to the sum's rounding.
    rtol = 1e-6 if way == "update_params" else 1e-4
    chex.assert_trees_all_close(histories(got), histories(wanted), rtol=rtol)
    shapes, alone = (
        [x.shape for x in jax.tree.leaves(s)] for s in (state.inner_state, inner_state)
    )
    assert shapes == alone
    # Rounding to 8 bits goes by micro-batch, so that parameters are near.
    chex.assert_trees_all_close(got["params"], wanted["params"], atol=0.05)


def test_a_linen_train_state_holds_those_of_the_window():
    tx = oa.accumulate(optax.sgd(0.0), every_k=4, skip=oa.skip_not_finite)
    state = TrainState.create(apply_fn=MODEL.apply, params=VARIABLES, tx=tx)

    @jax.jit
    def step(state, x, weight):
        grads = jax.grad(loss)(state.params, x)
        return state.apply_gradients(grads=grads, weight=weight)

    bad = jnp.full_like(X[:3], jnp.nan)
    parts = split(X, 5, 4, 3)
    for x, weight in [(parts[0], 5), (bad, 3), (100 * bad, 0), (parts[1], 4)]:
        state = step(state, x, weight)
    wanted = jax.grad(loss)(VARIABLES, X[:9])
    chex.assert_trees_all_close(histories(state.params), histories(wanted))
    assert oa.gradient_step(state) == 1


PARAMS = {
    "w": jnp.ones(3),
    "stats": {"amax": jnp.zeros(2), "scale": jnp.ones([]), "seen": jnp.zeros([])},
}


def rule(path):
    of = {"stats/amax": "max", "stats/scale": "last", "stats/seen": "sum"}
    return of.get(path)


class TestAnyLeaf:
    """A rule names other leaves, by their paths."""

    params, rule = PARAMS, staticmethod(rule)

    def grads(self, i):
        stats = {"amax": [i, -i], "scale": 10 * i, "seen": i + 1}
        stats = {name: jnp.asarray(x, jnp.float32) for name, x in stats.items()}
        return {"w": jnp.full(3, i, jnp.float32), "stats": stats}

    def run(self, tx, rows, way="update_params"):
        params, state = self.params, tx.init(self.params)
        step = jax.jit(stepper(tx, way), static_argnames="boundary")
        for grads, kwargs in rows:
            params, state = step(params, state, grads, **kwargs)
        return params, state

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("reduction", ["mean", slow("ratio"), slow("sum")])
    def test_each_reduction_is_taken_over_the_window(self, reduction, way):
        tx = oa.accumulate(
            optax.adamw(0.1),
            3,
            reduction=reduction,
            overwrite=self.rule,
            skip=oa.skip_not_finite,
        )
        nan = jax.tree.map(lambda x: x * jnp.nan, self.grads(9.0))
        rows = [(self.grads(i), {"weight": i + 1.0}) for i in (5.0, 2.0)]
        # A first window, of which nothing is to be left.
        params, state = self.run(tx, [*rows, rows[0], *rows[::-1], (nan, {})], way)
        stats = {"amax": [5.0, -2.0], "scale": 50.0, "seen": 9.0}
        stats = {name: jnp.asarray(x, jnp.float32) for name, x in stats.items()}
        chex.assert_trees_all_close(params["stats"], stats)
        assert oa.gradient_step(state) == 2
        inner = oa.accumulate(optax.adamw(0.1), 3).init({"w": self.params["w"]})
        assert len(jax.tree.leaves(state.inner_state)) == len(
            jax.tree.leaves(inner.inner_state)
        )

    @pytest.mark.parametrize("every_k", [1, 2])
    def test_a_window_without_weight_leaves_them(self, every_k):
        tx = oa.accumulate(optax.sgd(0.1), every_k, overwrite=self.rule)
        rows = [(self.grads(5.0), {"weight": 0, "boundary": True})]
        params, _ = self.run(tx, rows)
        chex.assert_trees_all_equal(params, self.params)

    @pytest.mark.parametrize("way", WAYS)
    def test_a_leaf_without_an_update_stays(self, way):
        """An optimizer may give ``None`` for it, which is not to be filled in."""

        def update(updates, state, params=None):
            del params
            return {**updates, "w": None}, state

        inner = optax.GradientTransformation(lambda _: optax.EmptyState(), update)
        tx = oa.accumulate(inner, 1, overwrite=self.rule)
        grads = self.grads(5.0)
        if way == "update":
            updates, _ = tx.update(grads, tx.init(self.params), self.params)
            assert updates["w"] is None
            return
        params, _ = tx.update_params(grads, tx.init(self.params), self.params)
        chex.assert_trees_all_equal(params["w"], self.params["w"])
        chex.assert_trees_all_equal(params["stats"], grads["stats"])

    def test_every_k_1_overwrites_too(self):
        tx = oa.accumulate(optax.sgd(0.1), 1, overwrite=self.rule)
        params, _ = self.run(tx, [(self.grads(5.0), {})])
        chex.assert_trees_all_equal(params["stats"], self.grads(5.0)["stats"])

    def test_the_query_and_the_noise_scale_know_them(self):
        tx = oa.accumulate(optax.sgd(0.1), 4, overwrite=self.rule, noise_decay=0.9)
        rows = [(self.grads(i), {"weight": 2.0}) for i in (5.0, 2.0, 1.0)]
        _, state = self.run(tx, rows)
        grads = oa.accumulated(state, overwrite=self.rule)
        np.testing.assert_allclose(grads["w"], 8 / 3, rtol=1e-6)
        np.testing.assert_array_equal(grads["stats"]["amax"], [5, -1])
        squares = 2.0 * 3 * (25 + 4 + 1)
        np.testing.assert_allclose(state.window.noise.squares, squares)

    @pytest.mark.parametrize("size", [slow(1), 2])
    def test_in_one_step_too(self, size):
        """Each micro-batch returns its own through a derivative of their own."""

        @jax.custom_vjp
        def layer(params, x):
            return jnp.mean(x @ params["w"])

        def forward(params, x):
            return layer(params, x), (params, x)

        def backward(residuals, g):
            _, x = residuals
            stats = {
                "amax": jnp.stack([x.max(), -x.min()]),
                "scale": x[-1, 0],
                "seen": jnp.float32(len(x)),
            }
            return {"w": g * x.mean(0), "stats": stats}, jnp.zeros_like(x)

        layer.defvjp(forward, backward)
        x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 3)), jnp.float32)
        options = {"microbatch_size": size, "overwrite": self.rule}
        grads = jax.jit(oa.grad(layer, **options))(self.params, x)
        wanted = jax.grad(layer)(self.params, x)
        chex.assert_trees_all_close(grads, wanted, rtol=1e-6)
        none = oa.grad(layer, weight=lambda *_: 0.0, **options)
        grads = jax.jit(none)(self.params, x)
        chex.assert_trees_all_equal(grads["stats"], self.params["stats"])

    def test_mistakes_are_refused(self):
        tx = oa.accumulate(optax.sgd(0.1), 2, overwrite=self.rule)
        state = tx.init(self.params)
        with pytest.raises(ValueError, match=saying("`params` are needed")):
            tx.update(self.grads(1.0), state)
        tx = oa.accumulate(optax.sgd(0.1), 2, overwrite=lambda _: "mean")
        with pytest.raises(ValueError, match=saying("`overwrite` must be one of")):
            tx.init(self.params)


@devices.parametrized(["checked", "unchecked", "pmap"])
def test_over_devices_they_are_reduced_once_per_window(way):
    """The largest of all; the last of the last device that counts; the sum."""
    tx = oa.accumulate(promoting(optax.sgd(1.0)), 2, axis_name=AXIS, overwrite=rule)
    params = PARAMS

    def step(params, state, x, weight):
        own = x[0].astype(jnp.float32)
        stats = {
            "amax": jnp.stack([own, -own]),
            "scale": 10 * own,
            "seen": jnp.ones_like(own),
        }
        grads = {"w": own + 0 * x[:3], "stats": stats}
        return tx.update_params(grads, state, params, weight=weight[0])

    numbers = jnp.arange(1.0, COUNT + 1)
    x = jnp.repeat(numbers, 3)
    weight = jnp.ones(COUNT).at[-1].set(0)
    state = tx.init(params)
    if way == "pmap":
        mapped = devices.inside(way, step, (0, 0, 0, 0), (0, 0))
        params, state = devices.stacked((params, state))
        x, weight = x.reshape(COUNT, 3), weight.reshape(COUNT, 1)
    else:
        mapped = devices.inside(way, step, (None, "state", 0, 0), (None, "state"))
        state = oa.sharding.stack_windows(state, COUNT, overwrite=rule)
    for _ in range(2):
        params, state = mapped(params, state, x, weight)
    stats = devices.result(way, params)["stats"]
    np.testing.assert_array_equal(stats["amax"], [COUNT - 1, -1])
    assert float(stats["scale"]) == 10 * (COUNT - 1)
    assert float(stats["seen"]) == 2 * (COUNT - 1)


@pytest.mark.parametrize("scatter", [False, True])
def test_on_a_mesh_fp8_statistics_are_those_of_the_whole_batch(scatter):
    x = jnp.concatenate([X, X[:4]])
    wanted = jax.grad(loss)(VARIABLES, x)
    f = oa.grad(
        loss,
        num_microbatches=16 // COUNT,
        mesh=devices.mesh(),
        axis_name=AXIS,
        scatter=scatter,
    )
    got = jax.jit(f)(VARIABLES, x)
    chex.assert_trees_all_close(histories(got), histories(wanted), rtol=1e-6)


def test_stacked_windows_keep_them():
    tx = oa.accumulate(optax.sgd(1.0), 8, axis_name=AXIS, overwrite=rule)
    state = tx.init(PARAMS)
    stats = {
        "amax": jnp.array([-3.0, 2.0]),
        "scale": jnp.float32(7),
        "seen": jnp.float32(5),
    }
    grads = {**state.window.grads, "stats": stats}
    window = state.window._replace(grads=grads, weight=jnp.float32(2))
    state = state._replace(window=window, micro_step=jnp.int32(4))
    stacked = oa.sharding.stack_windows(state, 4, overwrite=rule)
    chex.assert_trees_all_equal(oa.sharding.sum_windows(stacked, overwrite=rule), state)
