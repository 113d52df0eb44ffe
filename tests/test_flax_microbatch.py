"""`microbatch` with Flax: of NNX modules, and of Linen's `apply`."""

import chex
import flax.linen as nn
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
from tests.support import hlo
from tests.support.errors import refused
from tests.support.training import needs_in_place, promoting, slow
from tests.support.xla import optimized

pytestmark = pytest.mark.core

K = 3
X, Y = jnp.asarray(np.random.default_rng(0).normal(size=(2, 12, 4)), jnp.float32)


@pytest.fixture(autouse=True)
def _promotion(loose_promotion):
    """Flax's layers add biases of lower rank."""


def contrastive(z, other, scale=1.0):
    """Compares each example with all others: it is no sum over examples."""
    logits = scale * z @ other.T
    return -jnp.mean(jnp.diag(jax.nn.log_softmax(logits)))


def joined(parts):
    """The outputs of strided micro-batches, in the order of the batch."""
    return jnp.stack(parts, 1).reshape(-1, *parts[0].shape[1:])


def close(tree, other, rtol=1e-5, atol=1e-6):
    chex.assert_trees_all_close(arrays(tree), arrays(other), rtol=rtol, atol=atol)


def arrays(tree):
    """Its values, keys as numbers."""

    def numbers(x):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(x) if is_key else x

    tree = nnx.state(tree) if isinstance(tree, nnx.Pytree) else tree
    return jax.tree.map(numbers, nnx.as_pure(tree))


class MLP(nnx.Module):
    def __init__(self, seed=0):
        rngs = nnx.Rngs(seed)
        self.first = nnx.Linear(4, 8, rngs=rngs)
        self.last = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(jnp.tanh(self.first(x)))


class Normalised(nnx.Module):
    """BatchNorm and dropout."""

    def __init__(self, seed=0):
        rngs = nnx.Rngs(seed)
        self.first = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(8, 3, rngs=rngs)
        self.factor = nnx.Variable(jnp.ones([]))

    def __call__(self, x):
        z = self.dropout(jnp.tanh(self.norm(self.first(x))))
        return self.factor[...] * self.last(z)


class Rematerialised(Normalised):
    """Whose variables all hold new tracers after each call."""

    @nnx.remat
    def __call__(self, x):
        return super().__call__(x)


class Scanned(nnx.Module):
    """Whose layers are in a scan, which writes all their variables again."""

    def __init__(self):
        @nnx.split_rngs(splits=2)
        @nnx.vmap(in_axes=0, out_axes=0)
        def layers(rngs):
            return nnx.Sequential(
                nnx.Linear(4, 4, rngs=rngs),
                nnx.BatchNorm(4, momentum=0.9, rngs=rngs),
                nnx.Dropout(0.5, rngs=rngs),
            )

        self.layers = layers(nnx.Rngs(0))

    def __call__(self, x):
        body = nnx.remat(lambda x, layer: x + jnp.tanh(layer(x)))
        scan = nnx.scan(body, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return scan(x, self.layers)


class Towers(nnx.Module):
    def __init__(self, kind=MLP):
        self.image, self.text = kind(0), kind(1)
        self.scale = nnx.Param(jnp.asarray(2.0))


def call(model, x):
    return model(x)


ENCODE = oaf.microbatch(call, num_microbatches=K)


def in_sequence(model, x, count=K):
    """Micro-batches one after another, differentiated through all of them at once.

    The statistics are constants.
    """
    parts = []
    for i in range(count):
        parts.append(model(x[i::count]))
        stats = nnx.state(model, nnx.BatchStat)
        nnx.update(model, jax.tree.map(jax.lax.stop_gradient, stats))
    return joined(parts)


def alone(encode):
    """A loss over one tower."""

    def loss(model, x, *rest):
        z = encode(model, x, *rest)
        return contrastive(z, z)

    return loss


def two_towers(encode):
    def loss(model, x, y):
        image, text = encode(model.image, x), encode(model.text, y)
        return contrastive(image, text, model.scale[...])

    return loss


def value_and_grad(loss, wrt=nnx.Param):
    return nnx.jit(nnx.value_and_grad(loss, argnums=nnx.DiffState(0, wrt)))


class TestModules:
    @pytest.mark.parametrize(
        "options", [{"num_microbatches": 4}, {"microbatch_size": 5}]
    )
    def test_value_and_gradients_are_those_of_the_whole_batch(self, options):
        encode = oaf.microbatch(call, **options)
        result = value_and_grad(two_towers(encode))(Towers(), X, Y)
        expected = value_and_grad(two_towers(call))(Towers(), X, Y)
        close(result, expected)
        chex.assert_trees_all_equal_structs(result, expected)

    @needs_in_place
    def test_gradients_are_added_in_place(self):
        encode = oaf.microbatch(call, num_microbatches=K, in_place=True)
        result = value_and_grad(alone(encode))(Normalised(), X)
        close(result, value_and_grad(alone(in_sequence))(Normalised(), X))

    def test_two_towers_may_be_one_module(self):
        def shared(kind):
            model = Towers(kind)
            model.text = model.image
            return model

        result = value_and_grad(two_towers(ENCODE))(shared(MLP), X, Y)
        close(result, value_and_grad(two_towers(call))(shared(MLP), X, Y))
        model, by_hand = shared(Normalised), shared(Normalised)
        result = value_and_grad(two_towers(ENCODE))(model, X, Y)
        close(result, value_and_grad(two_towers(in_sequence))(by_hand, X, Y))
        close(model, by_hand)
        assert model.image.dropout.rngs.count[...] == 2 * K

    @pytest.mark.parametrize("kind", [Normalised, Rematerialised, slow(Scanned)])
    def test_state_and_gradients_are_those_of_micro_batches_in_sequence(self, kind):
        """With the same dropout, and statistics that move once per micro-batch."""
        model, by_hand = kind(), kind()
        result = value_and_grad(alone(ENCODE))(model, X)
        close(result, value_and_grad(alone(in_sequence))(by_hand, X))
        close(model, by_hand)
        counts = jax.tree.leaves(nnx.as_pure(nnx.state(model, nnx.RngCount)))
        assert all(jnp.all(count == K) for count in counts)

    def test_both_passes_drop_the_same(self):
        """What is linear in a parameter is its derivative times it, to the bit."""

        class Dropped(nnx.Module):
            def __init__(self):
                self.factor = nnx.Param(jnp.ones([]))
                self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))

            def __call__(self, x):
                return self.factor[...] * self.dropout(x)

        def loss(model, x):
            return jnp.sum(ENCODE(model, x) * 2.0 ** jnp.arange(12)[:, None])

        value, grads = value_and_grad(loss)(Dropped(), jnp.ones((12, 1)))
        assert value == grads["factor"][...]
        assert 0 < value < 2 * (2**12 - 1)

    def test_training_equals_that_of_micro_batches_in_sequence(self):
        def trained(encode):
            model = Normalised()
            inner = promoting(optax.sgd(0.1, momentum=0.9))
            optimizer = nnx.Optimizer(model, inner, wrt=nnx.Param)

            @nnx.jit
            def step(model, optimizer, x):
                grads = nnx.grad(alone(encode))(model, x)
                optimizer.update(model, grads)

            for i in range(3):
                step(model, optimizer, X + i)
            return model

        model = trained(ENCODE)
        close(model, trained(in_sequence), rtol=1e-4, atol=1e-5)
        assert model.dropout.rngs.count[...] == 3 * K

    def test_in_evaluation_the_module_stays_the_same_arrays(self):
        model = Normalised()
        nnx.jit(ENCODE)(model, X)
        model = nnx.view(model, use_running_average=True, deterministic=True)
        before = jax.tree.leaves(nnx.as_pure(nnx.state(model)))
        result = nnx.value_and_grad(alone(ENCODE))(model, X)
        close(result, nnx.value_and_grad(alone(call))(model, X))
        after = jax.tree.leaves(nnx.as_pure(nnx.state(model)))
        assert all(x is y for x, y in zip(before, after, strict=True))

    @pytest.mark.parametrize(
        "wrt",
        [
            slow(nnx.PathContains("factor")),  # which is no parameter
            slow(nnx.PathContains("last")),
            nnx.Any(nnx.Param, nnx.PathContains("factor")),
        ],
    )
    def test_gradients_go_to_what_is_asked_for(self, wrt):
        model, by_hand = Normalised(), Normalised()
        result = value_and_grad(alone(ENCODE), wrt)(model, X)
        close(result, value_and_grad(alone(in_sequence), wrt)(by_hand, X))
        assert all(jnp.any(x != 0) for x in jax.tree.leaves(arrays(result[1])))

    def test_statistics_that_are_only_read_are_differentiated(self):
        model = nnx.view(Normalised(), use_running_average=True, deterministic=True)
        result = value_and_grad(alone(ENCODE), nnx.BatchStat)(model, X)
        close(result, value_and_grad(alone(call), nnx.BatchStat)(model, X))

    def test_a_frozen_base_has_no_gradient_beside_that_of_its_adapters(self):
        class Adapted(nnx.Module):
            def __init__(self):
                self.base = nnx.Linear(256, 256, rngs=nnx.Rngs(0))
                self.lora = nnx.LoRA(256, 2, 256, rngs=nnx.Rngs(1))

            def __call__(self, x):
                return self.lora(x) + self.base(x)

        x, model = jnp.ones((12, 256)), Adapted()
        step = value_and_grad(alone(ENCODE), nnx.LoRAParam)
        assert list(step(model, x)[1]) == ["lora"]
        assert hlo.temporaries(optimized(step.lower(model, x))) < 256 * 256 * 4

    @pytest.mark.parametrize("by_name", [False, True])
    def test_all_modules_among_the_arguments_are_differentiated(self, by_name):
        """Also if they are not the first, or share parameters."""

        def both_of(encode):
            def loss(model, x):
                rest = {"head": model["head"]}
                if by_name:
                    z = encode(x, model=model["mlp"], rest=rest)
                else:
                    z = encode(x, model["mlp"], rest)
                return contrastive(z, z)

            return loss

        def models():
            mlp = MLP()
            return nnx.Dict(mlp=mlp, head=mlp.last)

        def both(x, model, rest):
            hidden = jnp.tanh(model.first(x))
            return rest["head"](hidden) + model.last(hidden**2)

        encode = oaf.microbatch(both, num_microbatches=K, batch_argnums=0)
        result = value_and_grad(both_of(encode))(models(), X)
        close(result, value_and_grad(both_of(both))(models(), X))

    def test_random_streams_among_the_arguments_move_on(self):
        def noisy(model, x, rngs):
            return model(x + jax.random.normal(rngs.noise(), x.shape))

        def noisy_in_sequence(model, x, rngs):
            return joined([noisy(model, x[i::K], rngs) for i in range(K)])

        encode = oaf.microbatch(noisy, num_microbatches=K)
        rngs, by_hand = nnx.Rngs(noise=1), nnx.Rngs(noise=1)
        result = value_and_grad(alone(encode))(MLP(), X, rngs)
        expected = value_and_grad(alone(noisy_in_sequence))(MLP(), X, by_hand)
        close(result, expected)
        assert rngs.noise.count[...] == by_hand.noise.count[...] == K

    def test_a_micro_batch_of_weight_0_leaves_the_module_unchanged(self):
        """And `weight` is called as the function is: with a module."""

        def weight(model, x):
            assert isinstance(model, Normalised)
            return jnp.sum(x[:, 0] < 10)

        encode = oaf.microbatch(
            call, num_microbatches=2, weight=weight, outputs="stack"
        )
        x = X.at[1::2].set(jnp.inf)
        model, by_hand = Normalised(), Normalised()

        def first(model, x):
            return jnp.mean(encode(model, x)[0] ** 2)

        def expected(model, x):
            return jnp.mean(model(x[::2]) ** 2)

        value, _ = value_and_grad(first)(model, x)
        np.testing.assert_allclose(value, expected(by_hand, x), rtol=1e-6)
        close(model, by_hand)

    def test_outputs_may_be_summed_and_averaged(self):
        def with_moments(model, x):
            z = model(x)
            return z, {"mean": z.mean(0), "sum": z.sum(0)}

        encode = oaf.microbatch(
            with_moments,
            microbatch_size=5,
            outputs=("concat", {"mean": "mean", "sum": "sum"}),
        )
        close(nnx.jit(encode)(MLP(), X), with_moments(MLP(), X))

    def test_memory_is_that_of_one_micro_batch(self):
        class Deep(nnx.Module):
            def __init__(self):
                rngs = nnx.Rngs(0)
                self.first = nnx.Linear(4, 64, rngs=rngs)
                self.norm = nnx.BatchNorm(64, rngs=rngs)
                self.last = nnx.Linear(64, 1, rngs=rngs)

            def __call__(self, x):
                return self.last(jnp.tanh(self.norm(self.first(x))))

        def temporaries(encode):
            def loss(model, x):
                z = encode(model, x)
                return jnp.mean((z - z.mean()) ** 2)

            lowered = value_and_grad(loss).lower(Deep(), jnp.ones((4096, 4)))
            return hlo.temporaries(optimized(lowered))

        in_parts = oaf.microbatch(call, num_microbatches=16)
        assert temporaries(in_parts) < temporaries(call) / 8


class TestRefusals:
    @pytest.mark.parametrize("wrap", [lambda m: m, slow(lambda m: {"tower": m})])
    def test_microbatch_of_trees_refuses_what_it_would_not_write_to(self, wrap):
        def of(model, x):
            return (model["tower"] if isinstance(model, dict) else model)(x)

        encode = jax.jit(oa.microbatch(of, num_microbatches=K))
        with refused("`model`", "a Normalised", "optax_accum.flax.microbatch takes it"):
            encode(wrap(Normalised()), X)
        # Of which all is parameters.
        close(encode(wrap(MLP()), X), MLP()(X))

        def noisy(x, rngs):
            return x + jax.random.normal(rngs(), x.shape)

        draw = oa.microbatch(noisy, num_microbatches=K, batch_argnums=0)
        with refused("`rngs` is an NNX module, a Rngs"):
            draw(X, rngs=nnx.Rngs(0))

    def test_what_no_derivative_can_go_to_is_refused(self):
        layer = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
        model = nnx.WeightNorm(layer, rngs=nnx.Rngs(0))
        with refused("only read parameters", "layer_instance.kernel", "nnx.clone"):
            nnx.jit(ENCODE)(model, X)
        of_a_copy = oaf.microbatch(lambda m, x: nnx.clone(m)(x), num_microbatches=K)
        result = value_and_grad(alone(of_a_copy))(model, X)
        close(result, value_and_grad(alone(call))(model, X))

    def test_a_module_must_keep_its_variables_and_attributes(self):
        def adds(model, x):
            model.hidden = nnx.Intermediate(x)
            return model(x)

        def sets(model, x):
            model.calls = 1
            return model(x)

        with refused("the function must leave", "added model.hidden", "nnx.pop"):
            oaf.microbatch(adds, num_microbatches=K)(MLP(), X)
        with refused("the function must leave", "plain attributes"):
            oaf.microbatch(sets, num_microbatches=K)(MLP(), X)

    def test_wrong_arguments_are_refused(self):
        with refused("`fun` must be a function", "a MLP", "lambda model, x: model(x)"):
            oaf.microbatch(MLP(), num_microbatches=K)
        with refused("`carry_argnum=0`", "carry their own state"):
            oaf.microbatch(call, num_microbatches=K, carry_argnum=0)
        swapped = oaf.microbatch(lambda x, model: model(x), num_microbatches=K)
        with refused("`model` is a batch argument", "parameters", "`batch_argnums`"):
            swapped(X, MLP())
        with refused("`num_microbatches` and `microbatch_size`"):
            oaf.microbatch(call)


@pytest.mark.several_devices
class TestDevices:
    COUNT = jax.device_count()
    BATCH = jnp.asarray(
        np.random.default_rng(1).normal(size=(4 * COUNT, 4)), jnp.float32
    )

    def mesh(self):
        return jax.make_mesh((self.COUNT,), ("data",), axis_types=(AxisType.Auto,))

    def test_on_a_mesh_gradients_are_those_of_the_whole_batch(self):
        encode = oaf.microbatch(
            call, num_microbatches=2, mesh=self.mesh(), axis_name="data"
        )
        result = value_and_grad(two_towers(encode))(Towers(), self.BATCH, -self.BATCH)
        expected = value_and_grad(two_towers(call))(Towers(), self.BATCH, -self.BATCH)
        close(result, expected)

    def test_on_a_mesh_statistics_are_averaged_and_dropout_differs(self):
        def dropped(model, x):
            return model(x), model.dropout(jnp.ones((1, 64))) != 0

        encode = oaf.microbatch(
            dropped,
            num_microbatches=2,
            mesh=self.mesh(),
            axis_name="data",
            outputs=("concat", "stack"),
        )
        model = Normalised()
        key = arrays(nnx.state(model, nnx.RngKey))
        kept = nnx.jit(encode)(model, self.BATCH)[1]
        rows = np.asarray(kept).reshape(2 * self.COUNT, 64)
        assert len({row.tobytes() for row in rows}) == 2 * self.COUNT
        close(nnx.state(model, nnx.RngKey), key)
        assert model.dropout.rngs.count[...] == 4
        each = []
        for x in self.BATCH.reshape(self.COUNT, 4, 4):
            one = Normalised()
            in_sequence(one, x, 2)
            each.append(one.norm.var[...])
        np.testing.assert_allclose(model.norm.var[...], np.mean(each, 0), rtol=1e-5)

    def test_in_shard_map_outputs_may_be_gathered(self):
        encode = oaf.microbatch(call, num_microbatches=2)

        def gathered(encode):
            def loss(model, x):
                z = jax.lax.all_gather(encode(model, x), "data", tiled=True)
                return jax.lax.pmean(contrastive(z, z), "data")

            return loss

        in_parts = nnx.shard_map(
            nnx.value_and_grad(gathered(encode)),
            mesh=self.mesh(),
            in_specs=(P(), P("data")),
            out_specs=P(),
        )
        result = nnx.jit(in_parts)(MLP(), self.BATCH)
        close(result, value_and_grad(alone(call))(MLP(), self.BATCH))


class Dense(nn.Module):
    """Linen's, with dropout if asked for."""

    rate: float = 0.0

    @nn.compact
    def __call__(self, x, *, train=True):
        x = nn.tanh(nn.Dense(8)(x))
        return nn.Dense(3)(nn.Dropout(self.rate, deterministic=not train)(x))


class DenseNormalised(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=True):
        x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(nn.Dense(8)(x))
        return Dense(0.5)(nn.tanh(x), train=train)


class TestLinen:
    def test_apply_gives_the_gradients_of_the_whole_batch(self):
        model = Dense()
        params = model.init(jax.random.key(0), X)["params"]

        def loss_of(apply):
            def loss(params):
                z, other = apply({"params": params}, X), apply({"params": params}, Y)
                return contrastive(z, other)

            return jax.jit(jax.value_and_grad(loss))

        encode = oa.microbatch(model.apply, num_microbatches=K)
        close(loss_of(encode)(params), loss_of(model.apply)(params))

    @pytest.mark.parametrize("kind", ["typed", "raw"])
    def test_dropout_is_that_of_a_key_for_each_micro_batch(self, kind):
        model = Dense(0.5)
        variables = model.init(jax.random.key(0), X, train=False)
        key = (jax.random.key if kind == "typed" else jax.random.PRNGKey)(1)
        if kind == "raw":
            unnamed = oa.microbatch(model.apply, num_microbatches=K)
            with refused("`rngs['dropout']`", "rng_argnames='rngs'", "jax.random.key"):
                unnamed(variables, X, rngs={"dropout": key})
        encode = oa.microbatch(
            model.apply,
            num_microbatches=K,
            rng_argnames="rngs" if kind == "raw" else (),
        )

        def by_hand(variables, x, *, rngs):
            keys = [jax.random.fold_in(rngs["dropout"], i) for i in range(K)]
            return joined(
                [
                    model.apply(variables, x[i::K], rngs={"dropout": key})
                    for i, key in enumerate(keys)
                ]
            )

        def loss_of(apply):
            def loss(variables, key):
                z = apply(variables, X, rngs={"dropout": key})
                return contrastive(z, z)

            return jax.jit(jax.value_and_grad(loss))

        close(loss_of(encode)(variables, key), loss_of(by_hand)(variables, key))

    def test_statistics_and_gradients_are_those_of_micro_batches_in_sequence(self):
        model = DenseNormalised()
        variables = model.init(jax.random.key(0), X, train=False)
        params, stats = variables["params"], variables["batch_stats"]

        def encode(params, batch_stats, key, x):
            z, changed = model.apply(
                {"params": params, "batch_stats": batch_stats},
                x,
                mutable=["batch_stats"],
                rngs={"dropout": key},
            )
            return z, changed["batch_stats"]

        def by_hand(params, stats, key, x):
            parts = []
            for i in range(K):
                z, stats = encode(params, stats, jax.random.fold_in(key, i), x[i::K])
                stats = jax.lax.stop_gradient(stats)
                parts.append(z)
            return joined(parts), stats

        def loss_of(encode):
            def loss(params, stats, key):
                z, stats = encode(params, stats, key, X)
                return contrastive(z, z), stats

            return jax.jit(jax.value_and_grad(loss, has_aux=True))

        in_parts = oa.microbatch(
            encode, num_microbatches=K, batch_argnums=3, carry_argnum=1
        )
        result = loss_of(in_parts)(params, stats, jax.random.key(1))
        expected = loss_of(by_hand)(params, stats, jax.random.key(1))
        close(result, expected)

        def evaluate(variables):
            apply = oa.microbatch(model.apply, num_microbatches=K)
            return apply(variables, X, train=False)

        variables = {"params": params, "batch_stats": expected[0][1]}
        whole = model.apply(variables, X, train=False)
        close(jax.jit(evaluate)(variables), whole)


@pytest.mark.parametrize("options", [{}, {"weight": lambda _, x: jnp.sum(x > -10)}])
def test_what_a_function_only_reads_of_its_carry_is_differentiated(options):
    """And what it writes is not."""

    def encode(carry, x):
        z = jnp.tanh(x @ carry["w"]) * carry["mean"]
        return z, carry | {"mean": 0.9 * carry["mean"] + 0.1 * x.mean()}

    def by_hand(carry, x):
        parts = []
        for i in range(K):
            z, after = encode(carry, x[i::K])
            carry = carry | {"mean": jax.lax.stop_gradient(after["mean"])}
            parts.append(z)
        return joined(parts), carry

    def loss_of(encode):
        def loss(w, x):
            z, _ = encode({"w": w, "mean": jnp.ones([]), "none": None}, x)
            return contrastive(z, z)

        return jax.jit(jax.value_and_grad(loss, (0, 1)))

    in_parts = oa.microbatch(encode, num_microbatches=K, carry_argnum=0, **options)
    close(loss_of(in_parts)(jnp.ones((4, 2)), X), loss_of(by_hand)(jnp.ones((4, 2)), X))
