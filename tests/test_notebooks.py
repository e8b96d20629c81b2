"""The notebooks run from the first cell to the last, small, one after the other."""

from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "notebooks").glob("*.ipynb"))
# What imports takes longer than what is shown, so all share a kernel; each begins with no names.
FORGET = "__import__('mlflow').set_experiment('Default')\n%reset -f"


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_the_notebooks_run(
    tracking: str, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("LIMIT", "60")
    monkeypatch.setenv("TEACHER", str(tiny_model))
    assert len(NOTEBOOKS) == 3
    notebooks = {}
    for path in NOTEBOOKS:
        text = path.read_text(encoding="utf8").replace("seconds=2,", "seconds=0.1,")
        text = text.replace("torchscript-int8-dynamic,onnxruntime", "onnxruntime")
        notebooks[path.name] = nbformat.reads(text, as_version=4)
    whole = nbformat.v4.new_notebook()
    for notebook in notebooks.values():
        whole.cells += [nbformat.v4.new_code_cell(FORGET), *notebook.cells]
    NotebookClient(whole, timeout=500, resources={"metadata": {"path": tmp_path}}).execute()
    for name, notebook in notebooks.items():
        outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
        assert outputs, f"{name} shows nothing"
