"""Open windows on several devices: stacking, summing, and how they are sharded."""

from optax_accum.sharding._data_parallel import scatter_specs as scatter_specs
from optax_accum.sharding._windows import micro_steps_left as micro_steps_left
from optax_accum.sharding._windows import stack_windows as stack_windows
from optax_accum.sharding._windows import sum_windows as sum_windows
from optax_accum.sharding._windows import window_specs as window_specs

__all__ = [
    "micro_steps_left",
    "scatter_specs",
    "stack_windows",
    "sum_windows",
    "window_specs",
]
