"""Train on documents of uneven lengths, in micro-batches of a fixed number of tokens.

    python examples/token_budget.py

The documents are paragraphs of Python's language reference, which comes with Python,
and the tokens are characters. Most paragraphs are short, and a few are very long: they
are cut to a row of 512 tokens. The same model trains twice on the same global batches,
in micro-batches of 2048 tokens:

* padded: every row has one paragraph, and padding;
* by budget: `oa.token_batches` packs several paragraphs into a row.

The numbers of tokens are the weights. So both runs make the update of the global batch,
the mean over all its tokens, and the parameters agree. The picture shows one global
batch in both forms, and the time of an update.
"""

import argparse
import functools
import math
import pydoc_data.topics
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import optax
from matplotlib.figure import Figure
from rich.progress import track

import optax_accum as oa

parser = argparse.ArgumentParser(
    description="Train on documents packed by oa.token_batches, and on padded ones.",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
)
parser.add_argument("--updates", type=int, default=15, help="updates of each run")
parser.add_argument("--batch-size", type=int, default=48, help="paragraphs per update")
parser.add_argument("--length", type=int, default=512, help="tokens per row")
parser.add_argument(
    "--max-tokens", type=int, default=2048, help="tokens per micro-batch"
)
parser.add_argument("--learning-rate", type=float, default=3e-3, help="for Adam")
parser.add_argument(
    "--quick", action="store_true", help="use a tiny model and 5 updates"
)
parser.add_argument(
    "--picture",
    type=Path,
    default="out/token_budget.svg",
    help="where to save the picture",
)
options = parser.parse_args()
updates, layers, width = (5, 1, 8) if options.quick else (options.updates, 2, 64)
VOCABULARY, HEADS = 128, 2

# --- The model: a causal transformer that knows where documents begin ---


def initial_params():
    random = np.random.default_rng(0)

    def matrix(*shape):
        return jnp.asarray(random.normal(size=shape) / shape[-2] ** 0.5, jnp.float32)

    def layer():
        return {
            "qkv": matrix(3, width, width),
            "out": matrix(width, width),
            "up": matrix(width, 4 * width),
            "down": matrix(4 * width, width),
        }

    return {
        "token": matrix(VOCABULARY, width),
        "position": matrix(options.length, width),
        "layers": [layer() for _ in range(layers)],
        "logits": matrix(width, VOCABULARY),
    }


def normalized(x):
    return jax.nn.standardize(x, epsilon=1e-5)


def predict(params, batch):
    """Logits ``[B, T, vocabulary]`` of the tokens that follow."""
    segments = batch["segments"]
    same_document = segments[:, None, :, None] == segments[:, None, None, :]
    x = params["token"][batch["tokens"]] + params["position"][batch["positions"]]
    for layer in params["layers"]:
        q, k, v = jnp.einsum("btc,ncd->nbtd", normalized(x), layer["qkv"]).reshape(
            3, *x.shape[:2], HEADS, width // HEADS
        )
        heads = jax.nn.dot_product_attention(
            q, k, v, mask=same_document, is_causal=True
        )
        x += heads.reshape(x.shape) @ layer["out"]
        x += jax.nn.gelu(normalized(x) @ layer["up"]) @ layer["down"]
    return normalized(x) @ params["logits"]


def is_target(batch):
    """Which tokens, from the second on, belong to the document of the one before."""
    segments = batch["segments"]
    return (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)


def loss_fn(params, batch):
    """The mean cross-entropy over the targets of a micro-batch."""
    logits, targets = predict(params, batch)[:, :-1], batch["tokens"][:, 1:]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.mean(losses, where=is_target(batch))


# --- The two ways to make micro-batches of a global batch ---


def padded(documents):
    """Every document in a row of its own."""
    num_rows = options.max_tokens // options.length
    positions = np.arange(options.length, dtype=np.int32)
    for start in range(0, len(documents), num_rows):
        tokens = np.zeros((num_rows, options.length), np.int32)
        segments = np.zeros_like(tokens)
        for row, document in enumerate(documents[start : start + num_rows]):
            tokens[row, : len(document)] = document
            segments[row, : len(document)] = 1
        yield {
            "tokens": tokens,
            "segments": segments,
            "positions": np.broadcast_to(positions, tokens.shape),
        }


def by_budget(documents):
    """Several documents in a row."""
    lengths = [len(document) for document in documents]
    plan = oa.token_batches(lengths, options.max_tokens, row_length=options.length)
    for batch in plan:
        yield {
            "tokens": batch.pack(documents),
            "segments": batch.segment_ids,
            "positions": batch.positions,
        }


def load_paragraphs():
    """Paragraphs ``i32[n]`` of ASCII codes, in a random order."""
    topics = pydoc_data.topics.topics.values()
    text = [p.encode("ascii", "replace") for t in topics for p in t.split("\n\n")]
    cut = [np.frombuffer(p[: options.length], np.uint8) for p in text if len(p) > 1]
    order = np.random.default_rng(0).permutation(len(cut))
    return [cut[i].astype(np.int32) for i in order]


# --- Two runs on the same global batches, alternating ---

# With its usual epsilon Adam magnifies rounding where gradients are almost zero.
tx = oa.accumulate(optax.adam(options.learning_rate, eps=1e-5))


class Training:
    """Parameters, the optimizer's state, and what is measured on the way."""

    def __init__(self, micro_batches):
        self.micro_batches = micro_batches
        self.params = initial_params()
        self.state = tx.init(self.params)
        self.segments: list[Any] = []  # of every micro-batch
        self.seconds: list[float] = []  # of every update that compiled nothing
        self.compiled: list[tuple[int, int]] = []  # the shape that a program is for

        @functools.partial(
            jax.jit, donate_argnums=(0, 1), static_argnames="closes_window"
        )
        def step(params, state, batch, closes_window):
            self.compiled.append(batch["tokens"].shape)  # runs only while JAX traces
            grads = jax.grad(loss_fn)(params, batch)
            weight = is_target(batch).sum()
            return tx.update_params(
                grads, state, params, weight=weight, boundary=closes_window
            )

        self.step = step

    def update(self, documents):
        """Trains on one global batch."""
        programs = len(self.compiled)
        start = time.perf_counter()
        micro_batches = list(self.micro_batches(documents))
        for batch, boundary in oa.with_boundaries(micro_batches):
            self.params, self.state = self.step(
                self.params, self.state, batch, boundary
            )
        jax.block_until_ready(self.params)
        if len(self.compiled) == programs:
            self.seconds.append(time.perf_counter() - start)
        self.segments += [batch["segments"] for batch in micro_batches]


trainings = {"padded": Training(padded), "by budget": Training(by_budget)}
paragraphs = load_paragraphs()
random = np.random.default_rng(0)
for update in track(range(updates), "Training"):
    chosen = random.integers(len(paragraphs), size=options.batch_size)
    in_turn = list(trainings.values())[:: 1 if update % 2 else -1]
    for training in in_turn:
        training.update([paragraphs[i] for i in chosen])


def padding(segments):
    """Which share of all tokens is padding."""
    return np.mean(np.concatenate([s.ravel() for s in segments]) == 0)


def largest_difference(a, b):
    return max(jax.tree.leaves(jax.tree.map(lambda a, b: abs(a - b).max(), a, b)))


one, other = trainings.values()
milliseconds = [
    1e3 * statistics.median(t.seconds or [math.nan]) for t in trainings.values()
]
table = [
    ("", *trainings),
    ("padding", *(f"{padding(t.segments):.1%}" for t in trainings.values())),
    (
        "micro-batches per update",
        *(f"{len(t.segments) / updates:.1f}" for t in trainings.values()),
    ),
    ("different shapes", *(len(set(t.compiled)) for t in trainings.values())),
    ("programs compiled", *(len(t.compiled) for t in trainings.values())),
    ("milliseconds per update", *(f"{t:.0f}" for t in milliseconds)),
]
for name, *cells in table:
    print(f"{name:25}" + "".join(f"{cell:>12}" for cell in cells))
speed = milliseconds[0] / milliseconds[1]
moved = largest_difference(one.params, initial_params())
apart = largest_difference(one.params, other.params)
print(f"An update by budget is {speed:.2f} times as fast as a padded one.")
print(
    f"The parameters changed by up to {moved:.2f} and differ by {apart:.1e} at most "
    "between the two runs."
)

# --- The picture: all rows of a global batch, and the time of an update ---

GREY, EMPTY = "#808080", "#80808040"  # legible on white and on black
COLORS = ["#4a90e2", "#85b3ea", "#3370b8"]  # neighbouring documents differ


def draw_rows(axes, micro_batches, height, title):
    """Every row of a global batch, with a gap between micro-batches."""
    y = 0.0
    for segments in micro_batches:
        for row in segments:
            axes.barh(y, len(row), height=0.8, color=EMPTY)
            ends = np.cumsum(np.bincount(row)[1:])
            for i, end in enumerate(ends):
                start = ends[i - 1] if i else 0
                axes.barh(y, end - start, 0.8, start, color=COLORS[i % len(COLORS)])
            y += 1
        y += 0.8
    axes.set(xlim=(0, options.length), ylim=(height, -0.8))
    axes.set_xlabel(f"rows of {options.length} tokens")
    axes.set_title(title, loc="left", size="medium")
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


style: Any = {
    "font.size": 12,
    "svg.hashsalt": "token_budget",
    "text.color": GREY,
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
}
with mpl.rc_context(style):
    figure = Figure(figsize=(9, 5), layout="constrained")
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 0.7))
    documents = [paragraphs[i] for i in chosen]  # the last global batch
    drawn = [
        [batch["segments"] for batch in training.micro_batches(documents)]
        for training in trainings.values()
    ]
    height = sum(len(segments) + 0.8 for segments in drawn[0])
    titles = ("A row per document", "oa.token_batches")
    for axes, micro_batches, title in zip((left, middle), drawn, titles, strict=True):
        number = f"{len(micro_batches)} micro-batches"
        empty = f"{padding(micro_batches):.0%} padding"
        draw_rows(axes, micro_batches, height, f"{title}\n{number}, {empty}")
    bars = right.bar(["padded", "by budget"], milliseconds, color=[GREY, COLORS[0]])
    right.bar_label(bars, [f"{t:.0f} ms" for t in milliseconds], color=GREY)
    right.set_title("Time of an update\n(median)", loc="left", size="medium")
    right.set_yticks([])
    right.spines[["top", "right", "left"]].set_visible(False)
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    metadata = {"Date": None} if options.picture.suffix == ".svg" else None
    figure.savefig(options.picture, dpi=150, transparent=True, metadata=metadata)
print(f"Saved the picture as {options.picture}")
