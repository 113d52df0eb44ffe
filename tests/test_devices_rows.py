"""Windows under plain `jax.jit`: a row for each device, and one exchange per update.

`oa.value_and_grad(..., local=True)` gives every device its own gradients, as rows of
arrays, and `oa.accumulate(..., mesh=)` keeps a window for each of them.
"""

import functools
import itertools
from typing import Any, NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_accum as oa
import optax_accum.flax as oaf
from tests.support import devices, hlo
from tests.support.devices import AXIS, COUNT
from tests.support.errors import refused
from tests.support.training import SGD, WAYS, promoting, slow, stepper
from tests.support.xla import optimized

pytestmark = pytest.mark.several_devices
core = pytest.mark.core
K = 3
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
KINDS = [AUTO, EXPLICIT]
kinds = pytest.mark.parametrize("kind", KINDS)
mostly_auto = pytest.mark.parametrize("kind", [AUTO, slow(EXPLICIT)])
needs_four = pytest.mark.skipif(COUNT % 4 != 0, reason="needs 4, 8, ... devices")
ADAMW = promoting(optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(0.1)))
# In NumPy, of which every training has copies of its own to donate.
PARAMS = {
    "w": np.random.default_rng(0).normal(size=(3, 2 * COUNT)).astype(np.float32),
    "b": np.full(2 * COUNT, 0.1, np.float32),
}
close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=2e-6)


def count(params, x, mask):
    del params, x
    return mask.sum()


def total(params, x, mask):
    """The sum whose mean is `devices.loss`."""
    return devices.loss(params, x, mask) * jnp.maximum(mask.sum(), 1).astype(x.dtype)


# --- Where things lie ---


class Layout(NamedTuple):
    """A mesh, and where parameters and moments lie on it."""

    mesh: Mesh
    axis_name: str = AXIS
    params: Any = P()
    moments: Any = P()
    scatter: bool = False

    def put(self, tree, specs):
        shardings = jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), specs)
        return jax.device_put(tree, shardings)

    def batch(self, *arrays):
        return self.put(arrays, P(self.mesh.axis_names))

    @property
    def options(self):
        return {"mesh": self.mesh, "axis_name": self.axis_name}


def layout(name, kind):
    """Parameters "whole", or "hsdp", "fsdp", "zero2"."""
    if name == "hsdp":
        shape = 2, COUNT // 2
        mesh = jax.make_mesh(shape, ("replica", "fsdp"), axis_types=(kind, kind))
        parts = oa.sharding.scatter_specs(PARAMS, mesh, "fsdp")
        return Layout(mesh, "replica", parts, parts)
    mesh = devices.mesh(kind)
    if name == "whole":
        return Layout(mesh)
    parts = oa.sharding.scatter_specs(PARAMS, mesh, AXIS)
    params = parts if name == "fsdp" else P()
    return Layout(mesh, AXIS, params, parts, scatter=True)


LAYOUTS = pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param("whole", AUTO, marks=core),
        ("whole", EXPLICIT),
        pytest.param("hsdp", AUTO, marks=[core, needs_four]),
        pytest.param("hsdp", EXPLICIT, marks=[pytest.mark.slow, needs_four]),
        pytest.param("fsdp", AUTO, marks=pytest.mark.slow),
        pytest.param("fsdp", EXPLICIT, marks=core),
        pytest.param("zero2", AUTO, marks=core),
        pytest.param("zero2", EXPLICIT, marks=pytest.mark.slow),
    ],
)


def everywhere(mesh):
    """Puts updates on all devices, which on an Auto mesh nothing else says."""
    whole = NamedSharding(mesh, P())
    return optax.stateless(
        lambda updates, _: jax.lax.with_sharding_constraint(updates, whole)
    )


def differentiated(place, loss=devices.loss, **options):
    """Each device's own value and gradient of a batch ``x, mask``."""
    defaults = {"num_microbatches": 1, "weight": count, "return_info": True}
    return oa.value_and_grad(
        loss,
        batch_argnums=(1, 2),
        local=True,
        **place.options,
        **(defaults | options),
    )


def micro_step(place, tx, update="update_params", f=None, *, weighted=True):
    """``step(params, state, x, mask, boundary) -> (params, state)``."""
    f = f or differentiated(place)

    def step(params, state, x, mask, boundary=None):
        (value, grads), info = f(params, x, mask)
        given = {"weight": info.weight} if weighted else {}
        return stepper(tx, update)(
            params, state, grads, boundary=boundary, value=value, **given
        )

    return step


def run(step, params, state, x, mask, boundaries=None):
    """Parameters and state after all micro-steps; boundaries may be Python bools."""
    static = jax.jit(step, static_argnums=4, donate_argnums=(0, 1))
    traced = jax.jit(step, donate_argnums=(0, 1))
    for i in range(len(x)):
        boundary = None if boundaries is None else boundaries[i]
        program = traced if isinstance(boundary, jax.Array) else static
        # One at a time: made-up devices share a few threads.
        params, state = jax.block_until_ready(
            program(params, state, x[i], mask[i], boundary)
        )
    return params, state


def train(place, tx, x, mask, update="update_params", boundaries=None, f=None):
    """Parameters and state after all micro-steps from the start."""
    params = place.put(PARAMS, place.params)
    return run(
        micro_step(place, tx, update, f), params, tx.init(params), x, mask, boundaries
    )


def global_batches(inner, x, mask, k=K, loss=devices.loss, params=PARAMS):
    """Plain Optax on one device, on the examples of `k` micro-steps together."""
    x = jnp.nan_to_num(x)  # What the mask leaves out is zeros there.

    @jax.jit
    def update(params, state, x, mask):
        updates, state = inner.update(jax.grad(loss)(params, x, mask), state, params)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.asarray, params)
    state = inner.init(params)
    for i in range(0, len(x), k):
        params, state = update(
            params, state, x[i : i + k].reshape(-1, 3), mask[i : i + k].ravel()
        )
    return params


# --- The result ---


def closing(how):
    """`every_k`, and the boundaries of two windows of `K` micro-steps."""
    ends = [i % K == K - 1 for i in range(2 * K)]
    return {
        "by count": (K, None),
        "by a Python bool": (None, ends),
        "by an array": (None, [jnp.asarray(end) for end in ends]),
        "early": (K + 1, [end or None for end in ends]),
    }[how]


CLOSINGS = ["by count", "by a Python bool", "by an array", "early"]
REDUCTIONS = ["mean", "ratio", "sum"]
USUAL = {
    (AUTO, "update_params", "mean", "by count"): [core],
    (EXPLICIT, "update", "mean", "by an array"): [core],
    (AUTO, "update", "ratio", "early"): [],
    (EXPLICIT, "update_params", "sum", "by a Python bool"): [],
}


@pytest.mark.parametrize(
    ("kind", "update", "reduction", "how"),
    [
        pytest.param(*case, marks=USUAL.get(case, [pytest.mark.slow]))
        for case in itertools.product(KINDS, WAYS, REDUCTIONS, CLOSINGS)
    ],
)
def test_windows_of_rows_equal_the_global_batch(kind, update, reduction, how):
    """AdamW, clipping, uneven weights, a device that has nothing in every step."""
    place = layout("whole", kind)
    x, mask = devices.examples(2 * K)
    loss, options = devices.loss, {}
    if reduction != "mean":  # In which NaN counts, whatever its weight.
        x, loss, options = jnp.nan_to_num(x), total, {"reduction": "sum"}
    every_k, boundaries = closing(how)
    tx = oa.accumulate(ADAMW, every_k, reduction=reduction, **place.options)
    f = differentiated(place, loss, **options)
    params, state = train(place, tx, x, mask, update, boundaries, f)
    wanted = global_batches(
        ADAMW, x, mask, loss=total if reduction == "sum" else devices.loss
    )
    close(devices.result("auto", params), wanted)
    assert oa.gradient_step(state) == 2
    assert oa.has_updated(state)


@mostly_auto
@pytest.mark.parametrize("update", ["update_params", slow("update")])
def test_every_k_1_updates_on_the_rows_of_every_micro_step(kind, update):
    place = layout("whole", kind)
    x, mask = devices.examples(2)
    tx = oa.accumulate(ADAMW, 1, **place.options)
    params, state = train(place, tx, x, mask, update)
    close(params, global_batches(ADAMW, x, mask, k=1))
    assert state.window.grads == ()


@mostly_auto
@pytest.mark.parametrize("how", ["by count", slow("by a Python bool"), "by an array"])
def test_windows_without_weight_on_any_device_update_nothing(kind, how):
    place = layout("whole", kind)
    x, mask = devices.examples(2 * K)
    mask = mask.at[K:].set(False)
    every_k, boundaries = closing(how)
    tx = oa.accumulate(ADAMW, every_k, **place.options)
    params, state = train(place, tx, x, mask, "update_params", boundaries)
    close(params, global_batches(ADAMW, x[:K], mask[:K]))
    assert oa.gradient_step(state) == 1
    assert not oa.has_updated(state)
    assert oa.micro_step(state) == 0


@mostly_auto
def test_micro_batches_inside_windows_of_rows_equal_the_global_batch(kind):
    """Both levels: three micro-batches in each of three micro-steps."""
    place = layout("whole", kind)
    x, mask = devices.examples(2 * K)
    tx = oa.accumulate(ADAMW, K, **place.options)
    f = differentiated(place, num_microbatches=3)
    params, _ = train(place, tx, x, mask, f=f)
    close(params, global_batches(ADAMW, x, mask))


@pytest.mark.slow
@kinds
@pytest.mark.parametrize("update", WAYS)
def test_bfloat16_rows_equal_micro_batches_one_after_another(kind, update):
    """Each device's gradient is in bfloat16, and their sum in float32."""
    place = layout("whole", kind)
    x, mask = devices.examples(2 * K)
    x = x.astype(jnp.bfloat16)
    narrow = jax.tree.map(lambda p: jnp.asarray(p, jnp.bfloat16), PARAMS)
    params, tx = place.put(narrow, P()), oa.accumulate(ADAMW, K, **place.options)
    state = tx.init(params)
    assert state.window.grads["w"].dtype == jnp.float32
    got, _ = run(micro_step(place, tx, update), params, state, x, mask)

    tx = oa.accumulate(ADAMW, K * COUNT)
    wanted, state = narrow, tx.init(narrow)

    @jax.jit
    def step(params, state, x, mask):
        grads = jax.grad(devices.loss)(params, x, mask)
        return stepper(tx, update)(params, state, grads, weight=mask.sum())

    for i, d in itertools.product(range(2 * K), range(COUNT)):
        own = slice(3 * d, 3 * d + 3)
        wanted, state = step(wanted, state, x[i, own], mask[i, own])
    assert oa.gradient_step(state) == 2
    chex.assert_trees_all_equal_dtypes(got, wanted)
    close(got, wanted, rtol=1e-2)


@mostly_auto
def test_rows_reach_an_accumulate_that_is_last_in_a_chain(kind):
    place = layout("whole", kind)
    x, mask = devices.examples(2 * K)
    tx = optax.chain(optax.identity(), oa.accumulate(ADAMW, K, **place.options))
    params, state = train(place, tx, x, mask, "update")
    close(params, global_batches(ADAMW, x, mask))
    assert oa.gradient_step(state) == 2


@mostly_auto
def test_a_linen_train_state_takes_rows(kind):
    place = layout("whole", kind)
    x, mask = devices.examples(2 * K)
    state = oaf.TrainState.create(
        apply_fn=None,
        params=place.put(PARAMS, P()),
        tx=oa.accumulate(ADAMW, K, **place.options),
    )
    f = differentiated(place)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, x, mask):
        (value, grads), info = f(state.params, x, mask)
        return state.apply_gradients(grads=grads, weight=info.weight, value=value)

    for i in range(2 * K):
        state = jax.block_until_ready(step(state, x[i], mask[i]))
    close(state.params, global_batches(ADAMW, x, mask))
    assert state.gradient_step == 2


class Linear(nnx.Module):
    """`devices.loss` as an NNX module."""

    def __init__(self):
        self.w = nnx.Param(jnp.asarray(PARAMS["w"]))
        self.b = nnx.Param(jnp.asarray(PARAMS["b"]))


@pytest.mark.usefixtures("loose_promotion")
@mostly_auto
def test_an_nnx_optimizer_takes_rows(kind):
    place = layout("whole", kind)
    x, mask = devices.examples(2 * K)

    def loss(model, x, mask):
        return devices.loss({"w": model.w[...], "b": model.b[...]}, x, mask)

    f = oaf.value_and_grad(
        loss,
        num_microbatches=1,
        batch_argnums=(1, 2),
        weight=count,
        local=True,
        return_info=True,
        **place.options,
    )
    model = Linear()
    nnx.update(model, place.put(nnx.state(model), P()))
    optimizer = oaf.Optimizer(
        model, oa.accumulate(ADAMW, K, **place.options), wrt=nnx.Param
    )

    @nnx.jit
    def step(model, optimizer, x, mask):
        (value, grads), info = f(model, x, mask)
        optimizer.update(model, grads, weight=info.weight, value=value)

    for i in range(2 * K):
        step(model, optimizer, x[i], mask[i])
        jax.block_until_ready(nnx.state(model))
    got = {"w": model.w[...], "b": model.b[...]}
    close(got, global_batches(ADAMW, x, mask))
    assert optimizer.gradient_step == 2
