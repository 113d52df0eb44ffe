"""How much memory a compiled program takes, and how much a device has."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

Tree = Any  # arrays or their shapes, in any structure


class Memory(NamedTuple):
    """The bytes that a compiled program takes on each device.

    Attributes:
      arguments: What is passed to it.
      outputs: What it returns.
      temporaries: What it needs in between.
      aliased: What is counted twice, because outputs take the place of donated
        arguments.
    """

    arguments: int
    outputs: int
    temporaries: int
    aliased: int

    @property
    def total(self) -> int:
        """The bytes that have to fit."""
        return self.arguments + self.outputs + self.temporaries - self.aliased

    @classmethod
    def of(cls, compiled: jax.stages.Compiled) -> "Memory":
        """Reads it from a compiled program.

        Raises:
          RuntimeError: This backend does not report it.
        """
        analysis = compiled.memory_analysis()
        if analysis is None:
            raise RuntimeError(
                f"the {jax.default_backend()} backend does not say how much memory a "
                "compiled program takes, so nothing can be planned on it"
            )
        return cls(
            arguments=analysis.argument_size_in_bytes,
            outputs=analysis.output_size_in_bytes,
            temporaries=analysis.temp_size_in_bytes,
            aliased=analysis.alias_size_in_bytes,
        )


def show_size(size: float) -> str:
    """`size` bytes in the unit in which it reads best: ``"1.5 GiB"``."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 1000 and len(units) > 1:
        size /= 1024
        del units[0]
    digits = ".0f" if units[0] == "B" or size >= 100 else ".3g"
    return f"{size:{digits}} {units[0]}"


def available(args: Tree) -> int:
    """What the devices of `args` report as theirs, less what else is in use.

    Arrays in `args` are in use already, and the program counts them again: they do not
    count as in use here. The smallest device decides.

    Raises:
      ValueError: A device reports nothing, as CPUs do.
    """
    arrays = [x for x in jax.tree.leaves(args) if isinstance(x, jax.Array)]
    # An array that is passed twice is in memory once.
    shards = {id(s.data): s for x in arrays for s in x.addressable_shards}
    held: dict[jax.Device, int] = {}
    for shard in shards.values():
        held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
    free = []
    for device in _devices(args):
        stats = device.memory_stats() or {}
        if "bytes_limit" not in stats:
            raise ValueError(
                f"`memory_limit` is needed, because {device} does not report how much "
                "memory it has; got None. Pass a number of bytes: for 16 GiB "
                "memory_limit=16 * 2**30"
            )
        in_use = stats.get("bytes_in_use", 0) - held.get(device, 0)
        free.append(stats["bytes_limit"] - max(in_use, 0))
    return min(free)


def agreed(size: int) -> int:
    """The smallest `size` of all processes, so they all decide alike."""
    if jax.process_count() == 1:
        return size
    # In two parts, because JAX's default integers have 32 bits.
    parts = np.array(divmod(size, 2**31), np.int32)
    gathered = multihost_utils.process_allgather(parts)
    return min(int(high) * 2**31 + int(low) for high, low in np.asarray(gathered))


def _devices(args: Tree) -> list[jax.Device]:
    """This process's devices among those of `args`, or its first one."""
    shardings = [getattr(x, "sharding", None) for x in jax.tree.leaves(args)]
    devices = {d for s in shardings if s is not None for d in s.device_set}
    mine = [d for d in jax.local_devices() if d in devices]
    return mine or jax.local_devices()[:1]
