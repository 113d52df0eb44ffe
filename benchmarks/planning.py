"""What the planner sees of a large model, on a machine that could not run it.

    python benchmarks/planning.py --markdown out/planning.md --picture out/planning.png

A decoder of GPT-2's smallest size, AdamW, a batch of sequences: only shapes, so that
nothing is allocated. The step is compiled for the numbers of micro-batches that the
search asks for, and for no others. The figures are those of this machine's compiler;
another one's, on a GPU say, keeps other temporaries.
"""

import argparse
import functools
import logging
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from in_step import decoder
from measuring import pyplot, save, setting, write_lines

import optax_accum as oa

LARGE = {"layers": 12, "width": 768, "heads": 12, "length": 512, "vocabulary": 50257}
SMALL = {"layers": 2, "width": 64, "heads": 2, "length": 32, "vocabulary": 64}


def shapes(batch_size: int, sizes: dict[str, int]) -> tuple[Any, Any, Any]:
    """The loss, and the shapes of parameters and batch."""
    losses = []

    def build():
        model = decoder(**sizes, examples=batch_size)
        losses.append(model.loss)
        return model.params, model.batch

    params, batch = jax.eval_shape(build)
    return losses[0], params, batch


def make_plan(
    loss: Any, params: Any, batch: Any, memory_limit: int
) -> oa.diagnose.MicrobatchPlan:
    tx = optax.adamw(1e-3)

    def make_step(num_microbatches: int) -> Any:
        grad = oa.grad(loss, num_microbatches=num_microbatches)

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params, state, batch):
            updates, state = tx.update(grad(params, batch), state, params)
            return optax.apply_updates(params, updates), state

        return step

    state = jax.eval_shape(tx.init, params)
    return oa.diagnose.plan_microbatches(
        make_step,
        params,
        state,
        batch,
        batch_size=batch.shape[0],
        memory_limit=memory_limit,
    )


def write_markdown(plan: oa.diagnose.MicrobatchPlan, title: str, path: Path) -> None:
    """The plan as the documentation has it, in GiB on each device."""
    lines = [
        f"{title}. GiB, of which {plan.memory_limit * (1 - plan.headroom) / 2**30:.1f} "
        "may be used; outputs that do not take the place of an argument count as "
        "temporaries:",
        "",
        "| micro-batches | arguments | temporaries | total | fits | compiled in |",
        "|---:|---:|---:|---:|---|---:|",
    ]
    for number, memory, fits, seconds in plan.candidates:
        assert memory is not None
        rest = memory.total - memory.arguments
        sizes = [f"{x / 2**30:.2f}" for x in (memory.arguments, rest, memory.total)]
        cells = str(number), *sizes, "yes" if fits else "no", f"{seconds:.1f} s"
        lines.append(f"| {' | '.join(cells)} |")
    write_lines(path, lines)


def draw(plan: oa.diagnose.MicrobatchPlan, axes: Any) -> None:
    """Stacked bars of what each candidate takes, and a line for the limit."""
    known = [c for c in plan.candidates if c.memory is not None]
    names = [str(c.num_microbatches) for c in known]
    memories = np.array([c.memory for c in known])
    arguments, outputs, temporaries, aliased = memories.T
    largest = max(plan.memory_limit, *(arguments + outputs + temporaries - aliased))
    size, unit = (2**30, "GiB") if largest >= 2**30 else (2**20, "MiB")
    bottom = np.zeros(len(known))
    for label, part, color in (
        ("arguments", arguments, "#5f6368"),
        ("outputs, not aliased", outputs - aliased, "#bdc1c6"),
        ("temporaries", temporaries, "#1a73e8"),
    ):
        axes.bar(names, part / size, bottom=bottom, label=label, color=color)
        bottom += part / size
    usable = plan.memory_limit * (1 - plan.headroom) / size
    axes.axhline(usable, color="#d93025", ls="--", label="what may be used")
    axes.set(xlabel="micro-batches", ylabel=f"{unit} per device")
    axes.legend(frameon=False)


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--batch-size", type=int, default=64, help="sequences (default: 64)")
    add("--memory-limit", type=float, default=16, help="GiB (default: 16)")
    add("--quick", action="store_true", help="a tiny model, in 16 MiB")
    add("--markdown", type=Path, help="write the table here")
    add("--picture", type=Path, default=Path("out/planning.png"))
    options = parser.parse_args(arguments)
    limit, sizes = int(options.memory_limit * 2**30), LARGE
    if options.quick:
        limit, sizes = 16 * 2**20, SMALL

    logging.basicConfig(format="%(message)s")
    logging.getLogger("optax_accum").setLevel(logging.INFO)
    loss, params, batch = shapes(options.batch_size, sizes)
    plan = make_plan(loss, params, batch, limit)
    print(plan)

    count = sum(x.size for x in jax.tree.leaves(params))
    title = (
        f"{count / 1e6:.1f}M parameters, AdamW, {options.batch_size} sequences of "
        f"{sizes['length']} tokens; {setting()}"
    )
    if options.markdown:
        write_markdown(plan, title, options.markdown)
    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7, 4))
    draw(plan, axes)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, title, options.picture)


if __name__ == "__main__":
    main(sys.argv[1:])
