"""Micro-batches to feed, and the two ways of feeding them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

WAYS = ("update", "update_params")
TAKES = ("gradients", "pullbacks")  # what both of them take

# Older versions add some gradients in place wrongly; there they are added as before.
ADDS_IN_PLACE = jax.__version_info__ >= (0, 11)
needs_in_place = pytest.mark.skipif(not ADDS_IN_PLACE, reason="needs JAX 0.11")


def slow(value, **kwargs):
    """A parameter that is left out of the usual run, being like another."""
    return pytest.param(value, marks=pytest.mark.slow, **kwargs)


def micro_batches(params, count, seed=0, dtype=None):
    """`count` gradients like `params`, and weights that are uneven."""
    random = np.random.default_rng(seed)

    def gradient(p):
        return jnp.asarray(random.normal(size=p.shape), dtype or p.dtype)

    grads = [jax.tree.map(gradient, params) for _ in range(count)]
    weights = [jnp.float32(w) for w in random.integers(1, 20, count)]
    return grads, weights


def weighted_mean(grads, weights):
    """What the global batch's gradient is, in float64 NumPy."""
    total = sum(float(w) for w in weights)

    def mean(*leaves):
        pairs = zip(leaves, weights, strict=True)
        summed = sum(np.asarray(g, np.float64) * float(w) for g, w in pairs)
        return jnp.asarray(summed / total, leaves[0].dtype)

    return jax.tree.map(mean, *grads)


def promoting(inner):
    """`inner` under JAX's usual promotion, which Optax's optimizers need.

    What is around it stays under the strict one.
    """
    inner = optax.with_extra_args_support(inner)

    def relaxed(function):
        def call(*args, **kwargs):
            with (
                jax.numpy_dtype_promotion("standard"),
                jax.numpy_rank_promotion("allow"),
            ):
                return function(*args, **kwargs)

        return call

    return optax.GradientTransformationExtraArgs(*map(relaxed, inner))


def stepper(tx, way="update_params"):
    """``step(params, state, grads, **kwargs) -> (params, state)`` through `way`."""

    def step(params, state, grads, **kwargs):
        if way == "update_params":
            return tx.update_params(grads, state, params, **kwargs)
        updates, state = tx.update(grads, state, params, **kwargs)
        return optax.apply_updates(params, updates), state

    return step


def differentiated(takes, loss, params, *batch):
    """The loss, and its gradient or its pullback, as `takes` says."""
    if takes == "pullbacks":
        return jax.vjp(lambda params: loss(params, *batch), params)
    return jax.value_and_grad(loss)(params, *batch)


PARAMS = {"w": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(3)}
SGD = optax.sgd(0.1)
ADAM = promoting(optax.adam(0.1))
NAN = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), PARAMS)


def feed(tx, batches, way="update_params", params=PARAMS, state=None):
    """Runs ``(grads, kwargs)`` one after another; returns the last params and state."""
    state = tx.init(params) if state is None else state
    step = jax.jit(stepper(tx, way), static_argnames="boundary")
    for grads, kwargs in batches:
        params, state = step(params, state, grads, **kwargs)
    return params, state


def alone(inner, *grads, params=PARAMS):
    """What `inner` alone makes of the global batches' gradients."""
    state = inner.init(params)
    for g in grads:
        updates, state = inner.update(g, state, params)
        params = optax.apply_updates(params, updates)
    return params, state
