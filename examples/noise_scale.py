"""How large should the batch be? Digits, and windows that follow the noise.

    python examples/noise_scale.py

A small network learns scikit-learn's digits (1797 images of 8 x 8, which come with the
package) from micro-batches of 8 images. `accumulate` measures the noise scale as a
by-product, and `adaptive_k` gives every window as many micro-batches as make the global
batch as large: two at the start, where all images say the same, and more and more.

The measurement is checked: now and then the true noise scale is computed from the
gradients of all training images, one by one. The example fails if the measured one is
off by more than a factor of two, in the median, or if the network does not learn.

What it takes to measure is in `make_step`; the rest is an ordinary training loop.
"""

import argparse
import functools
import itertools
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
from rich import box
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

import optax_accum as oa

TRAINING_EXAMPLES = 1480  # of 1797; the rest is for testing
MEASURED_OVER = 0.9  # the decay of the averages: about ten updates

Batch = tuple[np.ndarray, np.ndarray]


class Row(NamedTuple):
    """What was seen after one update."""

    examples: int
    loss: float
    signal: float
    noise: float
    noise_scale: float
    k: int


class Check(NamedTuple):
    """The true noise scale between two updates, and the test images."""

    update: int
    noise_scale: float
    accuracy: float


def init(key: jax.Array, sizes: tuple[int, ...] = (64, 64, 10)) -> Any:
    """The parameters of a network with one hidden layer."""
    layers = list(itertools.pairwise(sizes))
    return [
        {"w": jax.random.normal(k, pair) / np.sqrt(pair[0]), "b": jnp.zeros(pair[1])}
        for k, pair in zip(jax.random.split(key, len(layers)), layers, strict=True)
    ]


def predict(params: Any, images: Any) -> jax.Array:
    """Logits ``f32[B, 10]`` for images ``f32[B, 64]``."""
    hidden, out = params
    return jax.nn.gelu(images @ hidden["w"] + hidden["b"]) @ out["w"] + out["b"]


def mean_loss(params: Any, batch: Batch) -> jax.Array:
    """The mean cross-entropy over a batch."""
    images, labels = batch
    logits = predict(params, images)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def make_step(tx: Any) -> Any:
    """``(params, state, micro_batch) -> (params, state)``, compiled once for all k."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, batch):
        loss, grads = jax.value_and_grad(mean_loss)(params, batch)
        return tx.update_params(grads, state, params, weight=len(batch[1]), value=loss)

    return step


@jax.jit
def true_noise_scale(params: Any, data: Batch) -> jax.Array:
    """From the gradients of all examples, which no training could afford."""

    def gradient(image, label):
        grads = jax.grad(mean_loss)(params, (image[None], label[None]))
        return jnp.concatenate([x.ravel() for x in jax.tree.leaves(grads)])

    grads = jax.vmap(gradient)(*data)
    mean = grads.mean(0)
    covariance_trace = ((grads - mean) ** 2).sum(-1).mean()
    return covariance_trace / (mean**2).sum()


def load_data() -> tuple[Batch, Batch]:
    """Training and test set, shuffled once and for all."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    images = (digits.data[order] / 16).astype(np.float32)
    labels = digits.target[order].astype(np.int32)
    n = TRAINING_EXAMPLES
    return (images[:n], labels[:n]), (images[n:], labels[n:])


def train(options: argparse.Namespace) -> tuple[list[Row], list[Check]]:
    """Trains, and returns what was seen."""
    data, test_data = load_data()
    random = np.random.default_rng(options.seed)
    every_k = oa.noise.adaptive_k(2, options.max_k)
    inner = optax.sgd(options.learning_rate)
    tx = oa.accumulate(inner, every_k, noise_decay=MEASURED_OVER)
    params = init(jax.random.key(options.seed))
    state = tx.init(params)
    step = make_step(tx)

    rows: list[Row] = []
    checks: list[Check] = []
    examples = 0
    while len(rows) < options.updates:
        # Drawn with replacement: what is measured supposes that examples are
        # independent, and a window may be as large as a good part of the data.
        chosen = random.integers(TRAINING_EXAMPLES, size=options.micro_batch)
        params, state = step(params, state, (data[0][chosen], data[1][chosen]))
        examples += options.micro_batch
        if not oa.has_updated(state):
            continue
        scale = oa.noise.estimate(state)
        rows.append(
            Row(
                examples,
                float(state.window.value / state.window.weight),
                float(scale.signal),
                float(scale.noise),
                float(scale.batch_size),
                int(state.noise.k),
            )
        )
        if len(rows) % options.check_every == 0:
            right = predict(params, test_data[0]).argmax(-1) == test_data[1]
            truth = float(true_noise_scale(params, data))
            checks.append(Check(len(rows), truth, float(right.mean())))
    return rows, checks


def draw(rows: list[Row], checks: list[Check], size: int, path: Path) -> None:
    """The noise scale, measured and true, and the batch that follows it."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415 - after the choice of backend

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8))
    updates = np.arange(1, len(rows) + 1)
    scales = np.array([r.noise_scale for r in rows])
    measured = np.where(scales > 0, scales, np.nan)
    left.plot(updates, measured, color="#1a73e8", lw=1.2, label="noise scale, measured")
    left.step(
        updates,
        [size * r.k for r in rows],
        where="post",
        color="#f29900",
        lw=2,
        label="global batch chosen",
    )
    left.plot(
        [c.update for c in checks],
        [c.noise_scale for c in checks],
        "o",
        color="#202124",
        ms=4,
        label="noise scale from all examples",
    )
    left.set(title="The batch follows the noise", ylabel="examples", yscale="log")
    right.plot(updates, [r.noise for r in rows], color="#d93025", label="noise, tr Σ")
    signal = np.array([r.signal for r in rows])
    signal = np.where(signal > 0, signal, np.nan)
    right.plot(updates, signal, color="#34a853", label="signal, ‖G‖²")
    right.set(title="What it is made of", yscale="log")
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
    add("--updates", type=int, default=300)
    add("--micro-batch", type=int, default=8, help="examples (default: 8)")
    add("--max-k", type=int, default=256, help="micro-batches (default: 256)")
    add("--check-every", type=int, default=30, help="updates (default: 30)")
    add("--learning-rate", type=float, default=0.1)
    add("--seed", type=int, default=0)
    add("--picture", type=Path, default=Path("out/noise_scale.png"))
    add("--quick", action="store_true", help="a hundred updates")
    options = parser.parse_args(arguments)
    if options.quick:
        options.updates, options.check_every = 100, 10
    return options


def main(arguments: list[str]) -> int:
    options = parse_arguments(arguments)
    rows, checks = train(options)

    console = Console()
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    for heading in (
        "update",
        "examples\nso far",
        "loss",
        "test\naccuracy",
        "signal",
        "noise",
        "noise scale\nmeasured",
        "noise scale\ntrue",
        "next\nk",
    ):
        table.add_column(heading, justify="right", no_wrap=True)
    for check in checks:
        row = rows[check.update - 1]
        table.add_row(
            str(check.update),
            str(row.examples),
            f"{row.loss:.3f}",
            f"{100 * check.accuracy:.1f} %",
            f"{row.signal:.4f}",
            f"{row.noise:.2f}",
            f"{row.noise_scale:.0f}",
            f"{check.noise_scale:.0f}",
            str(row.k),
        )
    console.print(table)
    draw(rows, checks, options.micro_batch, options.picture)
    console.print(f"The curves are in {options.picture}", highlight=False)

    ratio = statistics.median(
        rows[c.update - 1].noise_scale / c.noise_scale for c in checks
    )
    accuracy = checks[-1].accuracy
    summary = (
        f"the measured noise scale was {ratio:.2f} times the true one (median of "
        f"{len(checks)}), and the network knows {100 * accuracy:.0f} % of the test "
        "images."
    )
    if 0.5 <= ratio <= 2 and accuracy > 0.85:
        console.print(f"With k from 2 to {max(r.k for r in rows)}, {summary}")
        return 0
    console.print(f"[red]FAILED: {summary}")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
