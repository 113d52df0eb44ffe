"""The instruments of the other tests: each of them must be able to fail."""

import hlo
import jax
import jax.numpy as jnp
from jax import lax

X = jax.ShapeDtypeStruct((64, 32), jnp.float32)
FLAG = jax.ShapeDtypeStruct((), bool)


def test_a_cond_is_counted():
    def step(x, flag):
        return lax.cond(flag, lambda x: x @ x.T @ x, lambda x: x, x)

    program = hlo.compiled(step, X, FLAG, donate=())
    assert len(hlo.operations(program, "conditional")) == 1


def test_a_copy_is_counted_by_its_size():
    """An argument that is not donated and goes out unchanged has to be copied."""
    program = hlo.compiled(lambda x: (x, x + 1), X, donate=())
    assert hlo.large_copies(program, 64 * 32) == ["f32[64,32]{1,0}"]
    assert hlo.large_copies(program, 64 * 32 + 1) == []


def test_a_temporary_is_counted():
    program = hlo.compiled(lambda x: (x @ x.T) @ x, X, donate=())
    assert hlo.temporaries(program) >= 64 * 64 * 4


def test_bytes_of_a_tree():
    assert hlo.nbytes({"x": X, "flag": FLAG}) == 64 * 32 * 4 + 1
