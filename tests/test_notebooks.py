"""
The notebooks of ``examples/``: kept with the outputs of a real run, and run anew by the expensive tests.

``python tests/test_notebooks.py [name ...]`` runs them and keeps what they put out.
"""

import sys
import tempfile
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
#: seconds that a cell may take, which takes one or two minutes where no other work goes on beside it
LONGEST = 1800


def run(notebook: Path, folder: Path) -> nbformat.NotebookNode:
    """The notebook with the outputs of a run in ``folder``; an error in a cell is raised."""
    from nbclient import NotebookClient

    contents = nbformat.read(notebook, as_version=4)
    NotebookClient(
        contents,
        timeout=LONGEST,
        coalesce_streams=True,
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
    ).execute()
    return contents


def printed(contents: nbformat.NotebookNode) -> str:
    """What the cells printed."""
    return "".join(o.text for c in contents.cells for o in c.get("outputs", []) if o.output_type == "stream")


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_hold_the_outputs_of_one_run(notebook):
    contents = nbformat.read(notebook, as_version=4)
    nbformat.validate(contents)
    cells = [cell for cell in contents.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    # Neither errors nor warnings.
    assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in outputs)
    assert notebook.stat().st_size < 500_000


def test_notebooks_are_shown_in_the_documentation():
    page = (ROOT / "docs" / "notebooks.md").read_text(encoding="utf-8").splitlines()
    assert NOTEBOOKS
    for notebook in NOTEBOOKS:
        assert f"notebooks/{notebook.stem}" in page


@pytest.mark.expensive
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(notebook, tmp_path):
    kept, anew = nbformat.read(notebook, as_version=4), run(notebook, tmp_path)
    assert len(printed(anew).splitlines()) == len(printed(kept).splitlines())
    assert not any(o.get("name") == "stderr" for c in anew.cells for o in c.get("outputs", []))


if __name__ == "__main__":
    for path in NOTEBOOKS:
        if path.stem in sys.argv[1:] or len(sys.argv) == 1:
            with tempfile.TemporaryDirectory() as temporary:
                executed = run(path, Path(temporary))
            for cell in executed.cells:
                cell.metadata.pop("execution", None)  # The time of day is no result.
            nbformat.write(executed, path)
