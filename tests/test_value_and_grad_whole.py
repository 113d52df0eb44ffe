"""What reaches every micro-batch whole: refused if it looks as if it should not."""

import functools
import types
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

import optax_accum as oa
import optax_accum.flax as oaf
from tests.support import devices
from tests.support.errors import refused
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


def run(fun, *args, k=B, options=None, **kwargs):
    f = oa.value_and_grad(fun, num_microbatches=k, **(options or {}))
    return jax.jit(f)(*args, **kwargs)


# --- Arguments ---


def test_a_factor_of_one_entry_beside_a_batch_hides_it_not():
    def fun(w, x, batch):
        return loss(w, x, batch["y"]) * batch["scale"].sum()

    for scale in (np.ones(()), np.ones(1), np.ones((1, 1))):
        with refused("`batch['y']`, float32[6], has 6 entries"):
            run(fun, W, X, {"scale": scale, "y": Y})


@pytest.mark.parametrize("k", [B, slow(2)])
def test_an_argument_with_an_entry_for_each_example_is_refused(k):
    for y in (Y, jnp.asarray(Y)):
        with refused(
            "`y`, float32[6], has 6 entries along axis 0",
            "is not a batch argument",
            "pass batch_argnums=(1, 2). If",
            "needs all of it, pass batch_argnums=(1, 2), batch_axis=(0, None)",
        ):
            run(loss, W, X, y, k=k)
    with refused("`y`, float32[6]", "pass batch_argnames=('y',). If"):
        run(loss, W, X, y=Y, k=k)


def test_a_tree_with_an_entry_for_each_example_is_refused_by_its_leaf():
    def fun(w, x, extra):
        return loss(w, x, extra["y"][0] * extra["scale"])

    with refused("`extra['y'][0]`, float32[6]", "batch_argnums=(1, 2)"):
        run(fun, W, X, {"y": [Y, 2 * Y[:, None]], "scale": 2.0})


def test_what_the_refusal_advises_is_what_is_meant():
    """Both of the two, with axes and names that are there before."""

    def fun(w, x, y, *, z):
        x = x.T if x.shape[0] == 3 else x
        return loss(w, x, y if z is None else y + z.mean())

    args = (W, X.T, Y)
    with refused(
        "`y`, float32[1,6]", "batch_argnums=(1, 2). If", "batch_axis=(1, None)"
    ):
        run(fun, W, X.T, Y[None], z=None, options={"batch_axis": 1})
    options = {"batch_argnums": (1, 2), "batch_axis": (1, 0)}
    with refused(
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
    with refused(f"`y`, float32[{len(x)}]", "batch_argnums=(1, 2)"):
        f(W, x, np.ones(len(x), np.float32))
    if k == 2:  # a device's own number of examples
        f(W, x, np.float32(1))
        f(W, x, np.ones(k, np.float32))


def test_another_argument_of_a_module_is_refused_like_any():
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))

    def fun(model, x, y):
        return jnp.mean((model(x)[:, 0] - y) ** 2)

    with refused("`y`, float32[6]", "batch_argnums=(1, 2)"):
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


def closing_in_a_decorator(y):
    def decorated(fun):
        def decorating(*args):
            return fun(*args)

        return decorating

    return decorated(lambda w, x: loss(w, x, y))


def closing_in_a_helper(y):
    def error(predicted):
        return predicted - y

    return lambda w, x: jnp.mean(error(x @ w) ** 2)


class Task:
    """A task that keeps its batch."""

    def __init__(self, y):
        self.y, self.unread = y, Y

    def loss(self, w, x):
        return loss(w, x, self.y)


def closing_in_self(y):
    return Task(y).loss


WAYS = [
    closing_over_a_variable,
    closing_in_a_decorator,
    closing_in_a_helper,
    closing_in_self,
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
    with refused("the loss", "float32[6]", "along axis 0", "Make it an argument"):
        run(fun, W, X)
    same(run(fun, W, X, k=1), jax.value_and_grad(fun)(W, X))
    fewer = way(Y[:1])
    same(run(fewer, W, X), jax.value_and_grad(fewer)(W, X))


def test_a_closure_is_refused_by_the_name_of_its_variable():
    with refused(
        "the loss closes over `y`, float32[6]", "`batch_argnums`", "`batch_axis`"
    ):
        run(closing_over_a_variable(Y), W, X)
    with refused("the loss has by default `y`"):
        run(closing_in_a_default(Y), W, X)
    with refused("the loss is a functools.partial of `args[0]`"):
        run(closing_in_a_partial(Y), W, X)
    with refused("the loss closes over `rest["):
        run(closing_over_a_tree(Y), W, X)
    with refused("the loss reads `self.y`"):
        run(closing_in_self(Y), W, X)


def test_a_default_that_the_call_replaces_is_no_closure():
    fun = closing_in_a_default(Y)
    options = {"batch_argnums": (1, 2)}
    same(run(fun, W, X, 2 * Y, options=options), jax.value_and_grad(loss)(W, X, 2 * Y))


def test_a_traced_batch_in_the_closure_is_refused():
    @jax.jit
    def step(w, x, y):
        return oa.value_and_grad(lambda w, x: loss(w, x, y), num_microbatches=B)(w, x)

    with refused("the loss closes over `y`, float32[6]"):
        step(W, X, Y)


def test_a_global_variable_is_refused_if_the_loss_reads_it():
    def reads(w, x):
        return jax.vmap(lambda row: row @ w * WEIGHTS.mean())(x).mean()

    def has_an_attribute_of_that_name(w, batch):
        return loss(w, batch.WEIGHTS, 1.0)

    with refused("the loss closes over `WEIGHTS`, float32[6]"):
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
    with refused("`weight` closes over `mask`, bool[6]"):
        run(lambda w, x: loss(w, x, 0.0), W, X, options=options)


def test_a_module_loss_is_refused_for_what_it_closes_over():
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))

    def fun(model, x):
        return jnp.mean((model(x)[:, 0] - y) ** 2)

    y = Y
    with refused("the loss closes over `y`, float32[6]"):
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

    with refused(
        "called with 1",
        "`fun` closes over cannot be split",
        "f(params, x, y) with batch_argnums=(1, 2)",
    ):
        run(fun, W)
    with refused("name none", "closes over cannot be split"):
        run(fun, W, options={"batch_argnums": ()})


# --- Random keys ---


def noisy(w, x, key):
    return loss(w, x, 0.0), jax.random.uniform(key)


def draws(fun, *args, k=3, options=None, **kwargs):
    """What each micro-batch returned as its aux."""
    options = {"has_aux": True} | (options or {})
    return run(fun, *args, k=k, options=options, **kwargs)[0][1]


def wanted_draws(key, k=3):
    return np.array([jax.random.uniform(jax.random.fold_in(key, i)) for i in range(k)])


KEYS = {"typed": jax.random.key, "raw": jax.random.PRNGKey}


@pytest.mark.parametrize("kind", KEYS)
@pytest.mark.parametrize("way", ["position", "keyword", "keyword only"])
def test_a_key_passed_any_way_is_folded(kind, way):
    def keyword_only(w, x, *, key):
        return noisy(w, x, key)

    key = KEYS[kind](7)
    fun = keyword_only if way == "keyword only" else noisy
    args, kwargs = ((key,), {}) if way == "position" else ((), {"key": key})
    options: list[dict] = [{"rng_argnames": "key"}, {"rng_argnames": ("key",)}]
    if way != "keyword only":
        options.append({"rng_argnums": 2})
    if kind == "typed":
        options.append({})
    for named in options:
        got = draws(fun, W, X, *args, options=named, **kwargs)
        np.testing.assert_array_equal(got, wanted_draws(key))


@pytest.mark.parametrize("size", [{"num_microbatches": 3}, {"microbatch_size": 4}])
def test_every_typed_key_in_an_argument_is_folded_by_itself(size):
    """In a tree with other things, and an array of them; the weight sees the same."""

    def fun(w, x, config, *, rngs):
        assert config["name"] == "a"
        drawn = jax.vmap(jax.vmap(jax.random.uniform))(rngs["layers"])
        return loss(w, x, 0.0), (drawn, jax.random.uniform(config["key"]))

    def weight(w, x, config, *, rngs):
        del w, x, rngs
        return jax.random.uniform(config["key"])

    layers = jax.random.split(jax.random.key(1), (2, 5))
    config = {"name": "a", "key": jax.random.key(2), "table": jnp.ones(5)}
    f = oa.value_and_grad(fun, has_aux=True, **size, weight=weight, return_info=True)
    ((_, (drawn, alone)), _), info = f(W, X, config, rngs={"layers": layers})
    k = size.get("num_microbatches", 2)
    np.testing.assert_array_equal(alone, wanted_draws(config["key"], k))
    np.testing.assert_allclose(info.weight, alone.sum(), rtol=1e-6)
    for i in range(2):
        for j in range(5):
            np.testing.assert_array_equal(drawn[:, i, j], wanted_draws(layers[i, j], k))


def test_a_key_of_none_is_the_same_for_all():
    for kind in KEYS.values():
        key = kind(3)
        axes = {"batch_axis": (0, None)}
        got = draws(noisy, W, X, key, options=axes | {"batch_argnums": (1, 2)})
        assert got.tolist() == [jax.random.uniform(key)] * 3
        got = draws(noisy, W, X, key=key, options=axes | {"batch_argnames": "key"})
        assert got.tolist() == [jax.random.uniform(key)] * 3


def test_keys_of_examples_parameters_and_carries_stay_what_they_are():
    def fun(w, batch, carry):
        own = jax.vmap(jax.random.uniform)(batch["key"])
        assert jnp.issubdtype(carry["key"].dtype, jax.dtypes.prng_key)
        drawn = jax.random.uniform(carry["key"])
        carry = {"key": jax.random.split(carry["key"])[0]}
        return loss(w["w"], batch["x"], 0.0), ((own, drawn), carry)

    keys = jax.random.split(jax.random.key(0), B)
    carried = {"key": jax.random.key(4)}
    f = oa.value_and_grad(
        fun,
        has_aux=True,
        num_microbatches=B,
        carry_argnum=2,
        aux=("concat", "stack"),
    )
    ((_, ((own, drawn), _)), _) = jax.jit(f)({"w": W}, {"x": X, "key": keys}, carried)
    np.testing.assert_array_equal(own, jax.vmap(jax.random.uniform)(keys))
    key = carried["key"]
    for i in range(B):
        assert drawn[i] == jax.random.uniform(key)
        key = jax.random.split(key)[0]


def test_a_raw_key_that_is_not_named_is_refused():
    key = jax.random.PRNGKey(0)
    for given in (key, np.asarray(key)):
        with refused(
            "`key` looks like a random key, uint32 of shape (2,)",
            "every micro-batch would draw the same",
            "Pass rng_argnums=2 to",
            "jax.random.key",
            "batch_argnums=(1, 2), batch_axis=(0, None)",
        ):
            draws(noisy, W, X, given)
    with refused("`key`", "Pass rng_argnames='key'", "batch_argnames=('key',)"):
        draws(noisy, W, X, key=key)

    def fun(w, x, rngs):
        return noisy(w, x, rngs["dropout"])

    with refused("`rngs['dropout']` looks like", "rng_argnums=2"):
        draws(fun, W, X, {"dropout": key})
    with refused("`key` looks like a random key"):  # also of two examples
        draws(noisy, W, X[:2], key, k=2)
    assert draws(noisy, W, X, key, k=1) == jax.random.uniform(key)


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey])
def test_a_key_that_the_loss_closes_over_is_refused(make):
    key = make(0)
    rngs = {"dropout": [make(0)]}
    for fun, name in (
        (lambda w, x: noisy(w, x, key), "closes over `key`"),
        (lambda w, x: noisy(w, x, rngs["dropout"][0]), "over `rngs['dropout'][0]`"),
        (functools.partial(noisy, key=key), "has by default `key`"),
    ):
        with refused("the loss", name, "random key", "as in f(params, batch, key)"):
            draws(fun, W, X)
        draws(fun, W, X, k=1)


@pytest.mark.parametrize("make", [jax.random.key, jax.random.PRNGKey])
def test_a_key_that_an_object_or_a_helper_brings_along_is_refused(make):
    class Model:
        def __init__(self, key):
            self.key = key

        def loss(self, w, x):
            return noisy(w, x, self.key)

        __call__ = loss

    def helped(key):
        def helper(w, x):
            return noisy(w, x, key)

        def loss(w, x):
            return helper(w, x)

        return loss

    key, key_of_step = make(0), make(1)
    own, namespace = Model(key), types.SimpleNamespace(rng=key)
    for fun in (own, own.loss, helped(key), lambda w, x: noisy(w, x, namespace.rng)):
        with refused("the loss", "key", "draw the same", "f(params, batch, key)"):
            draws(fun, W, X)
        draws(fun, W, X, k=1)

    @jax.jit
    def step(w, key):  # a traced one, which the loss derives another from
        def fun(w, x):
            return noisy(w, x, jax.random.fold_in(state.rng, 7))

        state = types.SimpleNamespace(rng=key)
        return draws(fun, w, X)

    with refused("reads a random key"):
        step(W, key_of_step)
    # What is there, and is not read, is no mistake.
    draws(lambda w, x: (jnp.mean(x @ w), jnp.float32(bool(namespace))), W, X)


def test_raw_keys_in_an_array_are_keys():
    keys = jax.random.split(jax.random.PRNGKey(3), 5)

    def fun(w, x, keys):
        return jnp.mean(x @ w), jax.vmap(jax.random.uniform)(keys)

    for given in (keys, np.asarray(keys)):
        with refused("`keys` looks like a random key, uint32 of shape (5, 2)"):
            draws(fun, W, X, given)
        drawn = draws(fun, W, X, given, options={"rng_argnums": 2})
        wanted = [wanted_draws(key) for key in keys]
        np.testing.assert_array_equal(drawn, np.transpose(wanted))
        # Named to be the same for all, they are, also if they come from NumPy.
        shared = {"batch_argnums": (1, 2), "batch_axis": (0, None)}
        drawn = draws(fun, W, X, given, options=shared)
        np.testing.assert_array_equal(drawn[0], drawn[1])


def test_a_key_with_two_roles_is_refused():
    key = jax.random.key(0)
    for options, words in (
        ({"rng_argnums": 2, "rng_argnames": "key"}, "`rng_argnums` and `rng_argnames`"),
        ({"rng_argnames": ("key", "key")}, "`rng_argnames` twice names"),
        ({"batch_argnums": (1, 2), "rng_argnames": "key"}, "`batch_argnums` and"),
    ):
        with refused(words, "an argument has one role"):
            draws(noisy, W, X, key, options=options)

    def keyword_only(w, x, *, key):
        return noisy(w, x, key)

    twice = {"batch_argnames": "key", "rng_argnames": "key"}
    with refused("both name the argument `key`; an argument has one role"):
        draws(keyword_only, W, X, options=twice, key=key)
    with refused("`rng_argnames` names the argument 'rng'", "in `rng_argnums`"):
        draws(noisy, W, X, key, options={"rng_argnames": "rng"})


@pytest.mark.several_devices
@devices.parametrized([*devices.INSIDE, *devices.OUTSIDE], usual=("checked", "auto"))
def test_a_key_that_is_not_named_differs_between_devices(way):
    x = np.ones((2 * devices.COUNT, 3), np.float32)
    f = devices.in_step(
        way,
        noisy,
        rest=1,
        has_aux=True,
        num_microbatches=2,
        outputs=(((P(), P(devices.AXIS)), P()),),
    )
    (_, drawn), _ = f(W, devices.whole(way, x), jax.random.key(5))
    wanted = wanted_draws(jax.random.key(5), 2 * devices.COUNT)
    np.testing.assert_array_equal(drawn.ravel(), wanted)


def test_a_key_beside_a_module_is_folded():
    model = nnx.Linear(3, 1, rngs=nnx.Rngs(0))

    def fun(model, x, key):
        return jnp.mean(model(x) ** 2), jax.random.uniform(key)

    f = oaf.value_and_grad(fun, has_aux=True, num_microbatches=3)
    (_, drawn), _ = nnx.jit(f)(model, X, jax.random.key(6))
    np.testing.assert_array_equal(drawn, wanted_draws(jax.random.key(6)))
    with refused("`key` looks like a random key", "rng_argnums=2"):
        f(model, X, jax.random.PRNGKey(6))


def test_keys_under_vmap_are_folded_each():
    keys = jax.random.split(jax.random.key(0), 2)
    f = oa.value_and_grad(noisy, has_aux=True, num_microbatches=3)
    (_, drawn), _ = jax.vmap(f, (None, None, 0))(W, X, keys)
    np.testing.assert_array_equal(drawn, [wanted_draws(key) for key in keys])
