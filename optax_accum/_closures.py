"""What a function reads from around it."""

import dis
import types
from typing import Any


def cells_of(function: types.FunctionType) -> dict[str, Any]:
    """The variables of enclosing functions that `function` reads, by name.

    Unlike `inspect.getclosurevars` it takes names that have no value yet.
    """
    found = {}
    names = function.__code__.co_freevars
    for name, cell in zip(names, function.__closure__ or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # It has no value yet.
            continue
    return found


def globals_of(function: types.FunctionType) -> dict[str, Any]:
    """The global variables that `function` reads, by name.

    Unlike `inspect.getclosurevars` it does not take the ``x`` in ``batch.x`` for a
    global variable, and sees what functions inside of it read.
    """
    names = _globals_read(function.__code__)
    known = function.__globals__
    return {name: known[name] for name in names if name in known}


def _globals_read(code: types.CodeType) -> set[str]:
    names = {i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL"}
    inner = [c for c in code.co_consts if isinstance(c, types.CodeType)]
    return names.union(*map(_globals_read, inner))
