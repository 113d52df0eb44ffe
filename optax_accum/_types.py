"""The names of what is passed around."""

from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal, Protocol

import jax
from jax.sharding import AbstractMesh, Mesh

Tree = Any  # a pytree
Params = Tree
Grads = Tree  # built like the parameters
Updates = Tree  # built like the parameters
Batch = list[jax.Array]  # the leaves that are split, each with an axis of examples
BatchAxis = Any  # an int, or a tuple of an int, ``None`` or tree of these per argument
Specs = Tree  # of `jax.sharding.PartitionSpec`

Leaf = Any  # an array, a number, or the shape of an array
Scalar = jax.Array  # of shape ()
DType = Any  # whatever `jnp.dtype` takes
AxisName = Hashable | tuple[Hashable, ...]
AnyMesh = Mesh | AbstractMesh

Function = Callable[..., Any]  # a user's
Args = Sequence[Any]
Kwargs = dict[str, Any]

Reduction = Literal["mean", "ratio", "sum"]
Schedule = Callable[[jax.Array], Any]  # ``gradient_step -> number``


class DefaultWeight(float):
    """A weight that was not given: a 1 that can be told from a 1 that was.

    ``None`` would be told too, but a ``None`` that was given is a mistake.
    """


DEFAULT_WEIGHT = DefaultWeight(1)


class Skip(Protocol):
    """Rejects micro-batches: `oa.skip_not_finite`, Optax's predicates, or a user's own.

    It is called as ``skip(grads, gradient_step, params)`` with one micro-batch's
    gradients, and returns ``(should_skip, info)``: a ``bool[]``, and a tree of arrays
    that is always built alike. `gradient_step` is ``None`` inside `value_and_grad`.
    """

    def __call__(
        self, grads: Grads, gradient_step: Any, params: Params, /
    ) -> tuple[Any, Tree]:
        """Whether to reject the micro-batch, and what to remember of it."""
