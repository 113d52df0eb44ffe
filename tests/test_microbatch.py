"""`oa.microbatch`: its options, what it composes with, and what it says."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl.testing import parameterized
from jax import export
from optax.microbatching import _microbatching, _microbatching_test

import optax_accum as oa
from tests.support.errors import refused, saying
from tests.support.training import needs_in_place, slow

pytestmark = pytest.mark.core

B = 12


def normal(*shape, seed=0):
    random = np.random.default_rng([seed, *shape])
    return jnp.asarray(random.normal(size=shape), jnp.float32)


PARAMS = {"w": normal(5, 7), "v": normal(7, 3)}
X = normal(B, 5)


def encode(params, x):
    return jnp.tanh(x @ params["w"]) @ params["v"]


def contrastive(z, other=None, temperature=1.0):
    logits = z @ (jnp.flip(z, 1) if other is None else other).T * temperature
    return -jnp.mean(jnp.diag(jax.nn.log_softmax(logits)))


def same(actual, wanted):
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, wanted)
    chex.assert_trees_all_close(actual, wanted, rtol=2e-5, atol=2e-5)


def same_gradients(in_parts, whole, *args, argnums=0):
    """Value and gradients of the functions of `args`, which return a scalar."""
    actual, wanted = (
        jax.jit(jax.value_and_grad(f, argnums))(*args) for f in (in_parts, whole)
    )
    same(actual, wanted)


def with_loss(function):
    """The loss of a function's outputs."""
    return lambda *args: contrastive(function(*args))


# --- Optax's own ---

POLICIES = {
    _microbatching.AccumulationType.SUM: "sum",
    _microbatching.AccumulationType.MEAN: "mean",
    _microbatching.AccumulationType.RUNNING_MEAN: "mean",
    _microbatching.AccumulationType.CONCAT: "stack",
}


def as_optax_has_it(
    fun,
    argnums,
    microbatch_size,
    accumulator=_microbatching.AccumulationType.SUM,
    *,
    argnames=(),
    in_axes=0,
    num_real_microbatches=None,
):
    """`optax.microbatching.microbatch`, by `oa.microbatch`."""
    if microbatch_size is None:
        return fun

    call = oa.microbatch(
        fun,
        microbatch_size=microbatch_size,
        batch_argnums=argnums,
        batch_argnames=argnames,
        batch_axis=in_axes,
        outputs=jax.tree.map(POLICIES.get, accumulator),
        num_real_microbatches=num_real_microbatches,
    )

    def interleaved(policy, y):
        # Theirs takes outputs that have no entry for each example, too.
        if POLICIES[policy] != "stack":
            return y
        return jax.tree.map(
            lambda y: jnp.moveaxis(y, 0, 1).reshape(-1, *y.shape[2:]), y
        )

    def run(*args, **kwargs):
        settings: Any = call.settings  # type: ignore[attr-defined]
        if settings.split(settings.roles.bind(fun, args, kwargs)).remainder:
            raise ValueError("The size must be divisible")  # which is no error here
        return jax.tree.map(interleaved, accumulator, call(*args, **kwargs))

    return run


class TestOptaxsOwnTests(_microbatching_test.MicrobatchingTest, parameterized.TestCase):
    """Their assertions on our accumulation."""

    @pytest.fixture(autouse=True)
    def _against_the_adapter(self, monkeypatch, loose_promotion):
        del loose_promotion
        monkeypatch.setattr(_microbatching, "microbatch", as_optax_has_it)


def test_optaxs_own_tests_are_found():
    names = [name for name in dir(TestOptaxsOwnTests) if name.startswith("test_")]
    assert len(names) >= 35


# --- Outputs ---


def valid(params, x, mask):
    del params, x
    return jnp.sum(mask)


def several(params, x):
    z = encode(params, x)
    return {
        "concat": z,
        "stack": (z.mean(0), jnp.max(x)),
        "sum": [z.sum(0), jnp.sum(x > 0)],
        "mean": {"bias": (z**2).mean(), "count": jnp.sum(x > 1)},
        "last": z[0],
    }


@pytest.mark.parametrize(
    "sizes", [slow({"num_microbatches": 4}), {"microbatch_size": 5}]
)
def test_every_policy_gives_what_python_would(sizes):
    f = oa.microbatch(several, outputs={k: k for k in several(PARAMS, X)}, **sizes)

    def by_hand(params, x):
        if "num_microbatches" in sizes:
            order = list(np.arange(B).reshape(3, 4).T)
        else:
            order = [np.arange(5), np.arange(5, 10), np.arange(10, 12)]
        parts = [several(params, x[rows]) for rows in order]
        share = [len(rows) / B for rows in order]
        rows = np.argsort(np.concatenate(order))
        pick = {key: [part[key] for part in parts] for key in parts[0]}

        def mean(*xs):
            return sum(x * s for x, s in zip(xs, share, strict=True))

        return {
            "concat": jnp.concatenate(pick["concat"])[rows],
            "stack": jax.tree.map(lambda *xs: jnp.stack(xs), *pick["stack"]),
            "sum": jax.tree.map(lambda *xs: sum(xs), *pick["sum"]),
            "mean": jax.tree.map(mean, *pick["mean"]),
            "last": pick["last"][-1],
        }

    def loss(f, params, x):
        y = f(params, x)
        floating = [a for a in jax.tree.leaves(y) if a.dtype == jnp.float32]
        terms = [jnp.mean(jnp.sin((i + 1) * a)) for i, a in enumerate(floating)]
        return sum(terms), y

    with jax.numpy_dtype_promotion("standard"):
        (value, y), grads = jax.jit(
            jax.value_and_grad(functools.partial(loss, f), (0, 1), has_aux=True)
        )(PARAMS, X)
        (wanted_value, wanted), wanted_grads = jax.value_and_grad(
            functools.partial(loss, by_hand), (0, 1), has_aux=True
        )(PARAMS, X)
    same((value, y, grads), (wanted_value, wanted, wanted_grads))


def test_a_prefix_gives_a_policy_to_a_subtree():
    def f(params, x):
        return encode(params, x), {"a": jnp.sum(x), "b": x.sum(0)}

    z, sums = oa.microbatch(f, num_microbatches=3, outputs=("concat", "sum"))(PARAMS, X)
    same((z, sums), f(PARAMS, X))
    with refused("`outputs` must be a policy", "prefix of what `fun` returns; got"):
        oa.microbatch(f, num_microbatches=3, outputs=("sum",) * 3)(PARAMS, X)


def test_outputs_keep_their_dtypes_and_python_numbers_become_arrays():
    def f(x):
        return x.astype(jnp.bfloat16), x > 0, jnp.int8(3) * jnp.ones(x.shape, jnp.int8)

    y = jax.jit(oa.microbatch(f, batch_argnums=0, microbatch_size=5))(X)
    same(y, f(X))
    constant = oa.microbatch(
        lambda _: 2.0, batch_argnums=0, num_microbatches=3, outputs="sum"
    )
    assert constant(X) == 6


def test_a_weight_makes_a_mean_over_tokens_and_is_a_constant():
    mask = np.arange(B) % 5 < 2

    def f(params, x, mask):
        return jnp.sum(mask * jnp.sum(encode(params, x), 1)) / jnp.sum(mask)

    in_parts = oa.microbatch(
        f,
        microbatch_size=5,
        batch_argnums=(1, 2),
        outputs="mean",
        weight=valid,
    )

    def loss(f):
        return lambda params, x: f(params, x, mask.astype(np.float32)) ** 2

    same_gradients(loss(in_parts), loss(f), PARAMS, X, argnums=(0, 1))


@pytest.mark.parametrize("in_place", [None, False])
def test_nothing_of_a_micro_batch_without_weight_is_in_a_sum(in_place):
    mask = np.arange(B) % 4 < 2  # those of the first two micro-batches
    x = jnp.where(mask[:, None], X, jnp.nan)

    def f(params, x, mask):
        del mask
        return jnp.sum(encode(params, x) ** 2)

    in_parts = oa.microbatch(
        f,
        microbatch_size=3,
        batch_argnums=(1, 2),
        outputs="sum",
        weight=valid,
        in_place=in_place,
    )
    actual = jax.jit(jax.value_and_grad(in_parts, (0, 1)))(PARAMS, x, mask)
    value, (grads, some) = jax.value_and_grad(f, (0, 1))(PARAMS, X[mask], None)
    grads_x = jnp.zeros_like(X).at[mask].set(some)
    same(actual, (value, (grads, grads_x)))


def test_the_last_of_all_may_be_smaller():
    f = oa.microbatch(encode, microbatch_size=5, outputs="last")
    same_gradients(
        lambda *args: jnp.sum(jnp.sin(f(*args))),
        lambda params, x: jnp.sum(jnp.sin(encode(params, x[10:]))),
        *(PARAMS, X),
        argnums=(0, 1),
    )

    @jax.jit
    def some(number):
        f = oa.microbatch(
            encode, microbatch_size=5, outputs="last", num_real_microbatches=number
        )
        return f(PARAMS, X)

    with refused('"last"', "(2, 3)", "(5, 3)", "a traced `num_real_microbatches`"):
        some(2)


# --- What is differentiated ---


def test_what_the_function_closes_over_is_differentiated():
    scale = normal(3, 3)

    def loss(apart, params, scale, x):
        f = apart(lambda x: encode(params, x) @ scale)
        return contrastive(f(x), f(-x))

    apart = functools.partial(oa.microbatch, microbatch_size=5, batch_argnums=0)
    same_gradients(
        functools.partial(loss, apart),
        functools.partial(loss, lambda f: f),
        *(PARAMS, scale, X),
        argnums=(0, 1, 2),
    )


def test_integers_and_models_with_functions_in_them_are_taken():
    class Model(dict):
        pass

    jax.tree_util.register_pytree_node(
        Model,
        lambda m: (list(m.values()), tuple(m)),
        lambda k, v: Model(zip(k, v, strict=True)),
    )

    def f(model, x, number):
        return model["act"](encode(model["params"], x)) * number

    in_parts = oa.microbatch(f, num_microbatches=4)

    def loss(f):
        return lambda params, x: contrastive(
            f(Model(params=params, act=jnp.tanh, n=3), x, 2)
        )

    same_gradients(loss(in_parts), loss(f), PARAMS, X, argnums=(0, 1))


def test_towers_with_shared_parameters_and_a_learned_temperature():
    def loss(f):
        return lambda params, t, x, y: contrastive(f(params, x), f(params, y), t)

    in_parts = oa.microbatch(encode, microbatch_size=5)
    args = PARAMS, jnp.float32(0.7), X, normal(B, 5, seed=1)
    same_gradients(loss(in_parts), loss(encode), *args, argnums=(0, 1, 2, 3))


def test_examples_may_be_along_another_axis_and_in_several_arguments():
    def f(params, x, other):
        return encode(params, x.T) + other["y"]

    in_parts = oa.microbatch(
        f, num_microbatches=3, batch_argnums=(1, 2), batch_axis=(1, 0)
    )
    args = PARAMS, X.T, {"y": normal(B, 3)}
    same_gradients(with_loss(in_parts), with_loss(f), *args, argnums=(0, 1, 2))


def test_some_of_the_micro_batches_run_and_a_traced_number_has_gradients():
    def loss(params, x, number):
        f = oa.microbatch(
            encode, microbatch_size=5, num_real_microbatches=number, outputs="concat"
        )
        return jnp.sum(jnp.sin(f(params, x)))

    def whole(params, x, rows):
        return jnp.sum(jnp.sin(encode(params, x)), where=rows[:, None])

    step = jax.jit(jax.value_and_grad(loss, (0, 1)))
    for number, examples in ((0, 0), (1, 5), (2, 10), (3, 12), (7, 12)):
        rows = np.arange(B) < examples
        wanted = jax.value_and_grad(whole, (0, 1))(PARAMS, X, rows)
        same(step(PARAMS, X, number), wanted)
    known = jax.jit(jax.value_and_grad(functools.partial(loss, number=2), (0, 1)))
    same(
        known(PARAMS, X),
        jax.value_and_grad(whole, (0, 1))(PARAMS, X, np.arange(B) < 10),
    )


# --- Carries and keys ---


@pytest.mark.parametrize("sizes", [{"num_microbatches": 4}, {"microbatch_size": 5}])
def test_the_backward_pass_has_the_carries_of_the_forward_pass(sizes):
    """Each is a constant, and moves once."""

    def f(params, x, carry):
        z = encode(params, x) @ carry["scale"]
        scale = carry["scale"] * 1.5 + jnp.tanh(z).T @ z / B
        return z, carry | {"scale": scale, "n": carry["n"] + 1}

    carry = {"scale": jnp.eye(3), "n": jnp.int32(0), "frozen": normal(4)}
    in_parts = oa.microbatch(f, carry_argnum=2, **sizes)

    def by_hand(params, x, carry):
        if "num_microbatches" in sizes:
            order = list(np.arange(B).reshape(3, 4).T)
        else:
            order = [np.arange(5), np.arange(5, 10), np.arange(10, 12)]
        outputs = jnp.zeros((B, 3))
        for rows in order:
            z, carry = f(params, x[rows], jax.lax.stop_gradient(carry))
            outputs = outputs.at[rows].set(z)
        return outputs, jax.lax.stop_gradient(carry)

    def loss(f):
        def of(params, x, carry):
            z, after = f(params, x, carry)
            # Were it not a constant, the carry would have a gradient here.
            return contrastive(z) + jnp.sum(after["scale"]), after

        return jax.jit(jax.value_and_grad(of, (0, 1), has_aux=True))

    actual = loss(in_parts)(PARAMS, X, carry)
    same(actual, loss(by_hand)(PARAMS, X, carry))
    assert in_parts(PARAMS, X, carry)[1]["frozen"] is carry["frozen"]


def test_both_passes_draw_the_same_bit_for_bit():
    """The gradient says which examples the backward pass has dropped."""
    key = jax.random.key(3)

    def dropped(scale, x, key):
        return scale * jax.random.bernoulli(key, 0.5, x.shape).astype(x.dtype)

    in_parts = oa.microbatch(dropped, num_microbatches=4)
    kept, backward = jax.jit(lambda s: jax.vjp(lambda s: in_parts(s, X, key), s))(
        jnp.float32(1)
    )
    assert 0 < np.asarray(kept).mean() < 1
    (each,) = jax.vmap(backward)(jnp.eye(B * 5).reshape(-1, B, 5))
    np.testing.assert_array_equal(each.reshape(B, 5), kept)
    # Each micro-batch has a key of its own, that of `value_and_grad`.
    parts = [dropped(1.0, X[i::4], jax.random.fold_in(key, i)) for i in range(4)]
    same(kept, jnp.stack(parts, 1).reshape(B, 5))


def test_what_is_constant_is_so_to_derivatives_of_the_gradient():
    """A carry that is written, and a weight that depends on parameters."""
    parts = X.reshape(3, 4, 5).swapaxes(0, 1)  # of four micro-batches

    def f(p, x, c):
        z = jnp.sin(p * x + c)
        return (z, jnp.mean(z)), c + jnp.mean(p * x)

    def weight(p, x, c):
        del x, c
        return jnp.abs(p)

    in_parts = oa.microbatch(
        f,
        num_microbatches=4,
        carry_argnum=2,
        outputs=("concat", "mean"),
        weight=weight,
    )

    def by_hand(p, x, c):
        del x
        outputs, means = [], []
        for part in parts:
            (z, mean), c = f(p, part, jax.lax.stop_gradient(c))
            outputs.append(z)
            means.append(mean)
        return (jnp.stack(outputs, 1).reshape(B, 5), sum(means) / 4), c

    def loss(f):
        def of(p):
            (z, mean), _ = f(p, X, jnp.float32(0))
            return jnp.sum(z**3) + mean**2

        return of

    p = jnp.float32(0.7)
    for derivative in (jax.grad, lambda f: jax.grad(jax.grad(f)), jax.hessian):
        actual, wanted = (derivative(loss(g))(p) for g in (in_parts, by_hand))
        same(actual, wanted)


def test_a_carried_key_is_replayed():
    def f(x, key):
        key, own = jax.random.split(key)
        return x * jax.random.normal(own, x.shape), key

    in_parts = oa.microbatch(f, num_microbatches=3, batch_argnums=0, carry_argnum=1)
    key = jax.random.key(0)
    noise, _ = in_parts(jnp.ones_like(X), key)
    same(jax.jit(jax.grad(lambda x: jnp.sum(in_parts(x, key)[0])))(X), noise)


# --- Transformations ---


def test_derivatives_of_the_gradient_are_exact():
    def along(f):
        return lambda s, x: contrastive(f(jax.tree.map(lambda p: s * p, PARAMS), x))

    in_parts = oa.microbatch(encode, microbatch_size=5)
    for derivative in (jax.hessian, lambda f: jax.grad(jax.grad(f))):
        actual, wanted = (
            jax.jit(derivative(along(f)))(jnp.float32(0.5), X)
            for f in (in_parts, encode)
        )
        same(actual, wanted)


def test_second_derivatives_are_those_of_the_functions_own_rules():
    """A straight-through estimator: its rule is not the derivative of its function."""
    rounded = jax.custom_vjp(lambda x: jnp.round(4 * x) / 4)
    rounded.defvjp(lambda x: (jnp.round(4 * x) / 4, None), lambda _, g: (g,))

    def steps(x):
        return rounded(x) + jnp.sin(x)

    def along(f):
        return lambda s: contrastive(f(s * X))

    in_parts = oa.microbatch(steps, batch_argnums=0, microbatch_size=5)
    for derivative in (jax.hessian, lambda f: jax.grad(jax.grad(f))):
        actual, wanted = (jax.jit(derivative(along(f)))(0.3) for f in (in_parts, steps))
        same(actual, wanted)


@pytest.mark.parametrize("order", ["vmap of grad", "grad of vmap"])
def test_vmap(order):
    several = jax.tree.map(lambda p: jnp.stack([p, p / 2]), PARAMS)

    def of(f):
        if order == "vmap of grad":
            return jax.vmap(jax.grad(with_loss(f)), (0, None))
        return jax.grad(lambda p, x: jax.vmap(with_loss(f), (0, None))(p, x).sum())

    in_parts = oa.microbatch(encode, microbatch_size=5)
    same(jax.jit(of(in_parts))(several, X), of(encode)(several, X))


def test_nothing_of_a_trace_is_kept_after_it():
    """JAX keeps the backward pass with the program, and so all that is in it."""

    def step(params, x, number, weight):
        def loss(params):
            f = oa.microbatch(
                lambda x: (encode(params, x), jnp.sum(x)),
                microbatch_size=5,
                batch_argnums=0,
                num_real_microbatches=number,
                outputs=("concat", "mean"),
                weight=lambda x: weight + 0 * jnp.sum(x),
            )
            z, mean = f(x)
            return contrastive(z) + mean

        return jax.grad(loss)(params)

    with jax.checking_leaks():
        jax.jit(step)(PARAMS, X, 2, 1.0)


@pytest.mark.parametrize("where", ["around", "inside"])
def test_checkpoint(where):
    if where == "inside":
        in_parts = oa.microbatch(jax.checkpoint(encode), microbatch_size=5)
    else:
        in_parts = jax.checkpoint(oa.microbatch(encode, microbatch_size=5))
    same_gradients(with_loss(in_parts), with_loss(encode), PARAMS, X, argnums=(0, 1))


def test_it_runs_in_a_scan_over_layers():
    def layers(f):
        def loss(layers, x):
            x, _ = jax.lax.scan(lambda x, w: (f(w, x), None), x, layers)
            return contrastive(x)

        return loss

    def layer(w, x):
        return jnp.tanh(x @ w)

    in_parts = layers(oa.microbatch(layer, num_microbatches=3))
    same_gradients(in_parts, layers(layer), normal(4, 5, 5), X, argnums=(0, 1))


def test_one_inside_another():
    """The inner one cuts each micro-batch of the outer one again."""
    inner = oa.microbatch(encode, microbatch_size=2)
    outer = oa.microbatch(inner, microbatch_size=5)
    same_gradients(with_loss(outer), with_loss(encode), PARAMS, X, argnums=(0, 1))


def test_inside_value_and_grad_each_micro_batch_has_a_loss_of_its_own():
    in_parts = oa.microbatch(encode, num_microbatches=3)
    actual, wanted = (
        jax.jit(oa.value_and_grad(with_loss(f), num_microbatches=2))(PARAMS, X)
        for f in (in_parts, encode)
    )
    same(actual, wanted)


@pytest.mark.parametrize("takes", ["gradients", "pullback"])
def test_accumulate_takes_its_gradients(takes):
    tx = oa.accumulate(optax.sgd(0.1), every_k=2)
    batches = normal(4, B, 5)

    def trained(f):
        @jax.jit
        def step(params, state, x):
            def of(params):
                return contrastive(f(params, x))

            if takes == "pullback":
                grads = jax.vjp(of, params)[1]
            else:
                grads = jax.grad(of)(params)
            return tx.update_params(grads, state, params)

        params, state = PARAMS, tx.init(PARAMS)
        for x in batches:
            params, state = step(params, state, x)
        return params

    in_parts = trained(oa.microbatch(encode, num_microbatches=3))
    same(in_parts, trained(encode))


def test_gradients_per_micro_batch_are_outputs_like_any_other():
    """`optax.microbatching` is used so; nothing goes backward here."""

    def loss(params, x):
        return jnp.mean(encode(params, x) ** 2)

    f = oa.microbatch(jax.value_and_grad(loss), microbatch_size=5, outputs="mean")
    same(jax.jit(f)(PARAMS, X), jax.value_and_grad(loss)(PARAMS, X))


@needs_in_place  # Older versions cannot differentiate this themselves.
def test_a_function_may_have_a_ref():
    def f(params, x):
        ref = jax.new_ref(jnp.zeros_like(x))
        ref[...] = x
        return encode(params, ref[...])

    in_parts = oa.microbatch(f, num_microbatches=3)
    same_gradients(with_loss(in_parts), with_loss(encode), PARAMS, X)


def test_export_with_a_symbolic_number_of_examples():
    in_parts = oa.microbatch(encode, num_microbatches=3)
    shape = jax.ShapeDtypeStruct(export.symbolic_shape("3*b, 5"), jnp.float32)
    step = jax.jit(jax.value_and_grad(with_loss(in_parts)))
    with jax.numpy_dtype_promotion("standard"):
        exported = export.export(step)(PARAMS, shape)
    same(exported.call(PARAMS, X), step(PARAMS, X))


def test_without_jit_and_with_disable_jit():
    in_parts = oa.microbatch(encode, microbatch_size=5)
    wanted = jax.grad(with_loss(encode))(PARAMS, X)
    same(jax.grad(with_loss(in_parts))(PARAMS, X), wanted)
    with jax.disable_jit():
        same(jax.grad(with_loss(in_parts))(PARAMS, X), wanted)


# --- Errors ---


def test_forward_mode_is_refused():
    f = with_loss(oa.microbatch(encode, num_microbatches=3))
    message = saying("`oa.microbatch` was called under jax.jvp", "jax.grad")
    for transformed in (jax.jacfwd(f), jax.jit(jax.jacfwd(f))):
        with pytest.raises(TypeError, match=message):
            transformed(PARAMS, X)


def test_forward_mode_over_reverse_mode_is_not():
    in_parts = with_loss(oa.microbatch(encode, microbatch_size=5))
    actual, wanted = (
        jax.jit(jax.jacfwd(jax.grad(f), 1))(PARAMS, X)
        for f in (in_parts, with_loss(encode))
    )
    same(actual, wanted)


def test_a_real_accumulator_cannot_hold_a_complex_gradient():
    f = oa.microbatch(encode, num_microbatches=3, accumulator_dtype=jnp.float32)
    params = jax.tree.map(lambda p: p.astype(complex), PARAMS)
    with refused("`accumulator_dtype` float32 cannot hold", "complex64"):
        jax.grad(lambda params: jnp.sum(jnp.abs(f(params, X.astype(complex)))))(params)


def test_the_options_have_the_errors_of_value_and_grad():
    with refused("exactly one of `num_microbatches` and `microbatch_size`", "None"):
        oa.microbatch(encode)
    with refused("`microbatch_size` must be an int >= 1", "got 0"):
        oa.microbatch(encode, microbatch_size=0)
    with refused("`unroll` must be a bool or an int >= 1"):
        oa.microbatch(encode, num_microbatches=3, unroll="no")
    with refused("`outputs` must be one of", '"concat"', "got 'total'"):
        oa.microbatch(encode, num_microbatches=3, outputs="total")
    with refused("`num_microbatches=5` does not divide the batch", "Use 1, 2, 3"):
        oa.microbatch(encode, num_microbatches=5)(PARAMS, X)
    with refused("`axis_name='data'` needs `mesh`", "the loss gathers them"):
        oa.microbatch(encode, num_microbatches=3, axis_name="data")
    with refused("`y`, float32[12,5]", "is not a batch argument"):
        oa.microbatch(lambda p, x, y: p * x + y, num_microbatches=3)(1.0, X, X)


def test_outputs_without_an_entry_per_example_are_refused():
    f = oa.microbatch(lambda _, x: x.sum(0), num_microbatches=3)
    with refused('`outputs` has the policy "concat"', "shape (5,)", '"sum"'):
        f(PARAMS, X)
    whole_loss = oa.microbatch(with_loss(encode), num_microbatches=3)
    with refused("shape ()", "compute the loss from all of them"):
        whole_loss(PARAMS, X)


def test_a_function_of_the_batch_alone_is_told_so():
    with refused("takes the batch alone", "batch_argnums=0"):
        oa.microbatch(jnp.tanh, num_microbatches=3)(X)


def test_a_function_that_returns_no_carry_is_refused():
    f = oa.microbatch(
        lambda x, c: x + c[0], batch_argnums=0, carry_argnum=1, num_microbatches=3
    )
    with refused("`fun` must return (outputs, carry)", "`carry_argnum`"):
        f(X, jnp.ones(3))
    g = oa.microbatch(
        lambda x, c: (x, c[:1]), batch_argnums=0, carry_argnum=1, num_microbatches=3
    )
    with refused("`c`", "must keep its type"):
        g(X, jnp.ones(3))


def test_keys_that_all_micro_batches_would_share_are_refused():
    key = jax.random.key(0)

    def f(x):
        return x * jax.random.normal(key, x.shape)

    with refused("closes over `key`", "every micro-batch would draw the same"):
        oa.microbatch(f, batch_argnums=0, num_microbatches=3)(X)
    with refused("`key` looks like a random key", "rng_argnums=1"):
        oa.microbatch(
            lambda x, key: x * jax.random.normal(key, x.shape),
            batch_argnums=0,
            num_microbatches=3,
        )(X, jax.random.PRNGKey(0))


def test_in_place_says_why_it_is_not_possible():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    f = oa.microbatch(encode, num_microbatches=3, in_place=True)

    def loss(params, x):
        return jnp.sum(f(params, x.astype(jnp.bfloat16)).astype(jnp.float32))

    with refused("`in_place=True` is not possible here"):
        jax.grad(loss)(params, X)
