"""A loss with its arguments, to be differentiated whole, in parts and elsewhere."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from optax_accum import _arguments, _microbatch, _split, _window

_SAMPLES = 16384  # entries of a leaf that are enough to tell one gradient from another
_PARTS_ONLY = ("microbatch_size", "skip", "axis_name", "mesh", "scatter")
_REPORTS = ("return_info", "noise_scale")


class Result(NamedTuple):
    """One gradient, on the host."""

    value: float
    grads: Any
    skipped: int

    def is_finite(self) -> bool:
        """Whether value and gradient are finite everywhere."""
        return bool(np.isfinite(self.entries()).all() and np.isfinite(self.value))

    def entries(self) -> np.ndarray:
        """The gradient as one vector of float64."""
        leaves = jax.tree.leaves(_window.keep_inexact(self.grads))
        return np.concatenate([_real(x) for x in leaves] or [np.zeros(0)])

    def sample(self) -> np.ndarray:
        """Some entries of the gradient, and the value, as one vector."""
        return _sample(self.value, self.grads)

    def distance(self, other: "Result") -> float:
        """How far two gradients are apart, as a whole, or their values, if further."""
        values = relative_error(self.value, other.value)
        return max(relative_error(self.entries(), other.entries()), values)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A loss with its arguments and the options of `value_and_grad`."""

    fun: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    options: dict[str, Any]  # all of them
    roles: _arguments.Roles
    call: _arguments.Call
    split: _split.Split

    @classmethod
    def of(
        cls,
        fun: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        options: dict[str, Any],
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
        return cls(fun, args, kwargs, options, roles, call, split)

    @property
    def num_microbatches(self) -> int:
        """K, a smaller last micro-batch counted."""
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

    def map_batch(self, function: Callable[[jax.Array, int], jax.Array]) -> "Problem":
        """The same with ``function(leaf, axis)`` of every leaf of the batch."""
        return self.with_batch(
            jax.tree.map(
                lambda x: function(x, self.batch_axis % x.ndim), self.call.batch
            )
        )

    def elsewhere(self, seed: int) -> "Problem":
        """The same at parameters that are a tenth of their size away."""
        random = np.random.default_rng(seed)

        def move(x):
            if not _window.is_inexact(x):
                return x
            x = jnp.asarray(x)
            size = float(jnp.sqrt(jnp.mean(jnp.abs(x) ** 2))) if x.size else 0.0
            noise = jnp.asarray(random.normal(size=x.shape), x.dtype)
            return x + noise * jnp.asarray(0.1 * (size or 0.1), x.dtype)

        moved = self
        for position in jax.tree.leaves(self.call.argnums):
            argument = jax.tree.map(move, self.args[position])
            moved = moved.with_argument(position, argument)
        return moved

    def in_parts(self) -> Result:
        """As `value_and_grad` computes it with these options."""
        return self._run(self.options)

    def whole(self) -> Result:
        """The whole batch as one micro-batch, on one device, and nothing skipped."""
        return self._run(self._at_once())

    def with_batch(self, batch: list[Any]) -> "Problem":
        """The same on another batch."""
        args, kwargs = list(self.args), dict(self.kwargs)
        for place, argument in zip(self.call.places, batch, strict=True):
            if isinstance(place, str):
                kwargs[place] = argument
            else:
                args[place] = argument
        return dataclasses.replace(
            self,
            args=tuple(args),
            kwargs=kwargs,
            call=self.call._replace(batch=batch),
        )

    def with_options(self, **options: Any) -> "Problem":
        """The same with other options."""
        return Problem.of(self.fun, self.args, self.kwargs, self.options | options)

    def with_argument(self, position: int, argument: Any) -> "Problem":
        """The same with another argument that is no batch."""
        args = list(self.args)
        args[position] = argument
        return dataclasses.replace(self, args=tuple(args))

    def microbatches(self) -> list[list[Any]]:
        """The batch arguments of each micro-batch."""
        indices = jnp.arange(self.split.whole)
        parts = [self.split.take(self.call.batch, i) for i in indices]
        if self.split.tail:
            parts.append(self.split.take_tail(self.call.batch))
        return parts

    def narrowest_dtype(self) -> Any:
        """The narrowest floating dtype that `fun` or its gradient computes in."""
        arrays, function = self._traceable(self._at_once())
        jaxpr = jax.jit(function).trace(arrays).jaxpr.jaxpr
        dtypes = {d for d in _dtypes(jaxpr) if jnp.issubdtype(d, jnp.inexact)}
        return min(dtypes, key=lambda d: -jnp.finfo(d).eps, default=jnp.float32)

    def raw_gradient(self) -> Callable[["Problem"], np.ndarray]:
        """A function for value and gradient of `fun` on a whole batch, as a vector.

        Not divided by anything; a sample of the entries. It is compiled once.
        """
        options = self._at_once() | {"reduction": "sum", "weight": None}
        _, function = self._traceable(options)
        jitted = jax.jit(function)

        def vector(problem: "Problem") -> np.ndarray:
            arrays, _ = problem._traceable(options)
            result, _ = jitted(arrays)
            return _sample(*self._unpack(result))

        return vector

    def _at_once(self) -> dict[str, Any]:
        kept = {k: v for k, v in self.options.items() if k not in _PARTS_ONLY}
        return kept | {"num_microbatches": 1}

    def _run(self, options: dict[str, Any]) -> Result:
        function = _microbatch.value_and_grad(self.fun, **options, return_info=True)
        result, info = function(*self.args, **self.kwargs)
        value, grads = jax.device_get(self._unpack(result))
        return Result(float(value), grads, int(info.skipped))

    def _unpack(self, result: Any) -> tuple[Any, Any]:
        """Value and gradient, without what else there is."""
        value, grads = result
        has_extra = self.options.get("has_aux") or self.call.carry is not None
        return (value[0] if has_extra else value), grads

    def _traceable(self, options: dict[str, Any]) -> tuple[list[Any], Callable]:
        """The arrays among the arguments, and the gradient as a function of them."""
        function = _microbatch.value_and_grad(self.fun, **options, return_info=True)
        leaves, structure = jax.tree.flatten((self.args, self.kwargs))
        is_array = [isinstance(x, jax.Array | np.ndarray) for x in leaves]
        arrays = [x for x, array in zip(leaves, is_array, strict=True) if array]

        def of_arrays(arrays):
            given = iter(arrays)
            merged = [
                next(given) if array else x
                for x, array in zip(leaves, is_array, strict=True)
            ]
            args, kwargs = jax.tree.unflatten(structure, merged)
            return function(*args, **kwargs)

        return arrays, of_arrays


def relative_error(a: Any, b: Any, typical: float = 0.0) -> float:
    """‖a − b‖ over the larger norm, which is taken for at least √n·`typical`."""
    x, y = _wide(a), _wide(b)
    norms = np.linalg.norm(x), np.linalg.norm(y), np.sqrt(x.size) * typical
    difference = float(np.linalg.norm(x - y))
    return 0.0 if difference == 0 else float(difference / max(norms))


def typical_entry(leaves: list[Any]) -> float:
    """The root mean square of all entries."""
    entries = sum(np.size(x) for x in leaves)
    squares = sum(float(np.sum(np.abs(_wide(x)) ** 2)) for x in leaves)
    return float(np.sqrt(squares / entries)) if entries else 0.0


def _sample(value: Any, grads: Any) -> np.ndarray:
    """The entries of `grads`, but of a large leaf not all, and the value."""
    leaves = [
        np.asarray(x).ravel()[:: -(-np.size(x) // _SAMPLES) or 1]
        for x in jax.tree.leaves(_window.keep_inexact(grads))
    ]
    return np.concatenate([*map(_real, leaves), _real(value)])


def _wide(x: Any) -> np.ndarray:
    x = np.asarray(x)
    return x.astype(np.complex128 if np.iscomplexobj(x) else np.float64).ravel()


def _real(x: Any) -> np.ndarray:
    return _wide(x).view(np.float64)


def _dtypes(jaxpr: Any) -> set[Any]:
    """The dtypes of all that is computed in `jaxpr`, inner functions included."""
    found = set()
    for equation in jaxpr.eqns:
        found |= {v.aval.dtype for v in equation.outvars if hasattr(v.aval, "dtype")}
        for parameter in jax.tree.leaves(
            list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")
        ):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                found |= _dtypes(inner)
    return found
