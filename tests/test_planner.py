"""The planner: its search, the compiler's figures, and what they are in reality."""

import json
import logging
import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import optax_accum as oa
from optax_accum.diagnose import _memory, _plan

WIDTH, BATCH = 64, 512
KIB = 1024


def loss(w, x):
    return jnp.mean(jnp.tanh(jnp.tanh(x @ w) @ w) ** 2)


def make_step(num_microbatches):
    grad = oa.grad(loss, num_microbatches=num_microbatches)
    return jax.jit(lambda w, x: w - grad(w, x), donate_argnums=0)


SHAPES = (
    jax.ShapeDtypeStruct((WIDTH, WIDTH), jnp.float32),
    jax.ShapeDtypeStruct((BATCH, WIDTH), jnp.float32),
)


def plan(make_step=make_step, *args, **options):
    options = {"batch_size": BATCH, "memory_limit": 300 * KIB, "headroom": 0} | options
    return oa.diagnose.plan_microbatches(make_step, *(args or SHAPES), **options)


# --- The search, a function of a memory curve ---

CANDIDATES = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96]


def searched(curve, limit, candidates=CANDIDATES):
    """What the search finds, and what it asked for."""
    sizes: dict[int, int] = {}
    while (number := _plan.next_to_try(candidates, sizes, limit)) is not None:
        assert number not in sizes
        sizes[number] = curve(number)
    found = min((k for k, size in sizes.items() if size <= limit), default=None)
    return found, list(sizes)


@pytest.mark.parametrize("limit", [2, 5, 9.5, 20, 33, 49, 80, 97, 300])
@pytest.mark.parametrize("floor", [0, 1])
def test_the_search_finds_the_fewest_that_fit_on_a_falling_curve(limit, floor):
    def curve(k):
        return floor + 96 / k

    expected = next((k for k in CANDIDATES if curve(k) <= limit), None)
    found, asked = searched(curve, limit)
    assert found == expected
    assert len(asked) <= 2 * math.log2(len(CANDIDATES)) + 2


@pytest.mark.parametrize(("limit", "expected"), [(10, 1), (9, None)])
def test_the_search_asks_little_on_a_flat_curve(limit, expected):
    found, asked = searched(lambda _: 10, limit)
    assert found == expected
    assert len(asked) <= (1 if expected else 5)


def test_the_search_tries_the_neighbours_of_the_smallest_if_nothing_fits():
    found, asked = searched(lambda k: 10 + abs(math.log2(k / 6)), 5)
    assert found is None
    assert {4, 6, 8} <= set(asked)
    assert len(asked) < len(CANDIDATES)


def test_the_search_finds_a_valley_between_the_doublings():
    valley = {3: 8, 4: 6, 6: 4, 8: 6, 12: 8}
    found, _ = searched(lambda k: valley.get(k, 20), 4)
    assert found == 6


@pytest.mark.parametrize("seed", range(20))
def test_the_search_result_fits_and_the_one_before_does_not_on_any_curve(seed):
    random = np.random.default_rng(seed)
    curve = dict(zip(CANDIDATES, random.random(len(CANDIDATES)), strict=True))
    found, asked = searched(curve.get, 0.4)
    if found is None:
        assert min(curve[k] for k in asked) > 0.4
    else:
        assert curve[found] <= 0.4
        before = [k for k in CANDIDATES if k < found]
        assert not before or (before[-1] in asked and curve[before[-1]] > 0.4)


@pytest.mark.parametrize("limit", [0.5, 1])
def test_the_search_tries_a_single_candidate_once(limit):
    assert searched(lambda _: 1, limit, [7]) == (7 if limit == 1 else None, [7])


# --- The compiler's figures ---


def test_the_plan_is_the_fewest_micro_batches_that_fit():
    found = plan()
    sizes = {c.num_microbatches: c.memory.total for c in found.candidates}
    limit = 300 * KIB
    assert found.num_microbatches == min(
        k for k, size in sizes.items() if size <= limit
    )
    assert 1 < found.num_microbatches < BATCH
    assert sizes[found.num_microbatches // 2] > limit
    assert [c.fits for c in found.candidates] == [s <= limit for s in sizes.values()]
    assert found.memory_limit == limit


def test_the_memory_is_that_of_the_compiled_program():
    found = plan(memory_limit=2**30)
    (candidate,) = found.candidates
    analysis = make_step(1).lower(*SHAPES).compile().memory_analysis()
    assert candidate.memory == (
        analysis.argument_size_in_bytes,
        analysis.output_size_in_bytes,
        analysis.temp_size_in_bytes,
        analysis.alias_size_in_bytes,
    )
    nbytes = 4 * WIDTH * WIDTH
    assert candidate.memory.aliased == nbytes  # donated
    assert candidate.memory.arguments == nbytes + 4 * BATCH * WIDTH
    assert candidate.memory.total == (
        candidate.memory.arguments + candidate.memory.temporaries
    )


def test_the_planned_step_can_be_called():
    found = plan()
    random = np.random.default_rng(0)
    w, x = (jnp.asarray(random.normal(size=s.shape), s.dtype) for s in SHAPES)
    expected = w - jax.grad(loss)(w, x)
    np.testing.assert_allclose(found.step(w, x), expected, atol=1e-5)


def test_each_candidate_is_compiled_once_and_none_is_run():
    made = []

    def counted(k):
        made.append(k)
        step = make_step(k)

        def guarded(w, x):
            jax.debug.callback(lambda: pytest.fail("it was run"))
            return step(w, x)

        return guarded

    found = plan(counted)
    assert sorted(made) == [c.num_microbatches for c in found.candidates]
    assert len(set(made)) == len(made)


def test_a_step_without_jit_can_be_planned():
    w, x = (jnp.zeros(s.shape, s.dtype) for s in SHAPES)
    found = plan(lambda k: oa.grad(loss, num_microbatches=k), w, np.asarray(x))
    assert found.step(w, x).shape == w.shape
    assert found.candidates[0].memory.aliased == 0


def test_a_lowered_step_can_be_planned():
    """As where the shapes of the arguments change with the number."""
    tx = oa.accumulate(optax.sgd(0.1), every_k=4)
    w = SHAPES[0]
    state = jax.eval_shape(tx.init, w)

    def micro_step(w, state, x):
        return tx.update_params(jax.grad(loss)(w, x), state, w)

    def lowered(k):
        part = jax.ShapeDtypeStruct((BATCH // k, WIDTH), jnp.float32)
        return jax.jit(micro_step, donate_argnums=(0, 1)).lower(w, state, part)

    found = oa.diagnose.plan_microbatches(
        lowered, batch_size=BATCH, memory_limit=100 * KIB
    )
    assert found.num_microbatches > 1
    # Those of the whole batch alone would not have fitted.
    whole, *_, part = (candidate.memory for candidate in found.candidates)
    assert whole
    assert whole.arguments > 100 * KIB
    assert part
    assert part.arguments < 4 * BATCH * WIDTH


def test_a_compiled_step_can_be_planned():
    found = oa.diagnose.plan_microbatches(
        lambda k: make_step(k).lower(*SHAPES).compile(),
        batch_size=BATCH,
        memory_limit=300 * KIB,
        headroom=0,
    )
    assert found.num_microbatches == plan().num_microbatches


@pytest.mark.several_devices
def test_the_memory_is_per_device():
    devices = jax.device_count()
    mesh = jax.make_mesh(
        (devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
    )

    def make(k):
        return jax.jit(
            oa.grad(loss, num_microbatches=k, mesh=mesh, axis_name="data"),
        )

    def placed(shape, *spec):
        sharding = NamedSharding(mesh, P(*spec))
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    w, x = SHAPES
    found = plan(make, placed(w), placed(x, "data"), memory_limit=2**30)
    memory = found.candidates[0].memory
    assert memory.arguments == 4 * (WIDTH * WIDTH + BATCH * WIDTH // devices)


def test_candidates_may_be_given():
    found = plan(candidates=[32, 2, 8], batch_size=None)
    assert {c.num_microbatches for c in found.candidates} <= {2, 8, 32}
    assert found.num_microbatches in (8, 32)


def test_the_headroom_is_left_free():
    exact = plan(memory_limit=2**30).candidates[0].memory.total
    assert plan(memory_limit=exact).num_microbatches == 1
    assert plan(memory_limit=exact, headroom=0.1).num_microbatches > 1
    roomy = plan(memory_limit=math.ceil(exact / 0.9) + 1, headroom=0.1)
    assert roomy.num_microbatches == 1


def test_a_candidate_that_runs_the_compiler_out_of_memory_does_not_fit():
    class Refuses(jax.stages.Lowered):
        def __init__(self):
            pass

        def compile(self, *_, **__):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of hbm")

    def make(k):
        return Refuses() if k < 4 else make_step(k).lower(*SHAPES)

    found = oa.diagnose.plan_microbatches(make, batch_size=BATCH, memory_limit=2**30)
    assert found.num_microbatches == 4
    assert "out of memory" in str(found)
    assert found.candidates[0].memory is None

    with pytest.raises(ValueError, match="nothing fits") as error:
        oa.diagnose.plan_microbatches(
            lambda _: Refuses(), candidates=[1, 2], memory_limit=4096
        )
    assert "Use a device with more memory" in str(error.value)


def test_other_compiler_errors_are_raised():
    class Fails(jax.stages.Lowered):
        def __init__(self):
            pass

        def compile(self, *_, **__):
            raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        oa.diagnose.plan_microbatches(
            lambda _: Fails(), candidates=[1], memory_limit=4096
        )


# --- What people see ---


def test_the_plan_prints_as_a_table():
    found = plan()
    answer, title, headings, *rows = str(found).splitlines()
    assert answer == f"{found.num_microbatches} micro-batches: the fewest that fit"
    assert title == "limit: 300 KiB per device"
    roomy = str(plan(headroom=0.25)).splitlines()[1]
    assert roomy == "limit: 225 KiB per device, 300 KiB less 25% headroom"
    assert headings.split() == [
        *("micro-batches", "arguments", "outputs", "temporaries", "aliased"),
        *("total", "fits", "compiled", "in"),
    ]
    assert len({len(line) for line in (headings, *rows)}) == 1
    by_number = {int(row.split()[0]): row for row in rows}
    assert sorted(by_number) == [c.num_microbatches for c in found.candidates]
    assert " yes " in by_number[found.num_microbatches]
    assert " no " in by_number[1]
    assert repr(found) == str(found)


def test_each_candidate_is_logged(caplog):
    with caplog.at_level(logging.INFO, logger="optax_accum"):
        found = plan()
    messages = [r.getMessage() for r in caplog.records if r.name == "optax_accum"]
    assert len(messages) == 2 * len(found.candidates)
    assert messages[0] == "compiling the step with 1 micro-batch"
    assert messages[1].startswith("1 micro-batch: ")
    assert "does not fit (compiled in " in messages[1]


# --- Sizes and limits ---


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (150 * 2**20, "150 MiB"),
        (2.25 * 2**40, "2.25 TiB"),
    ],
)
def test_sizes_print_with_units(size, text):
    assert _memory.show_size(size) == text


class Device:
    """A device that reports its memory."""

    def __init__(self, stats):
        self.stats = stats

    def memory_stats(self):
        return self.stats


def test_the_default_limit_is_what_the_device_has_left(monkeypatch):
    stats = {"bytes_limit": 5000, "bytes_in_use": 1000}
    monkeypatch.setattr(_memory, "_devices", lambda _: [Device(stats), Device(stats)])
    assert _memory.available(()) == 4000
    other = Device({"bytes_limit": 3500, "bytes_in_use": 0})
    monkeypatch.setattr(_memory, "_devices", lambda _: [Device(stats), other])
    assert _memory.available(()) == 3500


def test_memory_of_the_arguments_is_not_counted_twice(monkeypatch):
    class Held(Device):
        """It calls itself equal to the device that holds the arguments."""

        def __hash__(self):
            return hash(device)

        def __eq__(self, other):
            return other in (device, self)

    x = jnp.zeros(100)  # 400 bytes, passed twice
    (device,) = x.devices()
    mine = Held({"bytes_limit": 5000, "bytes_in_use": 1000})
    monkeypatch.setattr(_memory, "_devices", lambda _: [mine])
    assert _memory.available((x, x, np.zeros(5), SHAPES[0])) == 4400


def test_the_limit_is_that_of_the_arguments_devices():
    last = jax.local_devices()[-1]
    x = jax.device_put(jnp.zeros(3), last)
    assert _memory._devices(({"x": x}, 3)) == [last]
    assert _memory._devices((3,)) == jax.local_devices()[:1]


# --- What cannot be planned ---


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        (
            {"batch_size": None},
            ValueError,
            ["`batch_size` or `candidates`", "candidates=None"],
        ),
        ({"batch_size": 0}, ValueError, ["`batch_size` must be an int >= 1", "got 0"]),
        ({"batch_size": 2.5}, TypeError, ["`batch_size`", "2.5"]),
        ({"candidates": []}, ValueError, ["is needed", "candidates=[]"]),
        ({"candidates": [0]}, ValueError, ["`candidates` must be an int >= 1"]),
        (
            {"candidates": [2, 3, 5]},
            ValueError,
            ["`candidates` 3, 5 do not divide `batch_size=512`", "leave `batch_size`"],
        ),
        ({"headroom": 1}, ValueError, ["`headroom`", "less than 1", "got 1"]),
        ({"headroom": "10%"}, TypeError, ["`headroom`", "'10%'"]),
        ({"memory_limit": 16}, ValueError, ["is 16 bytes", "pass 16 * 2**30"]),
        ({"memory_limit": 0}, ValueError, ["`memory_limit` must be", "got 0"]),
        ({"memory_limit": "16GiB"}, TypeError, ["`memory_limit`", "'16GiB' of type"]),
        ({"memory_limit": 1.6e10}, TypeError, ["`memory_limit`", "of type float"]),
        ({"memory_limit": True}, TypeError, ["`memory_limit`", "bool"]),
        (
            {"memory_limit": 100 * KIB, "headroom": 0.1},
            ValueError,
            [
                "100 KiB, less `headroom` 10%",
                "of which 144 KiB are arguments and outputs",
            ],
        ),
        (
            {"memory_limit": 150 * KIB},
            ValueError,
            [
                "nothing fits into `memory_limit` of 150 KiB",
                "The least is",
                "use jax.checkpoint",
                "  total  ",
            ],
        ),
    ],
)
def test_wrong_arguments_are_refused(options, error, words):
    with pytest.raises(error) as caught:
        plan(**options)
    for word in words:
        assert word in str(caught.value)


def test_lowered_steps_whose_arguments_do_not_fit_are_refused():
    """Each has its own, so that all are asked."""

    def lowered(k):
        return make_step(k).lower(*SHAPES)

    with pytest.raises(ValueError, match="are arguments and outputs, which") as error:
        oa.diagnose.plan_microbatches(
            lowered, candidates=[1, 2], memory_limit=100 * KIB
        )
    assert "of which 144 KiB are arguments and outputs" in str(error.value)


def test_arguments_beside_a_lowered_step_are_refused():
    with pytest.raises(TypeError, match="got 2 more in `args`"):
        plan(lambda k: make_step(k).lower(*SHAPES))


def test_a_step_in_place_of_the_function_that_makes_it_is_refused():
    with pytest.raises(TypeError, match="with num_microbatches=k") as error:
        plan(make_step(2))
    assert "`make_step` must take the number of micro-batches" in str(error.value)


def test_the_result_of_a_step_in_its_place_is_refused():
    with pytest.raises(TypeError, match="must return the training step") as error:
        plan(jnp.ones)
    assert "got ArrayImpl" in str(error.value)


def test_one_candidate_is_compiled_if_the_arguments_alone_do_not_fit():
    made = []

    def make(k):
        made.append(k)
        return make_step(k)

    with pytest.raises(ValueError, match="144 KiB are arguments"):
        plan(make, memory_limit=100 * KIB)
    assert made == [1]


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="reports its memory")
def test_a_cpu_without_a_limit_is_refused():
    with pytest.raises(ValueError, match="`memory_limit` is needed") as error:
        plan(memory_limit=None)
    assert "does not report how much memory it has" in str(error.value)


def test_a_backend_without_memory_analysis_is_refused():
    class Silent:
        def memory_analysis(self):
            return None

    with pytest.raises(RuntimeError, match="does not say how much memory"):
        _memory.Memory.of(Silent())


# --- Reality ---


@pytest.mark.slow
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="asks about CPU memory")
def test_the_planned_memory_is_the_rise_in_resident_memory():
    """Within 15 % and 24 MiB, what a thread pool and an allocator take beside it."""
    script = Path(__file__).parent / "support" / "resident_memory.py"
    output = subprocess.check_output([sys.executable, script], text=True)
    measured = json.loads(output)
    assert measured["planned"] > 300 * 2**20
    difference = abs(measured["rise"] - measured["planned"])
    assert difference < 0.15 * measured["planned"] + 24 * 2**20, measured


@pytest.mark.skipif(jax.default_backend() == "cpu", reason="needs an accelerator")
def test_on_an_accelerator_the_plan_runs_and_a_step_over_the_limit_does_not():
    width, batch = 4096, 2**16
    shapes = (
        jax.ShapeDtypeStruct((width, width), jnp.float32),
        jax.ShapeDtypeStruct((batch, width), jnp.float32),
    )

    def deep(w, x):
        for _ in range(64):
            x = jnp.tanh(x @ w)
        return jnp.mean(x**2)

    def make(k):
        grad = oa.grad(deep, num_microbatches=k)
        return jax.jit(lambda w, x: w - grad(w, x), donate_argnums=0)

    found = oa.diagnose.plan_microbatches(make, *shapes, batch_size=batch)
    w, x = (jnp.zeros(s.shape, s.dtype) for s in shapes)
    found.step(w, x).block_until_ready()
    # More than the limit, and not only more than what the headroom leaves of it.
    too_much = [
        c.num_microbatches
        for c in found.candidates
        if c.memory and c.memory.total > found.memory_limit
    ]
    smaller = make(max(too_much))
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        smaller(jnp.zeros(shapes[0].shape, jnp.float32), x).block_until_ready()
