"""What a compiled program does with memory, read from the program itself."""

import collections
import math
import re
from typing import NamedTuple

import jax

from tests.support.xla import optimized

LINE = re.compile(
    r"^\s*(?:ROOT )?%?[\w.-]+ = (?P<type>\(.*?\)|\S+) (?P<op>[\w-]+)\((?P<rest>.*)",
    re.MULTILINE,
)
COMPUTATION = re.compile(
    r"^(?P<entry>ENTRY )?%?(?P<name>[\w.-]+) [^\n]*\{$(?P<body>.*?)^\}",
    re.MULTILINE | re.DOTALL,
)
CALLED = re.compile(
    r"(?P<how>body|condition|branch_computations|true_computation|false_computation"
    r"|calls|to_apply)=\{?(?P<names>%[\w.-]+(?:, ?%[\w.-]+)*)"
)
PLACES = {"body": "loop", "condition": "loop", "calls": None, "to_apply": None}
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
ELEMENTS = re.compile(r"[a-z]+(\d*)\w*\[([\d,]*)\]")  # bits (none: pred) and dims


def compiled(step, *args, donate=(0, 1)):
    """`step` compiled for `args`, which may be shapes, with its state donated."""
    return optimized(jax.jit(step, donate_argnums=donate).lower(*args))


def temporaries(program) -> int:
    """Bytes of the buffers that are neither arguments nor outputs."""
    return program.memory_analysis().temp_size_in_bytes


def operations(program, name: str) -> list[str]:
    """The types of the results of all `name` operations, e.g. ``"f32[8,4]{1,0}"``."""
    return [m["type"] for m in LINE.finditer(program.as_text()) if m["op"] == name]


class Operation(NamedTuple):
    """One operation of a program.

    Attributes:
      name: Such as ``"all-reduce"``.
      type: Of its result, such as ``"f32[8,4]{1,0}"``.
      place: ``"entry"`` for what runs once, ``"loop"`` for what is inside a loop,
        ``"branch"`` for what is inside a branch of a conditional, and for what is
        inside several of them their names from the outside in: ``"loop/branch"``.
    """

    name: str
    type: str
    place: str

    @property
    def nbytes(self) -> int:
        """Bytes of the result."""
        sizes = [
            int(bits or 8) // 8 * math.prod(map(int, filter(None, dims.split(","))))
            for bits, dims in ELEMENTS.findall(self.type)
        ]
        return sum(sizes)


def collectives(program) -> list[Operation]:
    """All operations that exchange data between devices."""
    return [operation for operation in placed(program) if operation.name in COLLECTIVES]


def exchanges(program) -> dict[str, int]:
    """How many there are in each place, as ``{"all-reduce, branch": 1}``."""
    found = [
        f"{operation.name}, {operation.place}" for operation in collectives(program)
    ]
    return dict(collections.Counter(found))


def placed(program) -> list[Operation]:
    """All operations, where they are."""
    computations = {m["name"]: m for m in COMPUTATION.finditer(program.as_text())}
    found = []

    def visit(computation, places):
        for line in LINE.finditer(computation["body"]):
            name, place = line["op"].removesuffix("-start"), "/".join(places) or "entry"
            found.append(Operation(name, line["type"], place))
            for called in CALLED.finditer(line["rest"]):
                inner = PLACES.get(called["how"], "branch")
                for name in re.findall(r"[\w.-]+", called["names"]):
                    visit(computations[name], [*places, inner] if inner else places)

    (entry,) = [m for m in computations.values() if m["entry"]]
    visit(entry, [])
    return found


def large_copies(program, elements: int) -> list[str]:
    """The copies of at least `elements` elements."""

    def size(type_):
        (dims,) = SHAPE.findall(type_)[:1]
        return math.prod(map(int, filter(None, dims.split(","))))

    return [t for t in operations(program, "copy") if size(t) >= elements]


def nbytes(tree) -> int:
    """Bytes of a tree's arrays."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
