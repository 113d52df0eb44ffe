"""What makes micro-batches differ from the global batch, and whether the probes see it.

One loss for each way of being different, each given to
`oa.diagnose.check_equivalence` as it is and, where there is one, with its remedy. It
fails if a probe misses its cause.
"""

import argparse
import math
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import optax_accum as oa
from benchmarks import shared

EXAMPLES, MICRO_BATCHES = 32, 4


class Case(NamedTuple):
    """A loss, the cause that its probe should name, and the remedy."""

    name: str
    fun: Callable[..., Any]
    cause: str
    options: Mapping[str, Any] = MappingProxyType({})
    args: tuple[Any, ...] = ()
    k: int = MICRO_BATCHES
    remedy: str = ""
    fixed: Mapping[str, Any] = MappingProxyType({})  # options, `fun`, `batch`, `args`
    exact: Callable[..., Any] | None = None  # `fun`, in micro-batches by itself


class Row(NamedTuple):
    """What came out; errors are the largest relative ones of all leaves."""

    loss: str
    error: float
    cause: str
    remedy: str
    error_mended: float  # nan without one


RANDOM = np.random.default_rng(0)
PARAMS = {
    "w": jnp.asarray(RANDOM.normal(size=(8, 16)) / 3, jnp.float32),
    "v": jnp.asarray(RANDOM.normal(size=16) / 4, jnp.float32),
}
LENGTHS = RANDOM.integers(1, 9, EXAMPLES)  # tokens of each example, of at most 8
BATCH = {
    "x": jnp.asarray(RANDOM.normal(size=(EXAMPLES, 8)), jnp.float32),
    "tokens": jnp.asarray(RANDOM.normal(size=(EXAMPLES, 8, 8)), jnp.float32),
    "valid": jnp.asarray(np.arange(8) < LENGTHS[:, None], jnp.float32),
    "other": jnp.asarray(np.arange(8) >= LENGTHS[::-1, None] / 2, jnp.float32),
}
# One micro-batch has no token of these: every fourth example.
BATCH["few"] = BATCH["valid"] * (np.arange(EXAMPLES) % MICRO_BATCHES > 0)[:, None]
NOISE = np.random.default_rng(1)  # the hidden state of `numpy_noise`


def score(params, x):
    return jnp.tanh(x @ params["w"]) @ params["v"]


def mean(params, batch):
    return ((score(params, batch["x"]) - 1) ** 2).mean()


def total(params, batch):
    return ((score(params, batch["x"]) - 1) ** 2).sum()


def over_tokens(params, batch):
    errors = batch["valid"] * (score(params, batch["tokens"]) - 1) ** 2
    return errors.sum() / batch["valid"].sum()


def count_tokens(params, batch):
    del params
    return batch["valid"].sum()


def batch_norm(params, batch):
    h = batch["x"] @ params["w"]
    h = (h - h.mean(0)) / jnp.sqrt(h.var(0) + 1e-5)
    return ((jnp.tanh(h) @ params["v"] - 1) ** 2).mean()


def contrastive(params, batch):
    return of_outputs(encode(params, batch))


def dropout(params, batch, key):
    keep = jax.random.bernoulli(key, 0.5, batch["x"].shape)
    return ((score(params, 2 * keep * batch["x"]) - 1) ** 2).mean()


def numpy_noise(params, batch):
    noise = NOISE.normal(size=batch["x"].shape)
    return mean(params, {"x": batch["x"] + jnp.asarray(noise, jnp.float32)})


def with_penalty(params, batch):
    return total(params, batch) + sum((p**2).sum() for p in params.values())


def two_losses(params, batch, of_tokens, of_others):
    """Over tokens, and over others that have a count of their own."""
    errors = (score(params, batch["tokens"]) - 1) ** 2
    by_tokens = (batch["valid"] * errors).sum() / of_tokens
    return by_tokens + 0.5 * (batch["other"] * errors**2).sum() / of_others


def two_means(params, batch):
    return two_losses(params, batch, *totals(batch))


def totals(batch):
    return batch["valid"].sum(), batch["other"].sum()


def pairs(params, batch):
    z = score(params, batch["x"])
    return ((z[::2] - z[1::2] - 0.5) ** 2).mean()


def of_pairs(params, batch):
    return pairs(params, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch))


def floored(params, batch):
    errors = batch["few"] * (score(params, batch["tokens"]) - 1) ** 2
    return errors.sum() / jnp.maximum(batch["few"].sum(), 1)


def count_few(params, batch):
    del params
    return batch["few"].sum()


def count_few_floored(params, batch):
    return jnp.maximum(count_few(params, batch), 1)


def encode(params, batch):
    return jnp.tanh(batch["x"] @ params["w"])


def of_outputs(z):
    return -jnp.diagonal(jax.nn.log_softmax(z @ z.T)).mean()


def contrastive_in_parts(params, batch):
    in_parts = oa.microbatch(encode, num_microbatches=MICRO_BATCHES)
    return of_outputs(in_parts(params, batch))


def cases() -> list[Case]:
    return [
        Case("a mean over examples", mean, ""),
        Case(
            "a mean over valid tokens",
            over_tokens,
            "weights",
            remedy="`weight=count_tokens`",
            fixed={"weight": count_tokens},
        ),
        Case(
            "a sum over examples",
            total,
            "factor",
            remedy='`reduction="sum"`',
            fixed={"reduction": "sum"},
        ),
        Case(
            'a mean, `reduction="sum"`',
            mean,
            "factor",
            {"reduction": "sum"},
            remedy='`reduction="mean"`',
            fixed={"reduction": "mean"},
        ),
        Case("BatchNorm", batch_norm, "dependence", remedy="another normalisation"),
        Case(
            "a contrastive loss",
            contrastive,
            "dependence",
            remedy="`oa.microbatch`",
            exact=contrastive_in_parts,
        ),
        Case(
            "two means over different tokens",
            two_means,
            "denominators",
            remedy='totals as an argument, `reduction="sum"`',
            fixed={"fun": two_losses, "args": totals(BATCH), "reduction": "sum"},
        ),
        Case(
            "pairs of neighbours",
            pairs,
            "groups",
            remedy="an axis of pairs",
            fixed={
                "fun": of_pairs,
                "batch": jax.tree.map(lambda x: x.reshape(-1, 2, *x.shape[1:]), BATCH),
            },
        ),
        Case(
            "`weight=` of at least 1, and a micro-batch of padding",
            floored,
            "floor",
            {"weight": count_few_floored},
            remedy="`weight=` without the floor",
            fixed={"weight": count_few},
        ),
        Case(
            "dropout with a key that the loss makes",
            lambda params, batch: dropout(params, batch, jax.random.key(0)),
            "order",
            remedy="the key as an argument",
        ),
        Case(
            "dropout",
            dropout,
            "randomness",
            args=(jax.random.key(0),),
            remedy="none needed: equal on average",
        ),
        Case("noise from NumPy", numpy_noise, "hidden state", remedy="a random key"),
        Case(
            "a sum and a penalty on the weights",
            with_penalty,
            "constant term",
            {"reduction": "sum"},
            remedy="the penalty added outside",
        ),
    ]


def worst(report: oa.diagnose.EquivalenceReport) -> float:
    return max(leaf.error for leaf in report.leaves)


def distance(fun: Callable[..., Any], exact: Callable[..., Any]) -> float:
    """The largest relative error of a leaf of the gradient of `exact`."""
    pairs = zip(
        jax.tree.leaves(jax.jit(jax.grad(fun))(PARAMS, BATCH)),
        jax.tree.leaves(jax.jit(jax.grad(exact))(PARAMS, BATCH)),
        strict=True,
    )
    return max(
        float(jnp.linalg.norm(a - b) / jnp.linalg.norm(a)) for a, b in pairs if a.any()
    )


def measure(options: argparse.Namespace) -> list[Row]:
    chosen = cases()[:3] if options.quick else cases()
    return [measure_one(case) for case in shared.track(chosen, "probing")]


def measure_one(case: Case) -> Row:
    def check(fun=case.fun, batch=BATCH, args=case.args, **options):
        return oa.diagnose.check_equivalence(
            fun, PARAMS, batch, case.k, args=args, **options
        )

    report = check(**case.options)
    found = report.cause.name if report.cause else ""
    if found != case.cause:
        raise SystemExit(f"{case.name}: {case.cause!r} was not found.\n{report}")
    after = math.nan
    if case.fixed:
        fixed = check(**{**case.options, **case.fixed})
        if not fixed:
            raise SystemExit(f"{case.name}: the remedy does not fix it.\n{fixed}")
        after = worst(fixed)
    if case.exact:
        after = distance(case.fun, case.exact)
        if after > report.tolerance:
            raise SystemExit(f"{case.name}: the remedy is off by {after:.1e}.")
    return Row(case.name, worst(report), found or "the same", case.remedy, after)


def table(rows: list[Row]) -> shared.Table:
    return shared.Table(
        f"{EXAMPLES} examples in {MICRO_BATCHES} micro-batches, float32; the largest "
        "relative error of a leaf of the gradient",
        ("loss", "error", "the probes say", "remedy", "error then"),
        "lrllr",
        [
            (r.loss, shown(r.error), r.cause, r.remedy, shown(r.error_mended))
            for r in rows
        ],
    )


def shown(error: float) -> str:
    return "" if math.isnan(error) else f"{error:.1e}"


BENCHMARK = shared.Benchmark(
    row=Row,
    measure=measure,
    tables=lambda rows: [table(rows)],
    page="equivalence.md",
    page_table=table,
)
