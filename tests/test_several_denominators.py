"""A loss of several means: totals first, then one pass that divides by them."""

import functools
import operator

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import optax_accum as oa
from tests.support import devices, hlo
from tests.support.devices import AXIS, COUNT
from tests.support.training import promoting, slow
from tests.support.xla import optimized

K, LENGTH, EXPERTS, UPDATES = 4, 5, 3, 3
EXAMPLES = K * COUNT
RANDOM = np.random.default_rng(0)
PARAMS = {
    "w": jnp.asarray(RANDOM.normal(size=(3, 4)), jnp.float32),
    "v": jnp.asarray(RANDOM.normal(size=4), jnp.float32),
    "router": jnp.asarray(RANDOM.normal(size=(3, EXPERTS)), jnp.float32),
}
# An epsilon, without which Adam does not see how large a gradient is.
ADAM = promoting(optax.adam(0.1, eps=0.1))


def examples(seed=0):
    """In one step micro-batch i holds the examples i, i + K, ... of each device.

    Micro-batch 0 has no positives, micro-batch 1 no tokens, and micro-batch 2 none for
    the expert that takes most of the others. The first device has no positives at all.
    """
    random = np.random.default_rng(seed)
    microbatch = np.arange(EXAMPLES) % K
    x = random.normal(size=(EXAMPLES, LENGTH, 3))
    mask = np.arange(LENGTH) < random.integers(1, LENGTH + 1, EXAMPLES)[:, None]
    mask[microbatch == 1] = False
    labels = random.integers(0, 2, (EXAMPLES, LENGTH)) * random.integers(1, 4)
    labels[microbatch == 0] = 0
    labels[: EXAMPLES // COUNT] = 0
    scores = np.asarray(PARAMS["router"])
    x[microbatch == 2] = -2 * scores[:, 0]  # and others take these
    return {
        "x": x.astype(np.float32),
        "mask": mask.astype(np.float32),
        "labels": labels.astype(np.int32),
    }


def taken(params, batch):
    """Which expert takes which token, ``[examples, length, experts]``."""
    best = jnp.argmax(batch["x"] @ params["router"], -1)
    return jax.nn.one_hot(best, EXPERTS) * batch["mask"][..., None]


def count(params, batch):
    """What each of the means is over."""
    return {
        "tokens": batch["mask"].sum(),
        "positives": (batch["labels"] > 0).sum().astype(jnp.float32),
        "experts": taken(params, batch).sum((0, 1)),
    }


def loss(params, batch, totals):
    """Means over tokens, positives and the tokens of each expert, and their balance."""
    h = jnp.tanh(batch["x"] @ params["w"])
    probabilities = jax.nn.softmax(batch["x"] @ params["router"])
    error = (h @ params["v"] - 1) ** 2
    of_expert = (taken(params, batch) * error[..., None] * probabilities).sum((0, 1))
    probability = (probabilities * batch["mask"][..., None]).sum((0, 1))
    over_positives = jnp.where(batch["labels"] > 0, jnp.abs(h.sum(-1)), 0).sum()
    return (
        (error * batch["mask"]).sum() / totals["tokens"]
        + 0.5 * over_positives / totals["positives"]
        + (of_expert / jnp.maximum(totals["experts"], 1)).mean()
        + EXPERTS * (totals["experts"] / totals["tokens"] ** 2 * probability).sum()
    )


def whole(params, batch):
    """All at once."""
    return loss(params, batch, jax.lax.stop_gradient(count(params, batch)))


WHOLE, TOTALS = jax.jit(jax.value_and_grad(whole)), jax.jit(count)
BATCH = examples()
in_parts = functools.partial(
    oa.value_and_grad, loss, num_microbatches=K, reduction="sum"
)


def two_passes(params, batch, **over):
    """Counts, and then value and gradient."""
    first = oa.microbatch(count, num_microbatches=K, outputs="sum", **over)
    totals = jax.lax.stop_gradient(first(params, batch))
    return in_parts(**over)(params, batch, totals)


def parts(batch):
    return [
        jax.tree.map(operator.itemgetter(slice(i, None, K)), batch) for i in range(K)
    ]


close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-6)


def assert_whole(result):
    """Value and gradient are those of the batch at once."""
    close(result, WHOLE(PARAMS, BATCH))


def trained():
    """What Adam makes of whole batches."""
    params, state = PARAMS, ADAM.init(PARAMS)
    update = jax.jit(ADAM.update)
    for seed in range(UPDATES):
        _, grads = WHOLE(params, examples(seed))
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


def test_each_denominator_is_0_in_some_micro_batch():
    """Else the tests below would not see what that does; and plain means differ."""
    no_positives, no_tokens, no_expert, _ = (TOTALS(PARAMS, b) for b in parts(BATCH))
    assert no_positives["positives"] == 0 < no_positives["tokens"]
    assert no_tokens["tokens"] == 0 < no_tokens["positives"]
    assert no_expert["experts"].min() == 0 < no_expert["tokens"]
    assert TOTALS(PARAMS, BATCH)["experts"].min() > 0
    means = [WHOLE(PARAMS, batch)[0] for batch in (parts(BATCH)[3], BATCH)]
    assert not np.isclose(*means, 0.1)


def test_totals_that_are_known_make_one_step_exact():
    assert_whole(jax.jit(in_parts())(PARAMS, BATCH, TOTALS(PARAMS, BATCH)))


def test_totals_that_parameters_choose_are_counted_in_a_pass_before():
    assert_whole(jax.jit(two_passes)(PARAMS, BATCH))


@pytest.mark.parametrize("takes", ["gradients", slow("pullback")])
def test_totals_of_a_window_make_its_micro_batches_exact(takes):
    tx = oa.accumulate(ADAM, every_k=K, reduction="sum")

    @jax.jit
    def step(params, state, batch, totals):
        def of_params(params):
            return loss(params, batch, totals)

        if takes == "pullback":
            value, grads = jax.vjp(of_params, params)
        else:
            value, grads = jax.value_and_grad(of_params)(params)
        return tx.update_params(grads, state, params, value=value)

    params, state = PARAMS, tx.init(PARAMS)
    for seed in range(UPDATES):
        window = parts(examples(seed))
        each = [TOTALS(params, batch) for batch in window]
        totals = jax.tree.map(lambda *x: sum(x), *each)
        value, _ = WHOLE(params, examples(seed))
        for batch in window:
            params, state = step(params, state, batch, totals)
        close(state.window.loss, value)
    assert oa.has_updated(state)
    close(params, trained())


def on_a_mesh(way):
    """Where it is, parameters, and the batch in parts."""
    mesh = devices.mesh(getattr(jax.sharding.AxisType, way.capitalize()))
    params = jax.device_put(PARAMS, NamedSharding(mesh, P()))
    batch = jax.device_put(BATCH, NamedSharding(mesh, P(AXIS)))
    return {"mesh": mesh, "axis_name": AXIS}, params, batch


@pytest.mark.several_devices
@devices.parametrized(devices.OUTSIDE)
def test_on_a_mesh_the_totals_are_those_of_all_devices(way):
    over, params, batch = on_a_mesh(way)
    function = functools.partial(two_passes, **over)
    program = optimized(jax.jit(function).lower(params, batch))
    assert_whole(program(params, batch))
    assert hlo.exchanges(program) == {"all-reduce, entry": 2}


@pytest.mark.slow
@pytest.mark.several_devices
@pytest.mark.parametrize("way", devices.OUTSIDE)
def test_on_a_mesh_known_totals_need_no_exchange_of_their_own(way):
    over, params, batch = on_a_mesh(way)
    known = in_parts(**over)
    assert_whole(jax.jit(lambda p, b: known(p, b, count(p, b)))(params, batch))
    totals = jax.device_put(TOTALS(PARAMS, BATCH), NamedSharding(over["mesh"], P()))
    program = optimized(jax.jit(known).lower(params, batch, totals))
    assert_whole(program(params, batch, totals))
    assert hlo.exchanges(program) == {"all-reduce, entry": 1}


@pytest.mark.several_devices
@devices.parametrized(devices.INSIDE)
def test_inside_a_map_counts_are_summed_once_before_the_loop(way):
    def step(params, batch):
        first = oa.microbatch(count, num_microbatches=K, outputs="sum")
        counts = jax.lax.stop_gradient(first(params, batch))
        totals = jax.lax.psum(counts, AXIS)
        return in_parts(axis_name=AXIS)(params, batch, totals)

    batch = BATCH
    if way == "pmap":
        batch = jax.tree.map(lambda x: x.reshape(COUNT, -1, *x.shape[1:]), batch)
    function = devices.inside(way, step, (None, 0), (None, None))
    program = optimized(function.lower(PARAMS, batch))
    result = program(PARAMS, batch)
    assert_whole(devices.first(result) if way == "pmap" else result)
    assert hlo.exchanges(program) == {"all-reduce, entry": 2}


@pytest.mark.several_devices
def test_a_window_of_rows_per_device_takes_totals_of_all_devices():
    mesh = devices.mesh()
    over = {"mesh": mesh, "axis_name": AXIS}
    tx = oa.accumulate(ADAM, every_k=K, reduction="sum", **over)
    rows = oa.value_and_grad(
        loss, num_microbatches=1, reduction="sum", local=True, **over
    )

    @jax.jit
    def step(params, state, batch, totals):
        value, grads = rows(params, batch, totals)
        return tx.update_params(grads, state, params, value=value)

    everywhere, split = NamedSharding(mesh, P()), NamedSharding(mesh, P(AXIS))
    params = jax.device_put(PARAMS, everywhere)
    state = tx.init(params)
    for seed in range(UPDATES):
        totals = jax.device_put(TOTALS(params, examples(seed)), everywhere)
        value, _ = WHOLE(params, examples(seed))
        for batch in parts(examples(seed)):
            on_devices = jax.device_put(batch, split)
            params, state = step(params, state, on_devices, totals)
            jax.block_until_ready(params)
        close(state.window.loss.sum(), value)
    close(params, trained())


def test_the_check_takes_totals_for_the_same():
    of_whole = oa.diagnose.check_equivalence(whole, PARAMS, BATCH, K)
    assert not of_whole
    totals = TOTALS(PARAMS, BATCH)
    report = oa.diagnose.check_equivalence(
        loss, PARAMS, BATCH, K, args=(totals,), reduction="sum"
    )
    assert report, str(report)
    assert report.cause is None
