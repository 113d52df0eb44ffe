"""Checks before a training run: does it fit, and does accumulation change the loss?

`plan_microbatches` reads from compiled programs how many micro-batches it takes to fit
into memory. `check_equivalence` compares a loss on a whole batch and in micro-batches.
"""

from optax_accum.diagnose._equivalence import EquivalenceReport as EquivalenceReport
from optax_accum.diagnose._equivalence import check_equivalence as check_equivalence
from optax_accum.diagnose._plan import MicrobatchPlan as MicrobatchPlan
from optax_accum.diagnose._plan import plan_microbatches as plan_microbatches

__all__ = [
    "EquivalenceReport",
    "MicrobatchPlan",
    "check_equivalence",
    "plan_microbatches",
]
