"""`value_and_grad` and `Optimizer` of `optax_accum.flax`, in NNX's own loops."""

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
from tests.support import hlo
from tests.support.training import needs_in_place, promoting, slow
from tests.support.xla import optimized

pytestmark = pytest.mark.core

SIZES = (3, 1, 4, 4, 1, 3)  # examples in six micro-batches: two windows of three
X = jnp.asarray(np.random.default_rng(0).normal(size=(sum(SIZES), 4)), jnp.float32)
PARTS = jnp.split(X, np.cumsum(SIZES)[:-1])
INNER = promoting(optax.adamw(optax.linear_schedule(0.1, 0.01, 3), weight_decay=0.1))
COUNT = jax.device_count()


class MLP(nnx.Module):
    """Two layers; what makes no sum over examples is left out."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first = nnx.Linear(4, 8, rngs=rngs)
        self.last = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x):
        return self.last(jnp.tanh(self.first(x)))


class Normalised(nnx.Module):
    """BatchNorm and dropout."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first = nnx.Linear(4, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(self.norm(self.first(x))))


@pytest.fixture(autouse=True)
def _promotion(loose_promotion):
    """NNX's layers add biases of lower rank."""


def loss_fn(model, x):
    return jnp.mean((model(x) - 1) ** 2)


def arrays(node):
    """The values in a module or a state, keys as numbers."""
    state = nnx.state(node) if isinstance(node, nnx.Module) else node

    def numbers(x):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return jax.random.key_data(x) if is_key else x

    return jax.tree.map(numbers, nnx.as_pure(state))


def close(tree, other, rtol=1e-5, atol=1e-6):
    chex.assert_trees_all_close(arrays(tree), arrays(other), rtol=rtol, atol=atol)


def same(tree, other):
    jax.tree.map(np.testing.assert_array_equal, arrays(tree), arrays(other))


class TestValueAndGrad:
    @pytest.mark.parametrize("size", [slow(4), 5, slow(16)])
    def test_value_and_gradient_are_those_of_the_whole_batch(self, size):
        model = MLP()
        in_parts = oaf.value_and_grad(loss_fn, microbatch_size=size)
        value, grads = nnx.jit(in_parts)(model, X)
        expected, expected_grads = nnx.value_and_grad(loss_fn)(model, X)
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        close(grads, expected_grads)
        chex.assert_trees_all_equal_structs(grads, expected_grads)

    @pytest.mark.usefixtures("first_warning")
    def test_a_second_call_without_jit_warns_of_nnx_jit(self):
        model, in_parts = MLP(), oaf.value_and_grad(loss_fn, num_microbatches=4)
        nnx.jit(in_parts)(model, X)
        in_parts(model, X)
        with pytest.warns(UserWarning, match=r"nnx\.jit\(oaf\."):
            in_parts(model, X)

    def test_a_weight_may_come_out_of_the_loss(self):
        """The number of examples that the module itself lets count."""

        def counted(model, x):
            prediction = model(x)
            kept = prediction > prediction[0]
            total = jnp.sum(jnp.where(kept, (prediction - 1) ** 2, 0))
            return total / jnp.maximum(kept.sum(), 1), kept.sum()

        def weight(model, x, aux):
            assert isinstance(model, MLP)
            del x
            return aux

        def by_hand(model):
            parts = [counted(model, X[i::4]) for i in range(4)]
            return sum(v * n for v, n in parts) / sum(n for _, n in parts)

        model = MLP()
        in_parts = oaf.value_and_grad(
            counted,
            has_aux=True,
            num_microbatches=4,
            weight=weight,
            aux="sum",
            return_info=True,
        )
        ((value, count), grads), info = nnx.jit(in_parts)(model, X)
        expected, expected_grads = nnx.value_and_grad(by_hand)(model)
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        close(grads, expected_grads)
        assert count == info.weight

    def test_state_and_outputs_are_those_of_micro_batches_in_sequence(self):
        """In values, gradients, statistics, random streams and auxiliary output."""

        def with_aux(model, x):
            prediction = model(x)
            return jnp.mean(prediction**2), (prediction, model.norm.mean[...])

        model, by_hand = Normalised(), Normalised()
        in_parts = oaf.value_and_grad(with_aux, has_aux=True, num_microbatches=4)
        (value, (predictions, means)), grads = nnx.jit(in_parts)(model, X)
        alone = nnx.jit(nnx.value_and_grad(with_aux, has_aux=True))
        results = [alone(by_hand, X[i::4]) for i in range(4)]
        np.testing.assert_allclose(
            value, np.mean([v for (v, _), _ in results]), rtol=1e-6
        )
        close(grads, jax.tree.map(lambda *g: sum(g) / 4, *(g for _, g in results)))
        for i, ((_, (prediction, mean)), _) in enumerate(results):
            np.testing.assert_allclose(predictions[i], prediction, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(means[i], mean, rtol=1e-5, atol=1e-7)
        close(model, by_hand)
        assert model.dropout.rngs.count[...] == 4

    def test_each_micro_batch_has_its_own_dropout(self):
        def dropped(model, x):
            kept = model.dropout(jnp.ones_like(x)) != 0
            return jnp.mean(model(x)), kept

        in_parts = oaf.value_and_grad(dropped, has_aux=True, num_microbatches=4)
        (_, kept), _ = nnx.jit(in_parts)(Normalised(), X)
        assert len({row.tobytes() for row in np.asarray(kept)}) == 4

    def test_statistics_and_streams_carry_over_between_calls(self):
        model = Normalised()
        in_parts = nnx.jit(oaf.value_and_grad(loss_fn, num_microbatches=2))
        in_parts(model, X)
        first = np.asarray(model.norm.mean[...])
        in_parts(model, X)
        assert np.all(np.abs(model.norm.mean[...]) > np.abs(first))
        assert model.dropout.rngs.count[...] == 4

    def test_a_micro_batch_of_weight_0_leaves_the_module_unchanged(self):
        """And `weight` is called as the loss is: with a module."""

        def masked_loss(model, x, mask):
            errors = (model(x)[:, 0] - 1) ** 2
            return jnp.sum(errors * mask) / jnp.maximum(mask.sum(), 1)

        def count(model, x, mask):
            assert isinstance(model, Normalised)
            assert x.shape[0] == mask.shape[0]
            return mask.sum()

        mask = jnp.tile(jnp.array([1.0, 0.0]), 8)  # micro-batch 1 of 2 is padding
        x = jnp.where(mask[:, None] == 1, X, jnp.nan)
        model, by_hand = Normalised(), Normalised()
        in_parts = oaf.value_and_grad(
            masked_loss, num_microbatches=2, batch_argnums=(1, -1), weight=count
        )
        value, grads = nnx.jit(in_parts)(model, x, mask)
        expected, expected_grads = nnx.value_and_grad(masked_loss)(
            by_hand, X[::2], mask[::2]
        )
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        close(grads, expected_grads)
        close(model, by_hand)

    def test_skip_and_noise_scale_pass_through(self):
        model = MLP()
        x = X.at[0].set(jnp.nan)
        in_parts = oaf.value_and_grad(
            loss_fn,
            num_microbatches=8,
            skip=oa.skip_not_finite,
            noise_scale=True,
        )
        (value, _), info = nnx.jit(in_parts)(model, x)
        kept = jnp.concatenate([X[i::8] for i in range(1, 8)])
        np.testing.assert_allclose(value, loss_fn(model, kept), rtol=1e-6)
        assert (info.skipped, info.weight, info.noise_scale.count) == (1, 14, 1)

    def test_batches_by_name_and_keys_pass_through(self):
        def noisy(model, key, *, x):
            return jnp.mean((model(x) + jax.random.normal(key)) ** 2)

        in_parts = oaf.value_and_grad(
            noisy,
            num_microbatches=2,
            batch_argnums=(),
            batch_argnames="x",
            rng_argnums=-1,
        )
        key, model = jax.random.key(3), MLP()
        value, _ = nnx.jit(in_parts)(model, key, x=X)
        each = [noisy(model, jax.random.fold_in(key, i), x=X[i::2]) for i in range(2)]
        np.testing.assert_allclose(value, np.mean(each), rtol=1e-6)

    def test_wrt_selects_the_variables(self):
        model = MLP()
        only = nnx.All(nnx.Param, nnx.PathContains("last"))
        _, grads = oaf.value_and_grad(loss_fn, wrt=only, num_microbatches=2)(model, X)
        expected = nnx.grad(loss_fn, argnums=nnx.DiffState(0, only))(model, X)
        close(grads, expected)
        assert list(grads) == ["last"]

    def test_intermediates_must_be_popped(self):
        class Keeping(MLP):
            def __call__(self, x):
                self.hidden = nnx.Intermediate(jnp.tanh(self.first(x)))
                return self.last(self.hidden[...])

        with pytest.raises(
            ValueError, match=r"added hidden.*nnx\.pop\(model, nnx\.Int"
        ):
            oaf.value_and_grad(loss_fn, num_microbatches=2)(Keeping(), X)

        def popped(model, x):
            value = loss_fn(model, x)
            return value, nnx.pop(model, nnx.Intermediate)["hidden"][...]

        in_parts = oaf.value_and_grad(
            popped, has_aux=True, aux="concat", num_microbatches=2
        )
        model = Keeping()
        (_, hidden), _ = nnx.jit(in_parts)(model, X)
        np.testing.assert_allclose(hidden, jnp.tanh(model.first(X)), rtol=1e-5)

    def test_changes_that_would_be_lost_are_refused(self):
        class Codebook(nnx.Module):
            def __init__(self, kind):
                self.w, self.calls = nnx.Param(jnp.ones(4)), 0
                self.code = kind(jnp.zeros(4))

            def __call__(self, x, *, count=False):
                self.code[...] = 0.5 * self.code[...] + 0.5 * x.mean(0)
                self.calls += count
                return x * self.w[...]

        @nnx.remat
        def remat_loss(model, x):
            return loss_fn(model, x)

        in_parts = oaf.value_and_grad(loss_fn, num_microbatches=2)
        with pytest.raises(ValueError, match=r"only read .*batch to code\."):
            in_parts(Codebook(nnx.Param), X)
        with pytest.raises(ValueError, match=r"only read .*batch to code\."):
            oaf.value_and_grad(remat_loss, num_microbatches=2)(Codebook(nnx.Param), X)
        model = Codebook(nnx.Variable)
        in_parts(model, X)
        expected = 0.25 * X[::2].mean(0) + 0.5 * X[1::2].mean(0)
        np.testing.assert_allclose(model.code[...], expected, rtol=1e-5)

        def counting(model, x):
            return jnp.mean(model(x, count=True) ** 2)

        with pytest.raises(
            ValueError, match=r"plain attributes as they were.*nnx\.view"
        ):
            oaf.value_and_grad(counting, num_microbatches=2)(model, X)

        def narrowing(model, x):
            model.code = nnx.Variable(jnp.zeros(3))
            return jnp.mean(x * model.w[...])

        with pytest.raises(ValueError, match=r"of code from .*\[4\] to .*\[3\]"):
            oaf.value_and_grad(narrowing, num_microbatches=2)(model, X)

    def test_value_and_grad_of_trees_refuses_a_module_with_state(self):
        with pytest.raises(
            TypeError, match=r"`model` is an NNX module.*flax\.value_and"
        ):
            oa.value_and_grad(loss_fn, num_microbatches=2)(Normalised(), X)

        def two(models, x):
            return loss_fn(models["first"], x) + loss_fn(models["second"][0], x)

        models = {"first": MLP(), "second": [Normalised()]}
        with pytest.raises(TypeError, match=r"`models` holds an NNX module, a Norm"):
            jax.jit(oa.value_and_grad(two, num_microbatches=2))(models, X)
        in_parts = oa.value_and_grad(loss_fn, num_microbatches=2)
        value, _ = in_parts(MLP(), X)  # of which all is parameters
        np.testing.assert_allclose(value, loss_fn(MLP(), X), rtol=1e-6)

    def test_a_variable_may_hold_a_tree_of_arrays(self):
        class Tree(nnx.Module):
            def __init__(self):
                self.both = nnx.Param({"w": jnp.ones(4), "b": jnp.zeros([])})

            def __call__(self, x):
                return x @ self.both["w"] + self.both["b"]

        value, grads = oaf.value_and_grad(loss_fn, num_microbatches=2)(Tree(), X)
        np.testing.assert_allclose(value, loss_fn(Tree(), X), rtol=1e-6)
        close(grads, nnx.grad(loss_fn)(Tree(), X))

    def test_wrong_arguments_are_refused(self):
        with pytest.raises(TypeError, match=r"`argnums` cannot be .*with `wrt`"):
            oaf.value_and_grad(loss_fn, argnums=0, num_microbatches=2)
        with pytest.raises(
            ValueError, match=r"`batch_argnums` names .*`batch_argnames`"
        ):
            oaf.value_and_grad(loss_fn, num_microbatches=2)(MLP())
        with pytest.raises(
            ValueError, match="`num_microbatches` and `microbatch_size`"
        ):
            oaf.value_and_grad(loss_fn)
        with pytest.raises(
            ValueError, match="`carry_argnum=2` cannot be used with a m"
        ):
            oaf.value_and_grad(loss_fn, num_microbatches=2, carry_argnum=2)
        in_parts = oaf.value_and_grad(loss_fn, num_microbatches=2)
        with pytest.raises(TypeError, match=r"must be an NNX module; got a dict\."):
            in_parts({"w": X}, X)
        with pytest.raises(TypeError, match=r"NNX module; got an int\."):
            in_parts(1, X)
        with pytest.raises(TypeError, match=r"NNX module; got the class MLP itself\."):
            in_parts(MLP, X)
        for call in (in_parts, jax.jit(in_parts)):  # in which it is a tracer
            with pytest.raises(TypeError, match=r"NNX module; got an array\."):
                call(X, X)
        with pytest.raises(TypeError, match=r"`fun` must return \(value, aux\)"):
            oaf.value_and_grad(loss_fn, has_aux=True, num_microbatches=2)(MLP(), X)
        with pytest.raises(ValueError, match="`batch_argnums` names the positional"):
            oaf.value_and_grad(loss_fn, num_microbatches=2, batch_argnums=3)(MLP(), X)

    def test_nnx_scan_loses_the_statistics_that_value_and_grad_keeps(self):
        """The trap: `nnx.scan` with the module broadcast drops what it updates."""
        model = Normalised()

        @nnx.scan(in_axes=(nnx.Carry, None, 0), out_axes=(nnx.Carry, 0))
        def scan(total, model, x):
            return total + loss_fn(model, x), None

        scan(jnp.zeros([]), model, X.reshape(4, 4, 4))
        assert np.all(model.norm.mean[...] == 0)
        oaf.value_and_grad(loss_fn, num_microbatches=4)(model, X)
        assert np.all(model.norm.mean[...] != 0)

    def test_memory_is_that_of_one_micro_batch(self):
        model = MLP()
        x = jnp.ones((4096, 4))

        def temporaries(function):
            return hlo.temporaries(optimized(nnx.jit(function).lower(model, x)))

        whole = temporaries(nnx.value_and_grad(loss_fn))
        parts = temporaries(oaf.value_and_grad(loss_fn, num_microbatches=16))
        assert parts < whole / 8


class Adapted(nnx.Module):
    """Low-rank adapters beside what was trained before, and stays as it is."""

    def __init__(self, dtype=jnp.float32, width=4):
        rngs = nnx.Rngs(0)
        self.base = nnx.Linear(width, width, rngs=rngs, param_dtype=dtype)
        self.norm = nnx.BatchNorm(width, use_running_average=True, rngs=rngs)
        self.lora = nnx.LoRA(width, 2, width, rngs=rngs)
        self.calls = nnx.Variable(jnp.zeros([]))

    def __call__(self, x):
        self.calls[...] += 1
        return self.lora(x) + self.base(self.norm(x)).astype(x.dtype)


def values(model):
    """The arrays in a module, but for its counter: the very ones."""
    state = nnx.state(model, nnx.Not(nnx.PathContains("calls")))
    return jax.tree.leaves(nnx.as_pure(state))


def a_copy_of_its_own(model, x):
    """A copy in the module, which is an average of it, is only read."""
    return loss_fn(model, x) + jnp.mean((model(x) - model.target(x)) ** 2)


class TestWhatIsNotWritten:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            slow({"num_microbatches": None, "microbatch_size": 5}),
            {"skip": oa.skip_not_finite},
            slow({"weight": lambda _, x: jnp.sum(x > 0)}),
        ],
    )
    @pytest.mark.parametrize("kind", ["Adapted", "Rematerialised"])
    def test_a_frozen_base_stays_the_same_arrays(self, options, kind):
        model = globals()[kind](jnp.bfloat16)
        before = values(model)
        options = {"num_microbatches": 4, "wrt": nnx.LoRAParam} | options
        _, grads = oaf.value_and_grad(loss_fn, **options)(model, X)
        assert all(x is y for x, y in zip(before, values(model), strict=True))
        assert model.calls[...] == 4
        assert list(grads) == ["lora"]

    def test_all_that_is_only_read_stays_the_same_arrays(self):
        """Statistics in evaluation, an average of the module, a frozen encoder."""

        class Averaged(Normalised):
            def __init__(self):
                super().__init__()
                self.target = Normalised()

        model = nnx.view(Averaged(), use_running_average=True, deterministic=True)
        before = jax.tree.leaves(nnx.as_pure(nnx.state(model)))
        last = nnx.All(nnx.Param, nnx.PathContains("last"))
        in_parts = oaf.value_and_grad(a_copy_of_its_own, wrt=last, num_microbatches=4)
        in_parts(model, X)
        after = jax.tree.leaves(nnx.as_pure(nnx.state(model)))
        assert all(x is y for x, y in zip(before, after, strict=True))


class Rematerialised(Adapted):
    """Whose variables all hold new tracers after each call."""

    @nnx.remat
    def __call__(self, x):
        return super().__call__(x)


class Noisy(nnx.Module):
    """Whose random streams come from outside."""

    def __init__(self):
        self.linear = nnx.Linear(4, 1, rngs=nnx.Rngs(0))
        self.dropout = nnx.Dropout(0.5)

    def __call__(self, x, rngs):
        return self.linear(self.dropout(x, rngs=rngs))


def streams():
    return nnx.Rngs(dropout=1, noise=2)


def noise(model, x, rngs):
    """A loss, and what was drawn for it."""
    drawn = jax.random.normal(rngs.noise())
    return jnp.mean((model(x, rngs) - drawn) ** 2), drawn


def in_sequence(count, rngs):
    """What `count` calls one after another draw, on average their gradient as well."""
    model = Noisy()
    alone = nnx.value_and_grad(noise, has_aux=True)
    results = [alone(model, X[i::count], rngs) for i in range(count)]
    drawn = [float(drawn) for (_, drawn), _ in results]
    grads = jax.tree.map(lambda *g: sum(g) / count, *(g for _, g in results))
    return drawn, grads


class TestOtherArguments:
    @pytest.mark.parametrize("place", ["second", "name", slow("in a dict")])
    @pytest.mark.parametrize("jit", [slow(lambda f: f), nnx.jit])
    def test_random_streams_are_drawn_from_as_in_successive_calls(self, place, jit):
        """And have moved on after it, for the caller."""

        def with_dict(model, x, rest):
            return noise(model, x, rest["all"][0])

        rngs, by_hand = streams(), streams()
        fun = with_dict if place == "in a dict" else noise
        in_parts = jit(oaf.value_and_grad(fun, has_aux=True, num_microbatches=4))
        if place == "second":
            (_, drawn), grads = in_parts(Noisy(), X, rngs)
        elif place == "name":
            (_, drawn), grads = in_parts(Noisy(), X, rngs=rngs)
        else:
            (_, drawn), grads = in_parts(Noisy(), X, {"all": [rngs], "factor": 2.0})
        wanted, expected = in_sequence(4, by_hand)
        assert drawn.tolist() == wanted
        close(grads, expected)
        assert rngs.noise.count[...] == rngs.dropout.count[...] == 4
        again, _ = in_sequence(4, by_hand)
        (_, drawn), _ = oaf.value_and_grad(noise, has_aux=True, num_microbatches=4)(
            Noisy(), X, rngs
        )
        assert drawn.tolist() == again

    def test_a_single_stream_or_variable_moves_on(self):
        def loss(model, x, stream, count):
            count[...] += x.sum()
            return jnp.mean(model(x)) + jax.random.normal(stream()), count[...]

        rngs, count = streams(), nnx.Variable(jnp.zeros([]))
        in_parts = oaf.value_and_grad(loss, has_aux=True, microbatch_size=5)
        (_, counts), _ = in_parts(MLP(), X, rngs.noise, count)
        assert rngs.noise.count[...] == 4
        np.testing.assert_allclose(count[...], X.sum(), rtol=1e-5)
        assert counts[-1] == count[...]

    def test_streams_that_the_module_has_too_are_one(self):
        class Owner(MLP):
            def __init__(self, rngs):
                super().__init__()
                self.rngs = rngs

        def loss(model, x, rngs):
            drawn = jnp.stack(
                [jax.random.normal(r.noise()) for r in (model.rngs, rngs)]
            )
            return jnp.mean(model(x)), drawn

        rngs, by_hand = streams(), streams()
        in_parts = oaf.value_and_grad(loss, has_aux=True, num_microbatches=2)
        (_, drawn), _ = nnx.jit(lambda m, x: in_parts(m, x, m.rngs))(Owner(rngs), X)
        wanted = [float(jax.random.normal(by_hand.noise())) for _ in range(4)]
        assert drawn.ravel().tolist() == wanted
        assert rngs.noise.count[...] == 4

    def test_another_module_goes_on_as_it_would_in_successive_calls(self):
        def loss(model, x, teacher, average):
            value = jnp.mean((model(x) - teacher(x)) ** 2)
            average.update(loss=value)
            return value

        teacher, by_hand = Normalised(), Normalised()
        average = nnx.metrics.Average("loss")
        fixed = jax.tree.leaves(nnx.as_pure(nnx.state(teacher, nnx.Param)))
        value, grads = oaf.value_and_grad(loss, num_microbatches=4)(
            MLP(), X, teacher, average
        )
        other = nnx.metrics.Average("loss")
        results = [
            nnx.value_and_grad(loss)(MLP(), X[i::4], by_hand, other) for i in range(4)
        ]
        np.testing.assert_allclose(value, np.mean([v for v, _ in results]), rtol=1e-6)
        close(grads, jax.tree.map(lambda *g: sum(g) / 4, *(g for _, g in results)))
        close(teacher, by_hand)
        np.testing.assert_allclose(average.compute(), other.compute(), rtol=1e-6)
        after = jax.tree.leaves(nnx.as_pure(nnx.state(teacher, nnx.Param)))
        assert all(x is y for x, y in zip(fixed, after, strict=True))

    def test_weight_is_called_with_the_same_arguments(self):
        def count(model, x, rngs):
            assert isinstance(model, Noisy)
            assert isinstance(rngs, nnx.Rngs)
            return jnp.sum(x[:, 0] > 0)

        rngs = streams()
        in_parts = oaf.value_and_grad(
            noise, has_aux=True, num_microbatches=2, weight=count, return_info=True
        )
        _, info = in_parts(Noisy(), X, rngs)
        assert info.weight == jnp.sum(X[:, 0] > 0)
        assert rngs.noise.count[...] == 2

    def test_parameters_that_two_arguments_share_are_refused(self):
        """Whether the gradient goes both ways cannot be known."""

        def loss(model, x, last):
            return jnp.mean(last(jnp.tanh(model.first(x))))

        model = MLP()
        in_parts = oaf.value_and_grad(loss, num_microbatches=2)
        with pytest.raises(
            ValueError, match=r"`last` must not hold.*last\.bias.*nnx\.clone"
        ):
            in_parts(model, X, model.last)
        in_parts(model, X, nnx.clone(model.last))
        first = nnx.All(nnx.Param, nnx.PathContains("first"))
        in_parts = oaf.value_and_grad(loss, wrt=first, num_microbatches=2)
        in_parts(model, X, model.last)  # which is not differentiated


def step(model, optimizer, x, **kwargs):
    value, grads = nnx.value_and_grad(loss_fn)(model, x)
    optimizer.update(model, grads, weight=len(x), value=value, **kwargs)


def global_batches(*batches):
    """What Flax's own `Optimizer` makes of the global batches."""
    model = MLP()
    optimizer = nnx.Optimizer(model, INNER, wrt=nnx.Param)
    for x in batches:
        optimizer.update(model, nnx.grad(loss_fn)(model, x))
    return model


WRAPPED = {
    "alone": lambda inner: oa.accumulate(inner, 3),
    "in a chain": lambda inner: optax.chain(
        optax.zero_nans(), oa.accumulate(inner, 3), optax.scale(1.0)
    ),
}


class TestOptimizer:
    @pytest.mark.parametrize(
        "wrap", [WRAPPED["alone"], slow(WRAPPED["in a chain"], id="in a chain")]
    )
    def test_windows_of_uneven_micro_batches_equal_global_batches(self, wrap):
        model = MLP()
        optimizer = oaf.Optimizer(model, wrap(INNER), wrt=nnx.Param)
        seen = []
        program = nnx.jit(step)
        for x in PARTS:
            program(model, optimizer, x)
            asked = optimizer.micro_step, optimizer.gradient_step, optimizer.has_updated
            seen.append(tuple(map(int, asked)))
            for query in (oa.micro_step, oa.gradient_step, oa.has_updated):
                expected = getattr(optimizer, query.__name__)
                assert query(optimizer) == query(optimizer.opt_state) == expected
        cut = sum(SIZES[:3])
        close(model, global_batches(X[:cut], X[cut:]))
        assert seen == [
            (1, 0, 0),
            (2, 0, 0),
            (0, 1, 1),
            (1, 1, 0),
            (2, 1, 0),
            (0, 2, 1),
        ]
        assert optimizer.step[...] == 6

    def test_a_python_boundary_closes_the_window(self):
        model = MLP()
        optimizer = oaf.Optimizer(model, oa.accumulate(INNER), wrt=nnx.Param)
        program = nnx.jit(step, static_argnames="boundary")
        for i, x in enumerate(PARTS):
            program(model, optimizer, x, boundary=i in (3, 5))
        cut = sum(SIZES[:4])
        close(model, global_batches(X[:cut], X[cut:]))

    def test_extra_arguments_reach_the_inner_optimizer(self):
        def update(updates, state, params=None, *, value, scale):
            del state, params
            return updates, value * scale

        record = optax.GradientTransformationExtraArgs(lambda _: jnp.zeros([]), update)
        tx = oa.accumulate(optax.chain(record, optax.sgd(0.1)), 3)
        model = MLP()
        optimizer = oaf.Optimizer(model, tx, wrt=nnx.Param)
        expected = loss_fn(model, X[: sum(SIZES[:3])])
        for x in PARTS[:3]:
            nnx.jit(step)(model, optimizer, x, scale=jnp.float32(2))
        value = optimizer.opt_state.inner_state[0][...]
        np.testing.assert_allclose(value, 2 * expected, rtol=1e-6)

    def test_queries_answer_for_the_optimizer(self):
        model = MLP()
        optimizer = oaf.Optimizer(model, oa.accumulate(INNER, 3), wrt=nnx.Param)
        grads = nnx.grad(loss_fn)(model, X)
        optimizer.update(model, grads, weight=2)
        close(oa.accumulated(optimizer), grads)
        assert oa.accumulated(optimizer)["last"]["bias"] > -jnp.inf

    def test_the_noise_scale_can_be_queried(self):
        model = MLP()
        tx = oa.accumulate(INNER, 2, noise_decay=0.9)
        optimizer = oaf.Optimizer(model, tx, wrt=nnx.Param)
        for x in PARTS[2:4]:
            step(model, optimizer, x)
        assert oa.noise.estimate(optimizer).count > 0

    def test_micro_step_can_be_compared_on_the_optimizer_but_not_in_opt_state(self):
        """The trap: `nnx.Optimizer` keeps every leaf in a variable."""
        optimizer = oaf.Optimizer(MLP(), oa.accumulate(INNER, 3), wrt=nnx.Param)
        with pytest.raises(TypeError):
            _ = optimizer.opt_state.micro_step > 0
        assert not optimizer.micro_step > 0

    def test_update_is_one_program_without_copies(self):
        def apply(model, optimizer, grads, weight):
            optimizer.update(model, grads, weight=weight)

        model = nnx.Linear(512, 384, rngs=nnx.Rngs(0))
        tx = oa.accumulate(optax.adamw(1e-3), 8)
        optimizer = oaf.Optimizer(model, tx, wrt=nnx.Param)
        grads = nnx.state(model, nnx.Param)
        jitted = nnx.jit(apply, donate_argnums=(0, 1))
        program = optimized(jitted.lower(model, optimizer, grads, jnp.float32(1)))
        params = jax.tree.leaves(grads)
        assert hlo.temporaries(program) < 0.01 * hlo.nbytes(params)
        assert hlo.large_copies(program, 512 * 384) == []

    def test_update_is_traced_once(self):
        model = MLP()
        optimizer = oaf.Optimizer(model, oa.accumulate(INNER, 2), wrt=nnx.Param)
        program = nnx.jit(chex.assert_max_traces(step, n=1))
        for _ in range(5):
            program(model, optimizer, PARTS[0])
        assert optimizer.gradient_step == 2

    def test_micro_batches_inside_windows_equal_the_global_batch(self):
        model = MLP()
        optimizer = oaf.Optimizer(model, oa.accumulate(INNER, 2), wrt=nnx.Param)
        in_parts = oaf.value_and_grad(loss_fn, microbatch_size=2, return_info=True)

        @nnx.jit
        def both(model, optimizer, x):
            (value, grads), info = in_parts(model, x)
            optimizer.update(model, grads, weight=info.weight, value=value)

        for x in (X[:5], X[5:]):
            both(model, optimizer, x)
        close(model, global_batches(X))

    def test_arguments_in_the_wrong_order_are_refused(self):
        model = MLP()
        optimizer = oaf.Optimizer(model, oa.accumulate(INNER, 3), wrt=nnx.Param)
        grads = nnx.grad(loss_fn)(model, X)
        with pytest.raises(
            TypeError, match=r"`model` must be .* update\(model, grads\)"
        ):
            optimizer.update(grads, model)

    def test_multi_steps_is_refused_with_the_remedy(self):
        with pytest.raises(ValueError, match=r"Replace optax\.MultiSteps\(opt"):
            oaf.Optimizer(MLP(), optax.MultiSteps(INNER, 2), wrt=nnx.Param)

    def test_an_optimizer_that_does_not_accumulate_is_refused(self):
        with pytest.raises(ValueError, match="`tx` must accumulate"):
            oaf.Optimizer(MLP(), optax.adam(1e-3), wrt=nnx.Param)


MESH = jax.make_mesh((COUNT,), ("data",), axis_types=(AxisType.Auto,))
BATCH = jnp.asarray(np.random.default_rng(1).normal(size=(4 * COUNT, 4)), jnp.float32)


def pullback_step(model, optimizer, x, loss_fn=loss_fn, wrt=nnx.Param, **kwargs):
    value, pullback = oaf.value_and_pullback(loss_fn, wrt=wrt)(model, x)
    optimizer.update(model, pullback, weight=len(x), value=value, **kwargs)


class Layer(nnx.Module):
    """One of the layers of a scan."""

    def __init__(self, width, rngs):
        self.hidden = nnx.Linear(width, 2 * width, rngs=rngs)
        self.out = nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(self, x):
        return x + self.out(jnp.tanh(self.hidden(x)))


class Scanned(nnx.Module):
    """Rematerialised layers in a scan, NNX's or JAX's."""

    def __init__(self, way, count, width):
        self.way = way

        @nnx.split_rngs(splits=count)
        @nnx.vmap(in_axes=0, out_axes=0)
        def layers(rngs):
            return Layer(width, rngs)

        self.layers = layers(nnx.Rngs(0))

    def __call__(self, x):
        if self.way == "nnx.scan":
            body = nnx.remat(lambda x, layer: layer(x))
            return nnx.scan(body, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(
                x, self.layers
            )
        graphdef, layers = nnx.split(self.layers)
        body = jax.checkpoint(lambda x, layer: (nnx.merge(graphdef, layer)(x), None))
        return jax.lax.scan(body, x, layers)[0]


class TestPullbacks:
    @pytest.mark.parametrize("compiled", [True, slow(False)])
    @pytest.mark.parametrize("reduction", ["mean", slow("ratio")])
    def test_windows_of_uneven_micro_batches_equal_global_batches(
        self, compiled, reduction
    ):
        def loss(model, x):
            errors = (model(x) - 1) ** 2
            return errors.sum() if reduction == "ratio" else errors.mean()

        model = MLP()
        tx = oa.accumulate(INNER, 3, reduction=reduction)
        optimizer = oaf.Optimizer(model, tx, wrt=nnx.Param)
        program = nnx.jit(pullback_step, static_argnums=3)
        for x in PARTS:
            (program if compiled else pullback_step)(model, optimizer, x, loss)
        cut = sum(SIZES[:3])
        close(model, global_batches(X[:cut], X[cut:]))
        assert optimizer.step[...] == 6
        assert optimizer.gradient_step == 2

    @pytest.mark.parametrize("first", [True, False])
    def test_in_a_chain_they_train_as_gradients_do(self, first):
        """What comes before `oa.accumulate` sees gradients, and not residuals."""
        trained = []
        for take in (step, pullback_step):
            model = MLP()
            parts = oa.accumulate(optax.sgd(0.1), 2), optax.clip_by_global_norm(0.01)
            tx = optax.chain(*(parts if first else parts[::-1]))
            optimizer = oaf.Optimizer(model, tx, wrt=nnx.Param)
            program = nnx.jit(take)
            for x in (PARTS[2], PARTS[3]):
                program(model, optimizer, x)
            trained.append(model)
        by_gradient, by_pullback = trained
        close(by_pullback, by_gradient, rtol=1e-6, atol=1e-8)

    @pytest.mark.parametrize("compiled", [True, slow(False)])
    def test_statistics_streams_and_outputs_are_those_of_value_and_grad(self, compiled):
        def with_aux(model, x):
            prediction = model(x)
            return jnp.mean(prediction**2), (prediction, model.norm.mean[...])

        def run(way, model, optimizer, x):
            (value, aux), grads = way(with_aux, has_aux=True)(model, x)
            optimizer.update(model, grads, weight=len(x), value=value)
            return value, aux

        ways = nnx.value_and_grad, oaf.value_and_pullback
        models, results = [], []
        for way in ways:
            model = Normalised()
            tx = oa.accumulate(optax.sgd(0.1), 2)
            optimizer = oaf.Optimizer(model, tx, wrt=nnx.Param)
            program = nnx.jit(run, static_argnums=0) if compiled else run
            results.append([program(way, model, optimizer, x) for x in PARTS[2:6]])
            models.append(model)
        expected, result = results
        chex.assert_trees_all_close(result, expected, rtol=1e-5, atol=1e-6)
        by_gradient, by_pullback = models
        close(by_pullback, by_gradient)
        assert by_pullback.dropout.rngs.count[...] == 4

    def test_a_micro_batch_of_weight_0_contributes_nothing(self):
        @nnx.jit
        def run(model, optimizer, x, weight):
            _, pullback = oaf.value_and_pullback(loss_fn)(model, x)
            optimizer.update(model, pullback, weight=weight)

        model = MLP()
        tx = oa.accumulate(optax.sgd(0.1), 3)
        optimizer = oaf.Optimizer(model, tx, wrt=nnx.Param)
        parts = (PARTS[2], 4), (PARTS[2] * jnp.nan, 0), (PARTS[3], 4)
        for x, weight in parts:
            run(model, optimizer, x, jnp.float32(weight))
        expected = MLP()
        own = nnx.Optimizer(expected, optax.sgd(0.1), wrt=nnx.Param)
        both = jnp.concatenate(PARTS[2:4])
        own.update(expected, nnx.grad(loss_fn)(expected, both))
        close(model, expected)

    @pytest.mark.parametrize("kind", ["Adapted", "Rematerialised"])
    def test_a_frozen_base_stays_the_same_arrays(self, kind):
        model, wrt = globals()[kind](jnp.bfloat16), nnx.LoRAParam
        before = values(model)
        _, pullback = oaf.value_and_pullback(loss_fn, wrt=wrt)(model, X)
        assert all(x is y for x, y in zip(before, values(model), strict=True))
        assert model.calls[...] == 1
        grads = nnx.grad(loss_fn, argnums=nnx.DiffState(0, wrt))(model, X)
        close(pullback(jnp.ones([]))[0], grads)
        optimizer = oaf.Optimizer(model, oa.accumulate(optax.sgd(0.1), 2), wrt=wrt)
        program = nnx.jit(pullback_step, static_argnums=(3, 4))
        program(model, optimizer, X, loss_fn, wrt)
        close(oa.accumulated(optimizer), grads)

    def test_random_streams_and_modules_among_the_arguments_move_on(self):
        model, rngs = Noisy(), streams()
        module = nnx.BatchNorm(4, rngs=nnx.Rngs(0))

        def loss(model, x, others):
            return noise(model, others["norm"](x), others["rngs"])

        with_aux = oaf.value_and_pullback(loss, has_aux=True)
        others = {"norm": module, "rngs": rngs}
        (value, drawn), pullback = nnx.jit(with_aux)(model, X, others)
        expected = {"norm": nnx.BatchNorm(4, rngs=nnx.Rngs(0)), "rngs": streams()}
        alone = nnx.value_and_grad(loss, has_aux=True)
        (wanted, drawn_alone), grads = alone(Noisy(), X, expected)
        np.testing.assert_allclose(value, wanted, rtol=1e-5)
        assert drawn == drawn_alone
        close(pullback(jnp.ones([]))[0], grads)
        close(module, expected["norm"])
        close(nnx.state(rngs), nnx.state(expected["rngs"]))

    def test_they_may_pass_from_one_compiled_function_to_another(self):
        model = MLP()
        tx = oa.accumulate(optax.sgd(0.1), 2)
        optimizer = oaf.Optimizer(model, tx, wrt=nnx.Param)

        def update(model, optimizer, pullback, weight):
            optimizer.update(model, pullback, weight=weight)

        forward = nnx.jit(oaf.value_and_pullback(loss_fn))
        backward = nnx.jit(chex.assert_max_traces(update, n=1))
        for x in (PARTS[2], PARTS[3]):
            _, pullback = forward(model, x)
            backward(model, optimizer, pullback, jnp.float32(len(x)))
        expected = MLP()
        own = nnx.Optimizer(expected, optax.sgd(0.1), wrt=nnx.Param)
        own.update(expected, nnx.grad(loss_fn)(expected, jnp.concatenate(PARTS[2:4])))
        close(model, expected)

    @needs_in_place
    @pytest.mark.parametrize("way", ["nnx.scan", "jax.lax.scan"])
    def test_no_gradient_stands_beside_the_window(self, way):
        """One of layers in a scan is as large as all parameters."""
        count, width = 8, 64

        def program(take):
            model = Scanned(way, count, width)
            tx = oa.accumulate(promoting(optax.adamw(1e-3)), 8)
            optimizer = oaf.Optimizer(model, tx, wrt=nnx.Param)
            jitted = nnx.jit(take, donate_argnums=(0, 1))
            return optimized(jitted.lower(model, optimizer, jnp.ones((2, width))))

        params = nnx.state(Scanned(way, count, width), nnx.Param)
        size = hlo.nbytes(jax.tree.leaves(params))
        assert hlo.temporaries(program(step)) > size
        compiled = program(pullback_step)
        assert hlo.temporaries(compiled) < 0.3 * size
        assert hlo.large_copies(compiled, count * width * 2 * width) == []

    def test_wrong_arguments_are_refused(self):
        model = MLP()
        tx = oa.accumulate(optax.sgd(0.1), 2)
        optimizer = oaf.Optimizer(model, tx, wrt=nnx.Param)
        with pytest.raises(TypeError, match=r"must be an NNX module; got an array\."):
            oaf.value_and_pullback(lambda x: loss_fn(model, x))(X)
        around = oaf.value_and_pullback(lambda _, x: loss_fn(model, x))
        for call in (around, nnx.jit(around)):
            with pytest.raises(
                ValueError, match=r"`loss_fn` must depend on .*outside of"
            ):
                call(model, X)
        with pytest.raises(ValueError, match=r"that `wrt` selects, here .*LoRAParam"):
            oaf.value_and_pullback(loss_fn, wrt=nnx.LoRAParam)(model, X)
        with pytest.raises(TypeError, match=r"a tuple of 2.*pass has_aux=True"):
            oaf.value_and_pullback(lambda m, x: (loss_fn(m, x), x))(model, X)
        with pytest.raises(TypeError, match=r"`fun` must return \(value, aux\)"):
            oaf.value_and_pullback(loss_fn, has_aux=True)(model, X)
        with pytest.raises(TypeError, match=r"scalar to differentiate; got shape \("):
            oaf.value_and_pullback(lambda m, x: m(x))(model, X)
        with pytest.raises(ValueError, match=r"`last` must not hold.*last\.bias"):
            oaf.value_and_pullback(lambda m, last: loss_fn(m, last(m.first(X))))(
                model, model.last
            )

        last = nnx.PathContains("last")
        params = nnx.split(model, nnx.Param, ...)[1]  # variables, not arrays
        others = {
            "wrt": oaf.value_and_pullback(loss_fn, wrt=last)(model, X)[1],
            "variables": jax.vjp(lambda p: jnp.sum(p.first.bias[...]), params)[1],
        }
        for pullback in others.values():
            with pytest.raises(
                ValueError, match=r"`grads` must .* of `model`: .*value_and_pullback\("
            ):
                optimizer.update(model, pullback)
        with pytest.raises(
            TypeError, match=r"a function of type.*value_and_pullback\("
        ):
            optimizer.update(model, lambda _: params)
        _, pullback = oaf.value_and_pullback(loss_fn)(model, X)
        with pytest.raises(TypeError, match=r"`model` must be .* update\(model, gr"):
            optimizer.update(pullback, model)
        for options in ({"skip": oa.skip_not_finite}, {"noise_decay": 0.9}):
            alone = oa.accumulate(optax.sgd(0.1), 2, **options)
            with pytest.raises(ValueError, match="needs every micro-batch's gradient"):
                oaf.Optimizer(model, alone, wrt=nnx.Param).update(model, pullback)

    @pytest.mark.several_devices
    def test_windows_in_shard_map_equal_the_global_batch(self):
        model = MLP()
        tx = oa.accumulate(INNER, 2, axis_name="data")
        optimizer = oaf.Optimizer(model, tx, wrt=nnx.Param)
        stacked = oa.sharding.stack_windows(optimizer.opt_state, COUNT)
        optimizer.opt_state = nnx.data(stacked)
        windows = oaf.window_sharding(optimizer, "data")

        @nnx.jit
        @nnx.shard_map(mesh=MESH, in_specs=(P(), windows, P("data")), out_specs=P())
        def program(model, optimizer, x):
            local = nnx.clone(model)
            params = nnx.state(local, nnx.Param)
            nnx.update(local, jax.lax.pcast(params, "data", to="varying"))
            _, pullback = oaf.value_and_pullback(loss_fn)(local, x)
            optimizer.update(model, pullback, weight=len(x))

        for x in BATCH.reshape(2, 2 * COUNT, 4):
            program(model, optimizer, x)
        close(model, global_batches(BATCH))


@pytest.mark.several_devices
class TestDevices:
    @pytest.mark.parametrize("way", ["mesh", slow("shard_map")])
    def test_value_and_grad_on_devices_equals_the_whole_batch(self, way):
        model = MLP()
        settings = {"num_microbatches": 2, "axis_name": "data"}
        if way == "mesh":
            in_parts = oaf.value_and_grad(loss_fn, mesh=MESH, **settings)
        else:
            in_parts = nnx.shard_map(
                oaf.value_and_grad(loss_fn, **settings),
                mesh=MESH,
                in_specs=(P(), P("data")),
                out_specs=P(),
            )
        value, grads = nnx.jit(in_parts)(model, BATCH)
        expected, expected_grads = nnx.value_and_grad(loss_fn)(model, BATCH)
        np.testing.assert_allclose(value, expected, rtol=1e-6)
        close(grads, expected_grads)

    def test_devices_average_statistics_and_draw_their_own_dropout(self):
        def dropped(model, x):
            value = loss_fn(model, x)
            return value, model.dropout(jnp.ones((1, 64))) != 0

        model = Normalised()
        in_parts = oaf.value_and_grad(
            dropped, has_aux=True, num_microbatches=2, axis_name="data", mesh=MESH
        )
        keys = arrays(nnx.state(model, nnx.RngKey))
        (_, kept), _ = nnx.jit(in_parts)(model, BATCH)
        rows = np.asarray(kept).reshape(2 * COUNT, 64)
        assert len({row.tobytes() for row in rows}) == 2 * COUNT
        same(nnx.state(model, nnx.RngKey), keys)
        assert model.dropout.rngs.count[...] == 4

        each = []
        for x in BATCH.reshape(COUNT, 4, 4):
            one = Normalised()
            for i in range(2):
                one(x[i::2])
            each.append(one.norm.mean[...])
        np.testing.assert_allclose(model.norm.mean[...], np.mean(each, 0), rtol=1e-5)

    def test_devices_draw_their_own_from_streams_among_the_arguments(self):
        rngs = streams()
        options = {"num_microbatches": 2, "axis_name": "data", "mesh": MESH}
        in_parts = oaf.value_and_grad(noise, has_aux=True, **options)
        (_, drawn), _ = nnx.jit(in_parts)(Noisy(), BATCH, rngs)
        assert len(set(np.ravel(drawn).tolist())) == 2 * COUNT
        assert rngs.noise.count[...] == 2
        same(nnx.state(rngs, nnx.RngKey), nnx.state(streams(), nnx.RngKey))

    @pytest.mark.parametrize("way", ["mesh", "shard_map", slow("unchecked"), "pmap"])
    def test_a_frozen_base_is_not_exchanged(self, way):
        """It stays as it is to the bit, and what is exchanged is smaller than it."""
        model = Adapted(width=64)
        x = jnp.asarray(np.random.default_rng(2).normal(size=(2 * COUNT, 64)))
        before = jax.tree.map(np.asarray, values(model))
        options = {"num_microbatches": 2, "axis_name": "data", "wrt": nnx.LoRAParam}
        if way == "mesh":
            in_parts = oaf.value_and_grad(loss_fn, mesh=MESH, **options)
            oaf.value_and_grad(loss_fn, mesh=MESH, **options)(model, x)
        elif way == "pmap":
            in_parts = oaf.value_and_grad(loss_fn, **options)
        else:
            in_parts = nnx.shard_map(
                oaf.value_and_grad(loss_fn, **options),
                mesh=MESH,
                in_specs=(P(), P("data")),
                out_specs=P(),
                check_vma=way == "shard_map",
            )
        if way == "pmap":
            graphdef, state = nnx.split(model)

            def of_device(state, x):
                model = nnx.merge(graphdef, state, copy=True)
                return in_parts(model, x), nnx.state(model)

            mapped = jax.pmap(of_device, axis_name="data", in_axes=(None, 0))
            lowered = mapped.lower(state, x.reshape(COUNT, 2, 64))
        else:
            lowered = nnx.jit(in_parts).lower(model, x)
            nnx.jit(in_parts)(model, x)
            assert model.calls[...] == 2 + 2 * (way == "mesh")
            for old, new in zip(before, values(model), strict=True):
                np.testing.assert_array_equal(old, new)
        lowered = getattr(lowered, "lowered", lowered)
        exchanged = hlo.collectives(optimized(lowered))
        assert exchanged
        assert sum(operation.nbytes for operation in exchanged) < 64 * 64 * 4

    def test_windows_in_pmap_equal_the_global_batch(self):
        tx = oa.accumulate(INNER, 2, axis_name="data")

        @nnx.vmap(in_axes=0, out_axes=0, axis_size=COUNT)
        def create(_):
            model = MLP()
            return model, oaf.Optimizer(model, tx, wrt=nnx.Param)

        model, optimizer = create(jnp.arange(COUNT))
        program = nnx.pmap(step, axis_name="data", in_axes=0, out_axes=None)
        for x in BATCH.reshape(2, COUNT, 2, 4):
            program(model, optimizer, x)
        assert optimizer.has_updated.all()
        expected = global_batches(BATCH)
        for i in (0, COUNT - 1):
            state = jax.tree.map(lambda x: x[i], arrays(model))  # noqa: B023
            close(state, expected)

    @pytest.mark.parametrize("wrap", [lambda tx: tx, slow(optax.chain)])
    def test_windows_in_shard_map_equal_the_global_batch(self, wrap):
        class Named(MLP):
            """With parameters that are called as fields of the state are."""

            def __init__(self):
                super().__init__()
                self.weight = nnx.Param(jnp.ones([]))
                self.value = nnx.Param(jnp.ones([]))

        model, expected = Named(), Named()
        own = nnx.Optimizer(expected, INNER, wrt=nnx.Param)
        own.update(expected, nnx.grad(loss_fn)(expected, BATCH))
        options = {"skip": oa.skip_not_finite, "noise_decay": 0.9}
        tx = wrap(oa.accumulate(INNER, 2, axis_name="data", **options))
        optimizer = oaf.Optimizer(model, tx, wrt=nnx.Param)
        optimizer.opt_state = nnx.data(
            oa.sharding.stack_windows(optimizer.opt_state, COUNT)
        )
        sharding = oaf.window_sharding(optimizer, "data")

        @nnx.jit
        @nnx.shard_map(mesh=MESH, in_specs=(P(), sharding, P("data")), out_specs=P())
        def program(model, optimizer, x):
            local = nnx.clone(model)
            params = nnx.state(local, nnx.Param)
            nnx.update(local, jax.lax.pcast(params, "data", to="varying"))
            grads = nnx.grad(loss_fn)(local, x)
            optimizer.update(model, grads, weight=len(x))

        for x in BATCH.reshape(2, 2 * COUNT, 4):
            program(model, optimizer, x)
        assert optimizer.has_updated
        close(model, expected)
