"""The `TrainState` of `optax_accum.flax`, in the loops that Linen users write."""

from typing import Any

import chex
import flax.core
import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.linen import fp8_ops
from flax.linen.fp8_ops import OVERWRITE_WITH_GRADIENT
from flax.training import train_state
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import optax_accum as oa
from optax_accum.flax import TrainState
from tests.support import hlo
from tests.support.errors import refused
from tests.support.training import needs_in_place, promoting, slow
from tests.support.xla import optimized

SIZES = (3, 1, 4, 4, 1, 3)  # examples in six micro-batches: two windows of three
X = jnp.asarray(np.random.default_rng(0).normal(size=(sum(SIZES), 4)), jnp.float32)
PARTS = jnp.split(X, np.cumsum(SIZES)[:-1])
INNER = promoting(optax.adamw(optax.linear_schedule(0.1, 0.01, 3), weight_decay=0.1))


class MLP(nn.Module):
    """Two layers; what makes no sum over examples is left out."""

    @nn.compact
    def __call__(self, x):
        return nn.Dense(1)(nn.tanh(nn.Dense(8)(x)))


class Normalised(nn.Module):
    """BatchNorm and dropout."""

    @nn.compact
    def __call__(self, x):
        x = nn.BatchNorm(use_running_average=False)(nn.Dense(8)(x))
        return nn.Dense(1)(nn.Dropout(0.5, deterministic=False)(x))


@pytest.fixture(autouse=True)
def _promotion(loose_promotion):
    """Linen's layers add biases of lower rank."""


def create(tx, model=None, cls=TrainState, **kwargs):
    model = model or MLP()
    rngs = {"params": jax.random.key(1), "dropout": jax.random.key(2)}
    variables = model.init(rngs, X)
    if "batch_stats" in variables:
        kwargs["batch_stats"] = variables["batch_stats"]
    return cls.create(apply_fn=model.apply, params=variables["params"], tx=tx, **kwargs)


def loss_fn(params, apply_fn, x):
    return jnp.mean((apply_fn({"params": params}, x) - 1) ** 2)


def step(state, x, weight=None, **kwargs):
    value, grads = jax.value_and_grad(loss_fn)(state.params, state.apply_fn, x)
    weight = len(x) if weight is None else weight
    return state.apply_gradients(grads=grads, weight=weight, value=value, **kwargs)


def same(tree, other):
    jax.tree.map(np.testing.assert_array_equal, tree, other)


def global_batches(inner, *batches):
    """What Flax's own `TrainState` makes of the global batches."""
    state = create(inner, cls=train_state.TrainState)
    for x in batches:
        grads = jax.grad(loss_fn)(state.params, state.apply_fn, x)
        state = state.apply_gradients(grads=grads)
    return state.params


WRAPPED = {
    "alone": lambda inner: oa.accumulate(inner, 3),
    "in a chain": lambda inner: optax.chain(
        optax.zero_nans(), oa.accumulate(inner, 3), optax.scale(1.0)
    ),
}


@pytest.mark.parametrize(
    "wrap", [WRAPPED["alone"], slow(WRAPPED["in a chain"], id="in a chain")]
)
def test_windows_of_uneven_micro_batches_equal_global_batches(wrap):
    state = create(wrap(INNER))
    seen = []
    program = jax.jit(step)
    for x in PARTS:
        state = program(state, x)
        seen.append(
            (int(state.micro_step), int(state.gradient_step), bool(state.has_updated))
        )
    cut = sum(SIZES[:3])
    expected = global_batches(INNER, X[:cut], X[cut:])
    chex.assert_trees_all_close(state.params, expected, rtol=1e-5, atol=1e-7)
    once, twice = [(1, 0, False), (2, 0, False)], [(1, 1, False), (2, 1, False)]
    assert seen == [*once, (0, 1, True), *twice, (0, 2, True)]
    assert state.step == 6


def test_a_python_boundary_closes_the_window_early():
    state = create(oa.accumulate(INNER))
    program = jax.jit(step, static_argnames="boundary")
    for i, x in enumerate(PARTS):
        state = program(state, x, boundary=i in (3, 5))
    cut = sum(SIZES[:4])
    expected = global_batches(INNER, X[:cut], X[cut:])
    chex.assert_trees_all_close(state.params, expected, rtol=1e-5, atol=1e-7)


def test_flaxs_own_train_state_refuses_a_weight():
    """The trap: the fields that Flax's `apply_gradients` replaces swallow a weight."""
    state = create(oa.accumulate(INNER, 3), cls=train_state.TrainState)
    with pytest.raises(TypeError, match="weight"):
        step(state, PARTS[0])


def test_the_inner_optimizer_sees_the_value_of_the_global_batch():
    def record():
        def update(updates, state, params=None, *, value, scale=1.0):
            del state, params
            return updates, value * scale

        return optax.GradientTransformationExtraArgs(lambda _: jnp.zeros([]), update)

    state = create(oa.accumulate(optax.chain(record(), optax.sgd(0.1)), 3))
    start = state.params
    for x in PARTS[:3]:
        state = step(state, x, extra_args={"scale": 2.0})
    expected = loss_fn(start, state.apply_fn, X[: sum(SIZES[:3])])
    value = state.opt_state.inner_state[0]
    np.testing.assert_allclose(value, 2 * expected, rtol=1e-6)


def test_a_subclass_may_add_fields_without_defaults():
    class WithKey(TrainState):
        batch_stats: Any  # as many declare it
        key: jax.Array

    state = create(
        oa.accumulate(INNER, 3), cls=WithKey, key=jax.random.key(0), batch_stats=None
    )
    state = step(state, PARTS[0], key=jax.random.key(1))
    assert jax.random.key_data(state.key)[1] == 1
    assert create(oa.accumulate(INNER, 3)).batch_stats is None


def normalised_step(state, x, weight):
    key = jax.random.fold_in(jax.random.key(0), state.step)

    def loss(params):
        prediction, changed = state.apply_fn(
            {"params": params, "batch_stats": state.batch_stats},
            x,
            mutable="batch_stats",
            rngs={"dropout": key},
        )
        return jnp.mean(prediction**2), (changed["batch_stats"], prediction)

    (value, (stats, prediction)), grads = jax.value_and_grad(loss, has_aux=True)(
        state.params
    )
    state = state.apply_gradients(
        grads=grads, weight=weight, value=value, batch_stats=stats
    )
    return state, stats, prediction


def test_batch_norm_statistics_carry_over_between_micro_batches():
    state = create(oa.accumulate(INNER, 2), Normalised())
    before = state.batch_stats
    program = jax.jit(normalised_step)
    state, stats, first = program(state, PARTS[2], 4.0)
    same(state.batch_stats, stats)
    mean = state.batch_stats["BatchNorm_0"]["mean"]
    assert np.any(mean != before["BatchNorm_0"]["mean"])
    state, stats, second = program(state, PARTS[2], 4.0)
    assert np.any(state.batch_stats["BatchNorm_0"]["mean"] != mean)
    assert np.any(first != second)  # another dropout


@pytest.mark.parametrize("how", ["weight 0", "rejected"])
def test_a_micro_batch_without_weight_leaves_the_statistics_unchanged(how):
    state = create(oa.accumulate(INNER, 2, skip=oa.skip_not_finite), Normalised())
    state, _, _ = jax.jit(normalised_step)(state, PARTS[2], 4.0)
    stats = state.batch_stats
    bad = jnp.full_like(PARTS[2], jnp.nan)
    weight = 0.0 if how == "weight 0" else 4.0
    state, new, _ = jax.jit(normalised_step)(state, bad, weight)
    assert np.all(np.isnan(new["BatchNorm_0"]["mean"]))
    same(state.batch_stats, stats)
    assert state.has_updated
    assert np.all(np.isfinite(jax.tree.leaves(state.params)[0]))


@pytest.mark.parametrize("reduction", ["mean", "ratio", "sum"])
@pytest.mark.parametrize("place", ["alone", "in a chain", "injected"])
def test_statistics_go_on_where_the_gradient_counts_without_weight(place, reduction):
    """In a ratio and a sum a weight of 0 is no mask, in a mean it is."""
    inner = oa.accumulate(optax.sgd(0.1), every_k=2, reduction=reduction)
    tx = {
        "alone": inner,
        "in a chain": optax.chain(optax.clip(1.0), optax.masked(inner, True)),
        "injected": optax.inject_hyperparams(lambda rate: inner)(rate=1.0),  # noqa: ARG005
    }[place]
    state = create(tx, model=Normalised())
    moved = jax.tree.map(lambda x: x + 1, state.batch_stats)
    after = state.apply_gradients(grads=state.params, weight=0.0, batch_stats=moved)
    wanted = state.batch_stats if reduction == "mean" else moved
    chex.assert_trees_all_equal(after.batch_stats, wanted)


def test_frozen_statistics_may_be_replaced_by_plain_dicts():
    tx = oa.accumulate(optax.sgd(0.1), 2)
    stats = {"norm": {"mean": jnp.zeros(2)}}
    params = {"w": jnp.ones(2)}
    state = TrainState.create(
        apply_fn=None, params=params, tx=tx, batch_stats=flax.core.freeze(stats)
    )
    new = {"norm": {"mean": jnp.ones(2)}}
    state = state.apply_gradients(grads=params, batch_stats=new)
    same(state.batch_stats, new)
    with pytest.raises(ValueError, match="`batch_stats` must have the tree structure"):
        state.apply_gradients(grads=params, batch_stats=new["norm"])


def test_stacked_statistics_are_refused():
    """An auxiliary output of `value_and_grad` has an axis of micro-batches."""
    params, stats = {"w": jnp.ones(2)}, {"norm": {"mean": jnp.zeros(2)}}
    state = TrainState.create(
        apply_fn=None, params=params, tx=oa.accumulate(INNER, 2), batch_stats=stats
    )
    stacked = {"norm": {"mean": jnp.zeros((4, 2))}}
    with refused("`batch_stats['norm']['mean']` has shape (4, 2)", "carry_argnum"):
        state.apply_gradients(grads=params, batch_stats=stacked)


@pytest.mark.parametrize(
    ("name", "advice"),
    [("weights", "`weight`"), ("batch_stat", "`batch_stats`"), ("hvp", "`extra_args`")],
)
def test_a_keyword_that_is_not_a_field_is_named(name, advice):
    state = create(oa.accumulate(INNER, 2))
    with refused(f"`{name}` is not an argument of `apply_gradients`", advice):
        state.apply_gradients(grads=state.params, **{name: 3.0})


def test_the_gradient_of_all_variables_is_recognised():
    state = create(oa.accumulate(INNER, 2))
    with refused('pass `grads["params"]`'):
        state.apply_gradients(grads={"params": state.params})


@pytest.mark.several_devices
def test_scalar_statistics_work_in_shard_map():
    tx = oa.accumulate(optax.sgd(0.1), 2, axis_name="data")
    state = TrainState.create(
        apply_fn=None,
        params={"w": jnp.ones(3)},
        tx=tx,
        batch_stats={"sigma": jnp.zeros([])},
    )
    count = jax.device_count()
    state = state.replace(opt_state=oa.sharding.stack_windows(state.opt_state, count))
    specs = jax.tree.map(lambda _: P(), state)
    specs = specs.replace(opt_state=oa.sharding.window_specs(state.opt_state, "data"))

    def apply(state, grads):
        return state.apply_gradients(grads=grads, batch_stats={"sigma": jnp.ones([])})

    mesh = jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(
        apply, mesh=mesh, in_specs=(specs, P()), out_specs=specs, check_vma=False
    )
    state = jax.jit(mapped)(state, state.params)
    assert state.batch_stats["sigma"].shape == ()


@pytest.mark.parametrize("place", ["alone", "in a chain"])
def test_overwrite_with_gradient_is_not_trained(place):
    """At the boundary it is the window's; in a chain, which has none, each one's."""
    tx = oa.accumulate(optax.sgd(1.0), 3, skip=oa.skip_not_finite)
    if place == "in a chain":
        tx = optax.chain(tx, optax.scale(1.0))
    params = {"params": {"w": jnp.ones(2)}, OVERWRITE_WITH_GRADIENT: jnp.zeros(1)}
    state = TrainState.create(apply_fn=None, params=params, tx=tx)
    expected = {"alone": [0, 0, 1, 1], "in a chain": [2, 2, 1, 1]}[place]
    for i, wanted in zip((2.0, jnp.nan, 1.0, jnp.nan), expected, strict=True):
        grads = {
            "params": {"w": jnp.full(2, i)},
            OVERWRITE_WITH_GRADIENT: jnp.full(1, i),
        }
        state = state.apply_gradients(grads=grads)
        assert state.params[OVERWRITE_WITH_GRADIENT] == wanted
    np.testing.assert_array_equal(state.params["params"]["w"], 1 - 1.5)


def test_apply_gradients_is_one_program_without_copies():
    shapes = {"in": (512, 256), "out": (256, 384)}
    params = {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in shapes.items()}
    state = jax.eval_shape(
        lambda params: TrainState.create(
            apply_fn=None, params=params, tx=oa.accumulate(optax.adamw(1e-3), 8)
        ),
        params,
    )

    def apply(state, grads, weight):
        return state.apply_gradients(grads=grads, weight=weight)

    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    program = hlo.compiled(apply, state, params, scalar, donate=0)
    assert hlo.temporaries(program) < 0.01 * hlo.nbytes(params)
    assert hlo.large_copies(program, 256 * 384) == []


def test_apply_gradients_is_traced_once():
    program = jax.jit(chex.assert_max_traces(step, n=1))
    state = create(oa.accumulate(INNER, 2))
    for _ in range(5):
        state = program(state, PARTS[0])
    assert state.gradient_step == 2


def test_a_train_state_is_saved_and_restored_inside_a_window():
    states = [create(oa.accumulate(INNER, 3)) for _ in range(2)]
    program = jax.jit(step)
    for i, x in enumerate(PARTS):
        states = [program(state, x) for state in states]
        if i == 1:
            blank = create(oa.accumulate(INNER, 3))
            saved = flax.serialization.to_bytes(states[1])
            states[1] = flax.serialization.from_bytes(blank, saved)
    same(states[0].params, states[1].params)


@pytest.mark.several_devices
def test_training_in_pmap_equals_the_global_batch():
    count = jax.device_count()
    state = create(oa.accumulate(INNER, 2, axis_name="batch"))
    program = jax.pmap(step, axis_name="batch")
    x = jnp.stack([jnp.roll(X[:8], i, 0) for i in range(count)]) * 1.5
    state = jax.tree.map(lambda leaf: jnp.stack([leaf] * count), state)
    for part in (x[:, :3], x[:, 3:]):  # three examples of every device, and five
        state = program(state, part)
    assert state.has_updated.all()
    expected = global_batches(INNER, x.reshape(-1, 4))
    one = jax.tree.map(lambda leaf: leaf[0], state.params)
    chex.assert_trees_all_close(one, expected, rtol=1e-5, atol=1e-6)


def test_an_optimizer_that_does_not_accumulate_is_refused():
    message = "`tx` must accumulate.*Wrap your optimizer: tx=oa.accumulate"
    with pytest.raises(ValueError, match=message):
        create(optax.adam(1e-3))
    parts = {"a": oa.accumulate(optax.adam(1e-3), 2), "b": oa.accumulate(INNER, 2)}
    tx = optax.partition(parts, {"Dense_0": "a", "Dense_1": "b"})
    with pytest.raises(ValueError, match=r"`tx` must accumulate in one place.*holds 2"):
        create(tx)


def by_gradient(loss, state, **kwargs):
    """``loss(params) -> (value, fields)`` goes into the window as its gradient."""
    (value, fields), grads = jax.value_and_grad(loss, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, value=value, **fields, **kwargs)


def by_pullback(loss, state, **kwargs):
    """The same, as its pullback."""
    value, pullback, fields = jax.vjp(loss, state.params, has_aux=True)
    return state.apply_gradients(grads=pullback, value=value, **fields, **kwargs)


@pytest.mark.core
class TestPullbacks:
    @pytest.mark.parametrize(
        "wrap",
        [
            lambda tx: tx,
            lambda tx: optax.chain(tx, optax.scale(0.5)),
            lambda tx: optax.chain(optax.clip_by_global_norm(0.1), tx),
            slow(lambda tx: optax.chain(optax.chain(tx), optax.scale(0.5))),
            slow(lambda tx: optax.named_chain(("clip", optax.clip(0.1)), ("tx", tx))),
        ],
        ids=["alone", "first", "second", "nested", "named"],
    )
    def test_they_train_as_gradients_do(self, wrap):
        """What comes before `oa.accumulate` sees gradients, and not residuals."""

        def step(how, state, x, boundary):
            def loss(params):
                return loss_fn(params, state.apply_fn, x), {}

            return how(loss, state, weight=len(x), boundary=boundary)

        states = [create(wrap(oa.accumulate(optax.sgd(0.1)))) for _ in range(2)]
        program = jax.jit(step, static_argnums=0)
        for i, x in enumerate(PARTS):
            ends = jnp.array(i in (3, 5))
            pairs = zip((by_gradient, by_pullback), states, strict=True)
            states = [program(how, state, x, ends) for how, state in pairs]
        expected, state = states
        chex.assert_trees_all_close(state.params, expected.params, rtol=1e-5, atol=1e-7)
        assert (state.step, state.gradient_step) == (6, 2)

    def test_windows_of_uneven_micro_batches_equal_global_batches(self):
        def step(state, x, weight):
            def loss(params):
                return loss_fn(params, state.apply_fn, x), {}

            return by_pullback(loss, state, weight=weight)

        state = create(oa.accumulate(INNER, 3))
        values = []
        for x in PARTS:
            state = jax.jit(step)(state, x, jnp.float32(len(x)))
            if state.has_updated:
                window = state.opt_state.window
                values.append(window.loss / window.weight)
        cut = sum(SIZES[:3])
        expected = global_batches(INNER, X[:cut], X[cut:])
        chex.assert_trees_all_close(state.params, expected, rtol=1e-5, atol=1e-7)
        first = create(oa.accumulate(INNER, 3))
        wanted = loss_fn(first.params, first.apply_fn, X[:cut])
        np.testing.assert_allclose(values[0], wanted, rtol=1e-6)

    @pytest.mark.parametrize("how", [slow(by_gradient), by_pullback])
    def test_statistics_are_those_of_the_micro_batches_that_count(self, how):
        @jax.jit
        def step(state, x, weight):
            def loss(params):
                prediction, changed = state.apply_fn(
                    {"params": params, "batch_stats": state.batch_stats},
                    x,
                    mutable="batch_stats",
                    rngs={"dropout": jax.random.fold_in(jax.random.key(0), state.step)},
                )
                return jnp.mean(prediction**2), changed

            return how(loss, state, weight=weight)

        state = create(oa.accumulate(INNER, 3), Normalised())
        state = step(state, PARTS[2], 4.0)
        stats = state.batch_stats["BatchNorm_0"]
        assert np.any(stats["mean"] != 0)
        state = step(state, jnp.full_like(PARTS[2], jnp.nan), 0.0)
        same(state.batch_stats["BatchNorm_0"], stats)
        state = step(state, PARTS[2], 4.0)
        assert np.any(state.batch_stats["BatchNorm_0"]["mean"] != stats["mean"])
        assert state.has_updated
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(state.params))

    @pytest.mark.parametrize("place", [slow("alone"), "in a chain"])
    def test_what_is_overwritten_is_what_gradients_make_of_it(self, place):
        model = nn.Dense(16, dot_general_cls=fp8_ops.Fp8DirectDotGeneralOp)
        x = jax.random.normal(jax.random.key(0), (8, 16))
        tx = oa.accumulate(optax.sgd(0.1), 2)
        if place == "in a chain":
            tx = optax.chain(tx, optax.scale(1.0))
        variables = model.init(jax.random.key(1), x)
        states = []
        for how in (by_gradient, by_pullback):
            state = TrainState.create(apply_fn=model.apply, params=variables, tx=tx)
            for part in (x[:5], x[5:]):

                def loss(variables, part=part):
                    prediction: Any = model.apply(variables, part)
                    return jnp.mean(prediction**2), {}

                state = how(loss, state, weight=len(part))
            states.append(state)
        expected, state = states
        chex.assert_trees_all_close(state.params, expected.params, rtol=1e-6)
        (history,) = state.params[OVERWRITE_WITH_GRADIENT].values()
        assert np.any(history["input_amax_history"] != 0)

    @needs_in_place
    def test_no_gradient_stands_beside_the_window(self):
        """One of layers in a scan is as large as all parameters."""
        width, count = 64, 8

        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x, _):
                return x + nn.Dense(width)(nn.tanh(nn.Dense(2 * width)(x))), None

        layers = nn.scan(
            nn.remat(Layer, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=count,
        )()
        tx = oa.accumulate(promoting(optax.adamw(1e-3)), 4)
        x = jnp.ones((2, width))
        params = layers.init(jax.random.key(0), x, None)["params"]
        state = TrainState.create(apply_fn=layers.apply, params=params, tx=tx)
        size = hlo.nbytes(params)

        def program(how):
            def step(state, x):
                def loss(params):
                    y, _ = state.apply_fn({"params": params}, x, None)
                    return jnp.mean(y**2), {}

                return how(loss, state, weight=len(x))

            return optimized(jax.jit(step, donate_argnums=0).lower(state, x))

        assert hlo.temporaries(program(by_gradient)) > size
        compiled = program(by_pullback)
        assert hlo.temporaries(compiled) < 0.3 * size
        assert hlo.large_copies(compiled, count * width * 2 * width) == []

    @pytest.mark.several_devices
    def test_windows_in_pmap_equal_the_global_batch(self):
        def step(state, x):
            def loss(params):
                return loss_fn(params, state.apply_fn, x), {}

            return by_pullback(loss, state, weight=len(x))

        inner = optax.sgd(0.1)
        count = jax.device_count()
        state = create(oa.accumulate(inner, 2, axis_name="batch"))
        state = jax.tree.map(lambda leaf: jnp.stack([leaf] * count), state)
        x = jnp.stack([jnp.roll(X[:8], i, 0) for i in range(count)]) * 1.5
        for part in (x[:, :3], x[:, 3:]):
            state = jax.pmap(step, axis_name="batch")(state, part)
        assert state.has_updated.all()
        expected = global_batches(inner, x.reshape(-1, 4))
        one = jax.tree.map(lambda leaf: leaf[0], state.params)
        chex.assert_trees_all_close(one, expected, rtol=1e-5, atol=1e-6)
