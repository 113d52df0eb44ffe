"""`oa.value_and_grad` across devices: one exchange per step, after the loop."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_accum as oa
from tests.support import devices, hlo
from tests.support.devices import AXIS, COUNT
from tests.support.training import promoting, slow
from tests.support.xla import optimized

pytestmark = pytest.mark.several_devices
WIDTH, LENGTH, WORDS = 8, 5, 11
EXAMPLES = 4 * COUNT
inside = devices.parametrized(devices.INSIDE)
outside = devices.parametrized(devices.OUTSIDE)
unchecked_or_outside = devices.parametrized(
    ("pmap", "unchecked", *devices.OUTSIDE), usual=("unchecked", "auto")
)
everywhere = devices.parametrized(devices.INSIDE + devices.OUTSIDE)
also_in_pmap = devices.parametrized(
    devices.INSIDE + devices.OUTSIDE, usual=("pmap", "checked", "auto")
)


def normal(*shape, seed=0):
    random = np.random.default_rng([seed, *shape])
    return jnp.asarray(random.normal(size=shape), jnp.float32)


def language_model():
    """An embedding that is used twice, a LayerNorm, biases."""
    return {
        "embedding": normal(WORDS, WIDTH),
        "scale": jnp.ones(WIDTH),
        "offset": jnp.zeros(WIDTH),
        "dense": {"kernel": normal(WIDTH, WIDTH, seed=1), "bias": normal(WIDTH)},
    }


def logits(params, tokens):
    x = params["embedding"][tokens]
    mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
    x = (x - mean) * jax.lax.rsqrt(variance + 1e-6)
    x = x * params["scale"][None, None] + params["offset"][None, None]
    dense = params["dense"]
    x = jnp.tanh(x @ dense["kernel"] + dense["bias"][None, None])
    return x @ params["embedding"].T


def token_loss(params, batch):
    """The mean cross-entropy over the tokens that are no padding."""
    tokens, mask = batch["tokens"], batch["mask"]
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits(params, tokens), tokens[:, ::-1]
    )
    return jnp.sum(losses * mask) / jnp.maximum(mask.sum(), 1)


def count_tokens(params, batch):
    del params
    return batch["mask"].sum()


def tokens(seed=0):
    """Sequences of very different lengths; those of the first device have none."""
    random = np.random.default_rng(seed)
    mask = np.arange(LENGTH) < random.integers(0, LENGTH + 1, EXAMPLES)[:, None]
    mask[: EXAMPLES // COUNT] = False
    return {
        "tokens": jnp.asarray(random.integers(0, WORDS, (EXAMPLES, LENGTH))),
        "mask": jnp.asarray(mask, jnp.float32),
    }


def close(got, wanted, **options):
    tolerance = {"rtol": 2e-5, "atol": 2e-6} | options
    chex.assert_trees_all_equal_shapes_and_dtypes(got, wanted)
    chex.assert_trees_all_close(got, wanted, **tolerance)


def small(params, x):
    return jnp.mean((jnp.tanh(x @ params["w"] + params["b"][None]) - 0.5) ** 2)


SMALL = {"w": normal(3, 2), "b": jnp.zeros(2)}
X = normal(EXAMPLES, 3)


# --- The result ---


@also_in_pmap
@pytest.mark.parametrize("reduction", ["mean", slow("ratio")])
def test_training_on_devices_equals_the_global_batch(way, reduction):
    """AdamW and clipping, uneven weights, three updates; parameters, not gradients."""
    # With an epsilon, because Adam turns the rounding of a gradient near 0 into a step.
    adamw = optax.adamw(0.05, eps=1e-3)
    inner = promoting(optax.chain(optax.clip_by_global_norm(0.1), adamw))

    def token_sum(params, batch):
        return token_loss(params, batch) * jnp.maximum(batch["mask"].sum(), 1)

    fun = token_sum if reduction == "ratio" else token_loss
    f = devices.in_step(
        way, fun, num_microbatches=2, weight=count_tokens, reduction=reduction
    )
    params = wanted = language_model()
    state, wanted_state = inner.init(params), inner.init(params)

    @jax.jit
    def update(grads, state, params):
        updates, state = inner.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for step in range(3):
        batch = tokens(step)
        value, grads = devices.result(way, f(params, devices.whole(way, batch)))
        grads = jax.device_get(grads)
        params, state = update(grads, state, params)
        wanted_value, grads = jax.value_and_grad(token_loss)(wanted, batch)
        updates, wanted_state = inner.update(grads, wanted_state, wanted)
        wanted = optax.apply_updates(wanted, updates)
        close(value, wanted_value)
    close(params, wanted)


ALL_OPTIONS = {
    "weight": count_tokens,
    "skip": oa.skip_not_finite,
    "return_info": True,
    "outputs": (None, None),
}


@also_in_pmap
@pytest.mark.parametrize(
    "options",
    [
        slow({}, id="plain"),
        slow({"weight": count_tokens}, id="weight"),
        slow({"skip": oa.skip_not_finite}, id="skip"),
        pytest.param(ALL_OPTIONS, id="all"),
    ],
)
def test_there_is_one_all_reduce_after_the_loop(way, options):
    """For any model: biases, a norm, a tied embedding; with weights and skipping."""
    f = devices.in_step(way, token_loss, num_microbatches=2, **options)
    batch = devices.whole(way, tokens())
    program = optimized(f.lower(language_model(), batch))
    assert hlo.exchanges(program) == {"all-reduce, entry": 1}


@everywhere
def test_a_smaller_last_micro_batch_adds_no_all_reduce(way):
    size = 3 if way in devices.INSIDE else 3 * COUNT
    f = devices.in_step(way, small, microbatch_size=size)
    assert hlo.exchanges(optimized(f.lower(SMALL, devices.whole(way, X)))) == {
        "all-reduce, entry": 1
    }
    got = devices.result(way, f(SMALL, devices.whole(way, X)))
    close(got, jax.value_and_grad(small)(SMALL, X))


@everywhere
def test_reduction_sum_sums_over_all_devices(way):
    f = devices.in_step(way, small, num_microbatches=4, reduction="sum")
    got = devices.result(way, f(SMALL, devices.whole(way, X)))
    value, grads = jax.value_and_grad(small)(SMALL, X)
    # Each of 4 x COUNT micro-batches of one example gives its own mean.
    wanted = jax.tree.map(lambda x: EXAMPLES * x, (value, grads))
    close(got, wanted)


def recurrent(params, x):
    """A model that starts a scan from plain zeros."""

    def step(h, x):
        return jnp.tanh(h + x @ params["w"] + params["b"][None]), None

    h, _ = jax.lax.scan(step, jnp.zeros((len(x), 2)), jnp.stack([x, x]))
    return jnp.mean(h**2)


@devices.parametrized(
    ["pmap", "unchecked", *devices.OUTSIDE], usual=("unchecked", "auto")
)
def test_a_model_may_start_a_scan_from_zeros(way):
    f = devices.in_step(way, recurrent, num_microbatches=2)
    got = devices.result(way, f(SMALL, devices.whole(way, X)))
    close(got, jax.value_and_grad(recurrent)(SMALL, X))


@pytest.mark.skipif(COUNT < 3, reason="needs a third device")
@everywhere
def test_a_device_that_rejects_everything_does_not_spoil_the_others(way):
    """A device that rejects all it has, and one whose own W is 0, meet the others."""
    per_device = EXAMPLES // COUNT
    x = X.at[per_device].set(jnp.nan).at[:per_device].set(jnp.inf)

    def count(params, x):
        del params
        return jnp.where(jnp.any(jnp.isinf(x)), 0, len(x)).astype(jnp.float32)

    f = devices.in_step(
        way,
        small,
        num_microbatches=1,
        weight=count,
        skip=oa.skip_not_finite,
        return_info=True,
        outputs=(None, None),
    )
    got, info = devices.result(way, f(SMALL, devices.whole(way, x)))
    close(got, jax.value_and_grad(small)(SMALL, X[2 * per_device :]))
    assert info.weight == EXAMPLES - 2 * per_device
    assert info.skipped == 2
    assert info.skipped.dtype == jnp.int32


@everywhere
def test_no_weight_on_any_device_gives_zeros(way):
    f = devices.in_step(
        way,
        small,
        num_microbatches=2,
        weight=lambda *_: jnp.zeros([]),
        return_info=True,
        outputs=(None, None),
    )
    got, info = devices.result(way, f(SMALL, devices.whole(way, X)))
    chex.assert_trees_all_equal(got, jax.tree.map(jnp.zeros_like, got))
    assert info.weight == 0


@everywhere
def test_the_function_is_traced_once_on_devices(way):
    chex.clear_trace_counter()
    fun = chex.assert_max_traces(small, n=1)
    f = devices.in_step(way, fun, num_microbatches=2)
    for _ in range(2):
        f(SMALL, devices.whole(way, X))


@everywhere
def test_the_derivative_of_the_value_is_the_gradient_of_all_devices(way):
    def value(params, x):
        options = {"axis_name": AXIS, "num_microbatches": 2}
        if way in devices.OUTSIDE:
            kind = AxisType.Auto if way == "auto" else AxisType.Explicit
            options["mesh"] = devices.mesh(kind)
        return oa.value_and_grad(small, **options)(params, x)[0]

    f = jax.value_and_grad(value)
    if way in devices.INSIDE:
        f = devices.inside(way, f, (None, 0), (None,))
    got = devices.result(way, jax.jit(f)(SMALL, devices.whole(way, X)))
    close(got, jax.value_and_grad(small)(SMALL, X))


@pytest.mark.parametrize("way", ["checked", "unchecked"])
def test_the_derivative_of_a_device_s_own_value_is_as_before(way):
    """Without `axis_name`, as of the loss alone."""

    def run(value_and_grad):
        def own(params, x):
            return jax.grad(lambda p: value_and_grad(p, x)[0])(params)

        def kept(params, x):
            return jax.tree.map(lambda g: g[None], own(params, x))

        out = (0,) if way == "unchecked" else (None,)
        f = devices.inside(way, kept if out == (0,) else own, (None, 0), out)
        return f(SMALL, X)

    got = run(oa.value_and_grad(small, num_microbatches=2))
    close(got, run(jax.value_and_grad(small)))


@inside
@pytest.mark.parametrize("size", [2, 3])  # 2 and 2, or 3 and 1
def test_each_device_may_run_another_number_of_micro_batches(way, size):
    """And what the others hold is in no result, nor in a carry."""

    def fun(params, x, carry):
        value = small(params, x)
        return value, (value, (carry[0] + 1, jnp.mean(x)))

    def run(params, x):
        f = oa.value_and_grad(
            fun,
            has_aux=True,
            aux="mean",
            microbatch_size=size,
            carry_argnum=2,
            axis_name=AXIS,
            num_real_microbatches=jax.lax.axis_index(AXIS) % 3,
            return_info=True,
        )
        return f(params, x, (jnp.int32(0), jnp.float32(0)))

    parts = X.reshape(COUNT, 4, 3)
    chosen = {2: (0, 2, 1, 3), 3: (0, 1, 2, 3)}[size]  # strided or contiguous
    counts = [min(size * (i % 3), 4) for i in range(COUNT)]
    real = [part[jnp.array(chosen[:n], int)] for part, n in zip(parts, counts)]  # noqa: B905
    wanted = jax.value_and_grad(small)(SMALL, jnp.concatenate(real))
    f = devices.inside(way, run, (None, 0), (None,))
    ((value, (aux, carry)), grads), info = devices.result(
        way, f(SMALL, devices.whole(way, X))
    )
    close((value, grads), wanted)
    close(aux, value)
    assert info.weight == sum(counts)
    assert carry[0] == max(i for i in range(COUNT) if i % 3) % 3  # the last that ran


@outside
def test_a_number_of_micro_batches_holds_for_all_devices_of_a_mesh(way):
    @jax.jit
    def run(params, x, number):
        options = {"num_microbatches": 4, "num_real_microbatches": number}
        return devices.in_step(way, small, return_info=True, **options)(params, x)

    result, info = run(SMALL, X, 3)
    real = X.reshape(COUNT, 4, 3)[:, :3].reshape(-1, 3)
    close(result, jax.value_and_grad(small)(SMALL, real))
    assert info.weight == 3 * COUNT


# --- What comes beside value and gradient ---


POLICIES = {"stack": "stack", "concat": "concat", "mean": "mean", "sum": "sum"}
POLICIES |= {"last": "last", "flag": "last", "count": "sum", "number": "last"}


def with_aux(params, x):
    mean = x.mean()
    aux = dict.fromkeys(POLICIES, mean) | {
        "concat": x[:, 0],
        "flag": mean > 0,
        "count": jnp.sum(x[:, 0] > 0),
        "number": jnp.asarray(len(x)),
    }
    return small(params, x), aux


@everywhere
def test_auxiliary_outputs_are_those_of_all_micro_batches(way):
    """As if the micro-batches of all devices had run one after another."""
    specs = {k: P(AXIS) if k in ("stack", "concat") else P() for k in POLICIES}
    f = devices.in_step(
        way,
        with_aux,
        has_aux=True,
        num_microbatches=2,
        aux=POLICIES,
        outputs=(((P(), specs), P()),),
    )
    (_, aux), _ = f(SMALL, devices.whole(way, X))
    if way == "pmap":
        same = devices.first({k: x for k, x in aux.items() if specs[k] == P()})
        aux = same | {
            k: x.reshape(-1, *x.shape[2:]) for k, x in aux.items() if k not in same
        }
    # [device, example of a micro-batch, micro-batch]: the split is strided.
    parts = np.asarray(X).reshape(COUNT, -1, 2, 3)
    means = parts.mean((1, 3)).ravel()
    wanted = {
        "stack": means,
        "concat": X[:, 0],
        "mean": means.mean(),
        "sum": means.sum(),
        "last": means[-1],
        "flag": means[-1] > 0,
        "count": np.sum(np.asarray(X)[:, 0] > 0),
        "number": EXAMPLES // COUNT // 2,
    }
    chex.assert_trees_all_close(aux, wanted, rtol=1e-5, atol=1e-6)
    assert aux["flag"].dtype == bool
    assert aux["count"].dtype == jnp.int32
    if way in devices.OUTSIDE:
        for name in ("stack", "concat"):
            spec = NamedSharding(devices.mesh(), P(AXIS))
            assert aux[name].sharding.is_equivalent_to(spec, 1)


def with_carry(params, x, stats):
    """Running statistics, a counter, and a key that is split."""
    mean = 0.9 * stats["mean"] + 0.1 * x.mean(0)
    key, _ = jax.random.split(stats["key"])
    new = {"mean": mean, "count": stats["count"] + 1, "key": key}
    return small(params, x - mean[None]), new


def is_key_after_two_steps(key):
    wanted, _ = jax.random.split(jax.random.split(jax.random.key(0))[0])
    return jnp.all(jax.random.key_data(key) == jax.random.key_data(wanted))


def statistics():
    return {
        "mean": jnp.zeros(3),
        "count": jnp.zeros([], jnp.int32),
        "key": jax.random.key(0),
    }


@also_in_pmap
@pytest.mark.parametrize("weighted", [True, False])
def test_a_carry_is_averaged_over_the_devices_by_weight(way, weighted):
    """The mean of the devices' statistics, by weight; their counters and keys."""
    per_device = EXAMPLES // COUNT
    x = X.at[:per_device].set(0)  # the first device has no weight

    def count(params, x, stats):
        del params, stats
        return jnp.sum(jnp.any(x != 0, -1)).astype(jnp.float32)

    f = devices.in_step(
        way,
        with_carry,
        rest=1,
        num_microbatches=2,
        carry_argnum=2,
        **({"weight": count} if weighted else {}),
    )
    (_, got), _ = f(SMALL, devices.whole(way, x), statistics())
    if way == "pmap":
        got["key"] = got["key"][0]
        got |= devices.first({k: got[k] for k in ("mean", "count")})
    parts = np.asarray(x).reshape(COUNT, -1, 2, 3)
    means = 0.1 * (0.9 * parts[:, :, 0].mean(1) + parts[:, :, 1].mean(1))
    wanted = means[1:].mean(0) if weighted else means.mean(0)
    np.testing.assert_allclose(got["mean"], wanted, rtol=1e-5, atol=1e-7)
    assert got["count"] == 2
    assert is_key_after_two_steps(got["key"])


@everywhere
def test_counters_ignore_a_device_that_has_only_padding(way):
    """The last device has no weight and has not moved; the others have."""
    x = X.at[-(EXAMPLES // COUNT) :].set(0)

    def count(params, x, stats):
        del params, stats
        return jnp.any(x != 0).astype(jnp.float32)

    f = devices.in_step(
        way, with_carry, rest=1, num_microbatches=2, carry_argnum=2, weight=count
    )
    (_, got), _ = f(SMALL, devices.whole(way, x), statistics())
    assert np.all(got["count"] == 2)
    for own in jnp.atleast_1d(got["key"]):
        assert is_key_after_two_steps(own)


@everywhere
def test_a_carry_is_unchanged_if_nothing_has_weight(way):
    f = devices.in_step(
        way,
        with_carry,
        rest=1,
        num_microbatches=2,
        carry_argnum=2,
        weight=lambda *_: jnp.zeros([]),
    )
    before = statistics() | {"mean": jnp.ones(3)}
    (_, got), _ = f(SMALL, devices.whole(way, X), before)
    if way == "pmap":
        got = jax.tree.map(lambda x: x[0], got)
    assert got["mean"].tolist() == [1, 1, 1]
    assert got["count"] == 0


@also_in_pmap
@pytest.mark.parametrize("weighted", [True, slow(False)])
def test_what_is_not_written_of_a_carry_is_not_exchanged(way, weighted):
    """And an average over the devices has not rounded it."""

    def loss(params, x, carry):
        value = small(params, x * carry["frozen"][:3, 0][None])
        return value, carry | {"mean": carry["mean"] + x.mean(0)}

    def count(params, x, carry):
        del params, carry
        return jnp.sum(x[:, 0] > 0)

    frozen = normal(64, 64)
    carry = {"frozen": frozen, "mean": jnp.zeros(3)}
    options = {"weight": count} if weighted else {}
    f = devices.in_step(
        way, loss, rest=1, num_microbatches=2, carry_argnum=2, **options
    )
    (_, got), _ = f(SMALL, devices.whole(way, X), carry)
    wanted = devices.stacked(frozen) if way == "pmap" else frozen
    np.testing.assert_array_equal(got["frozen"], wanted)
    program = optimized(f.lower(SMALL, devices.whole(way, X), carry))
    sent = sum(operation.nbytes for operation in hlo.collectives(program))
    assert 0 < sent < frozen.nbytes


@everywhere
def test_random_keys_differ_between_devices(way):
    """Each of all micro-batches has its own, from one key."""

    def noisy(params, x, key):
        return small(params, x), jax.random.uniform(key)

    f = devices.in_step(
        way,
        noisy,
        rest=1,
        has_aux=True,
        num_microbatches=2,
        rng_argnums=2,
        outputs=(((P(), P(AXIS)), P()),),
    )
    (_, noise), _ = f(SMALL, devices.whole(way, X), jax.random.key(0))
    keys = [jax.random.fold_in(jax.random.key(0), i) for i in range(2 * COUNT)]
    wanted = np.array([jax.random.uniform(key) for key in keys])
    np.testing.assert_array_equal(noise.ravel(), wanted)


# --- Parts of the gradients, and meshes with more than one axis ---


WIDE = {"w": normal(3, 2 * COUNT), "b": jnp.zeros(2 * COUNT), "odd": jnp.ones(3)}


def wide(params, x):
    x = x * params["odd"][None]
    return jnp.mean((jnp.tanh(x @ params["w"] + params["b"][None]) - 0.5) ** 2)


@devices.parametrized(["checked", "unchecked", *devices.OUTSIDE])
def test_scatter_replaces_the_all_reduce_by_a_reduce_scatter(way):
    """A reduce-scatter in place of the all-reduce; what cannot be cut stays whole."""
    specs = oa.sharding.scatter_specs(WIDE, devices.mesh(), AXIS)
    assert specs == {"w": P(None, AXIS), "b": P(AXIS), "odd": P()}
    f = devices.in_step(
        way, wide, num_microbatches=2, scatter=True, outputs=((P(), specs),)
    )
    program = optimized(f.lower(WIDE, X))
    exchanges = hlo.exchanges(program)
    # The scalars and the leaf that is not divided go together.
    assert exchanges.pop("all-reduce, entry") == 1
    assert exchanges.pop("reduce-scatter, entry") in (1, 2)
    assert exchanges == {}
    value, grads = f(WIDE, X)
    for name, spec in specs.items():
        wanted = NamedSharding(devices.mesh(), spec)
        assert grads[name].sharding.is_equivalent_to(wanted, grads[name].ndim)
    close((value, grads), jax.value_and_grad(wide)(WIDE, X))


def test_scattered_gradients_are_stacked_by_pmap():
    """Every device has its part: `pmap` stacks them."""
    f = devices.in_step("pmap", wide, num_microbatches=2, scatter=True)
    _, grads = f(WIDE, devices.whole("pmap", X))
    wanted = jax.grad(wide)(WIDE, X)
    joined = {"b": grads["b"].ravel(), "odd": devices.first(grads["odd"])}
    joined["w"] = grads["w"].swapaxes(0, 1).reshape(3, -1)
    close(joined, wanted)


@outside
def test_training_with_a_sharded_optimizer_state_equals_the_global_batch(way):
    """ZeRO-2: gradients and moments in parts, parameters whole."""
    inner = promoting(optax.adamw(0.05))
    mesh = mesh_of(way)
    specs = oa.sharding.scatter_specs(WIDE, mesh, AXIS)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    f = oa.value_and_grad(
        wide, num_microbatches=2, axis_name=AXIS, mesh=mesh, scatter=True
    )
    everywhere = NamedSharding(mesh, P())

    @jax.jit
    def step(params, state, x):
        _, grads = f(params, x)
        place = jax.lax.with_sharding_constraint if way == "auto" else jax.reshard
        parts = jax.tree.map(place, params, shardings)
        updates, state = inner.update(grads, state, parts)
        parts = optax.apply_updates(parts, updates)
        return jax.tree.map(lambda p: place(p, everywhere), parts), state

    params = jax.device_put(WIDE, everywhere)
    with jax.set_mesh(mesh):
        state = inner.init(jax.device_put(WIDE, shardings))
        wanted, wanted_state = WIDE, inner.init(WIDE)
        for seed in range(3):
            x = normal(EXAMPLES, 3, seed=seed)
            params, state = step(params, state, jax.device_put(x, everywhere))
            grads = jax.grad(wide)(wanted, x)
            updates, wanted_state = inner.update(grads, wanted_state, wanted)
            wanted = optax.apply_updates(wanted, updates)
    moments = state[0].mu["w"]
    assert moments.sharding.is_equivalent_to(shardings["w"], 2)
    close(jax.device_get(params), jax.device_get(wanted))


def test_scatter_specs_choose_the_largest_free_axis():
    mesh = jax.make_mesh((COUNT,), (AXIS,), axis_types=(AxisType.Explicit,))
    taken = jax.device_put(
        normal(2 * COUNT, 4 * COUNT), NamedSharding(mesh, P("data", None))
    )
    leaves = {
        "first": jnp.ones((COUNT, COUNT)),
        "second": jnp.ones((COUNT + 1, COUNT)),
        "none": jnp.ones((COUNT + 1,)),
        "scalar": jnp.ones(()),
        "empty": jnp.ones((0, 3)),
        "taken": taken,
    }
    specs = oa.sharding.scatter_specs(leaves, mesh, AXIS)
    none = dict.fromkeys(("none", "scalar", "empty"), P())
    second = dict.fromkeys(("second", "taken"), P(None, AXIS))
    assert specs == {"first": P(AXIS)} | none | second
    shapes = jax.eval_shape(lambda: {k: leaves[k] for k in ("first", "second")})
    assert oa.sharding.scatter_specs(shapes, mesh, AXIS) == {"first": P(AXIS)} | {
        "second": P(None, AXIS)
    }


needs_four = pytest.mark.skipif(COUNT % 4 != 0, reason="needs 4, 8, ... devices")


def two_axes(kind):
    return jax.make_mesh((COUNT // 2, 2), (AXIS, "model"), axis_types=(kind, kind))


KINDS = pytest.mark.parametrize("kind", [AxisType.Auto, slow(AxisType.Explicit)])


@needs_four
@KINDS
def test_a_batch_may_be_sharded_over_two_axes(kind):
    mesh = two_axes(kind)
    x = jax.device_put(X, NamedSharding(mesh, P((AXIS, "model"))))
    f = oa.value_and_grad(small, num_microbatches=4, axis_name=AXIS, mesh=mesh)
    got = jax.device_get(jax.jit(f)(SMALL, x))
    close(got, jax.device_get(jax.value_and_grad(small)(SMALL, X)))


@needs_four
@pytest.mark.parametrize("axis_name", [(AXIS, "model"), slow([AXIS, "model"])])
@KINDS
def test_two_axis_names_act_as_one_axis(kind, axis_name):
    mesh = two_axes(kind)
    f = oa.value_and_grad(
        wide, num_microbatches=2, axis_name=axis_name, mesh=mesh, scatter=True
    )
    program = optimized(jax.jit(f).lower(WIDE, X))
    assert hlo.exchanges(program)["all-reduce, entry"] == 1
    got = jax.device_get(jax.jit(f)(WIDE, X))
    close(got, jax.device_get(jax.value_and_grad(wide)(WIDE, X)))


@needs_four
@pytest.mark.parametrize("axis_name", [None, AXIS])
def test_a_checking_shard_map_over_some_axes_equals_the_whole_batch(axis_name):
    def local(params, x):
        f = oa.value_and_grad(small, num_microbatches=2, axis_name=axis_name)
        params = jax.lax.pcast(params, AXIS, to="varying")
        return jax.lax.pmean(f(params, x), AXIS)

    mapped = jax.shard_map(
        local,
        mesh=two_axes(AxisType.Auto),
        axis_names={AXIS},
        in_specs=(P(), P(AXIS)),
        out_specs=P(),
    )
    got = jax.device_get(jax.jit(mapped)(SMALL, X))
    close(got, jax.device_get(jax.value_and_grad(small)(SMALL, X)))


@needs_four
@KINDS
def test_tensor_parallel_parameters_stay_sharded(kind):
    mesh = two_axes(kind)
    params = {
        "w": jax.device_put(normal(3, 4), NamedSharding(mesh, P(None, "model"))),
        "b": jax.device_put(normal(4), NamedSharding(mesh, P("model"))),
    }
    x = jax.device_put(X, NamedSharding(mesh, P(AXIS)))
    f = jax.jit(oa.value_and_grad(small, num_microbatches=2, axis_name=AXIS, mesh=mesh))
    unsharded = {"w": normal(3, 4), "b": normal(4)}
    wanted = jax.value_and_grad(small)(unsharded, X)
    with jax.set_mesh(mesh):
        program = optimized(f.lower(params, x))
        value, grads = f(params, x)
    close(jax.device_get((value, grads)), jax.device_get(wanted))
    for name, g in grads.items():
        assert g.sharding.is_equivalent_to(params[name].sharding, g.ndim)
    # Without the context of the mesh it is the same.
    close(jax.device_get(f(params, x)), jax.device_get(wanted))

    def nothing(params, x):
        return jax.shard_map(
            lambda *args: args,
            mesh=mesh,
            axis_names={AXIS},
            in_specs=(P(), P(AXIS)),
            out_specs=(P(), P(AXIS)),
        )(params, x)

    empty = hlo.exchanges(optimized(jax.jit(nothing).lower(params, x)))
    if kind == AxisType.Auto:
        assert empty == {}
    exchanges = hlo.exchanges(program)
    # One exchange over "data"; the one in the loop is the model's own, of its loss.
    assert exchanges["all-reduce, entry"] == 1
    if not empty:  # JAX 0.10 gathers at the border of a shard_map on such a mesh.
        assert not any("all-gather" in place for place in exchanges)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_fsdp_parameters_stay_sharded(kind):
    """FSDP, through plain `jit` and without `mesh`: what is needed is in the loop."""
    mesh = devices.mesh(kind)
    sharding = NamedSharding(mesh, P(None, AXIS))
    params = jax.device_put(normal(3, 2 * COUNT), sharding)
    x = jax.device_put(X, NamedSharding(mesh, P(AXIS)))

    def fun(w, x):
        if kind == AxisType.Explicit:
            w = jax.reshard(w, P())
        return jnp.mean((jnp.tanh(x @ w) - 0.5) ** 2)

    def whole(w, x):
        return jnp.mean((jnp.tanh(x @ w) - 0.5) ** 2)

    @jax.jit
    def f(params, x):
        value, grads = oa.value_and_grad(fun, num_microbatches=2)(params, x)
        if kind == AxisType.Auto:
            grads = jax.lax.with_sharding_constraint(grads, sharding)
        return value, grads

    with jax.set_mesh(mesh):
        value, grads = f(params, x)
        program = optimized(f.lower(params, x))
    assert grads.sharding.is_equivalent_to(sharding, 2)
    wanted = jax.value_and_grad(whole)(normal(3, 2 * COUNT), X)
    close(jax.device_get((value, grads)), jax.device_get(wanted))
    # What each micro-batch needs of the others' parameters and gradients.
    assert any(place.endswith("loop") for place in hlo.exchanges(program))


def mesh_of(way):
    return devices.mesh(AxisType.Auto if way == "auto" else AxisType.Explicit)


@outside
def test_a_mesh_works_without_jit_and_without_placed_arrays(way):
    options = {"num_microbatches": 2, "axis_name": AXIS, "mesh": mesh_of(way)}
    wanted = jax.value_and_grad(small)(SMALL, X)
    close(jax.device_get(oa.value_and_grad(small, **options)(SMALL, X)), wanted)
    grads = jax.device_get(jax.jit(oa.grad(small, **options))(SMALL, X))
    close(grads, wanted[1])


@outside
def test_the_value_on_a_mesh_can_be_differentiated(way):
    f = devices.in_step(way, small, num_microbatches=2)
    got = jax.jit(jax.grad(lambda params: f(params, X)[0]))(SMALL)
    close(jax.device_get(got), jax.grad(small)(SMALL, X))


@outside
def test_batch_axis_and_batch_argnames_work_on_devices(way):
    def fun(params, x, y):
        return jnp.mean((params["w"].T @ x) ** 2) + 0 * y.sum()

    f = devices.in_step(
        way,
        fun,
        num_microbatches=2,
        batch_argnames="x",
        batch_axis=1,
        batch_argnums=(),
    )
    got = f(SMALL, x=X.T, y=jnp.ones(3))
    wanted = jax.value_and_grad(fun)(SMALL, X.T, jnp.ones(3))
    close(jax.device_get(got), jax.device_get(wanted))


@outside
def test_arguments_that_are_not_arrays_reach_the_function_on_devices(way):
    def fun(params, x, mode, *, scale):
        assert mode == "train"
        return small(params, x) * scale

    f = oa.value_and_grad(fun, num_microbatches=2, axis_name=AXIS, mesh=mesh_of(way))
    got = jax.jit(f, static_argnums=2)(SMALL, X, "train", scale=2.0)
    wanted = jax.tree.map(lambda x: 2 * x, jax.value_and_grad(small)(SMALL, X))
    close(jax.device_get(got), jax.device_get(wanted))


# --- Inside a shard_map that checks, without `axis_name` ---


@pytest.mark.parametrize(
    "options", [{}, {"weight": True}, {"skip": oa.skip_not_finite}]
)
def test_gradients_of_cast_parameters_stay_on_their_device(options):
    """For one exchange per window, the sum of `accumulate`."""
    if options.get("weight"):
        options = {"weight": lambda _, x: jnp.abs(x).sum()}

    def local(params, x):
        params = jax.lax.pcast(params, AXIS, to="varying")
        f = oa.value_and_grad(small, num_microbatches=2, return_info=True, **options)
        (value, grads), info = f(params, x)
        total = jax.lax.psum(info.weight, AXIS)
        sums = jax.tree.map(lambda g: g * info.weight, (value, grads))
        return jax.tree.map(lambda g: jax.lax.psum(g, AXIS) / total, sums)

    got = devices.inside("checked", local, (None, 0), (None,))(SMALL, X)
    wanted = devices.in_step("unchecked", small, num_microbatches=2, **options)
    close(got, wanted(SMALL, X))


def test_a_carry_of_plain_zeros_takes_the_type_of_the_micro_batches():
    """It takes the type that the micro-batches give it."""

    def fun(params, x, total):
        return small(params, x), total + x.sum(0)

    def local(params, x):
        f = oa.value_and_grad(fun, num_microbatches=2, carry_argnum=2)
        (_, total), _ = f(jax.lax.pcast(params, AXIS, to="varying"), x, jnp.zeros(3))
        return jax.lax.psum(total, AXIS)

    got = devices.inside("checked", local, (None, 0), (None,))(SMALL, X)
    np.testing.assert_allclose(got, X.sum(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("every_k", [2, None])
def test_micro_batches_inside_windows_exchange_once_per_window(every_k):
    """Both levels, and still one exchange per window."""
    inner = promoting(optax.adamw(0.05))
    tx = oa.accumulate(inner, every_k, axis_name=AXIS)
    f = oa.value_and_grad(small, num_microbatches=2, return_info=True)

    def step(params, state, x):
        (value, grads), info = f(jax.lax.pcast(params, AXIS, to="varying"), x)
        given = {} if every_k else {"boundary": False}
        return tx.update_params(
            grads, state, params, weight=info.weight, value=value, **given
        )

    axes = None, "state", 0
    mapped = devices.inside("checked", step, axes, (None, "state"))
    params, state = SMALL, oa.sharding.stack_windows(tx.init(SMALL), COUNT)
    wanted = {} if every_k is None else {"all-reduce, branch": 1}
    assert hlo.exchanges(optimized(mapped.lower(params, state, X))) == wanted
    if every_k is None:
        return
    batches = [normal(EXAMPLES, 3, seed=i) for i in range(2)]
    for x in batches:
        params, state = mapped(params, state, x)
    grads = jax.grad(small)(SMALL, jnp.concatenate(batches))
    updates, _ = inner.update(grads, inner.init(SMALL), SMALL)
    close(params, optax.apply_updates(SMALL, updates))


# --- What can go wrong ---


def reduced(reduce):
    """Losses that have met the other devices already."""

    @jax.custom_jvp
    def through(x):
        return reduce(x)

    through.defjvp(lambda x, t: (reduce(x[0]), reduce(t[0])))
    return {
        "at once": lambda p, x: reduce(small(p, x)),
        "and then more": lambda p, x: 2 * reduce(small(p, x)) + 1,
        "in a jit": lambda p, x: jax.jit(reduce)(small(p, x)),
        "in a custom rule": lambda p, x: through(small(p, x)),
    }


PMEAN = reduced(lambda x: jax.lax.pmean(x, AXIS))


@inside
@pytest.mark.parametrize("name", PMEAN)
def test_a_loss_that_is_already_reduced_is_refused(way, name):
    f = devices.in_step(way, PMEAN[name], num_microbatches=2)
    with pytest.raises(ValueError, match="must return this device's own value"):
        f(SMALL, devices.whole(way, X))


@outside
def test_a_loss_that_is_already_reduced_is_refused_on_a_mesh(way):
    f = devices.in_step(way, PMEAN["at once"], num_microbatches=2)
    with pytest.raises(ValueError, match="Leave the psum or pmean out of `fun`"):
        f(SMALL, X)


@everywhere
def test_a_contrastive_loss_may_gather_from_all_devices(way):
    """Each device compares its own examples with those of all."""

    def contrast(params, own, others):
        similarity = jnp.tanh(own @ params["w"]) @ jnp.tanh(others @ params["w"]).T
        return jax.nn.logsumexp(similarity, axis=-1).mean()

    def gathered(params, x):
        return contrast(params, x, jax.lax.all_gather(x, AXIS, tiled=True))

    f = devices.in_step(way, gathered, num_microbatches=1)
    got = devices.result(way, f(SMALL, devices.whole(way, X)))
    close(got, jax.value_and_grad(lambda p, x: contrast(p, x, x))(SMALL, X))


@devices.parametrized(
    ["pmap", "unchecked", *devices.OUTSIDE], usual=("unchecked", "auto")
)
def test_constants_broadcasts_and_group_reductions_are_not_refused(way):
    """A constant, a value that one device alone hands out, a reduction over groups."""

    def constant(params, x):
        del params, x
        return jnp.zeros([])

    def of_one(params, x):
        total = jax.lax.stop_gradient(jax.lax.psum(small(params, x), AXIS))
        return jnp.where(jax.lax.axis_index(AXIS) == 0, total, 0)

    def grouped(params, x):
        alone = [[i] for i in range(COUNT)]
        return jax.lax.psum(small(params, x), AXIS, axis_index_groups=alone)

    for fun in (constant, of_one, grouped):
        value, _ = devices.in_step(way, fun, num_microbatches=1)(
            SMALL, devices.whole(way, X)
        )
        assert np.isfinite(value).all()


@everywhere
def test_synchronised_batch_norm_is_not_refused(way):
    """Batch normalisation over the devices: an exchange of activations is allowed."""

    def synchronised(params, x):
        return small(params, x - jax.lax.pmean(x.mean(0), AXIS)[None])

    f = devices.in_step(way, synchronised, num_microbatches=1)
    got = devices.result(way, f(SMALL, devices.whole(way, X)))
    close(got, jax.value_and_grad(small)(SMALL, X - X.mean(0)[None]))


@pytest.mark.parametrize("axis_name", ["batch", (AXIS, "batch")])
def test_an_unbound_axis_name_is_refused(axis_name):
    f = oa.value_and_grad(small, num_microbatches=2, axis_name=axis_name)
    with pytest.raises(ValueError, match=r"is not bound.*jax\.shard_map"):
        f(SMALL, X)


def test_a_mesh_or_scatter_without_a_matching_axis_name_is_refused():
    with pytest.raises(
        ValueError, match="`axis_name='batch'` is not an axis of `mesh`"
    ):
        oa.value_and_grad(
            small, num_microbatches=2, axis_name="batch", mesh=devices.mesh()
        )
    with pytest.raises(ValueError, match=r"`mesh` needs `axis_name`.*has 'data'"):
        oa.value_and_grad(small, num_microbatches=2, mesh=devices.mesh())
    with pytest.raises(ValueError, match="`scatter=True` needs `axis_name`"):
        oa.value_and_grad(small, num_microbatches=2, scatter=True)
    with pytest.raises(
        ValueError, match="`axis_name='batch'` is not an axis of `mesh`"
    ):
        oa.sharding.scatter_specs(SMALL, devices.mesh(), "batch")


@outside
def test_a_batch_that_the_devices_do_not_divide_is_refused(way):
    f = devices.in_step(way, small, num_microbatches=2)
    message = (
        f"the {COUNT} devices do not divide the batch: `x` holds {EXAMPLES - 1} "
        f"examples along axis 0. Use {EXAMPLES - COUNT} or {EXAMPLES} examples"
    )
    with pytest.raises(ValueError, match=message):
        f(SMALL, X[:-1])
    with pytest.raises(ValueError, match=f"Use {COUNT} examples"):
        f(SMALL, X[:1])


@outside
def test_a_micro_batch_with_fewer_examples_than_devices_is_refused(way):
    f = devices.in_step(way, small, num_microbatches=8)
    message = f"holds {EXAMPLES} examples along axis 0, 4 on each of {COUNT} devices"
    with pytest.raises(ValueError, match=f"{message}. Use 1, 2 or 4, or"):
        f(SMALL, X)
    f = devices.in_step(way, small, microbatch_size=COUNT // 2)
    message = f"is not a multiple of {COUNT}.*Use a multiple of {COUNT}"
    with pytest.raises(ValueError, match=message):
        f(SMALL, X)


def test_a_mesh_inside_shard_map_is_refused():
    f = oa.value_and_grad(
        small, num_microbatches=2, axis_name=AXIS, mesh=devices.mesh()
    )
    with pytest.raises(ValueError, match="Leave `mesh` out, and keep `axis_name`"):
        devices.inside("unchecked", f, (None, 0), (None,))(SMALL, X)


def test_parameters_sharded_over_the_batch_axis_are_refused():
    mesh = devices.mesh(AxisType.Explicit)
    w = jax.device_put(normal(3, COUNT), NamedSharding(mesh, P(None, AXIS)))
    params = {"w": w, "b": jnp.zeros(COUNT)}
    f = devices.in_step("explicit", small, num_microbatches=2)
    with pytest.raises(ValueError, match=r"`params\['w'\]` is sharded over.*FSDP"):
        f(params, X)
