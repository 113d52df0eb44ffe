"""`check_equivalence`: one loss for each way of being different, and its name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import optax_accum as oa
from tests.support.devices import COUNT, mesh
from tests.support.errors import saying
from tests.support.training import slow

B, K = 24, 4
RANDOM = np.random.default_rng(0)
PARAMS = {
    "w": jnp.asarray(RANDOM.normal(size=(5, 6)), jnp.float32),
    "v": jnp.asarray(RANDOM.normal(size=6), jnp.float32),
}
X = jnp.asarray(RANDOM.normal(size=(B, 5)), jnp.float32)
# Micro-batches are strided: the first holds one that counts, the last holds all.
MASK = jnp.asarray(np.arange(B) % K >= np.arange(B) // K % (K + 1)).at[0].set(True)
BATCH = {"x": X, "mask": MASK}


def errors(params, x):
    """What each example loses."""
    return (jnp.tanh(x @ params["w"]) @ params["v"] - 1) ** 2


def mean(params, x):
    return errors(params, x).mean()


def total(params, x):
    return errors(params, x).sum()


def masked(params, batch):
    count = jnp.maximum(batch["mask"].sum(), 1).astype(jnp.float32)
    return jnp.where(batch["mask"], errors(params, batch["x"]), 0).sum() / count


def count(params, batch):
    del params
    return batch["mask"].sum()


def normalised(params, x):
    """BatchNorm."""
    h = x @ params["w"]
    h = (h - h.mean(0, keepdims=True)) * jax.lax.rsqrt(h.var(0, keepdims=True) + 1e-5)
    return ((jnp.tanh(h) @ params["v"] - 1) ** 2).mean()


def contrastive(params, x):
    """Every example against all others."""
    z = jnp.tanh(x @ params["w"])
    logits = z @ z.T
    return -jnp.diagonal(jax.nn.log_softmax(logits, -1)).mean()


def dropout(params, x, key):
    keep = jax.random.bernoulli(key, 0.5, x.shape)
    return errors(params, jnp.where(keep, 2 * x, 0)).mean()


def check(fun, batch=X, k=K, **options):
    return oa.diagnose.check_equivalence(fun, PARAMS, batch, k, **options)


def assert_differs(report, name, *words):
    assert not report
    assert not report.equivalent
    assert report.cause.name == name
    text = str(report).partition("what the probes suggest:\n")[2]
    assert len(text.splitlines()) <= 6, text
    text = " ".join(str(report).split())
    for word in words:
        assert word in text, text


# --- What is equal ---


@pytest.mark.parametrize(
    ("fun", "batch", "options"),
    [
        (mean, X, {}),
        (total, X, {"reduction": "sum"}),
        (masked, BATCH, {"weight": count}),
        (
            lambda p, b: jnp.where(b["mask"], errors(p, b["x"]), 0).sum(),
            BATCH,
            {"reduction": "ratio", "weight": count},
        ),
        (mean, X[:23], {"k": None, "microbatch_size": 5}),
        (lambda p, x: (mean(p, x), x), X, {"has_aux": True}),
        (mean, X, {"accumulator_dtype": jnp.float32}),
        (mean, X, {"return_info": True}),
    ],
    ids=["mean", "sum", "weights", "ratio", "remainder", "aux", "dtype", "info"],
)
def test_losses_that_split_over_examples_are_reported_equivalent(fun, batch, options):
    report = check(fun, batch, **options)
    assert report, str(report)
    assert report.cause is None
    assert max(leaf.error for leaf in report.leaves) < 1e-5
    assert [leaf.path for leaf in report.leaves] == ["['v']", "['w']"]
    np.testing.assert_allclose(report.value, report.microbatched_value, rtol=1e-5)
    assert "4 micro-batches are the same as the global" in str(report) or (
        options.get("k", K) is None and report.num_microbatches == 5
    )


def test_further_arguments_reach_the_loss():
    def fun(params, x, y, *, scale):
        return scale * ((jnp.tanh(x @ params["w"]) @ params["v"] - y) ** 2).mean()

    y = jnp.arange(B, dtype=jnp.float32)
    report = check(fun, args=(y,), kwargs={"scale": 2.0}, batch_argnums=(1, 2))
    assert report, str(report)


def test_a_loss_with_a_carry_is_equal():
    def fun(params, x, carry):
        return mean(params, x), carry + 1

    assert check(fun, args=(jnp.zeros([]),), carry_argnum=2)


def test_a_loss_that_ignores_its_key_is_reported_equivalent():
    def fun(params, x, key):
        del key
        return mean(params, x)

    assert check(fun, args=(jax.random.key(0),), rng_argnums=2)


@pytest.mark.several_devices
def test_the_check_runs_on_a_mesh():
    x = jnp.concatenate([X] * COUNT)
    assert check(mean, x, k=2, mesh=mesh(), axis_name="data")
    options = {"k": 2, "mesh": mesh(), "axis_name": "data"}
    assert check(mean, x, **options, local=True)
    assert_differs(check(contrastive, x, **options), "dependence")
    report = check(mean, x, **options, reduction="sum")
    assert_differs(report, "factor", f"are {2 * COUNT} micro-batches: `fun` is a mean")


def test_a_gradient_leaf_of_rounding_alone_is_reported_equivalent():
    def fun(params, x):
        """The softmax does not see `shift`."""
        logits = jnp.tanh(x @ params["w"]) + params["shift"].reshape(1, 1)
        return -jax.nn.log_softmax(logits, -1)[:, 0].mean()

    params = PARAMS | {"shift": jnp.float32(0.3)}
    report = oa.diagnose.check_equivalence(fun, params, X, K)
    assert report, str(report)


@pytest.mark.parametrize("dtype", ["bfloat16", slow("float16"), "float32"])
def test_the_tolerance_is_that_of_the_narrowest_dtype(dtype):
    def fun(params, x):
        params = jax.tree.map(lambda p: p.astype(dtype), params)
        return errors(params, x.astype(dtype)).astype(jnp.float32).mean()

    report = check(fun)
    assert report, str(report)
    assert report.tolerance == float(np.sqrt(jnp.finfo(dtype).eps))
    assert ("check in float32 as well" in str(report)) == (dtype != "float32")


@pytest.mark.usefixtures("float64")
def test_the_tolerance_in_float64_is_that_of_float64():
    def fun(params, x):
        return mean(jax.tree.map(lambda p: p.astype(jnp.float64), params), x)

    params = jax.tree.map(lambda p: p.astype(jnp.float64), PARAMS)
    report = oa.diagnose.check_equivalence(mean, params, X.astype(jnp.float64), K)
    assert report.tolerance < 2e-8
    assert report, str(report)


def test_a_narrow_dtype_inside_a_loop_sets_the_tolerance():
    def fun(params, x):
        def body(c, row):
            return c, jax.lax.cond(True, narrow, lambda r: r, row)

        def narrow(row):
            return row.astype(jnp.bfloat16).astype(jnp.float32)

        _, x = jax.lax.scan(body, 0, x)
        return mean(params, x)

    assert check(fun).tolerance > 0.05


# --- What differs, and why ---


def test_missing_weights_are_named():
    report = check(masked, BATCH)
    assert_differs(report, "weights", "Pass `weight=`", "valid tokens")
    shares = np.array([MASK[i::K].sum() for i in range(K)]) / MASK.sum()
    shown = str(report).split("weighted by ")[1].split(":")[0].split(", ")
    np.testing.assert_allclose([float(s) for s in shown], shares, atol=2e-3)


def test_a_weight_out_of_the_loss_is_taken_from_there():
    """In the check itself, and where it looks for a cause."""

    def with_count(params, batch):
        return masked(params, batch), {"count": count(params, batch)}

    def counted(power):
        def weight(params, batch, aux):
            del params, batch
            return aux["count"] ** power

        return check(with_count, BATCH, has_aux=True, weight=weight)

    report = counted(1)
    assert report, str(report)
    assert_differs(counted(2), "weights", "`weight` counts something else")


def test_wrong_weights_are_named():
    report = check(masked, BATCH, weight=lambda p, b: count(p, b) ** 2)
    assert_differs(report, "weights", "`weight` counts something else")


@pytest.mark.slow
def test_missing_weights_of_a_tiny_model_are_named():
    """Three equations for four weights: the others come from elsewhere."""

    def fun(w, batch):
        wrong = (jnp.tanh(batch["x"][:, :2] @ w) - 1) ** 2
        return jnp.where(batch["mask"], wrong, 0).sum() / count(w, batch).astype(
            w.dtype
        )

    report = oa.diagnose.check_equivalence(fun, jnp.ones(2), BATCH, K)
    assert_differs(report, "weights")


@pytest.mark.parametrize("fun", [slow(normalised), contrastive])
def test_dependent_examples_are_named(fun):
    mends = "oa.microbatch(encode, num_microbatches=4)(params, batch)"
    not_this = "BatchNorm stays different"
    assert_differs(check(fun), "dependence", "exchanging examples", mends, not_this)


def test_the_remedy_for_dependence_has_the_size_that_was_asked_for():
    report = check(contrastive, k=None, microbatch_size=6)
    assert_differs(report, "dependence", "oa.microbatch(encode, microbatch_size=6)")


@pytest.mark.slow
def test_dependent_examples_of_a_tiny_model_are_named():
    """A fit could explain three numbers by four, but not at other parameters."""

    def fun(w, x):
        z = jnp.tanh(x[:, :2] * w[None])
        return jax.nn.logsumexp(z @ z.T, -1).mean()

    report = oa.diagnose.check_equivalence(fun, jnp.ones(2), X, K)
    assert_differs(report, "dependence")


@pytest.mark.slow
def test_dependence_is_named_with_micro_batches_of_one_example():
    assert_differs(check(normalised, k=B), "dependence", "an example alone")


def test_dropout_is_named():
    report = check(dropout, args=(jax.random.key(0),), rng_argnums=2)
    assert_differs(report, "randomness", "draw their own", "with the dropout off")


@pytest.mark.parametrize("way", ["args", slow("kwargs")])
def test_dropout_is_named_if_its_key_is_not(way):
    key = jax.random.key(0)
    given = {"args": (key,)} if way == "args" else {"kwargs": {"key": key}}
    assert_differs(check(dropout, **given), "randomness", "a new `key` changes")


@pytest.mark.slow
def test_dropout_of_several_keys_is_named():
    def fun(params, x, keys):
        return dropout(params, x, keys["dropout"][1])

    report = check(fun, args=({"dropout": jax.random.split(jax.random.key(0))},))
    assert_differs(report, "randomness", "a new `keys` changes")


def test_randomness_without_a_key_is_named():
    random = np.random.default_rng(0)

    def fun(params, x):
        return mean(params, x * random.normal())

    assert_differs(check(fun), "hidden state", "numpy.random")


@pytest.mark.parametrize("k", [slow(2), 4])
def test_a_sum_under_reduction_mean_is_named(k):
    report = check(total, k=k)
    assert_differs(report, "factor", f"is {1 / k:.4g} times", 'Use reduction="sum"')


@pytest.mark.slow
def test_a_sum_under_reduction_mean_with_a_remainder_is_named():
    report = check(total, X[:23], k=None, microbatch_size=5)
    assert_differs(report, "factor", "is the sum of its parts'")


def test_a_sum_under_reduction_mean_is_named_although_the_weight_has_a_floor():
    report = check(total, weight=lambda _, x: len(x) + 1.0)
    assert_differs(report, "factor", "is 0.25 times", 'Use reduction="sum"')


def test_a_mean_under_reduction_sum_is_named():
    report = check(mean, reduction="sum")
    assert_differs(report, "factor", "is 4 times", 'Use reduction="mean"')


def test_a_factor_from_a_wrong_weight_is_named():
    def weight(params, batch):
        """Counts double in small batches."""
        del params
        return len(batch["x"]) * (2.0 if len(batch["x"]) < B else 1.0)

    def fun(params, batch):
        return errors(params, batch["x"]).sum()

    report = check(fun, BATCH, reduction="ratio", weight=weight)
    assert_differs(report, "factor", "is 0.5 times", "divides by something other")


def test_a_batch_that_is_not_named_is_refused():
    def fun(params, x, y):
        return ((jnp.tanh(x @ params["w"]) - y) ** 2).mean()

    with pytest.raises(ValueError, match=r"`y`, .*24 entries.*batch_argnums=\(1, 2\)"):
        check(fun, args=(jnp.tile(X[:, :1], 6),))


def test_a_penalty_added_once_per_micro_batch_is_named():
    def fun(params, x):
        return total(params, x) + 3 * sum((p**2).sum() for p in params.values())

    report = check(fun, reduction="sum")
    assert_differs(report, "constant term", "penalty on the", "Leave it out of `fun`")


def test_a_difference_without_a_known_cause_is_reported_as_unknown():
    """It depends on the batch's size, in two ways, and examples not on each other."""

    def fun(params, x):
        size = len(x) / B
        return total(params, x) * size + 10 * params["v"].sum() * size**3

    assert_differs(check(fun, reduction="sum"), "unknown", "in float64")


def test_a_micro_batch_of_padding_is_named():
    def fun(params, batch):
        counted = batch["mask"].sum().astype(jnp.float32)
        return jnp.where(batch["mask"], errors(params, batch["x"]), 0).sum() / counted

    batch = BATCH | {"mask": jnp.arange(B) % K != 1}
    report = check(fun, batch)
    assert_differs(report, "not finite", "jnp.maximum(count, 1)")
    assert "nan" in str(report)
    report = check(fun, batch, reduction="sum")
    assert_differs(report, "not finite", "let `fun` be a sum", 'reduction="ratio"')


def test_a_nan_in_the_global_batch_is_named():
    report = check(mean, X.at[3].set(jnp.nan))
    assert_differs(report, "not finite", "fix that first")


def test_a_skipped_micro_batch_is_named():
    def skip(grads, step, params):
        del step, params
        return jnp.linalg.norm(grads["v"]) > limit, ()

    norms = [jnp.linalg.norm(jax.grad(mean)(PARAMS, X[i::K])["v"]) for i in range(K)]
    limit = (sorted(norms)[-1] + sorted(norms)[-2]) / 2
    assert_differs(check(mean, skip=skip), "skipped", "rejected 1 of 4 micro-batches")
    limit = 2 * max(norms)
    assert check(mean, skip=skip)


def test_a_weak_difference_is_judged_by_the_tolerance():
    def fun(params, x):
        return mean(params, x) + 1e-2 * normalised(params, x)

    assert not check(fun)
    report = check(fun, tolerance=0.1)
    assert report
    assert report.tolerance == 0.1


@pytest.mark.slow
def test_causes_are_named_with_fewer_parameters_than_micro_batches():
    """With 3 numbers per gradient any 12 of them add up to any other."""

    def fun(w, x):
        centred = x[:, :3] - x[:, :3].mean(0, keepdims=True)
        return ((centred @ w - 1) ** 2).mean()

    w = jnp.ones(3)
    assert_differs(oa.diagnose.check_equivalence(fun, w, X, 12), "dependence")

    def over_mask(w, batch):
        wrong = (batch["x"][:, :3] @ w - 1) ** 2
        counted = jnp.maximum(batch["mask"].sum(), 1).astype(w.dtype)
        return jnp.where(batch["mask"], wrong, 0).sum() / counted

    report = oa.diagnose.check_equivalence(over_mask, w, BATCH, 12)
    assert_differs(report, "weights", "weighted otherwise", "Pass `weight=`")


@pytest.mark.parametrize("reduction", ["sum", slow("ratio")])
def test_a_masked_mean_under_reduction_sum_or_ratio_is_named(reduction):
    report = check(masked, BATCH, reduction=reduction, weight=count)
    assert_differs(report, "weights", 'Use reduction="mean", with `weight=`')


def test_probes_keep_a_variance_positive():
    """Elsewhere is a tenth of each entry away, not a tenth of the largest one."""

    def fun(variance, batch):
        wrong = batch["x"][:, :3] ** 2 / variance[None] + jnp.log(variance)[None]
        counted = batch["mask"].sum().astype(variance.dtype)
        return jnp.where(batch["mask"], wrong.sum(-1), 0).sum() / counted

    variance = jnp.array([0.2, 1.0, 4.0])
    assert_differs(oa.diagnose.check_equivalence(fun, variance, BATCH, 2), "weights")


def test_the_cause_is_unknown_if_the_loss_is_not_finite_at_the_probes():
    def fun(params, batch):
        is_here = jnp.abs(params["v"] - PARAMS["v"]).max() < 1e-3
        return masked(params, batch) * jnp.where(is_here, 1.0, jnp.nan)

    report = check(fun, BATCH)
    assert_differs(report, "unknown", "is not finite", "Check at other parameters")


def test_a_value_near_zero_from_cancelling_terms_is_reported_equivalent():
    """As those of a policy gradient with normalised advantages."""
    advantages = X[:, 0] - X[:, 0].mean()

    def fun(w, batch):
        ratio = jnp.exp(batch["x"] @ (w - 1))
        return -(ratio * batch["advantage"]).mean()

    batch = {"x": X, "advantage": advantages}
    report = oa.diagnose.check_equivalence(fun, jnp.ones(5), batch, K)
    assert abs(report.value) < 1e-6
    assert report, str(report)


def test_a_gradient_of_zero_is_equal():
    """At an optimum only rounding is left of it."""
    y = jnp.asarray(RANDOM.normal(size=B), jnp.float32)
    w = jnp.asarray(np.linalg.lstsq(np.asarray(X), np.asarray(y))[0])

    def fun(w, batch):
        return ((batch["x"] @ w - batch["y"]) ** 2).mean()

    assert oa.diagnose.check_equivalence(fun, w, {"x": X, "y": y}, K)


def test_a_nan_in_a_micro_batch_of_weight_0_makes_no_difference():
    def fun(params, batch):
        counted = batch["mask"].sum().astype(jnp.float32)
        return jnp.where(batch["mask"], errors(params, batch["x"]), 0).sum() / counted

    batch = BATCH | {"mask": MASK & (jnp.arange(B) % K != 1)}
    assert check(fun, batch, weight=count)
    report = check(fun, batch, weight=lambda p, b: count(p, b) ** 2)
    assert_differs(report, "weights")
    assert np.isfinite([leaf.error for leaf in report.leaves]).all()


def test_a_difference_in_the_value_alone_is_named():
    def fun(params, x):
        return mean(params, x) + jax.lax.stop_gradient(x.max())

    assert_differs(check(fun), "dependence")


@pytest.mark.slow
def test_missing_weights_of_a_one_parameter_model_are_named():
    """Any two numbers have a factor; these are a mean of unequal means."""

    def fun(w, batch):
        wrong = (w * batch["x"][:, 0] - 1) ** 2
        counted = batch["mask"].sum().astype(w.dtype)
        return jnp.where(batch["mask"], wrong, 0).sum() / counted

    report = oa.diagnose.check_equivalence(fun, jnp.float32(0.5), BATCH, 2)
    assert_differs(report, "weights")


def test_a_loss_that_depends_on_its_carry_is_named():
    def fun(params, x, carry):
        return mean(params, x) * (1 + carry), carry + 0.1

    report = check(fun, args=(jnp.float32(0),), carry_argnum=2)
    assert_differs(report, "carry", "`carry`, its carry")


@pytest.mark.slow
def test_dropout_with_its_key_in_the_carry_is_named():
    def fun(params, x, carry):
        key, next_key = jax.random.split(carry)
        return dropout(params, x, key), next_key

    report = check(fun, args=(jax.random.key(0),), carry_argnum=2)
    assert_differs(report, "randomness", "draw their own")


@pytest.mark.slow
def test_arguments_may_be_other_than_arrays():
    def fun(params, batch, kind, activation):
        assert kind == "mean"
        h = activation(batch["x"] @ params["w"]) @ params["v"] + params["b"]
        counted = batch["mask"].sum().astype(h.dtype)
        return jnp.where(batch["mask"], (h - 1) ** 2, 0).sum() / counted

    for b in (0.5, np.float32(0.5)):
        params = PARAMS | {"b": b}
        report = oa.diagnose.check_equivalence(
            fun, params, BATCH, K, args=("mean", jnp.tanh)
        )
        assert_differs(report, "weights")


# --- What is not a sum, but can be made one: each with its remedy ---

LENGTHS = RANDOM.integers(1, 10, (2, B))
TOKENS = {
    "x": jnp.asarray(RANDOM.normal(size=(B, 9, 5)), jnp.float32),
    "actor": jnp.asarray(np.arange(9) < LENGTHS[0][:, None]),
    "critic": jnp.asarray(np.arange(9) < LENGTHS[1][:, None], jnp.float32),
    "labels": jnp.asarray(RANDOM.integers(0, 6, (B, 9))),
}


def assert_exact(report):
    assert report, str(report)
    assert report.value_error < 1e-5
    assert max(leaf.error for leaf in report.leaves) < 1e-5


def actor_and_critic(params, batch, of_actor, of_critic):
    """Two losses of one trunk, over tokens that are not the same."""
    h = jnp.tanh(batch["x"] @ params["w"])
    actor = jnp.where(batch["actor"], -jax.nn.log_sigmoid(h @ params["v"]), 0).sum()
    critic = ((h.sum(-1) - 1) ** 2 * batch["critic"]).sum()
    return actor / of_actor + 0.5 * critic / of_critic


def count_both(batch):
    return batch["actor"].sum().astype(jnp.float32), batch["critic"].sum()


@pytest.mark.parametrize(
    "options",
    [
        {},
        slow({"weight": lambda _, batch: batch["actor"].sum()}),
        slow({"k": None, "microbatch_size": 5}),
    ],
    ids=["plain", "weight", "remainder"],
)
def test_two_denominators_are_named_and_totals_mend_them(options):
    def fun(params, batch):
        return actor_and_critic(params, batch, *count_both(batch))

    report = check(fun, TOKENS, **options)
    assert_differs(report, "denominators", "['actor']`", "pass the totals")
    totals = count_both(TOKENS)
    mended = check(actor_and_critic, TOKENS, args=totals, reduction="sum")
    assert_exact(mended)
    np.testing.assert_allclose(mended.value, report.value, rtol=1e-5)


@pytest.mark.slow
def test_three_denominators_are_named_and_totals_mend_them():
    """Even if a micro-batch has none of one."""

    def of_totals(params, batch, totals):
        two = actor_and_critic(params, batch, totals["actor"], totals["critic"])
        h = jnp.tanh(batch["x"] @ params["w"])
        third = (batch["third"] * jnp.abs(h.sum(-1))).sum()
        return two + third / jnp.maximum(totals["third"], 1)

    def totals(batch):
        names = ("actor", "critic", "third")
        return {name: batch[name].sum().astype(jnp.float32) for name in names}

    third = TOKENS["actor"].astype(jnp.float32).at[1::K].set(0)
    batch = TOKENS | {"third": third}
    report = check(lambda p, b: of_totals(p, b, totals(b)), batch)
    assert_differs(report, "denominators", "pass the totals", 'reduction="sum"')
    assert_exact(check(of_totals, batch, args=(totals(batch),), reduction="sum"))


def test_an_auxiliary_loss_over_other_tokens_is_named_and_totals_mend_it():
    """Cross-entropy over labels that are not ignored, and a z-loss over all tokens."""
    labels = jnp.where(TOKENS["actor"], TOKENS["labels"], -100)
    batch = {"x": TOKENS["x"], "labels": labels, "valid": TOKENS["critic"]}

    def of_totals(params, batch, counted, valid):
        logits = jnp.tanh(batch["x"] @ params["w"]) * params["v"].reshape(1, 1, -1)
        counts = batch["labels"] >= 0
        index = jnp.maximum(batch["labels"], 0)[..., None]
        normaliser = jax.nn.logsumexp(logits, -1)
        chosen = jnp.take_along_axis(logits, index, -1)[..., 0]
        entropy = jnp.where(counts, normaliser - chosen, 0).sum()
        return entropy / counted + (batch["valid"] * normaliser**2).sum() / valid

    def totals(batch):
        counts = batch["labels"] >= 0
        return counts.sum().astype(jnp.float32), batch["valid"].sum()

    report = check(lambda p, b: of_totals(p, b, *totals(b)), batch)
    assert_differs(report, "denominators", "pass the totals", 'reduction="sum"')
    mended = check(of_totals, batch, args=totals(batch), reduction="sum")
    assert_exact(mended)
    np.testing.assert_allclose(mended.value, report.value, rtol=1e-5)


def two_of(a, c):
    """Two losses over tokens that `a` and `c` find in a batch."""

    def fun(params, batch):
        x = batch["x"] if "x" in batch else EMBEDDING[batch["ids"]]
        h = jnp.tanh(x @ params["w"])
        counted, valid = (f(batch).astype(h.dtype) for f in (a, c))
        first = (counted * -jax.nn.log_sigmoid(h @ params["v"])).sum()
        second = (valid * (h.sum(-1) - 1) ** 2).sum()
        return first / jnp.maximum(counted.sum(), 1) + second / valid.sum()

    return fun


EMBEDDING = jnp.asarray(RANDOM.normal(size=(7, 5)), jnp.float32)
IDS = jnp.where(TOKENS["actor"], TOKENS["labels"] + 1, 0)
# Foreground is rare, and the second micro-batch has none.
LABELS = jnp.where(TOKENS["labels"] > 3, TOKENS["labels"], 0).at[1::K].set(0)


@pytest.mark.parametrize(
    ("fun", "batch", "named"),
    [
        (
            two_of(lambda b: b["labels"] > 0, lambda b: b["labels"] >= 0),
            {"x": TOKENS["x"], "labels": LABELS},
            "['labels']`",
        ),
        (
            two_of(lambda b: b["ids"] != 0, lambda b: b["ids"] >= 0),
            {"ids": IDS, "position": jnp.tile(jnp.arange(9), (B, 1))},
            "['ids']`",
        ),
    ],
    ids=["labels", "tokens"],
)
def test_integers_that_say_what_counts_are_named(fun, batch, named):
    assert_differs(check(fun, batch), "denominators", named, "fun(params, batch, tot")


@pytest.mark.parametrize("loss", [contrastive, slow(normalised)])
@pytest.mark.parametrize(
    "data", ["beside labels", slow("tokens"), slow("tokens and targets")]
)
def test_integers_do_not_hide_that_examples_depend_on_each_other(loss, data):
    def fun(params, batch):
        x = EMBEDDING[batch["ids"]] if "ids" in batch else batch["x"]
        targets = batch["targets"].mean() if "targets" in batch else 1
        return targets * loss(params, x.mean(1))

    batch = {
        "beside labels": {"x": TOKENS["x"], "labels": LABELS},
        "tokens": {"ids": IDS},
        "tokens and targets": {"ids": IDS, "targets": X[:, 0]},
    }[data]
    assert_differs(check(fun, batch), "dependence")


@pytest.mark.slow
def test_counts_as_numbers_are_answered_with_totals():
    """They could as well be what an embedding takes."""

    def fun(params, batch):
        wrong = (jnp.tanh(batch["x"] @ params["w"]) @ params["v"] - 1) ** 2
        total = batch["lengths"].sum().astype(wrong.dtype)
        return wrong.sum() / total + (wrong**2).mean()

    report = check(fun, {"x": TOKENS["x"], "lengths": jnp.asarray(LENGTHS[0])})
    assert_differs(report, "dependence", "Several denominators")


def test_two_denominators_that_halves_happen_to_share_are_not_taken_for_weights():
    def fun(params, batch):
        wrong = errors(params, batch["x"])
        first = (wrong * batch["weight"]).sum() / batch["weight"].sum()
        return first + (wrong**2).mean()

    # By micro-batch 1, 3, 3 and 1.
    weights = jnp.asarray([1.0, 3.0, 3.0, 1.0] * (B // K))
    report = check(fun, {"x": X, "weight": weights * (1 + 1e-4 * X[:, 0])})
    assert_differs(report, "dependence", "Several denominators")


@pytest.mark.slow
def test_two_denominators_without_a_mask_are_answered_with_totals():
    """The counts are weights of the examples, which no probe tells from their data."""
    batch = {"x": X, "y": jnp.abs(X[:, 0]) + 0.1}

    def of_totals(params, batch, total):
        wrong = errors(params, batch["x"])
        return (wrong * batch["y"]).sum() / total + (wrong**2).sum() / B

    def fun(params, batch):
        wrong = errors(params, batch["x"])
        return (wrong * batch["y"]).sum() / batch["y"].sum() + (wrong**2).mean()

    report = check(fun, batch)
    assert_differs(report, "dependence", "Several denominators", 'reduction="sum"')
    total = batch["y"].sum()
    assert_exact(check(of_totals, batch, args=(total,), reduction="sum"))


def test_masks_do_not_hide_batch_norm():
    def fun(params, batch):
        h = batch["x"] @ params["w"]
        over = {"axis": (0, 1), "keepdims": True}
        h = (h - h.mean(**over)) * jax.lax.rsqrt(h.var(**over) + 1e-5)
        wrong = (jnp.tanh(h) @ params["v"] - 1) ** 2
        return (wrong * batch["critic"]).sum() / batch["critic"].sum()

    assert_differs(check(fun, TOKENS), "dependence", "BatchNorm")


@pytest.mark.slow
def test_binary_data_is_not_taken_for_a_mask():
    x = (X > 0).astype(jnp.float32)
    assert_differs(check(normalised, x), "dependence", "BatchNorm")


def merged(fun):
    """`fun` of a batch in groups."""

    def of_groups(params, batch):
        return fun(params, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch))

    return of_groups


def in_groups(batch, size):
    return jax.tree.map(lambda x: x.reshape(B // size, size, *x.shape[1:]), batch)


def pairs(params, x):
    """Siamese: neighbours are compared."""
    z = jnp.tanh(x @ params["w"]) * params["v"].reshape(1, -1)
    return ((z[::2] - z[1::2] - 0.3) ** 2).sum(-1).mean()


def triplets(params, x):
    z = jnp.tanh(x @ params["w"]) * params["v"].reshape(1, -1)
    near = ((z[::3] - z[1::3]) ** 2).sum(-1)
    far = ((z[::3] - z[2::3]) ** 2).sum(-1)
    return jax.nn.softplus(near - far).mean()


def policy_gradient(params, x):
    """As GRPO: advantages are normalised within groups of 4 answers."""
    rewards = jnp.sin(7 * x[:, 0]).reshape(-1, 4)
    centred = rewards - rewards.mean(1, keepdims=True)
    advantages = (centred / (rewards.std(1, keepdims=True) + 1e-4)).ravel()
    return -(jax.nn.log_sigmoid(jnp.tanh(x @ params["w"]) @ params["v"]) @ advantages)


@pytest.mark.parametrize(
    ("fun", "size", "options"),
    [
        (pairs, 2, {}),
        pytest.param(triplets, 3, {}, marks=pytest.mark.slow),
        (policy_gradient, 4, {"k": 3, "reduction": "sum"}),
        pytest.param(pairs, 2, {"k": 6}, marks=pytest.mark.slow),
    ],
    ids=["pairs", "triplets", "groups", "two pairs"],
)
def test_groups_cut_apart_are_named_and_an_axis_of_groups_mends_them(
    fun, size, options
):
    report = check(fun, **options)
    shape = f"from {B} to ({B // size}, {size})"
    assert_differs(report, "groups", f"groups of {size}", shape)
    options = {"k": 2} | {k: v for k, v in options.items() if k == "reduction"}
    mended = check(merged(fun), in_groups(X, size), **options)
    assert_exact(mended)
    np.testing.assert_allclose(mended.value, report.value, rtol=1e-5)


def test_groups_of_which_a_micro_batch_has_a_part_are_noted():
    with pytest.raises(TypeError) as error:
        check(policy_gradient, k=4, reduction="sum")  # 6 examples, of groups of 4
    note = error.value.__notes__[-1]
    assert "`fun` takes the 24 examples of the batch, but not the 6 of" in note
    assert "an axis of their own" in note


@pytest.mark.slow
def test_halves_compared_with_each_other_are_named_and_an_axis_mends_them():
    """Real and generated ones, say: each example with the one half a batch on."""

    def fun(params, x):
        z = jnp.tanh(x @ params["w"]) @ params["v"]
        half = len(x) // 2
        return ((z[:half] - 2 * z[half:] - 1) ** 2).mean() + z[:half].mean()

    report = check(fun, k=3)
    assert report, str(report)  # strided micro-batches keep both halves
    report = check(fun, k=8)
    assert_differs(report, "order", "one half and the other", "an axis of their own")
    halves = X.reshape(2, B // 2, 5)
    mended = check(lambda p, x: fun(p, x.reshape(-1, 5)), halves, batch_axis=1, k=K)
    assert_exact(mended)
    np.testing.assert_allclose(mended.value, report.value, rtol=1e-5)


def test_dropout_with_a_key_of_its_own_is_answered_with_an_argument():
    def fun(params, x):
        return dropout(params, x, jax.random.key(0))

    assert_differs(check(fun), "order", "a key that is not", "make it one")


# The first micro-batch has a token and the second none.
FEW = BATCH | {"mask": MASK & (jnp.arange(B) % K != 1)}


def floored(params, batch, least=1.0):
    """A mean over what counts, that never divides by less than `least`."""
    counted = jnp.maximum(batch["mask"].sum().astype(jnp.float32), least)
    return jnp.where(batch["mask"], errors(params, batch["x"]), 0).sum() / counted


def floored_sum(params, batch):
    return jnp.where(batch["mask"], errors(params, batch["x"]), 0).sum()


@pytest.mark.parametrize(
    ("fun", "reduction", "more"),
    [
        (floored, "mean", lambda n: jnp.maximum(n, 1)),
        pytest.param(
            floored_sum, "ratio", lambda n: jnp.maximum(n, 1), marks=pytest.mark.slow
        ),
        pytest.param(
            lambda p, b: floored(p, b, 3.0),
            "mean",
            lambda n: jnp.maximum(n, 3),
            marks=pytest.mark.slow,
        ),
        pytest.param(floored_sum, "ratio", lambda n: n + 1, marks=pytest.mark.slow),
    ],
    ids=["mean", "ratio", "floor of 3", "epsilon"],
)
def test_a_floor_of_the_weight_is_named_and_goes(fun, reduction, more):
    def weight(params, batch):
        return more(count(params, batch))

    report = check(fun, FEW, weight=weight, reduction=reduction)
    assert_differs(report, "floor", "`weight` is", "Return the count itself")
    if fun in (floored, floored_sum):
        assert_exact(check(fun, FEW, weight=count, reduction=reduction))


def plus_one(params, batch):
    counted = batch["mask"].sum().astype(jnp.float32) + 1
    return jnp.where(batch["mask"], errors(params, batch["x"]), 0).sum() / counted


@pytest.mark.parametrize(
    "fun", [lambda p, b: floored(p, b, 3.0), slow(plus_one)], ids=["floor", "epsilon"]
)
def test_a_floor_in_the_loss_is_named_and_ratio_needs_none(fun):
    report = check(fun, FEW, weight=count)
    assert_differs(report, "floor", "`fun` be the sum", '"ratio"')
    assert_exact(check(floored_sum, FEW, weight=count, reduction="ratio"))


@pytest.mark.parametrize(
    ("encode", "loss", "batch"),
    [
        (
            lambda params, x: jnp.tanh(x @ params["w"]) * params["v"].reshape(1, -1),
            lambda z, _: -jnp.diagonal(jax.nn.log_softmax(z @ z.T, -1)).mean(),
            X,
        ),
        pytest.param(
            lambda params, b: jax.nn.sigmoid(jnp.tanh(b["x"] @ params["w"]).sum(-1)),
            lambda z, b: (
                1 - 2 * (z * b["critic"]).sum() / (z.sum() + b["critic"].sum())
            ),
            TOKENS,
            marks=pytest.mark.slow,
        ),
    ],
    ids=["contrastive", "Dice"],
)
def test_microbatch_makes_a_loss_of_all_outputs_exact(encode, loss, batch):
    """As the report says."""

    def fun(params, batch):
        return loss(encode(params, batch), batch)

    report = check(fun, batch)
    assert_differs(
        report, "dependence", "(contrastive, Dice)", "under jax.value_and_grad"
    )

    @jax.jit
    @jax.value_and_grad
    def mended(params, batch):
        z = oa.microbatch(encode, num_microbatches=K)(params, batch)
        return loss(z, batch)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        mended(PARAMS, batch),
        jax.value_and_grad(fun)(PARAMS, batch),
    )


@pytest.mark.slow
def test_microbatch_does_not_mend_batch_norm_in_the_encoder():
    """As the report says."""

    def encode(params, x):
        h = x @ params["w"]
        return (h - h.mean(0, keepdims=True)) / h.std(0, keepdims=True)

    def loss(z):
        return -jnp.diagonal(jax.nn.log_softmax(z @ z.T, -1)).mean()

    in_parts = jax.jit(oa.microbatch(encode, num_microbatches=K))
    wanted, got = loss(encode(PARAMS, X)), loss(in_parts(PARAMS, X))
    assert abs(wanted - got) > 0.01 * wanted


# --- What people see ---


def test_the_report_prints_the_verdict_the_leaves_and_the_cause():
    text = str(check(masked, BATCH)).splitlines()
    assert text[0] == (
        "4 micro-batches are NOT the same as the global batch (tolerance 3.5e-04)"
    )
    assert text[1].startswith("value: ")
    assert text[3].startswith("  ['")
    assert text[3].endswith("  differs")
    assert text[5] == "what the probes suggest:"
    assert text[6].startswith("  weights: ")


@pytest.mark.slow
def test_the_report_prints_only_the_worst_leaves():
    def fun(params, x):
        return sum((x * p) ** 2 for p in params).mean()

    params = [jnp.float32(i + 1) for i in range(30)]
    report = oa.diagnose.check_equivalence(fun, params, X, K)
    assert report
    assert "  and 18 more, of which none differ" in str(report)


@pytest.mark.slow
def test_asserting_a_failed_report_raises_with_its_text():
    report = check(normalised)
    with pytest.raises(AssertionError, match="NOT the same as"):
        assert report, str(report)


@pytest.mark.parametrize(
    ("fun", "options", "error", "words"),
    [
        (errors, {}, TypeError, "`fun` must return a real floating scalar"),
        (mean, {"k": None}, ValueError, "exactly one of `num_microbatches`"),
        (mean, {"k": 5}, ValueError, "`num_microbatches=5` does not divide"),
        (mean, {"tolerance": -1}, ValueError, "`tolerance` is the largest relative"),
        (mean, {"reduction": "max"}, ValueError, "`reduction` must be one of"),
        (mean, {"wight": count}, TypeError, "got 'wight', which is not an option of"),
        (mean, {"axis_name": "d"}, ValueError, "`axis_name='d'` is not bound"),
        (mean, {"weight": lambda *_: 0}, ValueError, "`weight` is 0 for this batch"),
        (mean, {"args": X}, TypeError, "`args` must be a tuple or list"),
    ],
)
def test_wrong_arguments_are_refused(fun, options, error, words):
    with pytest.raises(error, match=words):
        check(fun, **options)


@pytest.mark.parametrize(
    ("more", "options"),
    [
        ((X[:, 0],), {"num_microbatches": K}),
        ((X[:, 0], K), {}),
        (({"y": X[:, 0]},), {}),
    ],
    ids=["keyword", "position", "neither"],
)
def test_a_second_batch_by_position_is_told_where_it_goes(more, options):
    words = saying("arguments by position", "x, 4, args=(y,), batch_argnums=(1, 2)")
    with pytest.raises(TypeError, match=words):
        oa.diagnose.check_equivalence(mean, PARAMS, X, *more, **options)


def test_what_is_refused_by_its_own_message_gets_no_note():
    labels = jnp.ones(8)
    with pytest.raises(ValueError, match="closes over") as caught:
        oa.diagnose.check_equivalence(
            lambda w, x: jnp.mean((x @ w - labels) ** 2),
            jnp.ones(3),
            jnp.ones((8, 3)),
            4,
        )
    assert not getattr(caught.value, "__notes__", [])
