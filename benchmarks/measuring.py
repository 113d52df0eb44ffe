"""What the benchmarks share: taking turns, ratios, and saying where it was."""

import json
import platform
import random
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import optax

T = TypeVar("T")


def setting() -> str:
    """The hardware and the versions, for a title."""
    return (
        f"{jax.devices()[0].device_kind}, {platform.machine()}, JAX {jax.__version__}, "
        f"Optax {optax.__version__}"
    )


def in_turn(runners: Sequence[T], rounds: int) -> Iterator[tuple[int, T]]:
    """``(round, runner)``, every runner once a round, in an order that is drawn anew.

    A mere rotation would let each of them always follow the same one, and find the
    caches and the memory as that one left them.
    """
    order = random.Random(0)
    for number in range(rounds):
        for runner in order.sample(runners, len(runners)):
            yield number, runner


def median_ratio(above: list[float], below: list[float]) -> float:
    """The median of ratios that were each taken within one round."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def write_json(path: Path, title: str, results: Sequence[Any]) -> None:
    """The figures, which are named tuples."""
    record = {"setting": title, "results": [r._asdict() for r in results]}
    write_lines(path, [json.dumps(record, indent=2)])


def write_lines(path: Path, lines: Sequence[str]) -> None:
    """A Markdown table, say."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def save(figure: Any, title: str, path: Path) -> None:
    """A picture, with its title above all its panels."""
    figure.suptitle(title, fontsize="medium")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def pyplot() -> Any:
    """Matplotlib, for files; imported here, because only a picture needs it."""
    import matplotlib as mpl  # noqa: PLC0415

    mpl.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415

    return plt
