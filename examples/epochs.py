"""Epochs that end inside a window, and metrics per update.

    python examples/epochs.py

A small network learns scikit-learn's digits from micro-batches of 32 images, four to a
window. The 1480 training images are no multiple of anything: an epoch is 47
micro-batches, of which the last holds 8 images, and so its twelfth window has only
three. Two ways train as global batches do, with the same parameters and the same log:

* `with_boundaries` closes the epoch's last window where the epoch ends, and `weight`
  says how many images each mean was taken over;
* the same with the last micro-batch padded to 32, where the padding has no weight. It
  has the shape of the others, and saves compiling the step for another.

Four ways that are often seen do not: to divide the last window by four all the same, to
average means of 32 and of 8 images, to drop the last window, and to leave it open, so
that the next epoch fills it.

The example fails if one of the first two moves a parameter or a metric by more than
rounding does. With `--grain` the data come from a `grain` pipeline
(`pip install grain`).
"""

import argparse
import dataclasses
import functools
import itertools
import math
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from rich import box
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits

import optax_accum as oa

TRAINING_EXAMPLES = 1480  # of 1797; the rest is for testing
TOLERANCE = 1e-4  # what float32 may do to a parameter or a metric in this training

Batch = dict[str, np.ndarray]  # image: f32[B, 64], label: i32[B], valid: f32[B]
Pairs = Iterable[tuple[Batch, bool | None]]

METRICS = oa.accumulate(optax.identity())  # gives the metrics' means over a window


def init(seed: int, sizes: tuple[int, ...] = (64, 64, 10)) -> Any:
    """The parameters of a network with one hidden layer."""
    random = np.random.default_rng(seed)
    return [
        {
            "w": (random.normal(size=pair) / np.sqrt(pair[0])).astype(np.float32),
            "b": np.zeros(pair[1], np.float32),
        }
        for pair in itertools.pairwise(sizes)
    ]


def loss_and_metrics(params: Any, batch: Batch) -> tuple[jax.Array, Any]:
    """The mean cross-entropy over what is valid, and the metrics to log."""
    hidden, out = params
    x = jax.nn.gelu(batch["image"] @ hidden["w"] + hidden["b"])
    logits, labels = x @ out["w"] + out["b"], batch["label"]

    def mean(values):
        return (values * batch["valid"]).sum() / batch["valid"].sum()

    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    loss = mean(losses)
    return loss, {"loss": loss, "accuracy": mean(logits.argmax(-1) == labels)}


def num_valid(batch: Batch) -> Any:
    """How many examples a micro-batch's mean is taken over: its weight."""
    return jnp.sum(batch["valid"])


# --- The data: the same examples in the same order, however large the pieces ---


def load_data() -> tuple[Batch, Batch]:
    """Training and test set, shuffled once and for all."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    data = {
        "image": (digits.data[order] / 16).astype(np.float32),
        "label": digits.target[order].astype(np.int32),
        "valid": np.ones(len(order), np.float32),
    }
    n = TRAINING_EXAMPLES
    return {k: v[:n] for k, v in data.items()}, {k: v[n:] for k, v in data.items()}


def plain_epoch(data: Batch, size: int, seed: int) -> Iterator[Batch]:
    """An epoch in batches of `size`, the last of which may be smaller."""
    order = np.random.default_rng(seed).permutation(TRAINING_EXAMPLES)
    for start in range(0, TRAINING_EXAMPLES, size):
        yield {k: v[order[start : start + size]] for k, v in data.items()}


def grain_epoch(data: Batch, size: int, seed: int) -> Iterable[Batch]:
    """The same from a `grain` pipeline, in this process and without threads."""
    import grain  # noqa: PLC0415 - only who asks for it needs it

    examples = [{k: v[i] for k, v in data.items()} for i in range(TRAINING_EXAMPLES)]
    return (
        grain.MapDataset.source(examples)
        .shuffle(seed=seed)
        .batch(size, drop_remainder=False)
        .to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    )


def padded(batches: Iterable[Batch], size: int) -> Iterator[Batch]:
    """The batches, all of `size`: what is missing is zeros, `valid` among them."""
    for batch in batches:
        missing = size - len(batch["label"])
        yield {
            k: np.pad(v, [(0, missing)] + [(0, 0)] * (v.ndim - 1))
            for k, v in batch.items()
        }


# --- The training ---


@dataclasses.dataclass
class Run:
    """One way to treat the end of an epoch, and what became of it."""

    name: str
    tx: Any
    pairs: Callable[[Iterable[Batch]], Pairs]  # an epoch -> its (batch, boundary)
    weight: Callable[[Batch], Any] = num_valid
    size: int = 32
    is_exact: bool = False
    log: list[dict[str, float]] = dataclasses.field(default_factory=list)
    params: Any = None
    programs: set[tuple[int, bool | None]] = dataclasses.field(default_factory=set)


@functools.cache
def global_batch_step(tx: Any) -> Any:
    """Plain Optax, which the others are compared with."""

    @jax.jit
    def step(params, state, batch):
        gradient = jax.grad(loss_and_metrics, has_aux=True)
        grads, metrics = gradient(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, metrics

    return step


@functools.cache  # runs that differ in their data alone share their programs
def micro_batch_step(tx: Any, weight: Callable[[Batch], Any]) -> Any:
    """The same with two windows: one of gradients, one of metrics."""

    @functools.partial(jax.jit, static_argnames="boundary", donate_argnums=(0, 1, 2))
    def step(params, state, metrics_state, batch, boundary):
        gradient = jax.grad(loss_and_metrics, has_aux=True)
        grads, metrics = gradient(params, batch)
        params, state = tx.update_params(
            grads, state, params, weight=weight(batch), boundary=boundary
        )
        means, metrics_state = METRICS.update(
            metrics,
            metrics_state,
            weight=num_valid(batch),
            boundary=oa.has_updated(state) if boundary is None else boundary,
        )
        return params, state, metrics_state, means

    return step


def train_on_global_batches(run: Run, params: Any, epochs: Iterable) -> None:
    state = run.tx.init(params)
    for batches in epochs:
        for batch in batches:
            step = global_batch_step(run.tx)
            params, state, metrics = step(params, state, batch)
            run.log.append(metrics)
            run.programs.add((len(batch["label"]), None))
    run.params = params


def train_on_micro_batches(run: Run, params: Any, epochs: Iterable) -> None:
    step = micro_batch_step(run.tx, run.weight)
    params = jax.tree.map(jnp.array, params)
    state = run.tx.init(params)
    metrics_state = METRICS.init({"loss": jnp.zeros([]), "accuracy": jnp.zeros([])})
    for batches in epochs:
        for batch, boundary in run.pairs(batches):
            params, state, metrics_state, means = step(
                params, state, metrics_state, batch, boundary
            )
            # A Python bool is known here already; only who has none waits for the
            # device. The metrics stay there until they are printed.
            if oa.has_updated(state) if boundary is None else boundary:
                run.log.append(means)
            run.programs.add((len(batch["label"]), boundary))
    run.params = params


def make_runs(options: argparse.Namespace) -> list[Run]:
    k, size = options.every_k, options.micro_batch
    updates = math.ceil(math.ceil(TRAINING_EXAMPLES / size) / k) * options.epochs
    inner = optax.sgd(optax.cosine_decay_schedule(0.1, updates), momentum=0.9)
    close_the_last = functools.partial(oa.with_boundaries, every_k=k)

    def pad_and_close(batches):
        return close_the_last(padded(batches, size))

    def drop_the_last(batches):
        whole = TRAINING_EXAMPLES // size // k * k
        return close_the_last(itertools.islice(batches, whole))

    def leave_open(batches):
        return ((batch, None) for batch in batches)

    def run(name, tx, pairs, **settings):
        return Run(name, tx, pairs, size=size, **settings)

    window = oa.accumulate(inner)
    over_k = oa.accumulate(optax.chain(optax.scale(1 / k), inner), reduction="sum")
    runs = [
        Run("global batches", inner, leave_open, size=size * k, is_exact=True),
        run("with_boundaries, weights", window, close_the_last, is_exact=True),
        run("the same, padded", window, pad_and_close, is_exact=True),
        run("last window divided by k", over_k, close_the_last),
        run("means of unequal means", window, close_the_last, weight=lambda _: 1),
        run("last window dropped", window, drop_the_last),
        run("last window left open", oa.accumulate(inner, k), leave_open),
    ]
    return runs[:4] if options.quick else runs


def largest_difference(a: Any, b: Any) -> float:
    """The largest absolute difference between two trees."""
    differences = jax.tree.map(lambda x, y: np.abs(np.asarray(x) - y).max(), a, b)
    return float(max(jax.tree.leaves(differences)))


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--epochs", type=int, default=10)
    add("--micro-batch", type=int, default=32, help="examples (default: 32)")
    add("--every-k", type=int, default=4, help="micro-batches (default: 4)")
    add("--grain", action="store_true", help="take the data from a grain pipeline")
    add("--seed", type=int, default=0)
    add("--quick", action="store_true", help="three epochs, four ways")
    options = parser.parse_args(arguments)
    if options.quick:
        options.epochs = 3
    if not 2 <= options.every_k * options.micro_batch <= TRAINING_EXAMPLES:
        parser.error(f"a window must hold 2 to {TRAINING_EXAMPLES} examples")
    return options


def main(arguments: list[str]) -> int:
    options = parse_arguments(arguments)
    console = Console(highlight=False)
    data, test_data = load_data()
    params = init(options.seed)
    epoch = grain_epoch if options.grain else plain_epoch
    runs = make_runs(options)
    for run in runs:
        epochs = (epoch(data, run.size, seed) for seed in range(options.epochs))
        is_global = run is runs[0]
        train = train_on_global_batches if is_global else train_on_micro_batches
        train(run, params, epochs)

    reference, closed, *_ = runs
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    table.add_column("the end of an epoch", no_wrap=True)
    for heading in ("updates", "programs", "test\nloss", "parameters'\ndifference"):
        table.add_column(heading, justify="right", no_wrap=True)
    for run in runs:
        loss, _ = loss_and_metrics(run.params, test_data)
        table.add_row(
            run.name,
            str(len(run.log)),
            str(len(run.programs)),
            f"{loss:.4f}",
            f"{largest_difference(run.params, reference.params):.1e}",
        )
    console.print(table)

    table = Table(box=box.SIMPLE_HEAD, padding=0)
    headings = ("update", "loss", "accuracy", "the global\nbatch's loss", "accuracy")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    logs = list(zip(closed.log, reference.log, strict=True))
    for i, both in list(enumerate(logs, start=1))[-3:]:
        cells = [(f"{m['loss']:.6f}", f"{100 * m['accuracy']:.2f} %") for m in both]
        table.add_row(str(i), *cells[0], *cells[1])
    console.print(table)

    exact = [run for run in runs if run.is_exact]
    parameters = max(largest_difference(r.params, reference.params) for r in exact)
    metrics = max(largest_difference(r.log, reference.log) for r in exact)
    summary = (
        f"Closed windows moved no parameter by more than {parameters:.1e}, and no "
        f"metric by more than {metrics:.1e}; {TOLERANCE:.0e} is allowed."
    )
    is_right = max(parameters, metrics) <= TOLERANCE
    console.print(summary if is_right else f"[red]FAILED: {summary}")
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
