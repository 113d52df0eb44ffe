"""`oa.value_and_grad` whose backward pass adds the gradients to their sum in place.

On versions of JAX that add some of them wrongly the same tests hold for the old way.
"""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_accum as oa
import optax_accum.flax as oaf
from tests.support import devices, hlo
from tests.support.devices import AXIS, COUNT
from tests.support.errors import refused
from tests.support.training import ADDS_IN_PLACE, needs_in_place, slow
from tests.support.xla import optimized

pytestmark = pytest.mark.core

# Where it is possible, True: then there is no other way unseen.
IN_PLACE = True if ADDS_IN_PLACE else None
B, K = 12, 4


def normal(*shape, seed=0):
    random = np.random.default_rng([seed, *shape])
    return jnp.asarray(random.normal(size=shape), jnp.float32)


def make_batch():
    """Of which very different numbers of examples are valid in the micro-batches."""
    valid = np.isin(np.arange(B), [0, 2, 4, 6, 8, 10, 11])
    return {"x": normal(B, 3), "y": normal(B, 2), "valid": jnp.asarray(valid)}


EMPTY = {"num_microbatches": slice(1, None, K), "microbatch_size": slice(5, 10)}


def poisoned(batch, size):
    """`batch` with a micro-batch of weight 0 that is NaN; and what counts of it."""
    ((name, _),) = size.items()
    empty = EMPTY[name]
    valid = batch["valid"].at[empty].set(False)
    clean = batch | {"valid": valid}
    return clean | {"x": batch["x"].at[empty].set(jnp.nan)}, clean


def count(params, batch):
    del params
    return batch["valid"].sum()


def masked(predict, *, is_mean=True):
    """A mean over the valid examples, or their sum."""

    def loss(params, batch):
        errors = jnp.sum((predict(params, batch["x"]) - batch["y"]) ** 2, -1)
        total = jnp.sum(jnp.where(batch["valid"], errors, 0))
        count = jnp.maximum(batch["valid"].sum(), 1).astype(total.dtype)
        return total / count if is_mean else total

    return loss


def in_parts(fun, **options):
    if "microbatch_size" not in options:
        options = {"num_microbatches": K} | options
    return oa.value_and_grad(fun, **{"in_place": IN_PLACE} | options)


def whole(fun, *args, **kwargs):
    """On the whole batch at once."""
    return jax.jit(jax.value_and_grad(fun, *args, **kwargs))


def close(got, wanted, tolerance=1e-5):
    chex.assert_trees_all_equal_shapes_and_dtypes(got, wanted)
    chex.assert_trees_all_close(got, wanted, rtol=tolerance, atol=tolerance)


# --- Models ---


def dense(params, x):
    return jnp.tanh(x @ params["w"] + params["rest"][0][None])


def layers(params, x):
    """Scanned and rematerialised."""

    @jax.checkpoint
    def layer(h, w):
        return jnp.tanh(h @ w), None

    h, _ = jax.lax.scan(layer, x, params["layers"])
    return h @ params["w"]


def crossed(params, x):
    """A scan that uses a parameter, beside something computed from another one."""
    turned = jnp.sin(params["a"])

    def layer(h, _):
        return jnp.tanh(h * turned[None] + params["b"][None]), None

    h, _ = jax.lax.scan(layer, x, length=3)
    return h[:, :2]


def embedding(params, x):
    """Looked up, and used once more."""
    h = params["table"][jnp.argmax(x, -1)] + x
    return jnp.tanh(h @ params["table"].T)[:, :2]


def nested(params, x):
    inner = jax.jit(lambda w, x: jnp.tanh(x @ w))
    return jax.jit(lambda w, x: inner(w, x) + inner(2 * w, x))(params, x)


def branches(params, x):
    used = jax.lax.cond(
        params["a"][0, 0] > 0, lambda p: p["a"], lambda p: jnp.sin(p["b"]), params
    )
    return x @ used


MODELS = {
    dense: {"w": normal(3, 2), "rest": (normal(2), None)},
    layers: {"layers": normal(3, 3, 3), "w": normal(3, 2)},
    crossed: {"a": normal(3), "b": normal(3, seed=1)},
    embedding: {"table": normal(3, 3)},
    nested: normal(3, 2),
    branches: {"a": normal(3, 2), "b": normal(3, 2, seed=1)},
}


def part_of_the_parameters(params, x):
    return x @ params["w"]


def without_parameters(params, x):
    del params
    return x[:, :2]


def complex_parameters(params, x):
    return jnp.abs(x.astype(jnp.complex64) @ params) + (params * params)[0].imag[None]


MODELS |= {
    part_of_the_parameters: {"w": normal(3, 2), "unused": normal(4)},
    without_parameters: normal(3, 2),
    complex_parameters: jax.lax.complex(normal(3, 2), normal(3, 2, seed=1)),
}


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_weighted_micro_batches_of_any_model_equal_the_whole_batch(model):
    fun, params = masked(model), MODELS[model]
    batch, clean = poisoned(make_batch(), {"num_microbatches": K})
    got = jax.jit(in_parts(fun, weight=count))(params, batch)
    close(got, whole(fun)(params, clean))


def test_jax_adds_in_place_rightly_where_it_is_asked_to():
    """On older versions a parameter gets another one's gradient, without a word."""
    fun, params, batch = masked(crossed), MODELS[crossed], make_batch()
    pullback: Any
    _, pullback = jax.vjp(lambda params: fun(params, batch), params)
    sums = jax.tree.map(lambda p: jax.new_ref(jnp.zeros_like(p)), params)
    pullback.with_refs(sums)(jnp.float32(1))
    wanted = jax.grad(fun)(params, batch)
    errors = [jnp.abs(sums[name][...] - wanted[name]).max() for name in params]
    assert bool(max(errors) < 1e-5) == ADDS_IN_PLACE
    close(jax.jit(in_parts(fun, weight=count))(params, batch)[1], wanted)


# --- Options ---

RAGGED = {"microbatch_size": 5}
EQUAL = {"num_microbatches": K}


@pytest.mark.parametrize(
    "options",
    [
        slow(RAGGED, id="ragged"),
        pytest.param(RAGGED | {"weight": count}, id="ragged with weights"),
        pytest.param(EQUAL | {"weight": count, "unroll": 2}, id="unrolled"),
        pytest.param(
            EQUAL | {"weight": count, "num_real_microbatches": 3}, id="some of them"
        ),
    ],
)
def test_every_loop_equals_the_whole_batch(options):
    batch = clean = make_batch() | {"valid": jnp.ones(B, bool)}
    if "weight" in options:
        size = {name: options[name] for name in EMPTY if name in options}
        batch, clean = poisoned(make_batch(), size)
    if "num_real_microbatches" in options:
        clean = clean | {"valid": clean["valid"].at[3::K].set(False)}
    fun, params = masked(layers), MODELS[layers]
    wanted = whole(fun)(params, clean)
    close(jax.jit(in_parts(fun, **options))(params, batch), wanted)
    if "num_real_microbatches" in options:

        def some(number, *args):
            return in_parts(fun, **options | {"num_real_microbatches": number})(*args)

        close(jax.jit(some)(3, params, batch), wanted)


@pytest.mark.parametrize(
    ("reduction", "size"), [("mean", RAGGED), ("ratio", EQUAL), ("sum", RAGGED)]
)
def test_every_reduction_equals_the_whole_batch_with_weights_from_aux(reduction, size):
    batch = clean = make_batch()
    if reduction == "mean":
        batch, clean = poisoned(batch, size)
    loss = masked(layers, is_mean=reduction == "mean")

    def fun(params, batch):
        return loss(params, batch), batch["valid"].sum()

    def valid(params, batch, aux):
        del params, batch
        return aux

    f = in_parts(fun, has_aux=True, weight=valid, reduction=reduction, **size)
    (value, _), grads = jax.jit(f)(MODELS[layers], batch)
    wanted = masked(layers, is_mean=reduction != "sum")
    close((value, grads), whole(wanted)(MODELS[layers], clean))


def test_several_arguments_are_differentiated_and_outputs_keep_their_policies():
    def fun(w, batch, rest):
        predicted = dense({"w": w, "rest": rest}, batch["x"])
        errors = jnp.sum((predicted - batch["y"]) ** 2, -1)
        aux = errors, errors.mean(), errors.sum(), {"first": errors[0]}
        return errors.mean(), aux

    args = normal(3, 2), make_batch(), (normal(2), None)
    options = {"argnums": (2, 0), "has_aux": True}
    policies = ("concat", "mean", "sum", {"first": "stack"})
    f = in_parts(fun, aux=policies, **options)
    (value, aux), grads = jax.jit(f)(*args)
    (wanted, wanted_aux), wanted_grads = whole(fun, **options)(*args)
    close((value, grads, aux[:3]), (wanted, wanted_grads, wanted_aux[:3]))
    close(aux[3]["first"], wanted_aux[0][:K])
    only_grads = oa.grad(fun, (2, 0), True, num_microbatches=K, in_place=IN_PLACE)
    close(only_grads(*args)[0], wanted_grads)


@pytest.mark.parametrize("make_key", [jax.random.key, slow(jax.random.PRNGKey)])
def test_keys_and_a_carry_go_through_the_loop_as_by_hand(make_key):
    def fun(params, batch, carry, key):
        @jax.checkpoint  # so that the key goes to the backward pass
        def dropped(x):
            return jnp.where(jax.random.bernoulli(key, 0.5, x.shape), x, 0)

        value = masked(lambda p, x: dense(p, dropped(x)))(params, batch)
        return value, 0.5 * carry + value

    params, key = MODELS[dense], make_key(0)
    batch, clean = poisoned(make_batch(), EQUAL)
    f = in_parts(
        fun, carry_argnum=2, rng_argnums=3, weight=lambda p, b, *_: count(p, b)
    )
    got = jax.jit(f)(params, batch, jnp.float32(2), key)

    by_hand = jax.jit(jax.value_and_grad(fun, has_aux=True))
    carry, parts = jnp.float32(2), []
    for i in (0, 2, 3):  # the other one has no weight
        part = jax.tree.map(lambda x, i=i: x[i::K], clean)
        (_, new), grads = by_hand(params, part, carry, jax.random.fold_in(key, i))
        parts.append((count(params, part), (new - 0.5 * carry, grads)))
        carry = new
    value, grads = mean_of(parts)
    close(got, ((value, carry), grads))


@pytest.mark.usefixtures("float64")
def test_double_precision_stays_double():
    params, batch = (
        jax.tree.map(lambda x: x.astype(float), tree)
        for tree in (MODELS[layers], make_batch())
    )
    batch["valid"] = batch["valid"] > 0
    got = jax.jit(in_parts(masked(layers), weight=count))(params, batch)
    close(got, whole(masked(layers))(params, batch), 1e-13)


def mean_of(parts):
    """The weighted mean of ``(weight, tree)``."""
    total = sum(weight for weight, _ in parts)

    def mean(*leaves):
        pairs = zip(parts, leaves, strict=True)
        return sum(x * (weight / total) for (weight, _), x in pairs)

    return jax.tree.map(mean, *(tree for _, tree in parts))


def test_a_call_without_jit_equals_the_whole_batch():
    params, batch = MODELS[layers], make_batch()
    got = in_parts(masked(layers), weight=count)(params, batch)
    close(got, whole(masked(layers))(params, batch))


@pytest.mark.parametrize(
    ("parts", "options"),
    [
        ([slice(i, None, K) for i in range(K)], EQUAL | {"in_place": IN_PLACE}),
        ([slice(0, 5), slice(5, 10), slice(10, 12)], RAGGED | {"in_place": None}),
    ],
    ids=["equal", "ragged"],
)
def test_a_rule_of_its_own_sees_the_micro_batch_s_gradient(parts, options):
    """Clipping what comes back does not scale with a weight."""
    fun = masked(lambda params, x: clipped(dense(params, x)))
    params, batch = MODELS[dense], make_batch() | {"valid": jnp.ones(B, bool)}
    each = [jax.tree.map(lambda x, part=part: x[part], batch) for part in parts]
    wanted = mean_of([(count(params, part), whole(fun)(params, part)) for part in each])
    close(jax.jit(in_parts(fun, **options))(params, batch), wanted)


@jax.custom_vjp
def clipped(x):
    return x


clipped.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -0.05, 0.05),))


# --- Other transformations ---


@pytest.mark.usefixtures("float64")
def test_other_transformations_equal_those_of_the_whole_batch():
    params, batch = jax.tree.map(
        lambda x: x.astype(float) if x.dtype == jnp.float32 else x,
        (MODELS[crossed], make_batch()),
    )
    several = jax.tree.map(lambda p: jnp.stack([p, 2 * p, -p]), params)
    some = jnp.stack([batch["valid"], ~batch["valid"], jnp.zeros(B, bool)])
    nan = batch | {"x": jnp.stack([batch["x"]] * 3), "valid": some}
    for i in range(3):  # another micro-batch of each has no weight
        nan["x"] = nan["x"].at[i, i::K].set(jnp.nan)
        nan["valid"] = nan["valid"].at[i, i::K].set(False)
    ones = jax.tree.map(jnp.ones_like, params)

    def all_of(value_and_grad, nan):
        f = functools.partial(value_and_grad, masked(crossed))

        def value(params):
            return f()(params, batch)[0]

        def square_of_the_gradient(params):
            grads = f()(params, batch)[1]
            return sum(jnp.sum(g**2) for g in jax.tree.leaves(grads))

        def of_closed_over(scale):
            fun = masked(lambda params, x: crossed(params, x) * scale)
            value, grads = value_and_grad(fun)(params, batch)
            return value + jnp.sum(grads["a"] ** 2)

        def of_mapped(x):
            grads = jax.vmap(f(), (None, 0))(params, batches | {"x": x})[1]
            return jnp.sum(grads["a"] ** 2)

        over_masks = {"x": 0, "y": None, "valid": 0}
        batches = jax.tree.map(lambda x: jnp.stack([x, x[::-1]]), batch)
        return {
            "vmap over parameters": jax.vmap(f(), (0, None))(several, batch),
            "vmap over batches": jax.vmap(f(), (None, 0))(params, batches),
            "vmap over masks": jax.vmap(f(), (None, over_masks))(params, nan),
            "grad": jax.grad(value)(params),
            "jvp": jax.jvp(value, (params,), (ones,)),
            "hessian": jax.hessian(lambda a: value(params | {"a": a}))(params["a"]),
            "grad of gradient": jax.grad(square_of_the_gradient)(params),
            "grad of mapped": jax.grad(of_mapped)(batches["x"]),
            "closed over": jax.grad(of_closed_over)(2.0),
        }

    weighted = functools.partial(in_parts, weight=count)
    clean = nan | {"x": jnp.nan_to_num(nan["x"])}
    got = jax.jit(lambda: all_of(weighted, nan))()
    close(got, jax.jit(lambda: all_of(jax.value_and_grad, clean))(), 1e-10)


def test_a_module_of_nnx_equals_the_whole_batch():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))

    def loss(model, batch):
        return masked(lambda model, x: model(x))(model, batch)

    batch, clean = poisoned(make_batch(), EQUAL)
    f = oaf.value_and_grad(loss, num_microbatches=K, weight=count, in_place=IN_PLACE)
    got = nnx.jit(f)(model, batch)
    close(got, nnx.value_and_grad(loss)(model, clean))


# --- Devices ---

everywhere = devices.parametrized(
    devices.INSIDE + devices.OUTSIDE, usual=("pmap", "checked", "auto", "explicit")
)
SHARED = {"w": normal(3, 8), "b": normal(8)}
if jax.device_count() > 1:
    X, VALID = devices.examples(1, per_device=4)
    SHARDED = {"x": X[0], "valid": VALID[0]}  # of which one device has nothing but NaN


def device_loss(params, batch):
    return devices.loss(params, batch["x"], batch["valid"])


def of_all(fun):
    clean = SHARDED | {"x": jnp.nan_to_num(SHARDED["x"])}
    return jax.device_get(whole(fun)(SHARED, clean))


def on_devices(way, fun, **options):
    options = {"num_microbatches": 2, "weight": count, "in_place": IN_PLACE} | options
    f = devices.in_step(way, fun, **options)
    got = jax.block_until_ready(f(SHARED, devices.whole(way, SHARDED)))
    return jax.device_get(devices.result(way, got))


@pytest.mark.several_devices
@everywhere
def test_weighted_micro_batches_on_devices_equal_the_whole_batch(way):
    close(on_devices(way, device_loss), of_all(device_loss))


@pytest.mark.several_devices
@devices.parametrized(devices.OUTSIDE)
def test_scattered_gradients_equal_those_of_the_whole_batch(way):
    f = devices.in_step(
        way,
        device_loss,
        num_microbatches=2,
        weight=count,
        scatter=True,
        in_place=IN_PLACE,
    )
    close(jax.device_get(f(SHARED, SHARDED)), of_all(device_loss))


def exchanges_backwards(params, batch):
    return device_loss(params, batch) + jax.lax.pmean(jnp.sum(params["w"] ** 2), AXIS)


def exchanges_forwards(params, batch):
    largest = jax.lax.pmax(jnp.nan_to_num(batch["x"]).max(), AXIS)
    return device_loss(params, batch) * (largest > -1).astype(jnp.float32)


@pytest.mark.several_devices
@devices.parametrized(devices.INSIDE + devices.OUTSIDE)
@pytest.mark.parametrize("fun", [exchanges_backwards, exchanges_forwards])
def test_a_device_whose_micro_batch_has_no_weight_meets_the_others(fun, way):
    """Where they exchange anything: they would wait for it forever."""

    def alone(params, batch):
        extra = jnp.sum(params["w"] ** 2) if fun is exchanges_backwards else 0
        return device_loss(params, batch) + extra

    close(on_devices(way, fun, in_place=None), of_all(alone))
    if ADDS_IN_PLACE and fun is exchanges_forwards:
        close(on_devices(way, fun), of_all(alone))
    else:
        with refused("`in_place=True`", "exchanges data" if ADDS_IN_PLACE else "older"):
            on_devices(way, fun, in_place=True)


@pytest.mark.several_devices
@pytest.mark.parametrize(
    ("axis_name", "weight"),
    [pytest.param(None, None, marks=pytest.mark.slow), (AXIS, None), (AXIS, count)],
)
def test_a_checking_shard_map_over_some_axes_equals_the_whole(axis_name, weight):
    """With an axis that the compiler has, no branch may differ between devices."""
    shape = (COUNT // 2, 2)
    mesh = jax.make_mesh(shape, (AXIS, "model"), axis_types=(AxisType.Auto,) * 2)

    def local(params, batch):
        f = in_parts(
            masked(dense),
            num_microbatches=2,
            axis_name=axis_name,
            weight=weight,
            in_place=None if weight else IN_PLACE,
        )
        params = jax.lax.pcast(params, AXIS, to="varying")
        return jax.lax.pmean(f(params, batch), AXIS)

    params, batch = MODELS[dense], make_batch() | {"valid": jnp.ones(B, bool)}
    batch = jax.tree.map(lambda x: jnp.concatenate([x] * (COUNT // 2)), batch)
    mapped = jax.shard_map(
        local, mesh=mesh, axis_names={AXIS}, in_specs=(P(), P(AXIS)), out_specs=P()
    )
    got = jax.device_get(jax.jit(mapped)(params, batch))
    close(got, jax.device_get(whole(masked(dense))(params, batch)))


# --- Where it is not possible ---


def narrow_loss(dtype):
    def fun(params, batch):
        return masked(dense)(params, batch).astype(dtype)

    return fun


def through(dtype):
    """A loss whose gradient passes through a dtype, in which large weights overflow."""

    @jax.jit
    @jax.checkpoint
    def rounded(params):
        return jax.tree.map(lambda p: p.astype(dtype).astype(jnp.float32), params)

    def fun(params, batch):
        return masked(dense)(rounded(params), batch)

    return fun


def large(params, batch):
    return count(params, batch) * 100_000


def complex_loss(params, batch):
    x, y = (batch[name].astype(jnp.complex64) for name in "xy")
    return jnp.mean((x @ params - y) ** 2)


def with_integer(params, batch):
    return masked(dense)(params["own"], batch) * params["n"].astype(jnp.float32)


def with_state(params, batch):
    state = 0 * params["_overwrite_with_gradient"]
    return masked(dense)(params["own"], batch) + state


def widened(params, batch):
    return masked(dense)(jax.tree.map(lambda p: p.astype(jnp.float32), params), batch)


def with_own_rule(params, batch):
    rule = jax.checkpoint(jax.jit(doubled))
    predict = lambda params, x: jax.lax.map(rule, dense(params, x))  # noqa: E731
    return masked(predict)(params, batch)


@jax.custom_vjp
def doubled(x):
    return 2 * x


doubled.defvjp(lambda x: (2 * x, None), lambda _, g: (2 * g,))


def held(*arrays):
    return jax.lax.optimization_barrier(arrays)


def behind_a_barrier(params, batch):
    return masked(dense)(held(params)[0], batch)


def behind_a_barrier_in_a_loop(params, batch):
    def layer(x, w):
        x, w = held(x, w)
        return jnp.tanh(x @ w), None

    return jnp.mean(jax.lax.scan(layer, batch["x"], params)[0] ** 2)


def scanned_and_closed_over(params, batch):
    def layer(x, w):
        return jnp.tanh(x @ w + x @ params[0]), None

    return jnp.mean(jax.lax.scan(layer, batch["x"], params)[0] ** 2)


def filled(params, batch):
    """Some indices are out of bounds, at either end."""
    ids = jnp.round(20 * batch["x"][:, 0]).astype(jnp.int32)
    rows = params.at[ids].get(mode="fill", fill_value=0.0)
    return jnp.mean((rows + 1) ** 2)


def small(params, batch):
    return count(params, batch).astype(jnp.float32) * 1e-3


def clipped_backwards(params, batch):
    def same(_, x):
        return x

    def clip(_, cotangent):
        return jnp.clip(cotangent, -0.01, 0.01)

    x = jax.custom_derivatives.linear_call(same, clip, (), batch["x"] @ params["w"])
    return jnp.mean(x**2)


def solved_to_a_tolerance(params, batch):
    def around(v):
        return v + 0.1 * params["w"] @ (params["w"].T @ v)

    cg = jax.scipy.sparse.linalg.cg
    return jnp.mean(cg(around, batch["x"].mean(0), tol=0, atol=1e-2)[0] ** 2)


def through_few_exponents(params, batch):
    x = jax.lax.reduce_precision(batch["x"] @ params["w"], 5, 10)
    return jnp.sum(x**2)


class Case(NamedTuple):
    reason: str
    fun: Any = masked(dense)
    params: Any = MODELS[dense]
    options: Any = {}  # noqa: RUF012
    tolerance: float = 1e-5


bfloat16_bias = MODELS[dense] | {"rest": (normal(2).astype(jnp.bfloat16), None)}
CASES = {
    "skip": Case("`skip` reads", options={"skip": oa.skip_not_finite}),
    "noise scale": Case("`noise_scale` reads", options={"noise_scale": True}),
    "holomorphic": Case(
        "`holomorphic`",
        complex_loss,
        MODELS[complex_parameters],
        {"holomorphic": True},
    ),
    "integer": Case(
        "not floating",
        with_integer,
        {"own": MODELS[dense], "n": jnp.int32(2)},
        {"allow_int": True},
    ),
    "overwritten": Case(
        "overwritten",
        with_state,
        {"own": MODELS[dense], "_overwrite_with_gradient": jnp.float32(1)},
    ),
    "overwrite": Case(
        "overwritten",
        with_state,
        {"own": MODELS[dense], "_overwrite_with_gradient": jnp.float32(1)},
        {"overwrite": {"_overwrite_with_gradient": "last"}.get},
    ),
    "barrier": Case("JAX cannot add", behind_a_barrier),
    "barrier in a loop": Case(
        "JAX cannot add", behind_a_barrier_in_a_loop, normal(2, 3, 3)
    ),
    "scanned and closed over": Case(
        "JAX cannot add", scanned_and_closed_over, normal(2, 3, 3)
    ),
    "fill_value": Case("a gather with a `fill_value`", filled, normal(7, 4)),
    "bfloat16 leaf": Case(
        "is bfloat16[2], and its sum float32[2]", widened, bfloat16_bias, {}, 1e-2
    ),
    "bfloat16 sum": Case(
        "is float32[2], and its sum bfloat16[2]",
        options={"accumulator_dtype": jnp.bfloat16},
        tolerance=2e-2,
    ),
    "float16 leaf": Case(
        "is float16[2], and its sum float32[2]",
        widened,
        jax.tree.map(lambda p: p.astype(jnp.float16), MODELS[dense]),
        {"weight": large},
        2e-3,
    ),
}

LIKE_OTHERS = ("overwrite", "barrier")


@pytest.mark.parametrize(
    "name", [slow(name) if name in LIKE_OTHERS else name for name in CASES]
)
def test_gradients_that_cannot_be_added_in_place_are_added_after(name):
    reason, fun, params, options, tolerance = CASES[name]
    batch = make_batch() | {"valid": jnp.ones(B, bool)}
    f = jax.jit(in_parts(fun, in_place=None, **options))
    got = f(params, batch)
    if "noise_scale" in options:
        got, _ = got
    jaxs = {k: options[k] for k in ("holomorphic", "allow_int") if k in options}
    wanted = whole(fun, **jaxs)(params, batch)
    chex.assert_trees_all_equal_dtypes(got, wanted)
    for x, y in zip(*map(jax.tree.leaves, (got, wanted)), strict=True):
        if x.dtype != jax.dtypes.float0:
            close(*(jnp.asarray(z).astype(jnp.complex64) for z in (x, y)), tolerance)
    if not ADDS_IN_PLACE:
        reason = ""  # or that JAX is too old
    with refused("`in_place=True` is not possible here: ", reason):
        jax.jit(in_parts(fun, in_place=True, **options))(params, batch)


WEIGHTED = {
    "bfloat16 loss": (narrow_loss(jnp.bfloat16), {"weight": count}, 1e-2),
    "float16 loss": (narrow_loss(jnp.float16), RAGGED, 2e-3),
    "float16 inside": (through(jnp.float16), {"weight": large}, 2e-3),
    "float8 inside": (through(jnp.float8_e4m3fn), {"weight": large}, 0.1),
    "custom_vjp": (with_own_rule, {"weight": count}, 1e-5),
    "custom_vjp, ragged": (with_own_rule, RAGGED, 1e-5),
}


BY_HAND = {
    "linear_call": (clipped_backwards, large),
    "a solver": (solved_to_a_tolerance, small),
    "reduce_precision": (through_few_exponents, large),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_a_backward_pass_that_does_not_grow_with_the_weight_sees_none(name):
    fun, weight = BY_HAND[name]
    params, batch = MODELS[dense], make_batch() | {"valid": jnp.ones(B, bool)}
    got, wanted = (
        jax.jit(in_parts(fun, in_place=in_place, weight=weight))(params, batch)
        for in_place in (IN_PLACE, False)
    )
    close(got, wanted)


@pytest.mark.parametrize(
    "name",
    [
        slow(name) if name in ("float16 loss", "custom_vjp") else name
        for name in WEIGHTED
    ],
)
def test_a_weight_that_the_backward_pass_may_not_take_comes_after_it(name):
    fun, options, tolerance = WEIGHTED[name]
    params, batch = MODELS[dense], make_batch() | {"valid": jnp.ones(B, bool)}
    in_place = ADDS_IN_PLACE or None
    got = jax.jit(in_parts(fun, in_place=in_place, **options))(params, batch)
    close(got, whole(fun)(params, batch), tolerance)
    after = jax.jit(in_parts(fun, in_place=False, **options))(params, batch)
    close(got, after, min(tolerance, 1e-4))


def check_refused(reason, run, wanted):
    """``run(in_place)`` is refused with True, and right with the others."""
    for in_place in (None, False):
        close(run(in_place), wanted)
    reason = reason if ADDS_IN_PLACE else "is older than 0.11"
    with refused("`in_place=True` is not possible here: ", reason):
        run(True)


def test_a_loss_with_a_ref_adds_gradients_after():
    params, batch = MODELS[dense], make_batch()

    def run(in_place):
        @jax.jit
        def jitted(params):
            calls = jax.new_ref(jnp.int32(0))

            def fun(params, batch):
                calls[...] += 1
                return masked(dense)(params, batch)

            f = in_parts(fun, in_place=in_place, weight=count)
            return f(params, batch), calls[...]

        result, calls = jitted(params)
        assert calls == K
        return result

    wanted = whole(masked(dense))(params, batch)
    check_refused("the function has a `jax.Ref`", run, wanted)


def test_a_loss_that_names_an_axis_of_vmap_adds_gradients_after():
    params = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), MODELS[dense])
    batch = make_batch()

    def predict(params, x):
        return jax.lax.pmean(dense(params, x), "models")

    def mapped(f):
        axes = {"in_axes": (0, None), "axis_name": "models"}
        return jax.jit(jax.vmap(f, **axes))(params, batch)

    def run(in_place):
        return mapped(in_parts(masked(predict), in_place=in_place, weight=count))

    wanted = mapped(jax.value_and_grad(masked(predict)))
    check_refused("the function names an axis of `jax.vmap`", run, wanted)


def test_without_jit_anywhere_gradients_are_added_after():
    def fun(w, x):
        return jnp.mean(jnp.sin(w * x))

    def run(in_place):
        with jax.disable_jit():
            f = oa.value_and_grad(fun, num_microbatches=2, in_place=in_place)
            return f(*args)

    args = jnp.float32(2), normal(4)
    check_refused("`jax.disable_jit` is on", run, whole(fun)(*args))


@pytest.mark.several_devices
def test_gradients_that_are_unreduced_are_added_after():
    mesh = devices.mesh(AxisType.Explicit)
    w, x = normal(3, 2), normal(4 * COUNT, 3)

    def loss(w, x):
        return jnp.mean(jnp.tanh(x @ w) ** 2)

    def run(in_place):
        def reduced(w, x):
            w = jax.reshard(w, P(reduced={AXIS}))
            value, grads = in_parts(loss, in_place=in_place)(w, x)
            return value, jax.reshard(grads, P())

        with jax.set_mesh(mesh):
            placed = jax.device_put(x, NamedSharding(mesh, P(AXIS)))
            return jax.device_get(jax.jit(reduced)(w, placed))

    wanted = jax.device_get(whole(loss)(w, x))
    check_refused("a parameter is tagged `reduced`", run, wanted)


# --- Micro-batches of weight 0 ---


def with_aux(params, batch):
    return masked(dense)(params, batch), batch["valid"].sum()


def from_aux(params, batch, aux):
    del params, batch
    return aux


def summed(policy):
    return {"fun": with_aux, "has_aux": True, "aux": policy}


NOTHING_RUNS = {
    "weights": {},
    "sum of outputs": summed("sum"),
    "old way": {"in_place": False},
    "ragged": RAGGED,
    "number": {"num_real_microbatches": 3},
}
ALL_RUN = {
    "no weights": {"weight": None},
    "last output": summed("last"),
    "weights from outputs": summed("sum") | {"weight": from_aux},
    "ratio": {"reduction": "ratio"},
    "sum": {"reduction": "sum"},
    "skip": {"skip": oa.skip_not_finite, "in_place": None},
}


def places_of_products(f, *args):
    """Where there are products of matrices, and so the loss and its gradient."""
    program = jax.jit(f).lower(*args).compile()
    return [o.place for o in hlo.placed(program) if o.name == "dot"]


@pytest.mark.parametrize("name", NOTHING_RUNS | ALL_RUN)
def test_a_micro_batch_of_weight_0_does_not_run(name):
    """Unless something else is asked of it."""
    options = {"fun": masked(dense), "weight": count}
    options |= (NOTHING_RUNS | ALL_RUN)[name]
    places = places_of_products(in_parts(**options), MODELS[dense], make_batch())
    assert len(places) > 1
    assert all("branch" in place for place in places) == (name in NOTHING_RUNS)


def test_under_vmap_a_micro_batch_runs_if_one_of_them_has_weight():
    f = jax.vmap(in_parts(masked(dense), weight=count), (None, 0))
    batch = jax.tree.map(lambda x: jnp.stack([x, x]), make_batch())
    places = places_of_products(f, MODELS[dense], batch)
    assert all("branch" in place for place in places)


@pytest.mark.several_devices
@devices.parametrized(["checked", "auto"], usual=["checked"])
@pytest.mark.parametrize("fun", [device_loss, exchanges_forwards])
def test_a_device_leaves_a_micro_batch_out_unless_it_exchanges(fun, way):
    f = devices.in_step(way, fun, num_microbatches=2, weight=count)
    places = places_of_products(f, SHARED, SHARDED)
    assert all("branch" in place for place in places) == (fun is device_loss)


@pytest.mark.parametrize("is_mapped", [False, True])
def test_what_does_not_run_changes_nothing(is_mapped):
    """Not the carry, and it may be NaN."""
    calls = []

    def fun(params, batch, carry):
        jax.debug.callback(lambda: calls.append(0))
        return masked(dense)(params, batch), carry + batch["x"].sum()

    f = in_parts(fun, weight=lambda p, b, _: count(p, b), carry_argnum=2)
    if is_mapped:
        f = jax.vmap(f, (None, 0, None))
    params, (batch, clean) = MODELS[dense], poisoned(make_batch(), EQUAL)
    nothing = batch | {"x": batch["x"] * jnp.nan, "valid": jnp.zeros(B, bool)}

    def run(batch):
        calls.clear()
        given = jax.tree.map(lambda x: x[None], batch) if is_mapped else batch
        got = jax.block_until_ready(jax.jit(f)(params, given, jnp.float32(2)))
        jax.effects_barrier()
        return jax.tree.map(lambda x: x[0], got) if is_mapped else got

    (value, carry), grads = run(batch)
    assert len(calls) == K - 1
    close((value, grads), whole(masked(dense))(params, clean))
    kept = clean["x"].at[1::K].set(0)
    np.testing.assert_allclose(carry, 2 + kept.sum(), rtol=1e-5)

    zeros = jax.tree.map(jnp.zeros_like, params)
    close(run(nothing), ((jnp.float32(0), jnp.float32(2)), zeros), 0)
    assert calls == []


# --- The compiled program ---

DEPTH, WIDTH, WORDS, LENGTH = 16, 64, 32, 16


def language_model(params, batch):
    """Scanned, rematerialised layers, in bfloat16, of float32 parameters."""
    tokens = batch["tokens"]

    @jax.checkpoint
    def layer(h, w):
        w = jax.tree.map(lambda p: p.astype(jnp.bfloat16), w)
        h = h + jnp.tanh(h @ w["up"]) @ w["down"]
        return h, None

    h = params["embedding"][tokens].astype(jnp.bfloat16)
    h, _ = jax.lax.scan(layer, h, params["layers"])
    logits = h.astype(jnp.float32) @ params["embedding"].T
    own = jnp.take_along_axis(logits, tokens[..., None], -1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, -1) - own)


def shape(*dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype)


SHAPES = {
    "embedding": shape(WORDS, WIDTH),
    "layers": {
        "up": shape(DEPTH, WIDTH, 4 * WIDTH),
        "down": shape(DEPTH, 4 * WIDTH, WIDTH),
    },
}


def tokens(count):
    return {
        "tokens": shape(count, LENGTH, dtype=jnp.int32),
        "weight": shape(count),
    }


def of_the_batch(params, batch):
    del params
    return batch["weight"].sum()


def compiled(f, batch):
    return hlo.compiled(f, SHAPES, batch, donate=())


@functools.cache
def alone():
    """The temporaries of one micro-batch, as a share of the parameters."""
    return share(compiled(jax.value_and_grad(language_model), tokens(1)))


def share(program):
    return hlo.temporaries(program) / hlo.nbytes(SHAPES)


def with_weight(params, batch):
    return language_model(params, batch), batch["weight"].sum()


@needs_in_place
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reduction": "ratio"},
        {"weight": of_the_batch},
        {"fun": with_weight, "has_aux": True, "weight": from_aux, "aux": "sum"},
    ],
    ids=["plain", "ratio", "weights", "weights from aux"],
)
def test_no_gradient_of_a_micro_batch_is_held(options):
    f = oa.value_and_grad(**{"fun": language_model, "num_microbatches": K} | options)
    program = compiled(f, tokens(K))
    assert share(program) < alone() + 0.1
    assert hlo.large_copies(program, 4 * DEPTH * WIDTH**2) == []


@needs_in_place
def test_a_gradient_that_is_held_costs_as_much_as_the_parameters():
    """The instrument sees what is avoided."""
    f = oa.value_and_grad(language_model, num_microbatches=K, in_place=False)
    assert share(compiled(f, tokens(K))) > alone() + 0.8


@needs_in_place
@pytest.mark.several_devices
def test_devices_hold_no_gradient_either_and_exchange_once():
    f = devices.in_step("auto", language_model, num_microbatches=K, weight=of_the_batch)
    program = optimized(f.lower(SHAPES, tokens(K * COUNT)))
    assert hlo.exchanges(program) == {"all-reduce, entry": 1}
    # The all-reduce has the sum beside its result; the loop needs no more than that.
    assert share(program) < 1.02
