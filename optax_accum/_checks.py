"""What a caller may get wrong, and what they are told.

Every message names the argument in backticks, says what came, what is needed and
what to do. Nothing here computes; whatever passes comes back normalised.
"""

import math
import operator
import sys
from collections.abc import Callable
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from optax_accum import _types, _window


def one_of(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raises unless `value` is among `choices`."""
    if value not in choices:
        allowed = ", ".join(f'"{choice}"' for choice in choices)
        raise ValueError(f"`{name}` must be one of {allowed}; got {value!r}")


def transformation(value: Any) -> Any:
    """A gradient transformation, or anything with its two functions."""
    if callable(getattr(value, "init", None)) and callable(
        getattr(value, "update", None)
    ):
        return value
    raise TypeError(
        "`inner` must be an Optax gradient transformation, with `init` and `update`; "
        f"got {value!r} of type {type(value).__name__}. Call the optimizer with its "
        "learning rate first: optax.adam(1e-3), not optax.adam"
    )


def every_k(value: Any) -> int | Callable[[jax.Array], Any] | None:
    """An int >= 1, a schedule, or ``None``."""
    if value is None or callable(value):
        return value
    return _at_least_one(
        "every_k",
        value,
        "an int >= 1, a schedule `gradient_step -> k`, oa.adaptive_k(...), or None",
        ". Use every_k=1 to update on every micro-step, or every_k=None and "
        "`boundary=` to close windows yourself",
    )


def scheduled_k(value: Any) -> jax.Array:
    """What a schedule returned, as a real scalar; Optax's schedules return floats."""
    k = jnp.asarray(value)
    if k.shape != () or not jnp.issubdtype(k.dtype, jnp.number) or jnp.iscomplexobj(k):
        raise TypeError(
            "`every_k` as a schedule must return one real number, how many micro-steps "
            f"the window has; got shape {k.shape} and dtype {k.dtype}"
        )
    return k


def accumulator_dtype(value: Any) -> Any:
    """A floating or complex dtype, or ``None``."""
    if value is None:
        return None
    try:
        dtype = jnp.dtype(value)
    except TypeError as error:
        raise TypeError(
            f"`accumulator_dtype` must be a dtype; got {value!r}"
        ) from error
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(
            "`accumulator_dtype` must be a floating or complex dtype, because sums "
            f"of gradients do not fit in {dtype}; got {dtype}. Leave it out for at "
            "least float32"
        )
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(
            f"`accumulator_dtype` is {dtype}, which JAX does not compute in unless "
            'jax.config.update("jax_enable_x64", True) comes first'
        )
    return dtype


def accumulator_fits(params: Any, dtype: Any) -> None:
    """Raises where `dtype` is real and a parameter complex, or the reverse."""
    if dtype is None:
        return
    for path, leaf in jax.tree_util.tree_leaves_with_path(_window.keep_inexact(params)):
        own = _window.dtype_of(leaf)
        is_complex = jnp.issubdtype(own, jnp.complexfloating)
        if is_complex != jnp.issubdtype(dtype, jnp.complexfloating):
            raise TypeError(
                f"`accumulator_dtype` {dtype} cannot hold the gradient of "
                f"{named('params', path)}, which is {own}: one is complex and the "
                "other is not. Leave `accumulator_dtype` out and each leaf gets its own"
            )


def predicate(value: Any) -> Any:
    """A function that rejects micro-batches, or ``None``."""
    if value is None or callable(value):
        return value
    raise TypeError(
        "`skip` must be a function (grads, gradient_step, params) -> (bool, info), or "
        f"None; got {value!r} of type {type(value).__name__}. oa.skip_not_finite is one"
    )


def axis_name(value: Any) -> Any:
    """A name, a tuple of names, or ``None``."""
    names = tuple(value) if isinstance(value, list) else value
    if names == () or any(isinstance(n, int | np.integer) for n in axis_names(names)):
        raise TypeError(
            "`axis_name` must be the name of an axis of devices, as jax.pmap or a mesh "
            f"has it, or a tuple of them; got {value!r}"
        )
    return names


def axis_names(value: Any) -> tuple[Any, ...]:
    """The names in `axis_name`, which is one or several of them, or ``None``."""
    if value is None:
        return ()
    return value if isinstance(value, tuple) else (value,)


def bound_axis(value: Any) -> None:
    """Raises unless the code runs inside the axis or axes called `value`."""
    for name in axis_names(value):
        if not is_bound(name):
            raise ValueError(
                f"`axis_name={name!r}` is not bound: no jax.pmap or jax.shard_map "
                f"around this call has that axis. Call it inside jax.pmap(..., "
                f"axis_name={name!r}), or inside a jax.shard_map over a mesh with such "
                "an axis; where one program runs all devices, leave `axis_name` out"
            )


def is_bound(name: Any) -> bool:
    """Whether the code runs inside an axis called `name`."""
    try:
        lax.axis_size(name)
    except NameError:
        return False
    return True


def mesh(value: Any, axis_name: Any) -> None:
    """Raises unless `value` is a mesh with the axis or axes called `axis_name`."""
    if not isinstance(value, jax.sharding.Mesh | jax.sharding.AbstractMesh):
        raise TypeError(
            "`mesh` must be a jax.sharding.Mesh, from jax.make_mesh; got "
            f"{value!r} of type {type(value).__name__}"
        )
    has = ", ".join(map(repr, value.axis_names))
    if axis_name is None:
        raise ValueError(
            "`mesh` needs `axis_name`, the axis over which the batch is sharded; got "
            f"None. This mesh has {has}"
        )
    for name in axis_names(axis_name):
        if name not in value.axis_names:
            raise ValueError(
                f"`axis_name={name!r}` is no axis of `mesh`, which has {has}"
            )


def state(
    value: Any, *, has_accumulator: bool, grads: Any, axis_name: Any = None
) -> None:
    """Raises unless `value` is a state that this transformation can go on with."""
    if hasattr(value, "mini_step") and hasattr(value, "inner_opt_state"):
        raise TypeError(
            "`state` must be an `AccumulateState`; got the state of "
            "`optax.MultiSteps`. Convert it first: oa.from_multi_steps(state)"
        )
    if not hasattr(value, "acc_grads") or not hasattr(value, "micro_step"):
        raise TypeError(
            f"`state` must be the `AccumulateState` that `init` returned; got "
            f"{type(value).__name__}. The order is update(grads, state, params), and "
            "update_params(grads, state, params)"
        )
    rows = jnp.shape(value.weight)
    if rows and axis_name is None:
        raise ValueError(
            f"`state` holds {rows[0]} windows, one per device, but `accumulate` was "
            "given no `axis_name`. Give it the axis over which devices are to meet, or "
            "make one window of them: oa.sum_windows(state)"
        )
    if rows not in ((), (1,)):
        raise ValueError(
            f"`state` holds {rows[0]} windows on this device, where each device needs "
            "one: it was made for another number of devices, or has not the "
            "`in_specs` of oa.window_specs(state, axis_name). For another number of "
            "devices: oa.stack_windows(oa.sum_windows(state), num_devices)"
        )
    lacks_sums = not jax.tree.leaves(value.acc_grads)
    if has_accumulator and lacks_sums and jax.tree.leaves(_window.keep_inexact(grads)):
        raise ValueError(
            "`state` holds no accumulator; it comes from `every_k=1` or from other "
            "parameters. Take a new one from `init`, and with "
            "new_state._replace(inner_state=state.inner_state, "
            "gradient_step=state.gradient_step) the optimizer goes on where it was"
        )
    if not has_accumulator and not lacks_sums:
        raise ValueError(
            "`state` holds an accumulator, for which `every_k=1` has no use: an open "
            "window in it would be lost. Close it with the `accumulate` that made it, "
            "by weight=0 and boundary=True, and go on with state._replace(acc_grads=())"
        )


def noise_scale(state: Any, structure: Any) -> None:
    """Raises unless `state` has what the noise scale is measured with."""
    if jax.tree.structure(state.noise_scale) != structure:
        raise ValueError(
            "`state` was made without this `noise_scale` or `adaptive_k`, and has "
            "nowhere to measure it. Give it a place, between two windows: "
            "state._replace(noise_scale=tx.init(params).noise_scale), before "
            "oa.stack_windows if it is stacked"
        )


def whole_gradients(state: Any, grads: Any, axis: Any) -> None:
    """Raises where types say that devices hold different parts of the gradients.

    Their norm is then no one's to tell.
    """
    everywhere = _types.varying(jnp.asarray(state.noise_scale.estimate.signal))
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        others = _types.varying(leaf) - everywhere - {*axis_names(axis)}
        if others:
            raise ValueError(
                f"{named('grads', path)} differs between the devices of "
                f"{', '.join(map(repr, sorted(others)))}, which is not in `axis_name`, "
                "and `noise_scale` needs the norm of whole gradients. Leave "
                "`noise_scale` out where parameters are in parts"
            )


def same_on_devices(params: Any, axis: Any) -> None:
    """Raises where types say that `params` differ between the devices of `axis`."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        for name in axis_names(axis):
            if isinstance(leaf, jax.Array) and name in _types.varying(leaf):
                raise ValueError(
                    f"{named('params', path)} may differ between the devices of "
                    f"`axis_name={name!r}`, and parameters must be the same on all of "
                    "them. Cast for jax.grad alone, and pass the parameters as they "
                    "came, with in_specs=P()"
                )


def weight(value: Any, dtype: Any) -> tuple[jax.Array, bool]:
    """The weight as an array ``dtype[]``, and whether it is positive for certain."""
    known = isinstance(value, bool | int | float | np.generic | np.ndarray)
    if not known and not isinstance(value, jax.Array):
        raise TypeError(
            "`weight` must be a real scalar, the number of units that this "
            f"micro-batch's mean was taken over; got {value!r} of type "
            f"{type(value).__name__}"
        )
    if jnp.shape(value) != ():
        raise ValueError(
            "`weight` must be a scalar, one number for the whole micro-batch; got "
            f"shape {jnp.shape(value)}. Sum it first, say the token mask: mask.sum()"
        )
    if jnp.issubdtype(_window.dtype_of(value), jnp.complexfloating):
        raise TypeError(
            f"`weight` must be real; got {value!r} of dtype {_window.dtype_of(value)}"
        )
    if known and not (value >= 0 and math.isfinite(value)):
        raise ValueError(
            f"`weight` must be finite and >= 0; got {value}. Use 0 for a micro-batch "
            "that is to contribute nothing"
        )
    return jnp.asarray(value).astype(dtype), bool(known and value > 0)


def scalar_value(value: Any) -> jax.Array:
    """The loss value as a real scalar array."""
    value = jnp.asarray(value)
    if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(
            "`value` must be a real floating scalar, the loss whose gradient this is; "
            f"got shape {value.shape} and dtype {value.dtype}"
        )
    return value


def boundary(value: Any, every_k: Any) -> bool | jax.Array | None:
    """A Python bool, an array ``bool[]``, or ``None`` where the count decides."""
    if value is None:
        if every_k is None:
            raise ValueError(
                "`boundary` is needed on every call, because `every_k=None` leaves the "
                "boundary to the caller; got None. Pass True or False, decided when "
                "tracing, or a boolean array, or give `accumulate` an `every_k`"
            )
        return None
    if _is_bool(value):
        value = bool(value)
    elif not isinstance(value, jax.Array | np.ndarray):
        raise TypeError(
            "`boundary` must be a bool, a boolean scalar array, or None; got "
            f"{value!r} of type {type(value).__name__}"
        )
    elif value.dtype != bool or value.shape != ():
        raise TypeError(
            "`boundary` must be a bool, a boolean scalar array, or None; got an array "
            f"of shape {value.shape} and dtype {value.dtype}"
        )
    if every_k == 1 and value is not True:
        raise ValueError(
            "`boundary` must be True or None with `every_k=1`, which keeps no "
            f"accumulator and updates on every call; got {value!r}. Use every_k=None "
            "to close windows yourself"
        )
    return value


def skip_result(result: Any) -> tuple[jax.Array, Any]:
    """What a `skip` predicate returned: its decision as ``bool[]``, and the info."""
    if not isinstance(result, tuple | list) or len(result) != 2:
        raise TypeError(
            "`skip` must return (bool scalar, info), as Optax's predicates do; got "
            f"{type(result).__name__}"
        )
    should_skip, info = result
    should_skip = jnp.asarray(should_skip)
    if should_skip.shape != () or should_skip.dtype != bool:
        raise TypeError(
            "`skip` must return (bool scalar, info); its first item has shape "
            f"{should_skip.shape} and dtype {should_skip.dtype}. Reduce it with "
            "jnp.any or jnp.all"
        )
    return should_skip, info


def count(name: str, value: Any) -> int:
    """An int >= 1."""
    return _at_least_one(name, value, "an int >= 1")


def size(name: str, value: Any) -> int | None:
    """An int >= 1, or ``None``."""
    return None if value is None else count(name, value)


def fraction(name: str, value: Any, meaning: str) -> float:
    """A number in [0, 1)."""
    is_number = isinstance(value, Real) and not _is_bool(value)
    if not is_number or not 0 <= value < 1:
        message = f"`{name}` is {meaning}, a number of at least 0 and less than 1; got "
        raise (ValueError if is_number else TypeError)(message + repr(value))
    return float(value)


def axis(value: Any) -> int:
    """An int, negative ones included."""
    number = as_int(value)
    if number is None:
        raise TypeError(
            "`batch_axis` must be an int, the same for all batch arguments; got "
            f"{value!r} of type {type(value).__name__}"
        )
    return number


def weight_function(value: Any) -> Any:
    """A function that weighs micro-batches, or ``None``."""
    if value is None or callable(value):
        return value
    raise TypeError(
        "`weight` must be a function of the arguments of `fun` that returns the "
        f"weight of a micro-batch, or None for its number of examples; got {value!r} "
        f"of type {type(value).__name__}"
    )


def no_module(name: str, value: Any) -> None:
    """Raises for an NNX module of which not all is to be differentiated.

    To JAX it is a tree, whose statistics and counts are leaves like its parameters.
    """
    nnx = sys.modules.get("flax.nnx")  # loaded wherever there is a module
    if nnx is None or not isinstance(value, nnx.Module):
        return
    if nnx.state(value, nnx.Not(nnx.Param)):
        raise TypeError(
            f"`{name}` is an NNX module, a {type(value).__name__}, with variables that "
            "are no parameters. optax_accum.flax.value_and_grad takes it as it is; "
            "elsewhere split it first, with nnx.split(model, nnx.Param, ...)"
        )


def same_structure(
    name: str, tree: Any, expected_name: str, expected: Any, advice: str
) -> None:
    """Raises at the first path where `tree` is built otherwise than `expected`."""
    got, needed = jax.tree.structure(tree), jax.tree.structure(expected)
    if got == needed:  # type: ignore[operator]
        return
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    wanted = [path for path, _ in jax.tree_util.tree_leaves_with_path(expected)]
    missing = [path for path in wanted if path not in paths]
    surplus = [path for path in paths if path not in wanted]
    if missing:
        difference = f"{named(expected_name, missing[0])} has no counterpart in it"
    elif surplus:
        difference = f"{named(name, surplus[0])} is not in `{expected_name}`"
    else:
        difference = "the paths agree, but their containers are of other types"
    raise ValueError(
        f"`{name}` must have the tree structure of `{expected_name}`: {difference}. "
        f"Got {got}, needed {needed}. {advice}"
    )


def gradients(grads: Any, expected: Any, *, narrow: bool) -> None:
    """Raises unless `grads` can be added to sums that are built like `expected`.

    Args:
      grads: The gradients, passed-through leaves included.
      expected: The parameters, or the sums so far, which are built like them.
      narrow: Whether the caller asked for sums narrower than the gradients.
    """
    grads, expected = _window.keep_inexact(grads), _window.keep_inexact(expected)
    same_structure(
        "grads",
        grads,
        "params",
        expected,
        "Every floating parameter that `init` saw needs a floating gradient, and no "
        "other leaf one",
    )
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(grads),
        jax.tree.leaves(expected),
        strict=True,
    )
    for (path, g), wanted in pairs:
        if jnp.shape(g) != jnp.shape(wanted):
            raise ValueError(
                f"{named('grads', path)} has shape {jnp.shape(g)}, but "
                f"{named('params', path)} has shape {jnp.shape(wanted)}; "
                "gradients must have the shapes of the parameters that `init` saw"
            )
        mine, sums = _window.dtype_of(g), _window.dtype_of(wanted)
        if jnp.issubdtype(mine, jnp.complexfloating) != jnp.issubdtype(
            sums, jnp.complexfloating
        ):
            raise TypeError(
                f"{named('grads', path)} is {mine}, but {named('params', path)} "
                f"is {sums}: one is complex and the other is not"
            )
        if not narrow and jnp.finfo(mine).bits > jnp.finfo(sums).bits:
            raise TypeError(
                f"{named('grads', path)} is {mine}, wider than its accumulator, which "
                f"is {sums} because of the parameters that `init` saw. Pass "
                f"`accumulator_dtype={mine}` to keep the precision, or cast them"
            )


def named(tree: str, path: Any) -> str:
    """The leaf at `path` of what is called `tree`, for a message."""
    return f"`{tree}{jax.tree_util.keystr(path)}`"


def _at_least_one(name: str, value: Any, needed: str, advice: str = "") -> int:
    number = as_int(value)
    if number is None:
        raise TypeError(
            f"`{name}` must be {needed}; got {value!r} of type {type(value).__name__}"
        )
    if number < 1:
        raise ValueError(f"`{name}` must be {needed}; got {number}{advice}")
    return number


def shown_type(x: Any) -> str:
    """The type of an array for a message, ``float32[8,4]``."""
    return f"{_window.dtype_of(x)}[{','.join(map(str, jnp.shape(x)))}]"


def as_int(value: Any) -> int | None:
    """A whole number as an int; a bool, which is an int to Python, is a mistake."""
    try:
        return None if _is_bool(value) else operator.index(value)
    except TypeError:
        return None


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool | np.bool_)
