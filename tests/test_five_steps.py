"""The beginners' page shows what the library computes, and five steps are the batch."""

import functools
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "what-is-gradient-accumulation.md"
example = SimpleNamespace(**runpy.run_path(ROOT / "docs" / "five_steps.py"))
WALKS = {"equal": (example.SIZES, False), "unequal": (example.UNEQUAL_SIZES, True)}


@functools.cache
def walk(name):
    sizes, weighted = WALKS[name]
    return example.walk(sizes, weighted=weighted)


def tables_in(text):
    return re.findall(r"^\|.*\|(?:\n\|.*\|)*$", text, re.MULTILINE)


def leaves(tree):
    return [np.asarray(x) for x in jax.tree.leaves(tree)]


@pytest.mark.parametrize("name", WALKS)
def test_the_window_makes_the_update_of_the_global_batch_bit_for_bit(name):
    made = example.accumulated_update(walk(name))
    expected = example.global_batch_update()
    for x, y in zip(leaves(made), leaves(expected), strict=True):
        np.testing.assert_array_equal(x, y, strict=True)
    assert example.is_same(made, expected)


def test_without_weights_unequal_micro_batches_make_another_update():
    made = example.walk(example.UNEQUAL_SIZES, weighted=False)
    made = example.accumulated_update(made)
    assert not example.is_same(made, example.global_batch_update())


@pytest.mark.parametrize("name", WALKS)
def test_the_parameters_stand_still_until_the_boundary(name):
    *inside, last = walk(name)
    first = example.first_params()
    assert all(s.params == first for s in inside)
    assert not any(s.has_updated or any(s.update.values()) for s in inside)
    assert last.has_updated
    assert last.params["w"] != first["w"]


def test_the_accumulator_is_the_sum_of_the_gradients_so_far():
    total = {"w": 0.0, "b": 0.0}
    for i, s in enumerate(walk("equal")):
        total = {name: total[name] + float(g) for name, g in s.gradient.items()}
        assert s.sums == total
        assert s.weight == i + 1


@pytest.mark.usefixtures("loose_promotion")
def test_the_page_has_the_tables_that_the_example_prints():
    written = tables_in(PAGE.read_text())
    tables = example.tables(walk("equal"), walk("unequal"))
    for title, rows in tables.items():
        assert example.table(rows) in written, title


def test_a_stale_table_on_the_page_is_noticed():
    rows = [["after", "step 1"], ["loss", "125"]]
    stale = example.table(rows).replace("125", "124")
    page = f"Text.\n\n{stale}\n\nText."
    assert tables_in(page) == [stale]
    assert example.table(rows) not in tables_in(page)


def test_clipping_each_micro_batch_is_not_clipping_their_mean():
    """As the page says of the last mistake."""
    seen = walk("equal")
    norms = jnp.array([optax.tree.norm(s.gradient) for s in seen])
    assert (norms > example.CLIP).sum() == 2
    assert optax.tree.norm(seen[-1].mean) < example.CLIP


@pytest.mark.usefixtures("loose_promotion")
def test_every_mistake_but_not_dividing_with_adam_changes_the_parameters():
    wrong = {
        m.name: not np.allclose(leaves(m.made), leaves(m.right), rtol=1e-4)
        for m in example.mistakes()
    }
    assert [name for name, is_wrong in wrong.items() if not is_wrong] == [
        "not divided, with Adam"
    ]


@pytest.mark.usefixtures("loose_promotion")
def test_the_tables_and_the_picture_are_written(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    markdown, picture = tmp_path / "tables.md", tmp_path / "picture.svg"
    arguments = ["--markdown", str(markdown), "--picture", str(picture)]
    assert example.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "bit for bit" in printed
    assert len(tables_in(markdown.read_text())) == 5
    assert tables_in(printed) == tables_in(markdown.read_text())
    assert "<svg" in picture.read_text()
