"""Measurements and results: values, intervals and JSON."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import mlflow_pt_deploy.evaluation as package
from mlflow_pt_deploy.errors import VariantError
from mlflow_pt_deploy.evaluation import UNITS, Measurement, Result

RESULT = Result(
    "student-openvino-int8-static",
    "student",
    "openvino",
    "int8-static",
    "cpu",
    2,
    Path("variants/student-openvino-int8-static"),
    "",
    (
        Measurement.from_samples("latency_p50_ms", [3, 1, 2], "ms"),
        Measurement("speedup", 2.0, "x", low=1.9, high=2.2, samples=(1.9, 2.0, 2.2)),
        Measurement("accuracy", 0.9, "fraction", "validation"),
        Measurement("accuracy", 0.8, "fraction", "test"),
        Measurement("accuracy_drop", 0.01, "fraction", "test", -0.01, 0.03),
    ),
    "teacher-eager-fp32",
)


def test_a_measurement_summarizes_and_keeps_its_samples() -> None:
    assert RESULT.get("latency_p50_ms") == Measurement("latency_p50_ms", 2, "ms", samples=(3, 1, 2))
    longest = Measurement.from_samples("load_s", [1, 4], "s", statistic=max)
    assert (longest.value, longest.samples) == (4, (1, 4))


def test_a_measurement_needs_samples() -> None:
    with pytest.raises(VariantError, match="load_s has no samples"):
        Measurement.from_samples("load_s", [], "s")


def test_a_value_is_found_by_name_and_dataset() -> None:
    assert RESULT.value("accuracy", "validation") == 0.9
    assert RESULT.value("accuracy", "test") == 0.8
    assert RESULT.value("accuracy") is None
    assert RESULT.get("macro_f1", "test") is None


def test_metrics_are_flat_and_include_intervals() -> None:
    assert RESULT.metrics() == {
        "latency_p50_ms": 2,
        "speedup": 2,
        "speedup_low": 1.9,
        "speedup_high": 2.2,
    }
    assert RESULT.metrics("validation") == {"accuracy": 0.9}
    assert RESULT.metrics("test") == {
        "accuracy": 0.8,
        "accuracy_drop": 0.01,
        "accuracy_drop_low": -0.01,
        "accuracy_drop_high": 0.03,
    }


@pytest.mark.parametrize(
    "result",
    [
        RESULT,
        replace(RESULT, folder=None, reason="disk full"),
        replace(RESULT, notes=("at chance",)),
    ],
)
def test_a_result_round_trips_through_json(result: Result) -> None:
    assert Result.from_json(json.loads(json.dumps(result.to_json()))) == result


def test_an_older_result_without_notes_is_read() -> None:
    document = RESULT.to_json()
    del document["notes"]
    assert Result.from_json(document) == RESULT


@pytest.mark.parametrize("document", [{}, {"folder": None, "measurements": [], "speed": 1}])
def test_other_json_is_rejected(document: dict[str, object]) -> None:
    with pytest.raises(VariantError, match="not the JSON of a result"):
        Result.from_json(document)


def test_a_damaged_measurement_is_rejected() -> None:
    with pytest.raises(VariantError, match="not the JSON of a measurement: .*samples"):
        Measurement.from_json({"name": "speedup", "value": 1, "unit": "x"})


def test_units_match_the_suffix_of_the_metric_name() -> None:
    for name, unit in UNITS.items():
        ending = re.search(r"_(ms|mb|s|rows|rows_per_s)$", name)
        if ending and not name.endswith("rows_per_s"):
            assert unit.lower() == ending[1], name
    assert UNITS["throughput_rows_per_s"] == "rows/s"


def test_the_package_exports_exactly_its_public_names() -> None:
    assert package.__all__ == ["UNITS", "Bench", "Measurement", "Result", "Worker", "measure"]
    for name in package.__all__:
        assert getattr(package, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = package.nothing


def test_imports_load_neither_mlflow_nor_a_runtime() -> None:
    code = (
        "import sys; from mlflow_pt_deploy.evaluation import measure; "
        "import mlflow_pt_deploy.selection.choice, mlflow_pt_deploy.reporting.tables; "
        "import mlflow_pt_deploy.system.hardware; "
        "heavy = {'mlflow', 'torch', 'transformers', 'onnxruntime', 'openvino', 'matplotlib'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
