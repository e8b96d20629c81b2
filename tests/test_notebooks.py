"""The notebooks run from the first cell to the last, small, one after the other."""

from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_the_notebooks_run(
    tracking: str, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("LIMIT", "60")
    monkeypatch.setenv("TEACHER", str(tiny_model))
    assert len(NOTEBOOKS) == 3
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(notebook, timeout=500, resources={"metadata": {"path": tmp_path}}).execute()
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
        assert outputs, f"{path.name} shows nothing"
