"""The examples run as a user runs them, learn, and keep the terminal clean."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import chex
import orbax.checkpoint as ocp
import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"

# Asked without importing them, which takes seconds.
IS_INSTALLED = all(map(importlib.util.find_spec, ("matplotlib", "rich", "sklearn")))
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not IS_INSTALLED, reason="needs the extra `examples`"),
]


def run(name, *arguments):
    """What the example prints, on both of its streams."""
    # As a user's shell has it: without what the tests tell XLA.
    environment = {k: x for k, x in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert not re.search(r"warning|^[EWIF]\d{4} |\[Gloo\]", done.stdout, re.I | re.M)
    return done.stdout


@pytest.mark.parametrize(
    "name",
    [
        "data_parallel",
        "epochs",
        "equinox_mlp",
        "flax_linen",
        "flax_nnx",
        "multiprocess",
    ],
)
def test_an_example_knows_nine_of_ten_test_images(name):
    accuracies = re.findall(r"accuracy:? (?:of )?([\d.]+)%", run(f"{name}.py"))
    assert float(accuracies[-1]) > 90


def test_the_template_trains_saves_and_continues(tmp_path):
    first = run("train.py", "--folder", tmp_path, "--epochs", 2)
    assert "epoch 2: " in first
    then = run("train.py", "--folder", tmp_path, "--epochs", 6)
    assert "Continuing after epoch 2" in then
    assert "epoch 2: " not in then
    assert float(re.findall(r"Test accuracy: ([\d.]+)%", then)[-1]) > 95


def test_the_language_model_learns():
    losses = re.findall(r"test loss (\d\.\d+)", run("char_lm.py", "--quick"))
    assert float(losses[-1]) < float(losses[0])


def test_micro_batches_by_budget_hold_little_padding_and_train_alike(tmp_path):
    picture = tmp_path / "token_budget.svg"
    printed = run("token_budget.py", "--quick", "--picture", picture)

    def row(label):
        (cells,) = re.findall(rf"{label} +(\S+?)%? +(\S+?)%?$", printed, re.MULTILINE)
        return [float(cell) for cell in cells]

    padded, by_budget = row("padding")
    assert by_budget < 10
    assert padded > 50
    padded, by_budget = row("programs compiled")
    assert padded <= 2
    assert by_budget <= 6
    moved, apart = re.findall(r"up to (\S+) and differ by (\S+) at", printed)[0]
    assert float(apart) < 1e-5
    assert float(moved) > 0.01
    assert picture.stat().st_size > 10_000


def test_two_towers_in_micro_batches_train_as_on_the_whole_batch():
    """And plain accumulation does not: see the last two rows."""
    printed = run("contrastive.py")

    def row(label):
        (cells,) = re.findall(
            rf"{label} +(\S+)(?: \w+)? +(\S+)(?: \w+)? +(\S+)", printed
        )
        return [float(cell.rstrip("%")) for cell in cells]

    whole, in_parts, plain = row("test images matched")
    assert whole == pytest.approx(in_parts, abs=0.5)  # 1 of 450 images is 0.2
    assert plain < whole - 10  # 14 to 18 over ten seeds
    whole, in_parts, _ = row("temporary memory of a step")
    assert in_parts < whole / 3
    # In ten runs of other seeds 4e-7 and 4e-5 at most, and 0.6 and 0.2 at least.
    _, in_parts, plain = row("the whole batch: test loss")
    assert in_parts < 1e-5
    assert plain > 0.1
    _, in_parts, plain = row("the whole batch: parameters")
    assert in_parts < 1e-3
    assert plain > 0.05


def test_a_mesh_exchanges_gradients_once_per_update_and_trains_as_by_hand():
    """Data parallel, HSDP and FSDP: the rows of the printed table, without accuracy."""
    printed = run("mesh.py", "--epochs", 2)
    rows = re.findall(r"^(?:data|hsdp|fsdp| {30}) .*", printed, re.MULTILINE)
    accuracies = re.findall(r"([\d.]+)%", "".join(rows))
    assert len(accuracies) == 6
    for accuracy in accuracies:
        assert float(accuracy) == pytest.approx(float(accuracies[0]), abs=0.5)
        assert float(accuracy) > 75
    # held, among how many devices, and then what is gathered, reduced and scattered
    assert [re.sub(r"[\d.]+%", "", row).split() for row in rows] == [
        row.split()
        for row in (
            "data by hand       4.00  8        4.00",
            "data oa.accumulate 4.00  8        1.00",
            "hsdp by hand       1.00  8        4.00",
            "                         4  4.00      ",
            "hsdp oa.accumulate 1.00  4  4.00  4.00",
            "                         2        0.25",
            "fsdp by hand       0.50  8  4.00  4.00",
            "fsdp oa.accumulate 1.38  8  4.00  0.00  1.00",
        )
    ]
    assert float(re.findall(r"agree to within (\S+)\.", printed)[0]) < 1e-5


def test_five_steps_lower_the_loss():
    assert "falls from 385 to 38.2" in run("five_steps.py")


def test_the_noise_scale_is_drawn(tmp_path):
    picture = tmp_path / "noise_scale.png"
    run("noise_scale.py", "--picture", picture)
    assert picture.stat().st_size > 10_000


def test_a_stopped_run_ends_with_the_same_bits(tmp_path):
    """In a new process, from the middle of a window, with dropout."""
    stopped, straight = tmp_path / "stopped", tmp_path / "straight"
    run("resume.py", "--folder", stopped, "--stop-after", 38)
    assert "Starting at micro-step 35" in run("resume.py", "--folder", stopped)
    run("resume.py", "--folder", straight)
    results = []
    for folder in (stopped, straight):
        with ocp.CheckpointManager(folder) as manager:
            results.append(manager.restore(100, args=ocp.args.StandardRestore()))
    chex.assert_trees_all_equal(*results)
