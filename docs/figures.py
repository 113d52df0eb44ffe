"""Draws the picture of the idea: one global batch, four micro-batches, one update.

    python docs/figures.py

Nothing in it is measured. Time goes to the right, one micro-step to a column, and every
row is something that a training step holds.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

PICTURE = Path(__file__).parent / "images" / "four-micro-batches.svg"
MICRO_BATCHES, EXAMPLES = 4, 4  # examples of each micro-batch
SHADES = ("#b9d3f3", "#85b3ea", "#4a90e2", "#3370b8")  # one for each micro-batch
ON_SHADES = ("#202124", "#202124", "#202124", "#ffffff")
GREY, ACCENT = "#808080", "#e0523f"  # legible on white pages and on dark ones
LARGE, SMALL = 16, 14  # still readable where the picture is 400 pixels wide

# All lengths are in one unit.
WIDTH, HEIGHT = 118, 80
LEFT, COLUMN, BLOCK = 21.0, 19.5, 15.0  # the first micro-step; how wide each is
CELL, ACTIVATIONS, GRADIENT = 3.1, 4.8, 5.0  # how high each is
# Where each row stands.
BATCH, MEMORY, EACH, SUM, WEIGHT, PARAMETERS = 72.0, 49.0, 36.0, 24.5, 21.0, 8.5


def centre(i: int) -> float:
    """Where micro-step `i`, from 0, is."""
    return LEFT + (i + 0.5) * COLUMN


FIRST, LAST = centre(0), centre(MICRO_BATCHES - 1)


def box(
    axes: Any, x: float, y: float, width: float, height: float, fc: str, **style: Any
) -> None:
    """A box around the middle of its foot."""
    shape = "round,pad=0,rounding_size=0.6"
    corner = (x - width / 2, y)
    style = {"fc": fc, "lw": 0} | style
    axes.add_patch(FancyBboxPatch(corner, width, height, shape, **style))


def write(axes: Any, x: float, y: float, text: str, **style: Any) -> None:
    """Text around a point."""
    axes.text(x, y, text, **({"ha": "center", "va": "center", "size": LARGE} | style))


def name_row(axes: Any, y: float, name: str) -> None:
    """The name of a row, at the left."""
    write(axes, 0, y, name, ha="left", linespacing=1.1)


def arrow(axes: Any, start: Any, end: Any, color: str = GREY) -> None:
    """An arrow between two points."""
    style = {"arrowstyle": "-|>", "color": color, "lw": 1.8, "mutation_scale": 13}
    axes.annotate("", end, start, arrowprops={**style, "shrinkA": 0, "shrinkB": 0})


def draw_batch(axes: Any) -> None:
    """The examples, cut in four."""
    name_row(axes, BATCH + CELL / 2, "global\nbatch")
    for i, color in enumerate(SHADES):
        for j in range(EXAMPLES):
            x = centre(i) + (j - (EXAMPLES - 1) / 2) * (BLOCK - CELL) / (EXAMPLES - 1)
            box(axes, x, BATCH, CELL, CELL, color)
        write(axes, centre(i), BATCH + CELL + 3.5, f"step {i + 1}", size=SMALL)


def draw_memory(axes: Any) -> None:
    """The activations of one micro-batch at a time."""
    name_row(axes, MEMORY + ACTIVATIONS / 2, "activations\nin memory")
    for i, color in enumerate(SHADES):
        box(axes, centre(i), MEMORY, BLOCK, ACTIVATIONS, color)
    x, y = (FIRST + LAST) / 2, MEMORY + ACTIVATIONS + 3
    write(axes, x, y, "one micro-batch at a time", color=GREY, size=SMALL)
    # A ghost: the memory that is saved.
    x = centre(MICRO_BATCHES)
    for i in range(MICRO_BATCHES):
        y = MEMORY + i * ACTIVATIONS
        dashed = {"fc": "none", "ec": GREY, "lw": 1.6, "ls": (0, (3, 2))}
        box(axes, x, y + 0.3, BLOCK - 0.6, ACTIVATIONS - 0.6, **dashed)
    text = "instead of\nthe whole batch"
    write(axes, x, MEMORY - 4.2, text, color=GREY, size=SMALL, linespacing=1.1)


def draw_gradients(axes: Any) -> None:
    """The gradient of each micro-batch, by itself."""
    name_row(axes, EACH + GRADIENT / 2, "gradient")
    for i, color in enumerate(SHADES):
        x, above = centre(i), EACH + GRADIENT
        arrow(axes, (x, MEMORY - 0.8), (x, above + 0.8))
        box(axes, x, EACH, BLOCK, GRADIENT, color)
        write(axes, x, EACH + GRADIENT / 2 - 0.2, f"$g_{i + 1}$", color=ON_SHADES[i])
        arrow(axes, (x, EACH - 0.8), (x, SUM + GRADIENT + 0.8))
        write(axes, x + 2.2, (EACH + SUM + GRADIENT) / 2, "+", color=GREY)


def draw_sum(axes: Any) -> None:
    """The sum: as large as one gradient, however many are in it."""
    name_row(axes, SUM + GRADIENT / 2, "sum S")
    name_row(axes, WEIGHT, "weight W")
    for i in range(MICRO_BATCHES):
        stripe = BLOCK / (i + 1)
        left = centre(i) - BLOCK / 2
        for j, color in enumerate(SHADES[: i + 1]):
            box(axes, left + (j + 0.5) * stripe, SUM, stripe, GRADIENT, color)
        write(axes, centre(i), WEIGHT, str(i + 1))
        if i:
            y = SUM + GRADIENT / 2
            arrow(axes, (centre(i - 1) + BLOCK / 2 + 0.6, y), (left - 0.5, y))


def draw_parameters(axes: Any) -> None:
    """The parameters, which stay what they are until the boundary."""
    name_row(axes, PARAMETERS, "parameters")
    y, drop = PARAMETERS, 5.5
    x = (FIRST - BLOCK / 2, LAST, LAST)
    axes.plot(x, (y, y, y - drop), color=GREY, lw=3, solid_joinstyle="round")
    for i in range(MICRO_BATCHES - 1):
        axes.plot(centre(i), y, "o", color=GREY, ms=9)
    axes.plot(LAST, y - drop, "o", color=ACCENT, ms=14)
    middle = (FIRST + centre(MICRO_BATCHES - 2)) / 2
    write(axes, middle, y - 4.5, "unchanged", color=GREY, size=SMALL)
    text = "one update"
    write(axes, LAST + 3, y - drop, text, color=ACCENT, size=SMALL, ha="left")
    arrow(axes, (LAST, WEIGHT - 2.4), (LAST, y + 1), color=ACCENT)
    write(axes, LAST + 2, (WEIGHT + y) / 2 - 0.6, "S / W", color=ACCENT, ha="left")


def draw() -> Any:
    """The whole picture."""
    style: Any = {"font.size": LARGE, "text.color": GREY, "svg.hashsalt": "figures"}
    with mpl.rc_context(style):
        figure = Figure(figsize=(0.08 * WIDTH, 0.08 * HEIGHT))
        axes = figure.add_axes((0.025, 0.025, 0.95, 0.95))
        axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT), aspect="equal")
        axes.axis("off")
        draw_batch(axes)
        draw_memory(axes)
        draw_gradients(axes)
        draw_sum(axes)
        draw_parameters(axes)
    return figure


def main(arguments: list[str]) -> None:
    """Writes the picture."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--picture", type=Path, default=PICTURE, help="where to write")
    options = parser.parse_args(arguments)
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    # Without a date the same picture is the same file.
    metadata = {"Date": None} if options.picture.suffix == ".svg" else None
    with mpl.rc_context({"svg.hashsalt": "figures"}):
        draw().savefig(options.picture, dpi=150, metadata=metadata, transparent=True)


if __name__ == "__main__":
    main(sys.argv[1:])
