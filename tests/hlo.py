"""What a compiled program does with memory, read from the program itself."""

import re

import jax

LINE = re.compile(
    r"^\s*(?:ROOT )?%?[\w.-]+ = (?P<type>\(.*?\)|\S+) (?P<op>[\w-]+)\(", re.MULTILINE
)
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
SHAPE = re.compile(r"\w+\[(?P<dims>[\d,]*)\]")


def compiled(step, *args, donate=(0, 1)):
    """`step` compiled for `args`, which may be shapes, with its state donated."""
    return jax.jit(step, donate_argnums=donate).lower(*args).compile()


def temporaries(program) -> int:
    """Bytes of the buffers that are neither arguments nor outputs."""
    return program.memory_analysis().temp_size_in_bytes


def operations(program, name: str) -> list[str]:
    """The types of the results of all `name` operations, e.g. ``"f32[8,4]{1,0}"``."""
    return [m["type"] for m in LINE.finditer(program.as_text()) if m["op"] == name]


def collectives(program) -> list[str]:
    """The names of all operations that exchange data between devices."""
    names = [m["op"].removesuffix("-start") for m in LINE.finditer(program.as_text())]
    return [name for name in names if name in COLLECTIVES]


def large_copies(program, elements: int) -> list[str]:
    """The copies of at least `elements` elements."""

    def size(type_):
        dims = SHAPE.search(type_)["dims"]
        total = 1
        for dim in filter(None, dims.split(",")):
            total *= int(dim)
        return total

    return [t for t in operations(program, "copy") if size(t) >= elements]


def nbytes(tree) -> int:
    """Bytes of a tree's arrays."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
