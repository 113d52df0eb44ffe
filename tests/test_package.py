"""The package from the outside."""

import re
import subprocess
import sys

import optax
import pytest

import optax_accum as oa

HEAVY = ("flax", "chex", "orbax", "matplotlib", "sklearn")


def imported_by(statement):
    """Which of the `HEAVY` modules a new interpreter has loaded after `statement`."""
    code = f"{statement}; import sys; print(*[m for m in {HEAVY} if m in sys.modules])"
    output = subprocess.check_output([sys.executable, "-c", code], text=True)
    return output.split()


def test_importing_it_imports_jax_and_optax_alone():
    allowed = set(imported_by("import jax, optax"))
    assert set(imported_by("import optax_accum")) <= allowed


def test_the_test_above_can_fail():
    assert "flax" in imported_by("import optax_accum, flax")
    assert "flax" not in imported_by("import jax, optax")


def test_every_public_name_is_there_and_documented():
    assert sorted(oa.__all__) == oa.__all__
    public = {name for name in vars(oa) if not name.startswith("_")}
    assert public == set(oa.__all__)
    for name in oa.__all__:
        assert len(getattr(oa, name).__doc__) > 50, name


def test_a_transformation_to_whoever_looks():
    tx = oa.accumulate(optax.sgd(0.1), 2)
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    init, update = tx
    assert (init, update) == (tx.init, tx.update)
    assert callable(tx.update_params)


@pytest.mark.parametrize("name", oa.AccumulateState._fields)
def test_every_field_of_the_state_is_documented(name):
    documented = re.findall(r"^\s+(\w+): ", oa.AccumulateState.__doc__, re.MULTILINE)
    assert name in documented
