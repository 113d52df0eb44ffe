"""Every layer and every transformation of Flax NNX under `oaf.value_and_grad`."""

import inspect
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import optax_accum as oa
import optax_accum.flax as oaf
from tests.support.training import slow

pytestmark = pytest.mark.core

K, EXAMPLES, LENGTH, WIDTH = 4, 8, 3, 4
X = jnp.asarray(
    np.random.default_rng(0).normal(size=(EXAMPLES, LENGTH, WIDTH)), jnp.float32
)
ROWS = X[:, 0]
IMAGES = jnp.stack([X] * 3, axis=2)
RoPE: Any = getattr(nnx, "RoPE", None)  # newer than the oldest Flax
WORDS = jnp.arange(EXAMPLES * LENGTH).reshape(EXAMPLES, LENGTH) % 5


@pytest.fixture(autouse=True)
def _promotion(loose_promotion):
    """NNX's layers add biases of lower rank."""


def step_of_cell(cell, x):
    """One step of a recurrent cell, from its first carry."""
    carry = cell.initialize_carry(x.shape, rngs=nnx.Rngs(0))
    return cell(carry, x)[1]


def cell(kind):
    return lambda rngs: kind(WIDTH, WIDTH, rngs=rngs), ROWS, step_of_cell


def call(layer, x):
    return layer(x)


# For each layer how to build it, its batch, and how it is called.
LAYERS = {
    "BatchNorm": (
        # By micro-batch it would normalise otherwise, as it must.
        lambda rngs: nnx.BatchNorm(WIDTH, use_running_average=True, rngs=rngs),
        X,
        call,
    ),
    "Bidirectional": (
        lambda rngs: nnx.Bidirectional(
            *[nnx.RNN(nnx.GRUCell(WIDTH, WIDTH, rngs=rngs)) for _ in range(2)]
        ),
        X,
        call,
    ),
    "Conv": (lambda rngs: nnx.Conv(WIDTH, 2, (2, 2), rngs=rngs), IMAGES, call),
    "ConvTranspose": (
        lambda rngs: nnx.ConvTranspose(WIDTH, 2, (2, 2), rngs=rngs),
        IMAGES,
        call,
    ),
    "Dropout": (
        lambda rngs: nnx.Sequential(
            nnx.Linear(WIDTH, 2, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)
        ),
        X,
        call,
    ),
    "Einsum": (
        lambda rngs: nnx.Einsum("...a,ab->...b", (WIDTH, 2), (2,), rngs=rngs),
        X,
        call,
    ),
    "Embed": (lambda rngs: nnx.Embed(5, WIDTH, rngs=rngs), WORDS, call),
    "GRUCell": cell(nnx.GRUCell),
    "GroupNorm": (lambda rngs: nnx.GroupNorm(WIDTH, 2, rngs=rngs), X, call),
    "InstanceNorm": (lambda rngs: nnx.InstanceNorm(WIDTH, rngs=rngs), X, call),
    "LSTMCell": cell(nnx.LSTMCell),
    "LayerNorm": (lambda rngs: nnx.LayerNorm(WIDTH, rngs=rngs), X, call),
    "Linear": (lambda rngs: nnx.Linear(WIDTH, 2, rngs=rngs), X, call),
    "LinearGeneral": (
        lambda rngs: nnx.LinearGeneral((LENGTH, WIDTH), 2, axis=(-2, -1), rngs=rngs),
        X,
        call,
    ),
    "LoRA": (lambda rngs: nnx.LoRA(WIDTH, 2, WIDTH, rngs=rngs), X, call),
    "LoRALinear": (
        lambda rngs: nnx.LoRALinear(WIDTH, 2, lora_rank=2, rngs=rngs),
        X,
        call,
    ),
    "MultiHeadAttention": (
        lambda rngs: nnx.MultiHeadAttention(2, WIDTH, decode=False, rngs=rngs),
        X,
        call,
    ),
    "OptimizedLSTMCell": cell(nnx.OptimizedLSTMCell),
    "PReLU": (lambda rngs: nnx.PReLU(), X, call),  # noqa: ARG005
    "RMSNorm": (lambda rngs: nnx.RMSNorm(WIDTH, rngs=rngs), X, call),
    "RNN": (
        lambda rngs: nnx.RNN(nnx.LSTMCell(WIDTH, WIDTH, rngs=rngs)),
        X,
        call,
    ),
    "RoPE": (
        lambda rngs: nnx.Sequential(
            nnx.Linear(WIDTH, WIDTH, rngs=rngs),
            RoPE(),
        ),
        X,
        call,
    ),
    "Sequential": (
        lambda rngs: nnx.Sequential(
            nnx.Linear(WIDTH, WIDTH, rngs=rngs), jnp.tanh, nnx.PReLU()
        ),
        X,
        call,
    ),
    "SimpleCell": cell(nnx.SimpleCell),
    "SpectralNorm": (
        lambda rngs: nnx.SpectralNorm(
            nnx.Linear(WIDTH, 2, rngs=rngs), update_stats=False, rngs=rngs
        ),
        X,
        call,
    ),
    "WeightNorm": (
        lambda rngs: nnx.WeightNorm(nnx.Linear(WIDTH, 2, rngs=rngs), rngs=rngs),
        X,
        call,
    ),
}
NO_LAYERS = {
    "Dict",
    "EMA",
    "List",
    "Metric",
    "ModelAndOptimizer",
    "Module",
    "MultiMetric",
    "Object",
    "Optimizer",
    "Pytree",
    "RNNCellBase",
    "RngStream",
    "Rngs",
}
# What draws anew for every micro-batch, so that there is nothing to compare with.
RANDOM = {"Dropout"}
# What writes to its parameters, from these and its state alone.
WRITING = {"SpectralNorm", "WeightNorm"}
USUAL = {"Conv", "Embed", "MultiHeadAttention", "RNN", "WeightNorm"}


def named(table):
    return [name if name in USUAL else slow(name) for name in table]


def test_every_layer_is_known():
    exported = {
        name
        for name, value in inspect.getmembers(nnx, inspect.isclass)
        if issubclass(value, nnx.Pytree)
    }
    assert exported - NO_LAYERS <= set(LAYERS)


def skip_without(name):
    if not hasattr(nnx, name):
        pytest.skip(f"this Flax has no nnx.{name} yet")


def same(tree, other):
    chex.assert_trees_all_close(
        nnx.as_pure(tree), nnx.as_pure(other), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", named(LAYERS))
def test_a_layer_trains_as_on_the_whole_batch(name):
    skip_without(name)
    build, x, apply = LAYERS[name]

    def loss(layer, x):
        return jnp.mean((apply(layer, x) - 1) ** 2)

    layer, whole = build(nnx.Rngs(0)), build(nnx.Rngs(0))
    before = jax.tree.leaves(nnx.as_pure(nnx.state(layer, nnx.Param)))
    value, grads = oaf.value_and_grad(loss, num_microbatches=K)(layer, x)
    expected, expected_grads = nnx.jit(nnx.value_and_grad(loss))(whole, x)
    chex.assert_trees_all_equal_structs(grads, expected_grads)
    assert jax.tree.leaves(grads)
    if name not in RANDOM:
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        same(grads, expected_grads)
    same(nnx.state(layer, nnx.Param), nnx.state(whole, nnx.Param))
    if name not in WRITING:
        after = jax.tree.leaves(nnx.as_pure(nnx.state(layer, nnx.Param)))
        assert all(x is y for x, y in zip(before, after, strict=True))


# --- Layers that write to their parameters ---


def loss_fn(model, x):
    return jnp.mean((model(x) - 1) ** 2)


def test_spectral_norm_starts_from_the_same_parameters_in_every_micro_batch():
    """Its estimate of the norm is state, which goes on from one to the next."""

    def build():
        rngs = nnx.Rngs(0)
        return nnx.SpectralNorm(nnx.Linear(WIDTH, 2, rngs=rngs), rngs=rngs)

    layer, by_hand = build(), build()
    params = nnx.as_pure(nnx.state(by_hand, nnx.Param))
    results = []
    for i in range(K):
        nnx.update(by_hand, params)
        results.append(nnx.value_and_grad(loss_fn)(by_hand, X[i::K]))
    value, grads = nnx.jit(oaf.value_and_grad(loss_fn, num_microbatches=K))(layer, X)
    np.testing.assert_allclose(value, np.mean([v for v, _ in results]), rtol=1e-5)
    same(grads, jax.tree.map(lambda *g: sum(g) / K, *(g for _, g in results)))
    same(nnx.state(layer), nnx.state(by_hand))


def test_micro_batches_without_weight_write_no_parameters():
    layer = LAYERS["WeightNorm"][0](nnx.Rngs(0))
    before = np.asarray(layer.layer_instance.kernel[...])
    for weight, is_written in ((jnp.zeros([]), False), (jnp.ones([]), True)):
        in_parts = oaf.value_and_grad(
            loss_fn,
            num_microbatches=K,
            weight=lambda _, x: weight * x.shape[0],  # noqa: B023
        )
        in_parts(layer, X)
        after = np.asarray(layer.layer_instance.kernel[...])
        assert np.array_equal(before, after) != is_written


@pytest.mark.several_devices
@pytest.mark.parametrize("way", ["mesh", slow("shard_map")])
def test_what_devices_write_to_parameters_is_what_one_writes(way):
    count = jax.device_count()
    mesh = jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,))
    x = jnp.concatenate([X] * count)
    layer, whole = (LAYERS["WeightNorm"][0](nnx.Rngs(0)) for _ in range(2))
    options = {"num_microbatches": 2, "axis_name": "data"}
    if way == "mesh":
        in_parts = oaf.value_and_grad(loss_fn, mesh=mesh, **options)
    else:
        in_parts = nnx.shard_map(
            oaf.value_and_grad(loss_fn, **options),
            mesh=mesh,
            in_specs=(P(), P("data")),
            out_specs=P(),
        )
    _, grads = nnx.jit(in_parts)(layer, x)
    same(grads, nnx.grad(loss_fn)(whole, x))
    same(nnx.state(layer), nnx.state(whole))


# --- Transformations inside of a module ---


class Layer(nnx.Module):
    """A layer with something beside its parameters."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.factor = nnx.Variable(jnp.full(WIDTH, 0.5))

    def __call__(self, x):
        return jnp.tanh(self.linear(x)) * self.factor[...]


class Stack(nnx.Module):
    """Three layers in one."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def layers(rngs):
            return Layer(rngs)

        self.layers = layers(rngs)


def through_scan(stack, x):
    def body(x, layer):
        return layer(x)

    return nnx.scan(body, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, stack.layers)


def through_rematerialised_scan(stack, x):
    @nnx.remat
    def body(x, layer):
        return layer(x)

    return nnx.scan(body, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, stack.layers)


def through_vmap(stack, x):
    return nnx.vmap(call, in_axes=(0, None), out_axes=0)(stack.layers, x).mean(0)


def through_broadcasting_vmap(layer, x):
    return nnx.vmap(call, in_axes=(None, 0), out_axes=0)(layer, x)


def through_cond(layer, x):
    def half(layer, x):
        return 0.5 * layer(x)

    return nnx.cond(layer.factor[0] > 0, call, half, layer, x)


def through_switch(layer, x):
    return nnx.switch(jnp.int32(1), [call, call], layer, x)


def through_fori_loop(layer, x):
    def body(i, carry):
        del i
        layer, x = carry
        return layer, layer(x)

    return nnx.fori_loop(0, 3, body, (layer, x))[1]


def through_while_loop(layer, x):
    """In a loop without a derivative."""

    def body(carry):
        layer, x, count = carry
        return layer, layer(x), count + 1

    start = layer, x, 0
    fixed = nnx.while_loop(lambda carry: carry[2] < 3, body, start)[1]
    return layer(x) + jax.lax.stop_gradient(fixed)


def through_grad(layer, x):
    """With a penalty on the gradient of the inputs."""

    def total(layer, x):
        return jnp.sum(layer(x))

    return layer(x) + nnx.grad(total, argnums=1)(layer, x)


def through_value_and_grad(layer, x):
    def total(layer):
        return jnp.sum(layer(jnp.ones((1, WIDTH))))

    value, grads = nnx.value_and_grad(total)(layer)
    return layer(x) + value + grads["linear"]["bias"][...]


def through_custom_vjp(layer, x):
    @nnx.custom_vjp
    def scaled(layer, x):
        return layer(x)

    def forward(layer, x):
        return scaled(layer, x), (layer, x)

    def backward(residuals, cotangents):
        _, y = cotangents
        layer, x = residuals

        def pulled(layer, x):
            return jnp.sum(layer(x) * y)

        everything = nnx.DiffState(0, ...)
        return nnx.grad(pulled, argnums=(everything, 1))(layer, x)

    scaled.defvjp(forward, backward)
    return scaled(layer, x)


def through_jvp(layer, x):
    at_rest = jax.tree.map(jnp.zeros_like, layer)
    result = nnx.jvp(call, (layer, x), (at_rest, x), graph=False)
    return result[0] + result[1]


def through_vjp(layer, x):
    result = nnx.vjp(call, layer, x, graph=False)
    return result[0] + result[1](jnp.ones_like(x))[1]


def through_shard_map(layer, x):
    mesh = jax.make_mesh((1,), ("one",), axis_types=(AxisType.Auto,))
    return nnx.shard_map(call, mesh=mesh, in_specs=(P(), P("one")), out_specs=P("one"))(
        layer, x
    )


def through_jit_partial(layer, x):
    return nnx.jit_partial(call, layer, graph=False)(x)


def through_checkify(layer, x):
    return nnx.checkify(call)(layer, x)[1]


# For each transformation a module, and how it is called.
TRANSFORMED: dict[str, Any] = {
    "checkify": (Layer, through_checkify),
    "cond": (Layer, through_cond),
    "custom_vjp": (Layer, through_custom_vjp),
    "fori_loop": (Layer, through_fori_loop),
    "grad": (Layer, through_grad),
    "jit": (Layer, nnx.jit(call)),
    "jit_partial": (Layer, through_jit_partial),
    "jvp": (Layer, through_jvp),
    "remat": (Layer, nnx.remat(call)),
    "scan": (Stack, through_scan),
    "scan, remat": (Stack, through_rematerialised_scan),
    "shard_map": (Layer, through_shard_map),
    "switch": (Layer, through_switch),
    "value_and_grad": (Layer, through_value_and_grad),
    "vjp": (Layer, through_vjp),
    "vmap": (Stack, through_vmap),
    "vmap, broadcast": (Layer, through_broadcasting_vmap),
    "while_loop": (Layer, through_while_loop),
}
NO_TRANSFORMATIONS = {
    "Carry",
    "DiffState",
    "StateAxes",
    "StateSharding",
    "eval_shape",
    "make_jaxpr",
    "pmap",  # goes around a step, and not into a module
    "transform_metadata",
}
USUAL |= {"jit", "remat", "scan, remat", "cond"}


def test_every_transformation_is_known():
    exported = {
        name
        for name, value in inspect.getmembers(nnx, callable)
        if getattr(value, "__module__", "").startswith("flax.nnx.transforms")
    }
    assert exported - NO_TRANSFORMATIONS <= set(map(transformation, TRANSFORMED))


def transformation(name):
    return name.partition(",")[0]


@pytest.mark.parametrize("name", named(TRANSFORMED))
def test_a_transformation_in_a_module_writes_nothing(name):
    """Every variable holds a new tracer after it, and is still the same array."""
    skip_without(transformation(name))
    build, apply = TRANSFORMED[name]

    def loss(model, x):
        return jnp.mean((apply(model, x) - 1) ** 2)

    model = build(nnx.Rngs(0))
    before = jax.tree.leaves(nnx.as_pure(nnx.state(model)))
    expected, expected_grads = nnx.jit(nnx.value_and_grad(loss))(model, ROWS)
    nnx.update(model, jax.tree.unflatten(jax.tree.structure(nnx.state(model)), before))
    value, grads = oaf.value_and_grad(loss, num_microbatches=K)(model, ROWS)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    same(grads, expected_grads)
    after = jax.tree.leaves(nnx.as_pure(nnx.state(model)))
    assert all(x is y for x, y in zip(before, after, strict=True))


# --- Pullbacks in place of gradients ---


PULLED = {"Embed", "WeightNorm", "cond", "scan, remat"}


@pytest.mark.parametrize(
    "name", [n if n in PULLED else slow(n) for n in LAYERS | TRANSFORMED]
)
def test_a_pullback_adds_the_gradient_to_the_window(name):
    """And leaves in the module what `nnx.value_and_grad` leaves there."""
    skip_without(transformation(name))
    if name in LAYERS:
        build, x, apply = LAYERS[name]
    else:
        (build, apply), x = TRANSFORMED[name], ROWS

    def loss(model, x):
        return jnp.mean((apply(model, x) - 1) ** 2)

    @nnx.jit
    def step(model, optimizer, x):
        value, pullback = oaf.value_and_pullback(loss)(model, x)
        optimizer.update(model, pullback, weight=2.0)
        return value

    model, other = build(nnx.Rngs(0)), build(nnx.Rngs(0))
    tx = oa.accumulate(optax.sgd(0.1), 2)
    optimizer = oaf.Optimizer(model, tx, wrt=nnx.Param)
    value = step(model, optimizer, x)
    expected, grads = nnx.jit(nnx.value_and_grad(loss))(other, x)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    same(oa.accumulated(optimizer), grads)
    for kept in (nnx.Param, nnx.Not((nnx.Param, nnx.RngKey))):
        same(nnx.state(model, kept), nnx.state(other, kept))
