"""The instruments of the other tests: each of them must be able to fail."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from tests.support import hlo
from tests.support.xla import optimized

X = jax.ShapeDtypeStruct((64, 32), jnp.float32)
FLAG = jax.ShapeDtypeStruct((), bool)


def test_conditionals_are_counted():
    def step(x, flag):
        return lax.cond(flag, lambda x: x @ x.T @ x, lambda x: x, x)

    program = hlo.compiled(step, X, FLAG, donate=())
    assert len(hlo.operations(program, "conditional")) == 1


def test_copies_are_counted_by_their_size():
    """An argument that is not donated and goes out unchanged has to be copied."""
    program = hlo.compiled(lambda x: (x, x + 1), X, donate=())
    assert hlo.large_copies(program, 64 * 32) == ["f32[64,32]{1,0}"]
    assert hlo.large_copies(program, 64 * 32 + 1) == []


def test_temporaries_are_counted():
    program = hlo.compiled(lambda x: (x @ x.T) @ x, X, donate=())
    assert hlo.temporaries(program) >= 64 * 64 * 4


@pytest.mark.several_devices
def test_collectives_are_counted_with_their_place():
    """One that runs once, one in a loop, one in a branch, and one in a branch there."""

    def total(x):
        return lax.psum(x, "devices")

    def once(x, flag):
        return jnp.where(flag, total(x), x)

    def loop(x, flag):
        return lax.scan(lambda x, _: (once(x, flag), None), x, length=3)[0]

    def branch(x, flag):
        return lax.cond(flag, total, lambda x: x, x)

    def branch_in_loop(x, flag):
        return lax.scan(lambda x, _: (branch(x, flag), None), x, length=3)[0]

    def gathered(x, flag):
        return jnp.where(flag, lax.all_gather(x, "devices").sum(), x)

    def program(function):
        mapped = jax.pmap(function, "devices", in_axes=(0, None))
        return optimized(mapped.lower(jnp.ones(jax.device_count()), True))

    found = [hlo.exchanges(program(f)) for f in (once, loop, branch, branch_in_loop)]
    places = ["entry", "loop", "branch", "loop/branch"]
    assert found == [{f"all-reduce, {place}": 1} for place in places]
    assert hlo.exchanges(program(gathered)) == {"all-gather, entry": 1}
    assert hlo.exchanges(program(lambda x, _: x)) == {}


def test_bytes_of_a_tree_are_counted():
    assert hlo.nbytes({"x": X, "flag": FLAG}) == 64 * 32 * 4 + 1
