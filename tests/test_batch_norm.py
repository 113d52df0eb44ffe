"""What micro-batches do to BatchNorm, and its statistics put together again."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import optax_accum as oa
import optax_accum.flax as oaf
from tests.support.training import slow

# A mean far from 0 and groups that differ, so that no term is small.
X = jnp.asarray(
    np.random.default_rng(0).normal(size=(10, 3)) * [1, 2, 3]
    + np.arange(10)[:, None]
    + 5,
    jnp.float32,
)
MOMENTUM = 0.9


@pytest.fixture(autouse=True)
def _promotion(loose_promotion):
    """Flax's layers mix ranks."""


class Linen(nn.Module):
    """One BatchNorm."""

    @nn.compact
    def __call__(self, x):
        return nn.BatchNorm(use_running_average=False, momentum=MOMENTUM)(x)


def linen_loss(variables, stats, x):
    y, changed = Linen().apply(
        variables | {"batch_stats": stats}, x, mutable="batch_stats"
    )
    return jnp.mean(y**3), (changed["batch_stats"], changed["batch_stats"])


def linen_statistics(x, microbatch_size, start=None):
    """Before, after every micro-batch, and after the whole batch in one."""
    variables = Linen().init(jax.random.key(0), x)
    stats = start or variables.pop("batch_stats")
    params = {"params": variables["params"]}
    (_, (after, last)), _ = jax.jit(
        oa.value_and_grad(
            linen_loss,
            microbatch_size=microbatch_size,
            batch_argnums=2,
            has_aux=True,
            carry_argnum=1,
        )
    )(params, stats, x)
    for threaded, stacked in zip(*map(jax.tree.leaves, (last, after)), strict=True):
        np.testing.assert_array_equal(threaded, stacked[-1])
    _, (whole, _) = linen_loss(params, stats, x)
    return stats, after, whole


def close(tree, other):
    for x, y in zip(*map(jax.tree.leaves, (tree, other)), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-6)


@pytest.mark.parametrize("size", [slow(2), 5, slow(10)])
def test_combined_statistics_are_those_of_the_global_batch(size):
    before, after, whole = linen_statistics(X, size)
    close(oaf.combine_batch_stats(before, after, momentum=MOMENTUM), whole)
    # And once more from there.
    before, after, whole = linen_statistics(X**2 / 10, size, start=whole)
    close(oaf.combine_batch_stats(before, after, momentum=MOMENTUM), whole)


def test_uneven_micro_batches_are_combined_by_their_weights():
    before, after, whole = linen_statistics(X, 4)  # 4, 4 and 2
    combined = oaf.combine_batch_stats(
        before, after, momentum=MOMENTUM, weights=jnp.array([4, 4, 2])
    )
    close(combined, whole)
    alike = oaf.combine_batch_stats(before, after, momentum=MOMENTUM)
    assert np.all(alike["BatchNorm_0"]["mean"] > whole["BatchNorm_0"]["mean"])


@pytest.mark.parametrize("place", [slow(0), 1, slow(2)])
def test_statistics_of_weight_0_are_left_out_even_if_they_are_nan(place):
    before, after, whole = linen_statistics(X, 5)
    spoilt = jax.tree.map(lambda x: jnp.insert(x, place, jnp.nan, axis=0), after)
    combine = jax.jit(oaf.combine_batch_stats, static_argnames="momentum")
    weights = jnp.insert(jnp.ones(2), place, 0)
    close(combine(before, spoilt, momentum=MOMENTUM, weights=weights), whole)
    nothing = combine(before, spoilt, momentum=MOMENTUM, weights=jnp.zeros(3))
    jax.tree.map(np.testing.assert_array_equal, nothing, before)


def test_running_statistics_move_once_per_micro_batch():
    """What the documentation says: k steps, and no variance between micro-batches."""
    before, after, whole = linen_statistics(X, 2)
    threaded, whole = after["BatchNorm_0"], whole["BatchNorm_0"]
    expected = before["BatchNorm_0"]["mean"]
    for i in range(5):
        expected = MOMENTUM * expected + (1 - MOMENTUM) * X[i::5].mean(0)
    np.testing.assert_allclose(threaded["mean"][-1], expected, rtol=1e-6)
    assert np.all(threaded["mean"][-1] > 3 * whole["mean"])


def test_the_loss_with_batch_norm_is_the_mean_of_micro_batch_losses():
    """The loss and the gradient are those of micro-batches, not of the global batch."""
    variables = Linen().init(jax.random.key(0), X)
    stats = variables.pop("batch_stats")
    f = oa.value_and_grad(
        linen_loss, num_microbatches=5, batch_argnums=2, has_aux=True, carry_argnum=1
    )
    (value, _), _ = jax.jit(f)(variables, stats, X)
    each = [linen_loss(variables, stats, X[i::5])[0] for i in range(5)]
    np.testing.assert_allclose(value, np.mean(each), atol=1e-6)
    assert abs(value - linen_loss(variables, stats, X)[0]) > 0.1


def test_combined_statistics_of_nnx_are_those_of_the_global_batch():
    norm, whole = (nnx.BatchNorm(3, momentum=MOMENTUM, rngs=nnx.Rngs(0)) for _ in "ab")

    def loss_fn(model, x):
        return jnp.mean(model(x) ** 3), nnx.state(model, nnx.BatchStat)

    before = nnx.as_pure(nnx.state(norm, nnx.BatchStat))
    in_parts = oaf.value_and_grad(loss_fn, has_aux=True, num_microbatches=2)
    (_, after), _ = nnx.jit(in_parts)(norm, X)
    nnx.update(norm, oaf.combine_batch_stats(before, after, momentum=MOMENTUM))
    whole(X)
    close(nnx.state(norm), nnx.state(whole))


def test_statistics_of_a_skipped_micro_batch_are_left_out():
    norm, whole = (nnx.BatchNorm(3, momentum=MOMENTUM, rngs=nnx.Rngs(0)) for _ in "ab")
    x = jnp.where(jnp.arange(12)[:, None] % 3 == 1, jnp.nan, jnp.tile(X[:6], (2, 1)))

    def loss_fn(model, x):
        value = jnp.mean(model(x) ** 3)
        return value, (nnx.state(model, nnx.BatchStat), jnp.isfinite(value))

    before = nnx.as_pure(nnx.state(norm, nnx.BatchStat))
    in_parts = oaf.value_and_grad(
        loss_fn, has_aux=True, num_microbatches=3, skip=oa.skip_not_finite
    )
    (_, (after, weights)), _ = nnx.jit(in_parts)(norm, x)
    stats = oaf.combine_batch_stats(before, after, momentum=MOMENTUM, weights=weights)
    whole(jnp.concatenate([x[0::3], x[2::3]]))
    close(stats, nnx.state(whole, nnx.BatchStat))


def test_modules_named_mean_and_var_are_not_taken_for_statistics():
    class Heads(nnx.Module):
        def __init__(self):
            self.mean = nnx.BatchNorm(3, momentum=MOMENTUM, rngs=nnx.Rngs(0))
            self.var = nnx.BatchNorm(3, momentum=MOMENTUM, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.mean(x) + self.var(2 * x + 1)

    model, whole = Heads(), Heads()

    def loss_fn(model, x):
        return jnp.mean(model(x) ** 3), nnx.state(model, nnx.BatchStat)

    before = nnx.as_pure(nnx.state(model, nnx.BatchStat))
    in_parts = oaf.value_and_grad(loss_fn, has_aux=True, num_microbatches=2)
    (_, after), _ = nnx.jit(in_parts)(model, X)
    whole(X)
    stats = oaf.combine_batch_stats(before, after, momentum=MOMENTUM)
    close(stats, nnx.state(whole, nnx.BatchStat))


def test_statistics_that_cannot_be_combined_are_refused():
    moving = nnx.state(nnx.BatchNorm(3, rngs=nnx.Rngs(0)), nnx.BatchStat)
    with pytest.raises(ValueError, match=r"change with it.*nnx\.as_pure\(nnx\.state"):
        oaf.combine_batch_stats(moving, moving)
    before, after, _ = linen_statistics(X, 5)
    with pytest.raises(ValueError, match=r"`momentum` is .*BatchNorm.* got 1"):
        oaf.combine_batch_stats(before, after, momentum=1)
    with pytest.raises(ValueError, match="`after` must have the tree structure of `be"):
        oaf.combine_batch_stats(before, after["BatchNorm_0"])
    with pytest.raises(ValueError, match=r"`after` must have K .* shape \(3,\) at Bat"):
        oaf.combine_batch_stats(before, before)
    with pytest.raises(ValueError, match=r"`weights` K numbers; got shape \(2, 3\)"):
        oaf.combine_batch_stats(before, after, weights=jnp.ones(3))
    alone = {"norm": {"mean": jnp.zeros(3)}}
    with pytest.raises(
        ValueError, match=r"a `mean` and a `var` .*neither of them: norm\.var"
    ):
        oaf.combine_batch_stats(alone, {"norm": {"mean": jnp.zeros((2, 3))}})
