"""`oa.microbatch` across devices: each runs its own part, and the loss gathers."""

import contextlib
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import optax_accum as oa
from tests.support import devices, hlo
from tests.support.devices import AXIS, COUNT
from tests.support.errors import refused
from tests.support.training import needs_in_place, slow
from tests.support.xla import optimized

pytestmark = pytest.mark.several_devices
WIDTH = 16
EXAMPLES = 4 * COUNT
inside = devices.parametrized(devices.INSIDE)
outside = devices.parametrized(devices.OUTSIDE)
everywhere = devices.parametrized(devices.INSIDE + devices.OUTSIDE)
# Only under check_vma=True is there anything to cast.
ways_to_cast = pytest.mark.parametrize(
    ("way", "casts"),
    [
        ("checked", True),
        ("checked", False),
        pytest.param("unchecked", True, marks=pytest.mark.slow),
        pytest.param("pmap", True, marks=pytest.mark.slow),
    ],
)
KINDS = pytest.mark.parametrize("kind", [AxisType.Auto, slow(AxisType.Explicit)])
needs_four = pytest.mark.skipif(COUNT % 4 != 0, reason="needs 4, 8, ... devices")


def normal(*shape, seed=0):
    random = np.random.default_rng([seed, *shape])
    return jnp.asarray(random.normal(size=shape), jnp.float32)


def close(got, wanted, **options):
    tolerance = {"rtol": 2e-5, "atol": 2e-6} | options
    got, wanted = jax.device_get((got, wanted))
    chex.assert_trees_all_equal_shapes_and_dtypes(got, wanted)
    chex.assert_trees_all_close(got, wanted, **tolerance)


PARAMS = {"w": normal(3, WIDTH), "b": normal(WIDTH)}
SCALE = jnp.float32(0.7)
BATCH = {"image": normal(EXAMPLES, 3), "text": normal(EXAMPLES, 3, seed=1)}
X = BATCH["image"]


def embed(params, x):
    return jnp.tanh(x @ params["w"] + params["b"][None])


def encode(params, batch):
    """Two towers that share their parameters, in one call."""
    return embed(params, batch["image"]), embed(params, batch["text"])


def contrastive(encode, gather=lambda x: x):
    """A loss that compares each of these images with all texts."""

    def loss(params, scale, batch):
        images, texts = encode(params, batch)
        similarity = scale * images @ gather(texts).T
        positive = scale * jnp.sum(images * texts, -1)
        return jnp.mean(jax.nn.logsumexp(similarity, -1) - positive)

    return loss


def gathered(x):
    return jax.lax.all_gather(x, AXIS, tiled=True)


def placed(mesh, tree, *spec):
    return jax.device_put(tree, NamedSharding(mesh, P(*spec)))


def mesh_of(way):
    return devices.mesh(AxisType.Auto if way == "auto" else AxisType.Explicit)


def everywhere_on(mesh):
    """Replicates outputs, which the types of an Explicit mesh ask for."""
    if AxisType.Explicit not in mesh.axis_types:
        return lambda x: x
    return lambda x: jax.reshard(x, NamedSharding(mesh, P()))


@functools.cache
def wanted():
    """Of the whole batch, on one device."""
    loss = jax.value_and_grad(contrastive(encode), (0, 1, 2))
    return jax.device_get(jax.jit(loss)(PARAMS, SCALE, BATCH))


def local_step(way, loss, *, casts=True):
    """Value and gradients of all devices, inside of the axis.

    Under ``check_vma=True`` parameters are cast to vary, or `jax.grad` adds up by
    itself the gradients of a loss that is averaged.
    """

    def step(params, scale, batch):
        if way == "checked" and not casts:
            mean = lambda *args: jax.lax.pmean(loss(*args), AXIS)  # noqa: E731
            return jax.value_and_grad(mean, (0, 1, 2))(params, scale, batch)
        if way == "checked":
            params, scale = jax.lax.pcast((params, scale), AXIS, to="varying")
        value, grads = jax.value_and_grad(loss, (0, 1, 2))(params, scale, batch)
        value, *whole = jax.lax.pmean((value, *grads[:2]), AXIS)
        # What a device's examples do to the losses of all of them is its own already.
        return value, (*whole, jax.tree.map(lambda g: g / COUNT, grads[2]))

    outs = 0 if way == "pmap" else (None, (P(), P(), P(AXIS)))
    return devices.inside(way, step, (None, None, 0), outs)


def joined(way, got):
    """What a `local_step` returned, as `wanted` has it."""
    if way != "pmap":
        return got
    value, (params, scale, batch) = got
    batch = jax.tree.map(lambda x: x.reshape(EXAMPLES, -1), batch)
    return devices.first(value), (*devices.first((params, scale)), batch)


def in_loops(program):
    """The collectives that run in every micro-batch."""
    return [x for x in hlo.collectives(program) if "loop" in x.place]


def loops(program):
    return hlo.operations(program, "while")


SIZES = [{"num_microbatches": 4}, slow({"microbatch_size": 3})]  # 1 each; 3 and 1
EQUAL, RAGGED = {"num_microbatches": 4}, {"microbatch_size": 3 * COUNT}


# --- The result ---


@pytest.mark.core
@ways_to_cast
@pytest.mark.parametrize("size", SIZES)
def test_value_and_gradients_are_those_of_the_whole_batch(way, casts, size):
    """Each device encodes its own part; one exchange of each kind, after the loops."""
    loss = contrastive(oa.microbatch(encode, **size), gathered)
    step = local_step(way, loss, casts=casts)
    args = PARAMS, SCALE, devices.whole(way, BATCH)
    program = optimized(step.lower(*args))
    close(joined(way, program(*args)), wanted())
    once = ("all-gather", "reduce-scatter", "all-reduce")
    assert hlo.exchanges(program) == {f"{name}, entry": 1 for name in once}
    if "num_microbatches" in size:
        assert len(loops(program)) == 2


@outside
@pytest.mark.parametrize("size", [EQUAL, slow(RAGGED)])
def test_on_a_mesh_value_and_gradients_are_those_of_the_whole_batch(way, size):
    mesh = mesh_of(way)
    encoded = oa.microbatch(encode, mesh=mesh, axis_name=AXIS, **size)
    step = jax.jit(
        jax.value_and_grad(contrastive(encoded, everywhere_on(mesh)), (0, 1, 2))
    )
    args = *placed(mesh, (PARAMS, SCALE)), placed(mesh, BATCH, AXIS)
    program = optimized(step.lower(*args))
    got = program(*args)
    close(got, wanted())
    assert not in_loops(program)
    split = NamedSharding(mesh, P(AXIS))
    for grad in jax.tree.leaves(got[1][2]):
        assert grad.sharding.is_equivalent_to(split, 2)
    for grad in jax.tree.leaves(got[1][:2]):
        assert grad.sharding.is_fully_replicated


@pytest.mark.core
@outside
@pytest.mark.parametrize("size", [EQUAL, RAGGED])
def test_on_a_mesh_a_backward_pass_has_one_all_reduce_after_its_loop(way, size):
    """And a forward pass exchanges nothing; outputs lie as the batch does."""
    mesh = mesh_of(way)
    encoded = oa.microbatch(encode, mesh=mesh, axis_name=AXIS, **size)
    params, batch = placed(mesh, PARAMS), placed(mesh, BATCH, AXIS)
    forward = optimized(jax.jit(encoded).lower(params, batch))
    outputs = forward(params, batch)
    assert hlo.exchanges(forward) == {}
    close(outputs, encode(PARAMS, BATCH))
    for output in outputs:
        assert output.sharding.is_equivalent_to(NamedSharding(mesh, P(AXIS)), 2)

    @jax.jit
    def backward(params, batch, cotangents):
        return jax.vjp(encoded, params, batch)[1](cotangents)

    program = optimized(backward.lower(params, batch, outputs))
    assert hlo.exchanges(program) == {"all-reduce, entry": 1}


@pytest.mark.core
@everywhere
@pytest.mark.parametrize(
    "in_place", [slow(False), pytest.param(True, marks=needs_in_place)]
)
def test_in_place_or_not_the_gradients_are_the_same(way, in_place):
    mesh = None if way in devices.INSIDE else mesh_of(way)
    options = {} if mesh is None else {"mesh": mesh, "axis_name": AXIS}
    encoded = oa.microbatch(encode, num_microbatches=2, in_place=in_place, **options)
    if mesh is None:
        step = local_step(way, contrastive(encoded, gathered))
    else:
        loss = contrastive(encoded, everywhere_on(mesh))
        step = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    got = step(PARAMS, SCALE, devices.whole(way, BATCH))
    close(joined(way, got), wanted())


@everywhere
def test_bfloat16_parameters_get_bfloat16_gradients(way):
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)

    def encode_wide(params, batch):
        return encode(jax.tree.map(lambda x: x.astype(jnp.float32), params), batch)

    whole = jax.value_and_grad(contrastive(encode_wide), (0, 1, 2))
    mesh = None if way in devices.INSIDE else mesh_of(way)
    options = {} if mesh is None else {"mesh": mesh, "axis_name": AXIS}
    encoded = oa.microbatch(encode_wide, num_microbatches=2, **options)
    if mesh is None:
        step = local_step(way, contrastive(encoded, gathered))
    else:
        loss = contrastive(encoded, everywhere_on(mesh))
        step = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    got = joined(way, step(narrow, SCALE, devices.whole(way, BATCH)))
    value, (params, scale, batch) = jax.jit(whole)(narrow, SCALE, BATCH)
    close((got[0], got[1][1:]), (value, (scale, batch)))
    # Devices exchange them in bfloat16, as those of any function.
    close(got[1][0], params, rtol=2e-2, atol=2e-3)


# --- What `fun` closes over ---


def closing_over(**options):
    """`encode` in micro-batches, with parameters that are no argument of it."""

    def encoded(params, batch):
        f = oa.microbatch(
            lambda batch: encode(params, batch),
            num_microbatches=4,
            batch_argnums=0,
            **options,
        )
        return f(batch)

    return encoded


@ways_to_cast
def test_parameters_may_be_closed_over_inside_of_the_axis(way, casts):
    """Where they are not cast to vary, `jax.grad` adds them up in the loop."""
    step = local_step(way, contrastive(closing_over(), gathered), casts=casts)
    args = PARAMS, SCALE, devices.whole(way, BATCH)
    program = optimized(step.lower(*args))
    close(joined(way, program(*args)), wanted())
    assert len(in_loops(program)) == (0 if casts else 1)


def test_parameters_may_be_closed_over_on_a_mesh_with_one_all_reduce():
    """On one with Auto axes: of Explicit ones JAX wants them as arguments."""
    mesh = devices.mesh()
    encoded = closing_over(mesh=mesh, axis_name=AXIS)
    params, batch = placed(mesh, PARAMS), placed(mesh, BATCH, AXIS)

    @jax.jit
    def backward(params, batch, cotangents):
        return jax.vjp(encoded, params, batch)[1](cotangents)

    cotangents = encode(PARAMS, BATCH)
    program = optimized(backward.lower(params, batch, cotangents))
    assert hlo.exchanges(program) == {"all-reduce, entry": 1}
    whole = jax.vjp(encode, PARAMS, BATCH)[1](cotangents)
    close(program(params, batch, cotangents), whole)


@outside
def test_on_a_mesh_other_axes_and_static_arguments_work(way):
    mesh = mesh_of(way)

    def columns(params, x, mode, *, factor):
        assert mode == "train"
        return embed(params, x.T) * factor

    f = oa.microbatch(
        columns, num_microbatches=4, batch_axis=1, mesh=mesh, axis_name=AXIS
    )
    step = jax.jit(
        jax.grad(lambda *args: jnp.mean(f(*args, "train", factor=2.0) ** 2), (0, 1))
    )
    params, x = jax.grad(lambda *args: jnp.mean((2 * embed(*args)) ** 2), (0, 1))(
        PARAMS, X
    )
    close(step(placed(mesh, PARAMS), placed(mesh, X.T, None, AXIS)), (params, x.T))


@outside
def test_a_gradient_on_a_mesh_can_be_differentiated(way):
    mesh = mesh_of(way)

    def second(f, replicated=lambda x: x):
        def loss(params, x):
            rows = f(params, x)
            return compare(rows, replicated(rows))

        def squares(params, x):
            grads = jax.grad(loss)(params, x)
            return sum(jnp.sum(g**2) for g in jax.tree.leaves(grads))

        return jax.jit(jax.grad(squares))

    f = oa.microbatch(embed, num_microbatches=4, mesh=mesh, axis_name=AXIS)
    got = second(f, everywhere_on(mesh))(placed(mesh, PARAMS), placed(mesh, X, AXIS))
    close(got, second(embed)(PARAMS, X), rtol=1e-4, atol=1e-5)


# --- From plain jit, without `mesh` ---


@outside
def test_without_a_mesh_the_compiler_reduces_in_every_micro_batch(way):
    mesh = mesh_of(way)
    encoded = oa.microbatch(encode, num_microbatches=4)
    loss = contrastive(encoded, everywhere_on(mesh))
    step = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    args = *placed(mesh, (PARAMS, SCALE)), placed(mesh, BATCH, AXIS)
    program = optimized(step.lower(*args))
    close(program(*args), wanted())
    assert [x.name for x in in_loops(program)] == ["all-reduce"]
    for output in jax.jit(encoded)(args[0], args[2]):
        assert output.sharding.is_equivalent_to(NamedSharding(mesh, P(AXIS)), 2)


@pytest.mark.core
@pytest.mark.parametrize("in_context", [True, False])
@pytest.mark.parametrize("microbatch_size", [3 * COUNT, slow(COUNT)])
def test_an_explicit_mesh_holds_what_is_kept_of_each_example(
    in_context, microbatch_size
):
    """Also of a smaller last micro-batch, and outside of `jax.set_mesh`."""
    mesh = devices.mesh(AxisType.Explicit)
    split = NamedSharding(mesh, P(AXIS))
    params, x = placed(mesh, PARAMS), placed(mesh, X, AXIS)
    size = {"microbatch_size": microbatch_size}

    def loss(params, x):
        rows = embed(params, x)
        return jnp.mean(rows**2), rows

    @jax.jit
    def step(params, x):
        _, vjp = jax.vjp(oa.microbatch(embed, **size), params, x)
        (_, rows), grads = oa.value_and_grad(loss, has_aux=True, aux="concat", **size)(
            params, x
        )
        return rows, grads, vjp(2 * rows / rows.size)

    with jax.set_mesh(mesh) if in_context else contextlib.nullcontext():
        rows, grads, (own, of_batch) = step(params, x)
    close(rows, embed(PARAMS, X))
    value = lambda params, x: loss(params, x)[0]  # noqa: E731
    close((own, of_batch), jax.grad(value, (0, 1))(PARAMS, X))
    close(grads, own)
    assert rows.sharding.is_equivalent_to(split, 2)
    assert of_batch.sharding.is_equivalent_to(split, 2)


@KINDS
def test_parameters_sharded_over_the_batch_axis_work_without_a_mesh(kind):
    """FSDP: gradients come back as the parameters lie."""
    mesh = devices.mesh(kind)
    sharding = NamedSharding(mesh, P(None, AXIS))
    w, x = jax.device_put(normal(3, WIDTH), sharding), placed(mesh, X, AXIS)

    def features(w, x):
        return jnp.tanh(x @ everywhere_on(mesh)(w))

    @jax.jit
    def step(w, x):
        f = oa.microbatch(features, num_microbatches=4)
        grad = jax.grad(lambda w: jnp.sum(jnp.mean(f(w, x), 0) ** 2))(w)
        if kind == AxisType.Auto:
            grad = jax.lax.with_sharding_constraint(grad, sharding)
        return grad

    got = step(w, x)
    assert got.sharding.is_equivalent_to(sharding, 2)
    whole = jax.grad(lambda w: jnp.sum(jnp.mean(jnp.tanh(X @ w), 0) ** 2))
    close(got, whole(normal(3, WIDTH)))


# --- Meshes with more than one axis ---


def two_axes(kind):
    return jax.make_mesh((COUNT // 2, 2), (AXIS, "model"), axis_types=(kind, kind))


def on_two_axes(kind, axis_name, specs, size):
    """The contrastive step on such a mesh, compiled, and what it returned."""
    mesh = two_axes(kind)
    params = {name: placed(mesh, x, *specs[name]) for name, x in PARAMS.items()}
    args = params, placed(mesh, SCALE), placed(mesh, BATCH, axis_name)
    encoded = oa.microbatch(encode, mesh=mesh, axis_name=axis_name, **size)
    replicated = everywhere_on(mesh)

    def both(params, batch):
        images, texts = encoded(params, batch)
        return replicated(images), replicated(texts)

    step = jax.jit(jax.value_and_grad(contrastive(both), (0, 1, 2)))
    program = optimized(step.lower(*args))
    return args, program, program(*args)


@needs_four
@KINDS
@pytest.mark.parametrize("size", [EQUAL, slow(RAGGED)])
def test_a_model_axis_is_left_to_the_compiler(kind, size):
    specs = {"w": (None, "model"), "b": ("model",)}
    args, program, got = on_two_axes(kind, AXIS, specs, size)
    close(got, wanted())
    for name, grad in got[1][0].items():
        assert grad.sharding.is_equivalent_to(args[0][name].sharding, grad.ndim)
    # The gradient of the examples needs both halves of the parameters.
    own = sum(x.nbytes for x in in_loops(program))
    assert own < hlo.nbytes(PARAMS) / 2


@needs_four
@KINDS
@pytest.mark.parametrize("size", [RAGGED, slow(EQUAL)])
def test_two_axis_names_act_as_one_axis(kind, size):
    specs = dict.fromkeys(PARAMS, ())
    _, program, got = on_two_axes(kind, (AXIS, "model"), specs, size)
    close(got, wanted())
    assert not in_loops(program)


@needs_four
@pytest.mark.parametrize("check_vma", [True, False])
def test_a_shard_map_over_some_axes_equals_the_whole_batch(check_vma):
    loss = contrastive(oa.microbatch(encode, num_microbatches=2), gathered)

    def local(params, scale, batch):
        if check_vma:
            params, scale = jax.lax.pcast((params, scale), AXIS, to="varying")
        value, grads = jax.value_and_grad(loss, (0, 1))(params, scale, batch)
        return jax.lax.pmean((value, grads), AXIS)

    mapped = jax.shard_map(
        local,
        mesh=two_axes(AxisType.Auto),
        axis_names={AXIS},
        in_specs=(P(), P(), P(AXIS)),
        out_specs=P(),
        check_vma=check_vma,
    )
    value, grads = wanted()
    close(jax.jit(mapped)(PARAMS, SCALE, BATCH), (value, grads[:2]))


# --- What becomes of the outputs on a mesh ---


POLICIES = {"concat": "concat", "stack": "stack", "sum": "sum", "mean": "mean"}
POLICIES |= {"last": "last", "seen": "sum"}


def several(params, x, mask):
    """An output for each policy, with `mask.sum()` examples in a mean."""
    rows = jnp.where(mask[:, None], embed(params, x), 0)
    mean = rows.sum(0) / jnp.maximum(mask.sum(), 1).astype(jnp.float32)
    outputs = dict.fromkeys(POLICIES, mean)
    return outputs | {"concat": rows, "seen": mask.sum()}


def of_all_devices(params, x, mask, whole):
    """What becomes of them, with ``[device, example, micro-batch]`` in view."""
    parts = [
        several(params, x[i], mask[i])
        for rows in np.arange(EXAMPLES).reshape(COUNT, -1, whole)
        for i in rows.T
    ]
    means = jnp.stack([part["mean"] for part in parts])
    weights = jnp.stack([part["seen"] for part in parts]).astype(jnp.float32)
    return {
        "concat": jnp.where(mask[:, None], embed(params, x), 0),
        "stack": means,
        "sum": means.sum(0),
        "mean": weights @ means / weights.sum(),
        "last": means[-1],
        "seen": mask.sum(),
    }


@outside
@pytest.mark.parametrize("weighted", [True, slow(False)])
def test_outputs_are_those_of_the_micro_batches_of_all_devices(way, weighted):
    """As if they had run one after another: W is that of all; and their derivative."""
    mesh = mesh_of(way)
    mask = jnp.ones(EXAMPLES, bool)
    options = {}
    if weighted:
        mask = normal(EXAMPLES) < 0.3
        mask = mask.at[: EXAMPLES // COUNT].set(False)  # no weight on one device
        options = {"weight": lambda *args: args[-1].sum()}
    f = oa.microbatch(
        several,
        num_microbatches=2,
        batch_argnums=(1, 2),
        outputs=POLICIES,
        mesh=mesh,
        axis_name=AXIS,
        **options,
    )

    def total(outputs, replicated=lambda x: x):
        """Of all entries, each by a factor of its own."""
        return sum(
            jnp.sum(replicated(outputs[name]) * normal(*outputs[name].shape))
            for name in POLICIES
            if name != "seen"
        )

    @jax.jit
    def step(params, x, mask):
        def loss(params, x):
            outputs = f(params, x, mask)
            return total(outputs, everywhere_on(mesh)), outputs

        grads, outputs = jax.grad(loss, (0, 1), has_aux=True)(params, x)
        return outputs, grads

    def whole(params, x):
        return of_all_devices(params, x, mask, 2)

    outputs, grads = step(placed(mesh, PARAMS), *placed(mesh, (X, mask), AXIS))
    close(outputs, jax.jit(whole)(PARAMS, X))
    gradient = jax.jit(jax.grad(lambda *args: total(whole(*args)), (0, 1)))
    close(grads, gradient(PARAMS, X))
    for name, output in outputs.items():
        spec = P(AXIS) if name in ("concat", "stack") else P()
        sharding = NamedSharding(mesh, spec)
        assert output.sharding.is_equivalent_to(sharding, output.ndim)


@outside
def test_micro_batches_of_weight_0_may_be_nan_on_a_mesh(way):
    """Those of one device here; in the sums, and in their derivative."""
    mesh = mesh_of(way)
    own = EXAMPLES // COUNT
    x = X.at[:own].set(jnp.nan)

    def mean(params, x):
        return embed(params, x).mean(0)

    def count(params, x):
        del params
        return jnp.sum(jnp.isfinite(x[:, 0]))

    f = oa.microbatch(
        mean,
        num_microbatches=2,
        outputs="mean",
        weight=count,
        mesh=mesh,
        axis_name=AXIS,
    )
    step = jax.jit(jax.value_and_grad(lambda *args: jnp.sum(f(*args) ** 2)))
    got = step(placed(mesh, PARAMS), placed(mesh, x, AXIS))
    close(got, jax.value_and_grad(lambda p: jnp.sum(mean(p, X[own:]) ** 2))(PARAMS))


@outside
@pytest.mark.parametrize("number", [3, slow(1)])
def test_a_number_of_micro_batches_holds_for_all_devices_of_a_mesh(way, number):
    mesh = mesh_of(way)

    @jax.jit
    def step(params, x, number):
        f = oa.microbatch(
            lambda params, x: embed(params, x).mean(0),
            num_microbatches=4,
            num_real_microbatches=number,
            outputs="mean",
            mesh=mesh,
            axis_name=AXIS,
        )
        return jax.value_and_grad(lambda *args: jnp.sum(f(*args) ** 2))(params, x)

    real = X.reshape(COUNT, 4, 3)[:, :number].reshape(-1, 3)
    got = step(placed(mesh, PARAMS), placed(mesh, X, AXIS), number)
    whole = jax.value_and_grad(lambda p: jnp.sum(embed(p, real).mean(0) ** 2))
    close(got, whole(PARAMS))


@inside
def test_each_device_may_run_another_number_of_micro_batches(way):
    """Inside of the axis outputs are each device's own, sums included."""

    def step(params, x):
        if way == "checked":
            params = jax.lax.pcast(params, AXIS, to="varying")
        f = oa.microbatch(
            lambda params, x: embed(params, x).sum(0) / EXAMPLES,
            microbatch_size=3,
            outputs="sum",
            num_real_microbatches=jax.lax.axis_index(AXIS) % 3,
        )

        def loss(params):
            total = f(params, x)
            return jnp.sum(jax.lax.psum(total, AXIS) * total)

        return jax.lax.psum(jax.grad(loss)(params), AXIS)

    counts = [min(3 * (i % 3), 4) for i in range(COUNT)]
    parts = [x[:n] for x, n in zip(X.reshape(COUNT, 4, 3), counts, strict=True)]
    real = jnp.concatenate(parts)
    f = devices.inside(way, step, (None, 0), (None,))
    got = devices.result(way, f(PARAMS, devices.whole(way, X)))
    whole = jax.grad(lambda p: jnp.sum((embed(p, real).sum(0) / EXAMPLES) ** 2))
    close(got, whole(PARAMS))


@outside
def test_random_keys_differ_between_devices_of_a_mesh(way):
    """One for each micro-batch of all, and the same in both passes."""
    mesh = mesh_of(way)

    def noisy(params, x, key):
        noise = jax.random.normal(key, (len(x), WIDTH))
        return embed(params, x) * noise

    f = oa.microbatch(
        noisy, num_microbatches=2, rng_argnums=2, mesh=mesh, axis_name=AXIS
    )
    key = jax.random.key(0)

    def whole(params, x):
        size = EXAMPLES // COUNT // 2
        keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(2 * COUNT))
        noise = jax.vmap(lambda key: jax.random.normal(key, (size, WIDTH)))(keys)
        parts = noise.reshape(COUNT, 2, size, WIDTH).swapaxes(1, 2)
        return embed(params, x) * parts.reshape(EXAMPLES, WIDTH)

    def of(f):
        def loss(params, x):
            rows = f(params, x)
            return jnp.sum(rows.sum(0) ** 2), rows

        return jax.jit(jax.value_and_grad(loss, has_aux=True))

    got = of(lambda params, x: f(params, x, key))(
        placed(mesh, PARAMS), placed(mesh, X, AXIS)
    )
    close(got, of(whole)(PARAMS, X))


# --- Carries, and collectives of the function's own ---


def with_carry(params, x, stats):
    """Running statistics that are part of what is differentiated, and a counter."""
    mean = 0.9 * stats["mean"] + 0.1 * jax.lax.stop_gradient(x.mean(0))
    new = {"mean": mean, "count": stats["count"] + 1}
    return embed(params, x - stats["mean"][None]), new


STATS = {"mean": jnp.ones(3), "count": jnp.int32(0)}


@outside
@pytest.mark.parametrize("weighted", [True, slow(False)])
def test_a_carry_is_averaged_over_the_devices_as_in_value_and_grad(way, weighted):
    mesh = mesh_of(way)
    own = EXAMPLES // COUNT
    x = X.at[:own].set(0) if weighted else X  # The first device has no weight.

    def count(params, x, stats):
        del params, stats
        return jnp.sum(jnp.any(x != 0, -1))

    options = {"mesh": mesh, "axis_name": AXIS, "num_microbatches": 2}
    options |= {"carry_argnum": 2} | ({"weight": count} if weighted else {})

    def loss(params, x, stats):
        rows, stats = with_carry(params, x, stats)
        return jnp.mean(rows), stats

    @jax.jit
    def step(params, x, stats):
        mean = oa.microbatch(loss, outputs="mean", **options)
        got = jax.value_and_grad(mean, has_aux=True)(params, x, stats)
        return got, oa.value_and_grad(loss, **options)(params, x, stats)

    got, as_before = step(placed(mesh, PARAMS), placed(mesh, x, AXIS), STATS)
    close(got, as_before)
    assert got[0][1]["count"] == 2


@inside
def test_a_carry_is_each_device_s_own_inside_of_the_axis(way):
    """And each micro-batch is given the one that it had in the forward pass."""

    def step(params, x):
        if way == "checked":
            params = jax.lax.pcast(params, AXIS, to="varying")
        f = oa.microbatch(with_carry, num_microbatches=2, carry_argnum=2)

        def loss(params):
            rows, stats = f(params, x, STATS)
            return jnp.sum(jax.lax.psum(rows.sum(0), AXIS) * rows.sum(0)), stats

        grads, stats = jax.grad(loss, has_aux=True)(params)
        return jax.lax.psum(grads, AXIS), stats["mean"][None]

    def whole(params):
        total, means = 0, []
        for part in X.reshape(COUNT, -1, 2, 3):
            stats = STATS
            for j in range(2):
                rows, stats = with_carry(params, part[:, j], stats)
                total = total + rows.sum(0)
            means.append(stats["mean"])
        return jnp.sum(total**2), jnp.stack(means)

    wanted, means = jax.jit(jax.grad(whole, has_aux=True))(PARAMS)
    f = devices.inside(way, step, (None, 0), 0 if way == "pmap" else (None, 0))
    grads, got = f(PARAMS, devices.whole(way, X))
    close(devices.first(grads) if way == "pmap" else grads, wanted)
    close(got.reshape(COUNT, 3), means)


@outside
def test_what_is_only_read_of_a_carry_has_a_gradient_of_all_devices(way):
    """Exchanged once, as that of any argument."""
    mesh = mesh_of(way)

    def fun(carry, x):
        rows = embed(carry["read"], x)
        return rows, carry | {"count": carry["count"] + 1}

    f = oa.microbatch(
        fun, num_microbatches=4, carry_argnum=0, mesh=mesh, axis_name=AXIS
    )

    def step(params, x):
        rows, carry = f({"read": params, "count": jnp.int32(0)}, x)
        return jnp.sum(rows**2), carry["count"]

    step = jax.jit(jax.grad(step, has_aux=True))
    program = optimized(step.lower(placed(mesh, PARAMS), placed(mesh, X, AXIS)))
    grads, count = program(placed(mesh, PARAMS), placed(mesh, X, AXIS))
    close(grads, jax.grad(lambda p: jnp.sum(embed(p, X) ** 2))(PARAMS))
    assert count == 4
    assert not in_loops(program)


def synchronised(params, x):
    """Batch normalisation over a micro-batch of all devices."""
    x = x - jax.lax.pmean(x.mean(0), AXIS)[None]
    scale = jax.lax.rsqrt(jax.lax.pmean((x**2).mean(0), AXIS) + 1e-3)
    return embed(params, x * scale[None])


def normalised(params, x):
    """The same on one device, of four micro-batches."""
    x = x.reshape(COUNT, -1, 4, 3)
    x = x - x.mean((0, 1), keepdims=True)
    x = x * jax.lax.rsqrt((x**2).mean((0, 1), keepdims=True) + 1e-3)
    return embed(params, x.reshape(EXAMPLES, 3))


def compare(rows, others):
    return jnp.mean(jax.nn.logsumexp(rows @ others.T, -1) - jnp.sum(rows**2, -1))


@inside
def test_synchronised_batch_norm_exchanges_what_is_its_own(way):
    """In both passes, and nothing of the gradient."""
    f = oa.microbatch(synchronised, num_microbatches=4)

    def step(params, x):
        if way == "checked":
            params = jax.lax.pcast(params, AXIS, to="varying")

        def loss(params):
            rows = f(params, x)
            return compare(rows, gathered(rows))

        return jax.lax.pmean(jax.value_and_grad(loss)(params), AXIS)

    mapped = devices.inside(way, step, (None, 0), (None,))
    x = devices.whole(way, X)
    program = optimized(mapped.lower(PARAMS, x))
    got = devices.result(way, program(PARAMS, x))

    def whole(params):
        rows = normalised(params, X)
        return compare(rows, rows)

    close(got, jax.jit(jax.value_and_grad(whole))(PARAMS))
    own = in_loops(program)
    assert own
    assert sum(x.nbytes for x in own) < hlo.nbytes(PARAMS)


@outside
@pytest.mark.parametrize("in_place", [None, slow(False)])
def test_devices_without_weight_meet_the_others_in_batch_norm(way, in_place):
    """No device waits for one that leaves out its gradient."""
    mesh = mesh_of(way)

    def mean(params, x):
        return synchronised(params, x).mean(0)

    def weight(params, x):
        del params, x
        return jnp.where(jax.lax.axis_index(AXIS) == 0, 0.0, 1.0)

    f = oa.microbatch(
        mean,
        num_microbatches=4,
        outputs="mean",
        weight=weight,
        in_place=in_place,
        mesh=mesh,
        axis_name=AXIS,
    )
    step = jax.jit(jax.grad(lambda *args: jnp.sum(f(*args) ** 2)))
    own = EXAMPLES // COUNT

    def whole(params):
        return jnp.sum(normalised(params, X)[own:].mean(0) ** 2)

    close(step(placed(mesh, PARAMS), placed(mesh, X, AXIS)), jax.grad(whole)(PARAMS))


@outside
def test_a_function_on_a_mesh_may_name_the_axis_itself(way):
    mesh = mesh_of(way)
    f = oa.microbatch(synchronised, num_microbatches=4, mesh=mesh, axis_name=AXIS)

    def of(f):
        def loss(params, x):
            rows = f(params, x)
            return compare(rows, everywhere_on(mesh)(rows))

        return jax.jit(jax.value_and_grad(loss, (0, 1)))

    got = of(f)(placed(mesh, PARAMS), placed(mesh, X, AXIS))

    def whole(params, x):
        rows = normalised(params, x)
        return compare(rows, rows)

    close(got, jax.jit(jax.value_and_grad(whole, (0, 1)))(PARAMS, X))


@devices.parametrized(["pmap", "checked", "unchecked"])
def test_each_device_may_have_parameters_of_its_own(way):
    """An ensemble that sees one batch: its gradient is that of all members."""
    ensemble = jax.tree.map(lambda x: jnp.stack([x] * COUNT), PARAMS)
    ensemble["b"] += jnp.arange(COUNT, dtype=jnp.float32)[:, None]
    f = oa.microbatch(embed, num_microbatches=4)

    def loss(f, params, x):
        return jnp.sum(jnp.mean(f(params, x), 0) ** 2)

    def step(params, x):
        if way != "pmap":
            params = jax.tree.map(lambda p: p[0], params)
        if way == "checked":
            x = jax.lax.pcast(x, AXIS, to="varying")
        grads, of_batch = jax.grad(functools.partial(loss, f), (0, 1))(params, x)
        if way != "pmap":
            grads = jax.tree.map(lambda g: g[None], grads)
        return grads, jax.lax.psum(of_batch, AXIS)

    mapped = devices.inside(way, step, (0, None), 0 if way == "pmap" else (0, None))
    grads, of_batch = mapped(ensemble, X)
    whole = jax.grad(functools.partial(loss, embed), (0, 1))
    members = [whole(jax.tree.map(lambda p: p[i], ensemble), X) for i in range(COUNT)]  # noqa: B023
    close(grads, jax.tree.map(lambda *g: jnp.stack(g), *[m[0] for m in members]))
    of_batch = devices.first(of_batch) if way == "pmap" else of_batch
    close(of_batch, sum(m[1] for m in members))


# --- Inside of `oa.value_and_grad` ---


@everywhere
def test_value_and_grad_may_run_it_in_each_of_its_micro_batches(way):
    """An outer micro-batch of all devices is compared with itself."""

    def own(params, x):
        rows = oa.microbatch(embed, num_microbatches=2)(params, x)
        return compare(rows, gathered(rows))

    f = devices.in_step(way, own, num_microbatches=2)
    x = devices.whole(way, X)
    program = optimized(f.lower(PARAMS, x))
    got = devices.result(way, program(PARAMS, x))

    def whole(params):
        parts = X.reshape(COUNT, -1, 2, 3)
        rows = [embed(params, parts[:, :, i].reshape(-1, 3)) for i in range(2)]
        return sum(compare(r, r) for r in rows) / 2

    close(got, jax.jit(jax.value_and_grad(whole))(PARAMS))
    assert "all-reduce" not in [x.name for x in in_loops(program)]


# --- What can go wrong ---


def test_an_axis_name_needs_a_mesh():
    with refused("`axis_name='data'` needs `mesh`", "leave it out"):
        oa.microbatch(encode, num_microbatches=2, axis_name=AXIS)


def test_a_mesh_needs_its_axis_name():
    with refused("`mesh` needs `axis_name`", "has 'data'"):
        oa.microbatch(encode, num_microbatches=2, mesh=devices.mesh())
    with refused("`axis_name='batch'` is not an axis of `mesh`"):
        oa.microbatch(
            encode, num_microbatches=2, mesh=devices.mesh(), axis_name="batch"
        )


@inside
def test_a_mesh_inside_of_its_axis_is_refused(way):
    """Both options are to go, other than in `value_and_grad`."""
    f = oa.microbatch(embed, num_microbatches=2, mesh=devices.mesh(), axis_name=AXIS)
    with refused("inside an axis called 'data'", "Leave `mesh` and `axis_name` out"):
        devices.inside(way, f, (None, 0), (0,))(PARAMS, devices.whole(way, X))


@outside
def test_a_mesh_inside_of_value_and_grad_on_it_is_refused(way):
    f = oa.microbatch(embed, num_microbatches=2, mesh=mesh_of(way), axis_name=AXIS)
    step = devices.in_step(way, lambda p, x: jnp.mean(f(p, x)), num_microbatches=2)
    with refused("Leave `mesh` and `axis_name` out"):
        step(PARAMS, X)


@outside
def test_a_batch_that_the_devices_do_not_divide_is_refused(way):
    options = {"mesh": mesh_of(way), "axis_name": AXIS}
    f = jax.jit(oa.microbatch(embed, num_microbatches=2, **options))
    with refused(f"the {COUNT} devices do not divide the batch: `x` holds"):
        f(PARAMS, X[:-1])
    f = jax.jit(oa.microbatch(embed, num_microbatches=8, **options))
    with refused(f"4 on each of {COUNT} devices", "Use 1, 2 or 4, or"):
        f(PARAMS, X)
    f = jax.jit(oa.microbatch(embed, microbatch_size=COUNT // 2, **options))
    with refused(f"is not a multiple of {COUNT}"):
        f(PARAMS, X)


def test_parameters_sharded_over_the_batch_axis_are_refused_with_a_mesh():
    mesh = devices.mesh(AxisType.Explicit)
    params = PARAMS | {"w": placed(mesh, PARAMS["w"], None, AXIS)}
    f = oa.microbatch(embed, num_microbatches=2, mesh=mesh, axis_name=AXIS)
    with refused("`params['w']` is sharded over", "FSDP", "leave `mesh`"):
        jax.jit(f)(params, X)
