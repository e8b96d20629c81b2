"""The GPU benchmark with the CPU in the GPU's place."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from transformers import BertConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import gpu
import gpu_measure
import gpu_models
import gpu_tables


@pytest.fixture(autouse=True)
def brief(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not speed is tested here."""
    monkeypatch.setenv("PT_DEPLOY_CORES", "1")
    monkeypatch.setattr(gpu_measure, "_BLOCK_S", 0.0)
    monkeypatch.setattr(gpu_models, "_FITTED_ROWS", 60)


def run(data: Path, out: Path, *flags: str) -> list[dict]:
    common = ["--device", "cpu", "--data", str(data), "--models", "tiny", "--parallel", "1"]
    gpu.main([*common, "--out", str(out), *flags])
    return json.loads((out / "results.json").read_text())["rows"]


def test_a_run_on_the_cpu(
    tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    variants = ["cudagraphs-fp32", "packed-fp16", "torchao-fp8-dynamic"]
    flags = [part for variant in variants for part in ("--variants", variant)]
    rows = {row["variant"]: row for row in run(tiny_data, tmp_path, "--sizes", "1,4", *flags)}
    assert next(iter(rows)) == gpu.BASELINE
    assert set(rows) == {gpu.BASELINE, *variants}
    for variant in (gpu.BASELINE, *variants[:2]):
        row = rows[variant]
        assert not row["reason"], row
        assert row["same_labels"] > 0.9
        assert [batch["rows"] for batch in row["batches"]] == [1, 4]
        assert all(batch["p50_ms"] > 0 and batch["ratio"] > 0 for batch in row["batches"])
        assert all(batch["callers_rows_per_s"] > 0 for batch in row["batches"])
    table = (tmp_path / "table.md").read_text()
    assert "| packed-fp16 |" in table
    assert table in capsys.readouterr().out


def test_without_time_every_variant_is_a_row_with_its_reason(
    tiny_data: Path, tmp_path: Path
) -> None:
    flags = ["--sizes", "1", "--minutes", "0", "--variants", gpu.BASELINE]
    (row,) = run(tiny_data, tmp_path, *flags)
    assert row["reason"] == "not run: the 0 minutes were over"


def test_what_compiles_comes_last() -> None:
    compiles = [variant.compiles for variant in gpu.variants_for("cuda")]
    assert compiles == sorted(compiles)
    assert {variant.device for variant in gpu.variants_for("cpu")} == {"cpu"}


def test_floating_point_operations_of_bert_base(tmp_path: Path) -> None:
    BertConfig().save_pretrained(tmp_path)
    # 12 layers of 7.1 M weights and 128 x 768 scores twice, a product and a sum each, 32768 tokens
    wanted = 2 * 32768 * 12 * (4 * 768**2 + 2 * 768 * 3072 + 2 * 128 * 768)
    assert gpu_measure.full_flops(tmp_path) == wanted


def test_a_reason_fills_its_row(tmp_path: Path) -> None:
    seen = gpu_measure.Seen("tiny", "packed-bf16", reason="no such kernel")
    gpu_tables.write_tables({"date": "today"}, [seen], tmp_path / "table.md")
    head, line, row = (tmp_path / "table.md").read_text().splitlines()[-3:]
    assert head.count("|") == line.count("|") == row.count("|")
    assert "| packed-bf16 | no such kernel |" in row
