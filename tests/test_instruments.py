"""The instruments of the other tests: each of them must be able to fail."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

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


@pytest.mark.several_devices
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize(
    ("axes", "wanted"),
    [(("a",), [[0, 2], [1, 3]]), (("b",), [[0, 1], [2, 3]]), (("a", "b"), [range(4)])],
)
def test_devices_that_meet_are_found(axes, wanted, kind):
    """However the program writes them: JAX's own collective, and the compiler's."""
    mesh = jax.make_mesh((2, 2), ("a", "b"), (kind,) * 2, devices=jax.devices()[:4])
    x = jax.device_put(jnp.ones((4, 4)), NamedSharding(mesh, P(axes)))
    mapped = jax.shard_map(
        lambda x: lax.psum(x, axes), mesh=mesh, in_specs=P(axes), out_specs=P()
    )
    for function in (mapped, lambda x: x.sum(0)):
        everywhere = NamedSharding(mesh, P())
        lowered = jax.jit(function, out_shardings=everywhere).lower(x)
        (found,) = hlo.collectives(optimized(lowered))
        assert sorted(map(sorted, found.groups)) == list(map(list, wanted))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("{{0,10},{2,3}}, to_apply=%add", [[0, 10], [2, 3]]),
        ("{}, to_apply=%add", []),
        ("[2,2]<=[4], dimensions={0}", [[0, 1], [2, 3]]),
        ("[3,2]<=[2,3]T(1,0), dimensions={0}", [[0, 3], [1, 4], [2, 5]]),
        ("mesh['a'=2,'b'=3] {'b'}, to_apply=%add", [[0, 1, 2], [3, 4, 5]]),
        ("mesh['a'=3,'b'=2], device_ids=([2,3]T(1,0)) {'b'}", [[0, 3], [1, 4], [2, 5]]),
        ("mesh['a'=2,'b'=1,'c'=2] {'a','c'}", [[0, 1, 2, 3]]),
    ],
)
def test_every_way_to_write_the_devices_that_meet_is_read(text, wanted):
    text = f"%x), channel_id=1, replica_groups={text}"
    assert hlo.Operation("all-reduce", "f32[2]", "entry", text).groups == wanted


@pytest.mark.parametrize("text", ["mesh['a'=4] {'a':(1)2}", "mesh['a'=2], (1,0) {'a'}"])
def test_devices_that_cannot_be_read_are_an_error(text):
    operation = hlo.Operation("all-reduce", "f32[2]", "entry", f"replica_groups={text}")
    with pytest.raises(ValueError, match="no groups of devices"):
        operation.groups  # noqa: B018


def test_bytes_of_a_tree_are_counted():
    assert hlo.nbytes({"x": X, "flag": FLAG}) == 64 * 32 * 4 + 1
