"""Functions of NNX modules, as functions of parameters and state."""

import dataclasses
from typing import Any

import jax
from flax import nnx
from flax.nnx.filterlib import Filter

from optax_accum import _arguments, _flow, _outputs, _passes, _tree
from optax_accum._loop import Settings
from optax_accum._types import Args, Function, Kwargs, Params
from optax_accum.flax import _module

STATE = "the module's state"  # an argument that no loss has by this name


def taken_apart(call: _arguments.Call) -> tuple[dict[str, Any], _arguments.Call]:
    """What in the arguments can change, and the call with places for it."""
    for place, argument in call.build_batch(call.batch):
        _module.check_batch(call.name_of(place), argument)
    others: dict[str, Any] = {}
    args = [
        _module.taken_out(name, argument, others)
        for name, argument in zip(call.names, call.args, strict=True)
    ]
    kwargs = {
        name: _module.taken_out(name, argument, others)
        for name, argument in call.kwargs.items()
    }
    return others, call._replace(args=args, kwargs=kwargs)


@dataclasses.dataclass(frozen=True)
class OfState:
    """A function of modules, as functions of their parameters and their state."""

    settings: Settings | _passes.Settings  # with the user's functions
    wrt: Filter
    graphdef: nnx.GraphDef

    def run(
        self, params: Params, state: _module.State, args: Args, kwargs: Kwargs
    ) -> tuple[Any, _module.State]:
        """What the function returns, and all that it may have changed."""
        nodes = self._nodes(params, state)
        result = _apply(self.settings.fun, nodes, args, kwargs)
        graphdef, _, after = _module.split(nodes, self.wrt)
        _module.check_same_variables(state, after)
        _module.check_same_attributes(self.graphdef, graphdef)
        if self.settings.devices.axis_name is not None:
            after = after._replace(keys=state.keys)
        return result, after

    def weight(self, params: Params, *args: Any, **kwargs: Any) -> Any:
        """What the user's `weight` returns."""
        assert self.settings.weight is not None
        nodes = self._nodes(params, kwargs.pop(STATE))
        return _apply(self.settings.weight, nodes, args, kwargs)

    def _nodes(self, params: Params, state: _module.State) -> _module.Nodes:
        axis_name = self.settings.devices.axis_name
        if axis_name is not None:
            state = _module.of_this_device(state, axis_name)
        return _module.merge(self.graphdef, params, state)


def _apply(function: Function, nodes: _module.Nodes, args: Args, kwargs: Kwargs) -> Any:
    """`function` of the nodes, and of arguments with places for them."""
    args, kwargs = _module.put_back((args, kwargs), nodes.others)
    model = () if nodes.model is None else (nodes.model,)
    return function(*model, *args, **kwargs)


@dataclasses.dataclass(frozen=True)
class Loss(OfState):
    """A loss over a module."""

    settings: Settings

    def value(self, params: Params, *args: Any, **kwargs: Any) -> Any:
        """What `loss_fn` returns, and the state after it as a carry."""
        state = kwargs.pop(STATE)
        result, after = self.run(params, state, args, kwargs)
        before, structure = jax.tree.flatten(state.params)
        is_same = _module.same_leaves(params, after.params)
        if not all(is_same):
            is_same = self._is_same(params, state, args, kwargs)
        rows = zip(is_same, before, jax.tree.leaves(after.params), strict=True)
        written = [old if is_ else new for is_, old, new in rows]
        after = after._replace(params=jax.tree.unflatten(structure, written))
        if not self.settings.has_aux:
            return result, after
        value, aux = _outputs.pair(result, "(value, aux)")
        return value, (aux, after)

    def _is_same(
        self, params: Params, state: _module.State, args: Args, kwargs: Kwargs
    ) -> list[bool]:
        """For each leaf of `params` whether it is what it was.

        After `nnx.remat` or `nnx.jit` every variable holds a new tracer, and only the
        traced program shows it. What is written must be the same for every micro-batch.
        """
        given = args, kwargs

        @jax.jit
        def params_after(params: Params, state: _module.State, arrays: Any) -> Params:
            args, kwargs = _tree.filled(given, arrays)
            return self.run(params, state, args, kwargs)[1].params

        sources = _flow.of_call(params_after, params, state, _tree.arrays_in(given))
        known = range(len(jax.tree.leaves((params, state))))
        _module.check_not_written(params, [not s.needs <= {*known} for s in sources])
        return [source.same == i for i, source in enumerate(sources)]
