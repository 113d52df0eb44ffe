"""What the benchmarks share: their options, turns, tables, files and charts."""

import argparse
import csv
import dataclasses
import os
import platform
import random
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
import optax
import rich.progress
import rich.table
from rich import box
from rich.console import Console
from rich.text import Text

T = TypeVar("T")

DOCS = Path(__file__).parents[1] / "docs"
# These read on a white page and on a dark one.
INK, BLUE, RED, GREEN, ORANGE, GREY = (
    "#808080",
    "#4a90e2",
    "#e0523f",
    "#2e9e6b",
    "#e08e2b",
    "#9aa0a6",
)


class Table(NamedTuple):
    """A table, for the terminal and for a page. Its cells are Markdown.

    `align` has an ``l`` or an ``r`` for each column.
    """

    title: str
    columns: tuple[str, ...]
    align: str
    rows: Sequence[tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """What every module of this package has, as `BENCHMARK`.

    Attributes:
      row: One line of its file: a named tuple of strings, ints and floats.
      measure: Makes the rows.
      tables: What the terminal shows of them.
      check: What follows from them. It raises `SystemExit` if they are not as they
        should be.
      draw: A chart of them, for the documentation.
      page: The page of the documentation that has a table of them.
      page_table: That table.
      rounds: How often everything is timed in a full run; 0 if nothing is timed.
      choices: What `--only` chooses from.
      add_options: Adds those that only this benchmark has.
    """

    row: Any
    measure: Callable[[argparse.Namespace], list[Any]]
    tables: Callable[[list[Any]], list[Table]]
    check: Callable[[list[Any]], str] | None = None
    draw: Callable[[list[Any]], Any] | None = None
    page: str = ""
    page_table: Callable[[list[Any]], Table] | None = None
    rounds: int = 0
    choices: tuple[str, ...] = ()
    add_options: Callable[[argparse.ArgumentParser], None] | None = None


def run(name: str, module: ModuleType, arguments: list[str]) -> None:
    """Measures, prints, checks and writes."""
    benchmark: Benchmark = module.BENCHMARK
    options = parse(name, module.__doc__ or "", benchmark, arguments)
    data, images = (
        (DOCS / "data", DOCS / "images") if options.docs else [options.out] * 2
    )
    path = data / f"{name}.csv"
    if options.redraw:
        where, rows = read_rows(path, benchmark.row)
    else:
        rows = benchmark.measure(options)
        where = setting()

    console = Console()
    console.print(where, highlight=False)
    for table in benchmark.tables(rows):
        show(table, console)
    if benchmark.check:
        console.print(benchmark.check(rows), highlight=False)

    written = [path]
    if not options.redraw:
        write_rows(path, rows, where)
    if benchmark.draw:
        written.append(images / f"{name}.svg")
        save(benchmark.draw(rows), where, written[-1])
    if options.docs and benchmark.page_table:
        written.append(DOCS / benchmark.page)
        write_table(name, benchmark.page_table(rows), where, written[-1])
    console.print("wrote", ", ".join(map(os.path.relpath, written)), highlight=False)


def parse(
    name: str, description: str, benchmark: Benchmark, arguments: list[str]
) -> argparse.Namespace:
    """The options: those of every benchmark, and its own."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks {name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="a look, in seconds")
    add("--docs", action="store_true", help="write what the documentation shows")
    add("--redraw", action="store_true", help="use the rows of the last run again")
    add("--out", type=Path, default=Path("out"), help="where to write (default: out)")
    if benchmark.rounds:
        text = f"turns of each (default: {benchmark.rounds}, with --quick 2)"
        add("--rounds", type=int, help=text)
    if benchmark.choices:
        choices = benchmark.choices
        add(
            "--only",
            nargs="+",
            choices=choices,
            metavar="NAME",
            help=", ".join(choices),
        )
    if benchmark.add_options:
        benchmark.add_options(parser)
    options = parser.parse_args(arguments)
    if options.docs:
        given = [
            f"--{option}"
            for option, value in vars(options).items()
            if option not in ("docs", "redraw") and value != parser.get_default(option)
        ]
        if given:
            parser.error(f"--docs is for the full run, without {' '.join(given)}")
    if benchmark.rounds:
        options.rounds = options.rounds or (2 if options.quick else benchmark.rounds)
    return options


def setting() -> str:
    """The hardware and the versions."""
    return (
        f"{jax.devices()[0].device_kind}, {platform.machine()}, JAX {jax.__version__}, "
        f"Optax {optax.__version__}"
    )


# --- Measuring ---


def track(sequence: Iterable[T], description: str) -> Iterable[T]:
    """The same, with a progress bar that goes away."""
    items, console = list(sequence), Console()
    return rich.progress.track(
        items,
        description,
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )


def in_turn(runners: Sequence[T], rounds: int) -> list[tuple[int, T]]:
    """``(round, runner)``, every runner once a round, in a new random order.

    A mere rotation would let each of them always follow the same one, and find the
    caches and the memory as that one left them.
    """
    order = random.Random(0)
    return [
        (number, runner)
        for number in range(rounds)
        for runner in order.sample(runners, len(runners))
    ]


def median_ratio(above: list[float], below: list[float]) -> float:
    """The median of ratios that were each taken within one round."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def largest_difference(a: Any, b: Any) -> float:
    """The largest absolute difference between the elements of two trees."""
    differences = jax.tree.map(lambda x, y: np.abs(x - y).max(), a, b)
    return float(max(jax.tree.leaves(differences)))


# --- Rows and tables ---


def grouped(rows: list[Any], field: str) -> dict[str, list[Any]]:
    """The rows of each value of a field, in the order in which they first come."""
    groups: dict[str, list[Any]] = {}
    for row in rows:
        groups.setdefault(getattr(row, field), []).append(row)
    return groups


def last(rows: list[Any], field: str) -> dict[str, Any]:
    """The last row of each value of a field."""
    return {getattr(row, field): row for row in rows}


def write_rows(path: Path, rows: list[Any], where: str) -> None:
    """A CSV file, whose last column says where it was measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*rows[0]._fields, "setting"])
        for row in rows:
            cells = (f"{x:.6g}" if isinstance(x, float) else x for x in row)
            writer.writerow([*(x if x != "nan" else "" for x in cells), where])


def read_rows(path: Path, row: Any) -> tuple[str, list[Any]]:
    """What `write_rows` wrote: the place of the measurement, and the rows."""
    with path.open(newline="") as file:
        _, *lines = csv.reader(file)
    kinds = row.__annotations__.values()

    def parsed(kind: type, cell: str) -> Any:
        return kind("nan" if kind is float and not cell else cell)

    rows = [row(*map(parsed, kinds, line[:-1])) for line in lines]
    return lines[0][-1], rows


def show(table: Table, console: Console) -> None:
    """Prints it."""
    shown = rich.table.Table(
        title=table.title,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for heading, align in zip(table.columns, table.align, strict=True):
        shown.add_column(
            plain(heading),
            justify="right" if align == "r" else "left",
            no_wrap=align == "r",
        )
    for row in table.rows:
        shown.add_row(*(plain(cell) for cell in row))
    console.print(shown)


def plain(markdown: str) -> Text:
    """Without the marks of code and of bold face."""
    return Text(re.sub(r"[`*]", "", markdown))


def write_table(name: str, table: Table, where: str, page: Path) -> None:
    """Puts it between the page's two comments that name the benchmark."""
    lines = [
        f"{table.title}{'; ' if table.title else ''}{where}:",
        "",
        f"| {' | '.join(table.columns)} |",
        f"|{'|'.join({'l': '---', 'r': '---:'}[align] for align in table.align)}|",
        *(f"| {' | '.join(row)} |" for row in table.rows),
    ]
    begin, end = f"<!-- python -m benchmarks {name} --docs -->", "<!-- end -->"
    before, found, rest = page.read_text().partition(begin)
    if not found:
        raise SystemExit(f"{page} has no comment {begin}")
    after = rest.partition(end)[2]
    indent = before.rpartition("\n")[2]  # of a table inside a block that folds
    lines = [indent + line if line else "" for line in [*lines, "", end + after]]
    page.write_text("\n".join([before + begin, *lines]))


# --- Charts ---


def pyplot() -> Any:
    """Matplotlib, for files, in our style; imported here because it takes a second."""
    import matplotlib as mpl  # noqa: PLC0415

    mpl.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415

    style: dict[Any, Any] = {
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "text.color": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "axes.facecolor": "none",
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlelocation": "left",
        "axes.titlesize": "medium",
        "axes.titleweight": "bold",
        "figure.constrained_layout.use": True,
        "figure.figsize": (7.3, 3.5),
        "font.size": 10,
        "legend.frameon": False,
        "savefig.transparent": True,
        "svg.hashsalt": "benchmarks",  # the same chart is the same file
        "xtick.minor.size": 0,
        "ytick.minor.size": 0,
    }
    plt.rcParams.update(style)
    return plt


def save(figure: Any, where: str, path: Path) -> None:
    """Writes it, with where it was measured below."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.supxlabel(where, x=1, ha="right", fontsize=8)
    figure.savefig(path, metadata={"Date": None})
    pyplot().close(figure)
