"""`oa.accumulate` across devices: local until the boundary, and then one exchange."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_accum as oa
from optax_accum.sharding._inside import Inside
from tests.support import devices, hlo
from tests.support.devices import AXIS, COUNT, LARGE, PARAMS, SIDE, window_program
from tests.support.errors import saying
from tests.support.training import SGD, WAYS, promoting, slow, stepper
from tests.support.xla import optimized

pytestmark = [pytest.mark.core, pytest.mark.several_devices]
K = 3
ADAMW = promoting(devices.CLIPPED_ADAMW)
ways = devices.parametrized(devices.INSIDE)
also_in_pmap = devices.parametrized(devices.INSIDE, usual=("pmap", "checked"))


def global_batches(inner, x, mask, k=K):
    """Plain Optax, on the examples of `k` micro-steps and of all devices together."""
    params, state = PARAMS, inner.init(PARAMS)
    for start in range(0, len(x), k):
        counted = x[start : start + k][mask[start : start + k]]
        grads = jax.grad(devices.loss)(params, counted, jnp.ones(len(counted), bool))
        updates, state = inner.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


def run(way, tx, x, mask, update="update_params", boundaries=None):
    """Parameters and state after all micro-steps."""
    step, (params, state) = devices.windows(way, tx, update)
    for i in range(len(x)):
        boundary = None if boundaries is None else jnp.asarray(boundaries[i])
        params, state = step(
            params, state, *devices.whole(way, (x[i], mask[i])), boundary
        )
    # With pmap every device has parameters of its own; they must be the same bits.
    return devices.result(way, params), state


@also_in_pmap
@pytest.mark.parametrize("update", ["update_params", slow("update")])
def test_windows_on_devices_equal_the_global_batch(way, update):
    """AdamW, clipping, uneven weights, a device with nothing but NaN in every step."""
    x, mask = devices.examples(3 * K)
    tx = oa.accumulate(ADAMW, K, axis_name=AXIS)
    params, state = run(way, tx, x, mask, update)
    chex.assert_trees_all_close(
        params, global_batches(ADAMW, x, mask), rtol=1e-5, atol=1e-6
    )
    assert np.all(np.asarray(oa.gradient_step(state)) == 3)


@ways
def test_the_caller_closes_the_windows_of_all_devices(way):
    x, mask = devices.examples(4)
    tx = oa.accumulate(ADAMW, axis_name=AXIS)
    params, _ = run(way, tx, x, mask, boundaries=[False, True, False, True])
    wanted = global_batches(ADAMW, x, mask, k=2)
    chex.assert_trees_all_close(params, wanted, rtol=1e-5, atol=1e-6)


@ways
def test_a_python_boundary_closes_the_windows_of_all_devices(way):
    """Two programs, one for each Python bool."""
    x, mask = devices.examples(4)
    tx = oa.accumulate(ADAMW, axis_name=AXIS)
    stay, (params, state) = devices.windows(way, tx, boundary=False)
    close, _ = devices.windows(way, tx, boundary=True)
    for i in range(4):
        step = close if i % 2 else stay
        params, state = step(params, state, *devices.whole(way, (x[i], mask[i])), None)
    params = devices.result(way, params)
    wanted = global_batches(ADAMW, x, mask, k=2)
    chex.assert_trees_all_close(params, wanted, rtol=1e-5, atol=1e-6)


@ways
@pytest.mark.parametrize("boundaries", [None, [False] * (K - 1) + [True]])
def test_windows_without_weight_on_any_device_update_nothing(way, boundaries):
    """W is 0 on every device: its sum is, and nothing happens."""
    x, mask = devices.examples(K)
    tx = oa.accumulate(ADAMW, None if boundaries else K, axis_name=AXIS)
    params, state = run(way, tx, x, jnp.zeros_like(mask), boundaries=boundaries)
    chex.assert_trees_all_equal(params, PARAMS)
    inner_state = ADAMW.init(PARAMS)
    if way == "pmap":
        inner_state = devices.stacked(inner_state)
    chex.assert_trees_all_equal(state.inner_state, inner_state)
    assert not np.any(state.has_updated)
    assert np.all(np.asarray(state.micro_step) == 0)


@ways
def test_a_device_that_skips_still_joins_the_exchange(way):
    """NaN on one device only: it has no weight, and meets the others all the same."""
    x, mask = devices.examples(2 * K)
    x = jnp.nan_to_num(x, nan=1.0)
    mask = jnp.ones_like(mask)
    per_device = mask.shape[1] // COUNT
    own = slice(per_device, 2 * per_device)  # all that the second device has
    spoilt = x.at[K - 1, own].set(jnp.nan).at[K, own].set(jnp.nan)
    tx = oa.accumulate(ADAMW, K, axis_name=AXIS, skip=oa.skip_not_finite)
    step, (params, state) = devices.windows(way, tx)
    for i in range(2 * K):
        batch = devices.whole(way, (spoilt[i], mask[i]))
        params, state = step(params, state, *batch, None)
    params = devices.result(way, params)
    counted = mask.at[K - 1, own].set(False).at[K, own].set(False)
    wanted = global_batches(ADAMW, x, counted)
    chex.assert_trees_all_close(params, wanted, rtol=1e-5, atol=1e-6)
    assert state.window.skipped.tolist() == [0, 2] + [0] * (COUNT - 2)


@ways
def test_the_inner_optimizer_sees_the_value_of_the_global_batch(way):
    """The global batch's loss, on every device the same."""

    def init(params):
        del params
        return {"value": jnp.zeros([])}

    def update(updates, state, params=None, *, value):
        del state, params
        return updates, {"value": value}

    seen = optax.GradientTransformationExtraArgs(init, update)
    x, mask = devices.examples(K)
    _, state = run(way, oa.accumulate(seen, K, axis_name=AXIS), x, mask)
    counted = x[mask]
    wanted = devices.loss(PARAMS, counted, jnp.ones(len(counted), bool))
    np.testing.assert_allclose(state.inner_state["value"], wanted, rtol=1e-6)


@ways
@pytest.mark.parametrize("update", ["update_params", slow("update")])
def test_every_k_1_equals_the_global_batch_in_every_micro_step(way, update):
    """`every_k=1`: every micro-step meets."""
    x, mask = devices.examples(2)
    tx = oa.accumulate(ADAMW, 1, axis_name=AXIS)
    params, _ = run(way, tx, x, mask, update)
    wanted = global_batches(ADAMW, x, mask, k=1)
    chex.assert_trees_all_close(params, wanted, rtol=1e-5, atol=1e-6)


@ways
@pytest.mark.parametrize("update", ["update_params", slow("update")])
def test_an_inner_optimizer_may_branch_on_the_summed_gradient(way, update):
    """It sees gradients that are the same everywhere, when shapes are asked as well."""
    x, mask = devices.examples(2 * K)
    inner = promoting(optax.apply_if_finite(optax.adamw(0.1), 2))
    tx = oa.accumulate(inner, K, axis_name=AXIS)
    params, _ = run(way, tx, x, mask, update)
    wanted = global_batches(inner, x, mask)
    chex.assert_trees_all_close(params, wanted, rtol=1e-5, atol=1e-6)


@ways
def test_windows_of_devices_close_inside_a_scan(way):
    """What goes round has the type it came in, with a `skip` that tells nothing new."""

    def skip(grads, step, params):
        del step, params
        is_large = jnp.abs(grads["w"]).max() > 1e9
        return is_large, {"constant": jnp.zeros([])}

    tx = oa.accumulate(ADAMW, K, axis_name=AXIS, skip=skip)

    def steps(params, state, x, mask):
        def step(carry, batch):
            params, state = carry
            local = params
            if way == "checked":
                local = jax.lax.pcast(params, AXIS, to="varying")
            grads = jax.grad(devices.loss)(local, *batch)
            weight = batch[1].sum()
            return tx.update_params(grads, state, params, weight=weight), None

        batches = jax.tree.map(lambda a: a.swapaxes(0, 1), (x, mask))
        return jax.lax.scan(step, (params, state), batches)[0]

    x, mask = devices.examples(2 * K)
    state, axes = tx.init(PARAMS), (None, "state", 0, 0)
    state = oa.sharding.stack_windows(state, COUNT, all_leaves=way == "pmap")
    # [steps, examples of all devices, ...] -> [the same examples, steps, ...]
    batch = devices.whole(way, jax.tree.map(lambda a: a.swapaxes(0, 1), (x, mask)))
    params, _ = devices.inside(way, steps, axes, (None, "state"))(PARAMS, state, *batch)
    wanted = global_batches(ADAMW, x, mask)
    params = devices.result(way, params)
    chex.assert_trees_all_close(params, wanted, rtol=1e-5, atol=1e-6)


# (With one device on an axis XLA refuses the sum: "must be in manual mode".)
@pytest.mark.skipif(COUNT % 4 != 0, reason="needs 4, 8, ... devices")
@pytest.mark.parametrize("update", ["update_params", slow("update")])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_parameters_sharded_over_another_axis_stay_sharded(kind, update):
    mesh = jax.make_mesh((COUNT // 2, 2), (AXIS, "model"), axis_types=(kind, kind))
    tx = oa.accumulate(ADAMW, 2, axis_name=AXIS)
    w = jax.device_put(jnp.ones((3, 4)), NamedSharding(mesh, P(None, "model")))
    grads = jnp.arange(2.0 * len(mesh.devices)).reshape(2, -1)
    grads = jax.device_put(grads, NamedSharding(mesh, P(None, AXIS)))
    specs = oa.sharding.window_specs(jax.eval_shape(tx.init, w), AXIS)

    def steps(w, grads):
        state = tx.init(w)
        for g in grads:
            w, state = stepper(tx, update)(w, state, jnp.full_like(w, 1.0) * g[0])
        return w, Inside().stacked(state)

    with jax.set_mesh(mesh):
        mapped = jax.shard_map(
            steps,
            mesh=mesh,
            axis_names={AXIS},
            in_specs=(P(), P(None, AXIS)),
            out_specs=(P(), specs),
            check_vma=False,
        )
        got, state = jax.jit(mapped)(w, grads)
    assert got.sharding.is_equivalent_to(w.sharding, 2)
    mean = jnp.full((3, 4), np.asarray(grads).mean())
    updates, _ = ADAMW.update(mean, ADAMW.init(jnp.ones((3, 4))), jnp.ones((3, 4)))
    np.testing.assert_allclose(got, 1 + updates, rtol=1e-5)
    assert state.window.grads.shape == (len(mesh.devices), 3, 4)


# --- The compiled program ---


@also_in_pmap
@pytest.mark.parametrize("update", WAYS)
@pytest.mark.parametrize("weighted", [True, slow(False)])
def test_there_is_one_exchange_in_the_boundary_branch_and_no_other(
    way, update, weighted
):
    tx = oa.accumulate(promoting(optax.adamw(1e-3)), 4, axis_name=AXIS)
    compiled = window_program(way, tx, update, weighted=weighted)
    assert hlo.exchanges(compiled) == {"all-reduce, branch": 1}


@ways
@pytest.mark.parametrize("update", WAYS)
def test_boundary_false_compiles_to_no_exchange(way, update):
    tx = oa.accumulate(promoting(optax.adamw(1e-3)), axis_name=AXIS)
    assert hlo.exchanges(window_program(way, tx, update, boundary=False)) == {}
    closing = hlo.exchanges(window_program(way, tx, update, boundary=True))
    assert closing == {"all-reduce, entry": 1}


@ways
def test_skip_adds_no_exchange(way):
    tx = oa.accumulate(
        promoting(optax.adamw(1e-3)),
        4,
        axis_name=AXIS,
        skip=oa.skip_not_finite,
    )
    assert hlo.exchanges(window_program(way, tx, "update_params")) == {
        "all-reduce, branch": 1
    }


@ways
@pytest.mark.parametrize("weighted", [True, slow(False)])
@pytest.mark.parametrize("optimizer", [optax.sgd, optax.adamw])
def test_windows_on_devices_are_free_of_copies(way, weighted, optimizer):
    """The sum over devices is the one buffer of the parameters' size."""
    tx = oa.accumulate(promoting(optimizer(1e-3)), 4, axis_name=AXIS)
    compiled = window_program(way, tx, "update_params", weighted=weighted)
    assert hlo.large_copies(compiled, SIDE * SIDE) == []
    assert hlo.temporaries(compiled) < 1.01 * hlo.nbytes(LARGE) + 4096


@ways
@pytest.mark.parametrize("boundary", [None, True])
@pytest.mark.parametrize("optimizer", [slow(optax.sgd), optax.adamw])
def test_bfloat16_windows_on_devices_hold_the_float32_sum_and_exchange_once(
    way, boundary, optimizer
):
    """Updates and state are computed one after the other, from one sum."""
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), LARGE)
    every_k = None if boundary else 4
    tx = oa.accumulate(promoting(optimizer(1e-3)), every_k, axis_name=AXIS)
    compiled = window_program(way, tx, "update_params", narrow, boundary=boundary)
    place = "entry" if boundary else "branch"
    assert hlo.exchanges(compiled) == {f"all-reduce, {place}": 1}
    # In float32, which is twice the parameters.
    assert hlo.temporaries(compiled) < 2.01 * hlo.nbytes(narrow) + 4096


@ways
@pytest.mark.parametrize("optimizer", [slow(optax.sgd), optax.adamw])
def test_a_python_boundary_on_devices_holds_the_sum_alone(way, optimizer):
    tx = oa.accumulate(promoting(optimizer(1e-3)), axis_name=AXIS)
    compiled = window_program(way, tx, "update_params", boundary=True)
    assert hlo.temporaries(compiled) < 1.01 * hlo.nbytes(LARGE) + 4096


@ways
@pytest.mark.parametrize("boundaries", [None, slow([False, True] * 2)])
def test_narrow_moments_on_devices_are_those_of_the_global_batch(way, boundaries):
    """Both phases see the sum of all devices, and a window without weight neither."""
    x, mask = devices.examples(4)
    mask = mask.at[2:].set(False)
    inner = promoting(optax.adamw(0.1, mu_dtype=jnp.bfloat16))
    tx = oa.accumulate(inner, None if boundaries else 2, axis_name=AXIS)
    params, state = run(way, tx, x, mask, boundaries=boundaries)
    wanted = global_batches(inner, x[:2], mask[:2], k=2)
    chex.assert_trees_all_close(params, wanted, rtol=1e-5, atol=1e-6)
    assert np.all(np.asarray(oa.gradient_step(state)) == 1)


@pytest.mark.parametrize("donate", [slow(()), (0, 1)])
def test_donated_under_pmap_a_step_holds_less_than_with_apply_every(donate):
    """Without donation it holds half of the parameters more."""
    params = {str(i): jnp.ones((SIDE, SIDE)) for i in range(8)}

    def loss(params, x):
        for p in params.values():
            x = jnp.tanh(x @ p)
        return jnp.mean(x**2)

    def temporaries(tx, reduce):
        def step(params, state, x):
            grads = reduce(jax.grad(loss)(params, x))
            if isinstance(tx, oa.AccumulateTransformation):
                return tx.update_params(grads, state, params)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        args = devices.stacked((params, tx.init(params), jnp.ones((4, SIDE))))
        mapped: Any = jax.pmap(step, AXIS, donate_argnums=donate)
        return hlo.temporaries(optimized(mapped.lower(*args))) / hlo.nbytes(params)

    sgd = promoting(optax.sgd(0.1))
    ours = temporaries(oa.accumulate(sgd, 4, axis_name=AXIS), lambda grads: grads)
    apply_every = promoting(optax.chain(sgd, optax.apply_every(4)))
    theirs = temporaries(apply_every, lambda grads: jax.lax.pmean(grads, AXIS))
    assert ours < 1.1
    assert ours < theirs - 0.9 if donate else ours < theirs + 0.6


def test_multi_steps_exchanges_in_every_micro_step():
    """What the counts are compared with: the instrument can see the difference."""
    tx = optax.MultiSteps(optax.adamw(1e-3), 4).gradient_transformation()
    mean = optax.stateless(lambda grads, _: jax.lax.pmean(grads, AXIS))
    chained = promoting(optax.chain(mean, tx))
    state = devices.stacked(chained.init(LARGE))
    step = jax.pmap(chained.update, AXIS)
    large = devices.stacked(LARGE)
    assert hlo.exchanges(optimized(step.lower(large, state, large))) == {
        "all-reduce, entry": 1
    }


# --- The state of all devices ---


def half_a_window(way):
    x, mask = devices.examples(2 * K)
    tx = oa.accumulate(ADAMW, K, axis_name=AXIS, skip=oa.skip_not_finite)
    step, (params, state) = devices.windows(way, tx)
    for i in range(K + 1):
        params, state = step(params, state, *devices.whole(way, (x[i], mask[i])), None)
    return tx, step, params, state, x, mask


@ways
def test_stacked_windows_are_restored_with_the_same_bits(way, tmp_path):
    """The stacked form, through a file, bit for bit."""
    _, step, params, state, x, mask = half_a_window(way)
    leaves, structure = jax.tree.flatten((params, state))
    np.savez(tmp_path / "saved.npz", *leaves)
    with np.load(tmp_path / "saved.npz") as saved:
        restored = jax.tree.unflatten(
            structure, [jnp.asarray(x) for x in saved.values()]
        )
    for i in range(K + 1, 2 * K):
        batch = devices.whole(way, (x[i], mask[i]))
        params, state = step(params, state, *batch, None)
        restored = step(*restored, *batch, None)
    chex.assert_trees_all_equal(restored, (params, state))
    wanted = global_batches(ADAMW, x, mask)
    got = devices.result(way, params)
    chex.assert_trees_all_close(got, wanted, rtol=1e-5, atol=1e-6)


@ways
def test_summed_windows_continue_on_one_device(way):
    """Summed, the open window is that of a single device, which takes whole batches."""
    _, _, params, state, x, mask = half_a_window(way)
    if way == "pmap":
        params = devices.first(params)
    state = oa.sharding.sum_windows(state, rescale=False)
    tx = oa.accumulate(ADAMW, K, skip=oa.skip_not_finite)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(PARAMS))
    assert state.micro_step == 1
    for i in range(K + 1, 2 * K):
        counted = x[i][mask[i]]
        grads = jax.grad(devices.loss)(params, counted, jnp.ones(len(counted), bool))
        params, state = tx.update_params(grads, state, params, weight=len(counted))
    wanted = global_batches(ADAMW, x, mask)
    chex.assert_trees_all_close(params, wanted, rtol=1e-5, atol=1e-6)


@ways
def test_a_window_of_one_device_continues_on_all(way):
    """A window that one device has opened is closed by all of them."""
    x, mask = devices.examples(2)
    counted = x[0][mask[0]]
    grads = jax.grad(devices.loss)(PARAMS, counted, jnp.ones(len(counted), bool))
    alone = oa.accumulate(ADAMW, 2)
    params, state = alone.update_params(
        grads, alone.init(PARAMS), PARAMS, weight=len(counted)
    )
    step, _ = devices.windows(way, oa.accumulate(ADAMW, 2, axis_name=AXIS))
    state = oa.sharding.stack_windows(
        state, COUNT, all_leaves=way == "pmap", rescale=False
    )
    if way == "pmap":
        params = devices.stacked(params)
    params, _ = step(params, state, *devices.whole(way, (x[1], mask[1])), None)
    params = devices.result(way, params)
    wanted = global_batches(ADAMW, x, mask, k=2)
    chex.assert_trees_all_close(params, wanted, rtol=1e-5, atol=1e-6)


class TestAnotherNumberOfDevices:
    """An open window of 16 examples, two at a time on each device, moves over."""

    x = jax.random.normal(jax.random.key(0), (32, 3))
    inner = promoting(optax.adam(0.1))

    def train(self, params, state, count, k, examples):
        """Runs `examples` two at a time on each of `count` devices."""
        tx = oa.accumulate(self.inner, k, axis_name=AXIS)
        mesh = jax.make_mesh(
            (count,),
            (AXIS,),
            axis_types=(AxisType.Auto,),
            devices=jax.devices()[:count],
        )

        def step(params, state, x):
            local = jax.lax.pcast(params, AXIS, to="varying")
            grads = jax.grad(lambda p: jnp.mean((x @ p - 1) ** 2))(local)
            return tx.update_params(grads, state, params, weight=len(x))

        specs = oa.sharding.window_specs(state, AXIS)
        step = jax.jit(
            jax.shard_map(
                step,
                mesh=mesh,
                in_specs=(P(), specs, P(AXIS)),
                out_specs=(P(), specs),
            )
        )
        for part in jnp.split(examples, len(examples) // (2 * count)):
            params, state = step(params, state, part)
        return jax.device_get((params, state))

    @pytest.mark.parametrize("seen", [8, slow(24)])
    @pytest.mark.parametrize("after", [2, slow(1), 8])
    def test_a_window_ends_with_as_many_examples(self, after, seen):
        if max(after, 4) > COUNT:
            pytest.skip("needs more devices")
        k = 8 // after
        start = jnp.zeros(3)
        state = oa.accumulate(self.inner, 2).init(start)
        state = oa.sharding.stack_windows(state, 4)
        params, state = self.train(start, state, 4, 2, self.x[:seen])
        state = oa.sharding.sum_windows(state)
        assert int(oa.micro_step(state)) == 4
        if after == 8:  # Half a call of theirs.
            with pytest.raises(ValueError, match=saying("Close it first", "rescale")):
                oa.sharding.stack_windows(state, after)
            return
        state = oa.sharding.stack_windows(state, after)
        params, state = self.train(params, state, after, k, self.x[seen:])
        assert oa.gradient_step(state) == 2
        assert oa.has_updated(state)
        windows = self.x.reshape(2, 16, 3)
        expected, inner_state = start, self.inner.init(start)
        for x in windows:
            grads = jax.grad(lambda p, x=x: jnp.mean((x @ p - 1) ** 2))(expected)
            updates, inner_state = self.inner.update(grads, inner_state, expected)
            expected = optax.apply_updates(expected, updates)
        np.testing.assert_allclose(params, expected, rtol=1e-5)

    def test_rescale_false_keeps_the_number_of_calls(self):
        state = oa.accumulate(SGD, 4).init(PARAMS)._replace(micro_step=jnp.int32(3))
        for all_leaves in (False, True):
            stacked = oa.sharding.stack_windows(
                state, 2, all_leaves=all_leaves, rescale=False
            )
            assert jnp.ravel(stacked.micro_step)[0] == 3
            summed = oa.sharding.sum_windows(stacked, rescale=False)
            assert summed.micro_step == 3
            assert oa.sharding.sum_windows(stacked).micro_step == 6

    def test_under_jit_part_of_a_call_counts_as_one(self):
        state = oa.accumulate(SGD, 4).init(PARAMS)._replace(micro_step=jnp.int32(3))
        stack = jax.jit(oa.sharding.stack_windows, static_argnums=1)
        assert stack(state, 2).micro_step == 2


class TestStackedStates:
    def state(self):
        """Five leaves that are local, and others around them."""
        tx = optax.chain(
            optax.trace(0.9),
            oa.accumulate(promoting(optax.adam(0.1)), 9, skip=oa.skip_not_finite),
        )
        params = {"w": jnp.ones((2, 3)), "b": None, "n": jnp.ones(2, jnp.int32)}
        grads = {"w": jnp.full((2, 3), 2.0), "b": None, "n": jnp.ones(2, jnp.int32)}
        tx = optax.masked(tx, {"w": True, "b": False, "n": False})
        state = tx.init(params)
        for _ in range(8):  # what 2, 4 and 8 devices run in whole calls
            _, state = tx.update(grads, state, params)
        return state

    @pytest.mark.parametrize("all_leaves", [True, False])
    def test_stacking_then_summing_gives_the_state_back(self, all_leaves):
        state = self.state()
        stacked = oa.sharding.stack_windows(state, 4, all_leaves=all_leaves)
        chex.assert_trees_all_equal(oa.sharding.sum_windows(stacked), state)
        chex.assert_trees_all_equal_shapes_and_dtypes(
            oa.sharding.sum_windows(stacked), state
        )

    def test_random_keys_of_the_inner_state_are_stacked_and_summed(self):
        tx = oa.accumulate(optax.noisy_sgd(0.1, key=jax.random.key(3)), 4)
        state = tx.init(PARAMS)
        for all_leaves in (True, False):
            stacked = oa.sharding.stack_windows(state, 4, all_leaves=all_leaves)
            chex.assert_trees_all_equal(oa.sharding.sum_windows(stacked), state)

    def test_only_the_windows_are_stacked(self):
        state = self.state()
        stacked = oa.sharding.stack_windows(state, 4)
        specs = oa.sharding.window_specs(state, "data")
        assert oa.sharding.window_specs(stacked, "data") == specs
        for one, many, spec in zip(
            jax.tree.leaves(state),
            jax.tree.leaves(stacked),
            jax.tree.leaves(specs),
            strict=True,
        ):
            is_local = spec == P("data")
            assert many.shape == ((4, *one.shape) if is_local else one.shape)
        local = [spec for spec in jax.tree.leaves(specs) if spec]
        assert len(local) == 5  # skipped, weight, value, should_skip and w

    def test_stacking_under_jit_places_one_window_per_device(self):
        """Under `jax.jit` no device ever holds the rows of the others."""
        state = oa.accumulate(optax.sgd(0.1), 4).init(LARGE)
        shardings = jax.tree.map(
            lambda spec: NamedSharding(devices.mesh(), spec),
            oa.sharding.window_specs(state, AXIS),
        )
        stack = jax.jit(
            oa.sharding.stack_windows, static_argnums=1, out_shardings=shardings
        )
        program: Any = optimized(stack.lower(state, COUNT))
        outputs = program.memory_analysis().output_size_in_bytes
        assert outputs < 1.5 * hlo.nbytes(LARGE)
        assert hlo.temporaries(program) < 0.5 * hlo.nbytes(LARGE)
        rows = stack(state, COUNT).window.grads["w"]
        assert [s.data.shape for s in rows.addressable_shards] == [
            (1, SIDE, SIDE)
        ] * COUNT

    @pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
    def test_sharded_windows_are_summed_in_place(self, kind):
        state = self.state()
        mesh = devices.mesh(kind)
        shardings = jax.tree.map(
            lambda spec: NamedSharding(mesh, spec),
            oa.sharding.window_specs(state, AXIS),
        )
        placed = jax.device_put(oa.sharding.stack_windows(state, COUNT), shardings)
        chex.assert_trees_all_equal(oa.sharding.sum_windows(placed), state)
        chex.assert_trees_all_equal(jax.jit(oa.sharding.sum_windows)(placed), state)

    def test_states_that_cannot_be_stacked_or_summed_are_refused(self):
        for number in (0, -1):
            with pytest.raises(ValueError, match="`num_devices` must be an int >= 1"):
                oa.sharding.stack_windows(self.state(), number)
        with pytest.raises(TypeError, match="`num_devices` must be an int >= 1"):
            oa.sharding.stack_windows(self.state(), "4")
        state = oa.accumulate(optax.sgd(0.1), 4).init(PARAMS)
        with pytest.raises(ValueError, match="`opt_state` is stacked already"):
            oa.sharding.stack_windows(oa.sharding.stack_windows(state, 2), 4)
        with pytest.raises(ValueError, match="holds one window, not one per device"):
            oa.sharding.sum_windows(state)
        for ask in (
            oa.sharding.sum_windows,
            lambda s: oa.sharding.window_specs(s, "data"),
        ):
            with pytest.raises(ValueError, match="must hold the state of"):
                ask(optax.adam(0.1).init(PARAMS))


# --- What can go wrong ---


@pytest.mark.parametrize("update", WAYS)
def test_an_unbound_axis_name_is_refused(update):
    tx = oa.accumulate(optax.sgd(0.1), 2, axis_name="batch")
    with pytest.raises(
        ValueError, match=r"`axis_name='batch'` is not bound.*jax\.pmap"
    ):
        getattr(tx, update)(PARAMS, tx.init(PARAMS), PARAMS)


def test_an_axis_of_another_name_is_refused():
    tx = oa.accumulate(optax.sgd(0.1), 2, axis_name="batch")
    step, start = devices.windows("pmap", tx)
    x, mask = devices.examples(1)
    with pytest.raises(ValueError, match="`axis_name='batch'` is not bound"):
        step(*start, *devices.whole("pmap", (x[0], mask[0])), None)


@pytest.mark.parametrize("way", ["checked", "unchecked"])
def test_windows_of_another_number_of_devices_are_refused(way):
    """They reach each device as several rows, or none at all."""
    tx = oa.accumulate(optax.sgd(0.1), 2, axis_name=AXIS)
    step, (params, _) = devices.windows(way, tx)
    state = oa.sharding.stack_windows(tx.init(PARAMS), 2 * COUNT)
    x, mask = devices.examples(1)
    with pytest.raises(
        ValueError, match=r"holds 2 windows on this device.*sum_windows"
    ):
        step(params, state, x[0], mask[0], None)


def test_stacked_windows_outside_shard_map_are_refused():
    tx = oa.accumulate(optax.sgd(0.1), 2)
    state = oa.sharding.stack_windows(tx.init(PARAMS), COUNT)
    with pytest.raises(ValueError, match=f"`state` holds {COUNT} windows.*sum_windows"):
        tx.update(PARAMS, state, PARAMS)


@pytest.mark.parametrize("axis_name", [0, (), ["data", 1]])
def test_an_axis_name_that_is_not_a_name_is_refused(axis_name):
    with pytest.raises(TypeError, match="`axis_name` must be the name of an axis"):
        oa.accumulate(optax.sgd(0.1), 2, axis_name=axis_name)


@pytest.mark.parametrize("update", WAYS)
def test_parameters_cast_to_varying_are_refused(update):
    """They are for `jax.grad` alone; the update needs what is the same everywhere."""
    tx = oa.accumulate(ADAMW, 2, axis_name=AXIS)

    def step(params, x):
        params = jax.lax.pcast(params, AXIS, to="varying")
        grads = jax.grad(devices.loss)(params, x, jnp.ones(len(x), bool))
        return stepper(tx, update)(params, tx.init(params), grads)[0]

    x, _ = devices.examples(1)
    with pytest.raises(ValueError, match=r"`params\['b'\]` may differ.*for jax\.grad"):
        devices.inside("checked", step, (None, 0), (None,))(PARAMS, x[0])


@pytest.mark.parametrize("update", WAYS)
def test_gradients_already_summed_by_shard_map_are_refused(update):
    """`jax.grad` has summed them already; a second sum counts them per device."""
    tx = oa.accumulate(optax.sgd(0.1), 1, axis_name=AXIS)

    def step(params, x):
        grads = jax.grad(devices.loss)(params, x, jnp.ones(len(x), bool))
        if update == "update":
            return tx.update(grads, tx.init(params), params)[0]
        return tx.update_params(grads, tx.init(params), params)[0]

    x, _ = devices.examples(1)
    with pytest.raises(ValueError, match=r"already summed over them.*pcast"):
        devices.inside("checked", step, (None, 0), (None,))(PARAMS, x[0])
