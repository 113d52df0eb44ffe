"""Checkpoints: what was saved inside a window goes on from there, bit for bit."""

import functools
from typing import Any

import chex
import flax.jax_utils
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import optax_accum as oa
from tests.support import devices, elastic
from tests.support import stored_checkpoint as first
from tests.support.devices import AXIS, COUNT
from tests.support.errors import refused
from tests.support.training import (
    NAN,
    PARAMS,
    SGD,
    alone,
    micro_batches,
    promoting,
    slow,
    stepper,
    weighted_mean,
)

K = 3
ADAM = promoting(optax.adam(0.1))
MOMENTUM = optax.sgd(0.1, momentum=0.9)
GRADS, WEIGHTS = micro_batches(PARAMS, 2 * K)


def same_bits(got, wanted):
    """The same tree, of the same arrays: NaN, -0 and random keys included."""
    chex.assert_trees_all_equal_structs(got, wanted)
    leaves = map(jax.tree.leaves, (got, wanted))
    for x, y in zip(*(map(jnp.asarray, xs) for xs in leaves), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert bits(x) == bits(y)


def bits(x):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.asarray(x).tobytes()


class Orbax:
    """Checkpoints in a folder."""

    def __init__(self, folder):
        self.folder = folder

    def save(self, name, tree):
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(self.folder / name, tree)

    def restore(self, name, like):
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(self.folder / name, like)


class Flax:
    """Bytes, as `flax.serialization` makes them."""

    def __init__(self, folder):
        del folder
        self.saved = {}

    def save(self, name, tree):
        self.saved[name] = flax.serialization.to_bytes(tree)

    def restore(self, name, like):
        blank = jax.tree.map(jnp.zeros_like, like)
        restored = flax.serialization.from_bytes(blank, self.saved[name])
        return jax.device_put(restored, jax.devices()[0])


# --- One device ---


def accumulated(inner=ADAM, every_k=K, **options):
    return oa.accumulate(inner, every_k, **options)


EVERYTHING = {"skip": oa.skip_not_finite, "noise_decay": 0.9}
VARIANTS = {
    "everything": lambda: accumulated(every_k=oa.noise.adaptive_k(2, 4), **EVERYTHING),
    "chain": lambda: optax.chain(
        optax.clip(0.5), accumulated(skip=oa.skip_not_finite), optax.scale(0.5)
    ),
    "bfloat16": accumulated,
    "random_keys": lambda: accumulated(
        promoting(optax.noisy_sgd(0.1, key=jax.random.key(3)))
    ),
    "plain": accumulated,
    "waiting": lambda: accumulated(skip=oa.skip_not_finite, on_skip="wait"),
    "without_accumulator": lambda: accumulated(every_k=1),
}
CASES = [
    (Orbax, "everything"),
    (Orbax, "chain"),
    (Orbax, "bfloat16"),
    (Orbax, "random_keys"),
    (Flax, "everything"),
]
SLOW = [
    (Orbax, "plain"),
    (Orbax, "waiting"),
    (Orbax, "without_accumulator"),
    (Flax, "chain"),
    (Flax, "bfloat16"),
]


@pytest.mark.parametrize(
    ("saver", "variant"),
    CASES + [pytest.param(*case, marks=pytest.mark.slow) for case in SLOW],
)
def test_a_restored_run_ends_with_the_same_bits_wherever_it_was_saved(
    saver, variant, tmp_path
):
    """The bits come back, and lead on to the same bits in the program that is there."""
    tx, checkpoints = VARIANTS[variant](), saver(tmp_path)
    params, grads = PARAMS, list(GRADS)
    if variant in ("everything", "chain", "waiting"):
        grads[1] = NAN
    if variant == "bfloat16":
        params, grads = optax.tree.cast((params, grads), jnp.bfloat16)
    # What is restored is committed to its device; what is created is not, and JAX
    # compiles for either.
    start = jax.device_put((params, tx.init(params)), jax.devices()[0])
    chex.clear_trace_counter()
    way = "update" if variant == "chain" else "update_params"
    step: Any = jax.jit(chex.assert_max_traces(stepper(tx, way), n=1))

    def micro_step(i, params, state):
        return step(params, state, grads[i], weight=WEIGHTS[i], value=jnp.float32(i))

    straight = [start]
    for i in range(2 * K):
        checkpoints.save(str(i), straight[i])
        straight.append(micro_step(i, *straight[i]))
    for i in range(2 * K):
        resumed = checkpoints.restore(str(i), start)
        same_bits(resumed, straight[i])
        for j in range(i, 2 * K):
            resumed = micro_step(j, *resumed)
        same_bits(resumed, straight[-1])
    assert step._cache_size() == 1
    assert oa.gradient_step(straight[-1][1]) > 0


def test_the_comparison_of_bits_can_fail():
    same_bits(NAN, NAN)
    for x, y in [(0.0, -0.0), (0.0, 1e-45), (1.0, 1.0000001)]:
        with pytest.raises(AssertionError):
            same_bits(jnp.float32(x), jnp.float32(y))
    with pytest.raises(AssertionError):
        same_bits(jnp.float32(0), jnp.int32(0))


def test_flax_serialization_refuses_typed_keys():
    state = VARIANTS["random_keys"]().init(PARAMS)
    with pytest.raises(TypeError, match="key_data"):
        flax.serialization.to_bytes(state)


def test_a_linen_train_state_is_restored_inside_a_window(tmp_path):
    state = TrainState.create(apply_fn=None, params=PARAMS, tx=accumulated(MOMENTUM))
    step = jax.jit(lambda state, grads: state.apply_gradients(grads=grads))
    straight = step(state, GRADS[0])
    checkpoints = Orbax(tmp_path)
    checkpoints.save("state", straight)
    resumed = checkpoints.restore("state", state)
    for g in GRADS[1:K]:
        straight, resumed = step(straight, g), step(resumed, g)
    same_bits(resumed, straight)
    assert oa.has_updated(resumed)


def test_a_checkpoint_manager_finds_the_newest_micro_step(tmp_path):
    """Numbered by micro-steps; a second one, as in a new process, finds the newest."""
    tx = accumulated(MOMENTUM)
    step = jax.jit(stepper(tx))
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    straight = start = PARAMS, tx.init(PARAMS)
    with ocp.CheckpointManager(tmp_path, options=options) as manager:
        for i in range(2 * K):
            straight = step(*straight, GRADS[i], weight=WEIGHTS[i])
            if i + 1 < 2 * K:
                manager.save(i + 1, args=ocp.args.StandardSave(straight))
    with ocp.CheckpointManager(tmp_path, options=options) as manager:
        assert manager.all_steps() == [2 * K - 2, 2 * K - 1]
        taken = manager.latest_step()
        resumed = manager.restore(taken, args=ocp.args.StandardRestore(start))
    assert oa.micro_step(resumed[1]) == K - 1
    for i in range(taken, 2 * K):
        resumed = step(*resumed, GRADS[i], weight=WEIGHTS[i])
    same_bits(resumed, straight)


def test_donated_steps_do_not_change_what_is_being_saved(tmp_path):
    """`save` returns before the files are written; what they hold is what it was."""
    tx = oa.accumulate(SGD, K)
    params = {"w": jnp.ones((512, 1024))}
    step = jax.jit(stepper(tx), donate_argnums=(0, 1))
    start = params, tx.init(params)
    params, state = jax.tree.map(jnp.copy, start)
    with ocp.CheckpointManager(tmp_path) as manager:
        for i in range(2 * K):
            manager.save(i, args=ocp.args.StandardSave((params, state)))
            params, state = step(params, state, {"w": jnp.full_like(params["w"], i)})
        manager.wait_until_finished()
        for i in range(2 * K):
            _, saved = manager.restore(i, args=ocp.args.StandardRestore(start))
            assert (saved.gradient_step, saved.micro_step) == divmod(i, K)
            if saved.micro_step > 0:
                np.testing.assert_array_equal(
                    saved.window.grads["w"], sum(range(i - i % K, i))
                )


# --- Several devices ---


@functools.cache
def half_a_window(way):
    """A step, what is left to do, and a state whose windows are open."""
    x, mask = devices.examples(2 * K)
    tx = oa.accumulate(MOMENTUM, K, axis_name=AXIS)
    step, (params, state) = devices.windows(way, tx)

    copies = jax.jit(lambda tree: jax.tree.map(jnp.copy, tree))

    def go_on(params, state, micro_steps):
        params, state = copies((params, state))  # the step overwrites what it gets
        for i in micro_steps:
            batch = devices.whole(way, (x[i], mask[i]))
            params, state = step(params, state, *batch, None)
        return params, state

    saved = go_on(params, state, range(K + 1))
    return saved, functools.partial(go_on, micro_steps=range(K + 1, 2 * K))


@pytest.mark.several_devices
@devices.parametrized(devices.INSIDE, usual=("pmap", "checked"))
def test_stacked_windows_are_restored_on_their_devices(way, tmp_path):
    """Saved as they are: the rows of all devices, and where they lie."""
    saved, go_on = half_a_window(way)
    checkpoints = Orbax(tmp_path)
    checkpoints.save("stacked", saved)
    resumed = checkpoints.restore("stacked", saved)
    same_bits(resumed, saved)
    for x, y in zip(jax.tree.leaves(resumed), jax.tree.leaves(saved), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
    same_bits(go_on(*resumed), go_on(*saved))


@pytest.mark.several_devices
def test_stacked_windows_are_restored_and_summed_on_one_device(tmp_path):
    """Restored where there is one device, and summed there."""
    saved, go_on = half_a_window("checked")
    checkpoints = Orbax(tmp_path)
    checkpoints.save("stacked", saved)
    here = SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), saved
    )
    params, state = checkpoints.restore("stacked", shapes)
    assert {x.sharding for x in jax.tree.leaves(state)} == {here}
    state = oa.sharding.sum_windows(state, rescale=False)  # of whole batches
    tx = oa.accumulate(MOMENTUM, K)
    x, mask = devices.examples(2 * K)

    @jax.jit
    def step(params, state, x, mask):
        grads = jax.grad(devices.loss)(params, jnp.nan_to_num(x), mask)
        return tx.update_params(grads, state, params, weight=mask.sum())

    for i in range(K + 1, 2 * K):
        params, state = step(params, state, x[i], mask[i])
    assert oa.gradient_step(state) == 2
    wanted, _ = jax.device_get(go_on(*saved))
    chex.assert_trees_all_close(params, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.core
@pytest.mark.several_devices
@pytest.mark.parametrize("kind", [AxisType.Auto, slow(AxisType.Explicit)])
def test_rows_are_restored_like_those_of_init_and_go_on_in_one_program(kind, tmp_path):
    """From plain jit: all that `init` makes lies where micro-steps return it."""
    mesh = devices.mesh(kind)
    split, everywhere = (NamedSharding(mesh, spec) for spec in (P(AXIS), P()))
    tx, step = elastic.training(mesh)

    def start():
        params = jax.device_put(jax.tree.map(np.asarray, devices.PARAMS), everywhere)
        return params, tx.init(params)

    x = elastic.global_batch(0)[: elastic.PER_DEVICE * COUNT]
    batch = jax.device_put(elastic.padded(x, elastic.PER_DEVICE * COUNT), split)
    one = step.lower(*start(), *batch, boundary=False).compile()
    saved = one(*one(*start(), *batch), *batch)
    checkpoints = Orbax(tmp_path)
    checkpoints.save("rows", saved)
    resumed = checkpoints.restore("rows", start())
    same_bits(resumed, saved)
    for x, y in zip(jax.tree.leaves(resumed), jax.tree.leaves(saved), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
    resumed, saved = (one(*tree, *batch) for tree in (resumed, saved))
    same_bits(*(step(*tree, *batch, boundary=True) for tree in (resumed, saved)))


@pytest.mark.several_devices
def test_rows_in_parts_over_another_axis_are_summed_and_made_in_parts():
    """For models of which one device does not hold as many copies as there are rows."""
    mesh = devices.mesh()
    tx = accumulated(SGD, mesh=mesh, axis_name=AXIS)
    params = {"w": jnp.arange(2.0 * COUNT).reshape(COUNT, 2)}
    wanted = jax.tree.map(lambda p: 10 * p, params)
    state = rows(oa.accumulate(SGD, K).init(params))
    saved = jax.tree.map(
        lambda p: jnp.arange(1.0, 5.0).reshape(4, 1, 1) * p[None], params
    )
    parts = NamedSharding(mesh, P(None, AXIS))
    window = state.window._replace(grads=jax.device_put(saved, parts))
    one = oa.sharding.sum_windows(state._replace(window=window), rescale=False)
    new = rows(one, COUNT)
    placed = jax.device_put(new, jax.tree.map(lambda x: x.sharding, tx.init(params)))
    chex.assert_trees_all_equal(one.window.grads, wanted)
    chex.assert_trees_all_equal(
        jax.tree.map(lambda x: x[0], placed.window.grads), wanted
    )
    shards = [
        {shard.data.shape for shard in tree.window.grads["w"].addressable_shards}
        for tree in (one, new, placed)
    ]
    assert shards == [{(1, 2)}, {(COUNT, 1, 2)}, {(1, COUNT, 2)}]


def opened(micro_batches, tx=None, **options):
    """A state after micro-batches of these weights, in a window without an end."""
    tx = accumulated(SGD, None, **options) if tx is None else tx
    state = tx.init(PARAMS)
    for weight in micro_batches:
        _, state = tx.update(PARAMS, state, PARAMS, weight=weight, boundary=False)
    return state


def rows(state, count=4, **options):
    return oa.sharding.stack_windows(state, count, rescale=False, **options)


class TestMicroStepsLeft:
    """`oa.sharding.micro_steps_left`."""

    @pytest.mark.parametrize(
        ("seen", "size", "left"),
        [([], 64, 1), ([], 12, 6), ([16], 48, 1), ([16], 47, 2), ([60, 3], 16, 1)],
    )
    @pytest.mark.parametrize(
        "around",
        [
            lambda state: state,
            rows,
            functools.partial(rows, all_leaves=True),
            lambda state: oa.sharding.sum_windows(rows(state, 3), rescale=False),
            lambda state: {"model": 0, "optimizer": (state, optax.EmptyState())},
        ],
        ids=["one", "stacked", "pmap", "summed", "inside"],
    )
    def test_they_are_what_the_global_batch_lacks(self, seen, size, left, around):
        state = around(opened(seen))
        assert oa.sharding.micro_steps_left(state, 64, size) == left

    def test_they_are_found_in_a_chain(self):
        tx = optax.chain(optax.clip(1.0), oa.accumulate(SGD))
        assert oa.sharding.micro_steps_left(opened([16, 8], tx), 64, 10) == 4

    @pytest.mark.parametrize("size", [16, 20])
    def test_after_an_update_they_are_those_of_a_whole_window(self, size):
        """The sums of the window before are still in the state."""
        tx, state = accumulated(SGD, None), opened([16])
        _, state = tx.update(PARAMS, state, PARAMS, weight=48, boundary=True)
        assert state.window.weight == 64
        assert oa.sharding.micro_steps_left(state, 64, size) == 4
        assert oa.sharding.micro_steps_left(rows(state), 64, size) == 4

    def test_a_window_of_padding_alone_lacks_everything(self):
        assert oa.sharding.micro_steps_left(opened([0, 0]), 64, 16) == 4

    def test_a_rejected_micro_batch_is_lacking(self):
        """Its examples were taken, but are not in the window."""
        tx = accumulated(SGD, None, skip=oa.skip_not_finite)
        state = opened([16], tx)
        _, state = tx.update(NAN, state, PARAMS, weight=16, boundary=False)
        assert oa.sharding.micro_steps_left(state, 64, 16) == 3

    @pytest.mark.parametrize("micro_batch", [1, 7, 16, 1000, 100_003])
    def test_shares_of_a_weight_are_rounded(self, micro_batch):
        """Thirds, on three devices: no micro-step too many, and none too few."""
        state = accumulated(SGD, None).init(PARAMS)
        share = jnp.full(3, micro_batch, jnp.float32) / 3
        row = rows(state, 3)
        for seen in range(1, 12):
            window = row.window._replace(weight=row.window.weight + share)
            row = row._replace(window=window, micro_step=jnp.int32(seen))
            for state in (row, oa.sharding.sum_windows(row)):
                for size in (12 * micro_batch, 12 * micro_batch + 1):
                    left = oa.sharding.micro_steps_left(state, size, micro_batch)
                    assert left == 12 - seen + (size > 12 * micro_batch)

    def test_weights_may_be_fractions(self):
        """0.7 is a little less in float32, and 0.9 / 0.3 a little more than 3."""
        assert oa.sharding.micro_steps_left(opened([0.7]), 1.4, 0.7) == 1
        assert oa.sharding.micro_steps_left(opened([0.7]), 1.5, 0.7) == 2
        assert oa.sharding.micro_steps_left(opened([]), 0.9, 0.3) == 3
        with refused("leaves nothing to add"):
            oa.sharding.micro_steps_left(opened([0.7, 0.7]), 1.4, 0.7)

    def test_one_token_more_is_a_micro_step_more(self):
        state = opened([1_000_000] * 3)
        assert oa.sharding.micro_steps_left(state, 4_000_000, 1_000_000) == 1
        assert oa.sharding.micro_steps_left(state, 4_000_001, 1_000_000) == 2

    @pytest.mark.parametrize("around", [lambda state: state, rows])
    @pytest.mark.parametrize("seen", [[64], [32, 48]])
    def test_a_window_that_has_it_all_is_refused(self, seen, around):
        words = f"weight of {sum(seen)}", "`batch_size=64`", "boundary=True"
        with refused(*words):
            oa.sharding.micro_steps_left(around(opened(seen)), 64, 16)

    @pytest.mark.parametrize("size", [0, -1, float("nan"), float("inf")])
    def test_sizes_are_positive_and_finite(self, size):
        with refused("`batch_size`", str(size)):
            oa.sharding.micro_steps_left(opened([]), size, 16)
        with refused("`micro_batch_size`", str(size)):
            oa.sharding.micro_steps_left(opened([]), 64, size)

    def test_there_is_one_window(self):
        with refused("`opt_state`", "found none"):
            oa.sharding.micro_steps_left(optax.EmptyState(), 64, 16)
        with refused("`opt_state`", "2"):
            oa.sharding.micro_steps_left((opened([]), opened([])), 64, 16)


@pytest.mark.several_devices
def test_unreplicate_loses_the_sums_of_the_other_devices():
    """The trap: what is right for parameters is wrong for an open window."""
    (params, state), go_on = half_a_window("pmap")
    one = flax.jax_utils.unreplicate(state)
    every = oa.sharding.sum_windows(state, rescale=False)
    weights = np.asarray(state.window.weight)
    assert float(one.window.weight) == weights[0]
    assert float(every.window.weight) == weights.sum() > weights[0]
    wanted, _ = go_on(params, state)
    stack = functools.partial(
        oa.sharding.stack_windows, num_devices=COUNT, all_leaves=True, rescale=False
    )
    kept, lost = (go_on(*jax.device_get((params, stack(s))))[0] for s in (every, one))
    chex.assert_trees_all_close(kept, wanted, rtol=1e-5, atol=1e-6)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(lost, wanted, rtol=1e-2)


@pytest.mark.several_devices
def test_a_checkpoint_is_restored_onto_another_mesh(tmp_path):
    """Saved in one piece on one device, restored in parts on all, and back."""
    params = {"w": jnp.arange(2.0 * COUNT).reshape(COUNT, 2)}
    tx = accumulated(MOMENTUM)
    step = jax.jit(stepper(tx))
    grads, weights = micro_batches(params, K)
    straight = params, tx.init(params)
    for g, w in zip(grads[:2], weights[:2], strict=True):
        straight = step(*straight, g, weight=w)
    mesh = devices.mesh()

    def parts(x):
        spec = P(AXIS) if x.ndim else P()
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    checkpoints = Orbax(tmp_path)
    checkpoints.save("whole", straight)
    resumed = checkpoints.restore("whole", jax.tree.map(parts, straight))
    sums = resumed[1].window.grads["w"]
    assert [s.data.shape for s in sums.addressable_shards] == [(1, 2)] * COUNT
    checkpoints.save("parts", resumed)
    resumed = step(*resumed, grads[2], weight=weights[2])
    back = checkpoints.restore("parts", straight)
    same_bits(back, straight)
    same_bits(resumed, step(*straight, grads[2], weight=weights[2]))


# --- What changes between saving and restoring ---


def run(tx, params, state, micro_steps, **kwargs):
    step = jax.jit(functools.partial(stepper(tx), **kwargs))
    for i in micro_steps:
        params, state = step(params, state, GRADS[i], weight=WEIGHTS[i])
    return params, state


@functools.cache
def two_of_four():
    tx = oa.accumulate(MOMENTUM, 4)
    return run(tx, PARAMS, tx.init(PARAMS), range(2))


def is_momentum_after(params, *windows):
    """Compares with the optimizer alone, on the mean gradients of whole windows."""
    means = [weighted_mean(GRADS[part], WEIGHTS[part]) for part in windows]
    chex.assert_trees_all_close(
        params, alone(MOMENTUM, *means)[0], rtol=1e-6, atol=1e-6
    )


class TestChanges:
    @pytest.fixture
    def saved(self, tmp_path):
        """After two micro-steps of four."""
        checkpoints = Orbax(tmp_path)
        checkpoints.save("saved", two_of_four())
        return lambda tx: checkpoints.restore("saved", (PARAMS, tx.init(PARAMS)))

    @pytest.mark.parametrize(("k", "micro_steps"), [(2, 3), (3, 3), (5, 5)])
    def test_a_window_restored_with_another_k_closes_by_the_new_k(
        self, k, micro_steps, saved
    ):
        """The open window keeps what it has; a smaller k ends it at once."""
        tx = oa.accumulate(MOMENTUM, k)
        params, state = run(tx, *saved(tx), range(2, micro_steps))
        assert oa.has_updated(state)
        assert oa.gradient_step(state) == 1
        is_momentum_after(params, slice(micro_steps))

    @pytest.mark.parametrize("every_k", [None, lambda step: 4 + step])
    def test_a_window_restored_with_another_kind_of_boundary_closes(
        self, every_k, saved
    ):
        """A count, a schedule and the caller leave the same state."""
        tx = oa.accumulate(MOMENTUM, every_k)
        params, state = run(tx, *saved(tx), [2], boundary=True)
        assert oa.has_updated(state)
        is_momentum_after(params, slice(3))

    def test_every_k_1_takes_over_once_the_window_is_closed(self, saved):
        old, new = oa.accumulate(MOMENTUM, 4), oa.accumulate(MOMENTUM, 1)
        with pytest.raises(ValueError, match=r"window.*grads"):
            saved(new)
        params, state = saved(old)
        close = jax.jit(functools.partial(old.update_params, weight=0, boundary=True))
        params, state = close(jax.tree.map(jnp.zeros_like, PARAMS), state, params)
        assert oa.has_updated(state)
        state = state._replace(window=state.window._replace(grads=()))
        params, state = run(new, params, state, [2])
        is_momentum_after(params, slice(2), slice(2, 3))

    def test_a_state_of_every_k_1_goes_on_with_windows(self, tmp_path):
        old, new = oa.accumulate(MOMENTUM, 1), oa.accumulate(MOMENTUM, 2)
        checkpoints = Orbax(tmp_path)
        checkpoints.save("saved", run(old, PARAMS, old.init(PARAMS), [0]))
        with pytest.raises(ValueError, match=r"window.*grads"):
            checkpoints.restore("saved", (PARAMS, new.init(PARAMS)))
        params, state = checkpoints.restore("saved", (PARAMS, old.init(PARAMS)))
        grads = new.init(params).window.grads
        state = state._replace(window=state.window._replace(grads=grads))
        params, _ = run(new, params, state, [1, 2])
        is_momentum_after(params, slice(1), slice(1, 3))

    def test_another_inner_optimizer_takes_over_the_open_window(self, saved):
        """Its state is new; the open window and the counts are what they were."""
        new = oa.accumulate(ADAM, 4)
        with pytest.raises(ValueError, match=r"inner_state"):
            saved(new)
        params, state = saved(oa.accumulate(MOMENTUM, 4))
        state = state._replace(inner_state=ADAM.init(params))
        params, _ = run(new, params, state, [2, 3])
        mean = weighted_mean(GRADS[:4], WEIGHTS[:4])
        chex.assert_trees_all_close(params, alone(ADAM, mean)[0], rtol=1e-6)

    def test_skip_and_noise_decay_can_be_added_to_an_old_state(self, saved):
        old, new = oa.accumulate(MOMENTUM, 4), oa.accumulate(MOMENTUM, 4, **EVERYTHING)
        with pytest.raises(ValueError, match=r"skip_state"):
            saved(new)
        # Between two windows: the noise scale is measured over whole ones.
        params, state = run(old, *saved(old), [2, 3])
        start = new.init(params)
        state = state._replace(
            skip_state=start.skip_state, window=start.window, noise=start.noise
        )
        params, state = run(new, params, state, [4, 5], boundary=True)
        is_momentum_after(params, slice(4), slice(4, 5), slice(5, 6))
        assert oa.gradient_step(state) == 3

    def test_a_state_restored_without_a_target_is_refused(self, saved, tmp_path):
        """Orbax then gives lists and dicts, in which nobody finds the state."""
        del saved
        params, state = Orbax(tmp_path).restore("saved", None)
        same_bits(params, PARAMS)
        assert isinstance(state, dict)
        with pytest.raises(ValueError, match="found none in a dict"):
            oa.micro_step(state)

    def test_a_checkpoint_of_multi_steps_can_be_moved(self, tmp_path):
        old = promoting(optax.MultiSteps(MOMENTUM, K).gradient_transformation())
        _, state = old.update(GRADS[0], old.init(PARAMS), PARAMS)
        checkpoints = Orbax(tmp_path)
        checkpoints.save("saved", state)
        tx = oa.accumulate(MOMENTUM, K)
        with pytest.raises(ValueError, match="do not match"):
            checkpoints.restore("saved", tx.init(PARAMS))
        old_state = checkpoints.restore("saved", old.init(PARAMS))
        state = oa.from_multi_steps(old_state)
        params = PARAMS
        for g in GRADS[1:K]:
            params, state = jax.jit(stepper(tx))(params, state, g)
        mean = weighted_mean(GRADS[:K], [1] * K)
        chex.assert_trees_all_close(params, alone(MOMENTUM, mean)[0], rtol=1e-6)


# --- What an earlier version has saved ---


class TestTheFirstVersion:
    """`support/stored_checkpoint.py` wrote it with the first version."""

    @pytest.fixture
    def stored(self):
        return dict(np.load(first.FOLDER / "micro_steps.npz"))

    @pytest.fixture
    def restored(self):
        params = first.initial_params()
        like = params, first.transformation().init(params)
        return Orbax(first.FOLDER).restore("checkpoint", like)

    def test_the_stored_checkpoint_has_the_fields_of_today(self, stored, restored):
        same_bits(jax.tree.leaves(restored), leaves_of(stored, "saved"))
        _, state = restored
        assert (state.gradient_step, state.micro_step) == (1, first.K - 1)
        assert state.window.skipped == 1

    @pytest.mark.usefixtures("loose_promotion")
    def test_the_stored_run_ends_with_the_same_parameters(self, stored, restored):
        inputs = {name: stored[name] for name in first.made_up()}
        micro_steps = range(first.SAVED, first.MICRO_STEPS)
        params, state = first.run(*restored, inputs, micro_steps)
        end = jax.tree.leaves((params, state))
        for x, y in zip(end, leaves_of(stored, "end"), strict=True):
            # Not to the bit: another JAX may compile another order of operations.
            np.testing.assert_allclose(x, y, rtol=1e-6)
        assert oa.gradient_step(state) == 3


def leaves_of(stored, name):
    return [x for key, x in stored.items() if key.startswith(f"{name}_")]
