"""A model saved by an earlier version is loaded, served and promoted by the current one."""

from __future__ import annotations

import json

import mlflow
import requests
from tiny.artifact import SAVED
from tiny.server import running

from mlflow_pt_deploy.registry.addresses import ModelSpec, ResolvedVersion, resolve, source
from mlflow_pt_deploy.registry.promotion import Candidate, promote
from mlflow_pt_deploy.serving.app import Application
from mlflow_pt_deploy.serving.lifecycle.served_model import ServedModel
from mlflow_pt_deploy.serving.model.loaded_model import load_version


def test_a_saved_model_is_served() -> None:
    served = ServedModel("saved", source(str(SAVED)))
    served.open()
    with running(Application({"saved": served})) as url:
        body = {"inputs": ["my card", "i want a refund"]}
        response = requests.post(f"{url}/invocations", json=body, timeout=10)
    assert [row["label"] for row in response.json()["predictions"]] == ["card", "refund"]


def test_a_saved_model_is_loaded() -> None:
    rows = json.loads((SAVED / "variant" / "golden.json").read_text())["rows"]
    predictions = load_version(ResolvedVersion(str(SAVED)), ModelSpec(str(SAVED))).pyfunc.predict(
        rows
    )
    assert predictions == mlflow.pyfunc.load_model(str(SAVED)).predict(rows)
    assert {prediction["label"] for prediction in predictions} <= {"card", "refund", "transfer"}


def test_a_saved_model_is_promoted(tracking: str) -> None:
    with mlflow.start_run() as run:
        mlflow.log_artifacts(str(SAVED), "model")
    promotion = promote(
        Candidate(f"runs:/{run.info.run_id}/model", "saved by an earlier version"), "shop", "why"
    )
    model = load_version(resolve(promotion.uri), ModelSpec(promotion.uri))
    assert (model.label, model.name) == ("1", "student-numpy-fp32")
