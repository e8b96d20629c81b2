"""Promotion moves the aliases of a registered model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

from mlflow_pt_deploy import flavor
from mlflow_pt_deploy.errors import TrackingError
from mlflow_pt_deploy.registry.promotion import champion, promote
from mlflow_pt_deploy.runtimes.base import Variant
from mlflow_pt_deploy.runtimes.eager import Eager
from mlflow_pt_deploy.runtimes.onnxruntime import OnnxRuntime


def _logged(folder: Path) -> str:
    with mlflow.start_run():
        return f"models:/{flavor.log_model(folder, folder.name).model_id}"


def test_promotion_keeps_the_previous_champion_and_reuses_versions(
    tracking: str, exported: Callable[[Variant], Path]
) -> None:
    assert champion("tiny") is None
    first = _logged(exported(Eager()))
    second = _logged(exported(OnnxRuntime()))
    assert promote(first, "tiny", "the first").previous is None
    assert promote(second, "tiny", "faster").previous == "1"
    assert promote(first, "tiny", "back again").version == "1"
    assert champion("tiny") == "1"
    client = MlflowClient()
    assert str(client.get_model_version_by_alias("tiny", "previous").version) == "2"
    assert client.get_model_version("tiny", "1").description == "back again"
    assert len(client.search_model_versions("name = 'tiny'")) == 2


def test_an_unknown_model_is_not_promoted(tracking: str) -> None:
    with pytest.raises(TrackingError, match="was not promoted"):
        promote("models:/m-0000", "tiny", "no such model")
