"""What every optimizer holds beside its arguments and results, with and without us.

    python benchmarks/temporaries.py
    python benchmarks/temporaries.py --dtype bfloat16 --markdown out/temporaries.md

One compiled micro-step each, parameters and state donated, nothing run: the temporaries
that XLA reports, as a multiple of the parameters' bytes. "alone" is the optimizer by
itself, on every step; what accumulation cannot take away from it.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

import optax_accum as oa

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
import catalogue
import hlo

K = 8
# Why XLA gives some more than `optax.MultiSteps`, read in their programs.
CROSSED = (
    "update and moment each read what the other overwrites: alone that is a copy of "
    "the moment; `update` adds one of the accumulator, in whose buffer updates leave"
)
WIDE = (
    "it computes in float32, the accumulator's dtype, where optax.MultiSteps rounds "
    "the gradient to bfloat16 first, and its intermediate results are twice as large"
)
REASONS = {
    "optax.lamb": WIDE,
    "optax.contrib.muon": WIDE,
    "optax.contrib.prodigy": WIDE,
    "optax.lion": CROSSED,
    "optax.optimistic_gradient_descent": CROSSED,
    "optax.contrib.acprop": CROSSED,
    "optax.contrib.dadapt_adamw": (
        "its step size is a ratio of sums over all leaves, for which update and "
        "moments wait; XLA copies four arrays to be sure of what they read"
    ),
}
COLUMNS = ("alone", "update_params", "update", "optax.MultiSteps")


class Row(NamedTuple):
    """One optimizer's temporaries over its parameters' bytes, or why there are none."""

    name: str
    ratios: tuple[float | str, ...]  # in the order of COLUMNS


def loss(params: Any) -> jax.Array:
    squares = [jnp.sum(x.astype(jnp.float32) ** 2) for x in jax.tree.leaves(params)]
    return jnp.stack(squares).sum()


def make_step(tx: Any, name: str, way: str) -> Callable:
    def step(params, state, grads, value):
        extra = catalogue.extra_args(name, loss, params, grads, value)
        if way == "update_params":
            return tx.update_params(grads, state, params, **extra)
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    return step


def measure(name: str, build: Callable, params: Any) -> Row:
    inner = optax.with_extra_args_support(build())
    ways = {
        "alone": inner,
        "update_params": oa.accumulate(inner, K),
        "update": oa.accumulate(inner, K),
        "optax.MultiSteps": optax.MultiSteps(inner, K).gradient_transformation(),
    }
    value = jax.ShapeDtypeStruct((), jnp.float32)
    ratios: list[float | str] = []
    for way, tx in ways.items():
        try:
            state = jax.eval_shape(tx.init, params)
            step = make_step(optax.with_extra_args_support(tx), name, way)
            if way == "update_params":
                step = make_step(tx, name, way)
            program = hlo.compiled(step, params, state, params, value)
        except (TypeError, ValueError) as error:
            ratios.append(type(error).__name__)
        else:
            ratios.append(hlo.temporaries(program) / hlo.nbytes(params))
    return Row(name, tuple(ratios))


def exceeds(row: Row) -> bool:
    """Whether one of our ways takes more than `optax.MultiSteps`."""
    *ours, theirs = row.ratios[1:]
    if isinstance(theirs, str):
        return False
    return any(isinstance(r, str) or r > theirs + 0.01 for r in ours)


def notes(rows: list[Row]) -> list[str]:
    return [
        f"{row.name} takes more than optax.MultiSteps: "
        f"{REASONS.get(row.name, 'not looked into')}."
        for row in rows
        if exceeds(row)
    ]


def cells(row: Row) -> list[str]:
    return [r if isinstance(r, str) else f"{r:.2f}" for r in row.ratios]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--side", type=int, default=512, help="of the square matrices")
    names = list(catalogue.optimizers())
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--markdown", type=Path, help="write the table here")
    options = parser.parse_args(arguments)
    side, dtype = options.side, jnp.dtype(options.dtype)
    params = {
        "in": jax.ShapeDtypeStruct((side, side), dtype),
        "out": jax.ShapeDtypeStruct((side, side // 2), dtype),
        "bias": jax.ShapeDtypeStruct((side,), dtype),
    }
    console = Console()
    title = (
        f"{jax.devices()[0].device_kind}, JAX {jax.__version__}, Optax "
        f"{optax.__version__}, {dtype}: temporaries over the parameters' bytes"
    )
    rows = [
        measure(name, catalogue.optimizers()[name], params)
        for name in track(options.only, console=console, transient=True)
    ]
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0)
    table.add_column("optimizer", no_wrap=True)
    for column in COLUMNS:
        table.add_column(column.removeprefix("optax."), justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row.name, *cells(row))
    console.print(table)
    for note in notes(rows):
        console.print(note, highlight=False)
    if options.markdown:
        lines = [
            f"{title}.",
            "",
            "| optimizer | " + " | ".join(COLUMNS) + " |",
            "|---|" + "---:|" * len(COLUMNS),
            *(f"| `{row.name}` | " + " | ".join(cells(row)) + " |" for row in rows),
            "",
            *(f"- {note}" for note in notes(rows)),
        ]
        options.markdown.parent.mkdir(parents=True, exist_ok=True)
        options.markdown.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
