"""A loss with its arguments, to be differentiated whole, in parts and elsewhere."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from optax_accum import _arguments, _flow, _split, _tree
from optax_accum._loop import Settings
from optax_accum._types import Batch, Tree
from optax_accum.sharding._data_parallel import DataParallel

_SAMPLES = 16384  # entries of a leaf that are enough to tell one gradient from another
_SMALL = 0.01  # of a leaf's usual size, below which it is judged as if it had this


class Result(NamedTuple):
    """One gradient, on the host.

    Attributes:
      value: The loss.
      grads: The gradient.
      weight: W, under which they are.
      skipped: How many micro-batches `skip` rejected.
    """

    value: float
    grads: Tree
    weight: float = 1.0
    skipped: int = 0

    def is_finite(self) -> bool:
        """Whether value and gradient are finite everywhere."""
        return bool(np.isfinite(self.entries()).all() and np.isfinite(self.value))

    def entries(self) -> np.ndarray:
        """The gradient as one vector of float64."""
        return np.concatenate([np.zeros(0), *map(_real, _leaves(self.grads))])

    def sample(self) -> np.ndarray:
        """The entries, but of a large leaf not all, and the value."""
        leaves = [
            np.ravel(x)[:: -(-np.size(x) // _SAMPLES) or 1] for x in _leaves(self.grads)
        ]
        return np.concatenate([*map(_real, leaves), _real(self.value)])

    def times(self, factor: float) -> "Result":
        """All of it multiplied."""
        grads = jax.tree.map(
            lambda x: _wide(x).reshape(np.shape(x)) * factor,
            _tree.keep_inexact(self.grads),
        )
        return self._replace(value=self.value * factor, grads=grads)


class LeafError(NamedTuple):
    """How far two gradients are apart in one leaf.

    Attributes:
      path: Of the leaf, as `jax.tree_util.keystr` writes it.
      error: The norm of their difference over the larger of their norms.
    """

    path: str
    error: float


class Sizes(NamedTuple):
    """How large the micro-batches' parts of a result are, whatever they add up to.

    Attributes:
      value: The sum of the values' sizes.
      leaves: The sums of the norms of each leaf of the gradients.
    """

    value: float
    leaves: list[float]


class Errors(NamedTuple):
    """How far two results are apart."""

    value: float
    leaves: tuple[LeafError, ...]

    @property
    def worst(self) -> float:
        """The largest; a NaN is larger than any."""
        return float(np.max([self.value, *(leaf.error for leaf in self.leaves)]))

    def replaced_within(self, tolerance: float, others: "Errors") -> "Errors":
        """Each of these, or that of `others` where it is within the tolerance."""
        pairs = zip(self.leaves, others.leaves, strict=True)
        return Errors(
            value=others.value if others.value <= tolerance else self.value,
            leaves=tuple(b if b.error <= tolerance else a for a, b in pairs),
        )


def compare(a: Result, b: Result, sizes: Sizes | None = None) -> Errors:
    """The relative errors of value and leaves; `sizes` are the least they are over."""
    paths = [
        jax.tree_util.keystr(path)
        for path, _ in jax.tree_util.tree_leaves_with_path(_tree.keep_inexact(a.grads))
    ]
    x, y = _leaves(a.grads), _leaves(b.grads)
    least = sizes or Sizes(0.0, [0.0] * len(x))
    usual = _SMALL * _root_mean_square(x)
    leaves = tuple(
        LeafError(path, _error(p, q, max(np.sqrt(np.size(p)) * usual, floor)))
        for path, p, q, floor in zip(paths, x, y, least.leaves, strict=True)
    )
    return Errors(_error(a.value, b.value, least.value), leaves)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A loss with its arguments and the settings of `value_and_grad`."""

    settings: Settings
    args: tuple[Tree, ...]
    kwargs: dict[str, Tree]
    call: _arguments.Call
    split: _split.Split

    @classmethod
    def of(
        cls, settings: Settings, args: tuple[Tree, ...], kwargs: dict[str, Tree]
    ) -> "Problem":
        """Checks them as `value_and_grad` does."""
        # All of the batch is compared.
        settings = dataclasses.replace(
            settings, noise_scale=False, num_real_microbatches=None
        )
        call = settings.roles.bind(settings.fun, args, kwargs)
        split = settings.split(call)
        # The probes cut the whole batch, and not one device's part of it.
        shards = settings.devices.num_shards
        split = split._replace(
            size=split.size * shards, remainder=split.remainder * shards
        )
        problem = cls(settings, args, kwargs, call, split)
        # As arrays, so other parameters are passed in the same way.
        for position in jax.tree.leaves(call.argnums):
            argument = call.args[position]
            own = jax.tree.map(jnp.asarray, _tree.differentiated(argument))
            problem = problem.with_argument(position, _tree.merge(own, argument))
        return problem.with_batch(call.batch)

    @property
    def num_microbatches(self) -> int:
        """K, a smaller last micro-batch counted, on each device."""
        return self.split.num_microbatches

    def others(self) -> list[tuple[_arguments.Place, str, Tree]]:
        """Place, name and value of all arguments that are not a batch."""
        return [
            (place, self.call.name_of(place), argument)
            for place, argument in self.call.by_place().items()
            if place not in self.call.places
        ]

    # --- The same, but for something ---

    def with_argument(self, place: _arguments.Place, argument: Tree) -> "Problem":
        """With another argument, at this position or of this name."""
        args, kwargs = list(self.args), dict(self.kwargs)
        if isinstance(place, int) and place >= len(args):
            place = self.call.names[place]  # it has a position, and came by name
        if isinstance(place, str):
            kwargs[place] = argument
        else:
            args[place] = argument
        return dataclasses.replace(self, args=tuple(args), kwargs=kwargs)

    def with_batch(self, batch: Batch) -> "Problem":
        """On another batch."""
        problem = self
        for place, argument in self.call.build_batch(batch):
            problem = problem.with_argument(place, argument)
        return dataclasses.replace(problem, call=self.call._replace(batch=batch))

    def map_batch(self, function: Callable[[jax.Array, int], jax.Array]) -> "Problem":
        """With ``function(leaf, axis)`` of every leaf of the batch."""
        return self.with_batch(self.split.map(function, self.call.batch))

    def reordered(self, order: ArrayLike) -> "Problem":
        """With the examples at these indices, as many as the batch has."""
        return self.map_batch(lambda x, axis: jnp.take(x, order, axis))

    def shuffled(self) -> "Problem":
        """With its examples in a random order."""
        return self.reordered(np.random.default_rng(0).permutation(self.split.examples))

    def repeated(self) -> "Problem":
        """With every example twice."""
        return self.map_batch(lambda x, axis: jnp.concatenate([x, x], axis))

    def with_settings(self, **changes: Any) -> "Problem":
        """With other settings."""
        settings = dataclasses.replace(self.settings, **changes)
        return Problem.of(settings, self.args, self.kwargs)

    def in_runs_of(self, size: int) -> "Problem":
        """In micro-batches of `size` neighbouring examples, on one device."""
        number = self.split.examples // size
        # A split without a remainder is strided, and this order undoes that.
        order = np.arange(self.split.examples).reshape(number, size).T.ravel()
        return self.reordered(order).with_settings(
            num_microbatches=number,
            microbatch_size=None,
            skip=None,
            devices=DataParallel(),
        )

    def what_counts(self) -> list[str]:
        """The names of all leaves of the batch that may say what counts.

        It is empty if all of it are masks: then there is no data.
        """
        pairs = zip(self.call.batch_names, self.call.batch, strict=True)
        found = [f"`{name}`" for name, leaf in pairs if _may_count(leaf)]
        return [] if all(map(_is_mask, self.call.batch)) else found

    def with_counts_alike(self) -> "Problem":
        """With as much that counts in all micro-batches, for a mean on one device.

        What may say what counts has the first micro-batch's values, except where they
        and its own are positive. Examples after the last whole one are left out.
        """
        own, number = self.split.size, self.split.whole
        # A split without a remainder is strided: its first part is every K-th example.
        first = np.repeat(np.arange(own) * number, number)

        def alike(x: jax.Array, axis: int) -> jax.Array:
            given = jnp.take(x, np.arange(own * number), axis)
            if not _may_count(x):
                return given
            of_first = jnp.take(x, first, axis)
            both = jnp.minimum(given, of_first) > jnp.zeros([], x.dtype)
            return jnp.where(both, given, of_first)

        return self.map_batch(alike).with_settings(
            num_microbatches=number,
            microbatch_size=None,
            reduction="mean",
            weight=None,
            skip=None,
            devices=DataParallel(),
        )

    def with_one_carry(self) -> "Problem":
        """With the first carry for every micro-batch."""
        has_aux, carry = self.settings.has_aux, self.call.carry
        fun = self.settings.fun

        @functools.wraps(fun)
        def with_one_carry(*args: Tree, **kwargs: Tree) -> Tree:
            value, rest = fun(*args, **kwargs)
            return value, ((rest[0], carry) if has_aux else carry)

        return self.with_settings(fun=with_one_carry)

    def elsewhere(self, seed: int) -> "Problem":
        """At parameters that are a tenth of their size away, each of its own."""
        random = np.random.default_rng(seed)

        def move(x: ArrayLike) -> jax.Array:
            x = jnp.asarray(x)
            if not _tree.is_inexact(x):
                return x
            noise = jnp.asarray(0.1 * random.normal(size=x.shape), x.dtype)
            return jnp.where(x == 0, 0.1 * noise, x + x * noise)

        moved = self
        for position in jax.tree.leaves(self.call.argnums):
            argument = self.call.args[position]
            part = jax.tree.map(move, _tree.differentiated(argument))
            moved = moved.with_argument(position, _tree.merge(part, argument))
        return moved

    # --- Parts of the batch, for `with_batch` ---

    def microbatches(self) -> list[Batch]:
        """Each micro-batch, the smaller remainder last."""
        indices = jnp.arange(self.split.whole)
        parts = [self.split.take(self.call.batch, i) for i in indices]
        if self.split.remainder:
            parts.append(self.split.take_remainder(self.call.batch))
        return parts

    def in_two(self, first: int) -> list[Batch]:
        """The first so many micro-batches together, and the other ones."""
        parts = self.microbatches()
        return [
            [
                jnp.concatenate(pieces, axis)
                for *pieces, axis in zip(*group, self.split.axes, strict=True)
            ]
            for group in (parts[:first], parts[first:])
        ]

    # --- What comes out ---

    def in_parts(self) -> Result:
        """As `value_and_grad` computes it with these settings."""
        return self._run(self.settings)

    def whole(self) -> Result:
        """The whole batch as one micro-batch, on one device, and nothing skipped."""
        return self._run(self._at_once())

    def weight(self) -> float:
        """The weight of this batch."""
        if self.settings.weight is None:
            return float(self.split.examples)
        return self.whole().weight

    def sizes(
        self, gradient: Callable[["Problem"], Result], total_weight: float
    ) -> Sizes:
        """Of what the micro-batches add up to with this reduction."""
        results = [gradient(self.with_batch(part)) for part in self.microbatches()]
        # One that is not finite can have weight 0.
        results = [r for r in results if r.is_finite()] or [self.whole().times(0)]
        by = {"mean": 1 / len(results), "sum": 1.0, "ratio": 1 / total_weight}
        factor = by[self.settings.reduction]
        norms = [[np.linalg.norm(_wide(x)) for x in _leaves(r.grads)] for r in results]
        return Sizes(
            value=sum(abs(r.value) for r in results) * factor,
            leaves=[float(s) for s in np.sum(norms, 0) * factor],
        )

    def raw_gradient(self) -> Callable[["Problem"], Result]:
        """Differentiates this `fun` on a whole batch, without dividing by anything.

        It is compiled once for each size of batch.
        """
        settings = dataclasses.replace(self._at_once(), reduction="sum", weight=None)
        jitted = jax.jit(self._traceable(settings)[1])

        def gradient(problem: "Problem") -> Result:
            arrays, _ = problem._traceable(settings)
            return self._on_host(jitted(arrays))

        return gradient

    def narrowest_dtype(self) -> np.dtype:
        """The narrowest floating dtype that `fun` or its gradient computes in."""
        arrays, function = self._traceable(self._at_once())
        jaxpr = jax.make_jaxpr(function)(arrays).jaxpr
        dtypes = {d for d in _flow.dtypes_in(jaxpr) if jnp.issubdtype(d, jnp.inexact)}
        return max(dtypes, key=lambda d: jnp.finfo(d).eps, default=np.dtype("float32"))

    def _at_once(self) -> Settings:
        """The settings with which the whole batch is one micro-batch."""
        return dataclasses.replace(
            self.settings,
            num_microbatches=1,
            microbatch_size=None,
            skip=None,
            devices=DataParallel(),
        )

    def _run(self, settings: Settings) -> Result:
        return self._on_host(settings.run(self.args, self.kwargs))

    def _on_host(self, output: Tree) -> Result:
        """What `value_and_grad` returned, without aux and carry."""
        (value, grads), info = output
        value = value[0] if self.settings.has_extra else value
        value, grads, info = jax.device_get((value, grads, info))
        # A complex value stays complex.
        return Result(value.item(), grads, float(info.weight), int(info.skipped))

    def _traceable(
        self, settings: Settings
    ) -> tuple[list[Tree], Callable[[list[Tree]], Tree]]:
        """The arrays among the arguments, and the gradient as a function of them."""
        given = self.args, self.kwargs

        def of_arrays(arrays: list[Tree]) -> Tree:
            return settings.run(*_tree.filled(given, arrays))

        return _tree.arrays_in(given), of_arrays


def _is_mask(x: jax.Array) -> bool:
    """Whether it is all 0 and 1."""
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return not is_key and bool((x == x.astype(bool).astype(x.dtype)).all())


def _may_count(x: jax.Array) -> bool:
    """Whether it may say what counts: a mask, or integers that are not all positive.

    A label of 0 can be background, one of -100 ignored, and a token of 0 padding.
    """
    is_integer = jnp.issubdtype(x.dtype, jnp.integer)
    return _is_mask(x) or (is_integer and bool((x <= 0).any()))


def _error(a: ArrayLike, b: ArrayLike, least: float) -> float:
    """‖a − b‖ over the larger norm, or over `least`, if that is larger."""
    x, y = _wide(a), _wide(b)
    difference = float(np.linalg.norm(x - y))
    norms = [float(np.linalg.norm(x)), float(np.linalg.norm(y)), least]
    return 0.0 if difference == 0 else difference / float(np.max(norms))


def _root_mean_square(leaves: list[ArrayLike]) -> float:
    """Of all entries together."""
    entries = sum(np.size(x) for x in leaves)
    squares = sum(float(np.sum(np.abs(_wide(x)) ** 2)) for x in leaves)
    return float(np.sqrt(squares / entries)) if entries else 0.0


def _leaves(grads: Tree) -> list[ArrayLike]:
    """The leaves that are floating or complex."""
    return jax.tree.leaves(_tree.keep_inexact(grads))


def _wide(x: ArrayLike) -> np.ndarray:
    """The entries in double precision."""
    x = np.asarray(x)
    return x.astype(np.complex128 if np.iscomplexobj(x) else np.float64).ravel()


def _real(x: ArrayLike) -> np.ndarray:
    """The same, with real and imaginary parts after one another."""
    return _wide(x).view(np.float64)
