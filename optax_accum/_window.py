"""The arithmetic of a window: a sum of gradients S and a sum of weights W.

Every micro-batch adds to both, and the boundary divides once. With ``g_i`` the gradient
and ``w_i`` the weight of micro-batch ``i``:

=========  ===========  =======  ===========================================
reduction  S            result   for
=========  ===========  =======  ===========================================
"mean"     Σ w_i·g_i    S / W    ``g_i`` is the gradient of a mean over w_i
"ratio"    Σ g_i        S / W    ``g_i`` is the gradient of a sum over w_i
"sum"      Σ g_i        S        the plain sum
=========  ===========  =======  ===========================================

Padding, token masks, ragged batches and an early close are all handled by weights. In a
mean a weight of 0 contributes nothing, even if its gradient is NaN or inf. In a ratio
and a sum the weight is a share of the denominator and no mask: an image without objects
has no positives and a large gradient, which counts. A rejected micro-batch (`_skip`) is
left out of all three: *selected* away, because 0 * NaN is NaN.

Plain sums, not a running mean: the mean costs a subtraction per element and
keeps the addition from fusing into what computed the gradient.

Both ways of accumulating keep their books in a `Window`: `accumulate` in its state,
`value_and_grad` in the carry of its loop.
"""

from typing import Any, NamedTuple, Protocol, get_args

import jax
import jax.numpy as jnp
from jax import lax

from optax_accum import _tree
from optax_accum._backward import Pullback
from optax_accum._overwrite import Overwritten
from optax_accum._types import AxisName, DType, Grads, Leaf, Reduction, Scalar, Tree

REDUCTIONS: tuple[Reduction, ...] = get_args(Reduction)


def zeros(tree: Tree, dtype: DType = None) -> Tree:
    """An empty sum for gradients like `tree`, each leaf an array of its own.

    In at least float32, unless `dtype` says otherwise.
    """
    return jax.tree.map(
        lambda x: _tree.zeros_like(
            x, dtype or _tree.at_least_float32(_tree.dtype_of(x))
        ),
        _tree.keep_inexact(tree),
    )


def counts(
    weight: Scalar, reduction: Reduction, rejected: bool | Scalar = False
) -> bool | Scalar:
    """Whether a micro-batch contributes at all; one that is `rejected` has weight 0."""
    if reduction == "mean":
        return weight != 0
    return True if rejected is False else ~jnp.asarray(rejected)


def contributions(
    tree: Tree,
    weight: Scalar,
    reduction: Reduction,
    *,
    counted: bool | Scalar = True,
) -> Tree:
    """What a micro-batch adds to S, in at least float32; zeros if it does not count.

    In a mean it counts unless its weight is 0.
    """
    if reduction == "mean":
        counted = weight != 0

    def contribution(x: Leaf) -> jax.Array:
        x = _tree.widened(jnp.asarray(x))  # bfloat16 has no 301, a possible weight.
        if reduction == "mean":
            x = _tree.scaled(x, weight.astype(x.dtype))
        return x if counted is True else jnp.where(counted, x, _tree.zeros_like(x))

    return jax.tree.map(contribution, tree)


def add(
    sums: Tree,
    tree: Tree,
    weight: Scalar,
    reduction: Reduction,
    *,
    counted: bool | Scalar = True,
    first: Scalar | None = None,
) -> Tree:
    """S with one more micro-batch in it, in the dtypes of `sums`.

    On the `first` micro-step of a window the sums start again. That select clears the
    window (`_backward` has a branch instead): no buffer is rewritten with zeros, and a
    NaN never outlives its window.
    """

    def add_leaf(s: jax.Array, x: Leaf) -> jax.Array:
        # A narrow accumulator is rounded once, after the addition.
        wide = _tree.widened(s)
        x = jnp.asarray(x).astype(wide.dtype)
        x = contributions(x, weight, reduction, counted=counted)
        total = wide + x
        if first is not None:
            total = jnp.where(first, x, total)
        return total.astype(s.dtype)

    return jax.tree.map(add_leaf, sums, tree)


def divide(sums: Tree, weight: Scalar, reduction: Reduction) -> Tree:
    """The result: S / W, or S for ``"sum"``; zeros where W is 0."""
    if reduction == "sum":
        return sums
    # The reciprocal, once per window: a division by a traced scalar does not
    # fuse into the optimizer and would cost a temporary the size of S.
    empty = weight == 0
    reciprocal = jnp.where(empty, 0, 1 / jnp.where(empty, 1, weight))

    def quotient(s: jax.Array) -> jax.Array:
        wide = _tree.widened(s)
        result = _tree.scaled(wide, reciprocal.astype(wide.dtype))
        if reduction == "ratio":  # If W is 0, S need not be 0, nor finite.
            result = jnp.where(empty, jnp.zeros_like(result), result)
        return result.astype(s.dtype)

    return jax.tree.map(quotient, sums)


def divide_in_place(sums: Tree, weight: Scalar, reduction: Reduction) -> Tree:
    """As `divide`, in the buffers of `sums`.

    A branch that may leave them as they are makes XLA divide them where they are.
    Otherwise there may be a second S in memory.
    """
    return lax.cond(
        _tree.opaque_true(),
        lambda sums: divide(sums, weight, reduction),
        lambda sums: sums,
        sums,
    )


class NoiseSums(NamedTuple):
    """What the noise scale is estimated from.

    Attributes:
      squares: ``f32[]``, Σ wᵢ·‖gᵢ‖² with gᵢ the gradient of a mean over wᵢ.
      samples: ``i32[]``, how many micro-batches had any weight. One without has no
        mean gradient, so it is not a sample.
    """

    squares: Scalar
    samples: Scalar

    @classmethod
    def empty(cls, weight: Leaf) -> "NoiseSums":
        """Of no micro-batch, in the dtype of `weight`."""
        return cls(_tree.zeros_like(weight), _tree.zeros_like(weight, jnp.int32))

    def add(
        self,
        grads: Grads,
        weight: Scalar,
        reduction: Reduction,
        first: Scalar | None = None,
    ) -> "NoiseSums":
        """With one more micro-batch in them."""
        square = _tree.squared_norm(grads, self.squares.dtype)
        if reduction != "mean":
            # The gradient of a sum over w is w times that of the mean.
            square = square / jnp.where(weight == 0, 1, weight) ** 2
        sample = (weight != 0).astype(self.samples.dtype)
        return NoiseSums(
            add(self.squares, square, weight, "mean", first=first),
            add(self.samples, sample, weight, "sum", first=first),
        )


class NoNoiseSums(NamedTuple):
    """Takes the place of `NoiseSums` if the noise scale is not measured."""

    def add(self, *args: Any) -> "NoNoiseSums":
        """Nothing to add to."""
        del args
        return self


class Devices(Protocol):
    """What a window needs to know of the devices that share it."""

    @property
    def axis_name(self) -> AxisName | None:
        """Their axis, or several, or ``None``."""

    def sum(self, grads: Grads, rest: Tree) -> tuple[Grads, Tree]:
        """The sums over all devices, of the gradients and of everything else."""

    def reduce(self, reduction: str, x: jax.Array, weight: Scalar) -> jax.Array:
        """The "sum", "max" or "last" of all devices.

        `weight` is this one's W, or of rows that of each.
        """


class Window(NamedTuple):
    """The sums over the micro-batches of a window, as `AccumulateState` has them.

    Across devices each device has its own, until the boundary sums them.

    Attributes:
      loss: ``f32[]``, the sum of the losses, weighted as the gradients are (``f64[]``
        in double precision). With ``reduction="mean"``, ``loss / weight`` is the
        window's mean loss.
      grads: S, built like the parameters, in at least float32; ``None`` for leaves that
        are not accumulated. Overwritten leaves have their next value so far.
      weight: W, ``f32[]`` or ``f64[]``.
      skipped: ``i32[]``, how many micro-batches were rejected, over all windows.
      noise: ``squares: f32[]`` and ``samples: i32[]``, from which the noise scale is
        estimated; ``()`` if it is not measured.
    """

    # In this order XLA's loop needs no more memory than one that is written by hand.
    # (`loss` and not `value`, which `optax.value_and_grad_from_state` looks for.)
    loss: Scalar
    grads: Grads
    weight: Scalar
    skipped: Scalar
    noise: NoiseSums | NoNoiseSums

    @classmethod
    def empty(
        cls,
        grads: Grads,
        loss: Leaf,
        weight: Leaf,
        *,
        accumulator_dtype: DType = None,
        measure_noise: bool = False,
        overwritten: Overwritten,
    ) -> "Window":
        """A window without micro-batches.

        Args:
          grads: Arrays, or shapes, like the gradients that will be added.
          loss: Like the losses.
          weight: Like the weights.
          accumulator_dtype: Of S. By default at least float32.
          measure_noise: Whether to measure the noise scale.
          overwritten: Which leaves are overwritten, not summed.
        """
        noise: NoiseSums | NoNoiseSums = NoNoiseSums()
        if measure_noise:
            leaves = jax.tree.leaves(_tree.keep_inexact(grads))
            noise = NoiseSums.empty(weight)
            noise = _tree.vary_like(noise, weight, *leaves)
        return cls(
            loss=_tree.vary_like(zeros(loss), weight),
            grads=overwritten.empty(
                _tree.vary_like(zeros(grads, accumulator_dtype), weight)
            ),
            weight=_tree.zeros_like(weight),
            skipped=_tree.zeros_like(weight, jnp.int32),
            noise=noise,
        )

    def add(
        self,
        grads: Grads | Pullback,
        loss: Leaf,
        weight: Scalar,
        *,
        reduction: Reduction,
        counted: bool | Scalar,
        rejected: bool | Scalar = False,
        first: Scalar | None = None,
        is_weighted: bool = True,
        overwritten: Overwritten,
    ) -> "Window":
        """With one more micro-batch in it.

        Args:
          grads: Its gradient, with ``None`` for leaves not accumulated; or its
            pullback, which adds the gradient in place.
          loss: Its loss.
          weight: Its weight.
          reduction: How it counts.
          counted: ``bool[]``, whether it does, from `counts`; True if that is certain.
          rejected: ``bool[]``, whether it was rejected, and its `weight` is 0 for that.
          first: ``bool[]``, whether it is the first of its window, and clears it.
          is_weighted: False if its weight is known to be 1.
          overwritten: Which leaves are overwritten, not summed.
        """
        how: Any = {"counted": counted, "first": first}
        window = Window(
            loss=add(self.loss, loss, weight, reduction, **how),
            grads=self.grads,
            weight=add(self.weight, weight, weight, "sum", first=first),
            skipped=self.skipped + jnp.asarray(rejected).astype(self.skipped.dtype),
            noise=self.noise,
        )
        if isinstance(grads, Pullback):
            factor = weight if reduction == "mean" and is_weighted else None
            sums = grads.added_to(self.grads, factor, **how)
            return window._replace(grads=sums)
        gradients = overwritten.gradients(grads)
        sums = add(
            overwritten.gradients(self.grads), gradients, weight, reduction, **how
        )
        others = overwritten.add(self.grads, grads, counted, first)
        return window._replace(
            grads=_tree.merge(sums, others),
            noise=self.noise.add(gradients, weight, reduction, first),
        )

    def over_devices(self, devices: Devices, overwritten: Overwritten) -> "Window":
        """The windows of all devices as one, in one exchange for each dtype of S."""
        # In one dtype, to exchange everything at once.
        rest = self._replace(grads=())
        in_one_dtype = jax.tree.map(
            lambda x: x if _tree.is_complex(x) else x.astype(self.weight.dtype), rest
        )
        grads, total = devices.sum(overwritten.gradients(self.grads), in_one_dtype)
        others = overwritten.over_devices(self.grads, devices, self.weight)
        grads = _tree.merge(grads, others)
        return _tree.cast_like(total, rest)._replace(grads=grads)

    def result(
        self, reduction: Reduction, overwritten: Overwritten, *, in_place: bool = False
    ) -> tuple[Scalar, Grads]:
        """Loss and gradient of the global batch; of a mean or ratio 0 if W is 0."""
        function = divide_in_place if in_place else divide
        gradients = overwritten.gradients(self.grads)
        gradients = function(gradients, self.weight, reduction)
        loss = divide(self.loss, self.weight, reduction)
        return loss, _tree.merge(gradients, self.grads)
