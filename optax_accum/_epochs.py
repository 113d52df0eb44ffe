"""Boundaries for data that end."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

from optax_accum import _validate
from optax_accum._by_weight import ByWeight
from optax_accum.noise._adaptive_k import AdaptiveK

Batch = TypeVar("Batch")


def with_boundaries(
    batches: Iterable[Batch],
    every_k: int | None = None,
    *,
    micro_step: int = 0,
) -> Iterator[tuple[Batch, bool]]:
    """Pairs every micro-batch with the `boundary` to pass to `accumulate`.

    Use it for epochs that do not divide into windows. The boundary is True on every
    `every_k`-th micro-batch and on the last one. The last window may be shorter:
    `accumulate` divides by the weights that it saw, not by `every_k`.

    The boundaries are Python bools. Declared static, they make two programs, one that
    accumulates and one that updates, without a `lax.cond` in either.

    Args:
      batches: An iterable of micro-batches, such as one epoch of a data loader. It is
        read once, and one micro-batch ahead, to find the last one.
      every_k: How many micro-batches make a window, an int >= 1; or ``None`` if all of
        `batches` is one window. `accumulate` then needs no `every_k` of its own.
      micro_step: How many micro-steps the open window has already seen, an int >= 0 and
        < `every_k`: ``int(oa.micro_step(state))`` after a restart inside a window.

    Returns:
      An iterator of pairs ``(batch, boundary)``, empty if `batches` is. It reads
      nothing before you ask for the first pair.

    Raises:
      TypeError: `every_k` or `micro_step` is not an int.
      ValueError: `every_k` < 1; `micro_step` < 0 or >= `every_k`.

    Examples:
      >>> import optax_accum as oa
      >>> list(oa.with_boundaries("abcde", every_k=2))
      [('a', False), ('b', True), ('c', False), ('d', True), ('e', True)]

      In training, an epoch of five examples in micro-batches of two:

      >>> import functools, jax, jax.numpy as jnp, optax
      >>> tx = oa.accumulate(optax.sgd(1.0))
      >>> @functools.partial(jax.jit, static_argnames="boundary")
      ... def step(params, state, batch, boundary):
      ...     grads = jax.grad(lambda p: ((p - batch) ** 2).mean() / 2)(params)
      ...     return tx.update_params(
      ...         grads, state, params, weight=len(batch), boundary=boundary
      ...     )
      >>> params = jnp.zeros([])
      >>> state = tx.init(params)
      >>> epoch = [jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0]), jnp.array([5.0])]
      >>> for batch, boundary in oa.with_boundaries(epoch, every_k=2):
      ...     params, state = step(params, state, batch, boundary)
      ...     print(params)
      0.0
      2.5
      5.0
    """
    if callable(every_k) or isinstance(every_k, ByWeight | AdaptiveK):
        raise TypeError(
            f"`every_k` must be an int >= 1 or None; got {every_k!r}, which needs the "
            "optimizer's state. Give it to `accumulate` and leave it out here: then "
            "the second of each pair, `is_last`, is only True for the last "
            "micro-batch. Pass boundary=is_last or None"
        )
    if every_k is not None:
        every_k = _validate.whole_number("every_k", every_k)
    micro_step = _open_micro_steps(micro_step, every_k)
    return _look_ahead(iter(batches), every_k, micro_step)


def _look_ahead(
    batches: Iterator[Any], every_k: int | None, micro_step: int
) -> Iterator[tuple[Any, bool]]:
    end = object()
    pairs = itertools.pairwise(itertools.chain(batches, [end]))
    for count, (batch, following) in enumerate(pairs, start=micro_step + 1):
        fills_window = every_k is not None and count % every_k == 0
        yield batch, fills_window or following is end


def _open_micro_steps(value: Any, every_k: int | None) -> int:
    """How many micro-steps the open window has seen, an int >= 0 and < `every_k`."""
    needed = "an int >= 0, how many micro-steps the open window has seen"
    number = _validate.as_int(value)
    if number is None:
        raise TypeError(
            f"`micro_step` must be {needed}; got {value!r} of type "
            f"{type(value).__name__}. From a state: int(oa.micro_step(state))"
        )
    if number < 0:
        raise ValueError(f"`micro_step` must be {needed}; got {number}")
    if every_k is not None and number >= every_k:
        raise ValueError(
            f"`micro_step` must be less than `every_k={every_k}`, which closes a "
            f"window after that many; got {number}. Pass the `every_k` of the run "
            "that left the window open, or close it first, with weight=0 and "
            "boundary=True"
        )
    return number
