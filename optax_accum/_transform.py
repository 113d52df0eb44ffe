"""Gradient accumulation as an Optax transformation around any other."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_accum import (
    _boundary,
    _checks,
    _distributed,
    _meter,
    _stacked,
    _types,
    _window,
)
from optax_accum._state import AccumulateState

OnSkip = Literal["shrink", "wait"]
EveryK = int | Callable[[jax.Array], Any] | _meter.AdaptiveK | None


class AccumulateTransformation(optax.GradientTransformationExtraArgs):
    """What `accumulate` returns: `init`, `update`, and `update_params` beside them."""

    update_params: Callable[..., tuple[Any, AccumulateState]]

    def __new__(cls, init, update, update_params=None):
        """Still a pair of functions to whoever unpacks it."""
        self = super().__new__(cls, init, update)
        self.update_params = update_params
        return self


def accumulate(
    inner: optax.GradientTransformation,
    every_k: EveryK = None,
    *,
    reduction: _window.Reduction = "mean",
    accumulator_dtype: Any = None,
    skip: Callable[[Any, jax.Array, Any], tuple[Any, Any]] | None = None,
    on_skip: OnSkip = "shrink",
    axis_name: Any = None,
    noise_scale: float | None = None,
) -> AccumulateTransformation:
    """Runs `inner` once per window of micro-batches, on the global batch's gradient.

    A window carries a sum of gradients S and a sum of weights W. Every micro-step
    adds to both; the boundary hands `inner` their quotient, which is the gradient of
    the global batch:

        ḡ = Σ wᵢ·gᵢ / Σ wᵢ

    Off the boundary the updates are zeros and `inner` does not run: a micro-step
    costs ``acc += g``. Learning-rate schedules, weight decay, clipping and bias
    correction inside `inner` therefore advance once per update.

    Args:
      inner: Any Optax gradient transformation.
      every_k: How many micro-steps make a window: an int >= 1, a schedule
        ``gradient_step -> k``, `oa.adaptive_k`, or ``None`` where the caller passes
        `boundary`. With the int 1 no accumulator is kept and the cost is that of
        `inner`.
      reduction: ``"mean"`` for gradients of means, weighted (S = Σ wᵢ·gᵢ, result
        S / W); ``"ratio"`` for gradients of sums that are normalised once, e.g. by
        the number of valid tokens (S = Σ gᵢ, result S / W); ``"sum"`` for the plain
        sum (result S).
      accumulator_dtype: The dtype of S. By default at least float32 and never less
        than the parameter's own. `inner` computes in it, unless it only takes gradients
        of the parameters' dtype. Updates and inner state keep the dtypes that `inner`
        alone would give them.
      skip: ``skip(grads, gradient_step, params) -> (bool, info)`` rejects a
        micro-batch. `oa.skip_not_finite` is one; Optax's predicates fit as well. It
        sees only the leaves that are accumulated; `info` is kept in `skip_state`.
      on_skip: ``"shrink"``: a rejected micro-batch keeps its place in the window,
        with weight 0. ``"wait"``: it never happened, and the count waits for another.
        A `boundary` that the caller passes stands either way.
      axis_name: Inside `jax.pmap` or `jax.shard_map`, the axis or axes over which S and
        W are summed, once per window, in the boundary's branch. Gradients stay local
        until then. Whether a window ends must not differ between devices: they would
        wait for each other for ever.
      noise_scale: The decay, in [0, 1), of the averages with which the noise scale is
        measured, for one norm per micro-step; `oa.noise_scale` reads it. By default it
        is not measured.

    Returns:
      An `optax.GradientTransformationExtraArgs` with one function more:

      * ``init(params) -> AccumulateState``
      * ``update(grads, state, params=None, *, weight=1.0, boundary=None, value=None,
        **extra_args) -> (updates, state)``
      * ``update_params(grads, state, params, **same) -> (params, state)``, which
        updates and applies in one and, off the boundary, does not touch `params`.

      `weight`, a real scalar >= 0, is the number of units (examples, tokens) that this
      micro-batch's mean was taken over. Weight 0 contributes nothing, even if the
      gradient is NaN; a window whose weights are all 0 makes no update.

      `boundary` closes the window here (``True``), keeps it open (``False``) or lets
      the count decide (``None``). A Python bool is decided at trace time and builds no
      `lax.cond`; a boolean array is decided at run time. ``True`` may come early, at
      the end of an epoch: the result is divided by what the window really saw.

      `value`, the micro-batch's loss, reaches `inner` reduced over the window as the
      gradients are; give it on every micro-step of a window or on none. Any other
      extra argument reaches `inner` as the boundary micro-step gave it.

      Integer and float0 leaves, ``None`` and `optax.MaskedNode` pass through to
      `inner` without an accumulator.

    Raises:
      TypeError: `inner` is no gradient transformation; `every_k` is not an int, a
        schedule or ``None``; `noise_scale` is no number; `accumulator_dtype` is an
        integer dtype, or real for complex parameters.
      ValueError: `every_k` < 1; a `noise_scale` not in [0, 1); `oa.adaptive_k` from
        1 without `axis_name`; an unknown `reduction` or `on_skip`; ``"wait"`` with
        `axis_name`, because devices would disagree on when to meet. At `update`:
        gradients built otherwise than the parameters; a `weight` that is no scalar or
        a negative number; no `boundary` where `every_k` is ``None``; an `axis_name`
        that is not bound; gradients that were summed over it already; the windows of
        another number of devices.

    Examples:
      Two micro-batches, of three examples and of one, update as their four would:

      >>> import jax.numpy as jnp, optax, optax_accum as oa
      >>> tx = oa.accumulate(optax.sgd(1.0), every_k=2)
      >>> params = jnp.zeros(2)
      >>> state = tx.init(params)
      >>> updates, state = tx.update(jnp.array([1.0, 4.0]), state, params, weight=3)
      >>> print(updates)
      [0. 0.]
      >>> updates, state = tx.update(jnp.array([5.0, 0.0]), state, params, weight=1)
      >>> print(updates)
      [-2. -3.]

      The same in one call each, which leaves `params` alone off the boundary:

      >>> params, state = tx.update_params(jnp.array([1.0, 4.0]), state, params)

    Note:
      Across devices (`axis_name`), `acc_grads`, `weight`, `value`, `skipped` and
      `skip_state` are each device's own, the rest of the state is the same everywhere.
      Inside `jax.shard_map` a state may come with one row of them per device, as
      `oa.stack_windows` makes it, and goes out so.

      Where parameters or moments are narrower than the accumulator (bfloat16), the
      updates and the inner state are computed one after the other, which saves
      parameter-sized copies; what the two have in common is then computed twice, once
      per window.

      Under `jax.jit`, donate and return parameters and state in the same order,
      ``(params, opt_state, batch) -> (params, opt_state)``: JAX pairs donated buffers
      with outputs of the same type in order, and a swapped pair is copied.

      Under `jax.vmap` a `lax.cond` becomes a select: the result is right, but `inner`
      runs on every micro-step.

    References:
      Goyal et al., Accurate, Large Minibatch SGD, 2017, section 3
      (https://arxiv.org/abs/1706.02677): the gradient of a large batch in parts.
    """
    inner = optax.with_extra_args_support(_checks.transformation(inner))
    if not isinstance(every_k, _meter.AdaptiveK):
        every_k = _checks.every_k(every_k)
    axis_name = _checks.axis_name(axis_name)
    _checks.one_of("reduction", reduction, _window.REDUCTIONS)
    _checks.one_of("on_skip", on_skip, ("shrink", "wait"))
    if on_skip == "wait" and axis_name is not None:
        raise ValueError(
            '`on_skip="wait"` cannot be used with `axis_name`: devices that skip '
            "different micro-batches would disagree on when to meet, and wait for each "
            'other for ever. Use on_skip="shrink"'
        )
    accumulation = _Accumulation(
        inner=inner,
        every_k=every_k,
        reduction=reduction,
        accumulator_dtype=_checks.accumulator_dtype(accumulator_dtype),
        skip=_checks.predicate(skip),
        on_skip=on_skip,
        axis_name=axis_name,
        meter=_meter.Meter.of(noise_scale, every_k, axis_name),
    )
    return AccumulateTransformation(
        accumulation.init, accumulation.update, accumulation.update_params
    )


class _MicroStep(NamedTuple):
    """One micro-step up to the boundary: everything but the inner optimizer."""

    state: AccumulateState  # the micro-batch is counted in; the window still open
    sums: Any  # S: the accumulator's next content, or the gradients if every_k=1
    closes: bool | jax.Array  # whether this micro-step is the boundary
    emits: bool | jax.Array  # `closes`, and no empty window where that can be asked
    guard: bool  # whether the branch itself has to ask if the window is empty
    is_stacked: bool  # whether the state came as one row of a stacked one


@dataclasses.dataclass(frozen=True)
class _Accumulation:
    """The settings of `accumulate`, and the functions that they make."""

    inner: optax.GradientTransformationExtraArgs
    every_k: EveryK
    reduction: str
    accumulator_dtype: Any
    skip: Callable[[Any, jax.Array, Any], tuple[Any, Any]] | None
    on_skip: str
    axis_name: Any
    meter: _meter.Meter

    @property
    def has_accumulator(self) -> bool:
        return self.every_k != 1

    @property
    def is_plain(self) -> bool:
        """Whether the gradients go straight to the inner optimizer."""
        return self.every_k == 1 and self.axis_name is None

    @property
    def gradient_reduction(self) -> str:
        """`reduction`, but the weighted mean of one gradient is that gradient."""
        is_itself = self.is_plain and self.reduction == "mean"
        return "sum" if is_itself else self.reduction

    def init(self, params: Any) -> AccumulateState:
        _checks.accumulator_fits(params, self.accumulator_dtype)
        sums: Any = ()
        if self.has_accumulator:
            sums = _window.zeros(params, self.accumulator_dtype)
        scalar = _window.weight_dtype(params)
        inner_state = self.inner.init(params)
        # Each zero is an array of its own: one that is shared cannot be donated twice.
        return AccumulateState(
            micro_step=jnp.zeros([], jnp.int32),
            gradient_step=jnp.zeros([], jnp.int32),
            emitted=jnp.zeros([], bool),
            skipped=jnp.zeros([], jnp.int32),
            weight=jnp.zeros([], scalar),
            value=jnp.zeros([], scalar),
            skip_state=self._initial_skip_state(params),
            noise_scale=self.meter.init(scalar),
            acc_grads=sums,
            inner_state=_window.cast_like(inner_state, inner_state),
        )

    def update(
        self,
        grads: Any,
        state: AccumulateState,
        params: Any = None,
        *,
        weight: Any = 1.0,
        boundary: Any = None,
        value: Any = None,
        **extra_args: Any,
    ) -> tuple[Any, AccumulateState]:
        step = self._add(grads, state, params, weight, boundary, value)
        shapes, collect, run = self._inner_over_window(
            step, grads, params, value=value, extra_args=extra_args
        )
        in_turn = self._in_turn(step, shapes)
        # The updates may overwrite the sums only where nobody reads these any more, and
        # where both are local or neither is.
        is_static = isinstance(step.emits, bool)
        use_slots = not in_turn and not is_static and self.axis_name is None
        slots = _boundary.Slots.plan(shapes, step.sums if use_slots else ())

        updated, (sums, loose), after = self._run_at_boundary(
            step,
            lambda target: collect(target[0]),
            run,
            lambda updates, target: slots.pack(updates, target[0]),
            (step.sums, slots.loose()),
            in_turn=in_turn,
        )
        updates = slots.unpack(sums, loose, updated)
        return updates, self._finish(step, updated, sums, after)

    def update_params(
        self,
        grads: Any,
        state: AccumulateState,
        params: Any,
        *,
        weight: Any = 1.0,
        boundary: Any = None,
        value: Any = None,
        **extra_args: Any,
    ) -> tuple[Any, AccumulateState]:
        self._check_state(state, grads)
        _checks.gradients(grads, params, narrow=True)
        step = self._add(grads, state, params, weight, boundary, value)
        shapes, collect, run = self._inner_over_window(
            step, grads, params, value=value, extra_args=extra_args
        )
        updated, params, after = self._run_at_boundary(
            step,
            lambda _: collect(step.sums),
            run,
            lambda updates, params: _boundary.apply_updates(params, updates),
            _window.as_arrays(params),
            in_turn=self._in_turn(step, shapes),
        )
        return params, self._finish(step, updated, step.sums, after)

    def _add(self, grads, state, params, weight, boundary, value) -> _MicroStep:
        """Adds one micro-batch to the window."""
        boundary = _checks.boundary(boundary, self.every_k)
        _checks.bound_axis(self.axis_name)
        self._check_state(state, grads)
        self.meter.check(state, grads, self.axis_name)
        is_stacked = _stacked.is_stacked(state)
        if is_stacked:
            state = _stacked.take_row(state)
        weight, nonempty = _checks.weight(weight, state.weight.dtype)
        self._check_gradients(grads, state, params)
        grads = _window.as_arrays(_window.keep_inexact(grads))
        arrived = jnp.ones([], bool)
        if self.skip is not None:
            should_skip, skip_state = self._ask_skip(grads, state, params)
            state = state._replace(
                skip_state=skip_state, skipped=_count(state.skipped, should_skip)
            )
            weight, nonempty = jnp.where(should_skip, 0, weight), False
            if self.on_skip == "wait":
                arrived = ~should_skip

        if self.axis_name is not None:
            _distributed.check_local(self.axis_name, grads)
            _checks.same_on_devices(params, self.axis_name)

        # Without an accumulator every micro-step is the first of its window.
        first = (state.micro_step == 0) | (not self.has_accumulator)
        if self.is_plain:
            sums = grads
        elif self.has_accumulator:
            sums = self._add_gradients(state.acc_grads, grads, weight, first)
        else:
            sums = _window.contributions(grads, weight, self.reduction)
        value = 0.0 if value is None else _checks.scalar_value(value)
        state = state._replace(
            value=_window.add(state.value, value, weight, self.reduction, first=first),
            micro_step=_count(state.micro_step, arrived),
            weight=_window.add(state.weight, weight, weight, "sum", first=first),
            noise_scale=self.meter.add(
                state.noise_scale, grads, weight, self.reduction, first
            ),
        )

        closes = self._closes(state, arrived) if boundary is None else boundary
        # A window without weight makes no update. Who can tell that it has none?
        emits, guard = closes, not nonempty
        if guard and self.axis_name is None and not isinstance(boundary, bool):
            emits, guard = closes & (state.weight != 0), False
        return _MicroStep(state, sums, closes, emits, guard, is_stacked)

    def _add_gradients(self, sums, grads, weight, first):
        """S with this micro-batch's gradients in it."""
        if self.axis_name is None:
            return _window.add(sums, grads, weight, self.reduction, first=first)
        # Under `pmap` and in a stacked state the buffer has an axis of devices. XLA
        # adds in place only in the buffer's own shape, and copies S otherwise.
        rows = _stacked.as_row(sums), _stacked.as_row(grads)
        return _stacked.row_of(_window.add(*rows, weight, self.reduction, first=first))

    def _closes(self, state, arrived):
        """Whether the count closes the window."""
        if self.every_k == 1:
            return True
        scheduled = self.every_k
        if isinstance(scheduled, _meter.AdaptiveK):
            scheduled = state.noise_scale.k
        elif callable(scheduled):
            scheduled = scheduled(state.gradient_step)
        k = _checks.scheduled_k(scheduled)
        # >=, so that a schedule that shrinks k still closes.
        return arrived & (state.micro_step.astype(k.dtype) >= k)

    def _inner_over_window(self, step, grads, params, *, value, extra_args):
        """The shapes of the updates, and the inner optimizer over a whole window."""

        def call(grads, inner_state, params, value):
            given = extra_args if value is None else {**extra_args, "value": value}
            return self.inner.update(grads, inner_state, params, **given)

        def call_over_devices(grads, inner_state, params, value):
            sums, value = _distributed.sum_over(
                self.axis_name, (_window.keep_inexact(grads), value)
            )
            return call(_window.fill_inexact(grads, sums), inner_state, params, value)

        # What the inner optimizer alone gives for gradients of the incoming dtype.
        rest = step.state.inner_state, params, value
        shapes, _ = jax.eval_shape(call_over_devices, grads, *rest)
        summed = _window.fill_inexact(grads, step.sums)
        narrow = not self._takes(call_over_devices, grads, summed, *rest)

        dtype = step.state.weight.dtype
        micro_steps = step.state.micro_step.astype(dtype)
        square = None
        if self.axis_name is None:
            square = self.meter.square_at(step.emits, step.sums, dtype)

        def collect(sums):
            own = _boundary.Totals(
                sums=sums,
                value=None if value is None else step.state.value,
                weight=step.state.weight,
                noise=self.meter.sums(step.state.noise_scale),
                square=None,
            )
            totals = _distributed.sum_over(self.axis_name, own)
            if self.axis_name is None:
                return totals._replace(square=square)
            return totals._replace(square=self.meter.square(totals.sums, dtype))

        def run(totals, before):
            inner_state, measured = before
            sums, total, weight, noise, square = totals
            measured = self.meter.close(measured, noise, square, weight, micro_steps)
            result = _window.close(sums, weight, self.gradient_reduction)
            mean = _window.fill_inexact(grads, result)
            updates, new_state = call(
                _window.cast_like(mean, grads) if narrow else mean,
                inner_state,
                params,
                _window.close(total, weight, self.reduction),
            )
            _checks.same_structure(
                "inner_state",
                new_state,
                "inner.init(params)",
                inner_state,
                "An optimizer whose state changes its structure cannot be compiled "
                "into a boundary; put it beside `accumulate`, in an `optax.chain`",
            )
            new_state = _window.cast_like(new_state, inner_state)
            return _window.cast_like(updates, shapes), (new_state, measured)

        return shapes, collect, run

    @staticmethod
    def _takes(call, grads, summed, *rest) -> bool:
        """Whether the inner optimizer runs on gradients in the accumulator's dtype.

        Some, like `optax.novograd`, branch between a gradient and a moment, and only
        take gradients of the parameters' dtype.
        """
        own, sums = (jax.tree.map(_window.dtype_of, tree) for tree in (grads, summed))
        if own == sums:
            return True
        try:
            jax.eval_shape(call, summed, *rest)
        except TypeError:
            return False
        return True

    def _in_turn(self, step, updates) -> bool:
        """Whether the inner state is to be computed after the updates."""
        # A static boundary has no branches; across devices the gradients would be
        # exchanged twice.
        if isinstance(step.emits, bool) or self.axis_name is not None:
            return False
        return _boundary.rounds(step.sums, updates, step.state.inner_state)

    def _run_at_boundary(self, step, collect, run, write, target, *, in_turn):
        measured = self.meter.measured(step.state.noise_scale)
        before = step.state.inner_state, measured
        arguments = step.emits, collect, run, write, target, before
        if in_turn:
            return _boundary.run_in_turn(*arguments)
        return _boundary.run_at(*arguments, guard=step.guard)

    def _finish(self, step, updated, sums, after) -> AccumulateState:
        """The state after the boundary has been passed, or not reached."""
        state, (inner_state, measured) = step.state, after
        # A window that is closed for certain leaves nothing to remember.
        if self.has_accumulator and step.closes is not True:
            state = state._replace(acc_grads=sums)
        state = state._replace(
            micro_step=jnp.where(step.closes, 0, state.micro_step),
            gradient_step=_count(state.gradient_step, updated),
            emitted=updated,
            noise_scale=self.meter.put(state.noise_scale, measured),
            inner_state=inner_state,
        )
        return _stacked.put_row(state) if step.is_stacked else state

    def _check_state(self, state, grads):
        _checks.state(
            state,
            has_accumulator=self.has_accumulator,
            grads=grads,
            axis_name=self.axis_name,
        )

    def _check_gradients(self, grads, state, params):
        if self.has_accumulator:
            narrow = self.accumulator_dtype is not None
            _checks.gradients(grads, state.acc_grads, narrow=narrow)
        elif params is not None:
            _checks.gradients(grads, params, narrow=True)

    def _ask_skip(self, grads, state, params):
        """Whether to skip, and the info in the type that the state holds it in."""
        assert self.skip is not None
        should_skip, info = _checks.skip_result(
            self.skip(grads, state.gradient_step, params)
        )
        _checks.same_structure(
            "info",
            info,
            "skip_state",
            state.skip_state,
            "`skip` must return the same info always; a state that another `skip` made "
            "needs its `skip_state` replaced by that of `init`",
        )
        info = _window.cast_like(info, state.skip_state)
        return should_skip, jax.tree.map(_types.vary_like, info, state.skip_state)

    def _initial_skip_state(self, params):
        """Zeros of the type that `skip` returns as its info."""
        skip = self.skip
        if skip is None:
            return ()
        grads, step = _window.keep_inexact(params), jnp.zeros([], jnp.int32)
        _, info = jax.eval_shape(
            lambda *args: _checks.skip_result(skip(*args)), grads, step, params
        )
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), info)


def _count(counter: jax.Array, happened: jax.Array) -> jax.Array:
    return counter + happened.astype(counter.dtype)
