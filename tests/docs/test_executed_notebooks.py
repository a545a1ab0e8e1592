"""The notebooks of the documentation run, and print what is stored in them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
NOTEBOOKS = sorted((Path(__file__).parents[2] / "docs" / "notebooks").glob("*.ipynb"))
_NUMBER = re.compile(r"[-+]?\d[\d,.]*(e[-+]?\d+)?")


def printed(notebook: Any) -> list[str]:
    """The first line that each cell prints, its numbers left out: times and roundings differ."""
    outputs = (cell.outputs for cell in notebook.cells if cell.cell_type == "code")
    text = [
        "".join(out.get("text", "") or out.get("data", {}).get("text/plain", "") for out in cell)
        for cell in outputs
    ]
    return [_NUMBER.sub("#", lines.partition("\n")[0]) for lines in text]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_prints_what_is_stored(path: Path) -> None:
    stored = nbformat.read(path, as_version=4)
    run = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(run, timeout=300, kernel_name="python3").execute()
    kinds = {out.output_type for cell in run.cells for out in cell.get("outputs", [])}
    assert kinds <= {"stream", "execute_result"}
    assert not [
        out for cell in run.cells for out in cell.get("outputs", []) if out.get("name") == "stderr"
    ]
    assert any(printed(stored))
    assert printed(run) == printed(stored)


def test_every_notebook_is_on_the_site() -> None:
    site = (Path(__file__).parents[2] / "mkdocs.yml").read_text()
    assert NOTEBOOKS
    assert [path.name for path in NOTEBOOKS if f"notebooks/{path.name}" not in site] == []


def test_formulas_need_no_renderer() -> None:
    """The site is read offline, where nothing turns LaTeX into formulas."""
    for path in NOTEBOOKS:
        words = [c.source for c in nbformat.read(path, 4).cells if c.cell_type == "markdown"]
        assert "$" not in "".join(words), path.name
