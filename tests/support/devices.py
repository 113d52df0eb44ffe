"""Training on several devices, in each of the ways that JAX has for it."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import optax_accum as oa
from tests.support.training import differentiated, slow, stepper
from tests.support.xla import optimized

COUNT = jax.device_count()
AXIS = "data"
INSIDE = ("pmap", "checked", "unchecked")  # `checked` is shard_map's check_vma=True
OUTSIDE = ("auto", "explicit")  # plain jit on a mesh with such axes


def parametrized(ways, usual=("checked", "auto")):
    """A test in each of the `ways`; those that are not `usual` are slow."""
    return pytest.mark.parametrize(
        "way", [way if way in usual else slow(way) for way in ways]
    )


def mesh(kind=AxisType.Auto):
    """All devices on one axis."""
    return jax.make_mesh((COUNT,), (AXIS,), axis_types=(kind,))


def stacked(tree):
    """Every leaf once per device."""
    return jax.tree.map(lambda x: jnp.stack([x] * COUNT), tree)


def first(tree):
    """The first device's leaves, where all have the same."""
    for x in jax.tree.leaves(tree):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(x)[:1].repeat(COUNT, 0))
    return jax.tree.map(lambda x: x[0], tree)


def inside(way, function, in_axes, out_axes, donate=()):
    """`function` compiled to run on every device, through pmap or shard_map.

    `in_axes` and `out_axes` are 0 for what is split over the devices, None for what is
    the same on all, "state" for the state of `accumulate`, or a tree of specs. What
    comes out of pmap is stacked.
    """
    if way == "pmap":
        axes = tuple(0 if axis == "state" else axis for axis in in_axes)
        return jax.pmap(function, AXIS, in_axes=axes, donate_argnums=donate)

    def spec(axis):
        return {0: P(AXIS), None: P()}[axis] if axis in (0, None) else axis

    def call(*args):
        specs = [
            oa.sharding.window_specs(x, AXIS) if axis == "state" else spec(axis)
            for x, axis in zip(args, in_axes, strict=True)
        ]
        states = [s for s, axis in zip(specs, in_axes, strict=True) if axis == "state"]
        outs = tuple(states[0] if axis == "state" else spec(axis) for axis in out_axes)
        return jax.shard_map(
            function,
            mesh=mesh(),
            in_specs=tuple(specs),
            out_specs=outs if len(outs) > 1 else outs[0],
            check_vma=way == "checked",
        )(*args)

    return jax.jit(call, donate_argnums=donate)


def loss(params, x, mask):
    """A mean over the examples that `mask` counts."""
    errors = jnp.sum(jnp.tanh(x @ params["w"] + params["b"][None]) ** 2, -1)
    # Selected, because what does not count may be NaN.
    total = jnp.sum(jnp.where(mask, errors, 0))
    return total / jnp.maximum(mask.sum(), 1).astype(total.dtype)


PARAMS = {
    "w": jnp.asarray(np.random.default_rng(0).normal(size=(3, 4)), jnp.float32),
    "b": jnp.full(4, 0.1, jnp.float32),
}

# It clips in one of two windows of `examples`, and has an epsilon, without which Adam
# does not see how large a gradient is.
CLIPPED_ADAMW = optax.chain(optax.clip_by_global_norm(0.8), optax.adamw(0.1, eps=0.1))


def examples(steps, per_device=3, count=COUNT, seed=0):
    """``x[steps, count * per_device, 3]``, and a mask that counts some of them.

    In every step one device has nothing, and holds NaN there; another one has all.
    """
    random = np.random.default_rng(seed)
    x = random.normal(size=(steps, count, per_device, 3)).astype(np.float32)
    mask = random.random((steps, count, per_device)) < 0.5
    for i in range(steps):
        mask[i, (i + 1) % count] = True
        mask[i, i % count] = False
        x[i, i % count] = np.nan
    shape = steps, count * per_device
    return jnp.asarray(x.reshape(*shape, 3)), jnp.asarray(mask.reshape(shape))


def count(params, x, mask):
    """The weight of `loss`."""
    del params, x
    return mask.sum()


def rows(inner, every_k, mesh, axis_name=AXIS, **options):
    """``tx`` and ``step(params, state, x, mask, boundary=None)``, from plain jit.

    A `boundary` is a Python bool.
    """
    over = {"mesh": mesh, "axis_name": axis_name}
    tx = oa.accumulate(inner, every_k, **over, **options)
    gradient = oa.value_and_grad(
        loss,
        num_microbatches=1,
        batch_argnums=(1, 2),
        weight=count,
        local=True,
        return_info=True,
        **over,
    )

    def step(params, state, x, mask, boundary=None):
        (value, grads), info = gradient(params, x, mask)
        return tx.update_params(
            grads, state, params, weight=info.weight, value=value, boundary=boundary
        )

    return tx, jax.jit(step, donate_argnums=(0, 1), static_argnames="boundary")


def windows(way, tx, update="update_params", takes="gradients", loss=loss, **static):
    """``step(params, state, x, mask, boundary)`` on all devices, and its start.

    `static` reaches every update, with a Python-bool `boundary` in place of the
    argument.
    """

    def step(params, state, x, mask, boundary):
        local = params
        if way == "checked":
            local = jax.lax.pcast(params, AXIS, to="varying")
        value, grads = differentiated(takes, loss, local, x, mask)
        given = {"weight": mask.sum(), "boundary": boundary, "value": value} | static
        return stepper(tx, update)(params, state, grads, **given)

    state = tx.init(PARAMS)
    if way == "pmap":
        mapped = inside(way, step, (0, 0, 0, 0, None), (0, 0), (0, 1))
        start = stacked((PARAMS, state))
    else:
        axes = None, "state", 0, 0, None
        mapped = inside(way, step, axes, (None, "state"), (0, 1))
        start = jax.tree.map(jnp.copy, PARAMS), oa.sharding.stack_windows(state, COUNT)

    def one_at_a_time(*args):
        # Made-up devices share a few threads: programs that wait for each other can
        # leave none for who they wait for.
        return jax.block_until_ready(mapped(*args))

    return one_at_a_time, start


def in_step(way, fun, rest=0, outputs=(None,), **options):
    """``oa.value_and_grad(fun)`` on all devices, of ``(params, batch, *rest)``."""
    if way in OUTSIDE:
        kind = AxisType.Auto if way == "auto" else AxisType.Explicit
        return jax.jit(
            oa.value_and_grad(fun, axis_name=AXIS, mesh=mesh(kind), **options)
        )
    f = oa.value_and_grad(fun, axis_name=AXIS, **options)
    return inside(way, f, (None, 0, *[None] * rest), outputs)


def whole(way, tree):
    """A batch as `in_step` takes it: with pmap every device's part by itself."""
    if way != "pmap":
        return tree
    return jax.tree.map(lambda x: x.reshape(COUNT, -1, *x.shape[1:]), tree)


def result(way, tree):
    """What came out, where it is the same on all devices: to the bit."""
    if way == "pmap":
        return first(tree)
    for x in jax.tree.leaves(tree):
        shards = [np.asarray(shard.data) for shard in x.addressable_shards]
        for shard in shards:
            np.testing.assert_array_equal(shard, shards[0])
    return tree


SIDE = 128
LARGE = {"w": jnp.ones((SIDE, SIDE)), "b": jnp.ones(SIDE)}


def window_program(way, tx, update, params=LARGE, *, weighted=True, **static):
    """The compiled micro-step on gradients that come as they are."""
    update = stepper(tx, update)

    def step(params, state, grads, weight):
        if way != "pmap":
            grads, weight = jax.tree.map(lambda x: x[0], (grads, weight))
        given = {"weight": weight} if weighted else {}
        return update(params, state, grads, **given, **static)

    state = tx.init(params)
    grads, weight = stacked((params, jnp.ones([])))
    if way == "pmap":
        jitted = inside(way, step, (0, 0, 0, 0), (0, 0), (0, 1))
        params, state = stacked((params, state))
    else:
        axes = None, "state", 0, 0
        jitted = inside(way, step, axes, (None, "state"), (0, 1))
        state = oa.sharding.stack_windows(state, COUNT)
    return optimized(jitted.lower(params, state, grads, weight))
