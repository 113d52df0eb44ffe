"""How XLA compiles in the tests.

Most tests ask for numbers, and XLA takes most of their time. `quickly` turns off what
makes it slow. What reads a compiled program calls `optimized`, which compiles as XLA
does by default. With `pytest --optimized` everything is compiled so.
"""

import os

import jax

DEFAULT = {
    "xla_backend_optimization_level": 3,
    "xla_llvm_disable_expensive_passes": False,
}
# The code generators that take longest. XLA ends the process on a flag that it does not
# know, and newer versions do not know this one.
HAS_FUSION_EMITTERS_FLAG = jax.__version_info__ < (0, 11)
if HAS_FUSION_EMITTERS_FLAG:
    DEFAULT["xla_cpu_use_fusion_emitters"] = True


def quickly():
    """Makes XLA compile quickly; to be called before it compiles anything."""
    jax.config.update("jax_disable_most_optimizations", True)
    if HAS_FUSION_EMITTERS_FLAG:
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_use_fusion_emitters=false"


def optimized(lowered):
    """The program that `lowered` compiles to by default."""
    return lowered.compile(compiler_options=DEFAULT)
