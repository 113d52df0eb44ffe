"""`oa.accumulate` takes pullbacks, whose backward pass adds straight to the window.

From JAX 0.11 on it does. On an older JAX, and where something is in the way, the
gradient is computed first. The numbers are the same.
"""

import functools

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
from jax import lax

import optax_accum as oa
from tests.support import devices, hlo
from tests.support.devices import AXIS
from tests.support.errors import refused
from tests.support.training import (
    ADAM,
    ADDS_IN_PLACE,
    SGD,
    TAKES,
    WAYS,
    differentiated,
    needs_in_place,
    promoting,
    slow,
    stepper,
)
from tests.support.xla import optimized

pytestmark = pytest.mark.core

K, WINDOWS = 3, 2
NUMBERS = [3, 1, 2, 4, 2, 1]  # of examples
MASKS = jnp.stack([jnp.arange(4) < number for number in NUMBERS])
X = jax.random.normal(jax.random.key(0), (K * WINDOWS, 4, 3))
PARAMS = {
    "w": jax.random.normal(jax.random.key(1), (3, 4)),
    "b": jnp.full(4, 0.1),
    "out": jnp.linspace(-1.0, 1.0, 4),
}
close = functools.partial(chex.assert_trees_all_close, rtol=2e-5, atol=2e-6)


def total(params, x, mask):
    """The sum over the examples that `mask` counts."""
    h = jnp.tanh(x @ params["w"] + params["b"][None])
    squares = jnp.abs(h @ params["out"]) ** 2
    return jnp.sum(jnp.where(mask, squares, jnp.zeros_like(squares)))


def loss(params, x, mask):
    """The mean over the examples that `mask` counts."""
    sum_ = total(params, x, mask)
    return sum_ / jnp.maximum(mask.sum(), 1).astype(sum_.dtype)


def training_step(tx, takes="pullbacks", way="update_params", loss=loss):
    """``step(params, state, x, mask, **kwargs) -> (params, state)``."""

    def step(params, state, x, mask, **kwargs):
        value, grads = differentiated(takes, loss, params, x, mask)
        arguments = {"weight": mask.sum(), "value": value} | kwargs
        return stepper(tx, way)(params, state, grads, **arguments)

    return step


def run(step, tx, params=PARAMS, x=X, masks=MASKS, **given):
    """`step` on all micro-batches; each of the `given` is a list, one for each."""
    state = tx.init(params)
    for i in range(len(x)):
        own = {name: values[i] for name, values in given.items()}
        params, state = step(params, state, x[i], masks[i], **own)
    return params, state


def train(tx, takes="pullbacks", way="update_params", loss=loss, **kwargs):
    """As `run`, in a compiled step, with Python numbers and bools static."""
    static = [name for name in ("weight", "boundary") if name in kwargs]
    static = [name for name in static if not isinstance(kwargs[name][0], jax.Array)]
    step = training_step(tx, takes, way, loss)
    return run(jax.jit(step, static_argnames=static), tx, **kwargs)


@functools.cache
def global_batches(inner, loss=loss, size=K):
    """Plain Optax on the examples of `size` micro-steps together."""

    @jax.jit
    def step(params, state, x, mask):
        updates, state = inner.update(jax.grad(loss)(params, x, mask), state, params)
        return optax.apply_updates(params, updates), state

    x, masks = X.reshape(-1, 4 * size, 3), MASKS.reshape(-1, 4 * size)
    params, _ = run(step, inner, x=x, masks=masks)
    return params


def is_in_place(tx, params=PARAMS, loss=loss, **kwargs):
    """Whether the backward pass adds to a `jax.Ref` in the program of a micro-step."""
    step = functools.partial(training_step(tx, loss=loss), **kwargs)
    return "run_state" in str(
        jax.make_jaxpr(step)(params, tx.init(params), X[0], MASKS[0])
    )


def traced(tx, loss, params=PARAMS, way="update", **kwargs):
    """A micro-step, without compiling it, with the pullback of `loss` at `params`."""

    def call(params, like):
        _, pullback = differentiated("pullbacks", loss, params, X[0], MASKS[0])
        return getattr(tx, way)(pullback, tx.init(like), like, **kwargs)

    return jax.eval_shape(call, params, PARAMS)


class TestWindows:
    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("weight", ["traced", slow("number")])
    def test_pullbacks_update_as_the_global_batch(self, way, weight):
        given = {"weight": NUMBERS} if weight == "number" else {}
        params, state = train(oa.accumulate(ADAM, K), way=way, **given)
        close(params, global_batches(ADAM))
        assert oa.gradient_step(state) == WINDOWS

    @pytest.mark.parametrize("reduction", ["ratio", slow("sum")])
    def test_sums_of_pullbacks_are_those_of_the_global_batch(self, reduction):
        tx = oa.accumulate(SGD, K, reduction=reduction)
        params, _ = train(tx, loss=total)
        whole = loss if reduction == "ratio" else total
        close(params, global_batches(SGD, whole))

    @pytest.mark.parametrize(
        "end", [slow("count"), "schedule", "traced", slow("bool"), "every_k=1"]
    )
    def test_however_a_window_ends_it_is_the_global_batch(self, end):
        every_k = {"count": K, "schedule": lambda n: K + 0 * n, "every_k=1": 1}.get(end)
        boundary = [i % K == K - 1 for i in range(K * WINDOWS)]
        if end == "traced":
            boundary = list(map(jnp.asarray, boundary))
        given = {} if every_k else {"boundary": boundary}
        params, _ = train(oa.accumulate(SGD, every_k), **given)
        close(params, global_batches(SGD, size=1 if every_k == 1 else K))

    @pytest.mark.parametrize("weight", ["traced", slow("number"), slow("eager")])
    def test_weight_0_contributes_nothing_even_if_the_gradient_is_nan(self, weight):
        weights = [3, 0, 2, 0, 2, 1]
        masks = MASKS & (jnp.array(weights) > 0)[:, None]
        expected, _ = train(oa.accumulate(SGD, K), "gradients", masks=masks)
        x = X.at[1].set(jnp.nan).at[3].set(jnp.nan)
        tx = oa.accumulate(SGD, K)
        if weight == "eager":
            params, _ = run(training_step(tx), tx, x=x, weight=weights)
        else:
            traced = [jnp.float32(w) for w in weights]
            given = traced if weight == "traced" else weights
            params, _ = train(tx, x=x, weight=given)
        close(params, expected)

    @pytest.mark.parametrize("reduction", ["ratio", slow("sum")])
    def test_without_a_mean_weight_0_counts(self, reduction):
        """It is a share of the denominator, and no mask."""
        tx = oa.accumulate(SGD, K, reduction=reduction)
        given = {"weight": [jnp.float32(w) for w in (3, 0, 2, 0, 2, 1)]}
        results = [train(tx, takes, loss=total, **given)[0] for takes in TAKES]
        close(*results)

    def test_a_window_of_weight_0_updates_nothing(self):
        params, state = train(oa.accumulate(SGD, K), masks=jnp.zeros_like(MASKS))
        chex.assert_trees_all_equal(params, PARAMS)
        assert oa.gradient_step(state) == 0

    def test_the_state_is_that_of_gradients(self):
        """Also in an open window, with its value: types, and up to rounding numbers."""
        tx = oa.accumulate(SGD, K)
        (_, state), (_, expected) = (train(tx, takes, x=X[:5]) for takes in TAKES)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, expected)
        assert jax.typeof(state.window.loss) == jax.typeof(expected.window.loss)
        close(state, expected)
        close(oa.accumulated(state), oa.accumulated(expected))
        assert not oa.has_updated(state)

    def test_one_trace_serves_every_micro_step(self):
        tx = oa.accumulate(SGD, K)
        step = jax.jit(chex.assert_max_traces(training_step(tx), n=1))
        chex.clear_trace_counter()
        run(step, tx)


def widened(params):
    """What is bfloat16 in float32."""
    return jax.tree.map(
        lambda p: p.astype("float32") if p.dtype == "bfloat16" else p, params
    )


def wide_loss(params, *batch):
    """Parameters cast to float32 before anything else."""
    return loss(widened(params), *batch)


def narrow_loss(params, x, mask):
    """A loss in the parameters' own dtype."""
    return loss(params, x.astype(params["w"].dtype), mask)


def half_loss(params, *batch):
    """A float32 loss that computes in float16."""
    return narrow_loss(cast("float16", params=params), *batch).astype("float32")


def cast(dtype, names=tuple(PARAMS), params=PARAMS):
    """`params`, with those of these `names` in `dtype`."""
    return params | {name: params[name].astype(dtype) for name in names}


class TestTypes:
    def check(self, inner=SGD, params=PARAMS, loss=loss, tolerance=2e-5, **options):
        tx = oa.accumulate(inner, K, **options)
        weight = [jnp.float32(n) for n in NUMBERS]
        results, states = zip(
            *(train(tx, t, loss=loss, params=params, weight=weight) for t in TAKES),
            strict=True,
        )
        chex.assert_trees_all_equal_shapes_and_dtypes(*states)
        chex.assert_trees_all_close(
            *map(widened, results), rtol=tolerance, atol=tolerance / 10
        )

    def test_a_mixed_tree_goes_in_place_leaf_by_leaf(self):
        params = cast("bfloat16", ["w"])
        self.check(params=params, loss=wide_loss, tolerance=1e-2)
        tx = oa.accumulate(SGD, K)
        assert is_in_place(tx, params, wide_loss) == ADDS_IN_PLACE

    def test_bfloat16_parameters_are_computed_first(self):
        params = cast("bfloat16")
        self.check(params=params, loss=wide_loss, tolerance=1e-2)
        assert not is_in_place(oa.accumulate(SGD, K), params, wide_loss)

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, slow(jnp.float16)])
    def test_a_narrow_accumulator_takes_pullbacks(self, dtype):
        self.check(accumulator_dtype=dtype, tolerance=1e-2)

    def test_a_narrow_accumulator_is_rounded_once_per_micro_batch(self):
        """And not once for each use of a parameter, each against the whole window."""

        def often(params, x, mask):
            del mask

            def add(h, x):
                return h + (params["w"] * x).astype(jnp.float32), None

            return jnp.sum(lax.scan(add, jnp.zeros(3), jnp.stack([x[0]] * 32))[0])

        params = {"w": jnp.ones(3, jnp.bfloat16)}
        tx = oa.accumulate(SGD, accumulator_dtype=jnp.bfloat16)
        step = jax.jit(training_step(tx, loss=often), static_argnames="boundary")
        x = jnp.ones((16, 4, 3), jnp.bfloat16)
        masks = jnp.ones((16, 1), bool)
        _, state = run(step, tx, params, x, masks, boundary=[False] * 16)
        chex.assert_trees_all_close(
            state.window.grads["w"], jnp.full(3, 512.0, "bfloat16")
        )

    def test_a_large_weight_does_not_overflow_float16(self):
        """The gradient is computed with a cotangent of 1 there."""
        tx = oa.accumulate(SGD, K)
        given = {"weight": [jnp.float32(1e6 * n) for n in NUMBERS]}
        params, _ = train(tx, loss=half_loss, **given)
        close(params, train(tx, "gradients", loss=half_loss, **given)[0])
        assert is_in_place(tx, loss=half_loss) == ADDS_IN_PLACE

    def test_a_weight_of_301_is_not_rounded_to_bfloat16(self):
        params, tx = PARAMS, oa.accumulate(SGD, K)
        given = {"weight": [jnp.float32(w) for w in (301, 1, 1, 1, 301, 1)]}
        windows = [
            train(tx, t, loss=narrow_loss, params=params, x=X[:2], **given)[1].window
            for t in TAKES
        ]
        chex.assert_trees_all_close(*windows, rtol=1e-6)

    @pytest.mark.parametrize(
        "dtype", [slow("complex64"), slow("float64"), "complex128"]
    )
    def test_complex_and_double_parameters(self, dtype):
        def of_dtype(params, x, mask):
            return loss(params, x.astype(dtype), mask)

        with jax.enable_x64(dtype != "complex64"):
            params = cast(dtype)
            if dtype.startswith("complex"):
                params = jax.tree.map(lambda p: p * (1 + 0.5j), params)
            self.check(params=params, loss=of_dtype)
            tx = oa.accumulate(SGD, K)
            assert is_in_place(tx, params, of_dtype) == ADDS_IN_PLACE

    def test_integers_among_the_parameters_pass_through(self):
        """Their gradient is float0."""
        params = PARAMS | {"ids": jnp.arange(3)}
        inner = optax.masked(SGD, {name: name != "ids" for name in params})
        tx = oa.accumulate(inner, K)
        trained, _ = train(tx, params=params)
        expected, _ = train(oa.accumulate(SGD, K))
        close(trained, expected | {"ids": jnp.arange(3)})

    def test_none_and_unused_parameters_have_no_gradient(self):
        params = PARAMS | {"none": None, "unused": jnp.ones(2)}
        tx = oa.accumulate(SGD, K)
        trained, _ = train(tx, params=params)
        close(trained, global_batches(SGD) | {"none": None, "unused": jnp.ones(2)})

    @pytest.mark.parametrize("compiled", [True, slow(False)])
    def test_a_loss_that_uses_no_parameter_has_a_gradient_of_0(self, compiled):
        tx = oa.accumulate(SGD, K)
        step = training_step(tx, loss=lambda *batch: jnp.sum(batch[1]))
        params, state = run(jax.jit(step) if compiled else step, tx)
        chex.assert_trees_all_equal(params, PARAMS)
        assert oa.gradient_step(state) == WINDOWS


class TestTransformations:
    @needs_in_place
    @pytest.mark.parametrize("reduction", ["mean", slow("ratio"), slow("sum")])
    def test_the_backward_pass_adds_in_place(self, reduction):
        assert is_in_place(oa.accumulate(SGD, K, reduction=reduction))

    @pytest.mark.parametrize("way", [slow("update"), "update_params"])
    def test_outside_of_jit(self, way):
        tx = oa.accumulate(SGD, K)
        params, _ = run(training_step(tx, way=way), tx)
        close(params, global_batches(SGD))

    def test_with_jit_disabled(self):
        tx = oa.accumulate(SGD, K)
        with jax.disable_jit():
            _, state = run(training_step(tx), tx, x=X[:1])
        _, expected = train(tx, "gradients", x=X[:1])
        close(state, expected)

    @pytest.mark.parametrize("way", [slow("update"), "update_params"])
    def test_with_parameters_and_state_donated(self, way):
        tx = oa.accumulate(SGD, K)
        step = jax.jit(training_step(tx, way=way), donate_argnums=(0, 1))
        params, _ = run(step, tx, params=jax.tree.map(jnp.copy, PARAMS))
        close(params, global_batches(SGD))

    def test_in_a_scan_over_micro_steps(self):
        tx = oa.accumulate(SGD, K)
        step = training_step(tx)

        @jax.jit
        def scanned(carry):
            def body(carry, batch):
                return step(*carry, *batch), None

            return lax.scan(body, carry, (X, MASKS))[0]

        params, _ = scanned((PARAMS, tx.init(PARAMS)))
        close(params, global_batches(SGD))

    def of_several(self, takes, loss=loss):
        """Trains three models at once, under `jax.vmap`, each with its own weights."""
        tx = oa.accumulate(SGD, K)

        def step(params, state, weight, x, mask):
            return training_step(tx, takes, loss=loss)(
                params, state, x, mask, weight=weight
            )

        models = jax.tree.map(lambda p: jnp.stack([p, -p, 2 * p]), PARAMS)
        weights = jnp.array([[3.0, 1.0, 2.0], [0.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
        mapped = jax.jit(jax.vmap(step, (0, 0, 0, None, None), axis_name="models"))
        state = jax.jit(jax.vmap(tx.init))(models)
        for i in range(K):
            models, state = mapped(models, state, weights[:, i], X[i], MASKS[i])
        return models

    def test_of_several_models_under_vmap(self):
        """Some count in a micro-step and some do not: the branch is a select there."""
        close(*map(self.of_several, TAKES))

    @pytest.mark.slow
    def test_of_models_that_exchange_data_under_vmap(self):
        def coupled(params, x, mask):
            norm = jnp.sum(params["out"] ** 2)
            return loss(params, x, mask) * lax.pmean(norm, "models")

        close(*(self.of_several(takes, coupled) for takes in TAKES))

    @pytest.mark.parametrize("derivative", [jax.grad, slow(jax.jacfwd)])
    def test_the_training_has_a_derivative(self, derivative):
        """With respect to the first parameters, and to the weights."""
        tx = oa.accumulate(SGD, 2)

        def after(takes, rate, weights):
            params = jax.tree.map(lambda p: rate * p, PARAMS)
            step = training_step(tx, takes)
            params, _ = run(step, tx, params, X[:2], weight=list(weights))
            return loss(params, X[2], MASKS[2])

        gradients = [
            jax.jit(derivative(functools.partial(after, takes), (0, 1)))(
                jnp.float32(0.7), jnp.array([3.0, 0.0])
            )
            for takes in TAKES
        ]
        close(*gradients)

    def test_beside_auxiliary_outputs(self):
        tx = oa.accumulate(SGD, K)

        @jax.jit
        def step(params, state, x, mask):
            def with_aux(params):
                return loss(params, x, mask), mask.sum()

            value, pullback, weight = jax.vjp(with_aux, params, has_aux=True)
            return tx.update_params(pullback, state, params, weight=weight, value=value)

        params, _ = run(step, tx)
        close(params, global_batches(SGD))

    def test_from_one_compiled_function_to_another(self):
        tx = oa.accumulate(SGD, K)

        @jax.jit
        def forward(params, x, mask):
            return jax.vjp(lambda params: loss(params, x, mask), params)

        @jax.jit
        def backward(params, state, pullback, weight):
            return tx.update_params(pullback, state, params, weight=weight)

        def step(params, state, x, mask):
            _, pullback = forward(params, x, mask)
            return backward(params, state, pullback, mask.sum())

        params, _ = run(step, tx)
        close(params, global_batches(SGD))

    def test_of_layers_in_a_scan(self):
        """Rematerialised, with an inner `jax.jit`."""
        params = PARAMS | {"layers": jnp.stack([jnp.eye(4), jnp.ones((4, 4)) / 2])}

        def deep(params, x, mask):
            def layer(h, w):
                return h + jnp.tanh(h @ w) * params["b"][None], None

            h, _ = lax.scan(jax.checkpoint(layer), x @ params["w"], params["layers"])
            squares = jax.jit(jnp.square)(h @ params["out"])
            return jnp.sum(jnp.where(mask, squares, 0)) / mask.sum().astype(x.dtype)

        tx = oa.accumulate(SGD, K)
        close(*(train(tx, t, loss=deep, params=params)[0] for t in TAKES))
        assert is_in_place(tx, params, deep) == ADDS_IN_PLACE

    def test_used_twice_it_adds_twice(self):
        tx = oa.accumulate(SGD, 2)

        @jax.jit
        def twice(params):
            _, pullback = jax.vjp(lambda params: loss(params, X[0], MASKS[0]), params)
            state = tx.init(params)
            for weight in (jnp.float32(1), jnp.float32(3)):
                params, state = tx.update_params(pullback, state, params, weight=weight)
            return params, pullback(jnp.float32(1))[0]

        params, grads = twice(PARAMS)
        close(params, jax.tree.map(lambda p, g: p - 0.1 * g, PARAMS, grads))

    @pytest.mark.slow
    def test_of_an_equinox_model(self):
        model = eqx.nn.MLP(3, "scalar", 4, 1, key=jax.random.key(3))
        tx = oa.accumulate(SGD, 2)

        def mean(model, x):
            return jnp.mean(jax.vmap(model)(x) ** 2)

        def trained(differentiate):
            params, static = eqx.partition(model, eqx.is_inexact_array)
            state = tx.init(params)
            for x in X[:2]:
                _, grads = differentiate(mean, eqx.combine(params, static), x)
                params, state = tx.update_params(grads, state, params)
            return params

        pullbacks = eqx.filter_jit(trained)(
            lambda f, model, x: eqx.filter_vjp(lambda model: f(model, x), model)
        )
        gradients = eqx.filter_jit(trained)(
            lambda f, model, x: eqx.filter_value_and_grad(f)(model, x)
        )
        close(pullbacks, gradients)


class TestOptax:
    @pytest.mark.parametrize(
        "around",
        [
            lambda tx: optax.chain(optax.clip_by_global_norm(0.1), tx),
            lambda tx: optax.chain(tx, optax.scale(1.0)),
            lambda tx: optax.chain(optax.identity(), optax.chain(tx)),
            lambda tx: optax.chain(optax.scale(2.0), optax.named_chain(("tx", tx))),
            lambda tx: optax.named_chain(("scale", optax.scale(2.0)), ("tx", tx)),
            lambda tx: optax.apply_if_finite(tx, 3),
        ],
    )
    def test_from_another_transformation_a_pullback_is_refused(self, around):
        """It would have been changed without a word: it is a tree to JAX."""
        tx = around(oa.accumulate(SGD, K))

        def unmasked(params, x, mask):
            del mask  # Optax does not clip booleans.
            return jnp.mean((x @ params["w"] + params["b"][None]) ** 2)

        with refused("`grads` is a pullback", "Put that inside", "gradients"):
            traced(tx, unmasked)

    @pytest.mark.parametrize("is_closed_over", [True, False])
    def test_what_jax_cannot_add_in_place_is_added_after(self, is_closed_over):
        def deep(params, x, mask):
            del mask

            def layer(h, w):
                first = params["w"][0] if is_closed_over else 0
                return jnp.tanh(lax.optimization_barrier(w) * h + first), None

            return jnp.mean(lax.scan(layer, x, params["w"])[0] ** 2)

        params, tx = {"w": jnp.linspace(0.1, 1, 4)}, oa.accumulate(SGD, K)
        close(*(train(tx, t, params=params, loss=deep)[0] for t in TAKES))

    @pytest.mark.slow
    def test_inside_of_another_accumulate(self):
        tx = oa.accumulate(oa.accumulate(SGD, 2), K)
        close(*(train(tx, takes)[0] for takes in TAKES))

    def test_as_grad_it_is_the_gradient_of_the_window(self):
        """As a line search takes it."""

        def update(updates, state, params=None, *, grad):
            del updates, params
            return jax.tree.map(lambda g: -0.1 * g, grad), state

        inner = optax.GradientTransformationExtraArgs(SGD.init, update)
        tx = oa.accumulate(inner, K)

        @jax.jit
        def step(params, state, x, mask):
            _, pullback = differentiated("pullbacks", loss, params, x, mask)
            return tx.update_params(
                pullback, state, params, weight=mask.sum(), grad=pullback
            )

        params, _ = run(step, tx)
        close(params, global_batches(SGD))
        with refused("`grad` must be the same object as `grads`"):
            traced(tx, loss, grad=PARAMS)

    @pytest.mark.slow
    @pytest.mark.usefixtures("loose_promotion")
    def test_of_the_fast_parameters_of_lookahead(self):
        tx = oa.accumulate(optax.lookahead(SGD, 2, 0.5), K)
        params = optax.LookaheadParams.init_synced(PARAMS)

        def step(takes, params, state, x, mask):
            _, grads = differentiated(takes, loss, params.fast, x, mask)
            updates, state = tx.update(grads, state, params, weight=mask.sum())
            return optax.apply_updates(params, updates), state

        close(
            *(
                run(jax.jit(functools.partial(step, takes)), tx, params)[0]
                for takes in TAKES
            )
        )


class TestErrors:
    @pytest.mark.parametrize(
        ("made", "shown"),
        [
            (lambda *args: loss(*args) * jnp.ones(2), "float32[2]"),
            (lambda *args: (loss(*args), args[0]["b"]), "float32[], float"),
            (lambda *args: loss(*args).astype("complex64"), "complex64[]"),
        ],
    )
    @pytest.mark.parametrize("way", WAYS)
    def test_what_is_not_a_loss_is_refused(self, made, shown, way):
        tx = oa.accumulate(SGD, K)
        advice = ("Reduce the loss", "has_aux=True")
        with refused("`grads` must be the pullback of a real scalar", shown, *advice):
            traced(tx, made, way=way)

    def test_the_pullback_of_several_arguments_is_refused(self):
        tx = oa.accumulate(SGD, K)
        _, pullback = jax.vjp(lambda p, x: loss(p, x, MASKS[0]), PARAMS, X[0])
        words = ("`grads` must be a pullback with respect to the parameters alone",)
        with refused(*words, "2 arguments", "Close over the others"):
            tx.update(pullback, tx.init(PARAMS), PARAMS)

    @pytest.mark.parametrize("every_k", [1, K])
    def test_the_pullback_of_other_parameters_is_refused(self, every_k):
        tx = oa.accumulate(SGD, every_k)
        others = PARAMS | {"w": jnp.ones((3, 5)), "b": jnp.ones(5), "out": jnp.ones(5)}
        with refused("`grads['b']` has shape (5,)", "`params['b']` has shape (4,)"):
            traced(tx, loss, others)
        more = PARAMS | {"more": jnp.ones(1)}
        with refused("`grads['more']` is not in `params`"):
            traced(tx, loss, more)

    @pytest.mark.parametrize(
        ("options", "name"),
        [
            ({"skip": oa.skip_not_finite}, "`skip`"),
            ({"noise_decay": 0.9}, "`noise_decay`"),
            ({"every_k": oa.noise.adaptive_k(2, 8)}, "`every_k=oa.noise.adaptive_k`"),
        ],
    )
    def test_what_reads_every_gradient_is_refused(self, options, name):
        tx = oa.accumulate(SGD, **({"every_k": K} | options))
        words = (name, "every micro-batch's gradient", "jax.value_and_grad")
        with refused(*words, name):
            traced(tx, loss)

    @pytest.mark.parametrize("every_k", [1, K])
    @pytest.mark.parametrize(
        "function",
        [
            loss,
            functools.partial(loss, x=X[0], mask=MASKS[0]),
            jax.linearize(lambda params: loss(params, X[0], MASKS[0]), PARAMS)[1],
            jax.linear_transpose(lambda params: params["b"][0], PARAMS),
        ],
    )
    def test_another_function_is_refused(self, function, every_k):
        tx = oa.accumulate(SGD, every_k)
        words = ("`grads` must be the gradient, or its pullback", "got a function")
        with refused(*words, "jax.vjp(lambda params"):
            tx.update(function, tx.init(PARAMS), PARAMS)

    def test_gradients_that_can_be_called_are_gradients(self):
        """Of a model of Equinox, or with respect to a function with arrays in it."""
        for params in (
            eqx.nn.Linear(2, 2, key=jax.random.key(0)),
            jax.tree_util.Partial(jnp.add, jnp.ones(2)),
        ):
            tx = oa.accumulate(SGD, 1)
            after, _ = tx.update_params(params, tx.init(params), params)
            close(after, jax.tree.map(lambda p: 0.9 * p, params))


@pytest.mark.several_devices
class TestDevices:
    @pytest.mark.parametrize("way", ["pmap", "checked", slow("unchecked")])
    @pytest.mark.parametrize("update", ["update_params", slow("update")])
    def test_windows_on_devices_equal_the_global_batch(self, way, update):
        """Uneven weights, and in each step a device that has nothing but NaN."""
        x, masks = devices.examples(2 * K)
        tx = oa.accumulate(SGD, K, axis_name=AXIS)
        step, (params, state) = devices.windows(way, tx, update, "pullbacks")
        for batch in zip(x, masks, strict=True):
            params, state = step(params, state, *devices.whole(way, batch), None)
        expected = devices.PARAMS
        for window in (slice(0, K), slice(K, 2 * K)):
            counted = x[window][masks[window]]
            mask = jnp.ones(len(counted), bool)
            grads = jax.grad(devices.loss)(expected, counted, mask)
            expected = jax.tree.map(lambda p, g: p - 0.1 * g, expected, grads)
        close(devices.result(way, params), expected)
        assert jnp.all(jnp.asarray(oa.gradient_step(state)) == 2)

    @pytest.mark.parametrize("way", ["pmap", "checked", slow("unchecked")])
    def test_a_loss_that_exchanges_data_meets_devices_without_weight(self, way):
        """There is no branch around what they exchange: it would deadlock."""

        def coupled(params, x, mask):
            x = jnp.nan_to_num(x)
            mean = lax.pmean(jnp.mean(jnp.tanh(x @ params["w"])), AXIS)
            others = lax.all_gather(jnp.sum(params["b"]), AXIS)
            return devices.loss(params, x, mask) * (1 + mean) + jnp.sum(others)

        x, masks = devices.examples(K)
        tx = oa.accumulate(SGD, K, axis_name=AXIS)
        results = []
        for takes in TAKES:
            step, (params, state) = devices.windows(way, tx, takes=takes, loss=coupled)
            for batch in zip(x, masks, strict=True):
                params, state = step(params, state, *devices.whole(way, batch), None)
            results.append(devices.result(way, params))
        close(*results)


LAYERS, WIDTH, LENGTH = 16, 64, 8
SHAPES = {
    "embeddings": (32, WIDTH),
    "layers": {
        "qkv": (LAYERS, WIDTH, 3 * WIDTH),
        "out": (LAYERS, WIDTH, WIDTH),
        "up": (LAYERS, WIDTH, 4 * WIDTH),
        "down": (LAYERS, 4 * WIDTH, WIDTH),
    },
}


def decoder_loss(params, tokens):
    """That of a decoder, whose scanned layers compute in bfloat16."""

    def layer(h, own):
        own = jax.tree.map(lambda w: w.astype(jnp.bfloat16), own)
        h = h.astype(jnp.bfloat16)
        q, k, v = jnp.split(h @ own["qkv"], 3, -1)
        h = h + jax.nn.softmax(q @ k.T) @ v @ own["out"]
        h = h + jax.nn.gelu(h @ own["up"]) @ own["down"]
        return h.astype(jnp.float32), None

    h = params["embeddings"][tokens]
    h, _ = lax.scan(jax.checkpoint(layer), h, params["layers"])
    logits = h @ params["embeddings"].T
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens))


@needs_in_place
@pytest.mark.usefixtures("loose_promotion")
class TestCompiled:
    """Of layers in a scan the gradient is the largest temporary that there is."""

    PARAMS = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
        SHAPES,
        is_leaf=lambda shape: isinstance(shape, tuple),
    )
    TOKENS = jax.ShapeDtypeStruct((LENGTH,), jnp.int32)
    SCALAR = jax.ShapeDtypeStruct((), jnp.float32)
    SIZE = hlo.nbytes(PARAMS)

    @classmethod
    @functools.cache
    def least(cls):
        """The temporaries of the gradient of one micro-batch, and a tenth more."""
        step = jax.value_and_grad(decoder_loss)
        program = hlo.compiled(step, cls.PARAMS, cls.TOKENS, donate=())
        return hlo.temporaries(program) + 0.1 * cls.SIZE

    def program(self, takes="pullbacks", way="update_params", weight=None, **kwargs):
        """A donated micro-step with AdamW; a weight of None is traced."""
        tx = oa.accumulate(promoting(optax.adamw(1e-3)), every_k=4)

        def step(params, state, tokens, traced):
            value, grads = differentiated(takes, decoder_loss, params, tokens)
            return stepper(tx, way)(
                params,
                state,
                grads,
                weight=traced if weight is None else weight,
                value=value,
                **kwargs,
            )

        state = jax.eval_shape(tx.init, self.PARAMS)
        return hlo.compiled(step, self.PARAMS, state, self.TOKENS, self.SCALAR)

    @pytest.mark.parametrize(
        ("way", "weight", "boundary"),
        [
            ("update_params", None, None),
            ("update", 2, True),
            pytest.param("update", None, None, marks=pytest.mark.slow),
            pytest.param("update_params", 2, None, marks=pytest.mark.slow),
            pytest.param("update_params", 2, False, marks=pytest.mark.slow),
            pytest.param("update_params", 2, True, marks=pytest.mark.slow),
            pytest.param("update_params", None, True, marks=pytest.mark.slow),
            pytest.param("update", None, False, marks=pytest.mark.slow),
        ],
    )
    def test_a_micro_step_holds_no_gradient(self, way, weight, boundary):
        program = self.program(way=way, weight=weight, boundary=boundary)
        assert hlo.temporaries(program) < self.least()
        assert hlo.large_copies(program, LAYERS * WIDTH**2) == []

    def test_with_gradients_in_place_of_pullbacks_it_holds_one(self):
        """The same measurement, on a program that is known to hold one."""
        program = self.program("gradients")
        assert hlo.temporaries(program) > self.least() + 0.8 * self.SIZE

    @pytest.mark.several_devices
    @pytest.mark.parametrize("boundary", [None, slow(False)])
    @pytest.mark.parametrize("way", [slow("pmap"), "checked", slow("unchecked")])
    def test_devices_exchange_sums_in_the_boundary_alone(self, way, boundary):
        """There what is exchanged has a buffer of its own."""
        tx = oa.accumulate(promoting(optax.adamw(1e-3)), every_k=4, axis_name=AXIS)

        def step(params, state, tokens, weight):
            local = params
            if way == "checked":
                local = lax.pcast(params, AXIS, to="varying")
            value, pullback = differentiated("pullbacks", decoder_loss, local, tokens)
            return tx.update_params(
                pullback,
                state,
                params,
                weight=weight.reshape(()),
                value=value,
                boundary=boundary,
            )

        def several(tree):
            return jax.tree.map(
                lambda x: jax.ShapeDtypeStruct((devices.COUNT, *x.shape), x.dtype), tree
            )

        params, state = self.PARAMS, jax.eval_shape(tx.init, self.PARAMS)
        tokens, weight = several((self.TOKENS, self.SCALAR))
        if way == "pmap":
            params, state = several((params, state))
        else:
            state = jax.eval_shape(
                lambda state: oa.sharding.stack_windows(state, devices.COUNT), state
            )
            tokens = jax.ShapeDtypeStruct((devices.COUNT * LENGTH,), jnp.int32)
        axes = 0 if way == "pmap" else None, "state", 0, 0
        mapped = devices.inside(way, step, axes, (None, "state"), donate=(0, 1))
        program = optimized(mapped.lower(params, state, tokens, weight))
        if boundary is None:
            assert hlo.exchanges(program) == {"all-reduce, branch": 1}
            assert hlo.temporaries(program) < self.least() + 1.01 * self.SIZE
        else:
            assert hlo.exchanges(program) == {}
            assert hlo.temporaries(program) < self.least()
