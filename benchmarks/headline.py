"""Draws the chart of the home page, from the rows of two benchmarks.

    python -m benchmarks.headline

It measures nothing: `stream` and `decoder` do, with --docs, and this shows their most
important rows side by side.
"""

import csv
from typing import Any

from benchmarks import shared

Rows = dict[str, dict[str, str]]
USUAL, OURS = shared.RED, shared.BLUE


def rows_of(name: str, **wanted: str) -> Rows:
    """The stored rows of a benchmark that have these values, by their `way`."""
    with (shared.DOCS / "data" / f"{name}.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if wanted.items() <= row.items()]
    return {row["way"]: row for row in rows}


def draw_pair(
    axes: Any, title: str, names: tuple[str, str], values: list[float], unit: str
) -> None:
    """Two bars, the usual way above ours, each with its number at its end."""
    bars = axes.barh(names, values, color=(USUAL, OURS), height=0.6)
    axes.bar_label(bars, [unit.format(x) for x in values], padding=4, color=shared.INK)
    axes.set_title(title, fontweight="normal")
    axes.set_xlim(0, 1.5 * max(values))
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="y", length=0)


def draw(stream: Rows, across: Rows, inside: Rows) -> Any:
    """Memory on the left, time on the right; across steps above, in one step below."""

    def numbers(rows: Rows, column: str, *ways: str) -> list[float]:
        return [float(rows[way][column]) for way in ways]

    plt = shared.pyplot()
    figure, ((memory, time), (step_memory, step_time)) = plt.subplots(
        2, 2, figsize=(5.8, 3.1), sharey="row"
    )
    names = ("optax.MultiSteps", "oa.accumulate")
    held = numbers(across, "temporaries", names[0], "update_params(pullback)")
    draw_pair(memory, "extra memory", names, held, "{:.1f} × params")
    window = numbers(stream, "window_ms", names[0], "update_params")
    k = stream["floor"]["k"]
    draw_pair(time, f"add {k} times, update", names, window, "{:.0f} ms")

    names = ("scan by hand", "oa.value_and_grad")
    held = numbers(inside, "temporaries", *names)
    draw_pair(step_memory, "extra memory", names, held, "{:.1f} × params")
    by_hand, ours = numbers(inside, "time", *names)
    relative = [1.0, ours / by_hand]
    draw_pair(step_time, "relative time of the step", names, relative, "{:.2f}")
    for axes in (memory, step_memory):  # The others share their axes.
        axes.invert_yaxis()
    return figure


if __name__ == "__main__":
    stream = rows_of("stream", optimizer="adamw")
    across = rows_of("decoder", layers="scanned", part="across steps")
    inside = rows_of("decoder", layers="scanned", part="one step")
    settings = {rows["optax.MultiSteps"]["setting"] for rows in (stream, across)}
    where = " · ".join(sorted(settings))
    path = shared.DOCS / "images" / "headline.svg"
    shared.save(draw(stream, across, inside), where, path)
