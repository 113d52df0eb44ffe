"""JAX as every test wants it: eight devices, and no promotion that is not asked for."""

import collections
import gc
import os
import resource
import tempfile

import hypothesis
import jax
import pytest

from optax_accum import _eager
from tests.support import xla

if "JAX_NUM_CPU_DEVICES" not in os.environ:
    jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# How many cases the property tests try, the same ones at every run. To look for new
# ones: --hypothesis-profile=explore
every_run = {"deadline": None, "database": None}
for profile, number in {"few": 8, "many": 50}.items():
    hypothesis.settings.register_profile(
        profile, derandomize=True, max_examples=number, **every_run
    )
hypothesis.settings.register_profile("explore", max_examples=1000, **every_run)
hypothesis.settings.load_profile("few")


def pytest_addoption(parser):
    parser.addoption(
        "--optimized",
        action="store_true",
        help="compile with all of XLA's optimizations, which takes three times as long",
    )


def pytest_configure(config):
    """Compiles quickly, and every program once in all workers."""
    if not config.getoption("--optimized"):
        xla.quickly()
    if hasattr(config, "workerinput"):
        cache = config.workerinput["compilation_cache"]
    else:
        folder = tempfile.TemporaryDirectory(prefix="jax-cache-")
        config.add_cleanup(folder.cleanup)
        config.compilation_cache = cache = folder.name
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node):
    """Tells each of pytest-xdist's workers where the cache is."""
    node.workerinput["compilation_cache"] = node.config.compilation_cache


def pytest_collection_modifyitems(items):
    """Leaves out what needs several devices where there is one."""
    if jax.device_count() > 1:
        return
    for item in items:
        if item.get_closest_marker("several_devices"):
            item.add_marker(pytest.mark.skip(reason="needs several devices"))


@pytest.fixture(scope="module", autouse=True)
def _little_memory():
    """Forgets compiled programs between modules, once there are many of them."""
    yield
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in KiB on Linux
    if peak > 2**20:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def loose_promotion():
    """For code that is not ours and mixes dtypes: Optax's own."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def first_warning(monkeypatch):
    """As in a process in which nothing was said yet."""
    monkeypatch.setattr(_eager, "_warned", set())
    monkeypatch.setattr(_eager, "_counts", collections.Counter())


@pytest.fixture
def float64():
    """Double precision for one test."""
    with jax.enable_x64(True):
        yield
