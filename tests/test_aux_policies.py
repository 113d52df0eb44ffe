"""Auxiliary outputs over counts of their own, and those that a function combines.

What `oa.value_and_grad` makes of them is what the whole batch gives.
"""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import optax_accum as oa
import optax_accum.flax as oaf
from tests.support import devices, hlo
from tests.support.devices import AXIS, COUNT
from tests.support.errors import refused
from tests.support.training import slow
from tests.support.xla import optimized

B, CLASSES = 12, 4
STRIDED = {"num_microbatches": 4}
SIZES = [slow(STRIDED), {"microbatch_size": 5}, slow({"microbatch_size": 11})]
every_size = pytest.mark.parametrize("size", SIZES, ids=str)


def make_batch(examples=B, seed=0):
    """Examples of three classes of `CLASSES`; some do not count, and are NaN."""
    random = np.random.default_rng(seed)
    batch = {
        "x": random.normal(size=(examples, 3)).astype(np.float32),
        "label": random.integers(0, CLASSES - 1, examples),
        "valid": random.random(examples) < 0.6,
    }
    batch["valid"][1::4] = False  # a whole micro-batch of `STRIDED`
    batch["x"][~batch["valid"]] = np.nan
    return batch


W = jnp.asarray(np.random.default_rng(1).normal(size=(3, CLASSES)), jnp.float32)
BATCH = make_batch()


def errors_of(w, batch):
    """The examples' losses, 0 where they do not count."""
    valid = batch["valid"][:, None]
    return jnp.sum(jnp.where(valid, jnp.tanh(batch["x"] @ w), 0) ** 2, -1)


def count(w, batch):
    del w
    return batch["valid"].sum()


def loss(w, batch):
    """A mean over the examples that count."""
    divisor = jnp.maximum(batch["valid"].sum(), 1)
    return jnp.sum(errors_of(w, batch)) / divisor.astype(jnp.float32)


def with_aux(aux_of, loss=loss):
    return lambda w, batch: (loss(w, batch), aux_of(w, batch))


def in_parts(aux_of, policies, loss=loss, **options):
    """The auxiliary output of all micro-batches."""
    options = {"weight": count, "aux": policies} | options
    if "microbatch_size" not in options:
        options = STRIDED | options
    f = jax.jit(oa.value_and_grad(with_aux(aux_of, loss), has_aux=True, **options))
    return lambda w, batch: f(w, batch)[0][1]


def close(got, wanted, rtol=1e-5):
    chex.assert_trees_all_equal_shapes_and_dtypes(got, wanted)
    chex.assert_trees_all_close(got, wanted, rtol=rtol, atol=1e-6)


# --- Ratios ---


def pairs(w, batch):
    """Sums with counts of their own: one, one for each, and one for several."""
    scores = jnp.where(batch["valid"][:, None], batch["x"] @ w, -1)
    member = jax.nn.one_hot(batch["label"], CLASSES, dtype=jnp.float32)
    member = jnp.where(batch["valid"][:, None], member, 0)
    is_right = scores.argmax(-1) == batch["label"]
    positive = scores > 0
    hits = jnp.sum(jnp.where(positive, member, 0), 0)
    return {
        "accuracy": (jnp.sum(is_right & batch["valid"]), batch["valid"].sum()),
        "precision": (hits.sum(), positive.sum()),
        "of each class": [(hits, member.sum(0)), {"load": (member.sum(0), 1)}],
        "none": None,
    }


def divided(tree):
    """What a "ratio" makes of the pairs of the whole batch."""

    def divide(pair):
        total, divisor = (jnp.asarray(x).astype(jnp.float32) for x in pair)
        return total / divisor

    return jax.tree.map(divide, tree, is_leaf=lambda x: isinstance(x, tuple))


@every_size
def test_ratios_equal_those_of_the_whole_batch(size):
    def with_examples(w, batch):
        aux = pairs(w, batch)
        total, _ = aux["of each class"][1]["load"]
        aux["of each class"][1]["load"] = total, len(batch["x"])
        return aux

    batch = BATCH | {"x": np.nan_to_num(BATCH["x"])}
    got = in_parts(with_examples, "ratio", weight=None, **size)(W, batch)
    close(got, jax.jit(lambda: divided(with_examples(W, batch)))())
    # Of nothing it is NaN: there are no examples of the last class.
    assert np.isnan(got["of each class"][0]).tolist() == [False] * 3 + [True]
    assert got["none"] is None
    assert float(got["accuracy"]) not in (0, 1)


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "ratio", "sum"])
def test_a_pair_may_be_the_whole_auxiliary_output(reduction):
    def pair(w, batch):
        return jnp.sum(errors_of(w, batch)), batch["valid"].sum()

    got = in_parts(pair, "ratio", reduction=reduction)(W, BATCH)
    close(got, jax.jit(loss)(W, BATCH))


@pytest.mark.slow
def test_pairs_may_stand_beside_other_policies():
    def aux(w, batch):
        del w
        return {"pair": (batch["valid"].sum(), 2), "other": (batch["valid"].sum(), 2)}

    got = in_parts(aux, {"pair": "ratio", "other": "sum"}, weight=None)(W, BATCH)
    total = BATCH["valid"].sum()
    assert got["pair"] == total / 8
    assert jax.tree.map(int, got["other"]) == (total, 8)


def test_narrow_sums_of_a_ratio_are_wide_and_the_result_is_narrow():
    def aux(w, batch):
        del w, batch
        narrow = jnp.asarray([257, 3], jnp.bfloat16)  # 257 is rounded to 256
        return {
            "bfloat16": (narrow, jnp.ones(2, jnp.bfloat16)),
            "float16": (jnp.float16(60000), jnp.float16(30000)),  # the most is 65504
            "int8": (jnp.int8(100), jnp.int8(50)),
            "bool": (jnp.asarray(True), jnp.asarray(True)),
        }

    size = {"microbatch_size": 1}
    batch = make_batch(301)
    got = in_parts(aux, "ratio", weight=None, **size)(W, batch)
    assert got["bfloat16"].tolist() == [256, 3]
    assert got["float16"].tolist() == got["int8"].tolist() == 2
    assert got["bool"] == 1
    kinds = jax.tree.map(lambda x: x.dtype.name, got)
    assert kinds["bfloat16"] == "bfloat16"
    assert kinds["float16"] == "float16"
    assert kinds["int8"] == kinds["bool"] == "float32"


# --- What a function combines ---


def extremes(w, batch):
    """The smallest and the largest loss, and which example has it."""
    losses = errors_of(w, batch)
    numbers = jnp.asarray(batch["number"])
    low, high = jnp.argmin(losses), jnp.argmax(losses)
    return {
        "low": {"loss": losses[low], "number": numbers[low]},
        "high": {"loss": losses[high], "number": numbers[high]},
    }


def more_extreme(a, b):
    def chosen(name, is_better):
        return jax.tree.map(lambda x, y: jnp.where(is_better, y, x), a[name], b[name])

    return {
        "low": chosen("low", b["low"]["loss"] < a["low"]["loss"]),
        "high": chosen("high", b["high"]["loss"] > a["high"]["loss"]),
    }


def product(w, batch):
    """The product of the examples' matrices, in their order."""
    del w
    angles = jnp.asarray(batch["number"]).astype(jnp.float32) ** 2
    entries = jnp.sin(jnp.outer(angles, jnp.arange(1.0, 5.0)))  # they do not commute
    matrices = entries.reshape(-1, 2, 2)
    return jax.lax.fori_loop(
        1, len(matrices), lambda i, left: left @ matrices[i], matrices[0]
    )


def combined(w, batch):
    losses = errors_of(w, batch)
    return {
        "most": losses.max(),
        "least": losses.min(),
        "each": batch["x"].max(0),
        "log sum": jax.nn.logsumexp(losses),
        "any": jnp.any(batch["label"] == 1),
        "product": product(w, batch),
        "extremes": extremes(w, batch),
    }


COMBINES = {
    "most": jnp.maximum,
    "least": jnp.minimum,
    "each": jnp.maximum,
    "log sum": jnp.logaddexp,
    "any": jnp.logical_or,
    "product": jnp.matmul,
    "extremes": more_extreme,
}


def numbered(examples=B, seed=0):
    """Examples that all count, and know their place in the batch."""
    batch = make_batch(examples, seed)
    x = np.random.default_rng(seed).normal(size=batch["x"].shape) - 2  # no maximum of 0
    everything = {"x": x.astype(np.float32), "valid": np.ones(examples, bool)}
    return batch | everything | {"number": np.arange(examples)}


IN_ORDER = {"microbatch_size": 5}  # contiguous


def test_functions_combine_as_in_the_whole_batch():
    """In the order of the batch: a product of matrices has an order."""
    got = in_parts(combined, COMBINES, **IN_ORDER)(W, numbered())
    close(got, jax.jit(lambda: combined(W, numbered()))())
    assert got["most"] > got["least"] > 0
    assert np.all(got["each"] < 0)


@pytest.mark.slow
def test_a_function_may_combine_all_of_the_auxiliary_output():
    got = in_parts(extremes, more_extreme)(W, numbered())
    close(got, jax.jit(extremes)(W, numbered()))


@pytest.mark.slow
def test_numbers_and_keys_may_be_combined():
    def aux(w, batch):
        del w
        return {"number": len(batch["x"]), "key": jax.random.key(batch["number"][0])}

    policies = {"number": jnp.maximum, "key": lambda a, b: a}  # noqa: ARG005
    got = in_parts(aux, policies, **IN_ORDER)(W, numbered())
    assert got["number"] == 5
    assert got["key"] == jax.random.key(0)


# --- Which micro-batches count ---

BOTH = {"ratio": "ratio", "least": jnp.minimum, "first": lambda a, b: a}  # noqa: ARG005


def of_losses(w, batch):
    """NaN where an example is that does not count."""
    losses = jnp.sum(jnp.tanh(batch["x"] @ w) ** 2, -1)
    first = jnp.asarray(batch["number"])[0]
    return {
        "ratio": (losses.sum(), len(losses)),
        "least": losses.min(),
        "first": first,
    }


def expected(w, batch, rows):
    kept = jax.tree.map(lambda x: x[rows], batch)
    aux = jax.device_get(jax.jit(of_losses)(w, kept))
    return aux | {"ratio": np.divide(*aux["ratio"], dtype=np.float32)}


def with_nothing(rows):
    """All examples count but those in `rows`, which are NaN."""
    batch = numbered()
    batch["valid"][rows] = False
    batch["x"][rows] = np.nan
    return batch, np.flatnonzero(batch["valid"])


@pytest.mark.parametrize("first", [0, slow(1), slow(3)], ids=str)
def test_micro_batches_of_weight_0_are_left_out_of_a_mean_even_if_nan(first):
    batch, kept = with_nothing(slice(first, None, 4))
    close(in_parts(of_losses, BOTH)(W, batch), expected(W, batch, kept))


@pytest.mark.parametrize("place", [0, slow(2)])
@pytest.mark.parametrize("reduction", ["mean", slow("ratio"), slow("sum")])
def test_rejected_micro_batches_are_left_out_even_if_nan(reduction, place):
    def bad_loss(w, batch):
        return jnp.mean(batch["x"] @ w)  # NaN where an example is

    batch, kept = with_nothing(slice(place, None, 4))
    options = {"reduction": reduction, "skip": oa.skip_not_finite, "weight": None}
    got = in_parts(of_losses, BOTH, bad_loss, **options)(W, batch)
    close(got, expected(W, batch, kept))


@pytest.mark.parametrize("reduction", ["ratio", slow("sum")])
def test_micro_batches_of_weight_0_count_in_a_ratio_and_a_sum(reduction):
    batch = numbered()
    batch["valid"][::4] = False
    got = in_parts(of_losses, BOTH, reduction=reduction)(W, batch)
    close(got, expected(W, batch, slice(None)))


@pytest.mark.parametrize("how", ["weight", "number"])
def test_of_no_micro_batch_a_ratio_is_nan_and_the_rest_is_zeros(how):
    batch, _ = with_nothing(slice(None) if how == "weight" else slice(0))
    options = {"num_real_microbatches": 0} if how == "number" else {}
    got = in_parts(of_losses, BOTH, **options)(W, batch)
    assert np.isnan(got["ratio"])
    assert got["least"] == 0


@pytest.mark.parametrize("is_traced", [slow(False), True])
@pytest.mark.parametrize("number", [2, slow(3)])
def test_micro_batches_that_do_not_run_are_left_out(number, is_traced):
    batch, kept = with_nothing(slice(number * 5, None))

    @functools.partial(jax.jit, static_argnums=() if is_traced else 0)
    def run(number):
        options = {"weight": None, "num_real_microbatches": number} | IN_ORDER
        return in_parts(of_losses, BOTH, **options)(W, batch)

    close(run(number), expected(W, batch, kept))


def test_micro_batches_of_weight_0_do_not_run():
    calls = []

    def aux(w, batch):
        jax.debug.callback(lambda: calls.append(0))
        return of_losses(w, batch)

    batch, kept = with_nothing(slice(0, None, 4))
    got = jax.block_until_ready(in_parts(aux, BOTH)(W, batch))
    jax.effects_barrier()
    assert len(calls) == 3
    close(got, expected(W, batch, kept))


# --- With everything else ---


@pytest.mark.slow
def test_a_carry_and_an_info_come_beside_them():
    def fun(w, batch, seen):
        return loss(w, batch), (of_losses(w, batch), seen + batch["valid"].sum())

    batch, kept = with_nothing(slice(0, None, 4))
    f = oa.value_and_grad(
        fun,
        has_aux=True,
        aux=BOTH,
        carry_argnum=2,
        weight=lambda w, batch, seen: count(w, batch),  # noqa: ARG005
        return_info=True,
        **STRIDED,
    )
    ((_, (aux, seen)), _), info = jax.jit(f)(W, batch, jnp.int32(1))
    close(aux, expected(W, batch, kept))
    assert seen == 1 + len(kept)
    assert info.weight == len(kept)


@pytest.mark.slow
def test_weights_may_come_from_a_pair():
    def from_pair(w, batch, aux):
        del w, batch
        return aux[1]

    def pair(w, batch):
        return jnp.sum(errors_of(w, batch)), batch["valid"].sum()

    f = oa.value_and_grad(
        with_aux(pair), has_aux=True, aux="ratio", weight=from_pair, **STRIDED
    )
    (value, ratio), _ = jax.jit(f)(W, BATCH)
    close((value, ratio), (jax.jit(loss)(W, BATCH),) * 2)


@pytest.mark.slow
def test_nnx_modules_take_the_policies():
    class Model(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(W)
            self.calls = nnx.Variable(jnp.zeros([], jnp.int32))

    def fun(model, batch):
        model.calls[...] += 1
        return loss(model.w[...], batch), of_losses(model.w[...], batch)

    model, (batch, kept) = Model(), with_nothing(slice(0, None, 4))
    f = oaf.value_and_grad(
        fun,
        has_aux=True,
        aux=BOTH,
        weight=lambda model, batch: batch["valid"].sum(),  # noqa: ARG005
        **STRIDED,
    )
    (_, aux), _ = nnx.jit(f)(model, batch)
    close(aux, expected(W, batch, kept))
    assert model.calls[...] == 3


@pytest.mark.slow
def test_under_vmap_each_has_its_own():
    """Of which micro-batches count in one and not in the other."""
    batches = [with_nothing(slice(i, None, 4)) for i in (0, 2)]
    stacked = jax.tree.map(lambda *x: np.stack(x), *[batch for batch, _ in batches])
    got = jax.vmap(in_parts(of_losses, BOTH), (None, 0))(W, stacked)
    wanted = [expected(W, batch, kept) for batch, kept in batches]
    close(got, jax.tree.map(lambda *x: jnp.stack(x), *wanted))


@pytest.mark.slow
def test_they_do_not_change_the_derivative_of_the_value():
    f = oa.value_and_grad(
        with_aux(of_losses), has_aux=True, aux=BOTH, weight=count, **STRIDED
    )
    batch = numbered()
    got = jax.jit(jax.grad(lambda w: f(w, batch)[0][0]))(W)
    close(got, jax.jit(jax.grad(loss))(W, batch))


def test_they_can_be_differentiated():
    """Even if a function could not be, of the zeros before the first micro-batch."""
    policies = BOTH | {"least": lambda a, b: 1 / (1 / a + 1 / b)}

    def whole(w):
        losses = jnp.sum(jnp.tanh(batch["x"] @ w) ** 2, -1)
        least = losses.reshape(3, 4).min(0)  # micro-batch i has the examples i + 4j
        return losses.mean() + 1 / jnp.sum(1 / least)

    def got(w):
        aux = in_parts(of_losses, policies)(w, batch)
        return aux["ratio"] + aux["least"]

    batch = numbered()
    of_parts, of_whole = (jax.jit(jax.grad(f))(W) for f in (got, whole))
    close(of_parts, of_whole, rtol=1e-4)


@pytest.mark.slow
def test_a_function_may_close_over_what_is_differentiated():
    def got(scale):
        def combine(a, b):
            return jnp.logaddexp(a * scale, b * scale) / scale

        return in_parts(of_losses, BOTH | {"least": combine})(W, numbered())["least"]

    def wanted(scale):
        losses = jnp.sum(jnp.tanh(numbered()["x"] @ W) ** 2, -1)
        least = losses.reshape(3, 4).min(0)
        return jax.nn.logsumexp(least * scale) / scale

    close(*(jax.jit(jax.value_and_grad(f))(jnp.float32(2)) for f in (got, wanted)))


# --- Across devices ---

everywhere = devices.parametrized(
    devices.INSIDE + devices.OUTSIDE, usual=("checked", "auto")
)
PER_DEVICE = 4


def on_devices():
    """On the first device nothing counts; nor does one micro-batch of each other."""
    batch = numbered(PER_DEVICE * COUNT)
    batch["valid"] = np.arange(PER_DEVICE * COUNT) % PER_DEVICE != 1
    batch["valid"][:PER_DEVICE] = False
    batch["x"][~batch["valid"]] = np.nan
    return batch


@jax.jit
def measured(w, batch):
    """Of one example, if micro-batches have one."""
    return {
        "ratio": pairs(w, batch)["of each class"][0],
        "least": errors_of(w, batch).min(),
        "product": product(w, batch),
        "extremes": extremes(w, batch),
    }


MEASURES = {
    "ratio": "ratio",
    "least": jnp.minimum,
    "product": jnp.matmul,
    "extremes": more_extreme,
}
MEASURING = {
    "has_aux": True,
    "aux": MEASURES,
    "weight": count,
    "num_microbatches": PER_DEVICE,
}


@pytest.mark.several_devices
@everywhere
def test_they_are_those_of_all_devices(way):
    """In the order of the batch, and of the examples that count."""
    f = devices.in_step(way, with_aux(measured), **MEASURING)
    batch = on_devices()
    (value, aux), _ = devices.result(way, f(W, devices.whole(way, batch)))
    kept = jax.tree.map(lambda x: x[batch["valid"]], batch)
    wanted = measured(W, kept)
    close(value, jax.jit(loss)(W, kept))
    close(aux, wanted | {"ratio": divided(wanted["ratio"])}, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.several_devices
def test_they_are_exchanged_once_after_the_loop():
    """With everything else: one exchange of floats, and one of integers."""

    def aux(w, batch):
        return of_losses(w, batch) | {"most": errors_of(w, batch).max()}

    f = devices.in_step(
        "auto",
        with_aux(aux),
        has_aux=True,
        aux=BOTH | {"most": jnp.maximum},
        num_microbatches=2,
    )
    program = optimized(f.lower(W, numbered(PER_DEVICE * COUNT)))
    assert hlo.exchanges(program) == {"all-reduce, entry": 2}


@pytest.mark.slow
@pytest.mark.several_devices
@pytest.mark.parametrize("way", devices.OUTSIDE)
def test_with_local_every_device_has_its_own(way):
    kind = {"auto": "Auto", "explicit": "Explicit"}[way]
    mesh = devices.mesh(getattr(jax.sharding.AxisType, kind))
    options = {"mesh": mesh, "axis_name": AXIS, "local": True, "return_info": True}
    f = oa.value_and_grad(with_aux(measured), **MEASURING, **options)
    batch = on_devices()
    ((_, aux), _), info = jax.device_get(jax.jit(f)(W, batch))
    assert info.weight.tolist() == [0] + [PER_DEVICE - 1] * (COUNT - 1)
    for i in range(1, COUNT):
        own = np.arange(len(batch["x"])) // PER_DEVICE == i
        kept = jax.tree.map(lambda x, own=own: x[own & batch["valid"]], batch)
        wanted = measured(W, kept)
        row = jax.tree.map(lambda x, i=i: x[i], aux)
        close(row, wanted | {"ratio": divided(wanted["ratio"])}, rtol=1e-4)
    assert np.isnan(aux["ratio"][0]).all()
    assert not aux["product"][0].any()


# --- What is refused ---


def refusing(aux_of, policies, *words, **options):
    with refused(*words):
        in_parts(aux_of, policies, **options)(W, BATCH)


class Pair(NamedTuple):
    """As large as a pair, but of fields that may be two metrics."""

    right: int
    seen: int


@pytest.mark.parametrize(
    ("aux", "place"),
    [
        (jnp.float32(1), "`aux`"),
        ([jnp.float32(1), 2], "`aux[0]`"),
        ((jnp.float32(1), None), "`aux[0]`"),
        ((1, 2, 3), "`aux[0]`"),
        ({"sum": 1, "count": 2}, "`aux['count']`"),
        ({"a": (1, 2), "b": jnp.ones(2)}, "`aux['b']`"),
        (Pair(1, 2), "`aux.right`"),
    ],
    ids=["array", "list", "none", "triple", "dict", "beside", "namedtuple"],
)
def test_a_ratio_of_what_is_no_pair_is_refused(aux, place):
    words = place, 'the policy "ratio"', "tuple of two arrays, (sum, count)", '"mean"'
    refusing(lambda w, batch: aux, "ratio", *words)  # noqa: ARG005


@pytest.mark.parametrize("counts", [np.ones(3), np.ones((2, 2)), np.ones(1)], ids=str)
def test_a_ratio_with_more_counts_than_sums_is_refused(counts):
    words = "`aux['a']`", "one count, or one per sum", "The order is (sum, count)"
    total = np.ones(2) if counts.ndim == 2 else np.float32(1)
    refusing(lambda w, batch: {"a": (total, counts)}, "ratio", *words)  # noqa: ARG005


def test_a_ratio_of_keys_is_refused():
    words = "`aux`", '"ratio"', "key<fry> cannot be added up"
    refusing(lambda w, batch: (jax.random.key(0), 1), "ratio", *words)  # noqa: ARG005


def raises(a, b):
    raise RuntimeError(f"{a} and {b}")


NOT_COMBINING = {
    "a reduction": (jnp.mean, "it raised", 'pass "mean"'),
    "of one": (jnp.abs, "it raised TypeError", "jnp.maximum"),
    "python's": (max, "it raised", "for the largest, jnp.maximum"),
    "raising": (raises, "it raised RuntimeError"),
    "another type": (jnp.greater, "got bool[3] for outputs float32[3]"),
    "another dtype": (
        lambda a, b: (a + b).astype(jnp.bfloat16),
        "got bfloat16[3] for outputs float32[3]",
    ),
    "another shape": (
        lambda a, b: jnp.concatenate([a, b]),
        "got float32[6] for outputs float32[3]",
    ),
    "another structure": (
        lambda a, b: (a, b),
        "got ('float32[3]', 'float32[3]') for outputs float32[3]",
    ),
    "nothing": (lambda a, b: None, "got None for outputs float32[3]"),  # noqa: ARG005
}


@pytest.mark.parametrize("name", NOT_COMBINING)
def test_a_function_that_does_not_combine_two_is_refused(name):
    combine, *said = NOT_COMBINING[name]
    words = "`aux['a']` has a function as its policy", "combine(a, b)", *said
    refusing(lambda w, batch: {"a": batch["x"].max(0)}, {"a": combine}, *words)  # noqa: ARG005


def test_what_a_function_raises_is_shown():
    with pytest.raises(TypeError) as error:
        in_parts(of_losses, BOTH | {"least": raises})(W, numbered())
    assert isinstance(error.value.__cause__, RuntimeError)


def test_a_function_for_an_array_is_refused_for_a_tree():
    words = "`aux`", "it raised TypeError", "the whole output", "a tree of policies"
    refusing(lambda w, batch: {"a": batch["x"]}, jnp.maximum, *words)  # noqa: ARG005


LAST = {"sum": "sum", "mean": "mean", "stack": "stack", "function": jnp.maximum}


@pytest.mark.parametrize("size", [slow(5), 11])  # 5, 5 and 2, or 11 and 1
@pytest.mark.parametrize(
    "name", ["sum", "function", "counts", *map(slow, ("mean", "stack", "sums"))]
)
def test_a_smaller_last_micro_batch_of_another_shape_is_refused(name, size):
    """Also that of one example, which could be broadcast to the others."""

    def aux(w, batch):
        each = errors_of(w, batch)
        return each if name in LAST else (each, each)

    words = "`aux` has", "(1,) and the others (11,)"
    if size == 5:
        words = "`aux` has", "(2,) and the others (5,)"
    policy = LAST.get(name, "ratio")
    refusing(aux, policy, *words, 'Use "concat"', microbatch_size=size)


@pytest.mark.parametrize("policy", ["sum", "mean"])
def test_the_same_is_refused_of_outputs_that_are_differentiated(policy):
    f = oa.microbatch(errors_of, microbatch_size=11, outputs=policy)
    with refused("`outputs` has", "(1,) and the others (11,)"):
        jax.eval_shape(f, W, BATCH)


def test_of_a_smaller_last_micro_batch_the_outputs_may_be_the_last():
    size = {"microbatch_size": 11}
    got = in_parts(errors_of, "last", **size)(W, BATCH)
    close(got, errors_of(W, BATCH)[11:])

    @jax.jit
    def of_number(number):
        options = size | {"num_real_microbatches": number}
        return in_parts(errors_of, "last", **options)(W, BATCH)

    with refused("`aux` has", "(1,) and the others (11,)", "a traced"):
        of_number(2)


@pytest.mark.parametrize("policy", ["ratio", jnp.maximum], ids=["ratio", "function"])
def test_outputs_that_are_differentiated_do_not_take_them(policy):
    with refused("`outputs` must be one of", '"mean", "sum", "last"'):
        oa.microbatch(errors_of, num_microbatches=2, outputs=policy)


def test_without_auxiliary_output_a_function_is_refused():
    with refused("combines auxiliary outputs", "has_aux=True"):
        oa.value_and_grad(loss, num_microbatches=2, aux=jnp.maximum)
