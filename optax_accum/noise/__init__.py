"""The noise scale, which says how large a batch is useful, and adaptive windows."""

from optax_accum.noise._adaptive_k import adaptive_k as adaptive_k
from optax_accum.noise._noise_scale import NoiseScale as NoiseScale
from optax_accum.noise._tracker import estimate as estimate

__all__ = ["NoiseScale", "adaptive_k", "estimate"]
