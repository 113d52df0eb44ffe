"""Windows: weights, boundaries, and what is left of one in the next."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_accum as oa
from tests.support.training import (
    ADAM,
    NAN,
    PARAMS,
    SGD,
    WAYS,
    alone,
    feed,
    micro_batches,
    promoting,
    slow,
    stepper,
    weighted_mean,
)

pytestmark = pytest.mark.core


class TestReductions:
    grads, weights = micro_batches(PARAMS, 3)

    def expected(self, reduction):
        if reduction == "mean":
            return weighted_mean(self.grads, self.weights)
        total = jax.tree.map(lambda *g: sum(g), *self.grads)
        if reduction == "sum":
            return total
        return jax.tree.map(lambda g: g / sum(self.weights), total)

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("reduction", ["mean", "ratio", "sum"])
    def test_each_reduction_gives_its_equation(self, reduction, way):
        tx = oa.accumulate(SGD, 3, reduction=reduction)
        pairs = zip(self.grads, self.weights, strict=True)
        params, _ = feed(tx, [(g, {"weight": w}) for g, w in pairs], way)
        expected, _ = alone(SGD, self.expected(reduction))
        chex.assert_trees_all_close(params, expected, rtol=1e-6)

    @pytest.mark.parametrize("reduction", ["mean", "ratio", "sum"])
    def test_the_value_is_reduced_like_the_gradient(self, reduction):
        """The value is reduced as its gradient is."""
        values = [jnp.float32(v) for v in (2.0, 5.0, 11.0)]
        tx = oa.accumulate(remember_value(), 3, reduction=reduction)
        rows = zip(self.grads, self.weights, values, strict=True)
        _, state = feed(tx, [(g, {"weight": w, "value": v}) for g, w, v in rows])
        w = self.weights
        expected = {
            "mean": sum(w[i] * values[i] for i in range(3)) / sum(w),
            "ratio": sum(values) / sum(w),
            "sum": sum(values),
        }[reduction]
        np.testing.assert_allclose(state.inner_state, expected, rtol=1e-6)

    @pytest.mark.parametrize("reduction", ["mean", "ratio", "sum"])
    def test_every_k_1_equals_a_window_of_one(self, reduction):
        """Without an accumulator, and with the same arithmetic and the same state."""
        inner = optax.chain(SGD, remember_value())
        kwargs = {"weight": self.weights[0], "value": jnp.float32(3)}
        results = [
            feed(
                oa.accumulate(inner, every_k, reduction=reduction),
                [(self.grads[0], {**kwargs, "boundary": True})],
            )
            for every_k in (1, None)
        ]
        (one, one_state), (other, other_state) = results
        chex.assert_trees_all_close(one, other, rtol=1e-6)
        one_state, other_state = (
            state._replace(window=state.window._replace(grads=()))
            for state in (one_state, other_state)
        )
        chex.assert_trees_all_close(one_state, other_state, rtol=1e-6)

    def test_the_default_weight_is_1(self):
        tx = oa.accumulate(SGD, 3)
        by_default, _ = feed(tx, [(g, {}) for g in self.grads])
        by_hand, _ = feed(tx, [(g, {"weight": 1}) for g in self.grads])
        chex.assert_trees_all_equal(by_default, by_hand)

    @pytest.mark.parametrize("weight", [2, 2.0, True, np.float32(2), np.array(2)])
    def test_a_static_weight_may_be_any_real_number(self, weight):
        tx = oa.accumulate(SGD, 2)
        state = tx.init(PARAMS)
        _, state = tx.update(self.grads[0], state, PARAMS, weight=weight)
        np.testing.assert_allclose(state.window.weight, float(weight))


def remember_value():
    """An optimizer whose state is the last value that it was given."""

    def update(updates, state, params=None, *, value, **extra_args):
        del state, params, extra_args
        return updates, jnp.asarray(value)

    return optax.GradientTransformationExtraArgs(lambda _: jnp.zeros([]), update)


class TestWeightsThatAreNoMask:
    """In a ratio and a sum every gradient counts, whatever its weight.

    A detector's image without objects has no positives and a large gradient.
    """

    grads, _ = micro_batches(PARAMS, 3)
    weights = (0.0, 3.0, 0.0)

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("reduction", ["ratio", "sum"])
    def test_a_gradient_of_weight_0_counts(self, reduction, way):
        tx = oa.accumulate(SGD, 3, reduction=reduction)
        pairs = zip(self.grads, self.weights, strict=True)
        batches = [(g, {"weight": jnp.float32(w)}) for g, w in pairs]
        params, state = feed(tx, batches, way)
        total = jax.tree.map(lambda *g: sum(g), *self.grads)
        by = {"ratio": 3.0, "sum": 1.0}[reduction]
        expected, _ = alone(SGD, jax.tree.map(lambda g: g / by, total))
        chex.assert_trees_all_close(params, expected, rtol=1e-5)
        np.testing.assert_allclose(state.window.weight, 3.0)

    @pytest.mark.parametrize("reduction", ["mean", "ratio", "sum"])
    def test_what_skip_rejects_contributes_to_no_reduction(self, reduction):
        tx = oa.accumulate(SGD, 4, reduction=reduction, skip=oa.skip_not_finite)
        weights = (2.0, 3.0, 5.0)
        pairs = zip(self.grads, weights, strict=True)
        batches = [(g, {"weight": w, "value": jnp.float32(w)}) for g, w in pairs]
        nan = (NAN, {"weight": 7.0, "value": jnp.float32(jnp.nan)})
        params, state = feed(tx, [*batches[:1], nan, *batches[1:]])
        expected, _ = feed(oa.accumulate(SGD, 3, reduction=reduction), batches)
        chex.assert_trees_all_close(params, expected, rtol=1e-5)
        value = {"mean": 4.0 + 9.0 + 25.0, "ratio": 10.0, "sum": 10.0}[reduction]
        np.testing.assert_allclose(state.window.loss, value)
        np.testing.assert_allclose(state.window.weight, 10.0)

    def test_a_rejected_micro_batch_may_be_the_first(self):
        tx = oa.accumulate(SGD, 2, reduction="ratio", skip=oa.skip_not_finite)
        params, _ = feed(tx, [(NAN, {}), (self.grads[0], {"weight": 2.0})])
        half = jax.tree.map(lambda g: g / 2, self.grads[0])
        expected, _ = alone(SGD, half)
        chex.assert_trees_all_close(params, expected, rtol=1e-6)


class TestZeroWeights:
    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("place", [0, slow(1), 2])
    @pytest.mark.parametrize("zero", [0, jnp.float32(0)])
    def test_a_nan_of_weight_0_contributes_nothing(self, place, zero, way):
        grads, weights = micro_batches(PARAMS, 2)
        batches = [(g, {"weight": w}) for g, w in zip(grads, weights, strict=True)]
        batches.insert(place, (NAN, {"weight": zero, "value": jnp.nan}))
        batches = [(g, {"value": jnp.float32(1), **k}) for g, k in batches]
        params, state = feed(oa.accumulate(ADAM, 3), batches, way)
        expected, _ = alone(ADAM, weighted_mean(grads, weights))
        chex.assert_trees_all_close(params, expected, rtol=1e-6)
        chex.assert_tree_all_finite((state.window.grads, state.window.loss))

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("boundary", [None, True, jnp.array(True)])
    @pytest.mark.parametrize("weight", [0.0, jnp.float32(0)])
    def test_an_empty_window_updates_nothing(self, weight, boundary, way):
        """Parameters and inner state stay bit for bit, and the window is over."""
        tx = oa.accumulate(ADAM, 2)
        grads, _ = micro_batches(PARAMS, 2)
        params, before = feed(tx, [(g, {}) for g in grads], way)
        step = stepper(tx, way)
        after_params, state = step(params, before, NAN, weight=weight, boundary=False)
        after_params, state = step(
            after_params, state, NAN, weight=weight, boundary=boundary
        )
        chex.assert_trees_all_equal(after_params, params)
        chex.assert_trees_all_equal(state.inner_state, before.inner_state)
        assert (state.micro_step, state.gradient_step) == (0, 1)
        assert not state.has_updated
        # And nothing of it is in the next one.
        params, state = feed(tx, [(g, {}) for g in grads], way, params, state)
        expected, _ = alone(ADAM, *[weighted_mean(grads, [1, 1])] * 2)
        chex.assert_trees_all_close(params, expected, rtol=1e-6)

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("weight", [0, jnp.float32(0)])
    def test_a_python_boundary_of_an_empty_bfloat16_window_updates_nothing(
        self, weight, way
    ):
        tx = oa.accumulate(promoting(optax.adamw(0.1)))
        params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
        nan = jax.tree.map(lambda p: jnp.full_like(p, jnp.nan), params)
        given = params, {"boundary": True}
        params, before = feed(tx, [given], way, params)
        closed = nan, {"boundary": True, "weight": weight}
        after_params, after = feed(tx, [closed], way, params, before)
        chex.assert_trees_all_equal(after_params, params)
        chex.assert_trees_all_equal(after.inner_state, before.inner_state)
        assert (after.micro_step, after.gradient_step) == (0, 1)
        assert not after.has_updated

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("weight", [0, jnp.float32(0)])
    def test_every_k_1_updates_nothing_on_weight_0(self, weight, way):
        tx = oa.accumulate(ADAM, 1)
        state = tx.init(PARAMS)
        params, after = stepper(tx, way)(PARAMS, state, NAN, weight=weight)
        chex.assert_trees_all_equal(params, PARAMS)
        chex.assert_trees_all_equal(after.inner_state, state.inner_state)
        assert not after.has_updated


class TestNotFinite:
    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("place", [0, slow(1), 2])
    @pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, slow(-jnp.inf)])
    def test_a_nan_or_infinity_does_not_outlive_its_window(self, bad, place, way):
        """It is in the update of its window, as in the global batch's, and gone."""
        tx = oa.accumulate(SGD, 3)
        grads, _ = micro_batches(PARAMS, 3)
        poisoned = list(grads)
        poisoned[place] = jax.tree.map(lambda x: jnp.full_like(x, bad), PARAMS)
        broken, state = feed(tx, [(g, {}) for g in poisoned], way)
        assert not any(jnp.isfinite(x).any() for x in jax.tree.leaves(broken))
        params, state = feed(tx, [(g, {}) for g in grads], way, PARAMS, state)
        expected, _ = alone(SGD, weighted_mean(grads, [1, 1, 1]))
        chex.assert_trees_all_close(params, expected, rtol=1e-6)


class TestBoundaries:
    grads, weights = micro_batches(PARAMS, 5)
    batches = tuple((g, {"weight": w}) for g, w in zip(grads, weights, strict=True))

    @pytest.mark.parametrize("way", WAYS)
    def test_parameters_and_inner_state_change_only_at_the_boundary(self, way):
        tx = oa.accumulate(ADAM, 3)
        start = tx.init(PARAMS)
        for count in (1, 2):
            params, state = feed(tx, self.batches[:count], way)
            chex.assert_trees_all_equal(params, PARAMS)
            chex.assert_trees_all_equal(state.inner_state, start.inner_state)
            assert (state.micro_step, state.gradient_step) == (count, 0)

    def test_updates_off_the_boundary_are_zeros(self):
        tx = oa.accumulate(ADAM, 3)
        updates, _ = tx.update(self.grads[0], tx.init(PARAMS), PARAMS)
        chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, PARAMS))

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("boundary", [True, jnp.array(True)])
    @pytest.mark.parametrize("every_k", [4, None])
    def test_a_window_closed_early_divides_by_the_weights_it_saw(
        self, every_k, boundary, way
    ):
        """Two of four, then two again: the end of a short epoch."""
        tx = oa.accumulate(ADAM, every_k)
        params, state = PARAMS, tx.init(PARAMS)
        for start in (0, 2):
            for i, (g, w) in enumerate(self.batches[start : start + 2]):
                closes = boundary if i == 1 else jnp.logical_not(boundary)
                closes = bool(closes) if boundary is True else closes
                params, state = stepper(tx, way)(params, state, g, boundary=closes, **w)
        means = [
            weighted_mean(self.grads[:2], self.weights[:2]),
            weighted_mean(self.grads[2:4], self.weights[2:4]),
        ]
        expected, inner_state = alone(ADAM, *means)
        chex.assert_trees_all_close(params, expected, rtol=1e-6)
        chex.assert_trees_all_close(state.inner_state, inner_state, rtol=1e-6)

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("weight", [0, jnp.float32(0)])
    def test_closing_an_empty_window_again_changes_nothing(self, weight, way):
        tx = oa.accumulate(ADAM, 4)
        closed = [*self.batches[:2], (self.grads[2], {"weight": 1, "boundary": True})]
        once, before = feed(tx, closed, way)
        again, after = stepper(tx, way)(once, before, NAN, weight=weight, boundary=True)
        chex.assert_trees_all_equal(once, again)
        chex.assert_trees_all_equal(before.inner_state, after.inner_state)
        assert after.gradient_step == before.gradient_step == 1

    def test_boundary_false_holds_a_window_open_beyond_its_count(self):
        """`boundary=False` goes before the count, and the count goes on."""
        tx = oa.accumulate(SGD, 2)
        held = [(g, {"boundary": False, **w}) for g, w in self.batches[:4]]
        _, state = feed(tx, held)
        assert (state.micro_step, state.gradient_step) == (4, 0)
        params, state = feed(tx, self.batches[4:], state=state)
        expected, _ = alone(SGD, weighted_mean(self.grads, self.weights))
        chex.assert_trees_all_close(params, expected, rtol=1e-6)

    @pytest.mark.parametrize("way", WAYS)
    def test_a_schedule_sets_k_by_the_gradient_step(self, way):
        """Windows of 1, 2 and 2: k follows the gradient step."""
        tx = oa.accumulate(ADAM, lambda step: jnp.where(step < 1, 1, 2))
        params, state = feed(tx, self.batches, way)
        means = [
            weighted_mean(self.grads[part], self.weights[part])
            for part in (slice(0, 1), slice(1, 3), slice(3, 5))
        ]
        chex.assert_trees_all_close(params, alone(ADAM, *means)[0], rtol=1e-6)
        assert (state.micro_step, state.gradient_step) == (0, 3)

    def test_a_window_closes_at_once_if_k_shrinks_below_its_count(self):
        """Resumed with a smaller k: the window closes at once."""
        _, state = feed(oa.accumulate(SGD, 5), self.batches[:3])
        params, state = feed(
            oa.accumulate(SGD, lambda _: 2.0), self.batches[3:4], state=state
        )
        expected, _ = alone(SGD, weighted_mean(self.grads[:4], self.weights[:4]))
        chex.assert_trees_all_close(params, expected, rtol=1e-6)
        assert (state.micro_step, state.gradient_step) == (0, 1)

    def test_schedules_of_the_inner_optimizer_advance_once_per_update(self):
        inner = promoting(
            optax.adamw(optax.linear_schedule(0.1, 0.0, 4), weight_decay=0.1)
        )
        params, _ = feed(oa.accumulate(inner, 2), self.batches[:4])
        means = [
            weighted_mean(self.grads[part], self.weights[part])
            for part in (slice(0, 2), slice(2, 4))
        ]
        chex.assert_trees_all_close(params, alone(inner, *means)[0], rtol=1e-6)

    def test_a_value_does_not_outlive_its_window(self):
        """Not even where the next window's first micro-step has none."""
        tx = oa.accumulate(SGD, 2)
        first = [(g, {"value": jnp.nan}) for g in self.grads[:2]]
        second = [(self.grads[2], {}), (self.grads[3], {"value": 2.0})]
        _, state = feed(tx, first + second)
        np.testing.assert_allclose(state.window.loss, 2.0)

    def test_an_open_window_does_not_leak_into_every_k_1(self):
        _, state = feed(oa.accumulate(SGD, 4), self.batches[:2])
        state = state._replace(window=state.window._replace(grads=()))
        tx = oa.accumulate(SGD, 1, reduction="ratio")
        params, state = feed(tx, self.batches[2:3], state=state)
        gradient = jax.tree.map(lambda g: g / self.weights[2], self.grads[2])
        chex.assert_trees_all_close(params, alone(SGD, gradient)[0], rtol=1e-6)

    def test_other_extra_arguments_are_those_of_the_boundary(self):
        def update(updates, state, params=None, *, tag, **extra_args):
            del state, params, extra_args
            return updates, tag

        inner = optax.GradientTransformationExtraArgs(lambda _: jnp.zeros([]), update)
        tx = oa.accumulate(inner, 2)
        tagged = [(g, {"tag": jnp.float32(i)}) for i, g in enumerate(self.grads[:2])]
        _, state = feed(tx, tagged)
        assert state.inner_state == 1

    def test_reduce_on_plateau_sees_the_value_of_the_global_batch(self):
        """The mean value of a window, not the last micro-batch's."""
        values = [4.0, 2.0, 3.0, 1.0]
        inner = promoting(
            optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=3))
        )
        batches = [
            (g, {"value": jnp.float32(v), "weight": jnp.float32(w)})
            for g, v, w in zip(self.grads, values, [1, 3, 2, 2], strict=False)
        ]
        _, state = feed(oa.accumulate(inner, 2), batches)
        np.testing.assert_allclose(state.inner_state[1].best_value, 2.0)

    def test_sums_of_the_last_window_stay_until_the_next_begins(self):
        """Sums stay until the next window overwrites them."""
        batches = [
            (g, {"value": jnp.float32(i), **w})
            for i, (g, w) in enumerate(self.batches[:2])
        ]
        _, state = feed(oa.accumulate(SGD, 2), batches)
        np.testing.assert_allclose(
            state.window.loss / state.window.weight,
            self.weights[1] / (self.weights[0] + self.weights[1]),
            rtol=1e-6,
        )
