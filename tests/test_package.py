"""The package from the outside."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import chex
import jax.numpy as jnp
import optax
import pytest

import optax_accum as oa
import optax_accum.flax as oaf

HEAVY = ("flax", "chex", "equinox", "grain", "orbax", "matplotlib", "sklearn")


def imported_by(statement):
    """Which of the `HEAVY` modules a new interpreter has loaded after `statement`."""
    code = f"{statement}; import sys; print(*[m for m in {HEAVY} if m in sys.modules])"
    output = subprocess.check_output([sys.executable, "-c", code], text=True)
    return output.split()


def test_importing_the_package_imports_only_jax_and_optax():
    allowed = set(imported_by("import jax, optax"))
    assert set(imported_by("import optax_accum")) <= allowed


@pytest.mark.slow
def test_the_import_check_can_fail():
    assert "flax" in imported_by("import optax_accum, flax")
    assert "flax" not in imported_by("import jax, optax")


MODULES = (oa, oa.sharding, oa.noise, oa.diagnose, oaf)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_every_public_name_exists_and_is_documented(module):
    assert sorted(module.__all__) == module.__all__
    public = {
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert public == set(module.__all__)
    for name in module.__all__:
        assert len(getattr(module, name).__doc__) > 50, name


def test_the_citation_has_the_version_of_the_package():
    citation = (Path(__file__).parents[1] / "CITATION.cff").read_text()
    assert f"\nversion: {oa.__version__}\n" in citation


def test_accumulate_returns_an_optax_transformation():
    tx = oa.accumulate(optax.sgd(0.1), 2)
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    init, update = tx
    params = jnp.ones(3)
    state = init(params)
    chex.assert_trees_all_equal(state, tx.init(params))
    chex.assert_trees_all_equal(
        update(params, state, params), tx.update(params, state, params)
    )
    assert callable(tx.update_params)


@pytest.mark.parametrize("book", [oa.AccumulateState, oa.Window])
def test_every_field_of_the_state_is_documented(book):
    documented = re.findall(r"^\s+(\w+): ", book.__doc__, re.MULTILINE)
    assert [name for name in book._fields if name not in documented] == []
