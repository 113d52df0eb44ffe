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


def slow_case(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


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
    narrow = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    params, tx = place.put(narrow, P()), oa.accumulate(ADAMW, K, **place.options)
    state = tx.init(params)
    assert state.window.grads["w"].dtype == jnp.float32
    got, _ = run(micro_step(place, tx, update), params, state, x, mask)

    tx = oa.accumulate(ADAMW, K * COUNT)
    wanted = jax.tree.map(jnp.asarray, narrow)
    state = tx.init(wanted)

    @jax.jit
    def step(params, state, x, mask):
        grads = jax.grad(devices.loss)(params, x, mask)
        return stepper(tx, update)(params, state, grads, weight=mask.sum())

    for i, d in itertools.product(range(2 * K), range(COUNT)):
        own = slice(3 * d, 3 * d + 3)
        wanted, state = step(wanted, state, x[i, own], mask[i, own])
    assert oa.gradient_step(state) == 2
    chex.assert_trees_all_equal_dtypes(got, wanted)
    close(got, wanted, rtol=1e-2, atol=1e-3)


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


# --- The compiled program ---


def laid_out(name, kind, inner=ADAMW, **options):
    """`accumulate`, the micro-step and its start in a layout."""
    place = layout(name, kind)
    if (name, kind) == ("zero2", AUTO):
        inner = promoting(optax.chain(inner, everywhere(place.mesh)))
    tx = oa.accumulate(inner, K, scatter=place.scatter, **place.options, **options)
    loss = devices.loss
    if (name, kind) == ("hsdp", EXPLICIT):

        def loss(params, x, mask):
            return devices.loss(jax.reshard(params, P()), x, mask)

    f = differentiated(place, loss)
    if (name, kind) == ("fsdp", EXPLICIT):
        of_whole = f

        def f(params, x, mask):
            return of_whole(jax.reshard(params, P()), x, mask)

    state = tx.init(place.put(PARAMS, place.moments))
    return place, micro_step(place, tx, f=f), place.put(PARAMS, place.params), state


@functools.cache
def program(name, kind):
    """The layout's micro-step, compiled as by default."""
    place, step, params, state = laid_out(name, kind)
    batch = place.batch(*(a[0] for a in spread(name, 1)))
    jitted = jax.jit(step, donate_argnums=(0, 1))
    with jax.set_mesh(place.mesh):
        return optimized(jitted.lower(params, state, *batch))


def spread(name, steps):
    """Examples, of which one row has nothing in every step."""
    rows = 2 if name == "hsdp" else COUNT
    return devices.examples(steps, 3 * COUNT // rows, rows)


@LAYOUTS
def test_sharded_parameters_and_moments_are_those_of_the_global_batch(name, kind):
    """And stay where they are, through two windows."""
    place, _, params, state = laid_out(name, kind)
    step, start = program(name, kind), (params, state)
    x, mask = spread(name, 2 * K)
    for i in range(2 * K):
        batch = place.batch(x[i], mask[i])
        params, state = jax.block_until_ready(step(params, state, *batch))
    close(jax.device_get(params), global_batches(ADAMW, x, mask))
    for leaf, before in zip(
        *map(jax.tree.leaves, ((params, state), start)), strict=True
    ):
        if leaf.ndim:  # Counters start on one device.
            assert before.is_deleted()
            assert leaf.sharding.is_equivalent_to(before.sharding, leaf.ndim)


@LAYOUTS
def test_rows_meet_in_one_exchange_in_the_boundary_branch(name, kind):
    compiled = program(name, kind)
    exchanges = hlo.exchanges(compiled)
    scalars = {
        f"{found.name}, {found.place}"
        for found in hlo.collectives(compiled)
        if found.name == "all-reduce" and found.nbytes <= 8
    }
    if name == "whole":  # Loss and weight in the same one.
        assert exchanges == {"all-reduce, branch": 1}
    elif name == "hsdp":
        across = {frozenset({i, i + COUNT // 2}) for i in range(COUNT // 2)}
        inside = {frozenset(range(i, i + COUNT // 2)) for i in (0, COUNT // 2)}
        found = hlo.collectives(compiled)
        (crossing,) = [x for x in found if x.groups != inside]
        assert crossing.groups == across
        assert (crossing.name, crossing.place) == ("all-reduce", "branch")
        # Each device sends its part of the gradients, the loss and the weight.
        assert crossing.nbytes <= 4 * (4 * 4 * 2 * COUNT // (COUNT // 2) + 2)
    else:
        # W, and the norm of what is in parts.
        assert scalars <= {"all-reduce, branch", "all-reduce, branch/branch"}
        gathers = "entry" if name == "fsdp" else "branch/branch"
        assert set(exchanges) - scalars == {
            "reduce-scatter, branch",
            f"all-gather, {gathers}",
        }
        assert exchanges["reduce-scatter, branch"] <= len(PARAMS)


@mostly_auto
@pytest.mark.parametrize("update", ["update", slow("update_params")])
@pytest.mark.parametrize(
    "how", ["no weight", slow("skip"), slow("noise"), slow("every_k=1")]
)
def test_no_option_adds_an_exchange(kind, update, how):
    place = layout("whole", kind)
    options = {"skip": {"skip": oa.skip_not_finite}, "noise": {"noise_decay": 0.9}}
    every_k = 1 if how == "every_k=1" else K
    tx = oa.accumulate(ADAMW, every_k, **options.get(how, {}), **place.options)
    f = differentiated(place, weight=None) if how == "no weight" else None
    step = micro_step(place, tx, update, f, weighted=how != "no weight")
    params = place.put(PARAMS, P())
    batch = place.batch(*(a[0] for a in devices.examples(1)))
    jitted = jax.jit(step, donate_argnums=(0, 1))
    found = hlo.exchanges(optimized(jitted.lower(params, tx.init(params), *batch)))
    where = "entry" if every_k == 1 else "branch"
    assert found == {f"all-reduce, {where}": 1}


@mostly_auto
@pytest.mark.parametrize("update", ["update_params", slow("update")])
def test_a_python_boundary_that_is_false_compiles_to_no_exchange(kind, update):
    place = layout("whole", kind)
    tx = oa.accumulate(ADAMW, **place.options)
    params = place.put(PARAMS, P())
    batch = place.batch(*(a[0] for a in devices.examples(1)))
    jitted = jax.jit(
        micro_step(place, tx, update), static_argnums=4, donate_argnums=(0, 1)
    )
    state = tx.init(params)
    stay, end = (
        hlo.exchanges(optimized(jitted.lower(params, state, *batch, boundary)))
        for boundary in (False, True)
    )
    assert stay == {}
    assert end == {"all-reduce, entry": 1}


SIDE = 128
LARGE = {"w": np.ones((SIDE, SIDE), np.float32), "b": np.zeros(SIDE, np.float32)}


def large(name, kind, inner):
    """The program for parameters that are larger than the batch."""
    place = layout(name, kind)
    parts = oa.sharding.scatter_specs(LARGE, place.mesh, place.mesh.axis_names[-1])
    if (name, kind) == ("zero2", AUTO):
        inner = promoting(optax.chain(inner, everywhere(place.mesh)))
    in_parts = place.put(LARGE, parts)
    params = in_parts if name in ("hsdp", "fsdp") else place.put(LARGE, P())
    tx = oa.accumulate(inner, K, scatter=place.scatter, **place.options)
    state = tx.init(params if name == "whole" else in_parts)
    f = differentiated(place)

    def step(params, state, x, mask):
        whole = params
        if (name, kind) == ("fsdp", EXPLICIT):
            whole = jax.reshard(params, P())
        (_, grads), info = f(whole, x, mask)
        return tx.update_params(grads, state, params, weight=info.weight)

    batch = place.batch(jnp.ones((4 * COUNT, SIDE)), jnp.ones(4 * COUNT, bool))
    jitted = jax.jit(step, donate_argnums=(0, 1))
    with jax.set_mesh(place.mesh):
        return optimized(jitted.lower(params, state, *batch))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param("whole", AUTO, marks=core),
        slow_case("whole", EXPLICIT),
        slow_case("fsdp", AUTO),
        slow_case("fsdp", EXPLICIT),
        slow_case("zero2", AUTO),
        slow_case("zero2", EXPLICIT),
    ],
)
@pytest.mark.parametrize("optimizer", [optax.adamw, slow(optax.sgd)])
def test_windows_of_rows_are_free_of_copies(name, kind, optimizer):
    """Beside what they hold: a device's own gradient, and the sum or what it needs."""
    compiled = large(name, kind, promoting(optimizer(1e-3)))
    assert hlo.large_copies(compiled, SIDE * SIDE // COUNT) == []
    held = 3 if name == "fsdp" else 2  # With fsdp the gathered parameters as well.
    assert hlo.temporaries(compiled) < (held + 0.15) * hlo.nbytes(LARGE) + 4096


@pytest.mark.slow
@needs_four
def test_in_parts_the_gradient_alone_is_copied_and_that_by_jax(kind=AUTO):
    """A part of a gradient that JAX computes transposed, as without any window."""
    compiled = large("hsdp", kind, promoting(optax.adamw(1e-3)))
    found = [x for x in hlo.placed(compiled) if x.name == "copy" and x.nbytes > 4096]
    assert {x.place for x in found} <= {"entry"}
    assert len(found) <= 1
