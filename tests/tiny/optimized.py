"""A finished optimize stage whose numbers are made up and whose models are real."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import mlflow
import numpy as np
from tiny.artifact import SAVED

from mlflow_pt_deploy import flavor
from mlflow_pt_deploy.config import Options
from mlflow_pt_deploy.evaluation import Measurement, Result
from mlflow_pt_deploy.evaluation.statistics import mcnemar_p, paired_drop, paired_ratio
from mlflow_pt_deploy.tracking import OPTIONS_TAG

BASELINE = "teacher-eager-fp32"
CONDITIONS = {
    "data": "tiny, 400 validation and 400 test rows",
    "validation": "1a2b3c4d",
    "test": "5e6f7a8b",
    "hardware": "a cpu, 2 cores",
}
ROWS = 400


class Made(NamedTuple):
    """Numbers of a variant: correct of 400 rows, and its speed."""

    validation: int
    test: int
    speedup: float


VARIANTS = {
    BASELINE: Made(360, 360, 1.0),
    "student-openvino-int8": Made(359, 358, 10.0),
    "static-numpy-fp32": Made(320, 300, 90.0),
}


def made_result(variant: str, made: Made, baseline: Made = VARIANTS[BASELINE]) -> Result:
    """A result; the first rows are the correct ones."""
    found = [
        Measurement("latency_mean_ms", 10 / made.speedup, "ms"),
        Measurement("latency_p50_ms", 10 / made.speedup, "ms"),
        Measurement("latency_p95_ms", 12 / made.speedup, "ms"),
        Measurement("throughput_rows_per_s", 100 * made.speedup, "rows/s"),
        Measurement("speedup", made.speedup, "x", low=0.9 * made.speedup, high=1.1 * made.speedup),
        Measurement("artifact_mb", 50.0, "MB"),
        Measurement("peak_rss_mb", 300.0, "MB"),
        Measurement("agreement_perturbed", 0.9, "fraction", low=0.85, high=0.95),
        Measurement("agreement_perturbed", 0.8, "fraction", "negated", 0.7, 0.9),
        Measurement("batch_invariance", 1.0, "fraction"),
    ]
    for dataset in ("validation", "test"):
        correct, reference = (np.arange(ROWS) < getattr(each, dataset) for each in (made, baseline))
        drop, (kept, low) = paired_drop(reference, correct), paired_ratio(reference, correct)
        accuracy = float(correct.mean())
        samples = tuple(correct.astype(float).tolist())
        found += [
            Measurement("accuracy", accuracy, "fraction", dataset, samples=samples),
            Measurement("accuracy_drop", drop.value, "fraction", dataset, drop.low, drop.high),
            Measurement("accuracy_kept", kept, "fraction", dataset, low),
            Measurement("mcnemar_p", mcnemar_p(reference, correct), "probability", dataset),
            Measurement("class_recall", 0.7, "fraction", dataset),
            Measurement("agreement", 0.95, "fraction", dataset),
        ]
    predicted = tuple(int(at >= made.validation) for at in range(ROWS))
    model, runtime, precision = variant.split("-", 2)
    return Result(
        variant,
        model,
        runtime,
        precision,
        "cpu",
        2,
        None,
        "",
        tuple(found),
        BASELINE,
        predicted={"validation": predicted, "test": predicted},
    )


def optimized_run(
    variants: Mapping[str, Made] = VARIANTS, conditions: Mapping[str, str] = CONDITIONS
) -> str:
    """Log the variants as models and their results as a run; returns its id."""
    results = [made_result(name, made) for name, made in variants.items()]
    with mlflow.start_run() as run:
        mlflow.set_tag(OPTIONS_TAG, Options().to_json())
        models = {
            name: f"models:/{flavor.log_model(SAVED / 'variant', name).model_id}"
            for name in variants
        }
        document = {
            "results": [each.to_json() for each in results],
            "conditions": dict(conditions),
        }
        mlflow.log_dict(document, "results.json")
        mlflow.log_dict(models, "models.json")
    return str(run.info.run_id)
