"""Every gradient transformation that Optax exports, found by introspection.

A name is a transformation where its function says that it returns one. Required
arguments are filled in by name from `ARGUMENTS`; what takes other optimizers is given
Adam. A new optimizer in a new Optax is found, built and tested without a change here,
or fails for want of an argument.
"""

import functools
import inspect
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import optax
import optax.contrib

ADAM = optax.adam(1e-2)


def _every(leaf):
    """A function from any tree to the tree that has `leaf` everywhere."""
    return lambda tree: jax.tree.map(lambda _: leaf, tree)


# What required arguments are given, by their name.
ARGUMENTS = {
    "learning_rate": 1e-2,
    "inner": ADAM,
    "optimizer": ADAM,
    "base_optimizer": ADAM,
    "tx": ADAM,
    "inner_factory": optax.adam,
    "adv_optimizer": optax.chain(optax.contrib.normalize(), optax.sgd(1e-2)),
    "transforms": {"all": ADAM},
    "param_labels": _every("all"),
    "mask": _every(True),
    "freeze_mask": _every(False),
    "should_transform_fn": lambda step: step % 2 == 0,
    "max_consecutive_errors": 3,
    "step_size": -1e-2,
    "step_size_fn": optax.linear_schedule(-1e-2, -1e-3, 5),
    "max_backtracking_steps": 5,
    "max_linesearch_steps": 5,
    "clipping": 0.1,
    "max_delta": 0.5,
    "threshold": 0.5,
    "max_norm": 0.5,
    "decay": 0.9,
    "eta": 0.01,
    "gamma": 0.55,
    "measure": optax.tree.norm,
    "measure_name": "norm",
}
# What is called otherwise than with its required arguments.
CALLS = {
    "optax.chain": lambda f: f(optax.clip_by_global_norm(0.5), ADAM),
    "optax.named_chain": lambda f: f(("clip", optax.clip(0.5)), ("adam", ADAM)),
    "optax.add_noise": lambda f: f(eta=0.01, gamma=0.55, key=0),
    "optax.noisy_sgd": lambda f: f(learning_rate=1e-2, key=0),
    # Orthogonalises matrices, and wants to be told that they are matrices.
    "optax.contrib.scale_by_muon": lambda f: optax.masked(
        f(weight_dimension_numbers=_every(optax.contrib.MuonDimensionNumbers())),
        lambda tree: jax.tree.map(lambda x: x.ndim == 2, tree),
    ),
    "optax.inject_hyperparams": lambda f: f(optax.adam)(learning_rate=1e-2),
    "optax.inject_stateful_hyperparams": lambda f: f(optax.adam)(
        learning_rate=optax.linear_schedule(1e-2, 1e-3, 5)
    ),
    "optax.stateless": lambda f: f(lambda updates, _: updates),
    "optax.stateless_with_tree_map": lambda f: f(lambda update, _: -0.1 * update),
}
# What cannot be compared, and why.
NOT_COMPARABLE = {
    "differentially_private_aggregate": "takes one gradient per example, not a mean",
    "dpsgd": "takes one gradient per example, not a mean",
    "measure_with_ema": "returns a measurement, not updates",
    "lookahead": "its gradients have another tree structure than its parameters",
}


def _exported() -> Iterator[tuple[str, Callable]]:
    for module in (optax, optax.contrib):
        for name, function in sorted(vars(module).items()):
            if name.startswith("_") or not inspect.isfunction(function):
                continue
            returns = str(inspect.signature(function).return_annotation)
            if "GradientTransformation" in returns and name not in NOT_COMPARABLE:
                yield f"{module.__name__}.{name}", function


def _build(name: str, function: Callable) -> optax.GradientTransformation:
    if name in CALLS:
        return CALLS[name](function)
    parameters = inspect.signature(function).parameters.values()
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    required = [
        p.name for p in parameters if p.default is p.empty and p.kind not in variadic
    ]
    return function(**{argument: ARGUMENTS[argument] for argument in required})


def transformations() -> dict[str, Callable[[], optax.GradientTransformation]]:
    """All transformations by name, each as a function that builds it."""
    return {name: functools.partial(_build, name, f) for name, f in _exported()}


def optimizers() -> dict[str, Callable[[], optax.GradientTransformation]]:
    """The complete optimizers among them: Optax's aliases and `optax.contrib`'s."""

    def is_optimizer(name: str, function: Callable) -> bool:
        parts = inspect.signature(function).parameters
        is_alias = function.__module__.endswith("alias") or "contrib" in name
        return is_alias and "learning_rate" in parts and "scale_by" not in name

    return {
        name: functools.partial(_build, name, function)
        for name, function in _exported()
        if is_optimizer(name, function)
    }


def extra_args(name: str, loss: Callable, params, grads, value) -> dict:
    """The extra arguments without which the transformation `name` does not run."""
    del params
    if "linesearch" in name or name.endswith(".lbfgs"):
        return {"value": value, "grad": grads, "value_fn": loss}
    if any(word in name for word in ("polyak", "momo", "plateau")):
        return {"value": value}
    if name.endswith(".sophia"):
        return {"obj_fn": loss}
    return {}


def example_params(dtype=jnp.float32):
    """A small tree of parameters: matrices, vectors, and nothing else."""
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "dense": {
            "kernel": jax.random.normal(keys[0], (6, 4), dtype),
            "bias": jax.random.normal(keys[1], (4,), dtype),
        },
        "out": jax.random.normal(keys[2], (4, 3), dtype),
    }
