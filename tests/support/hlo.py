"""What a compiled program does with memory, read from the program itself."""

import collections
import math
import re
from typing import NamedTuple

import jax
import numpy as np

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
# The three ways to write which devices meet: {{0,1},{2,3}}, [2,2]<=[4]T(0) and
# mesh['a'=2,'b'=2], device_ids=([4]T(0)) {'b'}.
LISTED = re.compile(r"replica_groups=\{((?:\{[\d,]+\},?)*)\}")
IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
MESH = re.compile(
    r"replica_groups=mesh\[([^\]]+)\]"
    r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))?"
    r" \{([^:}]+)\}"
)
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
      text: Its operands and attributes.
    """

    name: str
    type: str
    place: str
    text: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of the result."""
        sizes = [
            int(bits or 8) // 8 * math.prod(map(int, filter(None, dims.split(","))))
            for bits, dims in ELEMENTS.findall(self.type)
        ]
        return sum(sizes)

    @property
    def groups(self) -> list[list[int]]:
        """The devices of a collective that meet each other; ``[]`` if all do."""

        def ints(text):
            return [int(number) for number in text.split(",")]

        def iota(shape, axes):
            x = np.arange(math.prod(ints(shape))).reshape(ints(shape))
            return x.transpose(ints(axes)) if axes else x

        if found := LISTED.search(self.text):
            return [ints(group) for group in re.findall(r"[\d,]*\d", found[1])]
        if found := IOTA.search(self.text):
            shape, *written = found.groups()
            return iota(*written).reshape(ints(shape)).tolist()
        if found := MESH.search(self.text):
            shape, *written, meeting = found.groups()
            sizes = {name: int(n) for name, n in re.findall(r"('[^']+')=(\d+)", shape)}
            written[0] = written[0] or str(math.prod(sizes.values()))
            devices = iota(*written).reshape(list(sizes.values()))
            axes = [list(sizes).index(name) for name in re.findall("'.+?'", meeting)]
            last = range(-len(axes), 0)
            size = math.prod(devices.shape[axis] for axis in axes)
            return np.moveaxis(devices, axes, last).reshape(-1, size).tolist()
        raise ValueError(f"no groups of devices in {self.text}")


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
            found.append(Operation(name, line["type"], place, line["rest"]))
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
