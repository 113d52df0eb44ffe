"""Windows under plain `jax.jit`: a row for each device, and one exchange per update.

`oa.value_and_grad(..., local=True)` gives every device its own gradients, as rows of
arrays, and `oa.accumulate(..., mesh=)` keeps a window for each of them.
"""

import functools
import itertools
from typing import Any, NamedTuple

import chex
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
# Clips in one of two windows, and with an epsilon, without which Adam does not see how
# large a gradient is.
ADAMW = promoting(
    optax.chain(optax.clip_by_global_norm(1.45), optax.adamw(0.1, eps=0.1))
)
# In NumPy, of which every training has copies of its own to donate.
PARAMS = {
    "w": np.random.default_rng(0).normal(size=(3, 2 * COUNT)).astype(np.float32),
    "b": np.full(2 * COUNT, 0.1, np.float32),
}
close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=2e-6)


def count(params, x, mask, *others):
    del params, x, others
    return mask.sum()


def total(params, x, mask):
    """The sum whose mean is `devices.loss`, in a unit of about a window."""
    return devices.loss(params, x, mask) * mask.sum().astype(x.dtype) / 32


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
        pytest.param("zero2", AUTO, marks=pytest.mark.slow),
        pytest.param("zero2", EXPLICIT, marks=core),
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
    (AUTO, "update", "ratio", "by count"): [],
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
    loss: Any = devices.loss
    options: dict[str, Any] = {}
    if reduction != "mean":  # In which NaN counts, whatever its weight.
        x, loss, options = jnp.nan_to_num(x), total, {"reduction": "sum"}
    if reduction == "ratio":
        options |= {"weight": lambda *batch: count(*batch) / 32}
    every_k, boundaries = closing(how)
    tx = oa.accumulate(ADAMW, every_k, reduction=reduction, **place.options)
    f = differentiated(place, loss, **options)
    params, state = train(place, tx, x, mask, update, boundaries, f)
    loss = total if reduction == "sum" else devices.loss
    wanted = global_batches(ADAMW, x, mask, loss=loss)
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
@pytest.mark.parametrize(
    "how", ["by count", slow("by a Python bool"), slow("by an array")]
)
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


@mostly_auto
def test_a_linen_train_state_keeps_batch_statistics_that_any_row_counts_for(kind):
    """They are averaged over devices by weight; of no weight they stay."""
    place = layout("whole", kind)
    x, mask = devices.examples(3)
    mask = mask.at[1].set(False)

    def loss(params, x, mask, stats):
        number = jnp.maximum(mask.sum(), 1).astype(x.dtype)
        mean = jnp.sum(jnp.where(mask[:, None], x, 0), 0) / number
        return devices.loss(params, x, mask), {"mean": stats["mean"] + mean}

    f = differentiated(place, loss, carry_argnum=3)
    state = oaf.TrainState.create(
        apply_fn=None,
        params=place.put(PARAMS, P()),
        tx=oa.accumulate(ADAMW, K, skip=oa.skip_not_finite, **place.options),
        batch_stats=place.put({"mean": np.zeros(3, np.float32)}, P()),
    )

    @jax.jit
    def step(state, x, mask):
        result, info = f(state.params, x, mask, state.batch_stats)
        (value, stats), grads = result
        return state.apply_gradients(
            grads=grads, weight=info.weight, value=value, batch_stats=stats
        )

    x = jnp.nan_to_num(x)
    means = [x[i][mask[i]].mean(0) if mask[i].any() else 0 for i in range(3)]
    for i in range(3):
        state = jax.block_until_ready(step(state, x[i], mask[i]))
        close(state.batch_stats["mean"], sum(means[: i + 1]))


@mostly_auto
def test_windows_of_rows_close_inside_a_scan(kind):
    """What goes round has the type it came in."""
    place = layout("whole", kind)
    x, mask = devices.examples(2 * K)
    tx = oa.accumulate(
        ADAMW, K, skip=oa.skip_not_finite, noise_decay=0.9, **place.options
    )
    step = micro_step(place, tx)

    @jax.jit
    def steps(params, state, x, mask):
        def body(carry, batch):
            return step(*carry, *batch), None

        return jax.lax.scan(body, (params, state), (x, mask))[0]

    params = place.put(PARAMS, P())
    x, mask = place.put((x, mask), P(None, AXIS))
    params, state = steps(params, tx.init(params), x, mask)
    x, mask = jax.device_get((x, mask))
    close(params, global_batches(ADAMW, x, mask))
    assert oa.gradient_step(state) == 2


INNER = {
    "narrow moments": optax.adamw(0.1, eps=0.1, mu_dtype=jnp.bfloat16),
    "one that branches": optax.apply_if_finite(optax.adamw(0.1, eps=0.1), 2),
    "one that looks ahead": optax.contrib.schedule_free(optax.sgd(0.1), 0.1),
}


@pytest.mark.slow
@kinds
@pytest.mark.parametrize("update", WAYS)
@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize("how", ["by count", "by a Python bool"])
def test_other_optimizers_see_the_sum_of_all_rows(kind, update, name, how):
    """In one exchange, also if updates and state are computed one after the other."""
    place, inner = layout("whole", kind), promoting(INNER[name])
    x, mask = devices.examples(2 * K)
    every_k, boundaries = closing(how)
    tx = oa.accumulate(inner, every_k, **place.options)
    params, _ = train(place, tx, x, mask, update, boundaries)
    # Optax alone rounds narrow moments here and there, as it is compiled or not.
    atol = 3e-4 if name == "narrow moments" else 2e-6
    close(params, global_batches(inner, x, mask), atol=atol)
    params = place.put(PARAMS, P())
    batch = place.batch(x[0], mask[0])
    step = jax.jit(micro_step(place, tx, update), static_argnums=4)
    boundary = None if boundaries is None else True
    lowered = step.lower(params, tx.init(params), *batch, boundary)
    where = "branch" if boundaries is None else "entry"
    assert hlo.exchanges(optimized(lowered)) == {f"all-reduce, {where}": 1}


@pytest.mark.slow
@needs_four
@kinds
@pytest.mark.parametrize("axis_name", [(AXIS, "model"), [AXIS, "model"]])
def test_two_axis_names_have_a_row_for_each_device(kind, axis_name):
    shape = COUNT // 2, 2
    mesh = jax.make_mesh(shape, (AXIS, "model"), axis_types=(kind, kind))
    place = Layout(mesh, axis_name)
    x, mask = devices.examples(2 * K)
    for scatter in (False, True):
        tx = oa.accumulate(ADAMW, K, scatter=scatter, **place.options)
        params, state = train(place, tx, x, mask)
        close(jax.device_get(params), global_batches(ADAMW, x, mask))
        assert state.window.weight.shape == (COUNT,)


@pytest.mark.slow
@needs_four
@kinds
def test_what_reads_each_gradient_works_on_gradients_in_parts(kind):
    """HSDP with `skip` and the noise scale: norms are within a replica's devices."""
    options = {"skip": oa.skip_not_finite, "noise_decay": 0.9}
    _, step, params, state = laid_out("hsdp", kind, **options)
    x, mask = spread("hsdp", 2 * K)
    half = x.shape[1] // 2
    x = jnp.nan_to_num(x).at[2, half:].set(jnp.nan)  # The second replica rejects it.
    got = run(step, params, state, x, mask)
    mesh = jax.make_mesh((2,), (AXIS,), axis_types=(AUTO,), devices=jax.devices()[:2])
    whole = Layout(mesh)
    tx = oa.accumulate(ADAMW, K, **options, **whole.options)
    wanted = jax.device_get(train(whole, tx, x, mask))
    assert wanted[1].window.skipped.tolist() == [0, 1]
    close(jax.device_get(got), wanted, rtol=1e-4)


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
        across = [[i, i + COUNT // 2] for i in range(COUNT // 2)]
        inside = [list(range(i, i + COUNT // 2)) for i in (0, COUNT // 2)]
        found = hlo.collectives(compiled)
        (crossing,) = [x for x in found if sorted(x.groups) != inside]
        assert sorted(crossing.groups) == across
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
def test_in_parts_the_gradient_alone_is_copied_and_that_by_jax():
    """A part of a gradient that JAX computes transposed, as without any window."""
    compiled = large("hsdp", AUTO, promoting(optax.adamw(1e-3)))
    found = [x for x in hlo.placed(compiled) if x.name == "copy" and x.nbytes > 4096]
    assert {x.place for x in found} <= {"entry"}
    assert len(found) <= 1


# --- Rows that differ ---


@mostly_auto
@pytest.mark.parametrize("update", ["update_params", slow("update")])
def test_a_device_that_rejects_its_row_leaves_the_others_alone(kind, update):
    """NaN in rows that count, on one device."""
    place = layout("whole", kind)
    x, mask = devices.examples(2 * K)
    x, mask = jnp.nan_to_num(x, nan=1.0), jnp.ones_like(mask)
    own = slice(3, 6)  # all that the second device has
    spoilt = x.at[K - 1, own].set(jnp.nan).at[K, own].set(jnp.nan)
    tx = oa.accumulate(ADAMW, K, skip=oa.skip_not_finite, **place.options)
    params, state = train(place, tx, spoilt, mask, update)
    counted = mask.at[K - 1, own].set(False).at[K, own].set(False)
    close(params, global_batches(ADAMW, x, counted))
    assert state.window.skipped.tolist() == [0, 2] + [0] * (COUNT - 2)


def random_rows(steps, seed=0):
    """Gradients, losses and weights of every device, of which one has no weight."""
    random = np.random.default_rng(seed)
    for i in range(steps):
        grads = jax.tree.map(
            lambda p: jnp.asarray(random.normal(size=(COUNT, *p.shape)), jnp.float32),
            PARAMS,
        )
        weight = jnp.asarray(random.integers(1, 9, COUNT), jnp.float32)
        loss = jnp.asarray(random.normal(size=COUNT), jnp.float32)
        yield grads, loss, weight.at[i % COUNT].set(0)


@mostly_auto
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_row_has_a_weight_of_its_own(kind, reduction):
    """Gradients that are made by hand, and lie on one device."""
    place = layout("whole", kind)
    tx = oa.accumulate(SGD, K, reduction=reduction, **place.options)
    params = place.put(PARAMS, P())
    state, step = tx.init(params), jax.jit(tx.update)
    batches = list(random_rows(K))
    for grads, loss, weight in batches:
        updates, state = step(grads, state, params, weight=weight, value=loss)
    weights = np.stack([weight for _, _, weight in batches])
    factor = weights if reduction == "mean" else np.ones_like(weights)
    divisor = 1 if reduction == "sum" else weights.sum()

    def wanted(*rows):
        return -0.1 * np.einsum("kd,kd...->...", factor, np.stack(rows)) / divisor

    close(updates, jax.tree.map(wanted, *(grads for grads, _, _ in batches)))


@mostly_auto
@pytest.mark.parametrize("reduction", ["mean", "ratio"])
@pytest.mark.parametrize("weight", [3 * COUNT, slow(COUNT), slow(None)])
def test_a_number_is_a_weight_that_devices_share_equally(kind, reduction, weight):
    place = layout("whole", kind)
    tx = oa.accumulate(SGD, K, reduction=reduction, **place.options)
    params = place.put(PARAMS, P())
    step = jax.jit(tx.update_params, static_argnames="weight")
    by_row = jax.jit(tx.update_params)
    got, wanted = [(params, tx.init(params)) for _ in range(2)]
    share = jnp.full(COUNT, (weight or 1) / COUNT, jnp.float32)
    given = {} if weight is None else {"weight": weight}
    for i, (grads, loss, _) in enumerate(random_rows(K)):
        got = step(grads, got[1], got[0], value=loss, **given)
        wanted = by_row(grads, wanted[1], wanted[0], value=loss, weight=share)
        assert jnp.sum(got[1].window.weight) == (i + 1) * (weight or 1)
    chex.assert_trees_all_close(got, wanted, rtol=1e-6)
    assert oa.has_updated(got[1])


@kinds
@pytest.mark.parametrize("weight", [None, 8, np.arange(COUNT), jnp.arange(COUNT)])
@pytest.mark.parametrize("scatter", [False, slow(True)])
def test_rows_are_taken_without_jit(kind, weight, scatter):
    """Made by hand, on one device."""
    place = layout("whole", kind)
    tx = oa.accumulate(SGD, 2, scatter=scatter, **place.options)
    params = place.put(PARAMS, P())
    given = {} if weight is None else {"weight": weight}
    grads = {name: jnp.ones((COUNT, *p.shape)) for name, p in PARAMS.items()}
    state = tx.init(params)
    for _ in range(2):
        params, state = tx.update_params(grads, state, params, **given)
    close(params, jax.tree.map(lambda p: p - 0.1, PARAMS))
    with refused("`weight` must be finite and >= 0", "-1"):
        tx.update_params(grads, state, params, weight=-1)


def recording(*names):
    """An optimizer that keeps what it is given by these names."""

    def update(updates, state, params=None, **given):
        del state, params
        return updates, {name: given[name] for name in names}

    def init(params):
        whole = {"value": jnp.zeros([]), "grad": params}
        return {name: whole[name] for name in names}

    return optax.GradientTransformationExtraArgs(init, update)


@mostly_auto
def test_the_inner_optimizer_sees_value_and_grad_of_the_global_batch(kind):
    place = layout("whole", kind)
    x, mask = devices.examples(K)
    tx = oa.accumulate(recording("value", "grad"), K, **place.options)
    f = differentiated(place)
    params = place.put(PARAMS, P())
    state = tx.init(params)

    @jax.jit
    def step(state, x, mask):
        (value, grads), info = f(params, x, mask)
        given = {"weight": info.weight, "value": value, "grad": grads}
        return tx.update(grads, state, params, **given)[1]

    for i in range(K):
        state = step(state, x[i], mask[i])
    batch = jnp.nan_to_num(x).reshape(-1, 3), mask.ravel()
    value, grads = jax.value_and_grad(devices.loss)(PARAMS, *batch)
    close(state.inner_state, {"value": value, "grad": grads})


@mostly_auto
@pytest.mark.parametrize("measure", [slow("noise_decay"), slow("adaptive_k")])
def test_the_noise_scale_of_rows_is_that_inside_shard_map(kind, measure):
    x, mask = devices.examples(2 * K)
    inner, options = promoting(optax.sgd(0.0)), {"noise_decay": 0.9}
    every_k: Any = K
    if measure == "adaptive_k":
        every_k = oa.noise.adaptive_k(min_k=1, max_k=4)
    tx = oa.accumulate(inner, every_k, axis_name=AXIS, **options)
    step, (params, inside) = devices.windows("checked", tx)
    for i in range(2 * K):
        params, inside = step(params, inside, x[i], mask[i], None)
    place = layout("whole", kind)
    tx = oa.accumulate(inner, every_k, **options, **place.options)
    params = place.put(jax.device_get(devices.PARAMS), P())
    _, rows = run(micro_step(place, tx), params, tx.init(params), x, mask)
    rows, inside = jax.device_get((rows, inside))
    chex.assert_trees_all_close(rows.noise, inside.noise, rtol=1e-4)
    chex.assert_trees_all_close(rows.window, inside.window, rtol=1e-4)
    assert rows.gradient_step == inside.gradient_step >= 2


@mostly_auto
@pytest.mark.parametrize("update", ["update_params", slow("update")])
def test_overwritten_leaves_are_reduced_over_the_rows(kind, update):
    """The largest of all; the last of the last device that counts; the sum."""
    place = layout("whole", kind)
    names = {"amax": "max", "scale": "last", "seen": "sum"}
    tx = oa.accumulate(SGD, 2, overwrite=names.get, **place.options)
    params = place.put(dict.fromkeys(["w", *names], jnp.ones(2)), P())
    state, numbers = tx.init(params), jnp.arange(COUNT, dtype=jnp.float32)
    weight = jnp.ones(COUNT).at[-1].set(0)
    for i in range(2):
        own = jnp.stack([numbers, -numbers], 1) + i
        grads = dict.fromkeys(params, own)
        params, state = jax.jit(stepper(tx, update))(
            params, state, grads, weight=weight
        )
    last = COUNT - 2  # the last one with a weight
    total = last * (last + 1)
    count = COUNT - 1
    wanted = {
        "w": [1 - 0.1 * (last / 2 + 0.5), 1 - 0.1 * (0.5 - last / 2)],
        "amax": [last + 1.0, 1.0],
        "scale": [last + 1.0, 1.0 - last],
        "seen": [total + 1.0 * count, -total + 1.0 * count],
    }
    close(
        params, jax.tree.map(jnp.asarray, wanted, is_leaf=lambda x: isinstance(x, list))
    )


# --- The state ---


def half_a_window(kind, **options):
    """`K + 1` micro-steps of rows, the last of which has opened another window."""
    place = layout("whole", kind)
    x, mask = devices.examples(2 * K)
    tx = oa.accumulate(ADAMW, K, **options, **place.options)
    params = place.put(jax.device_get(devices.PARAMS), P())
    step = micro_step(place, tx)
    params, state = run(step, params, tx.init(params), x[: K + 1], mask[: K + 1])
    rest = x[K + 1 :], mask[K + 1 :]
    wanted = global_batches(ADAMW, x, mask, params=devices.PARAMS)
    return step, params, state, rest, wanted


@pytest.mark.parametrize("kind", [pytest.param(AUTO, marks=core), slow(EXPLICIT)])
def test_a_window_of_rows_is_continued_inside_shard_map(kind):
    _, params, state, rest, wanted = half_a_window(kind, skip=oa.skip_not_finite)
    tx = oa.accumulate(ADAMW, K, axis_name=AXIS, skip=oa.skip_not_finite)
    step, (_, start) = devices.windows("checked", tx)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, start)
    # Between meshes of two kinds through the host.
    params, state = jax.device_get((params, state))
    for x, mask in zip(*rest, strict=True):
        params, state = step(params, state, x, mask, None)
    close(params, wanted)


@pytest.mark.slow
@kinds
def test_a_window_inside_shard_map_is_continued_by_rows(kind):
    x, mask = devices.examples(2 * K)
    tx = oa.accumulate(ADAMW, K, axis_name=AXIS)
    step, (params, state) = devices.windows("checked", tx)
    for i in range(K + 1):
        params, state = step(params, state, x[i], mask[i], None)
    _, _, rows, rest, wanted = half_a_window(kind)
    chex.assert_trees_all_close(rows, state, rtol=1e-4, atol=1e-6)
    place = layout("whole", kind)
    tx = oa.accumulate(ADAMW, K, **place.options)
    params, state = jax.device_get((params, state))
    params, _ = run(micro_step(place, tx), params, state, *rest)
    close(params, wanted)


@mostly_auto
def test_open_windows_of_rows_come_back_from_orbax_with_the_same_bits(kind, tmp_path):
    step, params, state, rest, wanted = half_a_window(kind)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "saved", (params, state))
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "saved", (params, state))
    for leaf, before in zip(
        *map(jax.tree.leaves, (restored, (params, state))), strict=True
    ):
        assert leaf.sharding == before.sharding
    restored, straight = run(step, *restored, *rest), run(step, params, state, *rest)
    for leaf, other in zip(*map(jax.tree.leaves, (restored, straight)), strict=True):
        assert np.asarray(leaf).tobytes() == np.asarray(other).tobytes()
    close(restored[0], wanted)


@mostly_auto
@pytest.mark.parametrize("number", [slow(2), slow(1)])
def test_open_windows_of_rows_go_on_with_another_number_of_devices(kind, number):
    """Summed, and given to two devices, which take the same batches."""
    _, params, state, rest, wanted = half_a_window(kind)
    one = oa.sharding.sum_windows(state, rescale=False)
    mesh = jax.make_mesh(
        (number,), (AXIS,), axis_types=(kind,), devices=jax.devices()[:number]
    )
    place = Layout(mesh)
    state = oa.sharding.stack_windows(one, number, rescale=False)
    params, state = jax.device_get((params, state))
    specs = oa.sharding.window_specs(state, AXIS)
    tx = oa.accumulate(ADAMW, K, **place.options)
    x, mask = rest
    x = jnp.nan_to_num(x)  # Of eight devices, only one had nothing but padding.
    params, state = run(
        micro_step(place, tx), place.put(params, P()), place.put(state, specs), x, mask
    )
    close(params, wanted)
    assert state.window.weight.shape == (number,)
    assert oa.gradient_step(state) == 2


# --- `value_and_grad` by itself ---


def parts(*arrays):
    """Each device's own, ``[D, ...]``."""
    return [a.reshape(COUNT, -1, *a.shape[1:]) for a in arrays]


def batch(per_device=4):
    x, mask = devices.examples(1, per_device)
    return x[0], mask[0]


@pytest.mark.parametrize("kind", [pytest.param(AUTO, marks=core), slow(EXPLICIT)])
def test_local_results_are_each_device_s_own(kind):
    """Value, gradient and info, with two micro-batches, and what exchanges nothing."""
    place, (x, mask) = layout("whole", kind), batch()
    options = {"num_microbatches": 2, "skip": oa.skip_not_finite, "noise_scale": True}
    x = x.at[4:8].set(jnp.nan)  # The second device rejects all it has.
    f = jax.jit(differentiated(place, **options))
    compiled = optimized(f.lower(place.put(PARAMS, P()), *place.batch(x, mask)))
    assert hlo.exchanges(compiled) == {}
    own = jax.jit(
        oa.value_and_grad(
            devices.loss,
            batch_argnums=(1, 2),
            weight=count,
            return_info=True,
            **options,
        )
    )
    wanted = [own(PARAMS, *row) for row in zip(*parts(x, mask), strict=True)]
    wanted = jax.tree.map(lambda *rows: jnp.stack(rows), *wanted)
    for got in (
        f(PARAMS, x, mask),
        compiled(place.put(PARAMS, P()), *place.batch(x, mask)),
    ):
        close(got, wanted)
        chex.assert_trees_all_equal_shapes_and_dtypes(got, wanted)
        for leaf in jax.tree.leaves(got):
            rows = NamedSharding(place.mesh, P(AXIS))
            assert leaf.sharding.is_equivalent_to(rows, leaf.ndim)
    assert wanted[1].skipped.tolist() == [2, 2] + [0] * (COUNT - 2)


def small(params, x):
    return jnp.mean((jnp.tanh(x @ params["w"] + params["b"][None]) - 0.5) ** 2)


X = jnp.asarray(np.random.default_rng(1).normal(size=(4 * COUNT, 3)), jnp.float32)


def of_small(kind, fun=small, **options):
    """`fun` of `X`, on all devices, in two micro-batches on each."""
    place = layout("whole", kind)
    defaults = {"num_microbatches": 2, "local": True}
    return jax.jit(oa.value_and_grad(fun, **place.options, **(defaults | options)))


@pytest.mark.slow
@mostly_auto
def test_oa_grad_returns_rows(kind):
    place = layout("whole", kind)
    f = oa.grad(small, num_microbatches=2, local=True, **place.options)
    wanted = jax.vmap(jax.grad(small), (None, 0))(PARAMS, *parts(X))
    close(jax.device_get(jax.jit(f)(PARAMS, X)), wanted)


@pytest.mark.slow
@mostly_auto
def test_a_derivative_of_rows_goes_through_the_loop(kind):
    """Of the values, and of the gradients."""
    f = of_small(kind)
    own = jax.vmap(jax.value_and_grad(small), (None, 0))

    def sums(f, params, x):
        values, grads = f(params, x)
        return jnp.sum(values**2) + sum(jnp.sum(g**2) for g in jax.tree.leaves(grads))

    params = layout("whole", kind).put(PARAMS, P())
    got = jax.jit(jax.grad(lambda p: sums(f, p, X)))(params)
    wanted = jax.grad(lambda p: sums(own, p, *parts(X)))(PARAMS)
    close(jax.device_get(got), wanted, rtol=1e-4)


POLICIES = ["mean", "sum", "last", "stack", "concat"]


@mostly_auto
def test_auxiliary_outputs_are_rows_unless_they_are_not_reduced(kind):
    def fun(params, x):
        aux = dict.fromkeys(POLICIES, x.mean()) | {"concat": x[:, 0]}
        return small(params, x), aux

    f = of_small(kind, fun, has_aux=True, aux={name: name for name in POLICIES})
    (_, aux), _ = f(PARAMS, X)
    # [device, example of a micro-batch, micro-batch]: the split is strided.
    means = X.reshape(COUNT, -1, 2, 3).mean((1, 3))
    wanted = {
        "mean": means.mean(1),
        "sum": means.sum(1),
        "last": means[:, -1],
        "stack": means.ravel(),
        "concat": X[:, 0],
    }
    close(jax.device_get(aux), wanted)
    for leaf in aux.values():
        assert leaf.sharding.is_equivalent_to(NamedSharding(devices.mesh(), P(AXIS)), 1)


@mostly_auto
def test_a_carry_is_averaged_over_devices_all_the_same(kind):
    """By weight; a counter is that of the last device with any, a key moves on."""

    def fun(params, x, carry):
        key, _ = jax.random.split(carry["key"])
        mean = 0.9 * carry["mean"] + 0.1 * x.mean(0)
        new = {"mean": mean, "seen": carry["seen"] + 1, "key": key}
        return small(params, x), new

    def nonzero(params, x, carry):
        del params, carry
        return jnp.sum(jnp.any(x != 0, -1)).astype(jnp.float32)

    x = X.at[:4].set(0).at[4:6].set(0).at[-4:].set(0)
    start = {"mean": jnp.ones(3), "seen": jnp.int32(0), "key": jax.random.key(0)}
    options = {"carry_argnum": 2, "weight": nonzero, "return_info": True}
    ((_, got), _), _ = of_small(kind, fun, **options)(PARAMS, x, start)
    ((_, wanted), _), _ = of_small(kind, fun, local=False, **options)(PARAMS, x, start)
    chex.assert_trees_all_equal(*(jax.random.key_data(c["key"]) for c in (got, wanted)))
    del got["key"], wanted["key"]
    close(got, wanted)
    assert got["seen"] == 2
    assert np.any(got["mean"] != 1)


@mostly_auto
def test_random_keys_differ_between_rows(kind):
    def noisy(params, x, key):
        return small(params, x) + jax.random.uniform(key)

    values, _ = of_small(kind, noisy, num_microbatches=1)(PARAMS, X, jax.random.key(0))
    keys = [jax.random.fold_in(jax.random.key(0), i) for i in range(COUNT)]
    noise = jnp.stack([jax.random.uniform(key) for key in keys])
    close(values, jax.vmap(small, (None, 0))(PARAMS, *parts(X)) + noise)


@pytest.mark.slow
@mostly_auto
def test_integers_among_the_parameters_pass_through(kind):
    """Their gradient is of dtype float0, and they have no window."""

    def fun(params, x):
        return small(params, x) * params["n"].astype(x.dtype)

    params = {**PARAMS, "n": jnp.int32(2)}
    place = layout("whole", kind)
    f = oa.value_and_grad(
        fun, num_microbatches=1, allow_int=True, local=True, **place.options
    )
    inner = optax.masked(SGD, {"w": True, "b": True, "n": False})
    tx = oa.accumulate(inner, 2, **place.options)

    @jax.jit
    def step(params, state, x):
        value, grads = f(params, x)
        assert grads["n"].dtype == jax.dtypes.float0
        assert grads["n"].shape == ()
        return tx.update_params(grads, state, params, value=value)

    params = place.put(params, P())
    state = tx.init(params)
    for _ in range(2):
        params, state = step(params, state, X)
    grads = jax.grad(small)(PARAMS, X)
    wanted = jax.tree.map(lambda p, g: p - 0.1 * 2 * g, PARAMS, grads)
    close(params, {**wanted, "n": jnp.int32(2)})
    assert state.window.grads["n"] is None


# --- The first state ---


def own_rows(state, place):
    """That each leaf of the windows has one row per device, and one on each."""
    rows = place.mesh.shape[place.axis_name]
    leaves = jax.tree.leaves((state.window, state.skip_state))
    assert len(leaves) >= 5
    for leaf in leaves:
        assert leaf.shape[0] == rows
        assert {shard.data.shape[0] for shard in leaf.addressable_shards} == {1}


@kinds
@pytest.mark.parametrize("jitted", [False, True])
def test_init_gives_each_device_its_row_and_no_other(kind, jitted):
    place = layout("whole", kind)
    tx = oa.accumulate(
        ADAMW, K, skip=oa.skip_not_finite, noise_decay=0.9, **place.options
    )
    params = place.put(PARAMS, P())
    if jitted:
        # On an Explicit mesh JAX makes no zeros without the context.
        with jax.set_mesh(place.mesh):
            state = jax.jit(tx.init)(params)
    else:
        state = tx.init(params)
    own_rows(state, place)
    shapes = jax.eval_shape(tx.init, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, state)
    inside = oa.accumulate(
        ADAMW, K, skip=oa.skip_not_finite, noise_decay=0.9, axis_name=AXIS
    )
    start = oa.sharding.stack_windows(inside.init(PARAMS), COUNT)
    chex.assert_trees_all_equal(state, start)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, start)


@kinds
@pytest.mark.parametrize("jitted", [False, True])
def test_the_mesh_may_be_that_of_the_context(kind, jitted):
    place = layout("whole", kind)
    params = place.put(PARAMS, P())
    with jax.set_mesh(place.mesh):
        tx = oa.accumulate(
            ADAMW, K, mesh=jax.sharding.get_abstract_mesh(), axis_name=AXIS
        )
        state = (jax.jit(tx.init) if jitted else tx.init)(params)
    own_rows(state, place)
    start = oa.accumulate(ADAMW, K, **place.options).init(params)
    chex.assert_trees_all_equal(state, start)


@needs_four
@kinds
def test_rows_lie_where_the_parameters_do(kind):
    """HSDP: each device has its part of its replica's window."""
    place = layout("hsdp", kind)
    tx = oa.accumulate(ADAMW, K, skip=oa.skip_not_finite, **place.options)
    params = place.put(PARAMS, place.params)
    state = tx.init(params)
    own_rows(state, place)
    for name, spec in place.params.items():
        wanted = NamedSharding(place.mesh, P("replica", *spec))
        leaf = state.window.grads[name]
        assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim)
    with jax.set_mesh(place.mesh):
        own_rows(jax.jit(tx.init)(params), place)


# --- What can go wrong ---


class TestMistakes:
    """Each message says what came, what is needed, and what to do."""

    place = layout("whole", AUTO)
    tx = oa.accumulate(SGD, K, **place.options)
    rows = jax.tree.map(lambda p: jnp.ones((COUNT, *p.shape)), PARAMS)

    def update(self, grads=None, state=None, **given):
        grads = self.rows if grads is None else grads
        state = self.tx.init(PARAMS) if state is None else state
        return jax.jit(self.tx.update_params)(grads, state, PARAMS, **given)

    def test_a_mesh_without_the_axis(self):
        with refused("`axis_name='batch'` is not an axis of `mesh`", "'data'"):
            oa.accumulate(SGD, K, mesh=self.place.mesh, axis_name="batch")
        with refused("`mesh` needs `axis_name`", "got None", "'data'"):
            oa.accumulate(SGD, K, mesh=self.place.mesh)

    def test_options_that_need_others(self):
        with refused("`scatter=True` needs `mesh`", "Leave `scatter` out"):
            oa.accumulate(SGD, K, axis_name=AXIS, scatter=True)
        f = functools.partial(oa.value_and_grad, small, num_microbatches=1, local=True)
        with refused("`local=True` needs `mesh` and `axis_name`", "got no `mesh`"):
            f()
        with refused("`local=True`", "nothing to `scatter`", "oa.accumulate("):
            f(scatter=True, **self.place.options)
        with refused("`local=True` and `weight` need `return_info=True`"):
            f(weight=lambda _, x: len(x), **self.place.options)
        with refused("`local=True` and `skip` need `return_info=True`"):
            f(skip=oa.skip_not_finite, **self.place.options)
        with refused('`on_skip="wait"` cannot be used with `axis_name`'):
            skip = {"skip": oa.skip_not_finite, "on_skip": "wait"}
            oa.accumulate(SGD, K, **skip, **self.place.options)

    def test_gradients_without_rows(self):
        message = (
            f"`grads['b']` has shape ({2 * COUNT},)",
            "a row for each",
            "local=True",
        )
        with refused(*message):
            self.update(PARAMS)

    def test_gradients_with_as_many_entries_as_there_are_devices(self):
        params = {"w": jnp.ones((COUNT, 2))}
        state = self.tx.init(params)
        for given in (params, None):
            with refused("`grads['w']` has shape", "a row for each", "local=True"):
                self.tx.update(params, state, given)

    def test_rows_without_a_mesh(self):
        tx = oa.accumulate(SGD, K)
        message = "`grads['b']` has shape", "one row per device", "`mesh`"
        with refused(*message):
            tx.update(self.rows, tx.init(PARAMS), PARAMS)

    def test_rows_of_fp8_statistics_in_a_chain(self):
        """Which `accumulate` itself joins."""
        name = "_overwrite_with_gradient"
        params = {"params": {"w": jnp.ones(4)}, name: {"amax": jnp.zeros(2)}}
        grads = jax.tree.map(lambda p: jnp.stack([p] * COUNT), params)
        for tx in (self.tx, optax.chain(optax.identity(), self.tx)):
            state = oaf.TrainState.create(apply_fn=None, params=params, tx=tx)
            if tx is self.tx:
                state = state.apply_gradients(grads=grads)
                assert state.params[name]["amax"].shape == (2,)
                continue
            with refused(
                f"has leaves of the shapes [({COUNT}, 2)]", "of [(2,)]", "into it"
            ):
                state.apply_gradients(grads=grads)

    def test_rows_of_another_number(self):
        grads = jax.tree.map(lambda g: g[1:], self.rows)
        with refused(f"`grads['b']` has shape ({COUNT - 1}, ", f"the {COUNT} devices"):
            self.update(grads)

    def test_rows_of_other_parameters(self):
        grads = {**self.rows, "w": jnp.ones((COUNT, 2, 2))}
        with refused("`grads['w']` has shape (2, 2)", "has shape (3, "):
            self.update(grads)

    def test_the_state_of_one_device(self):
        state = oa.accumulate(SGD, K).init(PARAMS)
        with refused("`state` holds one window", f"stack_windows(state, {COUNT})"):
            self.update(state=state)

    def test_the_state_of_another_number_of_devices(self):
        state = oa.sharding.stack_windows(oa.accumulate(SGD, K).init(PARAMS), 3)
        with refused(
            "windows of 3 devices", f"{COUNT} devices", f"sum_windows(state), {COUNT})"
        ):
            self.update(state=state)

    def test_a_state_of_rows_without_a_mesh(self):
        state = self.tx.init(PARAMS)
        with refused(
            f"`state` holds {COUNT} windows", "`axis_name`", "`mesh`", "sum_windows"
        ):
            oa.accumulate(SGD, K).update(PARAMS, state, PARAMS)

    def test_a_mesh_inside_shard_map(self):
        f = of_small(AUTO)
        with refused("`mesh` was given inside an axis", "Leave `mesh` out"):
            devices.inside("unchecked", f, (None, 0), (None,))(PARAMS, X)

        def step(params, x):
            grads = jax.grad(small)(params, x)
            return self.tx.update_params(grads, self.tx.init(params), params)[0]

        with refused("`mesh` was given inside an axis", "keep `axis_name`"):
            devices.inside("unchecked", step, (None, 0), (None,))(PARAMS, X)

    @pytest.mark.parametrize("number", [-1, np.nan, np.inf])
    def test_a_known_weight_that_is_no_number_of_units(self, number):
        weight = np.ones(COUNT)
        weight[-1] = number
        update, state = self.tx.update_params, self.tx.init(PARAMS)
        with refused("`weight` must be finite and >= 0", "Use 0 for"):
            update(self.rows, state, PARAMS, weight=weight)

    @pytest.mark.parametrize("weight", [jnp.ones([]), np.ones(3), jnp.ones((COUNT, 1))])
    def test_a_weight_that_is_no_row_of_numbers(self, weight):
        with refused("`weight` must be an array with a number for each", "info.weight"):
            self.update(weight=weight)

    def test_a_value_that_is_no_row_of_losses(self):
        for value in (1.0, jnp.ones([]), jnp.ones(COUNT, jnp.int32), jnp.ones(3)):
            with refused(f"`value` must be the losses of the {COUNT} devices", "got"):
                self.update(value=value)

    def test_parameters_in_parts(self):
        place = layout("fsdp", EXPLICIT)
        f = of_small(EXPLICIT)
        message = "is sharded over `axis_name='data'`", "(FSDP)", "jax.reshard(params"
        with refused(*message):
            f(place.put(PARAMS, place.params), X)

    def test_a_pullback(self):
        def step(params):
            _, pullback = jax.vjp(lambda params: small(params, X), params)
            return self.tx.update_params(pullback, self.tx.init(params), params)

        with refused("`grads` is a pullback", "local=True", "shard_map"):
            jax.jit(step)(PARAMS)

    def test_unreduced_gradients(self):
        mesh = devices.mesh(EXPLICIT)
        tx = oa.accumulate(SGD, K)

        def step(w, state, x):
            tagged = jax.reshard(w, NamedSharding(mesh, P(reduced={AXIS})))
            grads = jax.grad(lambda w: jnp.mean((x @ w) ** 2))(tagged)
            return tx.update_params(grads, state, w)

        w = jax.device_put(PARAMS["w"], NamedSharding(mesh, P()))
        x = jax.device_put(X, NamedSharding(mesh, P(AXIS)))
        with refused("`grads` is unreduced", "local=True", "`mesh`"):
            jax.jit(step)(w, tx.init(w), x)
