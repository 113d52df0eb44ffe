"""`batch_axis`: an axis for each argument and leaf, and ``None`` for what is shared."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import optax_accum as oa
import optax_accum.flax as oaf
from tests.support import devices
from tests.support.errors import refused
from tests.support.training import slow

B = 8
RANDOM = np.random.default_rng(0)
W = RANDOM.normal(size=(3, 5)).astype(np.float32)
X = RANDOM.normal(size=(4, B, 3)).astype(np.float32)
Y = RANDOM.normal(size=(B, 5)).astype(np.float32)


def loss(w, x, y):
    """Of inputs ``[T, B, D]`` and targets ``[B, C]``."""
    return jnp.mean((jnp.tanh(x.mean(0) @ w) - y) ** 2)


def rotary(w, batch):
    """As `loss`, with positions ``[3, B]`` and a scalar in the batch's dict."""
    turned = jnp.cos(batch["positions"].sum(0))[:, None] * batch["y"]
    return batch["scale"] * loss(w, batch["x"], turned)


BATCH = {"x": X, "y": Y, "positions": RANDOM.normal(size=(3, B)), "scale": 2.0}
AXES = {"x": 1, "y": 0, "positions": -1, "scale": None}


def same(got, wanted):
    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)

    jax.tree.map(close, jax.device_get(got), jax.device_get(wanted))


sizes = pytest.mark.parametrize(
    "size", [{"num_microbatches": 4}, {"microbatch_size": 3}], ids=["equal", "ragged"]
)


# --- What is right ---


@sizes
@pytest.mark.parametrize("axes", [(1, 0), slow([1, 0]), (-2, -2)])
def test_each_argument_may_have_an_axis_of_its_own(size, axes):
    f = oa.value_and_grad(loss, batch_argnums=(1, 2), batch_axis=axes, **size)
    same(jax.jit(f)(W, X, Y), jax.value_and_grad(loss)(W, X, Y))


def test_entries_are_those_of_positions_and_then_those_of_names():
    wanted = jax.value_and_grad(loss)(W, X, Y)
    make = functools.partial(oa.value_and_grad, loss, num_microbatches=4)
    same(make(batch_argnums=(2, 1), batch_axis=(0, 1))(W, X, Y), wanted)
    same(make(batch_argnames="y", batch_axis=(1, 0))(W, X, y=Y), wanted)
    named = make(batch_argnums=(), batch_argnames=("y", "x"), batch_axis=(0, 1))
    same(named(W, x=X, y=Y), wanted)
    same(named(W, y=Y, x=X), wanted)


@sizes
def test_each_leaf_may_have_an_axis_of_its_own_or_none(size):
    f = oa.value_and_grad(rotary, batch_axis=(AXES,), **size)
    same(jax.jit(f)(W, BATCH), jax.value_and_grad(rotary)(W, BATCH))


def test_an_entry_is_a_prefix_of_its_argument():
    def fun(w, batch, extra):
        x, y = batch["pair"]
        return loss(w, x.swapaxes(0, 1), y * batch["shared"]["scale"] + extra)

    shared = {"scale": np.float32(3), "nothing": None}
    batch = {"pair": (X.swapaxes(0, 1), Y), "shared": shared}
    axes = {"pair": 0, "shared": None}
    f = oa.value_and_grad(
        fun, num_microbatches=2, batch_argnums=(1, 2), batch_axis=(axes, 0)
    )
    same(f(W, batch, Y), jax.value_and_grad(fun)(W, batch, Y))


def test_what_has_none_reaches_the_function_as_it_is():
    """Static where it was static: a number that makes a shape, a string."""

    def fun(w, batch):
        assert batch["kind"] == "tanh"
        assert isinstance(batch["classes"], int)
        assert batch["table"].shape == (B, 5)
        return loss(w, batch["x"], jnp.zeros((1, batch["classes"])))

    batch = {"x": X, "kind": "tanh", "classes": 5, "table": jnp.ones((B, 5))}
    axes = {"x": 1, "kind": None, "classes": None, "table": None}
    f = oa.value_and_grad(fun, num_microbatches=4, batch_axis=(axes,))
    same(f(W, batch), jax.value_and_grad(fun)(W, batch))


def test_the_weight_sees_what_the_loss_sees():
    """A mean over what a mask ``[T, B]`` counts, of classes that a table weighs."""

    def count(w, batch):
        del w
        assert batch["table"].shape == (5,)
        return batch["mask"].sum()

    def fun(w, batch):
        errors = (jnp.tanh(batch["x"] @ w) ** 2) @ batch["table"]
        count = jnp.maximum(batch["mask"].sum(), 1).astype(errors.dtype)
        return jnp.where(batch["mask"], errors, 0).sum() / count

    batch = {"x": X, "mask": RANDOM.random((4, B)) < 0.4, "table": jnp.arange(5.0)}
    axes = {"x": 1, "mask": 1, "table": None}
    f = oa.value_and_grad(fun, microbatch_size=3, batch_axis=(axes,), weight=count)
    same(f(W, batch), jax.value_and_grad(fun)(W, batch))


@sizes
def test_concat_keeps_the_order_of_the_batch_along_any_axis(size):
    def fun(w, x, y):
        return loss(w, x, y), {"x": x.swapaxes(0, 1), "y": y}

    f = oa.value_and_grad(
        fun,
        has_aux=True,
        aux="concat",
        batch_argnums=(1, 2),
        batch_axis=(1, 0),
        **size,
    )
    (_, aux), _ = jax.jit(f)(W, X, Y)
    np.testing.assert_array_equal(aux["x"], X.swapaxes(0, 1))
    np.testing.assert_array_equal(aux["y"], Y)


def test_axes_are_those_inside_of_vmap():
    """Of two models, each with a batch of its own, whose leaves come stacked anyhow."""
    models = np.stack([W, 2 * W])
    batch = {
        "x": np.stack([X, X[::-1]], -1),
        "y": np.stack([Y, -Y], 1),
        "positions": BATCH["positions"],
        "scale": np.arange(1.0, 3.0, dtype=np.float32),
    }
    in_axes = 0, {"x": -1, "y": 1, "positions": None, "scale": 0}
    f = oa.value_and_grad(rotary, num_microbatches=4, batch_axis=(AXES,))
    got = jax.jit(jax.vmap(f, in_axes))(models, batch)
    same(got, jax.vmap(jax.value_and_grad(rotary), in_axes)(models, batch))


@pytest.mark.several_devices
@devices.parametrized([*devices.OUTSIDE], usual=("auto", "explicit"))
def test_axes_are_those_of_the_whole_batch_on_a_mesh(way):
    count = devices.COUNT
    x = np.tile(X, (1, count, 1))
    y = RANDOM.normal(size=(count * B, 5)).astype(np.float32)
    batch = BATCH | {"x": x, "y": y, "positions": np.ones((3, B * count), np.float32)}
    options = {"batch_axis": (AXES,), "num_microbatches": 4}
    wanted = jax.value_and_grad(rotary)(W, batch)
    same(devices.in_step(way, rotary, **options)(W, batch), wanted)
    ragged = {"batch_axis": (AXES,), "microbatch_size": 3 * count}
    same(devices.in_step(way, rotary, **ragged)(W, batch), wanted)


@pytest.mark.several_devices
def test_a_shared_leaf_that_is_sharded_over_the_axis_is_refused():
    mesh = devices.mesh(jax.sharding.AxisType.Explicit)
    table = jax.device_put(
        np.ones((devices.COUNT, 5), np.float32), NamedSharding(mesh, P("data"))
    )
    batch = BATCH | {"scale": table}
    f = oa.value_and_grad(
        rotary,
        num_microbatches=1,
        batch_axis=(AXES,),
        mesh=mesh,
        axis_name="data",
    )
    with refused("`batch['scale']` is sharded over `axis_name='data'`"):
        f(W, batch)


@pytest.mark.several_devices
def test_a_batch_on_an_explicit_mesh_is_checked_along_its_own_axis():
    mesh = devices.mesh(jax.sharding.AxisType.Explicit)
    size = devices.COUNT * 2
    x = jax.device_put(
        np.ones((4, size, 3), np.float32), NamedSharding(mesh, P(None, "data"))
    )
    f = oa.value_and_grad(
        loss, num_microbatches=4, batch_argnums=(1, 2), batch_axis=(1, 0)
    )
    with refused("`x` is sharded over", "along axis 1", "micro-batch of 4"):
        f(W, x, np.ones((size, 5), np.float32))


def test_a_module_may_have_an_axis_for_each_leaf():
    model = nnx.Linear(3, 5, rngs=nnx.Rngs(0))

    def fun(model, batch):
        return batch["scale"] * jnp.mean((model(batch["x"].mean(0)) - batch["y"]) ** 2)

    batch = {"x": X, "y": Y, "scale": 2.0}
    axes = {"x": 1, "y": 0, "scale": None}
    f = nnx.jit(oaf.value_and_grad(fun, num_microbatches=4, batch_axis=(axes,)))
    wanted = nnx.value_and_grad(fun)(model, batch)
    same(nnx.as_pure(f(model, batch)), nnx.as_pure(wanted))


@pytest.mark.parametrize("cause", [None, "dependence", slow("weights")])
def test_a_check_of_equivalence_follows_the_axes(cause):
    def fun(w, batch):
        x, mask = batch["x"], batch["mask"]
        if cause == "dependence":
            x = x - x.mean(1, keepdims=True)
        if cause != "weights":
            mask = jnp.ones_like(mask)
        errors = jnp.where(mask, ((jnp.tanh(x @ w) - 1) ** 2).sum(-1), 0)
        return batch["scale"] * errors.sum() / mask.sum().astype(errors.dtype)

    mask = np.tile(np.arange(B) % 4 != 1, (4, 1))
    batch = {"x": X, "mask": mask, "scale": 2.0}
    axes = {"x": 1, "mask": 1, "scale": None}
    report = oa.diagnose.check_equivalence(
        fun, jnp.asarray(W), batch, 2, batch_axis=(axes,)
    )
    assert bool(report) == (cause is None), str(report)
    assert getattr(report.cause, "name", None) == cause


# --- What is refused ---


def run(fun=rotary, args=(W, BATCH), **options):
    return oa.value_and_grad(fun, **{"num_microbatches": 4, **options})(*args)


@pytest.mark.parametrize(
    ("axis", "words"),
    [
        (1.0, ("`batch_axis` must be an int, or a tuple", "got 1.0")),
        (None, ("one entry per batch argument", "got None")),
        (True, ("got True",)),
        (AXES, ("got {'x': 1", "batch_axis=({...},)")),
        (("x",), ("must hold ints", "got 'x'")),
        ((0, 0), ("has 2 entries", "one per batch", "`batch_argnums=(1,)`")),
        (((0, 1), 1), ("has 2 entries", "batch_axis=((0, 1),)")),
        ((None,), ("leaves nothing to split",)),
        (({"x": None, "y": None},), ("leaves nothing to split",)),
        (
            (AXES | {"z": 0},),
            ("for `batch`, which is not a prefix of it", "'scale': *"),
        ),
        (([0, 0],), ("has [0, 0] for `batch`",)),
    ],
)
def test_a_batch_axis_that_does_not_fit_is_refused(axis, words):
    with refused(*words):
        run(batch_axis=axis)


def test_axes_of_an_argument_that_is_named_twice_are_refused():
    options = {"batch_argnums": (1, 2), "batch_argnames": "y"}
    with refused("both name `y`", "two entries", "pass batch_argnums=()"):
        run(loss, (W, X, Y), **options, batch_axis=(1, 0, 0))


def test_a_scalar_among_the_examples_is_refused_with_its_none():
    with refused(
        "`batch['scale']` is a scalar",
        "give it None: batch_axis=({",
        "'scale': None",
        "'x': 1",
    ):
        run(batch_axis=(AXES | {"scale": 0},))


def test_a_random_key_among_the_examples_is_refused_without_a_none():
    batch = BATCH | {"scale": jax.random.key(0)}
    with refused(
        "`batch['scale']` is a scalar", "random key in an argument of its own"
    ):
        run(args=(W, batch), batch_axis=(AXES | {"scale": 0},))


def test_an_axis_that_a_leaf_does_not_have_is_refused():
    with refused("`y` has shape (8, 5)", "`batch_axis=2`"):
        run(loss, (W, X, Y), batch_argnums=(1, 2), batch_axis=(1, 2))


def test_sizes_that_do_not_divide_are_refused_along_any_axis():
    with refused("`num_microbatches=3` does not divide", "`x` holds 8", "along axis 1"):
        run(
            loss, (W, X, Y), batch_argnums=(1, 2), batch_axis=(1, 0), num_microbatches=3
        )


def test_a_time_major_batch_is_refused_with_the_axes_that_fit():
    words = "`x` has 4, but `y` has 8", "All have 8 entries along some axis"
    with refused(*words, "batch_axis=(1, 0)"):
        run(loss, (W, X, Y), batch_argnums=(1, 2))
    with refused("`batch['x']` has 4, but `batch['y']`", "({'x': 1, 'y': 0},)"):
        run(args=(W, {"x": X, "y": Y}))
    with refused("examples along `batch_axis=0`", "the examples: batch_axis=1"):
        run(loss, (W, X, np.ones((5, B))), batch_argnums=(1, 2))
    with refused(
        "number of examples; `x` has 4 along axis 0, but `y` has 5 along axis 1",
        "give it None",
    ):
        run(loss, (W, X[:, :7], Y), batch_argnums=(1, 2), batch_axis=(0, 1))


def test_a_leaf_that_examples_share_is_refused_with_its_none():
    batch = {"x": Y, "y": 2 * Y, "table": np.ones((11, 3))}
    with refused(
        "`batch['table']` has 11, but", "give it None", "({'table': None, 'x': 0,"
    ):
        run(args=(W, batch))


def test_what_the_refusal_of_a_time_major_batch_advises_is_right():
    advised = {"batch_argnums": (1, 2), "batch_axis": (1, 0)}
    same(run(loss, (W, X, Y), **advised), jax.value_and_grad(loss)(W, X, Y))
