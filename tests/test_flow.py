"""Which outputs of a traced function are its inputs, and on which they depend."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from optax_accum import _flow

X = jnp.ones(3)


def of(function, *args):
    """``(same, needs)`` of each output."""
    sources = _flow.sources(jax.make_jaxpr(function)(*args))
    return [(source.same, set(source.needs)) for source in sources]


def handing_on(a, b):
    return b, a, a * b, jnp.sin(b), jnp.ones(3)


@pytest.mark.parametrize("around", [lambda f: f, jax.jit, jax.checkpoint])
def test_what_is_handed_on_is_what_came(around):
    assert of(around(handing_on), X, X) == [
        (1, {1}),
        (0, {0}),
        (None, {0, 1}),
        (None, {1}),
        (None, set()),
    ]


def test_so_it_is_through_a_derivative():
    def with_aux(a, b):
        y, b, c = jax.checkpoint(lambda a, b: (a * b, b, b + 1))(a, b)
        return y.sum(), (b, c)

    def gradient(a, b):
        return jax.grad(with_aux, has_aux=True)(a, b)[1]

    assert of(gradient, X, X) == [(1, {1}), (None, {1})]


def test_a_function_with_its_own_derivative_hands_on():
    @jax.custom_vjp
    def own(a, b):
        return b, a + 1

    own.defvjp(lambda a, b: (own(a, b), None), lambda _, g: g)
    assert of(own, X, X) == [(1, {1}), (None, {0})]
    relu = jax.custom_jvp(lambda a, b: (b, a + 1))
    relu.defjvp(lambda primals, tangents: (relu(*primals), tangents))
    assert of(relu, X, X) == [(1, {1}), (None, {0})]


def test_copies_and_choices_between_equals_are_the_same():
    def same(a, b):
        c, _ = lax.optimization_barrier((jnp.array(a), b))
        return lax.stop_gradient(c), jnp.where(b > 0, a, a), jnp.where(b > 0, a, b)

    assert of(same, X, X) == [(0, {0}), (0, {0}), (None, {0, 1})]


def test_a_branch_gives_what_came_if_all_branches_do():
    def branches(p, a, b):
        return lax.cond(p > 0, lambda a, b: (a, b, a), lambda a, _: (a, a, 2 * a), a, b)

    assert of(branches, 1.0, X, X) == [(1, {1}), (None, {0, 1, 2}), (None, {0, 1})]


def test_a_scan_gives_what_it_goes_through_and_carries_unchanged():
    def scan(const, first, kept, rows):
        def body(carry, row):
            total, kept = carry
            return (total + const * row, kept), (row, total, kept, 2 * row)

        return lax.scan(body, (first, kept), rows)

    assert of(scan, X[0], X[0], X, X) == [
        (None, {0, 1, 3}),
        (2, {2}),
        (3, {3}),
        (None, {0, 1, 3}),
        (None, {2}),  # once for every row
        (None, {3}),
    ]


def test_dependence_goes_round_a_loop_until_all_is_found():
    def shifting(a, b, c, rows):
        return lax.scan(
            lambda k, row: ((k[1], k[2], k[2] + row), None), (a, b, c), rows
        )

    found = of(shifting, X[0], X[0], X[0], X)
    assert [needs for _, needs in found] == [{0, 1, 2, 3}, {1, 2, 3}, {2, 3}]
    assert all(same is None for same, _ in found)


def test_a_while_loop_depends_on_what_ends_it():
    def loop(a, b, limit):
        def body(carry):
            total, kept, count = carry
            return total + b, kept, count + 1

        return lax.while_loop(lambda carry: carry[0] < limit, body, (a, b, 0))

    assert of(loop, 0.0, 1.0, 5.0) == [
        (None, {0, 1, 2}),
        (1, {1}),
        (None, {0, 1, 2}),
    ]


def test_a_shard_map_gives_what_came_if_it_goes_where_it_came_from():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def handing_on(a, b):
        return a, b, lax.psum(a * b, "data")

    mapped = jax.shard_map(
        handing_on,
        mesh=mesh,
        in_specs=(P(), P("data")),
        out_specs=(P(), P(), P()),
        check_vma=False,
    )
    assert of(mapped, X, X) == [(0, {0}), (None, {1}), (None, {0, 1})]


def test_what_is_not_known_is_made_of_everything():
    assert of(lambda a, b: lax.sort((a, b)), X, X) == [(None, {0, 1})] * 2
