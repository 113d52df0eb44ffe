"""Writes the tables and draws the picture of what-is-gradient-accumulation.md.

    python docs/five_steps.py

A model of two parameters learns the price of a taxi ride from ten rides. They come in
five micro-batches of two, then in micro-batches of 4, 4 and 2 with weights. Both ways
the update must be that of the ten rides at once, bit for bit. At the end there is what
loops without the library get wrong, each mistake with the update that it makes.

The numbers are chosen such that float32 rounds none of those that make the update, and
that they can be checked by hand. `examples/five_steps.py` is the short form.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import optax_accum as oa

PICTURE = Path(__file__).parent / "images" / "five-steps.svg"
KILOMETRES = np.array([1, 2, 1, 3, 2, 4, 3, 1, 4, 2], np.float32)
PRICES = np.array([15, 25, 15, 35, 15, 50, 40, 25, 50, 30], np.float32)
SIZES = (2, 2, 2, 2, 2)
UNEQUAL_SIZES = (4, 4, 2)
LEARNING_RATE = 1 / 16  # a power of two: the multiplication rounds nothing
CLIP = 120.0

Params = dict[str, jax.Array]
Rows = list[list[str]]


class Seen(NamedTuple):
    """What there is to see after one micro-step."""

    rides: str
    loss: float
    gradient: Params
    sums: Params  # S
    weight: float  # W
    mean: Params  # S / W, before the window may close
    mean_loss: float
    micro_step: int
    gradient_step: int
    has_updated: bool
    update: Params
    params: Params


class Update(NamedTuple):
    """One update on ten rides, however they were cut."""

    loss: float
    gradient: Params
    update: Params
    params: Params


class Mistake(NamedTuple):
    """An update that a loop makes, and the one that it was to make."""

    name: str
    made: Params
    right: Params


def first_params() -> Params:
    """A model that asks 20 for each kilometre and nothing to start with."""
    return {"w": jnp.float32(20), "b": jnp.float32(0)}


def loss_fn(params: Params, x: jax.Array, y: jax.Array) -> jax.Array:
    """The mean squared error over rides of `x` kilometres and price `y`."""
    return jnp.mean((params["w"] * x + params["b"] - y) ** 2)


gradient_of = jax.jit(jax.grad(loss_fn))


def cut(sizes: Sequence[int]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The ten rides in micro-batches of these sizes."""
    ends = np.cumsum(sizes)[:-1]
    return zip(np.split(KILOMETRES, ends), np.split(PRICES, ends), strict=True)


def walk(sizes: Sequence[int], *, weighted: bool) -> list[Seen]:
    """Trains for one window, and writes down what the library holds on the way."""
    tx = oa.accumulate(optax.sgd(LEARNING_RATE), every_k=len(sizes))

    @jax.jit
    def micro_step(params, state, x, y):
        loss, grads = jax.value_and_grad(loss_fn)(params, x, y)
        given = {"weight": len(x) if weighted else 1.0, "value": loss}
        new_params, new_state = tx.update_params(grads, state, params, **given)
        # For the eye only: the window before it may close, and what `update` would
        # have added to the parameters.
        _, window = tx.update(grads, state, params, boundary=False, **given)
        update, _ = tx.update(grads, state, params, **given)
        return new_params, new_state, (loss, grads, oa.accumulated(window), update)

    params = first_params()
    state = tx.init(params)
    seen = []
    for i, (x, y) in enumerate(cut(sizes)):
        params, state, (loss, grads, mean, update) = micro_step(params, state, x, y)
        before = sum(sizes[:i])
        seen.append(
            Seen(
                rides=f"{before + 1} to {before + len(x)}",
                loss=float(loss),
                gradient=grads,
                # `update_params` leaves the sums in place when it closes a window; they
                # count for nothing then, and the next micro-step replaces them.
                sums=state.window.grads,
                weight=float(state.window.weight),
                mean=mean,
                mean_loss=float(state.window.loss / state.window.weight),
                micro_step=int(oa.micro_step(state)),
                gradient_step=int(oa.gradient_step(state)),
                has_updated=bool(oa.has_updated(state)),
                update=update,
                params=params,
            )
        )
    return seen


def accumulated_update(seen: Sequence[Seen]) -> Update:
    """What the window came to."""
    last = seen[-1]
    return Update(last.mean_loss, last.mean, last.update, last.params)


def global_batch_update() -> Update:
    """All ten rides at once, and plain Optax."""
    tx = optax.sgd(LEARNING_RATE)
    params = first_params()
    value_and_grad = jax.jit(jax.value_and_grad(loss_fn))
    loss, grads = value_and_grad(params, KILOMETRES, PRICES)
    update, _ = tx.update(grads, tx.init(params), params)
    return Update(float(loss), grads, update, optax.apply_updates(params, update))


def mistakes() -> list[Mistake]:
    """What loops without the library get wrong, each once."""

    def gradients(params, sizes=SIZES):
        return [gradient_of(params, x, y) for x, y in cut(sizes)]

    def total(grads):
        return jax.tree.map(lambda *g: sum(g), *grads)

    def divided(tree, k):
        return jax.tree.map(lambda x: x / k, tree)

    def first_update(tx, gradient):
        return tx.update(gradient, tx.init(params), params)[0]

    def clipped(gradient):
        clip = optax.clip_by_global_norm(CLIP)
        return clip.update(gradient, clip.init(params))[0]

    params = first_params()
    k = len(SIZES)
    grads = gradients(params)
    right = divided(total(grads), k)
    sgd, adam = optax.sgd(LEARNING_RATE), optax.adam(LEARNING_RATE)

    unequal = gradients(params, UNEQUAL_SIZES)
    means = divided(total(unequal), len(unequal))
    after_one = optax.apply_updates(params, first_update(sgd, right))
    second = gradients(after_one)
    kept = divided(total(grads + second), k)
    clipped_parts = divided(total([clipped(g) for g in grads]), k)
    return [
        Mistake(
            "a mean of unequal means: 4, 4, 2",
            first_update(sgd, means),
            first_update(sgd, right),
        ),
        Mistake(
            "not divided",
            first_update(sgd, total(grads)),
            first_update(sgd, right),
        ),
        Mistake(
            "not divided, with Adam",
            first_update(adam, total(grads)),
            first_update(adam, right),
        ),
        Mistake(
            "not cleared: the second update",
            first_update(sgd, kept),
            first_update(sgd, divided(total(second), k)),
        ),
        Mistake(
            f"each micro-batch clipped to {CLIP:g}",
            first_update(sgd, clipped_parts),
            first_update(sgd, clipped(right)),
        ),
    ]


def number(x: Any) -> str:
    """A number as the tables show it."""
    return f"{float(x):.5g}"


def pair(params: Params) -> str:
    """The part of w, and that of b."""
    return f"{number(params['w'])}, {number(params['b'])}"


def ride_rows() -> Rows:
    """The rides of each micro-batch."""
    rides = np.arange(1, len(PRICES) + 1, dtype=np.float32)
    rows = {"rides": rides, "kilometres x": KILOMETRES, "price y": PRICES}
    ends = np.cumsum(SIZES)[:-1]
    header = ["micro-batch", *(str(i + 1) for i in range(len(SIZES)))]
    cells = {name: np.split(values, ends) for name, values in rows.items()}
    return [
        header,
        *(
            [name, *(", ".join(map(number, part)) for part in parts)]
            for name, parts in cells.items()
        ),
    ]


def walk_rows(seen: Sequence[Seen]) -> Rows:
    """A column for each step, a row for each variable."""
    header = ["after", *(f"step {i + 1}" for i in range(len(seen)))]
    rows = {
        "rides": [s.rides for s in seen],
        "loss": [number(s.loss) for s in seen],
        "gradient": [pair(s.gradient) for s in seen],
        "S: `state.window.grads`": [pair(s.sums) for s in seen],
        "W: `state.window.weight`": [number(s.weight) for s in seen],
        "S / W": [pair(s.mean) for s in seen],
        "`state.micro_step`": [str(s.micro_step) for s in seen],
        "`state.gradient_step`": [str(s.gradient_step) for s in seen],
        "`oa.has_updated(state)`": [str(s.has_updated) for s in seen],
        "update": [pair(s.update) for s in seen],
        "parameters": [pair(s.params) for s in seen],
    }
    return [header, *([name, *cells] for name, cells in rows.items())]


def check_rows(updates: dict[str, Update]) -> Rows:
    """A column for each way to the update."""
    columns = list(updates.values())
    return [
        ["", *updates],
        ["mean loss", *(number(u.loss) for u in columns)],
        ["gradient", *(pair(u.gradient) for u in columns)],
        ["update", *(pair(u.update) for u in columns)],
        ["parameters", *(pair(u.params) for u in columns)],
    ]


def mistake_rows(found: Sequence[Mistake]) -> Rows:
    """A row for each mistake."""
    header = ["mistake", "update made", "right update"]
    return [header, *([m.name, pair(m.made), pair(m.right)] for m in found)]


def table(rows: Rows) -> str:
    """A table in Markdown, its columns aligned for a terminal."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rule = ["-" * widths[0], *(f"{'-' * (width - 1)}:" for width in widths[1:])]

    def line(cells):
        name, *others = cells
        padded = [name.ljust(widths[0])]
        padded += [x.rjust(w) for x, w in zip(others, widths[1:], strict=True)]
        return f"| {' | '.join(padded)} |"

    header, *body = rows
    return "\n".join(map(line, (header, rule, *body)))


def draw(seen: Sequence[Seen], path: Path) -> None:
    """The sum that grows, and the parameter that stands still until the last step."""
    import matplotlib as mpl  # noqa: PLC0415 - only the picture needs it
    from matplotlib.figure import Figure  # noqa: PLC0415

    # They can be read on white pages and on dark ones.
    shades = ["#b9d3f3", "#93bcec", "#6da6e6", "#4a90e2", "#3b78c2"]
    grey, accent = "#808080", "#e0523f"
    style: Any = {"font.size": 15, "text.color": grey, "svg.hashsalt": "five steps"}
    steps = np.arange(1, len(seen) + 1)
    parts = [float(s.gradient["w"]) for s in seen]

    def label(axis, x, y, offset=(0, 10), **style):
        place = {"xytext": offset, "textcoords": "offset points", "ha": "center"}
        axis.annotate(number(y), (x, y), **place, **style)

    with mpl.rc_context(style):
        figure = Figure(figsize=(8, 6.4))
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(1.6, 1))
        gap = 0.006 * sum(parts)
        for i, (part, shade) in enumerate(zip(parts, shades, strict=True)):
            floor = sum(parts[:i])
            top.bar(steps[i:], part - gap, bottom=floor + gap, color=shade, width=0.62)
            label(top, steps[i], floor + part)
        top.set_title("S, the sum of the gradients for w, grows", loc="left")
        top.set(ylim=(0, 1.15 * sum(parts)), yticks=[])

        before = float(first_params()["w"])
        path_of_w = [before, *(float(s.params["w"]) for s in seen)]
        bottom.step([0, *steps], path_of_w, where="post", color=grey, lw=3)
        bottom.plot(steps, path_of_w[1:], "o", color=grey, ms=9)
        bottom.plot(steps[-1:], path_of_w[-1:], "o", color=accent, ms=13)
        bottom.set_title("The parameter w stays the same, then moves once", loc="left")
        for step, w in zip(steps[:-1], path_of_w[1:-1], strict=True):
            label(bottom, step, w)
        label(bottom, steps[-1], path_of_w[-1], offset=(-24, -5), color=accent)
        low, high = min(path_of_w), max(path_of_w)
        room = high - low
        bottom.set(ylim=(low - 0.5 * room, high + 0.8 * room), yticks=[])
        bottom.set(xlim=(0.5, len(seen) + 0.5), xticks=steps)
        bottom.set_xticklabels([f"step {i}" for i in steps])
        for axis in (top, bottom):
            axis.spines[["top", "right", "left"]].set_visible(False)
            axis.spines["bottom"].set_color(grey)
            axis.tick_params(length=0, colors=grey)
        figure.tight_layout(h_pad=1.5)
        path.parent.mkdir(parents=True, exist_ok=True)
        # Without a date the same picture is the same file.
        metadata = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=150, metadata=metadata, transparent=True)


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """Where to write."""
    parser = argparse.ArgumentParser(
        formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--markdown", type=Path, help="write the tables here")
    add("--picture", type=Path, default=PICTURE, help="write the picture here")
    return parser.parse_args(arguments)


def tables(equal: Sequence[Seen], unequal: Sequence[Seen]) -> dict[str, Rows]:
    """All tables, by what they show."""
    updates = {
        "2, 2, 2, 2, 2": accumulated_update(equal),
        "4, 4, 2": accumulated_update(unequal),
        "all 10 at once": global_batch_update(),
    }
    return {
        "Ten rides": ride_rows(),
        "Five micro-batches of two rides": walk_rows(equal),
        "Micro-batches of 4, 4 and 2 rides, with weights": walk_rows(unequal),
        "The same update": check_rows(updates),
        "What loops get wrong": mistake_rows(mistakes()),
    }


def is_same(a: Update, b: Update) -> bool:
    """Whether two updates are the same bit for bit."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


def main(arguments: list[str]) -> int:
    """Prints the tables and draws the picture."""
    options = parse_arguments(arguments)
    equal, unequal = walk(SIZES, weighted=False), walk(UNEQUAL_SIZES, weighted=True)
    shown = {title: table(rows) for title, rows in tables(equal, unequal).items()}
    for title, text in shown.items():
        print(f"{title}\n\n{text}\n")
    if options.markdown:
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text("\n\n".join(shown.values()) + "\n")
    draw(equal, options.picture)
    print(f"The picture is {options.picture}.")

    expected = global_batch_update()
    for walked in (equal, unequal):
        if not is_same(accumulated_update(walked), expected):
            print(f"FAILED: the global batch gives {expected}")
            return 1
    print("Both windows made the update of the global batch, bit for bit.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
