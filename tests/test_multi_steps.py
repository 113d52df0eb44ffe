"""Beside `optax.MultiSteps`: its own tests, and a running job that moves over."""

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from absl.testing import parameterized
from optax.transforms import _accumulation, _accumulation_test

import optax_accum as oa
from tests.support.training import NAN, PARAMS, micro_batches, promoting, slow, stepper

ADAM = promoting(optax.adam(0.1))
GRADS, _ = micro_batches(PARAMS, 8)


class State(oa.AccumulateState):
    """An `AccumulateState` under the names of `optax.MultiStepsState`."""

    mini_step = property(lambda self: self.micro_step)
    acc_grads = property(lambda self: self.window.grads)


class MultiSteps:
    """`optax.MultiSteps` as a thin adapter over `accumulate`."""

    def __init__(
        self,
        opt,
        every_k_schedule,
        use_grad_mean=True,
        should_skip_update_fn=None,
        accumulator_dtype=None,
    ):
        self.tx = oa.accumulate(
            opt,
            every_k_schedule,
            reduction="mean" if use_grad_mean else "sum",
            accumulator_dtype=accumulator_dtype,
            skip=should_skip_update_fn,
            on_skip="wait",
        )

    def init(self, params):
        return State(*self.tx.init(params))

    def update(self, updates, state, params=None, **extra_args):
        updates, state = self.tx.update(updates, state, params, **extra_args)
        return updates, State(*state)

    def has_updated(self, state):
        return oa.has_updated(state)

    def gradient_transformation(self):
        return optax.GradientTransformation(self.init, self.update)


@pytest.mark.slow
class TestOptaxsOwnTests(_accumulation_test.AccumulationTest, parameterized.TestCase):
    """They run from the installed package, against the adapter."""

    @pytest.fixture(autouse=True)
    def _against_the_adapter(self, monkeypatch, loose_promotion):
        del loose_promotion
        self.built: list[MultiSteps] = []

        def build(*args, **kwargs):
            self.built.append(MultiSteps(*args, **kwargs))
            return self.built[-1]

        monkeypatch.setattr(_accumulation, "MultiSteps", build)
        yield
        if self._testMethodName.startswith("test_multi_steps"):
            assert self.built, "this test never built the adapter"


def test_optaxs_own_tests_are_found():
    names = [n for n in dir(TestOptaxsOwnTests) if n.startswith("test_multi_steps")]
    assert len(names) >= 6


class TestMoving:
    @pytest.mark.parametrize("use_grad_mean", [True, False])
    @pytest.mark.parametrize(
        "stop",
        [4, *map(slow, (1, 2, 3, 5, 6, 7))],
    )
    def test_a_moved_run_continues_inside_its_window(self, stop, use_grad_mean):
        """Moved after any micro-step, in a window or between two."""
        old = optax.MultiSteps(ADAM, 3, use_grad_mean=use_grad_mean)
        multi_steps = promoting(old.gradient_transformation())
        tx = oa.accumulate(ADAM, 3, reduction="mean" if use_grad_mean else "sum")
        stayed, state = PARAMS, multi_steps.init(PARAMS)
        for i, g in enumerate(GRADS):
            if i == stop:
                moved = stayed
                ours = oa.from_multi_steps(state, use_grad_mean=use_grad_mean)
            stayed, state = stepper(multi_steps, "update")(stayed, state, g)
            if i >= stop:
                moved, ours = jax.jit(stepper(tx))(moved, ours, g)
        chex.assert_trees_all_close(moved, stayed, rtol=1e-6)
        chex.assert_trees_all_close(ours.inner_state, state.inner_opt_state, rtol=1e-5)
        assert oa.micro_step(ours) == state.mini_step
        assert oa.gradient_step(ours) == state.gradient_step

    def test_the_moved_state_has_the_type_of_a_new_one(self):
        """So that nothing compiles twice and a checkpoint's target fits."""
        old = optax.MultiSteps(ADAM, 3, should_skip_update_fn=optax.skip_not_finite)
        tx = oa.accumulate(ADAM, 3, skip=optax.skip_not_finite, on_skip="wait")
        moved = oa.from_multi_steps(old.init(PARAMS))
        chex.assert_trees_all_equal_shapes_and_dtypes(moved, tx.init(PARAMS))

    def test_a_moved_run_keeps_skipping(self):
        old = optax.MultiSteps(ADAM, 2, should_skip_update_fn=optax.skip_not_finite)
        with jax.numpy_dtype_promotion("standard"):
            _, state = old.update(GRADS[0], old.init(PARAMS), PARAMS)
            _, state = old.update(NAN, state, PARAMS)
        tx = oa.accumulate(ADAM, 2, skip=optax.skip_not_finite, on_skip="wait")
        _, ours = tx.update(NAN, oa.from_multi_steps(state), PARAMS)
        assert ours.micro_step == ours.window.skipped == 1
        _, ours = tx.update(GRADS[1], ours, PARAMS)
        assert ours.gradient_step == 1

    def test_a_moved_state_keeps_has_updated(self):
        old = optax.MultiSteps(ADAM, 1)
        start = old.init(PARAMS)
        assert not oa.has_updated(oa.from_multi_steps(start))
        with jax.numpy_dtype_promotion("standard"):
            _, state = old.update(GRADS[0], start, PARAMS)
        assert oa.has_updated(oa.from_multi_steps(state))

    @pytest.mark.usefixtures("float64")
    def test_a_state_of_multi_steps_can_be_moved_under_double_precision(self):
        """Its accumulator is float32 even there, and keeps its dtype."""
        params = jnp.ones(2, jnp.float64)
        state = oa.from_multi_steps(optax.MultiSteps(ADAM, 2).init(params))
        assert state.window.grads.dtype == jnp.float32
        tx = oa.accumulate(ADAM, 2, accumulator_dtype=jnp.float32)
        _, state = tx.update(params, state, params)
        assert state.window.grads.dtype == jnp.float32
