"""What a function returns, taken apart: its value, auxiliary outputs and carry."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from optax_accum import _tree, _validate
from optax_accum._types import Scalar, Tree


class Outputs(NamedTuple):
    """How `fun` returns what it returns: as `has_aux` and `carry_argnum` say.

    Attributes:
      has_aux: Whether there is auxiliary output.
      carry_name: The name of the carried argument, if there is one.
      holomorphic: Whether the value is complex.
    """

    has_aux: bool
    carry_name: str | None
    holomorphic: bool = False

    def unpack(self, result: Any, carry: Tree) -> tuple[Scalar, Tree, Tree]:
        """``(value, aux, carry)`` from what `fun` returned for this `carry`.

        Raises:
          TypeError: The result has a different structure, its value is not a scalar
            of the right kind, or its carry has a different type from `carry`.
          ValueError: The carry has a different structure.
        """
        has_carry = self.carry_name is not None
        aux, new_carry = (), None
        if self.has_aux and has_carry:
            needed = "(value, (aux, carry))"
            result, rest = pair(result, needed)
            aux, new_carry = pair(rest, needed)
        elif self.has_aux:
            result, aux = pair(result, "(value, aux)")
        elif has_carry:
            result, new_carry = pair(result, "(value, carry)")
        value = self._scalar(result)
        if self.carry_name is not None:
            new_carry = checked_carry(self.carry_name, carry, new_carry)
        return value, _tree.as_arrays(aux), new_carry

    def pack(self, value: Any, aux: Tree, carry: Tree) -> Any:
        """The reverse of `unpack`."""
        if self.carry_name is None:
            return (value, aux) if self.has_aux else value
        return value, (aux, carry) if self.has_aux else carry

    def _scalar(self, value: Any) -> Scalar:
        """What `fun` returned as its value."""
        kind: Any = jnp.floating
        needed = "`fun` must return a real floating scalar to differentiate"
        if self.holomorphic:
            kind = jnp.complexfloating
            needed = "`fun` must return a complex scalar with `holomorphic=True`"
        if isinstance(value, tuple | list):
            raise TypeError(
                f"{needed}; got a {type(value).__name__} of {len(value)}. If it "
                "returns (value, aux), pass has_aux=True"
            )
        try:
            value = jnp.asarray(value)
        except (TypeError, ValueError):
            raise TypeError(
                f"{needed}; got {type(value).__name__}. If it returns auxiliary output "
                "as well, pass has_aux=True"
            ) from None
        if value.shape != () or not jnp.issubdtype(value.dtype, kind):
            raise TypeError(
                f"{needed}; got shape {value.shape} and dtype {value.dtype}. Reduce it "
                "over the micro-batch, with jnp.mean, say"
            )
        return value


def pair(
    value: Any, needed: str, options: str = "these `has_aux` and `carry_argnum`"
) -> tuple[Any, Any]:
    """What `fun` returned, or a part of it, as two things."""
    if isinstance(value, tuple | list) and len(value) == 2:
        return value[0], value[1]
    is_tuple = isinstance(value, tuple)
    what = f"{len(value)} things" if is_tuple else _validate.shown_kind(value)
    raise TypeError(
        f"`fun` must return {needed} with {options}; got {what}, not a pair"
    )


def checked_carry(name: str, carry: Tree, new_carry: Tree) -> Tree:
    """`new_carry`, which `fun` returned for `carry`, in the type of `carry`.

    Raises:
      TypeError: Its type differs from that of `carry`.
      ValueError: Its structure does.
    """
    _validate.same_structure(
        "carry",
        new_carry,
        name,
        carry,
        "`fun` must return its carry in the same structure, with new values",
    )
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(carry),
        jax.tree.leaves(new_carry),
        strict=True,
    )
    for (path, old), new in pairs:
        types = [_validate.shown_type(x) for x in (old, new)]
        if types[0] != types[1]:
            raise TypeError(
                f"{_validate.named(name, path)} is carried from micro-batch to "
                f"micro-batch and must keep its type; `fun` got {types[0]} and "
                f"returned {types[1]}"
            )
    return _tree.cast_like(new_carry, carry)
