"""The evaluator `pt_latency` in MLflow's own `evaluate`."""

from __future__ import annotations

import subprocess
import sys

import mlflow
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException
from tiny.artifact import SAVED

from mlflow_pt_deploy import flavor
from mlflow_pt_deploy.plugins.latency_evaluator import _quantile

# MLflow 3.17 uses what pandas deprecates
pytestmark = pytest.mark.filterwarnings("ignore::pandas.errors.Pandas4Warning")

DATA = pd.DataFrame({"text": ["my card", "please refund me"] * 4, "label": ["card", "refund"] * 4})
QUICK = {"seconds": 0.05, "rows": 4, "batch_rows": 4}
PLAIN = {"log_model_explainability": False}


@pytest.fixture
def model(tracking: str) -> str:
    with mlflow.start_run():
        return f"models:/{flavor.log_model(SAVED / 'variant', 'tiny').model_id}"


def evaluate(model: str, **options: object) -> dict[str, float]:
    with mlflow.start_run():
        return mlflow.models.evaluate(
            model, DATA, targets="label", model_type="classifier", **options
        ).metrics


def test_named_it_adds_latency_with_intervals(model: str) -> None:
    metrics = evaluate(
        model,
        evaluators=["default", "pt_latency"],
        evaluator_config={"default": PLAIN, "pt_latency": QUICK},
    )
    assert "accuracy_score" in metrics
    for name in ("latency_p50_ms", "latency_p95_ms", "throughput_rows_per_s"):
        assert 0 < metrics[f"{name}_low"] <= metrics[name] <= metrics[f"{name}_high"]
    assert metrics["latency_p50_ms"] <= metrics["latency_p99_ms"]


def test_it_is_silent_unless_named(model: str) -> None:
    metrics = evaluate(model, evaluator_config=PLAIN)
    assert "accuracy_score" in metrics
    assert not [name for name in metrics if name.startswith("latency_p")]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"second": 1}, "unknown key second; known are seconds, rows, batch_rows"),
        ({"seconds": 0}, "seconds is 0; give a number above 0"),
        ({"rows": "many"}, "rows is 'many'"),
    ],
)
def test_invalid_settings_are_named(model: str, config: dict, message: str) -> None:
    with pytest.raises(MlflowException, match=message):
        evaluate(model, evaluators="pt_latency", evaluator_config=config)


def test_static_predictions_cannot_be_timed(tracking: str) -> None:
    data = DATA.assign(predicted=DATA["label"])
    with mlflow.start_run(), pytest.raises(MlflowException, match="times a model; give one"):
        mlflow.models.evaluate(
            data=data,
            targets="label",
            predictions="predicted",
            model_type="classifier",
            evaluators="pt_latency",
        )


def test_mlflow_starts_without_torch() -> None:
    code = "import mlflow, mlflow.models.evaluation, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_interval_of_a_median_by_hand() -> None:
    # ranks 40 and 61 of 100: Bin(100, 0.5) has 2.5 % quantile 40 and 97.5 % quantile 60
    assert _quantile([float(n) for n in range(1, 101)], 0.5) == (50.5, 40.0, 61.0)
    assert _quantile([1.0], 0.99) == (1.0, 1.0, 1.0)
