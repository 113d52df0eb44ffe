"""Gradient accumulation as an Optax transformation around any other.

A micro-step goes one way: its arguments are checked, the window adds the micro-batch,
the count or the caller decides whether it is the boundary, and there the window closes:
check, add, decide, close.
"""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from optax_accum import (
    _backward,
    _boundary,
    _eager,
    _extra_args,
    _obstacle,
    _optimizer,
    _skip,
    _tree,
    _updates,
    _validate,
    _window,
)
from optax_accum._backward import Pullback
from optax_accum._by_weight import ByWeight
from optax_accum._overwrite import Overwrite, Overwritten
from optax_accum._state import AccumulateState
from optax_accum._types import (
    DEFAULT_WEIGHT,
    AnyMesh,
    AxisName,
    DefaultWeight,
    DType,
    Grads,
    Kwargs,
    Params,
    Reduction,
    Scalar,
    Schedule,
    Skip,
    Tree,
    Updates,
)
from optax_accum._window import Window
from optax_accum.noise import _tracker
from optax_accum.noise._adaptive_k import AdaptiveK
from optax_accum.sharding._inside import Inside
from optax_accum.sharding._rows import Rows

OnSkip = Literal["shrink", "wait"]
EveryK = int | Schedule | ByWeight | AdaptiveK | None
Boundary = bool | jax.Array | None


class AccumulateTransformation(optax.GradientTransformationExtraArgs):
    """The Optax transformation that `oa.accumulate` returns, with `update_params`.

    Use it wherever Optax takes a gradient transformation: in `optax.chain`, in a Flax
    ``TrainState``, or unpacked, ``init, update = tx``.
    """

    __slots__ = ()

    def init(self, params: Params) -> AccumulateState:
        """Makes the state before the first micro-step.

        Args:
          params: The parameters.

        Returns:
          An `oa.AccumulateState`. With `mesh`, its local fields have a leading axis of
          devices, ``[D, ...]``.

        Raises:
          TypeError: `accumulator_dtype` is real and a parameter complex, or the
            reverse.
        """
        return self[0](params)

    def update(
        self,
        grads: Grads,
        state: AccumulateState,
        params: Params = None,
        *,
        weight: ArrayLike = DEFAULT_WEIGHT,
        boundary: Boundary = None,
        value: ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[Updates, AccumulateState]:
        """Adds a gradient to the window, and at the boundary returns the updates.

        This is one micro-step. Use it as any Optax ``update``, followed by
        `optax.apply_updates`; `update_params` does both at once.

        Args:
          grads: The micro-batch's gradient, built like the parameters. Integer and
            float0 leaves, ``None`` and `optax.MaskedNode` pass through to the inner
            optimizer. Or its pullback, `jax.vjp` of the loss with respect to the
            parameters (see "Pullbacks" in `accumulate`). With `mesh`, `grads`, `weight`
            and `value` have a leading axis of devices (see "Devices" there).
          state: The last state.
          params: The parameters, if the inner optimizer needs them.
          weight: A real scalar >= 0, by default 1: how many units (examples, tokens)
            this micro-batch's mean was taken over. In a ``"mean"``, weight 0
            contributes nothing, even if the gradient is NaN. In a ``"ratio"`` or
            ``"sum"`` it only adds to the denominator, and the gradient always counts.
            A window whose weights are all 0 makes no update.
          boundary: Whether the window ends here; ``None`` lets the count decide. A
            Python bool is decided at trace time, a boolean array at run time. ``True``
            may come early, at the end of an epoch: the sum is divided by the weights
            that the window has seen.
          value: The micro-batch's loss, for inner optimizers that take it. They get the
            window's, reduced as the gradients are. Pass it on every micro-step of a
            window or on none: a missing one counts as 0.
          **extra_args: Further arguments of the inner optimizer, which gets those of
            the boundary's micro-step. `grad`, for line searches, must be the same
            object as `grads`, and becomes the window's.

        Returns:
          ``(updates, state)``. Off the boundary the updates are zeros.

        Raises:
          TypeError: `state` is not an `oa.AccumulateState`; `weight`, `boundary` or the
            result of `skip` has the wrong type; gradients are complex and parameters
            real; `grads` is a function that is not a pullback; the inner optimizer does
            not take a keyword.
          ValueError: Gradients do not have the parameters' structure and shapes; the
            state belongs to other parameters, a different optimizer or number of
            devices; `weight` is not a scalar, or negative; `weight` is missing with
            `oa.by_weight`, or `boundary` with ``every_k=None``; `grad` is not `grads`;
            `axis_name` is not bound, or gradients are already summed over it; with
            `mesh`, the axis of devices is missing; a pullback is not of one real scalar
            with respect to the parameters alone, comes from a transformation such as
            `optax.chain`, or is combined with `skip`, `noise_decay`,
            `oa.noise.adaptive_k` or `mesh`.

        Examples:
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
        """
        accumulation = _accumulation_of(self)
        if accumulation is not None:
            accumulation.check_names(extra_args)
        return self[1](
            grads,
            state,
            params,
            weight=weight,
            boundary=boundary,
            value=value,
            **extra_args,
        )

    def update_params(
        self,
        grads: Grads,
        state: AccumulateState,
        params: Params,
        *,
        weight: ArrayLike = DEFAULT_WEIGHT,
        boundary: Boundary = None,
        value: ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[Params, AccumulateState]:
        """Adds a gradient to the window, and at the boundary updates the parameters.

        `update` and `optax.apply_updates` in one. Prefer it: off the boundary it
        neither reads nor writes the parameters.

        Args:
          grads: As in `update`.
          state: As in `update`.
          params: The parameters.
          weight: As in `update`.
          boundary: As in `update`.
          value: As in `update`.
          **extra_args: As in `update`.

        Returns:
          ``(params, state)``; off the boundary `params` are unchanged.

        Raises:
          TypeError: As `update`.
          ValueError: As `update`.

        Examples:
          >>> import jax, jax.numpy as jnp, optax, optax_accum as oa
          >>> tx = oa.accumulate(optax.sgd(1.0), every_k=2)
          >>> params = jnp.zeros(2)
          >>> state = tx.init(params)
          >>> for grads in (jnp.array([1.0, 4.0]), jnp.array([3.0, 0.0])):
          ...     params, state = tx.update_params(grads, state, params)
          ...     print(params)
          [0. 0.]
          [-2. -2.]

          With pullbacks, of micro-batches of three examples and of one:

          >>> def loss(params, x):
          ...     return jnp.mean(x @ params)
          >>> @jax.jit
          ... def step(params, state, x):
          ...     value, pullback = jax.vjp(lambda params: loss(params, x), params)
          ...     return tx.update_params(
          ...         pullback, state, params, weight=len(x), value=value
          ...     )
          >>> params = jnp.zeros(2)
          >>> state = tx.init(params)
          >>> params, state = step(params, state, jnp.full((3, 2), 2.0))
          >>> params, state = step(params, state, jnp.full((1, 2), 6.0))
          >>> print(params)
          [-3. -3.]
        """
        arguments: Kwargs = {"weight": weight, "boundary": boundary, "value": value}
        accumulation = _accumulation_of(self)
        if accumulation is None:  # `_replace` has put another `update` in its place.
            updates, state = self[1](grads, state, params, **arguments, **extra_args)
            return _updates.apply_updates(params, updates), state
        accumulation.check_names(extra_args)
        return accumulation.update_params(
            grads, state, params, **arguments, **extra_args
        )

    def __repr__(self) -> str:
        """In one line, without the inner optimizer's functions."""
        accumulation = _accumulation_of(self)
        if accumulation is None:
            return super().__repr__()
        options = ("every_k", "reduction", "on_skip")
        shown = [f"{name}={getattr(accumulation, name)!r}" for name in options]
        return f"accumulate(..., {', '.join(shown)})"


def accumulate(
    inner: optax.GradientTransformation,
    every_k: EveryK = None,
    *,
    reduction: Reduction = "mean",
    accumulator_dtype: DType = None,
    skip: Skip | None = None,
    on_skip: OnSkip = "shrink",
    overwrite: Overwrite | None = None,
    noise_decay: float | None = None,
    # devices that share the window
    axis_name: AxisName | None = None,
    mesh: AnyMesh | None = None,
    scatter: bool = False,
) -> AccumulateTransformation:
    """Accumulates the gradients of micro-batches, and runs `inner` once per window.

    Use it if micro-batches come one by one, in several calls of your step. (For a batch
    that comes in one call, see `oa.value_and_grad`.) A window is the micro-steps
    between two updates. The boundary, which closes it, gives `inner` the gradient of
    the global batch, the sum of gradients S over the sum of weights W:

        ḡ = S / W = Σ wᵢ·gᵢ / Σ wᵢ

    Off the boundary updates are zeros and `inner` does not run: a micro-step costs
    ``acc += g``. Schedules, weight decay, clipping and bias correction inside `inner`
    therefore advance once per update.

    Args:
      inner: Any Optax gradient transformation.
      every_k: How many micro-steps make a window: an int >= 1, a schedule
        ``gradient_step -> k``, `oa.by_weight` for a number of tokens,
        `oa.noise.adaptive_k`, or ``None`` if you pass `boundary`. The int 1 needs no
        accumulator, and costs as much as `inner`.
      reduction: ``"mean"`` for gradients of means (S = Σ wᵢ·gᵢ, result S / W);
        ``"ratio"`` for gradients of sums that are divided once, e.g. by the number of
        valid tokens (S = Σ gᵢ, result S / W); ``"sum"`` for the plain sum (result S).
      accumulator_dtype: The dtype of S, by default that of the parameter and at least
        float32. `inner` computes in it, in at least float32, unless it only takes
        gradients of the parameters' dtype. Updates and inner state keep the dtypes that
        `inner` alone would give them.
      skip: ``skip(grads, gradient_step, params) -> (bool, info)`` rejects a micro-batch
        if the bool is true: `oa.skip_not_finite`, or one of Optax's predicates. It only
        sees leaves that are accumulated. `info` is kept in `skip_state`.
      on_skip: ``"shrink"``: a rejected micro-batch counts as one of the k, and adds
        nothing. ``"wait"``: it does not count, and the window waits for one more. A
        `boundary` that you pass is obeyed either way.
      overwrite: ``overwrite("layer/scale") -> "max" | "last" | "sum" | None``, called
        with the path of each leaf, selects parameters whose "gradient" is their next
        value, as layers with state of their own return it. The boundary writes the
        largest, the last or the sum of the window's values; `inner` does not see them.
        Flax's fp8 layers are recognised without it.
      noise_decay: The decay, in [0, 1), of the averages that measure the noise scale,
        at the cost of one norm per micro-step; see `oa.noise.estimate`. By default it
        is not measured.
      axis_name: The axis of devices, or several, over which S and W are summed, once
        per window. Gradients must be each device's own. Without `mesh`, call `update`
        inside `jax.pmap` or `jax.shard_map`. All devices must close a window together,
        or they deadlock.
      mesh: The mesh with that axis, for calls from plain `jax.jit`; see "Devices".
      scatter: Whether each device keeps only its part of the sum, for parameters and
        inner state that are sharded over `axis_name`. Needs `mesh`.

    Returns:
      An `oa.AccumulateTransformation`: ``init(params)``, ``update(grads, state, params,
      weight=, boundary=, value=)`` and ``update_params``, which also applies the
      updates. Both also take a pullback as `grads`.

    Raises:
      TypeError: `inner` is not a gradient transformation; `every_k` is not one of the
        above; `skip` is not a function; `noise_decay` is not a number;
        `accumulator_dtype` is an integer.
      ValueError: `every_k` < 1; `noise_decay` is not in [0, 1); `oa.noise.adaptive_k`
        starts from 1 without `axis_name`; `reduction` or `on_skip` is unknown;
        ``"wait"`` with `axis_name`; `mesh` lacks the axis; `scatter` without `mesh`.

    Examples:
      Two micro-batches, of three examples and of one, update as their four would:

      >>> import jax.numpy as jnp, optax, optax_accum as oa
      >>> tx = oa.accumulate(optax.sgd(1.0), every_k=2)
      >>> params = jnp.zeros(2)
      >>> state = tx.init(params)
      >>> params, state = tx.update_params(
      ...     jnp.array([1.0, 4.0]), state, params, weight=3
      ... )
      >>> params, state = tx.update_params(
      ...     jnp.array([5.0, 0.0]), state, params, weight=1
      ... )
      >>> print(params)
      [-2. -3.]

      The same on a mesh, here of one device, which exchanges once per update:

      >>> import jax
      >>> mesh = jax.make_mesh((1,), ("data",))
      >>> over = {"mesh": mesh, "axis_name": "data"}
      >>> def loss(params, x):
      ...     return jnp.mean(x @ params)
      >>> value_and_grad = oa.value_and_grad(
      ...     loss, num_microbatches=1, local=True, **over
      ... )
      >>> tx = oa.accumulate(optax.sgd(1.0), every_k=2, **over)
      >>> @jax.jit
      ... def step(params, state, x):
      ...     value, grads = value_and_grad(params, x)
      ...     return tx.update_params(
      ...         grads, state, params, weight=len(x), value=value
      ...     )
      >>> params = jnp.zeros(2)
      >>> state = tx.init(params)
      >>> state.window.grads.shape, state.window.weight.shape
      ((1, 2), (1,))
      >>> params, state = step(params, state, jnp.array([[1.0, 4.0]] * 3))
      >>> params, state = step(params, state, jnp.array([[5.0, 0.0]]))
      >>> print(params)
      [-2. -3.]

    Note: Pullbacks
      A micro-batch's gradient is as large as the parameters, and so is the window. To
      never hold the gradient, pass its pullback instead: ``value, pullback =
      jax.vjp(lambda params: loss(params, batch), params)``. Its backward pass adds to
      the window layer by layer. That saves most with layers in a `jax.lax.scan`. The
      result is the same.

      It needs JAX 0.11 and a compiled step. Otherwise the gradient is computed first
      and then added. The same happens with ``every_k=1``; for leaves whose window has a
      different dtype than the parameter (bfloat16 parameters), or is narrower than
      float32; with integers or overwritten leaves among the parameters; and in a mean
      whose weight may be 0 on one device, if the loss exchanges data between devices.

      Pass gradients if the loss looks rows up with a `fill_value` at negative indices
      out of bounds: JAX 0.12 adds to a wrong row in place, and a pullback does not show
      it.

      Options that read every micro-batch's gradient (`skip`, `noise_decay`,
      `oa.noise.adaptive_k`) refuse pullbacks. So does an `accumulate` inside an
      `optax.chain`, which would modify them.

    Note: Devices
      Inside `jax.shard_map` a state may have one window per device, from
      `oa.sharding.stack_windows`, and is returned like that.

      With `mesh`, `init` gives each of the D devices a window: arrays have a leading
      axis of devices, sharded over `axis_name`. Micro-steps take such arrays, as
      `oa.value_and_grad` with ``local=True`` returns them: `grads` ``[D, ...]``,
      `value` ``[D]``, and `weight` ``[D]``, or a Python number that the devices share
      equally. Off the boundary nothing is exchanged. At the boundary `inner` gets the
      sum, without that axis; parameters and inner state may be sharded in any way.
      Pullbacks are refused.

      Other transformations around `accumulate`, in an `optax.chain` or
      `optax.partition`, get the axis of devices as well: `optax.clip_by_global_norm`
      would take the norm over all devices' gradients. Put them inside:
      ``accumulate(optax.chain(...))``.

      With `scatter` the sum is scattered as `oa.sharding.scatter_specs` says.

    Note: Buffers
      Under `jax.jit`, donate and return parameters and state in the same order,
      ``(params, opt_state, batch) -> (params, opt_state)``: JAX pairs donated buffers
      with outputs of the same type in order, and a swapped pair is copied.

      If parameters or moments are narrower than the dtype that `inner` computes in
      (bfloat16), updates and inner state are computed one after the other. That saves
      parameter-sized copies, and computes their common part twice per window.

      Under `jax.vmap` a `lax.cond` becomes a select: the result is right, but `inner`
      runs on every micro-step.

    References:
      Goyal et al., Accurate, Large Minibatch SGD, 2017, section 3
      (https://arxiv.org/abs/1706.02677): the gradient of a large batch in parts.
    """
    _validate.transformation(inner)
    if not isinstance(every_k, ByWeight | AdaptiveK):
        every_k = _validate.every_k(every_k)
    _validate.one_of("reduction", reduction, _window.REDUCTIONS)
    _validate.one_of("on_skip", on_skip, ("shrink", "wait"))
    _validate.function("skip", skip, _validate.A_SKIP)
    devices: Inside | Rows
    if mesh is None:
        devices = Inside.of(axis_name)
        if scatter:
            raise ValueError(
                "`scatter=True` needs `mesh`: inside jax.pmap and jax.shard_map the "
                "optimizer runs on every device, on whole parameters. Leave `scatter` "
                "out, or call `update` from plain jax.jit with `mesh` and `axis_name`"
            )
    else:
        devices = Rows.of(axis_name, mesh, scatter)
    one_device = devices.axis_name is None
    if on_skip == "wait" and not one_device:
        raise ValueError(
            '`on_skip="wait"` cannot be used with `axis_name`: devices that skip '
            "different micro-batches would close their windows at different times, and "
            'deadlock. Use on_skip="shrink"'
        )
    tracker = _tracker.make_tracker(noise_decay, every_k, one_device=one_device)
    overwritten = Overwritten(overwrite)
    accumulation = _Accumulation(
        inner=overwritten.around(optax.with_extra_args_support(inner)),
        every_k=every_k,
        reduction=reduction,
        accumulator_dtype=_validate.accumulator_dtype(accumulator_dtype),
        skip=skip,
        on_skip=on_skip,
        overwritten=overwritten,
        devices=devices,
        tracker=tracker,
        names_taken=_extra_args.names_taken(inner),
    )
    return AccumulateTransformation(accumulation.init, accumulation.update)


class _Arguments(NamedTuple):
    """The arguments of a micro-step, as they came, without its `boundary`."""

    grads: Grads
    state: AccumulateState
    params: Params
    weight: ArrayLike
    value: ArrayLike | None
    extra_args: Kwargs


class _MicroStep(NamedTuple):
    """The arguments of a micro-step, checked.

    What is a device's own has the shape of one device's. With `Rows` it has a leading
    axis of devices, which `Rows.each` takes away.
    """

    state: AccumulateState  # before it
    is_stacked: bool  # whether it came, and must leave, as one window of a stack
    grads: Grads | Pullback  # with None for leaves that are not accumulated
    weight: Scalar
    known_weight: float | None  # if it is known when tracing
    boundary: Boundary
    value: Scalar
    arguments: _optimizer.Arguments

    @property
    def is_positive(self) -> bool:
        """Whether the weight is known to be."""
        return bool(self.known_weight)


@dataclasses.dataclass(frozen=True)
class _Accumulation:
    """The options of `accumulate`, and the functions that they make."""

    inner: optax.GradientTransformationExtraArgs
    every_k: EveryK
    reduction: Reduction
    accumulator_dtype: DType
    skip: Skip | None
    on_skip: OnSkip
    overwritten: Overwritten
    devices: Inside | Rows
    tracker: _tracker.Tracker | _tracker.NoTracker
    names_taken: frozenset[str]  # by `inner`, of the extra arguments

    @property
    def has_accumulator(self) -> bool:
        return self.every_k != 1

    @property
    def has_devices(self) -> bool:
        return self.devices.axis_name is not None

    def check_names(self, extra_args: Kwargs, *, is_chained: bool = False) -> None:
        if extra_args:
            _extra_args.check_names(extra_args, self.names_taken, is_chained=is_chained)

    def init(self, params: Params) -> AccumulateState:
        trained = _tree.trained(params)
        _validate.accumulator_fits("params", trained, self.accumulator_dtype)
        dtype = _tree.scalar_dtype(trained)
        scalar = self.devices.like(jax.ShapeDtypeStruct((), dtype))
        skip_state = _skip.initial_info(self.skip, trained, params)
        inner_state = self.inner.init(params)
        # Each array is one of its own: what is shared cannot be donated with the
        # parameters, nor twice.
        state = AccumulateState(
            micro_step=jnp.zeros([], jnp.int32),
            gradient_step=jnp.zeros([], jnp.int32),
            has_updated=jnp.zeros([], bool),
            window=Window.empty(
                self.devices.like(trained if self.has_accumulator else ()),
                loss=scalar,
                weight=scalar,
                accumulator_dtype=self.accumulator_dtype,
                measure_noise=self.tracker.measures,
                overwritten=self.overwritten,
            ),
            skip_state=jax.tree.map(_tree.zeros_like, self.devices.like(skip_state)),
            noise=self.tracker.init(dtype),
            inner_state=_tree.unshared(_tree.strongly_typed(inner_state), params),
        )
        return self.devices.placed(state)

    def update(
        self,
        grads: Grads,
        state: AccumulateState,
        params: Params = None,
        *,
        weight: ArrayLike = DEFAULT_WEIGHT,
        boundary: Boundary = None,
        value: ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[Updates, AccumulateState]:
        self.check_names(extra_args, is_chained=True)
        if _backward.is_pullback(grads):
            _validate.not_inside_another()
        arguments = _Arguments(grads, state, params, weight, value, extra_args)
        return self._call(arguments, boundary, applies=False)

    def update_params(
        self,
        grads: Grads,
        state: AccumulateState,
        params: Params,
        *,
        weight: ArrayLike = DEFAULT_WEIGHT,
        boundary: Boundary = None,
        value: ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[Params, AccumulateState]:
        arguments = _Arguments(grads, state, params, weight, value, extra_args)
        return self._call(arguments, boundary, applies=True)

    def _call(
        self, arguments: _Arguments, boundary: Boundary, *, applies: bool
    ) -> tuple[Updates | Params, AccumulateState]:
        """One micro-step, compiled here if the caller does not compile it."""
        if isinstance(arguments.weight, DefaultWeight):
            arguments = arguments._replace(weight=self._default_weight())
        if "grad" in arguments.extra_args:
            _extra_args.check_grad(arguments.extra_args["grad"], arguments.grads)
            # Its place is taken by the window's.
            extra_args = {**arguments.extra_args, "grad": None}
            arguments = arguments._replace(extra_args=extra_args)
        if not _eager.is_eager((arguments, boundary)):
            return self._micro_step(arguments, boundary, applies=applies)
        pullback = self._pullback_in(arguments.grads)
        if pullback is not None:  # To be compiled, it would have to be the same again.
            arguments = arguments._replace(grads=pullback.gradients())
        boundary = _validate.boundary(boundary, self.every_k)
        # Here the weight's value is known, as it is not once it has been traced.
        weight, _ = self.devices.weight(arguments.weight, jnp.result_type(float))
        if isinstance(self.devices, Rows):
            # Traced, a number that devices share would be an array.
            arguments = arguments._replace(weight=weight)
        if _eager.are_arrays(arguments):
            try:
                if isinstance(boundary, jax.Array):
                    return self._compiled(arguments, boundary, applies=applies)
                return self._compiled_for(arguments, boundary, applies=applies)
            except jax.errors.ConcretizationTypeError:
                pass  # A schedule needs values, which only an uncompiled call has.
        self._compiled_each_time.note()
        return self._micro_step(arguments, boundary, applies=applies)

    def _default_weight(self) -> float:
        if isinstance(self.every_k, ByWeight):
            raise ValueError(
                "`weight` is needed on every call, because `every_k=oa.by_weight(...)` "
                "ends windows by it. Pass how many valid tokens (or examples, whatever "
                "`target` counts) this micro-batch has. Flax's own TrainState does not "
                "pass it on; optax_accum.flax.TrainState does"
            )
        return 1.0

    @functools.cached_property
    def _compiled_each_time(self) -> _eager.Calls:
        """Calls with a function as an argument, or a schedule that needs values."""
        return _eager.Calls("`update`", "jax.jit(tx.update)")

    @functools.cached_property
    def _compiled(self) -> Any:
        """`_micro_step`, with a `boundary` that is decided at run time."""
        return jax.jit(self._micro_step, static_argnames="applies")

    @functools.cached_property
    def _compiled_for(self) -> Any:
        """`_micro_step`, for each `boundary` that is known."""
        return jax.jit(self._micro_step, static_argnames=("boundary", "applies"))

    def _micro_step(
        self, arguments: _Arguments, boundary: Boundary, *, applies: bool
    ) -> tuple[Updates | Params, AccumulateState]:
        """Check, add, decide, close.

        `update` and `update_params` differ in `applies` alone: whether the updates are
        returned, or added to the parameters.
        """
        step = self._check(arguments, boundary, applies=applies)
        try:
            state = self._add(step)
        except _backward.NotInPlaceError:
            grads = _validate.pullback(arguments.grads).gradients()
            arguments = arguments._replace(grads=grads)
            return self._micro_step(arguments, boundary, applies=applies)
        closing = self._decide(step, state)
        optimizer = self._bind_optimizer(step, closing)
        closing = _boundary.with_branches(closing, optimizer)
        destination: _updates.ToParams | _updates.ToCaller
        if applies:
            params = _tree.as_arrays(arguments.params)
            destination = _updates.ToParams(params, self.overwritten)
        else:
            destination = _updates.ToCaller.plan(closing, optimizer, arguments.params)
        buffers = _boundary.close(closing, optimizer, destination)
        return destination.read(buffers), self._finish(step, state, closing, buffers)

    def _check(
        self,
        arguments: _Arguments,
        boundary: Boundary,
        *,
        applies: bool,
    ) -> _MicroStep:
        """Everything that a caller may get wrong."""
        grads, state, params, weight, value, extra_args = arguments
        pullback = self._pullback_in(grads)
        grads = grads if pullback is None else pullback.like
        boundary = _validate.boundary(boundary, self.every_k)
        self.devices.check_place("Leave `mesh` out, and keep `axis_name`")
        _validate.state(state)
        _validate.not_a_function(grads, _tree.trained(params), state.window.grads)
        accumulated = _tree.keep_inexact(grads)
        self.devices.check(state, accumulated, params)
        _validate.sums(state, grads, has_accumulator=self.has_accumulator)
        state, is_stacked = self.devices.unstacked(state)
        self.tracker.check(state, accumulated, self.devices.axes)
        shapes = self.devices.shapes(accumulated)
        if self.has_accumulator:
            sums = self.devices.shapes(state.window.grads)
            is_narrow = self.accumulator_dtype is not None
            _validate.accumulator(sums, shapes, params, narrow=is_narrow)
        if applies or (params is not None and not self.has_accumulator):
            _validate.gradients(shapes, _tree.trained(params), narrow=True)
        number, known_weight = self.devices.weight(weight, state.window.weight.dtype)
        if pullback is not None and not self._adds_in_place(
            pullback, is_masked=self.reduction == "mean" and not known_weight
        ):
            grads, pullback = pullback.gradients(), None
        given = _optimizer.Arguments(grads, params, value is not None, extra_args)
        if value is None:
            value = jnp.zeros_like(number)
        return _MicroStep(
            state=state,
            is_stacked=is_stacked,
            grads=pullback or _tree.as_arrays(_tree.keep_inexact(grads)),
            weight=number,
            known_weight=known_weight,
            boundary=boundary,
            value=self.devices.value(value).astype(state.window.loss.dtype),
            arguments=given,
        )

    def _pullback_in(self, grads: Grads) -> Pullback | None:
        """The pullback that a caller has given in place of gradients, or ``None``."""
        if not _backward.is_pullback(grads):
            return None
        if isinstance(self.devices, Rows):
            raise ValueError(
                "`grads` is a pullback, whose gradient is summed over the devices of "
                "`mesh` in every micro-batch. Pass each device's own gradient, from "
                "oa.value_and_grad(..., mesh=mesh, axis_name="
                f"{self.devices.axis_name!r}, local=True). Pullbacks do work inside "
                "jax.shard_map, without `mesh`"
            )
        readers = {
            "skip": self.skip is not None,
            "every_k=oa.noise.adaptive_k": isinstance(self.every_k, AdaptiveK),
            "noise_decay": self.tracker.measures,
        }
        for name in (name for name, is_given in readers.items() if is_given):
            raise ValueError(
                f"`{name}` needs every micro-batch's gradient, and `grads` is a "
                "pullback, which adds it to the window without holding it. Pass the "
                f"gradient, as jax.value_and_grad returns it, or leave `{name}` out"
            )
        return _validate.pullback(grads)

    def _adds_in_place(self, pullback: Pullback, *, is_masked: bool) -> bool:
        """Whether the backward pass can add to the window."""
        linear = pullback.function.jaxpr
        return self.has_accumulator and not (
            _obstacle.in_parameters(pullback.like, self.overwritten)
            or _obstacle.in_program(pullback, linear, is_masked=is_masked)
        )

    def _add(self, step: _MicroStep) -> AccumulateState:
        """The state with the micro-batch in its window, and counted."""
        state = step.state

        def add(
            window: Window,
            skip_state: Tree,
            grads: Grads | Pullback,
            weight: Scalar,
            value: Scalar,
        ) -> tuple[Window, Tree, Scalar]:
            own = state._replace(window=window, skip_state=skip_state)
            return self._added(
                step._replace(state=own, grads=grads, weight=weight, value=value)
            )

        window, skip_state, rejected = self.devices.each(add)(
            state.window, state.skip_state, step.grads, step.weight, step.value
        )
        happened = jnp.ones([], bool)
        if self.on_skip == "wait":
            happened = jnp.logical_not(rejected)
        return state._replace(
            micro_step=_count(state.micro_step, happened),
            window=window,
            skip_state=skip_state,
        )

    def _added(self, step: _MicroStep) -> tuple[Window, Tree, Scalar]:
        """One device's window and `skip_state`, and whether it was rejected."""
        state, window = step.state, step.state.window
        weight, rejected, skip_state = self._ask_skip(step)
        if not self.has_accumulator:
            window = window._replace(grads=_window.zeros(step.grads))
        counted: bool | Scalar = True
        if not step.is_positive or self.skip is not None:
            counted = _window.counts(weight, self.reduction, rejected)
        window = self.devices.add(
            window,
            step.grads,
            step.value,
            weight,
            reduction=self.reduction,
            counted=counted,
            rejected=rejected,
            # Without an accumulator every micro-step is the first of its window.
            first=(state.micro_step == 0) | (not self.has_accumulator),
            is_weighted=step.known_weight != 1,
            overwritten=self.overwritten,
        )
        if not self.tracker.measures:
            # The sums that an older state may have stay, and cost nothing.
            window = window._replace(noise=state.window.noise)
        return window, skip_state, jnp.asarray(rejected)

    def _decide(self, step: _MicroStep, state: AccumulateState) -> _boundary.Closing:
        """Whether the window ends here, and what is known of it then."""
        window, reduction = state.window, self.reduction
        if self.every_k == 1 and not self.has_devices:
            # A window of one gradient is not a sum, and its mean is that gradient.
            window = window._replace(grads=step.grads, loss=step.value)
            reduction = "sum" if reduction == "mean" else reduction
        ends = step.boundary
        if ends is None:
            ends = self._ends(step, state)
        runs = ends
        checks_total = not step.is_positive or self.skip is not None
        if checks_total and ends is not False and not self.has_devices:
            # One device knows W before the boundary, several only at it.
            runs, checks_total = ends & (window.weight != 0), False
        square = None
        if not isinstance(runs, bool) and not self.has_devices:
            gradients = self.overwritten.gradients(window.grads)
            square = self.tracker.square_before(runs, window._replace(grads=gradients))
        return _boundary.Closing(
            ends=ends,
            runs=runs,
            checks_total=checks_total,
            window=window,
            reduction=reduction,
            overwritten=self.overwritten,
            devices=self.devices,
            inner_state=state.inner_state,
            noise=state.noise,
            tracker=self.tracker,
            micro_steps=state.micro_step.astype(window.weight.dtype),
            square=square,
            widens=self.has_accumulator,
        )

    def _ends(self, step: _MicroStep, state: AccumulateState) -> bool | jax.Array:
        """Whether the window has all that `every_k` asks for."""
        if self.every_k == 1:
            return True
        every_k: Any = self.every_k
        counted = state.micro_step > step.state.micro_step
        if isinstance(every_k, ByWeight):
            own = state.window.weight
            weight = self.devices.reduce("sum", own, own)
            return counted & every_k.is_reached(weight, state.gradient_step)
        if isinstance(every_k, AdaptiveK):
            every_k = state.noise.k
        elif callable(every_k):
            every_k = every_k(state.gradient_step)
        k = _validate.scheduled(
            "every_k", "how many micro-steps the window has", every_k
        )
        # >=, so a schedule that shrinks k still closes.
        return counted & (state.micro_step.astype(k.dtype) >= k)

    def _bind_optimizer(
        self, step: _MicroStep, closing: _boundary.Closing
    ) -> _optimizer.BoundOptimizer:
        return _optimizer.bind(
            self.inner,
            step.arguments,
            closing.window._replace(grads=closing.as_given(closing.window.grads)),
            closing.inner_state,
            self.devices,
            has_branch=closing.has_branch,
        )

    def _finish(
        self,
        step: _MicroStep,
        state: AccumulateState,
        closing: _boundary.Closing,
        buffers: _boundary.Buffers,
    ) -> AccumulateState:
        """The state after the boundary has been passed, or not reached."""
        sums = buffers.sums
        is_written = closing.writes_sums or isinstance(step.grads, Pullback)
        if not (self.has_accumulator and is_written):
            # What is there instead is cleared by the next window's first micro-step.
            sums = step.state.window.grads
        state = state._replace(
            micro_step=jnp.where(closing.ends, 0, state.micro_step),
            gradient_step=_count(state.gradient_step, buffers.has_updated),
            has_updated=buffers.has_updated,
            window=state.window._replace(grads=sums),
            noise=buffers.noise,
            inner_state=buffers.inner_state,
        )
        return self.devices.stacked(state) if step.is_stacked else state

    def _ask_skip(self, step: _MicroStep) -> tuple[Scalar, bool | Scalar, Tree]:
        """As `_skip.ask`, with the info in the type that the state holds it in."""
        before = step.state.skip_state
        weight, rejected, info = _skip.ask(
            self.skip,
            step.weight,
            step.grads,
            step.state.gradient_step,
            step.arguments.params,
        )
        if self.skip is None:
            return weight, rejected, before
        _validate.same_structure(
            "info",
            info,
            "skip_state",
            before,
            "`skip` must always return the same info. If a different `skip` made this "
            "state, take a new `skip_state` from `init`",
        )
        info = _tree.cast_like(info, before)
        return weight, rejected, jax.tree.map(_tree.vary_like, info, before)


def reduction_of(tx: Any) -> Reduction:
    """That of the `accumulate` in `tx`; ``"mean"`` if its parts cannot be seen."""
    for node in _extra_args.reached([tx.update]):
        if isinstance(node, _Accumulation):
            return node.reduction
    return "mean"


def _accumulation_of(tx: AccumulateTransformation) -> _Accumulation | None:
    """What made `tx`, unless one of its functions was replaced."""
    owners = {getattr(function, "__self__", None) for function in tx}
    owner = owners.pop() if len(owners) == 1 else None
    return owner if isinstance(owner, _Accumulation) else None


def _count(counter: Scalar, happened: Scalar) -> Scalar:
    return counter + happened.astype(counter.dtype)
