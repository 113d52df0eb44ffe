"""Errors are part of the interface: the argument, what came, what is needed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_accum as oa
from tests.support.errors import saying

PARAMS = {"layer": {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}}
SGD = optax.sgd(0.1)


def update(tx, grads=PARAMS, **kwargs):
    return tx.update(grads, tx.init(PARAMS), PARAMS, **kwargs)


class TestSettings:
    @pytest.mark.parametrize("inner", [optax.adam, None, 0.1])
    def test_an_inner_that_is_not_a_transformation_is_refused(self, inner):
        words = ("`inner` must be an Optax gradient transformation", repr(inner))
        with pytest.raises(TypeError, match=saying(*words)):
            oa.accumulate(inner, 2)

    def test_arguments_in_the_wrong_order_are_recognised(self):
        words = ("got 2 of type int", "The order is accumulate(inner, every_k)")
        with pytest.raises(TypeError, match=saying(*words)):
            oa.accumulate(2, SGD)

    @pytest.mark.parametrize("value", [0, -3, np.int64(0)])
    def test_every_k_below_one_is_refused(self, value):
        words = ("`every_k` must be an int >= 1", f"got {value}", "every_k=1")
        with pytest.raises(ValueError, match=saying(*words)):
            oa.accumulate(SGD, value)

    @pytest.mark.parametrize("value", [True, False, np.True_, 2.0, np.float32(2), "8"])
    def test_every_k_of_another_type_is_refused(self, value):
        words = ("`every_k` must be an int >= 1", repr(value), type(value).__name__)
        with pytest.raises(TypeError, match=saying(*words)):
            oa.accumulate(SGD, value)

    @pytest.mark.parametrize("value", [np.int64(2), np.uint8(2), jnp.array(2)])
    def test_every_k_may_be_any_integer_type(self, value):
        tx = oa.accumulate(SGD, value)
        _, state = update(tx)
        _, state = tx.update(PARAMS, state, PARAMS)
        assert state.gradient_step == 1

    @pytest.mark.parametrize("k", [jnp.ones(2), jnp.array(True), jnp.array(2j)])
    def test_a_schedule_that_does_not_return_a_number_is_refused(self, k):
        words = ("`every_k` as a schedule must return one real number", str(k.dtype))
        with pytest.raises(TypeError, match=saying(*words)):
            update(oa.accumulate(SGD, lambda _: k))

    def test_an_unknown_reduction_is_refused(self):
        words = ('`reduction` must be one of "mean", "ratio", "sum"', "'average'")
        with pytest.raises(ValueError, match=saying(*words)):
            oa.accumulate(SGD, 2, reduction="average")

    def test_an_unknown_on_skip_is_refused(self):
        words = ('`on_skip` must be one of "shrink", "wait"', "'drop'")
        with pytest.raises(ValueError, match=saying(*words)):
            oa.accumulate(SGD, 2, on_skip="drop")

    def test_on_skip_wait_across_devices_is_refused(self):
        words = ('`on_skip="wait"`', "`axis_name`", 'Use on_skip="shrink"')
        with pytest.raises(ValueError, match=saying(*words)):
            oa.accumulate(SGD, 2, on_skip="wait", axis_name="batch")

    def test_a_float64_accumulator_without_x64_is_refused(self):
        words = ("`accumulator_dtype` is float64", "jax_enable_x64")
        with pytest.raises(ValueError, match=saying(*words)):
            oa.accumulate(SGD, 2, accumulator_dtype="float64")

    @pytest.mark.parametrize("dtype", [jnp.int32, "uint8", bool])
    def test_an_accumulator_dtype_that_is_not_floating_is_refused(self, dtype):
        words = ("`accumulator_dtype` must be a floating or complex dtype", "got")
        with pytest.raises(TypeError, match=saying(*words)):
            oa.accumulate(SGD, 2, accumulator_dtype=dtype)

    def test_a_real_accumulator_of_complex_parameters_is_refused(self):
        tx = oa.accumulate(SGD, 2, accumulator_dtype=jnp.float32)
        words = ("`accumulator_dtype` float32", "`params['z']`", "complex64")
        with pytest.raises(TypeError, match=saying(*words)):
            tx.init({"a": jnp.ones(2), "z": jnp.ones(2, jnp.complex64)})


class TestBoundary:
    def test_no_boundary_without_every_k_is_refused(self):
        words = ("`boundary` is needed on every call", "`every_k=None`", "got None")
        with pytest.raises(ValueError, match=saying(*words)):
            update(oa.accumulate(SGD))

    @pytest.mark.parametrize("value", [1, 0.0])
    def test_a_boundary_that_is_not_a_bool_is_refused(self, value):
        words = ("`boundary` must be a bool", repr(value), type(value).__name__)
        with pytest.raises(TypeError, match=saying(*words)):
            update(oa.accumulate(SGD), boundary=value)

    @pytest.mark.parametrize("value", [jnp.array(1), jnp.array([True])])
    def test_an_array_that_is_not_one_boolean_is_refused(self, value):
        words = ("`boundary` must be a bool", str(value.shape), str(value.dtype))
        with pytest.raises(TypeError, match=saying(*words)):
            update(oa.accumulate(SGD), boundary=value)

    @pytest.mark.parametrize("value", [False, jnp.array(True)])
    def test_a_false_or_array_boundary_with_every_k_1_is_refused(self, value):
        words = ("`boundary` must be True or None with `every_k=1`", "every_k=None")
        with pytest.raises(ValueError, match=saying(*words)):
            update(oa.accumulate(SGD, 1), boundary=value)


class TestWeight:
    @pytest.mark.parametrize("value", [jnp.ones(2), np.ones((1, 1))])
    def test_a_weight_that_is_not_a_scalar_is_refused(self, value):
        words = ("`weight` must be a scalar", str(value.shape), "mask.sum()")
        with pytest.raises(ValueError, match=saying(*words)):
            update(oa.accumulate(SGD, 2), weight=value)

    @pytest.mark.parametrize("value", [None, "3", [1.0]])
    def test_a_weight_that_is_not_a_number_is_refused(self, value):
        words = ("`weight` must be a real scalar", repr(value), type(value).__name__)
        with pytest.raises(TypeError, match=saying(*words)):
            update(oa.accumulate(SGD, 2), weight=value)

    def test_a_complex_weight_is_refused(self):
        with pytest.raises(
            TypeError, match=saying("`weight` must be a real scalar", "complex64")
        ):
            update(oa.accumulate(SGD, 2), weight=jnp.array(1j))

    @pytest.mark.parametrize("value", [-1, -0.5, np.float32(-2), np.nan, np.inf])
    def test_a_static_weight_that_is_negative_or_not_finite_is_refused(self, value):
        words = ("`weight` must be finite and >= 0", f"got {value}", "Use 0")
        with pytest.raises(ValueError, match=saying(*words)):
            update(oa.accumulate(SGD, 2), weight=value)


@pytest.mark.parametrize("value", [jnp.ones(2), jnp.array(1), jnp.array(1j)])
def test_a_value_that_is_not_a_loss_is_refused(value):
    words = ("`value` must be a real floating scalar", str(value.shape))
    with pytest.raises(ValueError, match=saying(*words)):
        update(oa.accumulate(SGD, 2), value=value)


@pytest.mark.parametrize("every_k", [1, 2])
class TestGradients:
    def test_gradients_without_a_leaf_are_refused(self, every_k):
        grads = {"layer": {"w": jnp.ones((2, 3))}}
        words = (
            "`grads` must have the tree structure of `params`",
            "`params['layer']['b']` has no counterpart",
        )
        with pytest.raises(ValueError, match=saying(*words)):
            update(oa.accumulate(SGD, every_k), grads)

    def test_gradients_with_a_leaf_too_many_are_refused(self, every_k):
        grads = {"layer": {**PARAMS["layer"], "c": jnp.ones(1)}}
        words = (
            "`grads` must have the tree structure of `params`",
            "`grads['layer']['c']` is not in `params`",
        )
        with pytest.raises(ValueError, match=saying(*words)):
            update(oa.accumulate(SGD, every_k), grads)

    def test_a_value_with_its_gradients_is_refused(self, every_k):
        words = ("`grads` must have the tree structure", "(value, grads)", "alone")
        with pytest.raises(ValueError, match=saying(*words)):
            update(oa.accumulate(SGD, every_k), (jnp.ones([]), PARAMS))

    def test_gradients_in_other_containers_are_refused(self, every_k):
        words = ("`grads` must have the tree structure of `params`", "containers")
        tx = oa.accumulate(SGD, every_k)
        with pytest.raises(ValueError, match=saying(*words)):
            tx.update([jnp.ones(2)], tx.init((jnp.ones(2),)), (jnp.ones(2),))

    def test_gradients_of_another_shape_are_refused(self, every_k):
        grads = {"layer": {"w": jnp.ones((3, 2)), "b": jnp.ones(3)}}
        words = (
            "`grads['layer']['w']` has shape (3, 2)",
            "`params['layer']['w']` has shape (2, 3)",
        )
        with pytest.raises(ValueError, match=saying(*words)):
            update(oa.accumulate(SGD, every_k), grads)

    def test_an_integer_gradient_of_a_floating_parameter_is_refused(self, every_k):
        grads = {"layer": {"w": jnp.ones((2, 3)), "b": jnp.arange(3)}}
        words = ("`params['layer']['b']` has no counterpart", "floating gradient")
        with pytest.raises(ValueError, match=saying(*words)):
            update(oa.accumulate(SGD, every_k), grads)

    def test_a_complex_gradient_of_a_real_parameter_is_refused(self, every_k):
        grads = {"layer": {"w": jnp.ones((2, 3)), "b": jnp.ones(3, jnp.complex64)}}
        words = ("`grads['layer']['b']` is complex64", "is float32")
        with pytest.raises(TypeError, match=saying(*words)):
            update(oa.accumulate(SGD, every_k), grads)


class TestState:
    def test_swapped_state_and_parameters_are_refused(self):
        tx = oa.accumulate(SGD, 2)
        with pytest.raises(TypeError, match=saying("update_params(grads, state, par")):
            tx.update_params(PARAMS, PARAMS, tx.init(PARAMS))

    def test_the_state_of_multi_steps_is_refused_with_the_remedy(self):
        state = optax.MultiSteps(SGD, 2).init(PARAMS)
        with pytest.raises(TypeError, match=saying("`state`", "oa.from_multi_steps")):
            oa.accumulate(SGD, 2).update(PARAMS, state, PARAMS)

    @pytest.mark.parametrize("state", [(), PARAMS, SGD.init(PARAMS)])
    def test_a_state_that_is_not_an_accumulate_state_is_refused(self, state):
        words = (
            "`state` must be the `AccumulateState`",
            "update(grads, state, params)",
        )
        with pytest.raises(TypeError, match=saying(*words)):
            oa.accumulate(SGD, 2).update(PARAMS, state, PARAMS)

    def test_a_state_without_an_accumulator_is_refused(self):
        state = oa.accumulate(SGD, 1).init(PARAMS)
        words = ("`state` holds no accumulator", "`every_k=1`", "inner_state")
        with pytest.raises(ValueError, match=saying(*words)):
            oa.accumulate(SGD, 2).update(PARAMS, state, PARAMS)

    def test_a_state_whose_accumulator_would_be_lost_is_refused(self):
        state = oa.accumulate(SGD, 2).init(PARAMS)
        words = (
            "`state` holds an accumulator",
            "`every_k=1`",
            "_replace(grads=())",
        )
        with pytest.raises(ValueError, match=saying(*words)):
            oa.accumulate(SGD, 1).update(PARAMS, state, PARAMS)
        oa.accumulate(SGD, 1).update(
            PARAMS, state._replace(window=state.window._replace(grads=())), PARAMS
        )

    @pytest.mark.parametrize("params", [None, {"layer": {"w": jnp.ones(1)}}])
    def test_parameters_unlike_the_gradients_are_refused(self, params):
        tx = oa.accumulate(SGD, 2)
        with pytest.raises(ValueError, match="`grads` must have the tree structure"):
            tx.update_params(PARAMS, tx.init(PARAMS), params)


@pytest.mark.usefixtures("float64")
def test_gradients_wider_than_their_accumulator_are_refused():
    params, grads = jnp.ones(2, jnp.float32), jnp.ones(2, jnp.float64)
    tx = oa.accumulate(SGD, 2)
    words = (
        "`grads` is float64, wider than its accumulator, which is float32",
        "`accumulator_dtype=float64`",
    )
    with pytest.raises(TypeError, match=saying(*words)):
        tx.update(grads, tx.init(params), params)
    asked_for = oa.accumulate(SGD, 2, accumulator_dtype=jnp.float32)
    asked_for.update(grads, asked_for.init(params), params)


class TestSkip:
    def test_a_skip_that_is_not_a_function_is_refused(self):
        words = ("`skip` must be a function", "oa.skip_not_finite", "got True")
        with pytest.raises(TypeError, match=saying(*words)):
            oa.accumulate(SGD, 2, skip=True)

    @pytest.mark.parametrize("decision", [jnp.array(1), jnp.array([True])])
    def test_a_skip_that_does_not_return_one_boolean_is_refused(self, decision):
        words = ("`skip` must return (bool scalar, info)", str(decision.dtype))
        with pytest.raises(TypeError, match=saying(*words)):
            update(oa.accumulate(SGD, 2, skip=lambda *_: (decision, ())))

    def test_a_state_of_another_skip_is_refused(self):
        state = oa.accumulate(SGD, 2, skip=optax.skip_not_finite).init(PARAMS)
        tx = oa.accumulate(SGD, 2, skip=oa.skip_not_finite)
        words = (
            "`info` must have the tree structure of `skip_state`",
            "num_not_finite",
            "take a new `skip_state` from `init`",
        )
        with pytest.raises(ValueError, match=saying(*words)):
            tx.update(PARAMS, state, PARAMS)


def test_an_inner_state_that_changes_its_structure_is_refused():
    inner = optax.GradientTransformation(
        lambda _: {}, lambda u, s, _=None: (u, {**s, "seen": jnp.ones(())})
    )
    words = ("`inner_state` must have the tree structure of", "'seen'", "optax.chain")
    with pytest.raises(ValueError, match=saying(*words)):
        update(oa.accumulate(inner, 2))


class TestQueries:
    QUERIES = (oa.has_updated, oa.micro_step, oa.gradient_step, oa.accumulated)

    @pytest.mark.parametrize("query", QUERIES)
    def test_a_query_without_a_state_is_refused(self, query):
        words = (
            "`opt_state` must hold the state of `optax_accum.accumulate`",
            "found none in a tuple",
        )
        with pytest.raises(ValueError, match=saying(*words)):
            query(SGD.init(PARAMS))

    @pytest.mark.parametrize("query", QUERIES)
    def test_a_query_with_several_states_is_refused(self, query):
        tx = optax.chain(oa.accumulate(SGD, 2), oa.accumulate(SGD, 3))
        with pytest.raises(ValueError, match="`opt_state` holds 2 states of"):
            query(tx.init(PARAMS))

    @pytest.mark.parametrize("query", QUERIES)
    def test_a_query_of_nested_accumulation_is_refused(self, query):
        tx = optax.chain(oa.accumulate(oa.accumulate(SGD, 2), 3))
        with pytest.raises(ValueError, match="`opt_state` holds 2 states of"):
            query(tx.init(PARAMS))

    def test_a_query_with_an_unknown_reduction_is_refused(self):
        state = oa.accumulate(SGD, 2).init(PARAMS)
        with pytest.raises(ValueError, match="`reduction` must be one of"):
            oa.accumulated(state, reduction="average")

    def test_a_query_without_an_accumulator_is_refused(self):
        words = ("`opt_state` holds no accumulator", "`every_k=1`")
        with pytest.raises(ValueError, match=saying(*words)):
            oa.accumulated(oa.accumulate(SGD, 1).init(PARAMS))


def test_from_multi_steps_refuses_another_state():
    words = (
        "`multi_steps_state` must be an `optax.MultiStepsState`",
        "tuple",
        "`mini_step`",
    )
    with pytest.raises(TypeError, match=saying(*words)):
        oa.from_multi_steps(SGD.init(PARAMS))


def test_a_weight_that_is_not_a_scalar_is_refused_at_trace_time():
    tx = oa.accumulate(SGD, 2)
    state = jax.eval_shape(tx.init, PARAMS)
    with pytest.raises(ValueError, match="`weight` must be a scalar"):
        jax.eval_shape(
            lambda s, w: tx.update(PARAMS, s, PARAMS, weight=w),
            state,
            jax.ShapeDtypeStruct((2,), jnp.float32),
        )


class TestStates:
    """The state of something else: which, and what to do."""

    def test_the_state_of_parameters_of_other_shapes_is_to_blame(self):
        """And not the parameters, if the gradients fit them."""
        tx = oa.accumulate(SGD, 2)
        other = {"layer": {"w": jnp.ones((4, 3)), "b": jnp.ones(3)}}
        words = (
            "`state` was made for other parameters",
            "`state.window.grads['layer']['w']` has shape (2, 3)",
            "`params['layer']['w']` (4, 3)",
            "init(params)",
        )
        for method in (tx.update, tx.update_params):
            with pytest.raises(ValueError, match=saying(*words)):
                method(other, tx.init(PARAMS), other)

    def test_the_state_of_parameters_of_another_structure_is_to_blame(self):
        tx = oa.accumulate(SGD, 2)
        other = {"w": jnp.ones((2, 3))}
        with pytest.raises(ValueError, match=saying("`state` was made for other")):
            tx.update_params(other, tx.init(PARAMS), other)

    def test_gradients_that_do_not_fit_their_parameters_are_to_blame(self):
        tx = oa.accumulate(SGD, 2)
        grads = {"layer": {"w": jnp.ones((4, 3)), "b": jnp.ones(3)}}
        words = ("`grads['layer']['w']` has shape (4, 3)", "`params['layer']['w']`")
        with pytest.raises(ValueError, match=saying(*words)):
            tx.update_params(grads, tx.init(PARAMS), PARAMS)

    @pytest.mark.parametrize("every_k", [1, 2])
    def test_the_state_of_another_optimizer_is_refused(self, every_k):
        state = oa.accumulate(SGD, every_k).init(PARAMS)
        words = (
            "`state.inner_state` belongs to a different optimizer",
            "(EmptyState(), EmptyState())",
            "ScaleByAdamState",
        )
        with pytest.raises(ValueError, match=saying(*words)):
            oa.accumulate(optax.adam(0.1), every_k).update(PARAMS, state, PARAMS)

    def test_an_optimizers_own_error_is_left_as_it_is(self):
        def refuses(*arguments):
            raise RuntimeError(f"its own, of {len(arguments)} arguments")

        inner = optax.GradientTransformation(lambda _: optax.EmptyState(), refuses)
        with pytest.raises(RuntimeError, match="its own"):
            update(oa.accumulate(inner, 2))

    @pytest.mark.parametrize(
        "query", [oa.has_updated, oa.micro_step, oa.gradient_step, oa.accumulated]
    )
    def test_queries_refuse_the_state_of_multi_steps(self, query):
        state = optax.MultiSteps(SGD, 2).init(PARAMS)
        words = ("`opt_state`", "`optax.MultiSteps`", "oa.from_multi_steps")
        with pytest.raises(ValueError, match=saying(*words)):
            query(state)
