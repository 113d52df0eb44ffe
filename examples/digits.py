"""Handwritten digits, trained once on global batches and twice on micro-batches.

    python examples/digits.py

The same network, data order, optimizer (AdamW, a schedule, clipping) and number of
updates, three times:

* global batch: plain Optax, a whole batch at once;
* equal micro-batches: every batch in `--micro-batches` equal parts, and the window
  closes by count;
* ragged micro-batches: parts of a fixed size, so that the epoch's last batch, which is
  smaller, ends in a short part and is closed early.

All three end with the same parameters, up to the rounding of float32. What that
rounding does to a training is measured too: by a fourth run, on global batches in
float64. The example fails if micro-batches move a parameter by more than three times
what float32 itself does.

With `--memory-limit 3`, in MiB, the number of micro-batches is not given but planned:
the fewest whose step fits, as the compiler says before anything runs.

The data are scikit-learn's scans of handwritten digits, 1797 images of 8 x 8 pixels
that come with the package. Accumulation is all in `micro_batch_step`; the rest is an
ordinary training loop.
"""

import argparse
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits

import optax_accum as oa

TRAINING_EXAMPLES = 1480  # of 1797; the rest is for testing
FLOAT32_MARGIN = 3  # times the distance between the float32 and the float64 run

Batch = tuple[np.ndarray, np.ndarray]


class Network(nn.Module):
    """Two convolutions and two dense layers, 0.14M parameters.

    With GELU, because a rounding that flips a ReLU moves a gradient by more than the
    rounding; then float32 alone would take two runs far apart.
    """

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps images ``f32[B, 8, 8, 1]`` to logits ``f32[B, 10]``."""
        x = nn.gelu(nn.Conv(16, (3, 3))(images))
        x = nn.gelu(nn.Conv(32, (3, 3))(x))
        x = x.reshape(x.shape[0], -1)
        return nn.Dense(10)(nn.gelu(nn.Dense(64)(x)))


def predict(params: Any, images: jax.typing.ArrayLike) -> jax.Array:
    """The network's logits."""
    return jnp.asarray(Network().apply({"params": params}, images))


def mean_loss(params: Any, batch: Batch) -> jax.Array:
    """The mean cross-entropy over a batch."""
    images, labels = batch
    logits = predict(params, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def global_batch_step(tx, params, state, batch):
    """Plain Optax: one gradient, one update."""
    loss, grads = jax.value_and_grad(mean_loss)(params, batch)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss


def micro_batch_step(tx, params, state, batch, *, boundary):
    """The same with a part of the batch: it says how many examples it averaged over."""
    loss, grads = jax.value_and_grad(mean_loss)(params, batch)
    params, state = tx.update_params(
        grads, state, params, weight=len(batch[1]), boundary=boundary, value=loss
    )
    window = state.window
    return params, state, window.value / window.weight  # its mean loss so far


@dataclasses.dataclass
class Run:
    """One training: how it splits its batches, and what became of it."""

    name: str
    split: Callable[[np.ndarray], list[np.ndarray]]  # a batch's indices -> the parts'
    micro: bool = True
    dtype: Any = np.float32
    losses: list[float] = dataclasses.field(default_factory=list)
    accuracies: list[float] = dataclasses.field(default_factory=list)
    params: Any = None
    seconds: float = 0.0
    temporaries: int = 0


def load_data() -> tuple[Batch, Batch]:
    """Training and test set, shuffled once and for all."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = (digits.images[order, ..., None] / 16).astype(np.float32)
    labels = digits.target[order].astype(np.int32)
    n = TRAINING_EXAMPLES
    return (images[:n], labels[:n]), (images[n:], labels[n:])


def global_batches(options: argparse.Namespace) -> Iterator[list[np.ndarray]]:
    """For every epoch its batches, the same ones in every run."""
    random = np.random.default_rng(options.seed)
    for _ in range(options.epochs):
        order = random.permutation(TRAINING_EXAMPLES)
        yield [
            order[start : start + options.batch_size]
            for start in range(0, TRAINING_EXAMPLES, options.batch_size)
        ]


def make_optimizer(options: argparse.Namespace) -> optax.GradientTransformation:
    batches = -(-TRAINING_EXAMPLES // options.batch_size)
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, options.learning_rate, batches, batches * (options.epochs + 1)
    )
    return optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=1e-2)
    )


def plan(options: argparse.Namespace, params: Any) -> oa.diagnose.MicrobatchPlan:
    """The fewest micro-batches, of all equal sizes, whose step fits into the limit."""
    batch_size = options.batch_size

    def lowered(micro_batches: int) -> Any:
        tx = oa.accumulate(make_optimizer(options), micro_batches)
        state = jax.eval_shape(tx.init, params)
        size = batch_size // micro_batches
        images = jax.ShapeDtypeStruct((size, 8, 8, 1), np.float32)
        batch = images, jax.ShapeDtypeStruct((size,), np.int32)
        step = functools.partial(micro_batch_step, tx, boundary=None)
        return jax.jit(step, donate_argnums=(0, 1)).lower(params, state, batch)

    return oa.diagnose.plan_microbatches(
        lowered,
        batch_size=batch_size,
        candidates=[k for k in range(2, batch_size + 1) if batch_size % k == 0],
        memory_limit=int(options.memory_limit * 2**20),
    )


def train(
    run: Run,
    params: Any,
    options: argparse.Namespace,
    data: Batch,
    test_data: Batch,
    advance: Callable[[], None],
) -> None:
    """Trains, and fills in what `run` is to hold."""
    tx: Any = make_optimizer(options)
    if run.micro:
        tx = oa.accumulate(tx, options.micro_batches)
    params = jax.tree.map(lambda x: jnp.array(x, run.dtype), params)
    state = tx.init(params)
    programs: dict[tuple, Any] = {}

    def program(batch: Batch, boundary: bool | None):
        """The step compiled for this size, so that no clock sees it compile."""
        key = len(batch[1]), boundary
        if key not in programs:
            step = functools.partial(global_batch_step, tx)
            if run.micro:
                step = functools.partial(micro_batch_step, tx, boundary=boundary)
            lowered = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, batch)
            programs[key] = lowered.compile()
        return programs[key]

    @jax.jit
    def accuracy(params, batch):
        return (predict(params, batch[0]).argmax(-1) == batch[1]).mean()

    for batches in global_batches(options):
        for indices in batches:
            parts = run.split(indices)
            for i, part in enumerate(parts):
                batch = data[0][part].astype(run.dtype), data[1][part]
                # The count closes whole windows; the short one at the end of an epoch
                # is closed here.
                is_early = i + 1 == len(parts) < options.micro_batches
                step = program(batch, True if is_early else None)
                start = time.perf_counter()
                params, state, loss = step(params, state, batch)
                loss.block_until_ready()
                run.seconds += time.perf_counter() - start
            run.losses.append(float(loss))
        run.accuracies.append(float(accuracy(params, test_data)))
        advance()
    run.params = params
    run.temporaries = max(
        p.memory_analysis().temp_size_in_bytes for p in programs.values()
    )


def largest_difference(a: Any, b: Any) -> float:
    """The largest absolute difference between two trees."""
    differences = jax.tree.map(lambda x, y: np.abs(np.asarray(x) - y).max(), a, b)
    return float(max(jax.tree.leaves(differences)))


def draw(runs: list[Run], path: Path) -> None:
    """The runs' losses, which lie on one another, and how far they are apart."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415 - after the choice of backend

    reference, equal, ragged, exact = runs
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    left.plot(reference.losses, color="#9aa0a6", lw=5, label=reference.name)
    left.plot(equal.losses, color="#1a73e8", lw=2, ls="--", label=equal.name)
    left.plot(ragged.losses, color="#d93025", lw=2, ls=":", label=ragged.name)
    left.set(title="Three runs, one curve", ylabel="loss of the global batch")
    for run, color in (exact, "#9aa0a6"), (equal, "#1a73e8"), (ragged, "#d93025"):
        distance = np.abs(np.array(run.losses) - reference.losses)
        right.plot(np.maximum(distance, 1e-9), color=color, label=run.name)
    right.set(
        title="Distance from the global batch",
        ylabel="difference of the losses",
    )
    for axis in (left, right):
        axis.set(xlabel="update", yscale="log")
        axis.legend(frameon=False)
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
    add("--epochs", type=int, default=15)
    add("--batch-size", type=int, default=256, help="the global batch (default: 256)")
    add("--micro-batches", type=int, default=8, help="to a window (default: 8)")
    add("--memory-limit", type=float, help="MiB: plan the number of micro-batches")
    add("--learning-rate", type=float, default=3e-3)
    add("--seed", type=int, default=0)
    add("--picture", type=Path, default=Path("out/digits.png"))
    add("--quick", action="store_true", help="three epochs")
    options = parser.parse_args(arguments)
    if options.quick:
        options.epochs = 3
    if not 2 <= options.micro_batches <= options.batch_size:
        parser.error("--micro-batches must be between 2 and --batch-size")
    return options


def main(arguments: list[str]) -> int:
    options = parse_arguments(arguments)
    console = Console()
    data, test_data = load_data()
    params = Network().init(jax.random.key(options.seed), data[0][:1])["params"]
    if options.memory_limit:
        planned = plan(options, params)
        console.print(str(planned), highlight=False, soft_wrap=True)
        options.micro_batches = planned.num_microbatches
    k, size = options.micro_batches, -(-options.batch_size // options.micro_batches)

    def whole(indices):
        return [indices]

    def parts_of_size(indices):
        return np.split(indices, range(size, len(indices), size))

    runs = [
        Run("global batch", whole, micro=False),
        Run(f"{k} equal micro-batches", lambda indices: np.array_split(indices, k)),
        Run(f"micro-batches of {size}, ragged", parts_of_size),
        Run("global batch in float64", whole, micro=False, dtype=np.float64),
    ]
    with Progress(console=console, transient=True) as progress:
        for run in runs:
            task = progress.add_task(run.name, total=options.epochs)
            advance = functools.partial(progress.advance, task)
            with jax.enable_x64(run.dtype is np.float64):
                train(run, params, options, data, test_data, advance)

    reference, *accumulated, exact = runs
    tolerance = FLOAT32_MARGIN * largest_difference(exact.params, reference.params)
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    table.add_column("run", no_wrap=True)
    for heading in ("test\naccuracy", "parameters'\ndifference", "s", "temporary\nKiB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for run in runs:
        table.add_row(
            run.name,
            f"{100 * run.accuracies[-1]:.1f} %",
            f"{largest_difference(run.params, reference.params):.1e}",
            f"{run.seconds:.1f}",
            f"{run.temporaries / 1024:.0f}",
        )
    console.print(table)
    draw(runs, options.picture)
    console.print(f"The curves are in {options.picture}", highlight=False)

    worst = max(largest_difference(r.params, reference.params) for r in accumulated)
    if not worst <= tolerance:
        console.print(
            f"[red]FAILED: micro-batches moved a parameter by {worst:.1e}; float32 "
            f"explains {tolerance:.1e}"
        )
        return 1
    console.print(
        f"Micro-batches moved no parameter by more than {worst:.1e}; float32 explains "
        f"{tolerance:.1e}.",
        highlight=False,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
