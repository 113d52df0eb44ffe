"""Draws the chart of the home page, from the rows of two benchmarks.

    python -m benchmarks.headline

It measures nothing: `stream` and `decoder` do, with --docs, and this shows their most
important rows side by side.
"""

from typing import Any

from benchmarks import decoder, shared, stream

Rows = dict[str, Any]  # by their `way`
USUAL, OURS = shared.RED, shared.BLUE


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


def draw(window: Rows, across: Rows, inside: Rows) -> Any:
    """Memory on the left, time on the right; across steps above, in one step below."""
    plt = shared.pyplot()
    figure, ((memory, time), (step_memory, step_time)) = plt.subplots(
        2, 2, figsize=(5.8, 3.1), sharey="row"
    )
    usual, ours = window[stream.MULTI_STEPS], window[stream.OURS]
    names = (stream.MULTI_STEPS, "oa.accumulate")
    held = [across[way].temporaries for way in (names[0], "update_params(pullback)")]
    draw_pair(memory, "extra memory", names, held, "{:.1f} × params")
    times = [usual.window_ms, ours.window_ms]
    draw_pair(time, f"add {ours.k} times, update", names, times, "{:.0f} ms")

    names = ("scan by hand", "oa.value_and_grad")
    by_hand, ours = (inside[way] for way in names)
    held = [by_hand.temporaries, ours.temporaries]
    draw_pair(step_memory, "extra memory", names, held, "{:.1f} × params")
    times = [1.0, ours.time / by_hand.time]
    draw_pair(step_time, "relative time of the step", names, times, "{:.2f}")
    for axes in (memory, step_memory):  # The others share their axes.
        axes.invert_yaxis()
    return figure


if __name__ == "__main__":
    data = shared.DOCS / "data"
    here, windows = shared.read_rows(data / "stream.csv", stream.Row)
    there, steps = shared.read_rows(data / "decoder.csv", decoder.Row)
    scanned = [row for row in steps if row.layers == "scanned"]
    figure = draw(
        {row.way: row for row in windows if row.optimizer == "adamw"},
        {row.way: row for row in scanned if row.part == "across steps"},
        {row.way: row for row in scanned if row.part == "one step"},
    )
    where = " · ".join(sorted({here, there}))
    shared.save(figure, where, shared.DOCS / "images" / "headline.svg")
