"""A character language model, whose batches hold different numbers of tokens.

    python examples/char_lm.py

A small decoder-only transformer in Flax NNX learns the paragraphs of Python's language
reference, which comes with Python (`pydoc_data.topics`). They are short and long; a
batch pads them, and its loss is the mean over the tokens that are not padding. The same
training, several times:

* global batch: `jax.value_and_grad`, a whole batch at once;
* micro-batches of several sizes: `optax_accum.value_and_grad`, which is told with
  `weight=` how many tokens each of them holds;
* mean of means: the same without `weight=`, so that a micro-batch with few tokens
  counts as much as one with many. This is the mistake that the example is about.

The first two end with the same parameters, up to the rounding of float32, which is
measured too, by a run on global batches in float64. The example fails if micro-batches
move a parameter by more than three times what float32 itself does, or if the mean of
means does not.

With `--memory-limit 20`, in MiB, the size of the micro-batches is not given but
planned: the largest whose step fits, as the compiler says before anything runs.

Accumulation is all in `make_step`; the rest is an ordinary training loop.
"""

import argparse
import dataclasses
import functools
import pydoc_data.topics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
from flax import nnx
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import optax_accum as oa

FLOAT32_MARGIN = 3  # times the distance between the float32 and the float64 run
TEST_PARAGRAPHS = 128
PADDING = 0

Batch = dict[str, np.ndarray]  # "tokens" i32[B, T + 1] and "valid" f32[B, T]


class Block(nnx.Module):
    """Attention to what came before, and a dense layer."""

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        """Makes the parameters."""
        self.heads = heads
        self.attention_norm = nnx.LayerNorm(width, rngs=rngs)
        self.qkv = nnx.Linear(width, 3 * width, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(width, width, use_bias=False, rngs=rngs)
        self.dense_norm = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``f32[B, T, width]`` to the same."""
        q, k, v = jnp.split(self.qkv(self.attention_norm(x)), 3, axis=-1)
        q, k, v = (a.reshape(*a.shape[:2], self.heads, -1) for a in (q, k, v))
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.reshape(x.shape))
        return x + self.down(nnx.gelu(self.up(self.dense_norm(x))))


class Decoder(nnx.Module):
    """Predicts every character from those before it."""

    def __init__(
        self, vocabulary: int, length: int, width: int, layers: int, *, rngs: nnx.Rngs
    ):
        """Makes the parameters."""
        self.embedding = nnx.Embed(vocabulary, width, rngs=rngs)
        self.position = nnx.Embed(length, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, 4, rngs=rngs) for _ in range(layers)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps tokens ``i32[B, T]`` to logits ``f32[B, T, vocabulary]``."""
        x = self.embedding(tokens) + self.position(jnp.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.embedding.attend(self.norm(x))


def mean_over_tokens(graphdef: Any, params: Any, batch: Batch) -> jax.Array:
    """The mean cross-entropy over the tokens that are not padding."""
    tokens = batch["tokens"]
    logits = nnx.merge(graphdef, params)(tokens[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
    return jnp.sum(losses * batch["valid"]) / jnp.maximum(
        count_tokens(params, batch), 1
    )


def count_tokens(params: Any, batch: Batch) -> jax.Array:
    """What `mean_over_tokens` averages over: the weight of a micro-batch."""
    del params
    return jnp.sum(batch["valid"])


@dataclasses.dataclass
class Run:
    """One training: how it computes its gradient, and what became of it."""

    name: str
    microbatch_size: int | None = None  # None: the whole batch at once
    weight: Callable[..., Any] | None = count_tokens
    dtype: Any = np.float32
    losses: list[float] = dataclasses.field(default_factory=list)
    test_losses: list[float] = dataclasses.field(default_factory=list)
    params: Any = None
    seconds: float = 0.0
    temporaries: int = 0


def make_step(run: Run, loss: Callable, tx: optax.GradientTransformation) -> Callable:
    """``(params, state, batch) -> (params, state, loss)`` as `run` wants it."""
    if run.microbatch_size is None:
        value_and_grad = jax.value_and_grad(loss)
    else:
        value_and_grad = oa.value_and_grad(
            loss, microbatch_size=run.microbatch_size, weight=run.weight
        )

    def step(params, state, batch):
        value, grads = value_and_grad(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


def load_paragraphs(length: int) -> tuple[Batch, int]:
    """All paragraphs, cut at `length` characters and padded; and the vocabulary."""
    text = [
        paragraph
        for topic in pydoc_data.topics.topics.values()
        for paragraph in topic.split("\n\n")
        if len(paragraph) > 1
    ]
    characters = sorted(set("".join(text)))
    codes = {c: code for code, c in enumerate(characters, start=PADDING + 1)}
    tokens = np.full((len(text), length + 1), PADDING, np.int32)
    for row, paragraph in zip(tokens, text, strict=True):
        known = [codes[c] for c in paragraph[: length + 1]]
        row[: len(known)] = known
    order = np.random.default_rng(0).permutation(len(tokens))
    tokens = tokens[order]
    valid = (tokens[:, 1:] != PADDING).astype(np.float32)
    return {"tokens": tokens, "valid": valid}, len(characters) + 1


def take(paragraphs: Batch, indices: Any) -> Batch:
    return {name: array[indices] for name, array in paragraphs.items()}


def make_optimizer(options: argparse.Namespace) -> optax.GradientTransformation:
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, options.learning_rate, options.steps // 10 + 1, options.steps + 1
    )
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))


def plan(
    model: Decoder, options: argparse.Namespace, paragraphs: Batch
) -> oa.diagnose.MicrobatchPlan:
    """The fewest micro-batches whose step fits into the limit."""
    graphdef, params = nnx.split(model)
    loss = functools.partial(mean_over_tokens, graphdef)
    tx = make_optimizer(options)

    def step_in(micro_batches: int) -> Callable:
        run = Run("", options.batch_size // micro_batches)
        return jax.jit(make_step(run, loss, tx), donate_argnums=(0, 1))

    return oa.diagnose.plan_microbatches(
        step_in,
        params,
        jax.eval_shape(tx.init, params),
        take(paragraphs, slice(options.batch_size)),
        batch_size=options.batch_size,
        memory_limit=int(options.memory_limit * 2**20),
    )


def train(
    run: Run,
    model: Decoder,
    options: argparse.Namespace,
    paragraphs: Batch,
    advance: Callable[[], None],
) -> None:
    """Trains, and fills in what `run` is to hold."""
    graphdef, params = nnx.split(model)
    params = jax.tree.map(lambda x: jnp.array(x, run.dtype), params)
    paragraphs = paragraphs | {"valid": paragraphs["valid"].astype(run.dtype)}
    loss = functools.partial(mean_over_tokens, graphdef)
    tx = make_optimizer(options)
    state = tx.init(params)

    random = np.random.default_rng(options.seed)
    train_size = len(paragraphs["tokens"]) - TEST_PARAGRAPHS
    batches = random.integers(train_size, size=(options.steps, options.batch_size))
    program = (
        jax.jit(make_step(run, loss, tx), donate_argnums=(0, 1))
        .lower(params, state, take(paragraphs, batches[0]))
        .compile()
    )
    memory: Any = program.memory_analysis()
    run.temporaries = memory.temp_size_in_bytes
    held_out = take(paragraphs, slice(train_size, None))
    test_loss = jax.jit(loss)
    for update, indices in enumerate(batches, start=1):
        start = time.perf_counter()
        params, state, value = program(params, state, take(paragraphs, indices))
        run.losses.append(float(value))
        run.seconds += time.perf_counter() - start
        if update % options.test_every == 0:
            run.test_losses.append(float(test_loss(params, held_out)))
        advance()
    run.params = params


def largest_difference(a: Any, b: Any) -> float:
    """The largest absolute difference between two trees."""
    differences = jax.tree.map(lambda x, y: np.abs(np.asarray(x) - y).max(), a, b)
    return float(max(jax.tree.leaves(differences)))


def draw(runs: list[Run], every: int, path: Path) -> None:
    """How well the runs predict, and how far what they log is from the global batch."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415 - after the choice of backend

    reference, *micro, means, exact = runs
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    colors = ["#1a73e8", "#34a853", "#12b5cb", "#f29900"]
    updates = every * np.arange(1, len(reference.test_losses) + 1)
    late = slice(len(updates) // 3, None)  # the first updates would hide the rest

    def plot_test_loss(run, **style):
        left.plot(updates[late], run.test_losses[late], label=run.name, **style)

    plot_test_loss(reference, color="#9aa0a6", lw=7)
    for i, (run, color) in enumerate(zip(micro, colors, strict=False)):
        plot_test_loss(run, color=color, lw=2.5, ls=(3 * i, (3, 6)))
    plot_test_loss(means, color="#d93025", lw=2)
    left.set(title="Loss per token on the test paragraphs", ylabel="loss")
    pairs = zip(
        [exact, *micro, means],
        ["#9aa0a6", *colors[: len(micro)], "#d93025"],
        strict=True,
    )
    for run, color in pairs:
        distance = np.abs(np.array(run.losses) - reference.losses)
        right.plot(np.maximum(distance, 1e-8), color=color, lw=1, label=run.name)
    right.set(
        title="The logged loss: distance from the global batch",
        ylabel="difference",
        yscale="log",
    )
    for axis in (left, right):
        axis.set_xlabel("update")
        axis.legend(frameon=False, fontsize="small")
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--steps", type=int, default=100)
    add("--batch-size", type=int, default=32, help="paragraphs (default: 32)")
    add(
        "--microbatch-sizes",
        type=int,
        nargs="+",
        default=[16, 5, 1],
        help="paragraphs to a micro-batch (default: 16 5 1, at most 4)",
    )
    add("--memory-limit", type=float, help="MiB: plan the size of the micro-batches")
    add("--length", type=int, default=128, help="longest paragraph (default: 128)")
    add("--test-every", type=int, default=10, help="updates (default: 10)")
    add("--width", type=int, default=64)
    add("--layers", type=int, default=2)
    add("--learning-rate", type=float, default=1e-2)
    add("--seed", type=int, default=0)
    add("--picture", type=Path, default=Path("out/char_lm.png"))
    add("--quick", action="store_true", help="fifteen steps, paragraphs cut at 48")
    options = parser.parse_args(arguments)
    if options.quick:
        options.steps, options.length, options.test_every = 15, 48, 5
    if not all(1 <= m <= options.batch_size for m in options.microbatch_sizes):
        parser.error("--microbatch-sizes must be between 1 and --batch-size")
    if len(options.microbatch_sizes) > 4:
        parser.error("--microbatch-sizes: at most four fit in the picture")
    return options


def main(arguments: list[str]) -> int:
    options = parse_arguments(arguments)
    console = Console()
    paragraphs, vocabulary = load_paragraphs(options.length)
    model = Decoder(
        vocabulary,
        options.length,
        options.width,
        options.layers,
        rngs=nnx.Rngs(options.seed),
    )
    if options.memory_limit:
        planned = plan(model, options, paragraphs)
        console.print(str(planned), highlight=False, soft_wrap=True)
        options.microbatch_sizes = [options.batch_size // planned.num_microbatches]
    # There is no mean of means of a single one.
    smallest = min(*options.microbatch_sizes, options.batch_size // 2)
    runs = [
        Run("global batch"),
        *(Run(f"micro-batches of {m}", m) for m in options.microbatch_sizes),
        Run(f"mean of means of {smallest}", smallest, weight=None),
        Run("global batch in float64", dtype=np.float64),
    ]
    with Progress(console=console, transient=True) as progress:
        for run in runs:
            task = progress.add_task(run.name, total=options.steps)
            advance = functools.partial(progress.advance, task)
            with jax.enable_x64(run.dtype is np.float64):
                train(run, model, options, paragraphs, advance)

    reference, *micro, means, exact = runs
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    table.add_column("run", no_wrap=True)
    for heading in (
        "micro-\nbatches",
        "logged\nloss",
        "test\nloss",
        "parameters'\ndifference",
        "ms per\nupdate",
        "temporary\nMB",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for run in runs:
        table.add_row(
            run.name,
            str(-(-options.batch_size // (run.microbatch_size or options.batch_size))),
            f"{run.losses[-1]:.4f}",
            f"{run.test_losses[-1]:.4f}",
            f"{largest_difference(run.params, reference.params):.1e}",
            f"{1e3 * run.seconds / options.steps:.0f}",
            f"{run.temporaries / 1e6:.1f}",
        )
    console.print(table)
    draw(runs, options.test_every, options.picture)
    console.print(f"The curves are in {options.picture}", highlight=False)

    tolerance = FLOAT32_MARGIN * largest_difference(exact.params, reference.params)
    worst = max(largest_difference(r.params, reference.params) for r in micro)
    wrong = largest_difference(means.params, reference.params)
    summary = (
        f"micro-batches moved a parameter by up to {worst:.1e}, the mean of means by "
        f"{wrong:.1e}; float32 explains {tolerance:.1e}."
    )
    if worst <= tolerance < wrong:
        console.print(f"Against the global batch, {summary}", highlight=False)
        return 0
    console.print(f"[red]FAILED: {summary}")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
