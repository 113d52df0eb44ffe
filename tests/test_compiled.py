"""The compiled program is the truth: temporaries, copies, branches, traces."""

import functools

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import optax_accum as oa
from tests.support import hlo
from tests.support.training import WAYS, promoting, slow, stepper

pytestmark = pytest.mark.core

needs_fused_maximum = pytest.mark.skipif(
    jax.__version_info__ < (0, 10, 2),
    reason="the XLA of JAX 0.10.0 and 0.10.1 writes |g| to memory before its maximum",
)
OPTIMIZERS = {
    "sgd": optax.sgd(1e-2),
    "momentum": promoting(optax.sgd(1e-2, momentum=0.9)),
    "adamw": promoting(optax.adamw(1e-3)),
}
# Shapes of which no two leaves share one, so that no copy hides behind another.
SHAPES = {"in": (512, 256), "out": (256, 384), "bias": (384,)}
SMALLEST_MATRIX = 256 * 384


def params_of(dtype=jnp.float32):
    return {name: jax.ShapeDtypeStruct(s, dtype) for name, s in SHAPES.items()}


SCALAR = jax.ShapeDtypeStruct((), jnp.float32)


def window_program(tx, way, params, arguments=()):
    """One micro-step, compiled, with the keyword `arguments` traced."""

    def step(params, state, grads, *values):
        return stepper(tx, way)(
            params, state, grads, **dict(zip(arguments, values, strict=True))
        )

    state = jax.eval_shape(tx.init, params)
    return hlo.compiled(step, params, state, params, *[SCALAR] * len(arguments))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "arguments", [slow(()), slow(("weight",)), ("weight", "value")]
)
@pytest.mark.parametrize(
    "skip", [None, pytest.param(oa.skip_not_finite, marks=needs_fused_maximum)]
)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_counted_window_is_free_of_temporaries_and_copies(name, skip, arguments, way):
    params = params_of()
    tx = oa.accumulate(OPTIMIZERS[name], every_k=8, skip=skip)
    program = window_program(tx, way, params, arguments)
    assert hlo.temporaries(program) < 0.01 * hlo.nbytes(params)
    assert hlo.large_copies(program, SMALLEST_MATRIX) == []


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [slow("sgd"), slow("momentum"), "adamw"])
@pytest.mark.parametrize("schedule", [lambda step: 2 + step // 10, None])
def test_a_scheduled_or_traced_boundary_is_free_of_temporaries_and_copies(
    name, way, schedule
):
    params = params_of()
    tx = oa.accumulate(OPTIMIZERS[name], every_k=schedule)
    state = jax.eval_shape(tx.init, params)

    def step(params, state, grads, close):
        boundary = None if schedule else close
        return stepper(tx, way)(params, state, grads, boundary=boundary)

    close = jax.ShapeDtypeStruct((), bool)
    program = hlo.compiled(step, params, state, params, close)
    assert hlo.temporaries(program) < 0.01 * hlo.nbytes(params)
    assert hlo.large_copies(program, SMALLEST_MATRIX) == []


def test_multi_steps_has_temporaries_and_copies():
    """The same measurements, on a program that is known to hold temporaries."""
    params = params_of()
    tx = optax.MultiSteps(OPTIMIZERS["adamw"], 8).gradient_transformation()
    program = window_program(promoting(tx), "update", params)
    assert hlo.temporaries(program) > 2 * hlo.nbytes(params)
    assert len(hlo.large_copies(program, SMALLEST_MATRIX)) > 0


@pytest.mark.parametrize(("way", "most"), [("update", 1.01), ("update_params", 0.01)])
@pytest.mark.parametrize("name", [slow("sgd"), "momentum", "adamw"])
def test_bfloat16_parameters_take_less_memory_than_with_multi_steps(name, way, most):
    """Through `update`, the updates themselves; through `update_params`, nothing."""
    params = params_of(jnp.bfloat16)
    inner = OPTIMIZERS[name]
    multi_steps = optax.MultiSteps(inner, 8).gradient_transformation()
    ours = window_program(oa.accumulate(inner, 8), way, params)
    theirs = window_program(promoting(multi_steps), "update", params)
    assert hlo.temporaries(ours) < most * hlo.nbytes(params)
    assert hlo.temporaries(ours) < hlo.temporaries(theirs)


def static_program(inner, way, params, boundary, weight=1.0, **options):
    """One micro-step whose boundary is a Python bool; a weight of None is traced."""
    tx = oa.accumulate(inner, **options)
    state = jax.eval_shape(tx.init, params)

    def step(params, state, grads, traced):
        w = traced if weight is None else weight
        return stepper(tx, way)(params, state, grads, boundary=boundary, weight=w)

    return hlo.compiled(step, params, state, params, SCALAR)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("boundary", "weight"), [(True, 1.0), (False, 1.0), (False, None)]
)
def test_a_python_boundary_builds_no_cond(boundary, weight, way):
    """Unless W may be 0 at it."""
    program = static_program(
        OPTIMIZERS["adamw"], way, params_of(), boundary, weight=weight
    )
    assert hlo.operations(program, "conditional") == []
    assert hlo.temporaries(program) < 0.01 * hlo.nbytes(params_of())


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", [slow("sgd"), slow("momentum"), "adamw"])
@pytest.mark.parametrize(
    "options",
    [
        {"weight": None},
        pytest.param({"skip": oa.skip_not_finite}, marks=needs_fused_maximum),
    ],
)
def test_a_python_boundary_of_what_may_be_empty_is_free_of_temporaries(
    options, name, way
):
    """The test of W is a branch, because a select copies what it keeps."""
    params = params_of()
    program = static_program(OPTIMIZERS[name], way, params, True, **options)
    assert hlo.temporaries(program) < 0.01 * hlo.nbytes(params)
    assert hlo.large_copies(program, SMALLEST_MATRIX) == []


@pytest.mark.parametrize(("way", "most"), [("update", 1.01), ("update_params", 0.01)])
@pytest.mark.parametrize("weight", [1.0, slow(None)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, slow(jnp.float16)])
@pytest.mark.parametrize("name", [slow("sgd"), "momentum", "adamw"])
def test_a_python_boundary_of_narrow_parameters_holds_no_more_than_the_updates(
    name, dtype, weight, way, most
):
    """As many as counted windows hold: the updates come first, and then the state."""
    params = params_of(dtype)
    program = static_program(OPTIMIZERS[name], way, params, True, weight)
    assert hlo.temporaries(program) < most * hlo.nbytes(params)


def test_a_python_boundary_of_float32_moments_beside_narrow_ones_holds_nothing():
    params = params_of(jnp.bfloat16)
    inner = promoting(optax.adam(1e-3, mu_dtype=jnp.float32))
    with jax.numpy_dtype_promotion("standard"):
        program = static_program(inner, "update_params", params, True)
    assert hlo.temporaries(program) < 0.01 * hlo.nbytes(params)


@pytest.mark.parametrize("boundary", [True, None])
@pytest.mark.parametrize("params_dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("sums_dtype", [jnp.bfloat16, slow(jnp.float16)])
@pytest.mark.parametrize("name", [slow("sgd"), slow("momentum"), "adamw"])
def test_narrow_sums_take_nothing_back_at_the_boundary(
    name, sums_dtype, params_dtype, boundary
):
    """The float32 mean that moments and updates share is never written to memory."""
    params = params_of(params_dtype)
    options = {"every_k": None if boundary else 8, "accumulator_dtype": sums_dtype}
    program = static_program(
        OPTIMIZERS[name], "update_params", params, boundary, **options
    )
    assert hlo.temporaries(program) < 0.01 * hlo.nbytes(params)


def test_a_counted_boundary_builds_one_cond():
    program = window_program(
        oa.accumulate(OPTIMIZERS["adamw"], 8), "update", params_of()
    )
    assert len(hlo.operations(program, "conditional")) == 1


@pytest.mark.parametrize("way", WAYS)
def test_every_k_1_costs_what_the_inner_optimizer_costs(way):
    params, inner = params_of(), OPTIMIZERS["adamw"]
    tx = oa.accumulate(inner, every_k=1)
    state = jax.eval_shape(tx.init, params)
    assert state.window.grads == ()
    program = window_program(tx, way, params)
    alone = window_program(inner, "update", params)
    assert hlo.operations(program, "conditional") == []
    flops, alone_flops = (p.cost_analysis()["flops"] for p in (program, alone))
    assert flops <= alone_flops + 16  # the counters
    assert hlo.temporaries(program) <= hlo.temporaries(alone) + 64


def test_off_the_boundary_nothing_reads_the_parameters():
    """The accumulating program has no use for them, so XLA drops them from it."""
    params = params_of()
    tx = oa.accumulate(OPTIMIZERS["adamw"])
    state = jax.eval_shape(tx.init, params)

    def step(params, state, grads):
        return tx.update_params(grads, state, params, boundary=False)

    program = hlo.compiled(step, params, state, params)
    accessed = program.cost_analysis()["bytes accessed"]
    # Read g, read acc, write acc.
    assert accessed < 3.01 * hlo.nbytes(params)


@pytest.mark.parametrize("way", WAYS)
def test_one_trace_serves_every_micro_step(way):
    tx = oa.accumulate(OPTIMIZERS["adamw"], every_k=3)
    params = {"w": jnp.ones((4, 3)), "b": jnp.zeros(3)}

    @jax.jit
    @functools.partial(chex.assert_max_traces, n=1)
    def step(params, state, grads, weight, value):
        return stepper(tx, way)(params, state, grads, weight=weight, value=value)

    chex.clear_trace_counter()
    state = tx.init(params)
    for i in range(7):
        params, state = step(params, state, params, jnp.float32(i), jnp.float32(i))
    assert oa.gradient_step(state) == 2
