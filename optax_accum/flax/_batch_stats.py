"""The running statistics of BatchNorm, updated as by the global batch."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from optax_accum import _validate, _window
from optax_accum._types import Tree
from optax_accum.flax import _module

Name = tuple[str, ...]  # of a leaf: the keys that lead to it


def combine_batch_stats(
    before: Tree, after: Tree, *, momentum: float = 0.99, weights: Any = None
) -> Tree:
    """Updates BatchNorm's running statistics once per window, not per micro-batch.

    A model that sees K micro-batches moves its running statistics K times: the last one
    counts most, a small one as much as a large one, and the variance between
    micro-batches is lost. This computes each micro-batch's statistics from the running
    ones, and from these the global batch's update, with m the `momentum` and wᵢ the
    `weights`:

        μᵢ = (meanᵢ − m·meanᵢ₋₁) / (1 − m)             σᵢ² = likewise, of var
        μ = Σ wᵢ·μᵢ / Σ wᵢ               σ² = Σ wᵢ·(σᵢ² + (μᵢ − μ)²) / Σ wᵢ
        mean = m·mean₀ + (1 − m)·μ          var = m·var₀ + (1 − m)·σ²

    This is exact for a BatchNorm whose inputs do not depend on the split, such as the
    model's first one, if it is called once. Later ones have inputs that were normalized
    by micro-batch, and get the statistics of these.

    Args:
      before: The statistics before the first micro-batch: a tree of leaves called
        ``mean`` and ``var``, such as Linen's ``variables["batch_stats"]`` or
        ``nnx.as_pure(nnx.state(model, nnx.BatchStat))``. (Without `nnx.as_pure` it
        would change with the model.)
      after: The same tree with the statistics after each micro-batch, along a new first
        axis of size K, as from ``aux="stack"``.
      momentum: That of the model's BatchNorm, the same for all. If they differ, call
        this once for each, with its part of the trees.
      weights: ``[K]``, over how many examples each micro-batch's statistics were taken;
        by default equal. One of weight 0 does not count, and must have left the
        statistics unchanged, as in `value_and_grad`.

    Returns:
      A tree like `before`, of arrays.

    Raises:
      ValueError: `momentum` is not in [0, 1); the trees' structures differ; a leaf is
        not a ``mean`` or its ``var``; sizes are not K; `before` holds variables of the
        module.

    Examples:
      >>> import jax, jax.numpy as jnp, optax_accum.flax as oaf
      >>> from flax import nnx
      >>> norm = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
      >>> def loss_fn(model, x):
      ...     value = jnp.mean(model(x) ** 2)
      ...     return value, nnx.state(model, nnx.BatchStat)
      >>> x = jnp.arange(16.0).reshape(8, 2)
      >>> before = nnx.as_pure(nnx.state(norm, nnx.BatchStat))  # values, not variables
      >>> in_parts = oaf.value_and_grad(loss_fn, has_aux=True, num_microbatches=4)
      >>> (value, after), grads = nnx.jit(in_parts)(norm, x)
      >>> nnx.update(norm, oaf.combine_batch_stats(before, after))
      >>> whole = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
      >>> _ = whole(x)
      >>> print(jnp.allclose(norm.mean[...], whole.mean[...], rtol=1e-6))
      True
      >>> print(jnp.allclose(norm.var[...], whole.var[...], rtol=1e-6))
      True
    """
    momentum = _validate.fraction("momentum", momentum, "as BatchNorm has it")
    if any(isinstance(x, nnx.Variable) for x in _leaves(before)):
        raise ValueError(
            "`before` holds the module's own variables, which change with it. Take "
            "their values first: nnx.as_pure(nnx.state(model, nnx.BatchStat))"
        )
    after = nnx.as_pure(after)
    _validate.same_structure(
        "after",
        after,
        "before",
        before,
        "Stack the statistics after each micro-batch on a new first axis",
    )
    leaves, structure = jax.tree_util.tree_flatten_with_path(before)
    names = [_module.names_of(path) for path, _ in leaves]
    old = {name: x for name, (_, x) in zip(names, leaves, strict=True)}
    new = dict(zip(names, jax.tree.leaves(after), strict=True))
    weights = _weights(weights, old, new)
    total = weights.sum()
    number = jnp.arange(1, len(weights) + 1)
    counted = jax.lax.cummax(jnp.where(weights != 0, number, 0))  # the last one so far
    previous = jnp.concatenate([jnp.zeros_like(counted[:1]), counted[:-1]])

    def of_microbatches(name: Name) -> jax.Array:
        """What each micro-batch alone would have moved the statistics to."""
        dtype = jnp.promote_types(new[name].dtype, jnp.float32)
        x = jnp.concatenate([old[name][None], new[name]]).astype(dtype)
        return (x[1:] - momentum * x[previous]) / (1 - momentum)

    def average(x: jax.Array) -> jax.Array:
        each = weights.astype(x.dtype).reshape(-1, *[1] * (x.ndim - 1))
        summed = _window.contributions(x, each, "mean").sum(0)
        return _window.divide(summed, total, "mean")

    def moved(name: Name, x: jax.Array) -> jax.Array:
        start = old[name]
        after = momentum * start.astype(x.dtype) + (1 - momentum) * x
        return jnp.where(total != 0, after, start.astype(x.dtype)).astype(start.dtype)

    combined: dict[Name, jax.Array] = {}
    for mean, var in _pairs(names):
        means = of_microbatches(mean)
        center = average(means)
        spread = average(of_microbatches(var) + (means - center[None]) ** 2)
        combined |= {mean: moved(mean, center), var: moved(var, spread)}
    return jax.tree.unflatten(structure, [combined[name] for name in names])


def _leaves(tree: Any) -> list[Any]:
    return jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, nnx.Variable))


def _weights(weights: Any, old: dict[Name, Any], new: dict[Name, Any]) -> jax.Array:
    """``[K]`` in floating point, if all statistics are K of what they were before."""
    count = jnp.shape(weights) if weights is not None else ()
    for name, x in new.items():
        shape, one = jnp.shape(x), jnp.shape(old[name])
        count = count or shape[:1]
        if len(count) != 1 or shape != count + one:
            raise ValueError(
                f"`after` must have K entries of shape {one} at {'.'.join(name)}, and "
                f"`weights` K numbers; got shape {shape} and "
                f"{'no weights' if weights is None else jnp.shape(weights)}. Stack the "
                "statistics after each micro-batch on a new first axis"
            )
    given = jnp.ones(count) if weights is None else jnp.asarray(weights)
    return given.astype(jnp.promote_types(given.dtype, jnp.float32))


def _pairs(names: list[Name]) -> list[tuple[Name, Name]]:
    """Each ``mean`` with the ``var`` next to it."""
    means = [name for name in names if name[-1] == "mean"]
    pairs = [(name, (*name[:-1], "var")) for name in means]
    paired = {name for pair in pairs for name in pair}
    unpaired = sorted(".".join(name) for name in set(names) ^ paired)
    if unpaired:
        raise ValueError(
            "`before` must hold a `mean` and a `var` for every BatchNorm; unpaired, or "
            f"neither of them: {', '.join(unpaired)}. "
            'Pass the statistics alone: variables["batch_stats"], or '
            "nnx.state(model, nnx.BatchStat)"
        )
    return pairs
