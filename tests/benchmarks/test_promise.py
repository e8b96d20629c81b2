"""The benchmark of kept promises, on made answers."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from mlflow_pt_deploy.evaluation import Measurement, Result

BASELINE = "teacher-eager-fp32"


@pytest.fixture(scope="module")
def promise() -> ModuleType:
    path = Path(__file__).resolve().parents[2] / "benchmarks" / "promise.py"
    spec = importlib.util.spec_from_file_location("promise", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["promise"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def result(variant: str, correct: np.ndarray, speedup: float) -> dict:
    """A result with the answers to 400 validation and 400 test rows."""
    model, runtime, precision = variant.split("-", 2)
    found = [
        Measurement("speedup", speedup, "x", low=0.95 * speedup, high=1.05 * speedup),
        Measurement("latency_p50_ms", 10 / speedup, "ms"),
        Measurement("throughput_rows_per_s", 100 * speedup, "rows/s"),
        Measurement("artifact_mb", 10.0, "MB"),
    ]
    for dataset, part in (("validation", correct[:400]), ("test", correct[400:])):
        samples = tuple(part.astype(float).tolist())
        sure = (0.9,) * len(samples)
        found += [
            Measurement("accuracy", float(part.mean()), "fraction", dataset, samples=samples),
            Measurement("confidence", 0.9, "fraction", dataset, samples=sure),
        ]
    return Result(
        variant, model, runtime, precision, "cpu", 2, None, "", tuple(found), BASELINE
    ).to_json()


def test_the_policy_keeps_what_the_measured_accuracy_alone_does_not(
    promise: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    random = np.random.default_rng(0)
    teacher = random.random(800) < 0.9
    # wrong on 10 % where the teacher is right, right on 6.5 % where it is wrong: 96 % are kept
    other = random.random(800)
    worse = np.where(teacher, other > 0.11, other < 0.65)
    path = tmp_path / "results.json"
    rows = [result(BASELINE, teacher, 1.0), result("static-numpy-fp32", worse, 90.0)]
    path.write_text(json.dumps({"results": rows}))
    assert promise.main([str(path), "--cuts", "150", "--sizes", "200,400,750"]) == 0
    lines = capsys.readouterr().out.strip().splitlines()[2:]
    assert len(lines) == 4  # 750 rows leave too few to judge
    kept = {
        (cells[2], cells[3]): float(cells[4].rstrip("%"))
        for line in lines
        if (cells := [cell.strip() for cell in line.split("|")])
    }
    assert kept["200", "retain and retain_low"] >= 90
    assert kept["200", "retain alone"] < kept["200", "retain and retain_low"] - 5


def test_the_answers_of_a_cut_are_those_of_its_rows(promise: ModuleType, tmp_path: Path) -> None:
    teacher = np.arange(800) % 10 > 0
    path = tmp_path / "tiny.json"
    path.write_text(json.dumps({"results": [result(BASELINE, teacher, 1.0)]}))
    variants, name = promise.read(path)
    assert name == "tiny"
    assert len(variants[0].correct) == 800
    outcomes = list(promise.simulate(variants, promise.Policy(), 200, 3))
    assert [each.is_baseline for each in outcomes] == [True] * 3
    assert [each.kept for each in outcomes] == [1.0] * 3
