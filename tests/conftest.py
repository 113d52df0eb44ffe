"""JAX as every test wants it: eight devices, and no promotion that nobody asked for."""

import os

import hypothesis
import jax
import pytest

if "JAX_NUM_CPU_DEVICES" not in os.environ:
    jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The same cases at every run. To look for new ones: --hypothesis-profile=explore
every_run = {"deadline": None, "database": None}
hypothesis.settings.register_profile(
    "fixed", derandomize=True, max_examples=25, **every_run
)
hypothesis.settings.register_profile("explore", max_examples=1000, **every_run)
hypothesis.settings.load_profile("fixed")


def pytest_collection_modifyitems(items):
    """Leaves out what needs several devices where there is one."""
    if jax.device_count() > 1:
        return
    for item in items:
        if item.get_closest_marker("several_devices"):
            item.add_marker(pytest.mark.skip(reason="needs several devices"))


@pytest.fixture
def loose_promotion():
    """For code that is not ours and mixes dtypes: Optax's own."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def float64():
    """Double precision for one test."""
    with jax.enable_x64(True):
        yield
