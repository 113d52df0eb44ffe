"""Epochs that end inside a window, and metrics over a window."""

import functools
import itertools
import math

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
from tests.support import hlo
from tests.support.errors import refused, saying
from tests.support.training import promoting, slow
from tests.support.xla import optimized

INNER = promoting(optax.adamw(optax.linear_schedule(0.1, 0.0, 20)))
PARAMS = {"w": jnp.zeros(3), "b": jnp.zeros([])}


def cut(examples, size):
    """Consecutive pieces of `size`, the last of which may be smaller."""
    return [examples[i : i + size] for i in range(0, len(examples), size)]


def epoch_of(count, seed=0):
    """`count` examples, each of four numbers: the inputs and what to predict."""
    return np.random.default_rng(seed).normal(size=(count, 4)).astype(np.float32)


def loss_fn(params, batch):
    x, y = batch[:, :3], batch[:, 3]
    return jnp.mean((x @ params["w"] + params["b"][None] - y) ** 2)


def stepper(tx):
    @functools.partial(jax.jit, static_argnames="boundary")
    def step(params, state, batch, boundary):
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        return tx.update_params(
            grads, state, params, weight=len(batch), boundary=boundary, value=loss
        )

    return step


class TestTheBoundaries:
    @pytest.mark.parametrize("every_k", [None, 1, 2, 3, 8])
    @pytest.mark.parametrize("count", range(8))
    def test_boundaries_close_every_window_and_the_last_batch(self, count, every_k):
        batches = list(range(count))
        windows = cut(batches, every_k or count or 1)
        closes = [batch == window[-1] for window in windows for batch in window]
        pairs = list(oa.with_boundaries(batches, every_k))
        assert pairs == list(zip(batches, closes, strict=True))

    def test_boundaries_are_python_bools(self):
        for _, boundary in oa.with_boundaries([1, 2, 3], np.int64(2)):
            assert type(boundary) is bool

    @pytest.mark.parametrize("seen", range(4))
    def test_an_open_window_is_filled_first(self, seen):
        batches = range(11)
        pairs = list(oa.with_boundaries(batches, 4))
        rest = oa.with_boundaries(batches[seen:], 4, micro_step=seen)
        assert list(rest) == pairs[seen:]

    def test_micro_step_may_be_a_jax_integer(self):
        flags = [b for _, b in oa.with_boundaries("abc", 3, micro_step=jnp.int32(2))]
        assert flags == [True, False, True]

    def test_batches_pass_through_unchanged(self):
        batches = [None, 0, (), {"x": np.ones(2)}, np.zeros((0, 3)), None, None]
        pairs = list(oa.with_boundaries(iter(batches), 2))
        assert all(a is b for a, (b, _) in zip(batches, pairs, strict=True))


class TestTheIteration:
    def test_with_boundaries_reads_one_batch_ahead_and_never_two(self):
        read = []

        def batches():
            for i in range(1000):
                read.append(i)
                yield i

        pairs = oa.with_boundaries(batches(), 3)
        assert read == []
        for batch, boundary in itertools.islice(pairs, 7):
            assert read[-1] == batch + 1
            assert boundary == (batch % 3 == 2)

    def test_with_boundaries_starts_the_iterable_once(self):
        class Loader:
            started = 0

            def __iter__(self):
                self.started += 1
                return iter("abc")

        loader = Loader()
        pairs = oa.with_boundaries(loader)
        assert [batch for batch, _ in pairs] == ["a", "b", "c"]
        assert loader.started == 1

    def test_an_error_in_the_data_is_raised(self):
        def broken():
            yield 1
            raise OSError("disk")

        with pytest.raises(OSError, match="disk"):
            list(oa.with_boundaries(broken()))


class TestErrorsAtTheCall:
    @pytest.mark.parametrize(
        "every_k", [lambda _: 2, oa.noise.adaptive_k(2, 8), oa.by_weight(8)]
    )
    def test_an_every_k_that_needs_the_state_is_refused(self, every_k):
        words = ("`every_k` must be an int >= 1 or None", "state", "`accumulate`")
        with pytest.raises(TypeError, match=saying(*words)):
            oa.with_boundaries([1], every_k)

    @pytest.mark.parametrize("every_k", [True, 2.0, "2"])
    def test_every_k_of_another_type_is_refused(self, every_k):
        words = ("`every_k` must be an int >= 1", repr(every_k))
        with pytest.raises(TypeError, match=saying(*words)):
            oa.with_boundaries([1], every_k)

    def test_data_in_place_of_every_k_are_not_printed(self):
        with refused("`every_k` must be an int >= 1", "got a value of type list"):
            oa.with_boundaries(2, [np.ones((24, 3))])

    @pytest.mark.parametrize("every_k", [0, -1])
    def test_every_k_below_one_is_refused(self, every_k):
        with pytest.raises(ValueError, match=rf"`every_k` must be .* got {every_k}"):
            oa.with_boundaries([1], every_k)

    @pytest.mark.parametrize("micro_step", [None, True, 1.0, "1"])
    def test_micro_step_of_another_type_is_refused(self, micro_step):
        words = ("`micro_step` must be an int >= 0", repr(micro_step), "oa.micro_step")
        with pytest.raises(TypeError, match=saying(*words)):
            oa.with_boundaries([1], 2, micro_step=micro_step)

    @pytest.mark.parametrize("every_k", [None, 2])
    def test_a_negative_micro_step_is_refused(self, every_k):
        with pytest.raises(ValueError, match=r"`micro_step` must be .* got -1"):
            oa.with_boundaries([1], every_k, micro_step=-1)

    @pytest.mark.parametrize("micro_step", [4, 5])
    def test_a_micro_step_not_less_than_every_k_is_refused(self, micro_step):
        words = ("`micro_step` must be less than `every_k=4`", f"got {micro_step}")
        with pytest.raises(ValueError, match=saying(*words)):
            oa.with_boundaries([1], 4, micro_step=micro_step)


class TestTraining:
    SIZE, K, EPOCHS = 4, 3, 3

    def in_global_batches(self, count):
        """Plain Optax over the same examples."""
        params, state = PARAMS, INNER.init(PARAMS)
        for seed in range(self.EPOCHS):
            for batch in cut(epoch_of(count, seed), self.SIZE * self.K):
                updates, state = INNER.update(
                    jax.grad(loss_fn)(params, batch), state, params
                )
                params = optax.apply_updates(params, updates)
        return params

    # 50: windows of 3, 3, 3, 3 and 1 micro-batches, the last of them of 2 examples.
    @pytest.mark.parametrize("count", [50, slow(48), slow(5), slow(13)])
    def test_an_epoch_of_any_length_trains_as_in_global_batches(self, count):
        tx = oa.accumulate(INNER)
        step = stepper(tx)
        params, state = PARAMS, tx.init(PARAMS)
        for seed in range(self.EPOCHS):
            micro_batches = cut(epoch_of(count, seed), self.SIZE)
            for batch, boundary in oa.with_boundaries(micro_batches, self.K):
                params, state = step(params, state, batch, boundary)
                assert oa.has_updated(state) == boundary
            assert oa.micro_step(state) == 0
        updates_per_epoch = math.ceil(math.ceil(count / self.SIZE) / self.K)
        assert oa.gradient_step(state) == self.EPOCHS * updates_per_epoch
        chex.assert_trees_all_close(params, self.in_global_batches(count), rtol=2e-5)

    def test_a_run_stopped_inside_a_window_resumes_with_the_same_bits(self):
        tx = oa.accumulate(INNER)
        step = stepper(tx)

        def train(now, batches, stop=None):
            seen = int(oa.micro_step(now[1]))
            pairs = oa.with_boundaries(batches, self.K, micro_step=seen)
            for batch, boundary in itertools.islice(pairs, stop):
                now = step(*now, batch, boundary)
            return now

        batches = cut(epoch_of(50), self.SIZE)
        start = PARAMS, tx.init(PARAMS)
        stopped = train(start, batches, stop=5)
        assert oa.micro_step(stopped[1]) == 2
        chex.assert_trees_all_equal(train(stopped, batches[5:]), train(start, batches))

    def test_each_shape_and_boundary_compiles_to_one_program_without_a_branch(self):
        tx = oa.accumulate(INNER)
        step = stepper(tx)
        state = tx.init(PARAMS)
        for batch, boundary in oa.with_boundaries(cut(epoch_of(50), 4), 3):
            program = optimized(step.lower(PARAMS, state, batch, boundary))
            assert hlo.operations(program, "conditional") == []
            step(PARAMS, state, batch, boundary)
        assert step._cache_size() == 3  # 4 examples inside and at the end, 2 at the end

    def test_a_schedule_closes_by_its_count_and_at_the_end_of_the_epoch(self):
        tx = oa.accumulate(INNER, every_k=lambda step: 2 + step)
        step = stepper(tx)
        params, state = PARAMS, tx.init(PARAMS)
        updates = []
        for batch, last in oa.with_boundaries(cut(epoch_of(40), 4)):
            params, state = step(params, state, batch, last or None)
            updates.append(bool(oa.has_updated(state)))
        # Windows of 2, 3 and 4 micro-batches, and one that the end cuts to 1.
        assert list(np.flatnonzero(updates) + 1) == [2, 5, 9, 10]


def metrics_of(params, batch):
    errors = batch[:, :3] @ params["w"] - batch[:, 3]
    return {"mse": jnp.mean(errors**2), "nested": [jnp.mean(jnp.abs(errors))]}


class TestMetricsOverTheWindow:
    """`accumulate` around the identity."""

    PARAMS = PARAMS | {"w": jnp.array([0.3, -0.2, 0.5])}

    def over_windows(self, micro_batches, every_k, weight=len):
        tx = oa.accumulate(optax.identity(), every_k)

        @functools.partial(jax.jit, static_argnames="boundary")
        def add(state, batch, weight, boundary):
            return tx.update(
                metrics_of(self.PARAMS, batch), state, weight=weight, boundary=boundary
            )

        shapes = jax.eval_shape(metrics_of, self.PARAMS, micro_batches[0])
        state = tx.init(shapes)
        logged = []
        for batch, boundary in oa.with_boundaries(micro_batches, every_k):
            means, state = add(state, batch, weight(batch), boundary)
            if boundary:
                logged.append(means)
            else:
                chex.assert_trees_all_equal(means, jax.tree.map(jnp.zeros_like, means))
        return logged

    @pytest.mark.parametrize("size", [1, 2, 3, 4, 6])
    def test_metrics_do_not_depend_on_the_size_of_the_micro_batches(self, size):
        examples = epoch_of(31)  # global batches of 12, 12 and 7
        logged = self.over_windows(cut(examples, size), 12 // size)
        whole = [metrics_of(self.PARAMS, batch) for batch in cut(examples, 12)]
        chex.assert_trees_all_close(logged, whole, rtol=1e-5)

    def test_metrics_ignore_a_micro_batch_of_weight_0(self):
        examples = epoch_of(12)
        nothing = np.full((4, 4), np.nan, np.float32)
        micro_batches = [examples[:5], nothing, examples[5:], nothing]

        def weight(batch):
            return 0 if np.isnan(batch).any() else len(batch)

        (logged,) = self.over_windows(micro_batches, 4, weight)
        chex.assert_trees_all_close(
            logged, metrics_of(self.PARAMS, examples), rtol=1e-5
        )

    def test_metrics_of_a_window_without_weight_are_zeros(self):
        logged = self.over_windows([epoch_of(3), epoch_of(3)], 2, lambda _: 0)
        chex.assert_trees_all_equal(logged, jax.tree.map(jnp.zeros_like, logged))

    def test_without_every_k_metrics_are_those_of_a_whole_test_set(self):
        examples = epoch_of(31)
        (logged,) = self.over_windows(cut(examples, 5), None)
        chex.assert_trees_all_close(
            logged, metrics_of(self.PARAMS, examples), rtol=1e-5
        )

    def test_an_integer_metric_is_that_of_the_last_micro_batch(self):
        """What `docs/metrics.md` warns of."""
        tx = oa.accumulate(optax.identity(), 2)
        state = tx.init({"right": jnp.int32(0)})
        for right in (3, 5):
            means, state = tx.update({"right": jnp.int32(right)}, state, weight=8)
        assert means["right"] == 5

    def test_the_mean_loss_is_already_in_the_state(self):
        examples = epoch_of(31)
        tx = oa.accumulate(optax.set_to_zero())
        step = stepper(tx)
        params, state = self.PARAMS, tx.init(self.PARAMS)
        losses = []
        for batch, boundary in oa.with_boundaries(cut(examples, 5), 3):
            params, state = step(params, state, batch, boundary)
            if boundary:
                losses.append(state.window.loss / state.window.weight)
        whole = [loss_fn(self.PARAMS, batch) for batch in cut(examples, 15)]
        chex.assert_trees_all_close(losses, whole, rtol=1e-5)

    def test_in_one_step_metrics_are_an_auxiliary_output(self):
        def loss_and_metrics(params, batch):
            return loss_fn(params, batch), metrics_of(params, batch)

        examples = jnp.asarray(epoch_of(31))
        f = oa.value_and_grad(
            loss_and_metrics, has_aux=True, microbatch_size=5, aux="mean"
        )
        (_, metrics), _ = jax.jit(f)(self.PARAMS, examples)
        chex.assert_trees_all_close(
            metrics, metrics_of(self.PARAMS, examples), rtol=1e-5
        )

    @pytest.mark.several_devices
    def test_metrics_are_those_of_all_devices(self):
        tx = oa.accumulate(optax.identity(), axis_name="data")
        mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,))
        weights = np.array([[1, 3], [5, 2]], np.float32)  # of two steps, two devices
        values = np.array([[1, 2], [4, 8]], np.float32)

        @jax.jit
        @functools.partial(
            jax.shard_map,
            mesh=mesh,
            in_specs=(P(None, "data"), P(None, "data")),
            out_specs=P(),
        )
        def window(values, weights):
            state = tx.init(jnp.float32(0))
            for i in range(2):
                mean, state = tx.update(
                    values[i, 0], state, weight=weights[i, 0], boundary=i == 1
                )
            return mean

        expected = np.average(values, weights=weights)
        np.testing.assert_allclose(window(values, weights), expected, rtol=1e-6)


@pytest.mark.usefixtures("loose_promotion")
class TestNnxMetrics:
    """What `docs/metrics.md` says of them."""

    def test_nnx_average_counts_a_mean_as_one_value(self):
        average = nnx.metrics.Average("loss")
        for mean, _examples in ((1.0, 4), (4.0, 1)):
            average.update(loss=jnp.float32(mean))
        assert average.compute() == 2.5
        state = (tx := oa.accumulate(optax.identity(), 2)).init(jnp.float32(0))
        for mean, examples in ((1.0, 4), (4.0, 1)):
            logged, state = tx.update(jnp.float32(mean), state, weight=examples)
        np.testing.assert_allclose(logged, 1.6, rtol=1e-6)

    def test_nnx_average_counts_values_per_example(self):
        average = nnx.metrics.Average("loss")
        for losses in (jnp.ones(4), jnp.full(1, 4.0)):
            average.update(loss=losses)
        np.testing.assert_allclose(average.compute(), 1.6, rtol=1e-6)

    def test_nnx_average_with_a_mask_lets_a_nan_through(self):
        average = nnx.metrics.Average("loss")
        average.update(loss=jnp.array([1.0, jnp.nan]), mask=jnp.array([True, False]))
        assert jnp.isnan(average.compute())


class TestGrain:
    """A loader that can say where it is."""

    @pytest.fixture
    def grain(self):
        return pytest.importorskip("grain")

    def test_a_smaller_last_batch_of_grain_closes_its_window(self, grain):
        dataset = grain.MapDataset.source(np.arange(50)).shuffle(seed=1)
        loader = dataset.batch(4, drop_remainder=False)
        pairs = list(oa.with_boundaries(loader, 3))
        assert [len(batch) for batch, _ in pairs] == [4] * 12 + [2]
        assert list(np.flatnonzero([b for _, b in pairs])) == [2, 5, 8, 11, 12]

    def test_a_grain_position_travels_with_its_batch(self, grain):
        """The loader itself is one micro-batch ahead of the training."""
        dataset = grain.MapDataset.source(np.arange(50)).shuffle(seed=1)
        options = grain.ReadOptions(num_threads=0)
        loader = dataset.batch(4, drop_remainder=False).to_iter_dataset(options)

        def with_positions(iterator):
            for batch in iterator:
                yield batch, iterator.get_state()

        pairs = oa.with_boundaries(with_positions(iter(loader)), 3)
        (_, position), _ = list(itertools.islice(pairs, 5))[-1]
        resumed = iter(loader)
        resumed.set_state(position)
        rest = [list(batch) for batch, _ in oa.with_boundaries(resumed, 3)]
        assert rest == [list(batch) for (batch, _), _ in pairs]
        assert len(rest) == 8
