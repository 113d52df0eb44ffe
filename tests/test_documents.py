"""The Python in the README and in the documentation runs as it stands there.

Where a block of ``text`` follows, it is what the Python prints.
"""

import contextlib
import io
import re
import runpy
from pathlib import Path

import pytest
from sybil.document import Document
from sybil.parsers.markdown import PythonCodeBlockParser

from tests.support.training import slow

ROOT = Path(__file__).parents[1]
PRINTED = re.compile(r"\s+```text\n(?P<text>.*?)```", re.DOTALL)
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def run(path):
    """Runs the blocks of one document after one another; returns how many."""
    document = Document.parse(str(path), PythonCodeBlockParser())
    examples = list(document.examples())
    for example in examples:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            example.evaluate()
        expected = PRINTED.match(document.text, example.region.end)
        if expected:
            assert printed.getvalue() == expected["text"]
    return len(examples)


def slow_guides(paths):
    """What a newcomer reads first is in the usual run."""
    first = ("README.md", "index.md", "five-minutes.md")
    return [path if path.name in first else slow(path) for path in paths]


@pytest.mark.usefixtures("loose_promotion")
@pytest.mark.parametrize("path", slow_guides(DOCUMENTS), ids=lambda path: path.name)
def test_the_code_of_a_page_runs_and_prints_what_the_page_shows(path):
    assert run(path) == path.read_text().count("```python")


def test_running_a_page_fails_if_its_code_fails(tmp_path):
    document = tmp_path / "wrong.md"
    document.write_text("```python\nassert 1 + 1 == 3\n```\n")
    with pytest.raises(AssertionError):
        run(document)


def test_running_a_page_fails_if_its_output_differs(tmp_path):
    document = tmp_path / "wrong.md"
    document.write_text("```python\nprint(2)\n```\n\n```text\n3\n```\n")
    with pytest.raises(AssertionError):
        run(document)


def test_the_readme_has_an_example():
    assert "```python" in DOCUMENTS[0].read_text()


def test_the_prose_linter_reads_text_but_not_code(tmp_path):
    problems = runpy.run_path(ROOT / ".ci" / "prose.py")["problems"]
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text("It shall run, `shall` it not?\n\n```python\nshall = 1\n```\n")
    assert problems(page) == [f"{page}:1: “shall”: will, should"]
    page.write_text(f"```python\nx = {'1' * 90}\n```\n")
    assert problems(page) == [f"{page}:2: 94 columns: a page shows 88"]
    module = tmp_path / "module.py"
    module.write_text("shall = 1\n# It shall.\nraise ValueError('It shall')\n")
    assert [line.split(":")[1] for line in problems(module)] == ["2", "3"]
