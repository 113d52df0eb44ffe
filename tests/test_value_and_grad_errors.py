"""What `oa.value_and_grad` says to who gets it wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_accum as oa
from tests.support.errors import saying

PARAMS = {"w": jnp.ones(3)}
X = np.ones((10, 3), np.float32)


def loss(params, batch):
    return jnp.mean(batch @ params["w"])


def raises(error, *words):
    return pytest.raises(error, match=saying(*words))


def run(fun=loss, *args, **options):
    if not {"num_microbatches", "microbatch_size"} & set(options):
        options["num_microbatches"] = 5
    args = args or (PARAMS, X)
    return oa.value_and_grad(fun, **options)(*args)


# --- Sizes ---


@pytest.mark.parametrize("sizes", [(), (2, 5)])
def test_neither_or_both_sizes_are_refused(sizes):
    options = dict(zip(("num_microbatches", "microbatch_size"), sizes, strict=False))
    for function in (oa.value_and_grad, oa.grad):
        with raises(
            ValueError,
            "exactly one of `num_microbatches` and `microbatch_size`",
            f"microbatch_size={5 if sizes else None}",
        ):
            function(loss, **options)


@pytest.mark.parametrize("name", ["num_microbatches", "microbatch_size"])
def test_a_size_that_is_not_a_positive_integer_is_refused(name):
    for size in (0, -3):
        with raises(ValueError, f"`{name}` must be an int >= 1", f"got {size}"):
            oa.value_and_grad(loss, **{name: size})
    for other in (2.0, "4", True, (2,)):
        with raises(TypeError, f"`{name}` must be an int >= 1", f"got {other!r}"):
            oa.value_and_grad(loss, **{name: other})
    run(**{name: np.int64(5)})


def test_a_size_above_the_batch_is_refused():
    with raises(
        ValueError,
        "`microbatch_size=11` is more than the batch has",
        "`batch` holds 10 examples",
        "Use at most 10",
    ):
        run(microbatch_size=11)


@pytest.mark.parametrize("number", [3, 4, 20])
def test_a_number_that_does_not_divide_the_batch_is_refused(number):
    with raises(
        ValueError,
        f"`num_microbatches={number}` does not divide the batch",
        "`batch` holds 10 examples along axis 0",
        "Use 1, 2, 5 or 10",
        "`microbatch_size`, which takes any size up to 10",
    ):
        run(num_microbatches=number)


def test_a_batch_of_one_example_cannot_be_split_in_two():
    with raises(
        ValueError, "`batch` holds 1 example along", "Use 1, or `microbatch_size`"
    ):
        run(loss, PARAMS, X[:1], num_microbatches=2)


# --- The batch ---


def test_different_numbers_of_examples_are_refused():
    def fun(params, batch, *, mask):
        return loss(params, batch["x"][0]) * mask.sum()

    with raises(
        ValueError,
        "the same number of examples along `batch_axis=0`",
        "`batch['x'][0]` has 10, but `mask` has 9",
    ):
        oa.value_and_grad(fun, num_microbatches=5, batch_argnames="mask")(
            PARAMS, {"x": [X]}, mask=np.ones(9)
        )


def test_a_scalar_in_the_batch_is_refused():
    def fun(params, batch):
        return loss(params, batch["x"]) * batch["scale"]

    with raises(
        ValueError,
        "`batch['scale']` is a scalar",
        "examples along `batch_axis=0`",
        "not in `batch_argnums` or `batch_argnames`",
    ):
        run(fun, PARAMS, {"x": X, "scale": 2.0})


def test_a_batch_axis_that_does_not_exist_is_refused():
    with raises(ValueError, "`batch` has shape (10, 3)", "`batch_axis=2`"):
        run(batch_axis=2)


def test_an_empty_batch_is_refused():
    with raises(ValueError, "the batch is empty: `batch` has 0 examples"):
        run(loss, PARAMS, X[:0], microbatch_size=1)
    with raises(ValueError, "hold no array to split", "`batch`"):
        run(loss, PARAMS, {"x": None})
    with raises(ValueError, "hold no array to split", "name none"):
        run(batch_argnums=())


def test_an_error_names_variadic_arguments_by_position():
    def fun(params, *batches):
        return loss(params, batches[0])

    with raises(ValueError, "`args[1]` has 10, but `args[2]['y']` has 9"):
        run(fun, PARAMS, X, {"y": X[:9]}, batch_argnums=(1, 2))


# --- Roles ---


@pytest.mark.parametrize("option", ["weight", "skip"])
@pytest.mark.parametrize("value", [32, True])
def test_an_option_that_is_not_a_function_is_refused(option, value):
    words = (f"`{option}` must be a function", f"got {value!r}")
    with raises(TypeError, *words):
        oa.value_and_grad(loss, num_microbatches=5, **{option: value})


@pytest.mark.parametrize("make", [oa.value_and_grad, oa.microbatch])
def test_a_weight_that_does_not_take_the_arguments_of_the_loss_is_refused(make):
    def weight(batch):
        return len(batch)

    def with_labels(params, x, y):
        return loss(params, x) * y.mean()

    options = {"num_microbatches": 5, "batch_argnums": (1, 2), "weight": weight}
    words = ("`weight` is called as `fun` is", "(params, x, y)", "(batch)")
    with raises(TypeError, *words):
        make(with_labels, **options)(PARAMS, X, X)


def test_a_traced_number_of_micro_batches_is_refused():
    def call(k):
        return oa.value_and_grad(loss, num_microbatches=k)

    with raises(TypeError, "`num_microbatches` must be an int", "traced", "static"):
        jax.jit(call)(5)


def test_a_position_missing_from_the_call_is_refused():
    with raises(
        ValueError,
        "`batch_argnums` names the positional argument 1",
        "called with 1",
        "batch_argnums=() and `batch_argnames`",
    ):
        oa.value_and_grad(loss, num_microbatches=5)(PARAMS)
    for name in ("argnums", "carry_argnum", "rng_argnums"):
        with raises(ValueError, f"`{name}` names the positional argument 2"):
            run(**{name: 2})


def test_a_name_missing_from_the_call_is_refused():
    with raises(
        ValueError, "`batch_argnames` names the argument 'mask'", "with params, batch"
    ):
        run(batch_argnames=("mask",))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"argnums": 1}, "`argnums` and `batch_argnums` both name argument 1, `batch`"),
        ({"argnums": -1}, "`argnums` and `batch_argnums` both name argument 1"),
        ({"argnums": (0, 0)}, "`argnums` twice names argument 0, `params`"),
        ({"carry_argnum": 1}, "`batch_argnums` and `carry_argnum` both name"),
        ({"carry_argnum": 0}, "`argnums` and `carry_argnum` both name"),
        ({"rng_argnums": (0,)}, "`argnums` and `rng_argnums` both name"),
    ],
)
def test_an_argument_with_two_roles_is_refused(options, words):
    with raises(ValueError, words, "an argument has one role"):
        run(**options)


@pytest.mark.parametrize("name", ["argnums", "batch_argnums", "rng_argnums"])
def test_positions_that_are_not_integers_are_refused(name):
    for value in ("batch", 1.0, ("x",), None):
        with raises(TypeError, f"`{name}` must be an int or several ints", repr(value)):
            run(**{name: value})


def test_an_rng_argument_that_is_not_a_key_is_refused():
    def fun(params, batch, rngs):
        del rngs
        return loss(params, batch)

    vector = jnp.zeros(3, jnp.uint32)
    for bad in (0, jnp.zeros(2), jnp.zeros((2, 3), jnp.uint32), vector):
        with raises(
            TypeError,
            "`rngs['dropout']` is in `rng_argnums` or `rng_argnames` and must be a",
            f"got shape {jnp.shape(bad)}",
        ):
            run(fun, PARAMS, X, {"dropout": bad}, rng_argnums=2)


# --- What `fun` returns ---


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (lambda x: x.mean(-1), ("got shape (2,) and dtype float32", "Reduce it")),
        (lambda x: x.sum().astype(int), ("got shape () and dtype int32",)),
        (lambda x: x.sum() > 0, ("dtype bool",)),
        (lambda x: x.sum() + 1j, ("dtype complex64",)),
        (lambda x: (x.sum(), x), ("got a tuple of 2", "has_aux=True")),
        (lambda x: {"loss": x.sum()}, ("got dict",)),
        (lambda _: None, ("got NoneType",)),
    ],
)
def test_a_value_that_cannot_be_differentiated_is_refused(result, words):
    def fun(params, batch):
        return result(batch * params["w"][None])

    with (
        jax.numpy_dtype_promotion("standard"),
        raises(TypeError, "`fun` must return a real floating scalar", *words),
    ):
        run(fun)


def test_a_real_value_is_refused_with_holomorphic():
    params = {"w": jnp.ones(3, jnp.complex64)}
    words = "complex scalar with `holomorphic=True`", "got shape () and dtype float32"
    with raises(TypeError, *words):
        run(lambda p, b: jnp.sum(b) * p["w"][0].real, params, X, holomorphic=True)


@pytest.mark.parametrize(
    ("options", "result", "words"),
    [
        ({"has_aux": True}, 1.0, ("(value, aux)", "got float")),
        ({"has_aux": True}, (1.0, 2, 3), ("(value, aux)", "got 3 things")),
        ({"carry_argnum": 2}, 1.0, ("(value, carry)", "got float")),
        (
            {"carry_argnum": 2, "has_aux": True},
            (1.0, 2.0),
            ("(value, (aux, carry))", "got float, not a pair"),
        ),
    ],
)
def test_a_result_that_is_not_a_pair_is_refused(options, result, words):
    with raises(TypeError, "`fun` must return", *words):
        run(lambda params, batch, carry: result, PARAMS, X, 0.0, **options)  # noqa: ARG005


def test_a_traced_value_is_shown_by_its_type_and_not_by_its_class():
    with raises(TypeError, "(value, aux)", "got float32[]"):
        run(has_aux=True)
    with raises(TypeError, "`skip` must return", "predicates do; got bool[]"):
        run(skip=lambda grads, step, params: grads["w"][0] > 0)  # noqa: ARG005
    with raises(
        TypeError, "`weight` must be a real scalar", "got an array, complex64[]"
    ):
        run(weight=lambda p, b: jax.lax.complex(p["w"][0], 1.0))  # noqa: ARG005

    @jax.jit
    def f(k):
        return oa.value_and_grad(loss, num_microbatches=k)(PARAMS, X)

    with raises(TypeError, "`num_microbatches` must be an int", "an array, int32[]"):
        f(5)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (
            lambda s: {"mean": s["mean"].astype(jnp.bfloat16)},
            TypeError,
            ("`stats['mean']`", "got float32[3]", "returned bfloat16[3]"),
        ),
        (
            lambda s: {"mean": s["mean"][:2]},
            TypeError,
            ("`stats['mean']`", "got float32[3]", "returned float32[2]"),
        ),
        (
            lambda s: {"mean": s["mean"], "var": s["mean"]},
            ValueError,
            ("`carry['var']` is not in `stats`", "in the same structure"),
        ),
        (lambda _: {}, ValueError, ("`stats['mean']` has no counterpart",)),
    ],
)
def test_a_carry_that_changes_its_type_is_refused(change, error, words):
    def fun(params, batch, stats):
        return loss(params, batch), change(stats)

    with raises(error, *words):
        run(fun, PARAMS, X, {"mean": jnp.zeros(3)}, carry_argnum=2)


# --- Auxiliary outputs ---


def with_aux(params, batch):
    value = loss(params, batch)
    return value, {"value": value, "x": batch}


def test_an_unknown_aux_policy_is_refused():
    for policies in (
        "average",
        {"x": "stack", "value": "average"},
        ["mean", "average"],
    ):
        with raises(ValueError, "`aux` must be one of", '"concat"', "got 'average'"):
            run(with_aux, has_aux=True, aux=policies)


@pytest.mark.parametrize(
    "policies",
    [{"value": "mean"}, ["mean", "stack"], {"value": ["mean"], "x": "stack"}],
)
def test_aux_policies_that_are_not_a_prefix_are_refused(policies):
    with raises(
        ValueError,
        "a tree of policies that is a prefix of what `fun` returns",
        f"got {policies!r}",
        "'value': *",
    ):
        run(with_aux, has_aux=True, aux=policies)


def test_aux_policies_without_has_aux_are_refused():
    with raises(ValueError, "`aux='mean'`", "`has_aux` is False"):
        oa.value_and_grad(loss, num_microbatches=2, aux="mean")


def test_concat_of_outputs_without_examples_is_refused():
    with raises(
        ValueError,
        "`aux['value']` has the policy \"concat\"",
        "a micro-batch of 2 examples gave shape ()",
    ):
        run(with_aux, has_aux=True, aux="concat")

    def transposed(params, batch):
        return loss(params, batch), batch.T

    with raises(
        ValueError, "`aux`", "gave shape (3, 4)", "move the examples to axis 0"
    ):
        run(transposed, has_aux=True, aux="concat", microbatch_size=4)


def test_the_mean_of_a_key_is_refused():
    def fun(params, batch):
        return loss(params, batch), jax.random.key(0)

    with raises(TypeError, '`aux` has the policy "mean", but key<fry>', '"last"'):
        run(fun, has_aux=True, aux="mean")


def test_stacking_outputs_of_different_shapes_is_refused():
    with raises(
        ValueError,
        "`aux['x']` has the policy \"stack\"",
        "gave shape (2, 3) and the others (4, 3)",
        'Use "concat"',
    ):
        run(with_aux, has_aux=True, microbatch_size=4)


# --- Settings ---


def test_unknown_settings_are_refused():
    with raises(ValueError, '`reduction` must be one of "mean", "ratio", "sum"'):
        run(reduction="average")
    with raises(TypeError, "`accumulator_dtype`", "int32"):
        run(accumulator_dtype=jnp.int32)
    with raises(TypeError, "unexpected keyword argument 'microbatches'"):
        oa.grad(loss, microbatches=3)


@pytest.mark.parametrize(
    ("weight", "error", "words"),
    [
        (lambda p, b: b, ValueError, ("`weight` must be a scalar", "shape (2, 3)")),  # noqa: ARG005
        (lambda p, b: "2", TypeError, ("`weight` must be a real scalar", "got '2'")),  # noqa: ARG005
        (lambda p, b: -1, ValueError, ("`weight` must be finite and >= 0",)),  # noqa: ARG005
    ],
)
def test_a_weight_that_is_not_a_non_negative_number_is_refused(weight, error, words):
    with raises(error, *words):
        run(weight=weight)


def test_a_weight_of_auxiliary_output_without_has_aux_is_refused():
    with raises(ValueError, "`weight` has a parameter called `aux`", "has_aux=True"):
        run(weight=lambda p, b, aux: aux)  # noqa: ARG005


@pytest.mark.parametrize(
    ("number", "error", "words"),
    [
        (-1, ValueError, ("from 0 to 5", "got -1")),
        (6, ValueError, ("from 0 to 5", "got 6")),
        (np.int32(6), ValueError, ("from 0 to 5", "got 6")),
        (jnp.int32(6), ValueError, ("from 0 to 5", "got 6")),
        (1.0, TypeError, ("an integer from 0 to 5", "got 1.0")),
        (True, TypeError, ("an integer from 0 to 5", "got True")),
        (jnp.array([1]), ValueError, ("from 0 to 5", "shape (1,)")),
        (jnp.float32(1), TypeError, ("an integer from 0 to 5", "float32")),
    ],
)
def test_a_number_of_real_micro_batches_that_is_none_is_refused(number, error, words):
    with raises(error, "`num_real_microbatches`", *words):
        run(num_real_microbatches=number)


def test_a_loop_of_unknown_length_is_not_unrolled():
    @jax.jit
    def traced(number):
        return run(num_real_microbatches=number, unroll=2)

    with raises(ValueError, "`unroll=2`", "`num_real_microbatches`"):
        traced(1)
    run(num_real_microbatches=1, unroll=2)
    with raises(ValueError, "`unroll` must be a bool or an int >= 1; got 0"):
        run(unroll=0)


def test_a_skip_that_does_not_return_a_bool_is_refused():
    with raises(TypeError, "`skip` must return (bool scalar, info)", "shape (3,)"):
        run(skip=lambda grads, step, params: (grads["w"] > 0, ()))  # noqa: ARG005
    with raises(TypeError, "`skip` must return (bool scalar, info), as Optax's"):
        run(skip=lambda grads, step, params: grads["w"] > 0)  # noqa: ARG005


def test_a_complex_accumulator_of_real_gradients_is_refused():
    with raises(TypeError, "`accumulator_dtype` complex64 cannot hold", "['w']"):
        run(accumulator_dtype=jnp.complex64)


def test_differentiating_an_integer_argument_is_refused():
    with raises(TypeError, "int32"):
        run(lambda n, x: (n * x).sum() * 1.0, 3, X[:, 0].astype(np.int32))


def test_a_call_in_one_step_is_recognised():
    with raises(TypeError, "`argnums`", "got dict", "f(fun)(params, batch)"):
        oa.value_and_grad(loss, PARAMS, jnp.ones((4, 3)), num_microbatches=2)
