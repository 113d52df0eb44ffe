"""The notebooks are those that their pages make, and they run."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import nbclient
import nbformat
import pytest

DOCS = Path(__file__).parents[1] / "docs"
notebooks = SimpleNamespace(**runpy.run_path(DOCS / "notebooks.py"))


def printed(cell):
    return "".join(out.text for out in cell.outputs if out.get("name") == "stdout")


@pytest.mark.parametrize("name", notebooks.PAGES)
def test_a_notebook_is_what_its_page_makes(name):
    stored = notebooks.path_of(name).read_text(encoding="utf-8")
    assert stored == notebooks.text_of(name), "run `python docs/notebooks.py`"


@pytest.mark.parametrize("name", notebooks.PAGES)
def test_a_page_opens_its_notebook(name):
    page = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    assert notebooks.button(name) in page


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # those of Jupyter are not ours
@pytest.mark.parametrize("name", notebooks.PAGES)
def test_a_notebook_runs_and_prints_what_it_shows(name):
    notebook = nbformat.read(notebooks.path_of(name), as_version=4)
    notebook.cells = [
        cell
        for cell in notebook.cells
        if "install" not in cell.metadata.get("tags", ())
    ]
    expected = [printed(c) for c in notebook.cells if c.cell_type == "code"]
    nbclient.NotebookClient(notebook, timeout=600).execute()
    found = [printed(c) for c in notebook.cells if c.cell_type == "code"]
    shown = [(want, got) for want, got in zip(expected, found, strict=True) if want]
    assert [want for want, _ in shown] == [got for _, got in shown]
