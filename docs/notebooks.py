"""Makes notebooks of pages, to have each text in one place.

    python docs/notebooks.py

Code becomes cells, and what a page shows as printed becomes their output. A first cell
installs the package, for Colab.
"""

import re
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

DOCS = Path(__file__).parent
PAGES = ("five-minutes", "flax-nnx", "whole-batch")
REPOSITORY = "https://github.com/optax-accum/optax_accum"
SITE = "https://optax-accum.readthedocs.io/"
COLAB = (
    "https://colab.research.google.com/github/optax-accum/optax_accum/blob/main/docs"
)
INSTALL = f'%pip install --quiet "optax-accum[flax] @ git+{REPOSITORY}"'
BLOCK = re.compile(
    r"^```python\n(?P<code>.*?)^```\n(\s*^```text\n(?P<printed>.*?)^```\n)?",
    re.DOTALL | re.MULTILINE,
)


def notebook_of(page: str, name: str) -> nbformat.NotebookNode:
    """The notebook of a page: its text, and its blocks of Python as cells."""
    page = page.replace(button(name), "")
    page = re.sub(r"^```bash\n.*?^```\n", "", page, flags=re.DOTALL | re.MULTILINE)
    page = re.sub(r"\]\(([\w-]+)\.md(#[\w-]+)?\)", rf"]({SITE}\1/\2)", page)
    page = re.sub(r"\]\(images/", f"]({SITE}images/", page)
    cells, end = [], 0
    for block in BLOCK.finditer(page):
        cells += text_cells(page[end : block.start()])
        printed = block["printed"]
        outputs = [new_output("stream", name="stdout", text=printed)] if printed else []
        cells.append(new_code_cell(block["code"].strip(), outputs=outputs))
        end = block.end()
    cells += text_cells(page[end:])
    install = new_code_cell(INSTALL, metadata={"tags": ["install"]})
    cells.insert(1, install)
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"  # the same page is the same file
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel})


def text_cells(text: str) -> list[nbformat.NotebookNode]:
    """A cell for the text between two blocks, if there is any."""
    return [new_markdown_cell(text.strip())] if text.strip() else []


def button(name: str) -> str:
    """The line of a page that opens its notebook."""
    return f"[Open in Colab]({COLAB}/notebooks/{name}.ipynb)"


def path_of(name: str) -> Path:
    """Where the notebook of a page lies."""
    return DOCS / "notebooks" / f"{name}.ipynb"


def text_of(name: str) -> str:
    """The notebook of a page, as its file has it."""
    page = (DOCS / f"{name}.md").read_text(encoding="utf-8")
    return nbformat.writes(notebook_of(page, name)) + "\n"


if __name__ == "__main__":
    path_of(PAGES[0]).parent.mkdir(exist_ok=True)
    for name in PAGES:
        path_of(name).write_text(text_of(name), encoding="utf-8")
        print(path_of(name).relative_to(DOCS.parent))
