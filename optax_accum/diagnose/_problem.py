"""A loss with its arguments, to be differentiated whole, in parts and elsewhere."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.typing import ArrayLike

from optax_accum import _arguments, _devices, _microbatch, _split, _window

Tree = Any  # arrays in any structure: a gradient, an argument or a result of the loss
Batch = list[Tree]  # the arguments that are split, in the order of `Call.places`
Option = Any  # one of those of `value_and_grad`
Place = int | str  # of an argument: its position, or its keyword

_SAMPLES = 16384  # entries of a leaf that are enough to tell one gradient from another
_SMALL = 0.01  # of a leaf's usual size, below which it is judged as if it had this
_PARTS_ONLY = ("microbatch_size", "skip", "axis_name", "mesh", "scatter")
_REPORTS = ("return_info", "noise_scale")


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
            _window.keep_inexact(self.grads),
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
        for path, _ in jax.tree_util.tree_leaves_with_path(
            _window.keep_inexact(a.grads)
        )
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
    """A loss with its arguments and the options of `value_and_grad`."""

    fun: Callable[..., Tree]
    args: tuple[Tree, ...]
    kwargs: dict[str, Tree]
    options: dict[str, Option]
    call: _arguments.Call
    split: _split.Split
    shards: int  # devices that each run as many micro-batches

    @classmethod
    def of(
        cls,
        fun: Callable[..., Tree],
        args: tuple[Tree, ...],
        kwargs: dict[str, Tree],
        options: dict[str, Option],
    ) -> "Problem":
        """Checks them as `value_and_grad` does.

        Raises:
          TypeError: As `value_and_grad`.
          ValueError: As `value_and_grad`.
        """
        options = {k: v for k, v in options.items() if k not in _REPORTS}
        _microbatch.value_and_grad(fun, **options)
        roles = _arguments.Roles.of(
            options.get("argnums", 0),
            options.get("batch_argnums", 1),
            options.get("batch_argnames", ()),
            options.get("carry_argnum"),
            options.get("rng_argnums", ()),
        )
        call = roles.bind(fun, args, kwargs)
        split = _split.plan(
            call.batch,
            call.batch_names(),
            options.get("batch_axis", 0),
            options.get("num_microbatches"),
            options.get("microbatch_size"),
        )
        axis_name, mesh = options.get("axis_name"), options.get("mesh")
        shards = _devices.Devices.of(axis_name, mesh, False).shards
        # As arrays, so that other parameters are passed in the same way.
        own = list(args)
        for position in jax.tree.leaves(call.argnums):
            own[position] = jax.tree.map(jnp.asarray, own[position])
        problem = cls(fun, tuple(own), kwargs, options, call, split, shards)
        return problem.with_batch(call.batch)

    @property
    def num_microbatches(self) -> int:
        """K, a smaller last micro-batch counted, on each device."""
        return self.split.whole + bool(self.split.tail)

    @property
    def reduction(self) -> str:
        """As given, or its default."""
        return self.options.get("reduction", "mean")

    @property
    def batch_size(self) -> int:
        """How many examples the batch has."""
        return self.split.whole * self.split.size + self.split.tail

    @property
    def batch_axis(self) -> int:
        """As given, or its default."""
        return self.options.get("batch_axis", 0)

    def others(self) -> Iterator[tuple[Place, str, Tree]]:
        """Position or keyword, name and value of all arguments that are no batch."""
        names = self.call.names
        places: list[tuple[Place, str, Tree]] = [
            (i, names[i], x) for i, x in enumerate(self.args)
        ]
        places += [(name, name, x) for name, x in self.kwargs.items()]
        return (other for other in places if other[0] not in self.call.places)

    def unsplit(self) -> Iterator[tuple[Place, str, Tree]]:
        """Those of them that look like a batch, as `others` gives them."""
        axis, examples = self.batch_axis, self.batch_size
        special = {*self.call.keys, self.call.carry}
        special |= set(jax.tree.leaves(self.call.argnums))
        for place, name, argument in self.others():
            shapes = [getattr(x, "shape", ()) for x in jax.tree.leaves(argument)]
            fits = [-len(s) <= axis < len(s) and s[axis] == examples for s in shapes]
            if fits and all(fits) and place not in special:
                yield place, name, argument

    # --- The same, but for something ---

    def with_argument(self, place: Place, argument: Tree) -> "Problem":
        """With another argument, at this position or of this name."""
        args, kwargs = list(self.args), dict(self.kwargs)
        if isinstance(place, str):
            kwargs[place] = argument
        else:
            args[place] = argument
        return dataclasses.replace(self, args=tuple(args), kwargs=kwargs)

    def with_batch(self, batch: Batch) -> "Problem":
        """On another batch."""
        problem = self
        for place, argument in zip(self.call.places, batch, strict=True):
            problem = problem.with_argument(place, argument)
        return dataclasses.replace(problem, call=self.call._replace(batch=batch))

    def map_batch(self, function: Callable[[jax.Array, int], jax.Array]) -> "Problem":
        """With ``function(leaf, axis)`` of every leaf of the batch."""
        batch = jax.tree.map(
            lambda x: function(x, self.batch_axis % x.ndim), self.call.batch
        )
        return self.with_batch(batch)

    def with_options(self, **options: Option) -> "Problem":
        """With other options."""
        return Problem.of(self.fun, self.args, self.kwargs, self.options | options)

    def with_one_carry(self) -> "Problem":
        """With the first carry for every micro-batch."""
        position = self.call.carry
        assert position is not None

        def fun(*args: Tree, **kwargs: Tree) -> Tree:
            value, rest = self.fun(*args, **kwargs)
            carry = args[position]
            return value, ((rest[0], carry) if self.options.get("has_aux") else carry)

        return dataclasses.replace(self, fun=fun)

    def elsewhere(self, seed: int) -> "Problem":
        """At parameters that are a tenth of their size away, each of its own."""
        random = np.random.default_rng(seed)

        def move(x: jax.Array) -> jax.Array:
            if not _window.is_inexact(x):
                return x
            noise = jnp.asarray(0.1 * random.normal(size=x.shape), x.dtype)
            return jnp.where(x == 0, 0.1 * noise, x + x * noise)

        moved = self
        for position in jax.tree.leaves(self.call.argnums):
            argument = jax.tree.map(move, self.args[position])
            moved = moved.with_argument(position, argument)
        return moved

    # --- Parts of the batch, for `with_batch` ---

    def microbatches(self) -> list[Batch]:
        """Each micro-batch, the smaller remainder last."""
        indices = jnp.arange(self.split.whole)
        parts = [self.split.take(self.call.batch, i) for i in indices]
        if self.split.tail:
            parts.append(self.split.take_tail(self.call.batch))
        return parts

    def halves(self) -> list[Batch]:
        """The first half of the micro-batches together, and the other ones."""
        parts = self.microbatches()
        middle = len(parts) // 2
        return [
            jax.tree.map(
                lambda *x: jnp.concatenate(x, self.batch_axis % x[0].ndim), *group
            )
            for group in (parts[:middle], parts[middle:])
        ]

    # --- What comes out ---

    def in_parts(self) -> Result:
        """As `value_and_grad` computes it with these options."""
        return self._run(self.options)

    def whole(self) -> Result:
        """The whole batch as one micro-batch, on one device, and nothing skipped."""
        return self._run(self._at_once())

    def weight(self) -> float:
        """The weight of this batch."""
        weight = self.options.get("weight")
        return float(weight(*self.args, **self.kwargs) if weight else self.batch_size)

    def sizes(
        self, gradient: Callable[["Problem"], Result], total_weight: float
    ) -> Sizes:
        """Of what the micro-batches add up to with this reduction."""
        results = [gradient(self.with_batch(part)) for part in self.microbatches()]
        # One that is not finite can have weight 0.
        results = [r for r in results if r.is_finite()] or [self.whole().times(0)]
        by = {"mean": 1 / len(results), "sum": 1.0, "ratio": 1 / total_weight}
        norms = [[np.linalg.norm(_wide(x)) for x in _leaves(r.grads)] for r in results]
        return Sizes(
            value=sum(abs(r.value) for r in results) * by[self.reduction],
            leaves=[float(s) for s in np.sum(norms, 0) * by[self.reduction]],
        )

    def raw_gradient(self) -> Callable[["Problem"], Result]:
        """Differentiates this `fun` on a whole batch, without dividing by anything.

        It is compiled once for each size of batch.
        """
        options = self._at_once() | {"reduction": "sum", "weight": None}
        _, function = self._traceable(options)
        jitted = jax.jit(function)

        def gradient(problem: "Problem") -> Result:
            arrays, _ = problem._traceable(options)
            return self._on_host(jitted(arrays))

        return gradient

    def narrowest_dtype(self) -> np.dtype:
        """The narrowest floating dtype that `fun` or its gradient computes in."""
        arrays, function = self._traceable(self._at_once())
        jaxpr = jax.make_jaxpr(function)(arrays).jaxpr
        dtypes = {d for d in _dtypes(jaxpr) if jnp.issubdtype(d, jnp.inexact)}
        return max(dtypes, key=lambda d: jnp.finfo(d).eps, default=np.dtype("float32"))

    def _at_once(self) -> dict[str, Option]:
        """The options with which the whole batch is one micro-batch."""
        kept = {k: v for k, v in self.options.items() if k not in _PARTS_ONLY}
        return kept | {"num_microbatches": 1}

    def _run(self, options: dict[str, Option]) -> Result:
        function = _microbatch.value_and_grad(self.fun, **options, return_info=True)
        return self._on_host(function(*self.args, **self.kwargs))

    def _on_host(self, output: Tree) -> Result:
        """What `value_and_grad` returned, without aux and carry."""
        (value, grads), info = output
        has_extra = self.options.get("has_aux") or self.call.carry is not None
        value, grads, info = jax.device_get(
            (value[0] if has_extra else value, grads, info)
        )
        return Result(float(value), grads, float(info.weight), int(info.skipped))

    def _traceable(
        self, options: dict[str, Option]
    ) -> tuple[list[Tree], Callable[[list[Tree]], Tree]]:
        """The arrays among the arguments, and the gradient as a function of them."""
        function = _microbatch.value_and_grad(self.fun, **options, return_info=True)
        arrays, rebuild = _arguments.arrays_in((self.args, self.kwargs))

        def of_arrays(arrays: list[Tree]) -> Tree:
            args, kwargs = rebuild(arrays)
            return function(*args, **kwargs)

        return arrays, of_arrays


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
    return jax.tree.leaves(_window.keep_inexact(grads))


def _wide(x: ArrayLike) -> np.ndarray:
    """The entries in double precision."""
    x = np.asarray(x)
    return x.astype(np.complex128 if np.iscomplexobj(x) else np.float64).ravel()


def _real(x: ArrayLike) -> np.ndarray:
    """The same, with real and imaginary parts after one another."""
    return _wide(x).view(np.float64)


def _dtypes(jaxpr: core.Jaxpr) -> set[np.dtype]:
    """The dtypes of all that is computed in `jaxpr`, inner functions included."""
    found: set[np.dtype] = set()
    for equation in jaxpr.eqns:
        found |= {v.aval.dtype for v in equation.outvars if hasattr(v.aval, "dtype")}
        for parameter in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(parameter, "jaxpr", parameter)
            if isinstance(inner, core.Jaxpr):
                found |= _dtypes(inner)
    return found
