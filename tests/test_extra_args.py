"""Extra arguments: which reach the inner optimizer, as what, and which are refused."""

from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import optax_accum as oa
import optax_accum.flax as oaf
from tests.support.errors import saying
from tests.support.training import (
    PARAMS,
    SGD,
    WAYS,
    micro_batches,
    promoting,
    slow,
    stepper,
)


class TestGrad:
    """Line searches take `grad` besides `value`: both are the window's."""

    x = jax.random.normal(jax.random.key(0), (32, 5)) * jnp.arange(1.0, 6)[None]
    y = jnp.sin(x.sum(1))
    start = jnp.full(5, 0.1)
    cuts = (0, 5, 17, 32)  # micro-batches of 5, 12 and 15 examples

    def loss(self, w, x, y):
        return jnp.mean((jnp.tanh(x @ w) - y) ** 2)

    def whole(self, w):
        return self.loss(w, self.x, self.y)

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize(
        "inner",
        [
            promoting(optax.lbfgs()),
            optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(9)),
            slow(optax.chain(optax.sgd(1.0), optax.scale_by_zoom_linesearch(9))),
        ],
        ids=["lbfgs", "backtracking", "zoom"],
    )
    def test_a_line_search_sees_the_gradient_of_the_window(self, inner, way):
        tx = oa.accumulate(inner, every_k=3)
        expected, inner_state = self.start, inner.init(self.start)
        w, state = self.start, tx.init(self.start)

        @jax.jit
        def micro_step(w, state, value, g, weight):
            more = {"value": value, "grad": g, "value_fn": self.whole}
            return stepper(tx, way)(w, state, g, weight=weight, **more)

        for _ in range(2):
            value, grad = jax.value_and_grad(self.whole)(expected)
            updates, inner_state = inner.update(
                grad, inner_state, expected, value=value, grad=grad, value_fn=self.whole
            )
            expected = optax.apply_updates(expected, updates)
            for a, b in zip(self.cuts, self.cuts[1:], strict=False):
                x, y = self.x[a:b], self.y[a:b]
                v, g = jax.value_and_grad(self.loss)(w, x, y)
                w, state = micro_step(w, state, v, g, b - a)
        np.testing.assert_allclose(w, expected, rtol=1e-4)

    def test_grad_must_be_the_gradient_that_is_accumulated(self):
        tx = oa.accumulate(promoting(optax.lbfgs()), every_k=2)
        chained = optax.chain(optax.clip(1e-3), tx)
        w, g = self.start, jnp.ones(5)
        more = {"value": jnp.float32(0), "value_fn": self.whole}
        for each, grad in ((tx, 2 * g), (chained, g)):
            with pytest.raises(ValueError, match=saying("`grad` must be the same")):
                jax.eval_shape(
                    lambda g, each=each, grad=grad: each.update(
                        g, each.init(w), w, grad=grad, **more
                    ),
                    g,
                )
        compiled = jax.jit(tx.update, static_argnames="value_fn")
        with pytest.raises(
            ValueError, match=saying("once to a function under jax.jit")
        ):
            compiled(g, tx.init(w), w, grad=g, **more)

    @pytest.mark.parametrize("wrap", [oa.accumulate, optax.MultiSteps])
    def test_value_and_grad_from_state_finds_one_value(self, wrap):
        inner = optax.chain(
            optax.sgd(1.0), optax.scale_by_backtracking_linesearch(5, store_grad=True)
        )
        tx, w = wrap(inner, 2), self.start
        value, grad = optax.value_and_grad_from_state(self.whole)(w, state=tx.init(w))
        wanted = jax.value_and_grad(self.whole)(w)
        chex.assert_trees_all_close((value, grad), wanted)


class TestNames:
    """What neither `accumulate` nor the inner optimizer takes is refused."""

    (grads, _), _ = micro_batches(PARAMS, 2)

    def assert_scaled(self, inner):
        """`inner` is given the argument `scale`, and obeys."""
        tx = oa.accumulate(inner, every_k=1)
        updates, _ = tx.update(
            self.grads, tx.init(PARAMS), PARAMS, scale=jnp.float32(3)
        )
        expected = jax.tree.map(lambda g: 3 * g, self.grads)
        chex.assert_trees_all_close(updates, expected, rtol=1e-6)

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize(
        ("name", "meant"),
        [("weights", "weight"), ("boundry", "boundary"), ("values", "value")],
    )
    def test_a_misspelt_argument_is_refused_with_the_one_that_was_meant(
        self, name, meant, way
    ):
        tx = oa.accumulate(optax.chain(SGD, takes_scale()), every_k=2)
        state = tx.init(PARAMS)
        words = saying(f"`{name}`", f"Did you mean `{meant}`?")
        with pytest.raises(TypeError, match=words):
            stepper(tx, way)(PARAMS, state, self.grads, **{name: 1.0})
        chained = optax.chain(optax.clip(1.0), tx)
        with pytest.raises(TypeError, match=words):
            chained.update(self.grads, chained.init(PARAMS), PARAMS, **{name: 1.0})

    @pytest.mark.parametrize(
        ("name", "meant"), [("loss", "value"), ("batch_size", "weight")]
    )
    def test_other_words_for_an_argument_are_understood(self, name, meant):
        tx = oa.accumulate(SGD, every_k=2)
        with pytest.raises(TypeError, match=saying(f"`{name}`", f"mean `{meant}`?")):
            tx.update(self.grads, tx.init(PARAMS), PARAMS, **{name: 1.0})
        # In a chain they may be meant for another of its parts.
        chained = optax.chain(takes_loss(), tx)
        chained.update(self.grads, chained.init(PARAMS), PARAMS, loss=1.0)

    def test_what_nothing_takes_is_refused(self):
        for inner in (SGD, takes_scale()):
            tx = oa.accumulate(inner, every_k=2)
            with pytest.raises(TypeError, match=saying("`temperature`", "Leave it")):
                tx.update(self.grads, tx.init(PARAMS), PARAMS, temperature=1.0)

    def test_a_misspelt_argument_of_the_inner_optimizer_is_named_too(self):
        tx = oa.accumulate(takes_scale(), every_k=2)
        with pytest.raises(TypeError, match=saying("Did you mean `scale`?")):
            tx.update(self.grads, tx.init(PARAMS), PARAMS, scales=1.0)

    def test_a_slip_is_refused_also_where_the_inner_optimizer_may_take_anything(self):
        injected = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
        for inner in (takes_scale("passes to a method"), injected):
            tx = oa.accumulate(inner, every_k=2)
            with pytest.raises(TypeError, match=saying("Did you mean `weight`?")):
                tx.update(self.grads, tx.init(PARAMS), PARAMS, weights=1.0)

    def test_what_another_part_of_a_chain_takes_passes(self):
        tx = optax.chain(oa.accumulate(SGD, every_k=2), takes_scale())
        state = tx.init(PARAMS)
        for _ in range(2):
            updates, state = tx.update(self.grads, state, PARAMS, scale=jnp.float32(2))
        chex.assert_trees_all_close(
            updates, jax.tree.map(lambda g: -0.2 * g, self.grads), rtol=1e-6
        )

    @pytest.mark.parametrize(
        "how", ["names", "takes out", "passes on", "in a method", "passes to a method"]
    )
    def test_an_argument_is_found_however_the_inner_optimizer_takes_it(self, how):
        inner = takes_scale(how)
        inners = {
            "alone": inner,
            "in a chain": optax.chain(optax.clip(1e3), inner),
            "named": optax.named_chain(("a", inner), ("b", optax.identity())),
            "masked": optax.masked(inner, True),
            "partitioned": optax.partition({"all": inner}, lambda _: "all"),
            "injected": optax.inject_hyperparams(
                lambda rate, inner=inner: optax.chain(inner, optax.scale(rate))
            )(rate=1.0),
        }
        for each in inners.values():
            self.assert_scaled(each)

    def test_a_name_that_has_no_value_yet_is_no_obstacle(self):
        def update(updates, state, params=None, *, scale=1.0, **extra_args):
            del params, extra_args
            return defined_later(updates, scale), state

        inner = optax.GradientTransformationExtraArgs(
            lambda _: optax.EmptyState(), update
        )
        oa.accumulate(inner, every_k=1)

        def defined_later(updates, scale):
            return jax.tree.map(lambda u: scale * u, updates)

        self.assert_scaled(inner)

    def test_a_function_without_a_module_is_no_obstacle(self):
        """As one that `exec` has made, in a notebook or a page of documentation."""
        namespace = {"jax": jax}
        exec(
            "def update(updates, state, params=None, *, scale=1.0, **extra_args):\n"
            "    return jax.tree.map(lambda u: scale * u, updates), state\n",
            namespace,
        )
        update: Any = namespace["update"]
        update.__module__ = None
        inner = optax.GradientTransformationExtraArgs(
            lambda _: optax.EmptyState(), update
        )
        self.assert_scaled(inner)

    def test_a_line_search_hands_the_rest_to_its_function(self):
        def value_fn(w, x):
            return jnp.mean((x @ w - 1) ** 2)

        w, x = jnp.zeros(3), jax.random.normal(jax.random.key(0), (8, 3))
        tx = oa.accumulate(promoting(optax.lbfgs()), every_k=1)
        value, grad = jax.value_and_grad(value_fn)(w, x)
        more = {"value": value, "value_fn": value_fn, "x": x}

        @jax.jit
        def step(grad):
            return tx.update_params(grad, tx.init(w), w, grad=grad, **more)

        after, _ = step(grad)
        assert value_fn(after, x) < value

    def test_flax_refuses_them_too(self):
        tx = oa.accumulate(SGD, every_k=2)
        state = oaf.TrainState.create(apply_fn=nn.Dense(1).apply, params=PARAMS, tx=tx)
        with pytest.raises(TypeError, match="weights"):
            state.apply_gradients(grads=self.grads, weights=2)
        model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
        optimizer = oaf.Optimizer(model, tx, wrt=nnx.Param)
        grads = nnx.grad(lambda m: m(jnp.ones((1, 2))).sum())(model)
        with pytest.raises(TypeError, match=saying("Did you mean `weight`?")):
            optimizer.update(model, grads, weights=2)


class _Scaling:
    def by(self, updates, scale):
        return jax.tree.map(lambda u: scale * u, updates)

    def update(self, updates, state, params=None, *, scale=1.0, **extra_args):
        del params, extra_args
        return self.by(updates, scale), state

    def passes_on(self, updates, state, params=None, **extra_args):
        return self.update(updates, state, params, **extra_args)


def takes_loss():
    """A transformation that takes `loss`."""

    def update(updates, state, params=None, *, loss, **extra_args):
        del params, loss, extra_args
        return updates, state

    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)


def takes_scale(how="names"):
    """A transformation that takes `scale`, in one of the ways in which one can."""
    scaling = _Scaling()

    def names(updates, state, params=None, *, scale=1.0, **extra_args):
        del params, extra_args
        return scaling.by(updates, scale), state

    def takes_out(updates, state, params=None, **extra_args):
        del params
        return scaling.by(updates, extra_args.get("scale", 1.0)), state

    def passes_on(updates, state, params=None, **extra_args):
        return names(updates, state, params, **extra_args)

    update = {
        "names": names,
        "takes out": takes_out,
        "passes on": passes_on,
        "in a method": scaling.update,
        "passes to a method": scaling.passes_on,
    }[how]
    return optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
