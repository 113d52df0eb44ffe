"""`oa.value_and_grad`: what it returns is what the whole batch gives."""

import functools
import gc
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_accum as oa
from tests.support.training import slow

SIZES = [
    {"num_microbatches": 1},
    {"num_microbatches": 4},
    {"num_microbatches": 12},
    {"microbatch_size": 12},
    {"microbatch_size": 4},
    {"microbatch_size": 5},  # 5, 5, 2
    {"microbatch_size": 11},  # 11, 1
    {"microbatch_size": 1},
]
B = 12


def name_of(size):
    ((name, value),) = size.items()
    return f"{name}={value}"


# Each kind of split once, and the rest is slow.
every_size = pytest.mark.parametrize(
    "size",
    [
        slow(size, id=name_of(size))
        if i % 2 == 0
        else pytest.param(size, id=name_of(size))
        for i, size in enumerate(SIZES)
    ],
)
pytestmark = [pytest.mark.core, pytest.mark.usefixtures("float64")]


def normal(*shape, seed=0, dtype=np.float64):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(dtype)


def make_params(dtype=np.float64):
    return {"w": jnp.asarray(normal(3, 2, dtype=dtype)), "b": jnp.ones(2, dtype)}


def make_batch(dtype=np.float64):
    return {"x": normal(B, 3, dtype=dtype), "target": {"y": normal(B, 2, dtype=dtype)}}


def residuals(params, batch):
    prediction = jnp.tanh(batch["x"] @ params["w"] + params["b"][None])
    return ((prediction - batch["target"]["y"]) ** 2).sum(-1)


def mean_loss(params, batch):
    return residuals(params, batch).mean()


def same(got, wanted, rtol=1e-12):
    chex.assert_trees_all_equal_shapes_and_dtypes(got, wanted)
    chex.assert_trees_all_close(got, wanted, rtol=rtol, atol=rtol)


def whole(fun, *args, **kwargs):
    """On the whole batch at once."""
    return jax.jit(jax.value_and_grad(fun, *args, **kwargs))


# --- What jax.value_and_grad returns ---


@every_size
def test_value_and_gradient_are_those_of_the_whole_batch(size):
    params, batch = make_params(), make_batch()
    wanted = whole(mean_loss)(params, batch)
    same(jax.jit(oa.value_and_grad(mean_loss, **size))(params, batch), wanted)
    same(oa.value_and_grad(mean_loss, **size)(params, batch), wanted)
    same(jax.jit(oa.grad(mean_loss, **size))(params, batch), wanted[1])


@pytest.mark.parametrize("argnums", [0, 1, -5, (0, 1), (1, 0), (1,)])
def test_several_argnums_and_batches_equal_the_whole_batch(argnums):
    def loss(a, b, x, other, y):
        return jnp.mean((x @ a * b[None] + other - y) ** 2)

    args = normal(3, 2), normal(2), normal(B, 3), 0.5, normal(B, 2)
    wanted = whole(loss, argnums)(*args)
    got = oa.value_and_grad(loss, argnums, microbatch_size=5, batch_argnums=(2, -1))
    same(jax.jit(got)(*args), wanted)


@pytest.mark.parametrize(
    ("argnums", "options"),
    [(0, {}), ((0, 2), {"skip": oa.skip_not_finite, "noise_scale": True})],
)
def test_integers_and_keys_get_the_gradient_that_jax_gives_them(argnums, options):
    def loss(params, x, step):
        key = jax.random.fold_in(params["key"], params["seen"] + step)
        noise = jax.random.normal(key) * params["on"].astype(float)
        return jnp.mean((x @ params["w"] + noise) ** 2)

    params = {"key": jax.random.key(0), "on": np.array([True]), "seen": jnp.int32(3)}
    args = params | {"w": jnp.asarray(normal(3))}, normal(B, 3), jnp.int32(1)
    wanted = jax.value_and_grad(loss, argnums, allow_int=True)(*args)
    f = oa.value_and_grad(loss, argnums, microbatch_size=5, allow_int=True, **options)
    got = jax.jit(f)(*args)
    got = got[0] if options else got
    chex.assert_trees_all_equal_shapes_and_dtypes(got, wanted)
    numbers = [
        [x for x in jax.tree.leaves(tree) if x.dtype == np.float64]
        for tree in (got, wanted)
    ]
    same(*numbers)
    with pytest.raises(TypeError, match="real- or complex-valued"):
        oa.value_and_grad(loss, argnums, microbatch_size=5)(*args)


@pytest.mark.parametrize("size", [4, 5])
def test_a_holomorphic_loss_has_the_gradient_that_jax_gives_it(size):
    def loss(params, x):
        return jnp.mean(jnp.sin(x @ params["w"]) * params["b"][None]), x.real.sum()

    w, b = normal(3, 2) + 1j * normal(3, 2, seed=1), jnp.array([1 + 2j, 0.5])
    params, x = {"w": w, "b": b}, normal(B, 3) + 1j * normal(B, 3, seed=1)
    wanted = whole(loss, has_aux=True, holomorphic=True)(params, x)
    f = oa.value_and_grad(
        loss,
        has_aux=True,
        holomorphic=True,
        microbatch_size=size,
        aux="sum",
        weight=lambda params, x: jnp.float64(len(x)),  # noqa: ARG005
    )
    same(jax.jit(f)(params, x), wanted)


def test_a_holomorphic_loss_over_devices_keeps_its_imaginary_part():
    def loss(w, x):
        return jnp.mean((x @ w) ** 2)

    w, x = normal(3) + 1j * normal(3, seed=1), normal(16, 3) + 1j
    mesh = jax.make_mesh((jax.device_count(),), ("data",))
    f = oa.value_and_grad(
        loss, num_microbatches=2, holomorphic=True, axis_name="data", mesh=mesh
    )
    same(jax.jit(f)(w, x), whole(loss, holomorphic=True)(w, x))


@pytest.mark.parametrize("names", ["y", ["y"], ("y", "x")])
def test_batches_may_be_passed_by_keyword(names):
    def loss(w, x, *, y, scale):
        return scale * jnp.mean((x @ w - y) ** 2)

    w, x, y = normal(3, 2), normal(B, 3), normal(B, 2)
    wanted = whole(loss)(w, x, y=y, scale=2.0)
    by_name = functools.partial(oa.value_and_grad, loss, num_microbatches=3)
    if "x" in names:
        f = by_name(batch_argnums=(), batch_argnames=names)
        same(f(w, x=x, y=y, scale=2.0), wanted)
    else:
        f = by_name(batch_argnums=1, batch_argnames=names)
        same(f(w, x, y=y, scale=2.0), wanted)


@pytest.mark.parametrize(
    "options",
    [
        {"batch_argnums": (1, 2)},
        {"batch_argnums": (), "batch_argnames": ("x", "y")},
        {"batch_argnames": "y"},
        {"batch_argnames": ("x", "y")},
    ],
    ids=str,
)
def test_a_batch_is_found_by_position_or_by_name(options):
    def loss(w, x, y=None):
        return jnp.mean((x @ w - y) ** 2)

    w, x, y = normal(3, 2), normal(B, 3), normal(B, 2)
    wanted = jax.value_and_grad(loss)(w, x, y)
    f = jax.jit(oa.value_and_grad(loss, num_microbatches=3, **options))
    same(f(w, x, y), wanted)
    same(f(w, x, y=y), wanted)
    same(f(w, y=y, x=x), wanted)


def test_the_weight_is_called_with_the_arguments_as_they_were_passed():
    def loss(w, x, mask):
        return jnp.sum(mask * (x @ w)) / mask.sum()

    def count(*args, **kwargs):
        assert len(args) == 2
        return kwargs["mask"].sum()

    w, x, mask = normal(3), normal(B, 3), normal(B) ** 2
    f = oa.value_and_grad(loss, num_microbatches=3, batch_argnums=(1, 2), weight=count)
    same(f(w, x, mask=mask), jax.value_and_grad(loss)(w, x, mask))


def test_a_keyword_may_have_the_name_of_a_positional_only_argument():
    def loss(w, x, /, **more):
        return jnp.mean(x @ w * more["x"])

    w, x, y = normal(3), normal(B, 3), normal(B)
    f = oa.value_and_grad(loss, num_microbatches=3, batch_argnames="x")
    same(f(w, x, x=y), jax.value_and_grad(loss)(w, x, x=y))


@pytest.mark.parametrize("axis", [1, -2])
@every_size
def test_batch_axis_splits_along_another_axis(size, axis):
    def loss(w, x):
        return jnp.mean(jnp.tanh(jnp.einsum("tbi,io->tbo", x, w)) ** 2)

    w, x = normal(3, 2), normal(4, B, 3)
    wanted = whole(loss)(w, x)
    same(oa.value_and_grad(loss, **size, batch_axis=axis)(w, x), wanted)


def test_arguments_that_are_not_batches_reach_fun_unchanged():
    def loss(w, x, flag, config):
        assert flag is True
        assert config == {"name": "tanh", "scale": 2}
        return jnp.mean(jnp.tanh(x @ w) * config["scale"])

    config = {"name": "tanh", "scale": 2}
    f = oa.value_and_grad(loss, num_microbatches=2)
    value, _ = jax.jit(lambda w, x: f(w, x, True, config))(normal(3), normal(4, 3))
    assert np.isfinite(value)


def test_a_batch_may_hold_none_integers_and_keys():
    batch = {"x": normal(B, 3), "label": np.arange(B) % 2, "nothing": None}
    batch["key"] = jax.random.split(jax.random.key(0), B)

    def loss(w, batch):
        noise = jax.vmap(jax.random.normal)(batch["key"])
        return jnp.mean(jnp.where(batch["label"] == 1, batch["x"] @ w + noise, 0))

    w = normal(3)
    wanted = whole(loss)(w, batch)
    for size in (2, 5):
        same(oa.value_and_grad(loss, microbatch_size=size)(w, batch), wanted)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize(
    "size", [slow(SIZES[0]), slow(SIZES[1]), SIZES[5]], ids=name_of
)
def test_dtypes_are_those_of_jax_value_and_grad(size, dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), make_params())
    batch = jax.tree.map(lambda x: x.astype(dtype), make_batch())
    with jax.numpy_dtype_promotion("standard"):
        wanted = whole(mean_loss)(params, batch)
        got = jax.jit(oa.value_and_grad(mean_loss, **size))(params, batch)
    same(got, wanted, rtol=8 * float(jnp.finfo(dtype).eps))


def test_mixed_and_complex_parameters_keep_their_dtypes():
    params = {
        "c": jnp.asarray(normal(3) + 1j * normal(3, seed=1)),
        "h": jnp.ones(3, jnp.bfloat16),
        "f": jnp.ones(3, jnp.float32),
    }

    def loss(params, x):
        y = x * params["h"].astype(x.dtype)[None] * params["f"].astype(x.dtype)[None]
        return jnp.mean(jnp.abs(y @ params["c"]) ** 2)

    x = normal(B, 3).astype(np.complex128)
    wanted = whole(loss)(params, x)
    got = jax.jit(oa.value_and_grad(loss, microbatch_size=5))(params, x)
    chex.assert_trees_all_equal_shapes_and_dtypes(got, wanted)
    same(got[1]["c"], wanted[1]["c"])
    same(got[1]["f"], wanted[1]["f"], rtol=1e-6)
    same(got[1]["h"], wanted[1]["h"], rtol=1e-2)


def test_bfloat16_gradients_are_summed_in_float32():
    """In bfloat16 the ones would stop at 256."""
    w, x = jnp.zeros((), jnp.bfloat16), jnp.ones((4096,), jnp.bfloat16)
    f = oa.grad(lambda w, x: (w * x).sum(), num_microbatches=4096, reduction="sum")
    assert jax.jit(f)(w, x) == 4096
    narrow = oa.grad(
        lambda w, x: (w * x).sum(),
        num_microbatches=4096,
        reduction="sum",
        accumulator_dtype=jnp.bfloat16,
    )
    assert jax.jit(narrow)(w, x) == 256


def test_a_float64_value_of_float32_parameters_keeps_its_dtype():
    def loss(w, x):
        value = jnp.mean(x) + jnp.mean(w).astype(x.dtype)
        return value, value

    w, x = jnp.zeros(3, jnp.float32), normal(B)
    f = oa.value_and_grad(loss, has_aux=True, aux="mean", num_microbatches=3)
    (value, mean), grads = f(w, x)
    same((value, mean), (jnp.mean(x), jnp.mean(x)), rtol=1e-14)
    assert grads.dtype == jnp.float32


@pytest.mark.usefixtures("first_warning")
@pytest.mark.parametrize("function", [oa.value_and_grad, oa.grad])
def test_a_second_call_without_jit_warns_once(function):
    f = function(mean_loss, num_microbatches=3)
    params, batch = make_params(), make_batch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        f(params, batch)
    with pytest.warns(UserWarning, match=r"jax\.jit\(oa\.") as caught:
        f(params, batch)
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        f(params, batch)


@pytest.mark.usefixtures("first_warning")
def test_a_loss_that_is_wrapped_anew_in_every_call_warns_too():
    params, batch = make_params(), make_batch()

    def step():
        def loss(params, batch):
            return mean_loss(params, batch)

        return oa.value_and_grad(loss, num_microbatches=3)(params, batch)

    step()
    with pytest.warns(UserWarning, match=r"jax\.jit\(oa\."):
        step()


@pytest.mark.usefixtures("first_warning")
def test_calls_that_are_compiled_once_do_not_warn():
    f = oa.value_and_grad(mean_loss, num_microbatches=3)
    params, batch = make_params(), make_batch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.jit(lambda: [f(params, batch) for _ in range(3)])()  # no argument is traced
        jax.eval_shape(f, params, batch)
        jax.vmap(lambda w: [f(params | {"w": w}, batch)] * 3)(normal(2, 3, 2))
        with jax.disable_jit():
            for _ in range(2):
                f(params, batch)
        assert oa.diagnose.check_equivalence(mean_loss, params, batch, 4)


def test_no_batch_is_kept_in_memory_without_jit():
    f = oa.value_and_grad(mean_loss, microbatch_size=5)
    params, batch = jax.tree.map(jnp.asarray, (make_params(), make_batch()))
    f(params, batch)
    before = len(jax.live_arrays())
    for _ in range(3):
        f(params, jax.tree.map(jnp.copy, batch))
    gc.collect()
    assert len(jax.live_arrays()) <= before


# --- Weights and reductions ---


MASK = np.array([[1, 1, 1], [0, 0, 0], [1, 0, 0], [0, 0, 0], [1, 1, 0], [0, 0, 0]])
MASKS = {
    "uneven": MASK,
    "one holds none": np.roll(MASK, 1, axis=0),
    "first holds none": np.sort(MASK, axis=0),
    "last holds none": np.sort(MASK, axis=0)[::-1],
}


def token_sum(w, x, mask):
    return jnp.sum(mask * jnp.tanh(x @ w) ** 2)


def token_mean(w, x, mask):
    return token_sum(w, x, mask) / mask.sum()  # NaN where there are none


def count_tokens(w, x, mask):
    del w, x
    return mask.sum()


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("size", [slow(1), slow(2), 4])
def test_weighted_micro_batches_give_the_token_mean_of_the_whole_batch(
    size, dtype, mask
):
    w, x = jnp.asarray(normal(4), dtype), jnp.asarray(normal(6, 3, 4), dtype)
    mask = jnp.asarray(mask, dtype)
    wanted = whole(token_mean)(w, x, mask)
    options = {
        "microbatch_size": size,
        "batch_argnums": (1, 2),
        "weight": count_tokens,
    }
    mean = oa.value_and_grad(token_mean, reduction="mean", **options)
    ratio = oa.value_and_grad(token_sum, reduction="ratio", **options)
    rtol = 4 * float(jnp.finfo(dtype).eps)
    same(jax.jit(mean)(w, x, mask), wanted, rtol)
    same(jax.jit(ratio)(w, x, mask), wanted, rtol)


def test_without_weights_the_result_is_a_mean_of_means():
    """What the weights are for: the test above can fail."""
    x, mask = np.array([1.0, 1.0, 1.0, 4.0]), np.array([1.0, 1.0, 1.0, 0.0])[::-1]

    def loss(w, x, mask):
        return w * jnp.sum(x * mask) / mask.sum()

    f = oa.value_and_grad(loss, microbatch_size=2, batch_argnums=(1, 2))
    assert loss(1.0, x, mask) == 2
    assert f(1.0, x, mask)[0] == 1.75


@pytest.mark.parametrize("reduction", ["mean", "ratio"])
def test_no_weight_at_all_gives_zeros(reduction):
    """Even if each micro-batch gives NaN."""
    f = oa.value_and_grad(
        token_mean,
        microbatch_size=4,
        batch_argnums=(1, 2),
        weight=count_tokens,
        reduction=reduction,
        return_info=True,
    )
    (value, grads), info = jax.jit(f)(normal(4), normal(6, 3, 4), jnp.zeros((6, 3)))
    assert value == 0
    assert (grads == 0).all()
    assert info.weight == 0


@every_size
@pytest.mark.parametrize("reduction", ["ratio", "sum"])
def test_ratio_and_sum_equal_the_whole_batch(reduction, size):
    def sum_loss(params, batch):
        return residuals(params, batch).sum()

    params, batch = make_params(), make_batch()
    divisor = B if reduction == "ratio" else 1
    wanted = whole(lambda *a: sum_loss(*a) / divisor)(params, batch)
    f = oa.value_and_grad(sum_loss, reduction=reduction, return_info=True, **size)
    result, info = f(params, batch)
    same(result, wanted)
    assert info == oa.MicrobatchInfo(B, 0)


@pytest.mark.parametrize("size", [slow(1), 2])
@pytest.mark.parametrize("reduction", ["ratio", "sum"])
def test_a_micro_batch_of_weight_0_counts_in_a_ratio_and_a_sum(reduction, size):
    """Its gradient, its value, its sums and what it makes of a carry.

    A detector's loss is a sum over anchors, divided by the positives of the batch. An
    image without objects has none, and most of the gradient.
    """
    random = np.random.default_rng(4)
    positive = jnp.asarray(random.random((8, 20)) < 0.1, jnp.float32)
    positive = positive.at[jnp.array([0, 1, 4, 5, 6])].set(0)
    x = jnp.asarray(random.normal(size=(8, 20, 5)), jnp.float32)
    w = jnp.asarray(random.normal(size=5), jnp.float32)

    def total(w, x, positive, seen):
        losses = optax.sigmoid_binary_cross_entropy(x @ w, positive)
        return losses.sum(), (len(x), seen + len(x))

    def positives(w, x, positive, seen):
        del w, x, seen
        return positive.sum()

    in_parts = oa.value_and_grad(
        total,
        microbatch_size=size,
        batch_argnums=(1, 2),
        has_aux=True,
        aux="sum",
        carry_argnum=3,
        reduction=reduction,
        weight=positives,
    )
    seen = jnp.int32(0)
    (value, (examples, seen)), grads = jax.jit(in_parts)(w, x, positive, seen)
    (whole, _), wanted = jax.value_and_grad(total, has_aux=True)(w, x, positive, 0)
    by = positive.sum() if reduction == "ratio" else 1.0
    np.testing.assert_allclose(value, whole / by, rtol=1e-5)
    np.testing.assert_allclose(grads, wanted / by, rtol=1e-4, atol=1e-5)
    assert int(examples) == int(seen) == 8


@pytest.mark.parametrize(
    ("size", "reduction"),
    [(5, "mean"), (4, "ratio")],
)
def test_a_weight_may_come_out_of_the_loss(size, reduction):
    """Of examples that activations choose; in one micro-batch there is none."""

    def loss(params, batch):
        kept = (residuals(params, batch) > 1) & (jnp.abs(batch["x"][:, 0]) < 1)
        total = jnp.sum(jnp.where(kept, residuals(params, batch), 0))
        count = kept.sum().astype(float)
        aux = {"kept": count, "where": kept}
        return total / count if reduction == "mean" else total, aux

    def mean(params, batch):
        value, aux = loss(params, batch)
        return value if reduction == "mean" else value / aux["kept"]

    def kept(params, batch, *, aux):
        del params, batch
        return aux["kept"]

    params, batch = make_params(), make_batch()
    part = slice(0, None, B // size) if B % size == 0 else slice(0, size)
    batch["x"][part, 0] = 2
    policies = {"kept": "sum", "where": "concat"}
    options = {"has_aux": True, "microbatch_size": size, "aux": policies}
    f = oa.value_and_grad(
        loss, weight=kept, reduction=reduction, return_info=True, **options
    )
    ((value, aux), grads), info = jax.jit(f)(params, batch)
    same((value, grads), whole(mean)(params, batch))
    assert 0 < float(info.weight) == float(aux["kept"]) < B
    assert int(info.weight) == aux["where"].sum()
    assert not aux["where"][part].any()


def test_a_weight_out_of_the_loss_is_no_weight_where_the_loss_is_rejected():
    def loss(w, x):
        return jnp.mean(x * w), x.sum()

    x = jnp.array([1.0, np.nan, 3.0])
    f = oa.value_and_grad(
        loss,
        has_aux=True,
        num_microbatches=3,
        weight=lambda w, x, aux: 2 * aux,  # noqa: ARG005
        skip=oa.skip_not_finite,
        return_info=True,
    )
    ((value, _), grad), info = jax.jit(f)(jnp.ones(()), x)
    assert (value, grad) == (2.5, 2.5)
    assert (info.weight, info.skipped) == (8, 1)


def test_a_parameter_called_aux_may_be_the_loss_s_own():
    def loss(w, x, aux):
        return jnp.mean(x * w) + 0 * aux, aux

    f = oa.value_and_grad(
        loss,
        has_aux=True,
        num_microbatches=3,
        weight=lambda w, x, aux: x.sum() * aux,  # noqa: ARG005
        return_info=True,
    )
    (_, _), info = jax.jit(f)(jnp.ones(()), jnp.arange(3.0), 2.0)
    assert info.weight == 6


def test_the_weight_sees_the_arguments_of_fun():
    seen = []

    def loss(w, x, key, *, flag):
        assert flag
        return jnp.mean(x * w) + 0 * jax.random.normal(key)

    def weight(w, x, key, *, flag):
        seen.append((w.shape, x.shape, flag))
        return x.shape[0] + 0.0 * jax.random.uniform(key)

    f = oa.value_and_grad(loss, microbatch_size=5, weight=weight, rng_argnums=2)
    with jax.numpy_dtype_promotion("standard"):
        f(jnp.ones(()), normal(B), jax.random.key(0), flag=True)
    assert set(seen) == {((), (5,), True), ((), (2,), True)}


# --- Auxiliary outputs ---


def loss_with_aux(params, batch):
    per_example = residuals(params, batch)
    aux = {
        "loss": per_example,
        "sizes": (jnp.asarray(len(per_example)), per_example.mean()),
        "correct": per_example < 1,
    }
    return per_example.mean(), aux


@every_size
def test_aux_concat_and_mean_equal_those_of_the_whole_batch(size):
    params, batch = make_params(), make_batch()
    wanted, grads = whole(loss_with_aux, has_aux=True)(params, batch)
    policies = {"loss": "concat", "sizes": ("stack", "mean"), "correct": "concat"}
    f = oa.value_and_grad(loss_with_aux, has_aux=True, aux=policies, **size)
    (value, aux), got = jax.jit(f)(params, batch)
    same((value, got), (wanted[0], grads))
    same(aux["loss"], wanted[1]["loss"])  # in the batch's order
    same(aux["correct"], wanted[1]["correct"])
    same(aux["sizes"][1], wanted[1]["sizes"][1])
    sizes = aux["sizes"][0]
    assert sizes.sum() == B
    assert sizes.dtype == wanted[1]["sizes"][0].dtype
    m = size.get("microbatch_size") or B // size["num_microbatches"]
    assert sizes.tolist() == [m] * (B // m) + [B % m] * bool(B % m)


def test_the_order_of_stacked_outputs_is_that_of_the_microbatches():
    """Strided where they are equal, contiguous where the last is smaller."""

    def loss(w, x):
        return jnp.mean(w * x), x

    x = np.arange(6.0)
    f = functools.partial(oa.value_and_grad, loss, has_aux=True)
    (_, parts), _ = f(num_microbatches=3)(1.0, x)
    assert parts.tolist() == [[0, 3], [1, 4], [2, 5]]
    (_, joined), _ = f(num_microbatches=3, aux="concat")(1.0, x)
    assert joined.tolist() == x.tolist()
    (_, last), _ = f(microbatch_size=4, aux="last")(1.0, x)
    assert last.tolist() == [4, 5]


@every_size
def test_aux_sums_have_the_dtype_of_jnp_sum_and_last_keeps_its_own(size):
    def loss(params, batch):
        per_example = residuals(params, batch)
        count = jnp.asarray(len(per_example), jnp.int8)
        aux = [per_example.sum(), count, per_example < 1, count]
        return per_example.mean(), [*aux[:2], aux[2].any(), aux[3]]

    params, batch = make_params(), make_batch()
    f = oa.value_and_grad(loss, has_aux=True, aux=["sum", "sum", "sum", "last"], **size)
    (_, (total, count, parts, last)), _ = f(params, batch)
    same(total, residuals(params, batch).sum())
    m = size.get("microbatch_size") or B // size["num_microbatches"]
    assert count == B
    assert count.dtype == jnp.sum(jnp.zeros(1, jnp.int8)).dtype
    assert parts <= -(-B // m)
    assert last == (B % m or m)
    assert last.dtype == jnp.int8


def test_aux_mean_of_a_count_is_floating_and_of_bfloat16_is_bfloat16():
    def loss(w, x):
        aux = {"count": jnp.asarray(len(x)), "narrow": x.mean().astype(jnp.bfloat16)}
        return jnp.mean(w * x), aux

    x = np.ones(10)
    f = oa.value_and_grad(loss, has_aux=True, aux="mean", microbatch_size=4)
    (_, aux), _ = f(1.0, x)
    assert aux["count"] == (4 * 4 + 4 * 4 + 2 * 2) / 10
    assert jnp.issubdtype(aux["count"].dtype, jnp.floating)
    assert aux["narrow"].dtype == jnp.bfloat16


def test_an_aux_mean_is_weighted_whatever_the_reduction():
    def loss(w, x, mask):
        return jnp.sum(w * x * mask), {"mean": jnp.sum(x * mask) / mask.sum()}

    x, mask = np.arange(6.0), np.array([1, 0, 0, 0, 1, 1.0])
    for reduction in ("mean", "ratio", "sum"):
        f = oa.value_and_grad(
            loss,
            has_aux=True,
            aux="mean",
            microbatch_size=4,
            batch_argnums=(1, 2),
            weight=count_tokens,
            reduction=reduction,
        )
        (_, aux), _ = f(1.0, x, mask)
        same(aux["mean"], jnp.asarray((0 + 4 + 5) / 3))


def test_aux_may_hold_none_integers_and_keys():
    def loss(w, x):
        aux = {"int": 3, "none": None, "empty": (), "key": jax.random.key(1)}
        return jnp.mean(w * x), aux

    for policy in ("stack", "last"):
        f = oa.value_and_grad(loss, has_aux=True, num_microbatches=3, aux=policy)
        (_, aux), _ = f(1.0, np.ones(6))
        assert aux["none"] is None
        assert aux["empty"] == ()
        assert (aux["int"] == 3).all()
        assert aux["key"].shape == ((3,) if policy == "stack" else ())


# --- Carry ---


@every_size
@pytest.mark.parametrize("has_aux", [False, True])
def test_a_carry_goes_from_microbatch_to_microbatch(has_aux, size):
    def loss(params, batch, stats):
        n = len(batch["x"])
        (calls,) = stats["calls"]
        stats = {"sum": stats["sum"] + batch["x"].sum(0), "calls": (calls + 1,)}
        value = mean_loss(params, batch)
        return value, (jnp.asarray(n), stats) if has_aux else stats

    params, batch = make_params(), make_batch()
    stats = {"sum": jnp.zeros(3), "calls": (0,)}
    f = oa.value_and_grad(loss, has_aux=has_aux, carry_argnum=2, **size)
    (value, rest), grads = jax.jit(f)(params, batch, stats)
    same((value, grads), whole(mean_loss)(params, batch))
    if has_aux:
        sizes, rest = rest
        assert sizes.sum() == B
    same(rest["sum"], jnp.asarray(batch["x"].sum(0)))
    m = size.get("microbatch_size") or B // size["num_microbatches"]
    assert rest["calls"] == (-(-B // m),)
    # `oa.grad` returns it where `jax.grad` has its auxiliary output.
    got = oa.grad(loss, has_aux=has_aux, carry_argnum=2, **size)(params, batch, stats)
    chex.assert_trees_all_close(got[0], grads)
    chex.assert_trees_all_close(got[1][1] if has_aux else got[1], rest)


def test_the_carry_equals_that_of_a_loop_by_hand():
    """In order, each micro-batch on what the one before it left."""

    def loss(w, x, state):
        state = 0.9 * state + 0.1 * x.mean()
        return jnp.mean(w * x) * state, state

    x = normal(10)
    (_, got), _ = oa.value_and_grad(loss, microbatch_size=4, carry_argnum=2)(
        1.0, x, 2.0
    )
    state = 2.0
    for part in (x[:4], x[4:8], x[8:]):
        state = 0.9 * state + 0.1 * part.mean()
    assert abs(got - state) < 1e-12


def as_it_is(function):
    return function


@pytest.mark.parametrize(
    "around",
    [as_it_is, jax.jit, jax.checkpoint, slow(lambda f: jax.checkpoint(jax.jit(f)))],
)
@pytest.mark.parametrize(
    "options",
    [
        {"num_microbatches": 4},
        {"microbatch_size": 5, "skip": oa.skip_not_finite},
        slow({"num_microbatches": 4, "weight": lambda _, x, __: (x > 0).sum()}),
    ],
)
def test_what_is_not_written_of_a_carry_is_the_same_array_after(options, around):
    """However deep it was handed on, and if it counts only where there is weight."""

    @around
    def model(w, x, carry):
        frozen = jax.lax.stop_gradient(carry["frozen"])
        prediction = x * w * frozen[0] + carry["mean"]
        return prediction, carry | {"mean": carry["mean"] + x.mean(), "frozen": frozen}

    def loss(w, x, carry):
        prediction, carry = model(w, x, carry)
        swapped = carry["second"], carry["first"]
        carry = carry | dict(zip(("first", "second"), swapped, strict=True))
        return jnp.mean(prediction**2), carry

    key = jax.random.key(0)
    before = {"frozen": jnp.ones(3), "mean": jnp.zeros([]), "key": key, "scale": 2.0}
    before |= {"first": jnp.ones([]), "second": jnp.zeros([])}
    x = normal(B)
    (_, after), _ = oa.value_and_grad(loss, carry_argnum=2, **options)(1.0, x, before)
    assert after["frozen"] is before["frozen"]
    assert after["key"] is key
    assert after["scale"] == 2.0
    assert after["mean"] != 0
    calls = options.get("num_microbatches", 3)
    assert (after["first"], after["second"]) == ((0, 1) if calls % 2 else (1, 0))


def test_what_only_the_smaller_last_micro_batch_writes_is_written():
    def loss(w, x, carry):
        is_smaller = len(x) == 2
        return jnp.mean(w * x), carry + 1 if is_smaller else carry

    f = oa.value_and_grad(loss, microbatch_size=5, carry_argnum=2)
    (_, carry), _ = jax.jit(f)(1.0, normal(B), jnp.zeros([]))
    assert carry == 1


# --- Randomness ---


@pytest.mark.parametrize("make_key", [jax.random.key, jax.random.PRNGKey])
def test_each_micro_batch_has_its_own_key(make_key):
    def loss(w, x, keys):
        noise = jax.random.normal(keys["dropout"])
        return jnp.mean(w * x), noise

    keys = {"dropout": make_key(3)}
    f = oa.value_and_grad(loss, has_aux=True, microbatch_size=4, rng_argnums=(2,))
    (_, noise), _ = jax.jit(f)(1.0, np.ones(10), keys)
    wanted = [
        jax.random.normal(jax.random.fold_in(keys["dropout"], i)) for i in range(3)
    ]
    assert noise.tolist() == [float(x) for x in wanted]
    assert len(set(noise.tolist())) == 3
    assert jax.jit(f)(1.0, np.ones(10), keys)[0][1].tolist() == noise.tolist()


# --- Rejecting micro-batches ---


@pytest.mark.parametrize("skip", [oa.skip_not_finite, optax.skip_not_finite])
@pytest.mark.parametrize("bad", [0, slow(3), 5])
@pytest.mark.parametrize("poison", [np.nan, slow(np.inf)])
def test_a_skipped_micro_batch_is_left_out(poison, bad, skip):
    """Micro-batch i holds the examples i and i + 6, or 2 i and 2 i + 1 when ragged."""

    def loss(params, batch, carry):
        per_example = residuals(params, batch)
        value = per_example.mean()
        return value, ({"mean": value, "sum": value, "stack": value}, carry + value)

    params, clean = make_params(), make_batch()
    batch = make_batch()
    batch["x"][bad] = poison
    good = [i for i in range(B) if i % 6 != bad]
    rest = jax.tree.map(lambda x: x[np.array(good)], clean)
    wanted = whole(mean_loss)(params, rest)
    f = oa.value_and_grad(
        loss,
        has_aux=True,
        num_microbatches=6,
        aux={"mean": "mean", "sum": "sum", "stack": "stack"},
        carry_argnum=2,
        skip=skip,
        return_info=True,
    )
    ((value, (aux, carry)), grads), info = jax.jit(f)(params, batch, 0.0)
    same((value, grads), wanted)
    same(aux["mean"], wanted[0])
    same(aux["sum"], 5 * wanted[0])
    same(carry, 5 * wanted[0])
    assert info == oa.MicrobatchInfo(10, 1)
    assert np.isnan(aux["stack"][bad]) or np.isinf(poison)

    without = oa.value_and_grad(mean_loss, num_microbatches=6)
    _, grads = without(params, batch)
    assert not np.isfinite(grads["w"]).all()


def test_a_skipped_remainder_is_left_out_and_a_batch_all_skipped_gives_zeros():
    f = oa.value_and_grad(
        mean_loss, microbatch_size=5, skip=oa.skip_not_finite, return_info=True
    )
    params, batch = make_params(), make_batch()
    batch["x"][-1] = np.nan
    result, info = f(params, batch)
    rest = jax.tree.map(lambda x: x[:10], make_batch())
    same(result, whole(mean_loss)(params, rest))
    assert info == oa.MicrobatchInfo(10, 1)
    batch["x"][:] = np.nan
    (value, grads), info = f(params, batch)
    chex.assert_trees_all_equal(
        (value, grads), jax.tree.map(jnp.zeros_like, (value, grads))
    )
    assert info == oa.MicrobatchInfo(0, 3)


def test_skip_sees_gradients_and_parameters():
    def skip(grads, gradient_step, params):
        """Rejects what it should not have seen."""
        assert gradient_step is None
        (of_b, of_a), (b, a) = grads, params
        return (a != 1) | (b != 2) | (of_a != 2 * of_b), ()

    def loss(a, b, x):
        return jnp.mean(a * b * x)

    f = oa.grad(
        loss,
        (1, 0),
        num_microbatches=2,
        batch_argnums=2,
        skip=skip,
        return_info=True,
    )
    _, info = f(jnp.ones(()), 2.0 * jnp.ones(()), np.ones(4))
    assert info == oa.MicrobatchInfo(4, 0)


def test_grad_returns_the_info_too():
    grads, info = oa.grad(mean_loss, microbatch_size=5, return_info=True)(
        make_params(), make_batch()
    )
    same(grads, jax.grad(mean_loss)(make_params(), make_batch()))
    assert isinstance(info, oa.MicrobatchInfo)
    assert info == oa.MicrobatchInfo(B, 0)


# --- A number of micro-batches that run time knows ---


def which(size, number):
    """The examples of the first `number` micro-batches, equal or with a remainder."""
    k = -(-B // size)
    if B % size:
        return np.arange(min(size * number, B))
    return np.sort(np.concatenate([np.arange(i, B, k) for i in range(number)]))


def spoilt(batch, real):
    """`batch` with NaN in all but the `real` examples."""

    def spoil(x):
        out = np.full_like(x, np.nan)
        out[real] = x[real]
        return out

    return jax.tree.map(spoil, batch)


NUMBERS = [(4, 2), (5, 2), (5, 3)]


@pytest.mark.parametrize("traced", [True, False])
@pytest.mark.parametrize(("size", "number"), NUMBERS)
def test_micro_batches_behind_the_number_do_not_run(size, number, traced):
    ran = []

    def loss(params, batch):
        jax.debug.callback(lambda _: ran.append(1), batch["x"])
        return loss_with_aux(params, batch)

    policies = {"loss": "concat", "sizes": ("stack", "mean"), "correct": "last"}

    @jax.jit
    def run(params, batch, number):
        f = oa.value_and_grad(
            loss,
            has_aux=True,
            aux=policies,
            microbatch_size=size,
            num_real_microbatches=number if traced else int(number_given),
            return_info=True,
        )
        return f(params, batch)

    number_given, real = number, which(size, number)
    params, batch = make_params(), make_batch()
    if B % size:
        policies["correct"] = "concat"
    result = run(params, spoilt(batch, real), number)
    jax.effects_barrier()
    assert len(ran) == number
    ((value, aux), grads), info = result
    part = jax.tree.map(lambda x: x[real], batch)
    wanted, wanted_grads = whole(loss_with_aux, has_aux=True)(params, part)
    same((value, grads), (wanted[0], wanted_grads))
    assert info == oa.MicrobatchInfo(len(real), 0)
    padded = np.zeros(B)
    padded[real] = wanted[1]["loss"]
    same(aux["loss"], jnp.asarray(padded))
    same(aux["sizes"][1], wanted[1]["sizes"][1])
    sizes = aux["sizes"][0]
    assert sizes.sum() == len(real)
    assert (sizes[number:] == 0).all()
    if policies["correct"] == "last":
        last = np.arange(number - 1, B, B // size)
        wanted = loss_with_aux(params, jax.tree.map(lambda x: x[last], batch))
        assert aux["correct"].tolist() == wanted[1]["correct"].tolist()


@pytest.mark.parametrize("traced", [True, False])
def test_without_any_micro_batch_everything_is_zeros_and_a_carry_stays(traced):
    def loss(w, x, carry):
        return jnp.mean(x * w), (x.sum(), carry + 1)

    def run(number):
        f = oa.value_and_grad(
            loss,
            has_aux=True,
            microbatch_size=5,
            carry_argnum=2,
            aux="last",
            num_real_microbatches=number if traced else 0,
            return_info=True,
            noise_scale=True,
        )
        return f(jnp.ones(()), jnp.full(B, jnp.nan), jnp.float64(7))

    ((value, (aux, carry)), grad), info = jax.jit(run)(0)
    assert (value, grad, aux, carry) == (0, 0, 0, 7)
    assert (info.weight, info.skipped, info.noise_scale.count) == (0, 0, 0)


def test_the_number_goes_with_weights_skip_carry_and_keys():
    """As the same call on a batch of which the rest was cut away."""

    def loss(w, x, carry, key):
        noise = jax.random.normal(key, x.shape, x.dtype)
        return jnp.mean((x + noise) * w) ** 2, carry + jnp.sum(x)

    def call(x, **options):
        f = oa.value_and_grad(
            loss,
            carry_argnum=2,
            rng_argnums=3,
            microbatch_size=4,
            weight=lambda w, x, carry, key: jnp.abs(x).sum(),  # noqa: ARG005
            skip=oa.skip_not_finite,
            noise_scale=True,
            **options,
        )
        return f(jnp.ones(()), x, jnp.zeros(()), jax.random.key(0))

    x = normal(4, 5)  # a micro-batch in each column
    x[2, 1] = np.nan
    got = jax.jit(lambda n: call(x.ravel(), num_real_microbatches=n))(3)
    same(got, jax.jit(lambda: call(x[:, :3].ravel()))())
    assert got[1].skipped == 1


def test_vmap_over_the_number_equals_one_by_one():
    params = make_params()

    def run(number, batch):
        f = oa.value_and_grad(
            mean_loss, microbatch_size=5, num_real_microbatches=number, return_info=True
        )
        return f(params, batch)

    numbers = [0, 1, 3, 2]
    batches = [spoilt(make_batch(), which(5, n)) for n in numbers]
    stacked = jax.tree.map(lambda *x: np.stack(x), *batches)
    got = jax.jit(jax.vmap(run))(jnp.array(numbers), stacked)
    for i, number in enumerate(numbers):
        alone = jax.jit(run)(number, batches[i])
        same(jax.tree.map(lambda x: x[i], got), alone)  # noqa: B023
        assert alone[1].weight == len(which(5, number))


def test_a_number_out_of_range_at_run_time_is_the_nearest():
    def run(number):
        f = oa.value_and_grad(
            mean_loss, microbatch_size=5, num_real_microbatches=number
        )
        return f(make_params(), make_batch())

    same(jax.jit(run)(99), jax.jit(run)(3))
    assert jax.jit(run)(-1)[0] == 0


# --- Unrolled ---


@pytest.mark.parametrize(("size", "unroll"), [(2, 4), (5, True)])
def test_an_unrolled_loop_gives_the_same_result(size, unroll):
    params, batch = make_params(), make_batch()
    f = oa.value_and_grad(mean_loss, microbatch_size=size, unroll=unroll)
    same(jax.jit(f)(params, batch), whole(mean_loss)(params, batch))
