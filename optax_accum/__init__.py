"""Gradient accumulation for JAX: k micro-batches, the update of the global batch."""

from optax_accum import diagnose as diagnose
from optax_accum._devices import scatter_specs as scatter_specs
from optax_accum._epochs import with_boundaries as with_boundaries
from optax_accum._meter import adaptive_k as adaptive_k
from optax_accum._microbatch import MicrobatchInfo as MicrobatchInfo
from optax_accum._microbatch import grad as grad
from optax_accum._microbatch import value_and_grad as value_and_grad
from optax_accum._migrate import from_multi_steps as from_multi_steps
from optax_accum._noise_scale import NoiseScale as NoiseScale
from optax_accum._queries import accumulated as accumulated
from optax_accum._queries import gradient_step as gradient_step
from optax_accum._queries import has_updated as has_updated
from optax_accum._queries import micro_step as micro_step
from optax_accum._queries import noise_scale as noise_scale
from optax_accum._skip import skip_not_finite as skip_not_finite
from optax_accum._stacked import stack_windows as stack_windows
from optax_accum._stacked import sum_windows as sum_windows
from optax_accum._stacked import window_specs as window_specs
from optax_accum._state import AccumulateState as AccumulateState
from optax_accum._transform import accumulate as accumulate

__version__ = "0.1.0"
__all__ = [
    "AccumulateState",
    "MicrobatchInfo",
    "NoiseScale",
    "accumulate",
    "accumulated",
    "adaptive_k",
    "from_multi_steps",
    "grad",
    "gradient_step",
    "has_updated",
    "micro_step",
    "noise_scale",
    "scatter_specs",
    "skip_not_finite",
    "stack_windows",
    "sum_windows",
    "value_and_grad",
    "window_specs",
    "with_boundaries",
]
