"""What a caller may get wrong, and what they are told.

Every message names the argument in backticks, says what came, what is needed and
what to do. What passes comes back normalised. What Python or JAX explains well by
itself is not checked.
"""

import functools
import inspect
import math
import operator
from numbers import Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from optax_accum import _backward, _tree
from optax_accum._backward import Pullback
from optax_accum._types import DType, Grads, Params, Scalar, Tree


def one_of(name: str, value: Any, choices: tuple[str, ...], or_else: str = "") -> None:
    """Raises unless `value` is among `choices`."""
    if value not in choices:
        allowed = ", ".join(f'"{choice}"' for choice in choices)
        raise ValueError(f"`{name}` must be one of {allowed}{or_else}; got {value!r}")


def transformation(value: Any) -> None:
    """Raises unless `value` has the two functions of a gradient transformation."""
    if not all(callable(getattr(value, name, None)) for name in ("init", "update")):
        advice = "Pass the optimizer itself, optax.adam(1e-3), say"
        if callable(value):
            advice = (
                "Call the optimizer with its learning rate first: optax.adam(1e-3), "
                "not optax.adam"
            )
        elif as_int(value) is not None:
            advice = "The order is accumulate(inner, every_k)"
        raise TypeError(
            "`inner` must be an Optax gradient transformation, with `init` and "
            f"`update`; got {shown(value)}. {advice}"
        )


A_WEIGHT = "called as `fun` is, that returns this micro-batch's weight"
A_SKIP = "such as oa.skip_not_finite"


def function(name: str, value: Any, needed: str) -> None:
    """Raises unless `value` is a function, or ``None``."""
    if value is not None and not callable(value):
        raise TypeError(f"`{name}` must be a function, {needed}; got {shown(value)}")


def every_k(value: Any) -> Any:
    """An int >= 1, a schedule, or ``None``."""
    if value is None or callable(value):
        return value
    return whole_number(
        "every_k",
        value,
        "an int >= 1, a schedule `gradient_step -> k`, oa.by_weight(...), "
        "oa.noise.adaptive_k(...), or None",
        ". Use every_k=1 to update on every micro-step, or every_k=None and "
        "`boundary=` to close windows yourself",
    )


def scheduled(name: str, meaning: str, value: Any) -> Scalar:
    """What a schedule returned, as a real scalar; Optax's schedules return floats."""
    number = jnp.asarray(value)
    is_real = jnp.issubdtype(number.dtype, jnp.number) and not jnp.iscomplexobj(number)
    if number.shape != () or not is_real:
        raise TypeError(
            f"`{name}` as a schedule must return one real number, {meaning}; got shape "
            f"{number.shape} and dtype {number.dtype}"
        )
    return number


def accumulator_dtype(value: DType) -> DType:
    """A floating or complex dtype, or ``None``."""
    if value is None:
        return None
    dtype = jnp.dtype(value)
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(
            "`accumulator_dtype` must be a floating or complex dtype, because sums "
            f"of gradients do not fit in {dtype}; got {dtype}. Leave it out for at "
            "least float32"
        )
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(
            f"`accumulator_dtype` is {dtype}, which JAX only computes in after "
            'jax.config.update("jax_enable_x64", True)'
        )
    return dtype


def accumulator_fits(name: str, params: Params, dtype: DType) -> None:
    """Raises where `dtype` is real and a parameter complex, or the reverse."""
    if dtype is None:
        return
    for path, leaf in jax.tree_util.tree_leaves_with_path(_tree.keep_inexact(params)):
        if _tree.is_complex(leaf) != jnp.issubdtype(dtype, jnp.complexfloating):
            raise TypeError(
                f"`accumulator_dtype` {dtype} cannot hold the gradient of "
                f"{named(name, path)}, which is {_tree.dtype_of(leaf)}: one is "
                "complex and the other is not. Leave `accumulator_dtype` out and each "
                "leaf gets its own"
            )


def state(value: Any) -> None:
    """Raises unless `value` is a state of `accumulate`."""
    if hasattr(value, "mini_step") and hasattr(value, "inner_opt_state"):
        raise TypeError(
            "`state` must be an `AccumulateState`; got the state of "
            "`optax.MultiSteps`. Convert it first: oa.from_multi_steps(state)"
        )
    if not hasattr(value, "window"):
        raise TypeError(
            f"`state` must be the `AccumulateState` that `init` returned; got "
            f"{shown_kind(value)}. Make it with `init` of `accumulate`, not of the "
            "optimizer inside. The order is update(grads, state, params), and "
            "update_params(grads, state, params)"
        )


def sums(value: Any, grads: Grads, *, has_accumulator: bool) -> None:
    """Raises if the state `value` lacks sums that are needed, or has needless ones."""
    lacks_sums = not jax.tree.leaves(value.window.grads)
    if has_accumulator and lacks_sums and jax.tree.leaves(_tree.keep_inexact(grads)):
        raise ValueError(
            "`state` holds no accumulator: it was made with `every_k=1`, or for other "
            "parameters. Take a new one from `init`. To keep the optimizer's progress: "
            "new_state._replace(inner_state=state.inner_state, "
            "gradient_step=state.gradient_step)"
        )
    if not has_accumulator and not lacks_sums:
        raise ValueError(
            "`state` holds an accumulator, which `every_k=1` does not use: an open "
            "window in it would be lost. Close it with the `accumulate` that made it, "
            "with weight=0 and boundary=True, and continue with state._replace("
            "window=state.window._replace(grads=()))"
        )


def inner_state(optimizer: Any, value: Tree, params: Params) -> None:
    """Raises if `value` is the state of another optimizer."""
    needed = jax.eval_shape(optimizer.init, params)
    structures = map(jax.tree.structure, (value, needed))
    if len(set(structures)) > 1:
        raise ValueError(
            "`state.inner_state` belongs to a different optimizer than `inner`, which "
            f"`accumulate` was given: it is {_brief(value)}, but `inner` needs "
            f"{_brief(needed)}. Pass the state that this `accumulate`'s `init` made"
        )


def _brief(tree: Tree) -> str:
    """A state without its arrays."""
    shown = repr(jax.tree.map(lambda _: ..., tree)).replace("Ellipsis", "...")
    return shown if len(shown) < 200 else f"{shown[:200]}..."


def weight(value: Any, dtype: DType) -> tuple[Scalar, float | None]:
    """The weight as an array ``dtype[]``, and as a number if that is known."""
    is_known = isinstance(value, bool | int | float | np.generic | np.ndarray)
    is_number = is_known or isinstance(value, jax.Array)
    if not is_number or _tree.is_complex(value):
        raise TypeError(
            "`weight` must be a real scalar, the number of units that this "
            f"micro-batch's mean was taken over; got {shown(value)}"
        )
    if jnp.shape(value) != ():
        raise ValueError(
            "`weight` must be a scalar, one number for the whole micro-batch; got "
            f"shape {jnp.shape(value)}. Sum it first; for a token mask, mask.sum()"
        )
    if is_known and not (value >= 0 and math.isfinite(value)):
        raise ValueError(
            f"`weight` must be finite and >= 0; got {value}. Use 0 for the mean of a "
            "micro-batch that is all padding"
        )
    return jnp.asarray(value).astype(dtype), float(value) if is_known else None


def scalar_value(value: Any) -> Scalar:
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
    if value is None and every_k is None:
        raise ValueError(
            "`boundary` is needed on every call, because `every_k=None` leaves it to "
            "the caller; got None. Pass True or False (a static argument under "
            "jax.jit) or a boolean array, or count: accumulate(optimizer, every_k=4)"
        )
    if _is_bool(value):
        value = bool(value)
    elif value is not None:
        given, value = value, jnp.asarray(value)
        if value.dtype != bool or value.shape != ():
            raise TypeError(
                "`boundary` must be a bool, a boolean scalar array, or None; got "
                f"{shown(given)}, of shape {value.shape} and dtype {value.dtype}"
            )
    if every_k == 1 and value is not None and value is not True:
        raise ValueError(
            "`boundary` must be True or None with `every_k=1`, which keeps no "
            f"accumulator and updates on every call; got {shown(value)}. Use "
            "every_k=None to close windows yourself"
        )
    return value


def whole_number(
    name: str, value: Any, needed: str = "an int >= 1", advice: str = ""
) -> int:
    """An int >= 1."""
    number = as_int(value)
    if number is None:
        hint = ""
        if isinstance(value, jax.core.Tracer):
            hint = ", which is traced. Make it a static argument of jax.jit"
        raise TypeError(f"`{name}` must be {needed}; got {shown(value)}{hint}")
    if number < 1:
        raise ValueError(f"`{name}` must be {needed}; got {number}{advice}")
    return number


def real_microbatches(value: Any, most: int) -> int | Scalar:
    """An int from 0 to `most`, or a traced integer scalar."""
    needed = (
        f"`num_real_microbatches` must be an integer from 0 to {most}, how many of "
        "this batch's micro-batches are to run"
    )
    number = as_int(value)
    if number is not None:
        if not 0 <= number <= most:
            raise ValueError(f"{needed}; got {number}")
        return number
    is_integer = isinstance(value, jax.Array) and value.dtype != bool
    if not is_integer or not jnp.issubdtype(value.dtype, jnp.integer):
        raise TypeError(f"{needed}; got {value!r}")
    if value.shape != ():
        raise ValueError(f"{needed}; got an array of shape {value.shape}")
    return value


def fraction(name: str, value: Any, meaning: str) -> float:
    """A number in [0, 1)."""
    is_number = isinstance(value, Real) and not _is_bool(value)
    if not is_number or not 0 <= value < 1:
        message = f"`{name}` is {meaning}, a number of at least 0 and less than 1; got "
        raise (ValueError if is_number else TypeError)(message + repr(value))
    return float(value)


def positive(name: str, value: Any, meaning: str, or_else: str = "") -> float:
    """A positive, finite number."""
    message = f"`{name}` must be a positive number{or_else}, {meaning}; got "
    if not isinstance(value, Real) or _is_bool(value):
        raise TypeError(message + shown(value))
    if not 0 < float(value) < math.inf:
        raise ValueError(message + repr(value))
    return float(value)


def same_structure(
    name: str, tree: Tree, expected_name: str, expected: Tree, advice: str
) -> None:
    """Raises at the first path where the structures of `tree` and `expected` differ."""
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
        difference = "the paths agree, but the types of their containers differ"
    raise ValueError(
        f"`{name}` must have the tree structure of `{expected_name}`: {difference}. "
        f"Got {got}, needed {needed}. {advice}"
    )


def not_a_function(
    grads: Grads,
    *like: Tree,
    maker: str = "jax.vjp(lambda params: loss(params, batch), params)",
) -> None:
    """Raises if `grads` is a function, unless one of `like` is one of its type.

    A loss is one, and what `jax.linearize` returns. `maker` is what makes a pullback.
    """
    is_function = inspect.isroutine(grads) or isinstance(grads, functools.partial)
    if is_function and type(grads) not in map(type, like):
        raise TypeError(
            "`grads` must be the gradient, or its pullback, as jax.vjp returns it; got "
            f"a function of type {type(grads).__name__}. Make a pullback with value, "
            f"pullback = {maker}"
        )


def not_inside_another() -> None:
    """Raises if one of Optax's transformations has called `update` with a pullback.

    To `jax.tree.map` a pullback is a tree of all that the backward pass reads, and
    `optax.scale` scales that, without a word. Nothing in it shows this afterwards; only
    the frames of the call show who is between.
    """
    frame = inspect.currentframe()
    while frame is not None and _package_of(frame) == __name__.partition(".")[0]:
        frame = frame.f_back
    if frame is not None and _package_of(frame) == "optax":
        raise ValueError(
            "`grads` is a pullback, and `accumulate` is inside a transformation that "
            "cannot handle one. Put that inside `accumulate`, "
            "oa.accumulate(optax.chain(...)), or pass gradients"
        )


def _package_of(frame: Any) -> str:
    return frame.f_globals.get("__name__", "").partition(".")[0]


def pullback(value: Any) -> Pullback:
    """One of a scalar loss with respect to one argument."""
    wrt, outputs = _backward.arguments_of(value), _backward.outputs_of(value)
    if len(wrt) != 1:
        raise ValueError(
            "`grads` must be a pullback with respect to the parameters alone; got one "
            f"with respect to {len(wrt)} arguments. Close over the others: "
            "jax.vjp(lambda params: loss(params, batch), params)"
        )
    is_scalar = all(_is_real_scalar(output) for output in outputs)
    if value.out_tree != jax.tree.structure(0) or not is_scalar:
        shown = ", ".join(map(shown_type, outputs))
        raise ValueError(
            "`grads` must be the pullback of a real scalar, the loss; got one of "
            f"{shown}. Reduce the loss over the micro-batch, with jnp.mean, say; if it "
            "returns (loss, aux), pass has_aux=True to jax.vjp"
        )
    one = jnp.ones([], jnp.float32)
    if outputs:  # if the loss depends on the parameters
        one = _tree.vary_over(outputs[0].mat.varying, one.astype(outputs[0].dtype))
    unlike = Pullback(value, one, like=None)
    return unlike._replace(like=jax.eval_shape(unlike.gradients))


def _is_real_scalar(aval: Any) -> bool:
    return aval.shape == () and jnp.issubdtype(aval.dtype, jnp.floating)


def accumulator(sums: Tree, grads: Grads, params: Params, *, narrow: bool) -> None:
    """Raises unless `grads` can be added to `sums`: one of the two is at fault."""
    try:
        gradients(grads, sums, narrow=narrow)
    except ValueError:
        if params is None:
            raise
        gradients(grads, _tree.trained(params), narrow=True)
        sums, params = map(_tree.keep_inexact, (sums, params))
        pairs = zip(
            jax.tree_util.tree_leaves_with_path(sums),
            jax.tree_util.tree_leaves_with_path(params),
            strict=False,
        )
        differ = (
            f"{named('state.window.grads', path)} has shape {jnp.shape(s)} and "
            f"{named('params', other)} {jnp.shape(p)}"
            if path == other
            else f"the former has {named('state.window.grads', path)} in place of "
            f"{named('params', other)}"
            for (path, s), (other, p) in pairs
            if path != other or jnp.shape(s) != jnp.shape(p)
        )
        raise ValueError(
            "`state` was made for other parameters than these: "
            f"{next(differ, 'it has more leaves or fewer')}. Pass the state that "
            "belongs to them, or take a new one from init(params)"
        ) from None


def gradients(grads: Grads, expected: Tree, *, narrow: bool) -> None:
    """Raises unless `grads` can be added to sums that are built like `expected`.

    Args:
      grads: The gradients, passed-through leaves included.
      expected: The parameters, or the sums so far, which are built like them.
      narrow: Whether the caller asked for sums narrower than the gradients.
    """
    grads, expected = _tree.keep_inexact(grads), _tree.keep_inexact(expected)
    same_structure("grads", grads, "params", expected, _advice(grads, expected))
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(grads),
        jax.tree.leaves(expected),
        strict=True,
    )
    for (path, g), wanted in pairs:
        if jnp.shape(g) != jnp.shape(wanted):
            hint = ""
            if jnp.shape(g)[1:] == jnp.shape(wanted):
                hint = (
                    ". If they come from oa.value_and_grad(..., local=True), with one "
                    "row per device, give `accumulate` the same `mesh` and `axis_name`"
                )
            raise ValueError(
                f"{named('grads', path)} has shape {jnp.shape(g)}, but "
                f"{named('params', path)} has shape {jnp.shape(wanted)}; "
                "gradients must have the shapes of the parameters that `init` saw"
                f"{hint}"
            )
        mine, sums = _tree.dtype_of(g), _tree.dtype_of(wanted)
        if _tree.is_complex(g) != _tree.is_complex(wanted):
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


def _advice(grads: Grads, expected: Tree) -> str:
    """What to do if the structures of the gradients and the parameters differ."""
    if jax.tree.structure(grads) == jax.tree.structure((0, expected)):  # type: ignore[operator]
        return "If this is (value, grads), from value_and_grad, pass `grads` alone"
    if jax.tree.structure(grads) == jax.tree.structure({"params": expected}):  # type: ignore[operator]
        return 'If this is the gradient of all variables, pass `grads["params"]`'
    return (
        "Every floating parameter that `init` saw needs a floating gradient, and only "
        "those"
    )


def named(tree: str, path: Any) -> str:
    """The leaf at `path` of what is called `tree`, for a message."""
    return f"`{tree}{jax.tree_util.keystr(path)}`"


def shown_type(x: Any) -> str:
    """The type of an array for a message, ``float32[8,4]``."""
    return f"{_tree.dtype_of(x)}[{','.join(map(str, jnp.shape(x)))}]"


def shown_kind(x: Any) -> str:
    """The type of an array, traced or not, and the class of anything else."""
    is_array = isinstance(x, jax.Array | np.ndarray | np.generic)
    return shown_type(x) if is_array else type(x).__name__


def shown(x: Any) -> str:
    """A value that is not what it must be, with its type; an array by its type."""
    if isinstance(x, jax.Array):
        return f"an array, {shown_type(x)}"
    value = repr(x)
    # Whole batches and models come here, too.
    return f"{value if len(value) <= 100 else 'a value'} of type {type(x).__name__}"


def as_int(value: Any) -> int | None:
    """A whole number as an int; a bool, which is an int to Python, is a mistake."""
    try:
        return None if _is_bool(value) else operator.index(value)
    except TypeError:
        return None


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool | np.bool_)
