"""Gradient accumulation in Flax: a Linen `TrainState`, and for NNX an `Optimizer`.

Nothing at the root of the package imports this, or Flax.
"""

from optax_accum.flax._batch_stats import combine_batch_stats as combine_batch_stats
from optax_accum.flax._microbatch import microbatch as microbatch
from optax_accum.flax._optimizer import Optimizer as Optimizer
from optax_accum.flax._optimizer import window_sharding as window_sharding
from optax_accum.flax._train_state import TrainState as TrainState
from optax_accum.flax._value_and_grad import value_and_grad as value_and_grad
from optax_accum.flax._value_and_pullback import (
    value_and_pullback as value_and_pullback,
)

__all__ = [
    "Optimizer",
    "TrainState",
    "combine_batch_stats",
    "microbatch",
    "value_and_grad",
    "value_and_pullback",
    "window_sharding",
]
