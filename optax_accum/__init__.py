"""Gradient accumulation for JAX: k micro-batches, the update of one large batch."""

from optax_accum import diagnose as diagnose
from optax_accum import noise as noise
from optax_accum import sharding as sharding
from optax_accum._accumulate import AccumulateTransformation as AccumulateTransformation
from optax_accum._accumulate import accumulate as accumulate
from optax_accum._by_weight import by_weight as by_weight
from optax_accum._epochs import with_boundaries as with_boundaries
from optax_accum._loop import MicrobatchInfo as MicrobatchInfo
from optax_accum._microbatch import microbatch as microbatch
from optax_accum._rescale_decay import rescale_decay as rescale_decay
from optax_accum._skip import skip_not_finite as skip_not_finite
from optax_accum._state import AccumulateState as AccumulateState
from optax_accum._state import accumulated as accumulated
from optax_accum._state import from_multi_steps as from_multi_steps
from optax_accum._state import gradient_step as gradient_step
from optax_accum._state import has_updated as has_updated
from optax_accum._state import micro_step as micro_step
from optax_accum._token_batches import TokenBatch as TokenBatch
from optax_accum._token_batches import token_batches as token_batches
from optax_accum._value_and_grad import grad as grad
from optax_accum._value_and_grad import value_and_grad as value_and_grad
from optax_accum._window import Window as Window

__version__ = "0.2.0"
__all__ = [
    "AccumulateState",
    "AccumulateTransformation",
    "MicrobatchInfo",
    "TokenBatch",
    "Window",
    "accumulate",
    "accumulated",
    "by_weight",
    "from_multi_steps",
    "grad",
    "gradient_step",
    "has_updated",
    "micro_step",
    "microbatch",
    "rescale_decay",
    "skip_not_finite",
    "token_batches",
    "value_and_grad",
    "with_boundaries",
]
