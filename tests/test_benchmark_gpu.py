"""The GPU benchmark with the CPU in the GPU's place, and BERT without padding."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from mlflow_pt_deploy.data import Splits
from mlflow_pt_deploy.models import TextClassifier, load_classifier

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import gpu
import gpu_measure
import gpu_models
import gpu_packed
import gpu_tables
from gpu_forms import BASELINE, FORMS, Build, Source

from mlflow_pt_deploy.errors import VariantError
from mlflow_pt_deploy.runtimes.aotinductor import AOTInductor


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not speed is tested here."""
    monkeypatch.setenv("PT_DEPLOY_CORES", "1")
    monkeypatch.setattr(gpu_measure, "_BLOCK_S", 0.0)
    monkeypatch.setattr(gpu_models, "_FITTED_ROWS", 60)


@pytest.fixture(scope="module")
def classifier(tiny_model: Path) -> TextClassifier:
    loaded = load_classifier(str(tiny_model))
    assert isinstance(loaded, TextClassifier)
    return loaded


def test_a_run_on_the_cpu(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    forms = [BASELINE, "eager bf16 + graphs", "packed fp16 + graphs"]
    flags = [part for form in forms for part in ("--forms", form)]
    common = ["--device", "cpu", "--data", str(tiny_data), "--models", "tiny", "--sizes", "1,4"]
    gpu.main([*common, "--out", str(tmp_path), *flags])
    content = json.loads((tmp_path / "results.json").read_text())
    assert sorted(row["form"] for row in content["rows"]) == sorted(forms)
    for row in content["rows"]:
        assert not row["reason"], row
        assert row["same_labels"] > 0.9
        assert [batch["rows"] for batch in row["batches"]] == [1, 4]
        assert all(batch["p50_ms"] > 0 and batch["ratio"] > 0 for batch in row["batches"])
    table = (tmp_path / "table.md").read_text()
    assert "| packed fp16 + graphs |" in table
    assert table in capsys.readouterr().out


def test_without_time_every_form_is_a_row_with_its_reason(tiny_data: Path, tmp_path: Path) -> None:
    common = ["--device", "cpu", "--data", str(tiny_data), "--models", "tiny", "--sizes", "1"]
    gpu.main([*common, "--out", str(tmp_path), "--minutes", "0", "--forms", BASELINE])
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert row["reason"] == "not run: the 0 minutes were over"


def test_packed_logits_are_those_of_the_padded_model(
    classifier: TextClassifier, tiny_splits: Splits
) -> None:
    rows = [str(row) for row in tiny_splits.train.rows[:30]]
    source = Source(classifier, rows, Path(), "cpu")
    encoded = classifier.preprocessor.encode(rows)
    wanted = gpu_packed.PackedGraphs(gpu_packed.PackedBert(classifier.network), "cpu")(encoded)
    import torch

    with torch.inference_mode():
        padded = classifier(
            *(torch.from_numpy(a) for a in classifier.preprocessor(rows).values())
        ).numpy()
    np.testing.assert_allclose(wanted, padded, atol=1e-4)
    plain = FORMS["packed bf16"](source).predict(encoded)
    np.testing.assert_allclose(plain, padded, atol=0.25)


def test_what_is_packed() -> None:
    arrays = gpu_packed.pack([[7, 8, 9], [5]], tokens=6, rows=3)
    assert arrays["ids"].tolist() == [7, 8, 9, 5, 0, 0]
    assert arrays["places"].tolist() == [0, 1, 2, 0, 0, 0]
    assert arrays["ends"].tolist() == [0, 3, 4, 4]


def test_a_package_whose_process_fails_has_a_reason(
    classifier: TextClassifier, tiny_splits: Splits, tmp_path: Path
) -> None:
    source = Source(classifier, [str(row) for row in tiny_splits.test.rows], tmp_path, "cpu")
    variant = AOTInductor("bf16", device="nowhere")
    build = Build(source, variant)
    reason = build.wait(120)
    assert reason.startswith("exit code 1: ")
    assert "nowhere" in reason
    source.failed[build.target.name] = reason
    with pytest.raises(VariantError, match="nowhere"):
        source.written(variant)


def test_floating_point_operations_of_bert_base() -> None:
    from transformers import BertConfig

    # 12 layers of 7.1 M weights and 128 x 768 scores twice, a product and a sum each, 32768 tokens
    wanted = 2 * 32768 * 12 * (4 * 768**2 + 2 * 768 * 3072 + 2 * 128 * 768)
    assert gpu_measure.full_flops(BertConfig()) == wanted


def test_a_reason_fills_its_row(tmp_path: Path) -> None:
    seen = gpu_measure.Seen("tiny", "packed", reason="no such kernel")
    gpu_tables.write_tables({"date": "today"}, [seen], tmp_path / "table.md")
    head, line, row = (tmp_path / "table.md").read_text().splitlines()[-3:]
    assert head.count("|") == line.count("|") == row.count("|")
    assert "| packed | no such kernel |" in row
