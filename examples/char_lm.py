"""Train a language model on micro-batches with different numbers of tokens.

    python examples/char_lm.py

The tokens are the characters of Python's language reference, which comes with Python.
Paragraphs are padded to one length, and the loss is the mean over all tokens that are
not padding. A batch of 32 paragraphs runs in micro-batches of 8. `weight=` counts the
tokens in each of them. Without it, tokens in micro-batches of short paragraphs would
count too much.
"""

import argparse
import pydoc_data.topics

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.progress import track

import optax_accum.flax as oaf

parser = argparse.ArgumentParser(
    description="Train a small language model, with the number of tokens as weight.",
    formatter_class=argparse.ArgumentDefaultsHelpFormatter,
)
parser.add_argument("--steps", type=int, default=100, help="number of updates")
parser.add_argument("--batch-size", type=int, default=32, help="paragraphs per update")
parser.add_argument("--size", type=int, default=8, help="paragraphs per micro-batch")
parser.add_argument("--length", type=int, default=128, help="tokens per paragraph")
parser.add_argument(
    "--learning-rate", type=float, default=1e-2, help="initial learning rate"
)
parser.add_argument("--quick", action="store_true", help="make only 20 updates")
options = parser.parse_args()
steps = 20 if options.quick else options.steps

PADDING = 0


class Block(nnx.Module):
    """Attention and a dense layer."""

    def __init__(self, width, rngs):
        self.norm1 = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(4, width, decode=False, rngs=rngs)
        self.norm2 = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x, mask):
        """Maps ``[B, T, width]`` to the same."""
        x = x + self.attention(self.norm1(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class Decoder(nnx.Module):
    """Predicts every token from those before it."""

    def __init__(self, length, rngs, *, vocabulary=128, width=64, layers=2):
        self.embedding = nnx.Embed(vocabulary, width, rngs=rngs)
        self.position = nnx.Embed(length, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, rngs) for _ in range(layers)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)

    def __call__(self, tokens):
        """Maps tokens ``[B, T]`` to logits ``[B, T, vocabulary]``."""
        x = self.embedding(tokens) + self.position(jnp.arange(tokens.shape[1]))
        mask = nnx.make_causal_mask(tokens)
        for block in self.blocks:
            x = block(x, mask)
        return self.embedding.attend(self.norm(x))


def loss_fn(model, tokens):
    """The mean cross-entropy over the tokens that are not padding."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    losses = optax.softmax_cross_entropy_with_integer_labels(model(inputs), targets)
    return jnp.mean(losses, where=targets != PADDING)


def num_targets(model, tokens):
    """How many tokens `loss_fn` averages over: the weight of a micro-batch."""
    del model
    return jnp.sum(tokens[:, 1:] != PADDING)


value_and_grad = oaf.value_and_grad(
    loss_fn, microbatch_size=options.size, weight=num_targets
)


@nnx.jit(donate_argnums=(0, 1))
def train_step(model, optimizer, tokens):
    loss, grads = value_and_grad(model, tokens)
    optimizer.update(model, grads)
    return loss


def load_paragraphs(length):
    """Paragraphs ``i32[N, length + 1]`` of ASCII codes, in a random order."""
    topics = pydoc_data.topics.topics.values()
    text = [p.encode("ascii", "replace") for t in topics for p in t.split("\n\n")]
    rows = [p[: length + 1].ljust(length + 1, b"\0") for p in text if len(p) > 1]
    tokens = np.array([np.frombuffer(row, np.uint8) for row in rows], np.int32)
    return np.random.default_rng(0).permutation(tokens)


paragraphs = load_paragraphs(options.length)
test, train = paragraphs[:128], paragraphs[128:]
model = Decoder(options.length, nnx.Rngs(0))
schedule = optax.cosine_decay_schedule(options.learning_rate, steps)
tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule))
optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

test_loss = nnx.jit(loss_fn)
random = np.random.default_rng(0)
for step in track(range(1, steps + 1), "Training"):
    batch = train[random.integers(len(train), size=options.batch_size)]
    loss = train_step(model, optimizer, batch)
    if step % 10 == 0:
        print(f"step {step}: loss {loss:.2f}, test loss {test_loss(model, test):.2f}")
print(f"Test loss: {test_loss(model, test):.2f} per character")
