"""What reaches every micro-batch whole: refused if it looks as if it should not."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import optax_accum as oa
import optax_accum.flax as oaf
from tests.support import devices
from tests.support.errors import saying
from tests.support.training import slow

B = 6
RANDOM = np.random.default_rng(0)
W = jnp.asarray(RANDOM.normal(size=3), jnp.float32)
X = RANDOM.normal(size=(B, 3)).astype(np.float32)
Y = RANDOM.normal(size=B).astype(np.float32)
WEIGHTS = np.arange(B, dtype=np.float32)  # read by name below


def loss(w, x, y):
    """A mean over examples, that broadcasts if `y` has one more of them."""
    return jnp.mean((x @ w - y) ** 2)


def same(got, wanted):
    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)

    jax.tree.map(close, jax.device_get(got), jax.device_get(wanted))


def raises(*words):
    return pytest.raises((TypeError, ValueError), match=saying(*words))


def run(fun, *args, k=B, options=None, **kwargs):
    f = oa.value_and_grad(fun, num_microbatches=k, **(options or {}))
    return jax.jit(f)(*args, **kwargs)


# --- Arguments ---


@pytest.mark.parametrize("k", [B, slow(2)])
def test_an_argument_with_an_entry_for_each_example_is_refused(k):
    for y in (Y, jnp.asarray(Y)):
        with raises(
            "`y`, float32[6], which has 6 entries along axis 0",
            "not named as a batch argument",
            "pass batch_argnums=(1, 2). If",
            "needs all of it, batch_argnums=(1, 2), batch_axis=(0, None)",
        ):
            run(loss, W, X, y, k=k)
    with raises("`y`, float32[6]", "pass batch_argnames=('y',). If"):
        run(loss, W, X, y=Y, k=k)


def test_a_tree_with_an_entry_for_each_example_is_refused_by_its_leaf():
    def fun(w, x, extra):
        return loss(w, x, extra["y"][0] * extra["scale"])

    with raises("`extra['y'][0]`, float32[6]", "batch_argnums=(1, 2)"):
        run(fun, W, X, {"y": [Y, 2 * Y[:, None]], "scale": 2.0})


def test_what_the_refusal_advises_is_what_is_meant():
    """Both of the two, with axes and names that are there before."""

    def fun(w, x, y, *, z):
        x = x.T if x.shape[0] == 3 else x
        return loss(w, x, y if z is None else y + z.mean())

    args = (W, X.T, Y)
    with raises(
        "`y`, float32[1,6]", "batch_argnums=(1, 2). If", "batch_axis=(1, None)"
    ):
        run(fun, W, X.T, Y[None], z=None, options={"batch_axis": 1})
    options = {"batch_argnums": (1, 2), "batch_axis": (1, 0)}
    with raises(
        "`z`, float32[6]",
        "pass batch_argnames=('z',), batch_axis=(1, 0, 0). If",
        "batch_argnames=('z',), batch_axis=(1, 0, None)",
    ):
        run(fun, *args, z=Y, options=options)
    whole = options | {"batch_argnames": "z", "batch_axis": (1, 0, None)}
    same(run(fun, *args, z=Y, options=whole), jax.value_and_grad(fun)(*args, z=Y))


def test_other_arguments_reach_the_function_whole():
    """One leaf without the batch's size, carries, keys, or all at once."""

    def fun(w, x, extra):
        return loss(w, x, extra["b"].sum() + sum(extra["c"][0]))

    for extra in (
        {"b": Y, "c": [np.ones(5)]},
        {"b": jnp.ones([]), "c": [(1.0, 2.0)]},
    ):
        same(run(fun, W, X, extra), jax.value_and_grad(fun)(W, X, extra))
    same(run(loss, W, X, Y, k=1), jax.value_and_grad(loss)(W, X, Y))

    def carrying(w, x, seen):
        return loss(w, x, 0.0), seen + 1

    (_, seen), _ = run(carrying, W, X, np.zeros(B), options={"carry_argnum": 2})
    assert seen.tolist() == [B] * B
    run(loss, jnp.ones(3), X, jnp.ones(B), options={"argnums": (0, 2)}, k=1)
    both = {"argnums": (0, 2)}
    wide = jnp.ones(B)  # a parameter that happens to be as long as the batch
    got = run(lambda w, x, v: loss(w, x, v.sum()), W, X, wide, options=both)
    assert got[1][1].shape == (B,)


@pytest.mark.several_devices
@pytest.mark.parametrize("k", [1, 2])
def test_with_a_mesh_the_whole_batch_counts(k):
    x = np.ones((2 * devices.COUNT, 3), np.float32)
    f = devices.in_step("auto", loss, num_microbatches=k)
    with raises(f"`y`, float32[{len(x)}]", "batch_argnums=(1, 2)"):
        f(W, x, np.ones(len(x), np.float32))
    if k == 2:  # a device's own number of examples
        f(W, x, np.float32(1))
        f(W, x, np.ones(k, np.float32))


def test_another_argument_of_a_module_is_refused_like_any():
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))

    def fun(model, x, y):
        return jnp.mean((model(x)[:, 0] - y) ** 2)

    with raises("`y`, float32[6]", "batch_argnums=(1, 2)"):
        oaf.value_and_grad(fun, num_microbatches=B)(model, X, Y)


def test_under_vmap_the_sizes_are_those_inside():
    """Six models, of which each has its own target."""

    def fun(w, x, y):
        return jnp.mean((x @ w - y) ** 2)

    models = jnp.stack([W] * B)
    f = jax.vmap(oa.value_and_grad(fun, num_microbatches=2), (0, None, 0))
    same(f(models, X, Y), jax.vmap(jax.value_and_grad(fun), (0, None, 0))(models, X, Y))


# --- Closures ---


def closing_over_a_variable(y):
    return lambda w, x: loss(w, x, y)


def closing_in_a_default(y):
    return lambda w, x, y=y: loss(w, x, y)


def closing_in_an_inner_function(y):
    def fun(w, x):
        def inner(y):
            return loss(w, x, y)

        return inner(y)

    return fun


def closing_in_a_partial(y):
    return functools.partial(lambda y, w, x: loss(w, x, y), y)


def closing_in_a_keyword_of_a_partial(y):
    return functools.partial(loss, y=y)


def closing_under_jit(y):
    return jax.jit(jax.checkpoint(lambda w, x: loss(w, x, y)))


def closing_over_a_tree(y):
    rest = {"y": y, 3: [y, "name"], "scale": 2.0}
    return lambda w, x: loss(w, x, rest["y"])


WAYS = [
    closing_over_a_variable,
    closing_in_a_default,
    closing_in_an_inner_function,
    closing_in_a_partial,
    closing_in_a_keyword_of_a_partial,
    closing_under_jit,
    closing_over_a_tree,
]


@pytest.mark.parametrize("way", WAYS)
def test_a_loss_that_closes_over_a_part_of_its_batch_is_refused(way):
    fun = way(Y)
    with raises("the loss", "float32[6]", "along axis 0", "Pass it as an argument"):
        run(fun, W, X)
    same(run(fun, W, X, k=1), jax.value_and_grad(fun)(W, X))
    fewer = way(Y[:1])
    same(run(fewer, W, X), jax.value_and_grad(fewer)(W, X))


def test_a_closure_is_refused_by_the_name_of_its_variable():
    with raises(
        "the loss closes over `y`, float32[6]", "`batch_argnums`", "`batch_axis`"
    ):
        run(closing_over_a_variable(Y), W, X)
    with raises("the loss has by default `y`"):
        run(closing_in_a_default(Y), W, X)
    with raises("the loss is a functools.partial of `args[0]`"):
        run(closing_in_a_partial(Y), W, X)
    with raises("the loss closes over `rest["):
        run(closing_over_a_tree(Y), W, X)


def test_a_default_that_the_call_replaces_is_no_closure():
    fun = closing_in_a_default(Y)
    options = {"batch_argnums": (1, 2)}
    same(run(fun, W, X, 2 * Y, options=options), jax.value_and_grad(loss)(W, X, 2 * Y))


def test_a_traced_batch_in_the_closure_is_refused():
    @jax.jit
    def step(w, x, y):
        return oa.value_and_grad(lambda w, x: loss(w, x, y), num_microbatches=B)(w, x)

    with raises("the loss closes over `y`, float32[6]"):
        step(W, X, Y)


def test_a_global_variable_is_refused_if_the_loss_reads_it():
    def reads(w, x):
        return jax.vmap(lambda row: row @ w * WEIGHTS.mean())(x).mean()

    def has_an_attribute_of_that_name(w, batch):
        return loss(w, batch.WEIGHTS, 1.0)

    with raises("the loss closes over `WEIGHTS`, float32[6]"):
        run(reads, W, X)

    class Batch(NamedTuple):
        WEIGHTS: np.ndarray

    same(
        run(has_an_attribute_of_that_name, W, Batch(X)),
        jax.value_and_grad(has_an_attribute_of_that_name)(W, Batch(X)),
    )


def test_a_weight_that_closes_over_its_mask_is_refused():
    mask = Y > 0
    options = {"weight": lambda w, x: mask.sum()}  # noqa: ARG005
    with raises("`weight` closes over `mask`, bool[6]"):
        run(lambda w, x: loss(w, x, 0.0), W, X, options=options)


def test_a_module_loss_is_refused_for_what_it_closes_over():
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))

    def fun(model, x):
        return jnp.mean((model(x)[:, 0] - y) ** 2)

    y = Y
    with raises("the loss closes over `y`, float32[6]"):
        oaf.value_and_grad(fun, num_microbatches=B)(model, X)


def test_other_things_in_a_closure_are_left_alone():
    """Modules, objects, callables, parameters; and a dict that is no tree to JAX."""

    class Holder:
        y = Y

    frozen = {"a": jnp.ones((3, 3)), "b": jnp.ones(B)}
    odd = {1: "a", "b": Y[:2], None: {2.0}}
    odd["itself"] = odd

    def fun(w, x):
        assert odd
        return loss(w @ frozen["a"], x, Holder.y.mean() + np.float32(0))

    same(run(fun, W, X), jax.value_and_grad(fun)(W, X))


def test_a_loss_that_closes_over_all_of_its_batch_is_refused():
    def fun(w):
        return loss(w, X, Y)

    with raises(
        "called with 1",
        "A loss that closes over its batch cannot be split",
        "loss(params, x, y) with batch_argnums=(1, 2)",
    ):
        run(fun, W)
    with raises("lead to none", "closes over its batch"):
        run(fun, W, options={"batch_argnums": ()})
