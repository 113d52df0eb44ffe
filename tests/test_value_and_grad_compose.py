"""`oa.value_and_grad` among JAX's other transformations, meshes and `accumulate`."""

import chex
import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import optax_accum as oa
from tests.support import hlo
from tests.support.errors import saying
from tests.support.training import promoting, slow
from tests.support.xla import optimized


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape))


def loss(w, x, y):
    return jnp.mean((jnp.tanh(x @ w) - y) ** 2)


def in_parts(fun=loss, **options):
    options = {"microbatch_size": 5, "batch_argnums": (1, 2)} | options
    return oa.value_and_grad(fun, **options)


def arguments():
    return normal(3, 2), normal(12, 3), normal(12, 2)


def same(got, wanted):
    chex.assert_trees_all_equal_shapes_and_dtypes(got, wanted)
    chex.assert_trees_all_close(got, wanted, rtol=1e-11, atol=1e-12)


def whole(fun, *args):
    return jax.jit(jax.value_and_grad(fun))(*args)


@pytest.mark.usefixtures("float64")
class TestTransformations:
    def test_vmap_over_parameters_equals_one_by_one(self):
        w, (_, x, y) = normal(4, 3, 2), arguments()
        got = jax.jit(jax.vmap(in_parts(), (0, None, None)))(w, x, y)
        same(got, jax.vmap(lambda w: whole(loss, w, x, y))(w))

    def test_vmap_over_batches_equals_one_by_one(self):
        w, x, y = normal(3, 2), normal(4, 12, 3), normal(4, 12, 2)
        got = jax.jit(jax.vmap(in_parts(), (None, 0, 0)))(w, x, y)
        same(got, jax.vmap(lambda x, y: whole(loss, w, x, y))(x, y))

    def test_vmap_with_skip_equals_one_by_one(self):
        w, x, y = normal(3, 2), normal(4, 12, 3), normal(4, 12, 2)
        x = x.at[1, 0].set(jnp.nan)
        f = in_parts(skip=oa.skip_not_finite, return_info=True)
        (_, grads), info = jax.jit(jax.vmap(f, (None, 0, 0)))(w, x, y)
        assert info.skipped.tolist() == [0, 1, 0, 0]
        assert info.weight.tolist() == [12, 7, 12, 12]
        same(grads[1], whole(loss, w, x[1, 5:], y[1, 5:])[1])

    def test_checkpointed_scanned_layers_equal_the_whole_batch(self):
        def deep(w, x, y):
            @jax.checkpoint
            def layer(h, w):
                return jnp.tanh(h @ w), None

            h, _ = jax.lax.scan(layer, x, w)
            return jnp.mean((h - y) ** 2)

        w, x, y = normal(5, 3, 3), normal(12, 3), normal(12, 3)
        got = jax.jit(in_parts(deep))(w, x, y)
        same(got, whole(deep, w, x, y))

    def test_custom_derivatives_apply_to_each_micro_batch(self):
        @jax.custom_vjp
        def clipped(x):
            return x

        clipped.defvjp(lambda x: (x, None), lambda _, g: (jnp.clip(g, -1e-2, 1e-2),))

        def fun(w, x, y):
            return loss(clipped(w), x, y)

        args = arguments()
        # What it does to each micro-batch's gradient is what the loop by hand does.
        parts = [slice(0, 5), slice(5, 10), slice(10, 12)]
        grads = [whole(fun, args[0], args[1][p], args[2][p])[1] for p in parts]
        wanted = (5 * grads[0] + 5 * grads[1] + 2 * grads[2]) / 12
        same(jax.jit(in_parts(fun))(*args)[1], wanted)

    @pytest.mark.parametrize("size", [4, 5])
    def test_the_value_can_be_differentiated(self, size):
        args = arguments()
        f = in_parts(microbatch_size=size)
        same(jax.jit(jax.grad(lambda *a: f(*a)[0]))(*args), whole(loss, *args)[1])

    @pytest.mark.parametrize("reduction", ["mean", slow("ratio"), slow("sum")])
    def test_the_derivative_of_the_value_is_the_gradient(self, reduction):
        """Whatever it is of: weights, rejected micro-batches, NaN, a carry."""

        def fun(params, x, y, carry):
            value = loss(params["w"], x, y) + params["b"].real * params["n"]
            return value, (jnp.sum(x), carry + value)

        f = in_parts(
            fun,
            has_aux=True,
            carry_argnum=3,
            weight=lambda params, x, y, carry: jnp.isfinite(x).sum() / 3,  # noqa: ARG005
            skip=lambda grads, *_: (~(jnp.abs(grads["w"]).max() < 1e3), ()),
            reduction=reduction,
            allow_int=True,
        )
        w, x, y = arguments()
        x, y = x.at[-2:].set(jnp.nan), y.at[7].set(1e5)
        params = {"w": w, "b": jnp.array(1 + 2j), "n": jnp.float64(2), "i": 3}

        @jax.jit
        def both(params):
            value = lambda p: f(p, x, y, jnp.zeros(()))[0][0]  # noqa: E731
            return jax.grad(value, allow_int=True)(params), f(params, x, y, 0.0)[1]

        got, wanted = both(params)
        assert np.isfinite(wanted["w"]).all()
        assert (wanted["w"] != 0).any()
        del got["i"], wanted["i"]  # float0
        same(got, wanted)

    def test_the_derivative_of_a_holomorphic_value_is_the_gradient(self):
        f = in_parts(loss, holomorphic=True)
        w, x, y = (jax.lax.complex(a, a[::-1]) for a in arguments())
        value = jax.grad(lambda w: f(w, x, y)[0], holomorphic=True)
        same(jax.jit(value)(w), jax.jit(f)(w, x, y)[1])

    def test_the_derivative_of_narrow_parameters_has_their_dtype(self):
        def fun(w, x, y):
            return loss(w.astype(jnp.float32), x, y).astype(jnp.bfloat16)

        args = [a.astype(jnp.float32) for a in arguments()]
        args[0] = args[0].astype(jnp.bfloat16)
        f = in_parts(fun)
        got = jax.jit(jax.grad(lambda *a: f(*a)[0]))(*args)
        wanted = jax.jit(f)(*args)[1]
        chex.assert_trees_all_equal_dtypes(got, wanted)
        np.testing.assert_allclose(got.astype(float), wanted.astype(float), rtol=1e-2)

    def test_several_arguments_at_once_are_differentiated_through_the_loop(self):
        """Parameters, the batch, and what the loss closes over."""

        def value(value_and_grad):
            def of(w, x, y, scale):
                def fun(w, x, y):
                    return loss(w * scale, x, y) * scale

                value, grads = value_and_grad(fun)(w, x, y)
                return value + jnp.sum(grads**2)

            return jax.jit(jax.grad(of, argnums=(0, 1, 3)))

        args = *arguments(), jnp.float64(3)
        same(value(in_parts)(*args), value(jax.value_and_grad)(*args))

    def test_derivatives_of_the_value_compose(self):
        w, x, y = arguments()
        tangent, ws = normal(3, 2, seed=1), normal(4, 3, 2)

        def all_of(value_and_grad):
            def value(w):
                return value_and_grad(w, x, y)[0]

            def after_three_steps(w):
                def step(w, _):
                    value, grads = value_and_grad(w, x, y)
                    return w - 0.1 * grads, value

                return jax.lax.scan(step, w, length=3)[1].sum()

            return {
                "forward": jax.jvp(value, (w,), (tangent,)),
                "hessian": jax.hessian(value)(w),
                "vmap": jax.vmap(jax.grad(value))(ws),
                "of vmap": jax.grad(lambda ws: jax.vmap(value)(ws).sum())(ws),
                "checkpoint": jax.grad(jax.checkpoint(value))(w),
                "unrolled": jax.grad(after_three_steps)(w),
            }

        got = jax.jit(lambda: all_of(in_parts()))()
        same(got, jax.jit(lambda: all_of(jax.value_and_grad(loss)))())

    def test_the_value_of_a_loop_of_unknown_length_can_be_differentiated(self):
        args = arguments()

        def value(w, number):
            return in_parts(num_real_microbatches=number)(w, *args[1:])[0]

        got = jax.jit(jax.grad(value))(args[0], 2)
        same(got, whole(loss, args[0], *(a[:10] for a in args[1:]))[1])

    def test_a_loss_may_count_its_calls_in_a_ref(self):
        w, x, y = arguments()

        @jax.jit
        def run(w):
            calls = jax.new_ref(jnp.int32(0))

            def fun(w, x, y):
                calls[...] += 1
                return loss(w, x, y)

            return in_parts(fun)(w, x, y), calls[...]

        got, calls = run(w)
        same(got, whole(loss, w, x, y))
        assert calls == 3

    def test_the_gradient_can_be_differentiated(self):
        def norm(value_and_grad):
            return lambda *args: jnp.sum(value_and_grad(*args)[1] ** 2)

        args = arguments()
        wanted = jax.jit(jax.grad(norm(jax.value_and_grad(loss))))(*args)
        same(jax.jit(jax.grad(norm(in_parts())))(*args), wanted)

    def test_a_hessian_vector_product_equals_the_whole_batch(self):
        w, x, y = arguments()
        tangent = normal(3, 2, seed=1)

        def product(value_and_grad):
            gradient = jax.jit(lambda w: value_and_grad(w, x, y)[1])
            return jax.jvp(gradient, (w,), (tangent,))

        same(product(in_parts()), product(jax.value_and_grad(loss)))

    def test_the_value_with_weights_skip_and_carry_can_be_differentiated(self):
        """Selects and the reciprocal of W put no NaN into a second derivative."""

        def fun(w, x, y, carry):
            return loss(w, x, y) + 0 * carry, carry + jnp.mean(x)

        def count(w, x, y, carry):
            del w, y, carry
            return (x[:, 0] < 0).sum()

        f = in_parts(fun, weight=count, skip=oa.skip_not_finite, carry_argnum=3)
        w, x, y = arguments()
        x = jnp.abs(x).at[0].multiply(-1)  # of all micro-batches one has weight
        got = jax.jit(jax.grad(lambda w: f(w, x, y, jnp.zeros(()))[0][0]))(w)
        same(got, whole(loss, w, x[:5], y[:5])[1])

    def test_value_and_grad_runs_inside_a_scan(self):
        w, x, y = arguments()
        f = in_parts()

        def step(w, _):
            _, grads = f(w, x, y)
            return jax.lax.cond(grads.sum() > 1e9, lambda: w, lambda: w - grads), None

        def plain(w, _):
            return w - whole(loss, w, x, y)[1], None

        got, _ = jax.jit(lambda w: jax.lax.scan(step, w, length=3))(w)
        wanted, _ = jax.lax.scan(plain, w, length=3)
        same(got, wanted)

    def test_value_and_grad_runs_under_disable_jit(self):
        args = arguments()
        with jax.disable_jit():
            same(in_parts()(*args), whole(loss, *args))

    def test_the_result_has_the_name_and_docstring_of_the_wrapped_function(self):
        def named(params, batch):
            """Says what it does."""
            return (params * batch).mean()

        for wrapped in (
            oa.value_and_grad(named, num_microbatches=1),
            oa.grad(named, num_microbatches=1),
        ):
            assert wrapped.__name__ == "named"
            assert wrapped.__doc__ == named.__doc__


# --- A training step ---


def test_donation_reuses_parameters_and_state():
    params = {"w": jax.ShapeDtypeStruct((256, 256), jnp.float32)}
    x = jax.ShapeDtypeStruct((64, 256), jnp.float32)
    tx = optax.sgd(0.1)

    def step(params, state, x):
        f = oa.grad(lambda p, x: jnp.mean((x @ p["w"]) ** 2), num_microbatches=4)
        updates, state = tx.update(f(params, x), state, params)
        return optax.apply_updates(params, updates), state

    program = hlo.compiled(step, params, tx.init(params), x)
    assert program.memory_analysis().alias_size_in_bytes >= hlo.nbytes(params)


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("reduction", ["mean", "ratio"])
@pytest.mark.parametrize("optimizer", [optax.adamw, optax.sgd])
def test_micro_batches_inside_windows_equal_the_global_batch(optimizer, reduction):
    """The weights multiply through: two levels update as the global batch does."""

    def token_loss(w, x, mask):
        total = jnp.sum(mask * jnp.tanh(x @ w) ** 2)
        if reduction == "ratio":
            return total
        return total / jnp.maximum(mask.sum(), 1)

    def token_mean(w, x, mask):
        return jnp.sum(mask * jnp.tanh(x @ w) ** 2) / mask.sum()

    inner = promoting(optimizer(0.1))
    tx = oa.accumulate(inner, every_k=3)

    def count(w, x, mask):
        del w, x
        return mask.sum()

    gradient = oa.value_and_grad(
        token_loss,
        microbatch_size=3,
        batch_argnums=(1, 2),
        weight=count,
        reduction=reduction,
        return_info=True,
    )

    @jax.jit
    def micro_step(params, state, x, mask):
        (value, grads), info = gradient(params, x, mask)
        return tx.update_params(grads, state, params, weight=info.weight, value=value)

    @jax.jit
    def global_step(params, state, x, mask):
        value, grads = jax.value_and_grad(token_mean)(params, x, mask)
        updates, state = inner.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    w = normal(4)
    params, state = w, tx.init(w)
    wanted, inner_state = w, inner.init(w)
    random = np.random.default_rng(0)
    for window in range(3):
        x = normal(24, 4, seed=window)
        mask = jnp.asarray(random.random(24) < 0.4, x.dtype).at[8:16].set(0)
        mask = mask.at[0].set(1)
        for i in range(3):
            part = slice(8 * i, 8 * i + 8)
            params, state = micro_step(params, state, x[part], mask[part])
        wanted, inner_state, value = global_step(wanted, inner_state, x, mask)
        same(state.window.loss / state.window.weight, value)
        same(params, wanted)


# --- Sharded batches ---


def sharded(kind, x, *spec):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind, kind))
    return mesh, jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))


KINDS = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])


@KINDS
def test_splitting_a_sharded_batch_needs_no_collective(kind):
    mesh, x = sharded(kind, normal(32, 6), "data")
    w = jax.device_put(normal(6, 4), NamedSharding(mesh, PartitionSpec()))
    traces = []

    def local(w, x):
        """Reduces nothing over the examples, so that only the split could exchange."""
        traces.append(1)
        return jnp.mean(w), jnp.tanh(x @ w)

    with jax.set_mesh(mesh):
        f = oa.value_and_grad(local, has_aux=True, num_microbatches=4, aux="concat")
        program = optimized(jax.jit(f).lower(w, x))
        (_, joined), _ = program(w, x)
    assert len(traces) == 1
    assert hlo.exchanges(program) == {}
    # Every device works on two of the eight examples of every micro-batch.
    assert [t.split("{")[0] for t in hlo.operations(program, "dot")] == ["f32[2,4]"]
    assert joined.sharding.is_equivalent_to(x.sharding, 2)
    wanted = jnp.tanh(normal(32, 6) @ normal(6, 4))
    chex.assert_trees_all_close(joined, wanted, rtol=1e-5)


@KINDS
def test_a_contiguous_split_needs_collectives(kind):
    mesh, x = sharded(kind, normal(32, 6), "data")

    def contiguous(x):
        parts = [jax.lax.dynamic_slice_in_dim(x, 8 * i, 8) for i in range(4)]
        return jnp.stack([jnp.tanh(p) for p in parts])

    with jax.set_mesh(mesh):
        assert hlo.exchanges(optimized(jax.jit(contiguous).lower(x))) != {}


@pytest.mark.parametrize(
    "size", [slow({"num_microbatches": 4}), {"microbatch_size": 12}]
)
@KINDS
def test_the_result_on_a_mesh_is_that_of_the_whole_batch(kind, size):
    _, x = sharded(kind, normal(32, 6), "data")
    mesh, w = sharded(kind, normal(6, 4), None, "model")
    with jax.set_mesh(mesh):
        _, y = sharded(kind, normal(32, 4), "data", "model")
        wanted = whole(loss, w, x, y)
        f = oa.value_and_grad(loss, batch_argnums=(1, 2), **size)
        value, grads = jax.jit(f)(w, x, y)
    chex.assert_trees_all_close((value, grads), wanted, rtol=1e-5, atol=1e-6)
    assert grads.sharding.is_equivalent_to(w.sharding, 2)


@KINDS
def test_auxiliary_outputs_on_a_mesh_stay_sharded(kind):
    mesh, x = sharded(kind, normal(32, 6), "data")
    policies = {"last": "last", "mean": "mean", "sum": "sum", "stack": "stack"}

    def fun(w, x):
        return jnp.mean(x * w), dict.fromkeys(policies, x)

    with jax.set_mesh(mesh):
        f = oa.value_and_grad(fun, has_aux=True, num_microbatches=4, aux=policies)
        program = optimized(jax.jit(f).lower(jnp.ones(()), x))
        (_, aux), _ = program(jnp.ones(()), x)
    parts = np.asarray(normal(32, 6)).reshape(8, 4, 6)
    wanted = {"last": parts[:, -1], "mean": parts.mean(1), "sum": parts.sum(1)}
    wanted["stack"] = parts.swapaxes(0, 1)
    chex.assert_trees_all_close(aux, wanted, rtol=1e-5, atol=1e-6)
    for name in ("last", "mean", "sum"):
        assert aux[name].sharding.is_equivalent_to(x.sharding, 2)


def test_an_explicit_mesh_too_large_for_a_micro_batch_is_refused():
    mesh, x = sharded(AxisType.Explicit, normal(32, 6), "data")
    with jax.set_mesh(mesh):
        f = jax.jit(
            oa.value_and_grad(lambda w, x: jnp.mean(w * x), num_microbatches=16)
        )
        with pytest.raises(
            ValueError, match="`x` is sharded over 4 devices along axis 0"
        ):
            f(1.0, x)
        g = oa.value_and_grad(lambda w, x: jnp.mean(w * x), microbatch_size=10)
        with pytest.raises(ValueError, match="a micro-batch of 10 examples cannot be"):
            g(1.0, x)


REDUCED = PartitionSpec(reduced={"data"})


def unbiased(w, x):
    """What JAX differentiates by reduced parameters: no bias, no scale."""
    return jnp.mean(jnp.tanh(x @ w.astype(jnp.float32)) ** 2)


@pytest.mark.parametrize("dtype", [jnp.float32, slow(jnp.bfloat16)])
@pytest.mark.parametrize(
    "options",
    [
        {"num_microbatches": 4, "weight": lambda w, x: (x[:, 0] > 0).sum()},  # noqa: ARG005
        slow({"num_microbatches": 4}),
        slow({"num_microbatches": 4, "reduction": "sum"}),
        slow({"num_microbatches": 4, "num_real_microbatches": 3}),
        {"microbatch_size": 20},
    ],
)
def test_gradients_of_reduced_parameters_stay_unreduced(options, dtype):
    """As JAX has them; the caller's `jax.reshard` is the one exchange of gradients."""
    mesh, x = sharded(AxisType.Explicit, normal(32, 6).astype(jnp.float32), "data")
    w = normal(6, 4).astype(dtype)
    f = oa.value_and_grad(unbiased, **options)

    def run(w, x):
        w = jax.reshard(w, REDUCED)
        value, grads = f(w, x)
        plain = jax.eval_shape(jax.grad(unbiased), w, x)
        assert jax.typeof(grads).sharding == plain.sharding
        return value, jax.reshard(grads, PartitionSpec())

    with jax.set_mesh(mesh):
        w = jax.device_put(w, NamedSharding(mesh, PartitionSpec()))
        program = optimized(jax.jit(run).lower(w, x))
        got, wanted = program(w, x), jax.jit(f)(w, x)
    tolerance = 1e-5 if dtype == jnp.float32 else 1e-2
    chex.assert_trees_all_equal_dtypes(got, wanted)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(
            a.astype(jnp.float32), b.astype(jnp.float32), rtol=tolerance, atol=tolerance
        ),
        got,
        wanted,
    )
    gradients = [c for c in hlo.collectives(program) if "[6,4]" in c.type]
    assert [(c.name, c.place) for c in gradients] == [("all-reduce", "entry")]


def test_the_value_by_reduced_parameters_can_be_differentiated():
    mesh, x = sharded(AxisType.Explicit, normal(32, 6).astype(jnp.float32), "data")

    def value(w):
        f = oa.value_and_grad(unbiased, num_microbatches=4)
        return f(jax.reshard(w, REDUCED), x)[0]

    with jax.set_mesh(mesh):
        w = normal(6, 4).astype(jnp.float32)
        w = jax.device_put(w, NamedSharding(mesh, PartitionSpec()))
        got = jax.jit(jax.grad(value))(w)
        wanted = jax.grad(unbiased)(w, x)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "option", [{"skip": oa.skip_not_finite}, {"noise_scale": True}]
)
def test_what_reads_unreduced_gradients_is_refused(option):
    mesh, x = sharded(AxisType.Explicit, normal(32, 6).astype(jnp.float32), "data")

    @jax.jit
    def run(w):
        f = oa.value_and_grad(unbiased, num_microbatches=4, **option)
        return f(jax.reshard(w, REDUCED), x)

    (name,) = option
    with (
        jax.set_mesh(mesh),
        pytest.raises(ValueError, match=rf"`{name}` reads .* `grads` is unreduced"),
    ):
        run(jnp.ones((6, 4), jnp.float32))


# --- Flax ---


@pytest.mark.slow
def test_batch_norm_and_dropout_of_linen_run_as_carry_and_key():
    """Statistics and keys go from micro-batch to micro-batch as by hand."""
    # Imported here, because Flax warns about JAX's strict promotion when it is.
    import flax.linen as nn  # noqa: PLC0415

    class Network(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.BatchNorm(use_running_average=False, momentum=0.9)(nn.Dense(4)(x))
            x = nn.Dropout(0.5, deterministic=False)(nn.tanh(x))
            return nn.Dense(2)(x)

    def fun(params, batch, batch_stats, key):
        prediction, updated = Network().apply(
            {"params": params, "batch_stats": batch_stats},
            batch["x"],
            rngs={"dropout": key},
            mutable=["batch_stats"],
        )
        return jnp.mean((prediction - batch["y"]) ** 2), updated["batch_stats"]

    batch = {"x": normal(10, 3), "y": normal(10, 2)}
    key = jax.random.key(0)
    with jax.numpy_rank_promotion("allow"):
        variables = Network().init({"params": key, "dropout": key}, batch["x"])
        params, stats = variables["params"], variables["batch_stats"]
        f = oa.value_and_grad(fun, microbatch_size=4, carry_argnum=2, rng_argnums=3)
        (value, got_stats), grads = jax.jit(f)(params, batch, stats, key)

        one = jax.jit(jax.value_and_grad(fun, has_aux=True))
        values, gradients, sizes = [], [], (4, 4, 2)
        for i, start in enumerate((0, 4, 8)):
            part = jax.tree.map(lambda x, s=start: x[s : s + 4], batch)
            (v, stats), g = one(params, part, stats, jax.random.fold_in(key, i))
            values.append(v)
            gradients.append(g)

    def mean(*parts):
        return sum(n * p for n, p in zip(sizes, parts, strict=True)) / 10

    close = {"rtol": 1e-4, "atol": 1e-6}
    chex.assert_trees_all_close(got_stats, stats, **close)
    chex.assert_trees_all_close(value, mean(*values), **close)
    chex.assert_trees_all_close(grads, jax.tree.map(mean, *gradients), **close)


# --- Export with a symbolic number of examples ---


def exported(shape, **options):
    f = jax.jit(oa.value_and_grad(square, **options))
    x = jax.ShapeDtypeStruct(export.symbolic_shape(shape), jnp.float32)
    return export.export(f)(jnp.ones(3), x)


def square(w, x):
    return jnp.mean((x @ w) ** 2)


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        ("4*b, 3", {"num_microbatches": 4}),
        ("2*b, 3", {"microbatch_size": 2}),  # of as many micro-batches as b says
        ("4*b, 3", {"microbatch_size": 3}),  # with a remainder, which may be empty
    ],
)
def test_an_exported_program_takes_every_number_of_examples(shape, options):
    program = exported(shape, **options)
    for examples in (4, 8, 12):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(examples, 3)), np.float32)
        wanted = jax.value_and_grad(square)(jnp.ones(3), x)
        chex.assert_trees_all_close(program.call(jnp.ones(3), x), wanted, rtol=1e-5)


def test_a_symbolic_size_that_the_micro_batches_may_not_divide_is_refused():
    words = saying("`x` holds 2*b examples", 'symbolic_shape("4*b, ...")')
    with pytest.raises(ValueError, match=words):
        exported("2*b, 3", num_microbatches=4)


def test_an_exported_program_takes_weights_of_every_number_of_examples():

    def loss(w, x, mask):
        return jnp.sum(mask * (x @ w) ** 2) / mask.sum()

    f = oa.value_and_grad(
        loss,
        batch_argnums=(1, 2),
        weight=lambda w, x, mask: mask.sum(),  # noqa: ARG005
        return_info=True,
        num_microbatches=4,
    )
    w = jnp.arange(3.0)
    scope = export.SymbolicScope()
    shapes = [
        jax.ShapeDtypeStruct(export.symbolic_shape(s, scope=scope), w.dtype)
        for s in ("4*b, 3", "4*b")
    ]
    exported = export.export(jax.jit(f))(w, *shapes)
    for b in (1, 3):
        x = jax.random.normal(jax.random.key(b), (4 * b, 3))
        mask = (jnp.arange(4 * b) % 3 < 2).astype(w.dtype)
        (value, grad), info = exported.call(w, x, mask)
        wanted = jax.value_and_grad(loss)(w, x, mask)
        chex.assert_trees_all_close((value, grad), wanted, rtol=1e-5)
        assert info.weight == mask.sum()
