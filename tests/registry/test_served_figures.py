"""Tags of what was served, as a table and for copies."""

from __future__ import annotations

from mlflow.entities.model_registry import ModelVersion, ModelVersionTag

from mlflow_pt_deploy.registry.history import History
from mlflow_pt_deploy.registry.profile_tags import SERVED_TAG
from mlflow_pt_deploy.registry.served_figures import (
    promised_and_served,
    served_tags,
    without_served,
)

TAGS = {
    "accuracy": "0.91234",
    "latency_p50_ms": "0.5",
    "served.requests": "12345678",
    "served.errors": "0",
    "served.latency_p50_ms": "0.5684",
    SERVED_TAG: "{}",
}
FEEDBACK = {
    "served.accuracy": "0.9",
    "served.accuracy_low": "0.85",
    "served.accuracy_high": "0.94",
    "served.judged_rows": "100",
}


def version(number: str, tags: dict[str, str]) -> ModelVersion:
    entities = [ModelVersionTag(key, value) for key, value in tags.items()]
    return ModelVersion("shop", number, 0, tags=entities)


def test_promised_stands_above_served() -> None:
    by_hand = {"served.latency_p99_ms": "fast"}
    rows = promised_and_served([version("4", TAGS | FEEDBACK), version("3", TAGS | by_hand)])
    assert rows == [
        ["4", "promised", "0.9123", "0.5", "-", "-", "-", "-", "-"],
        ["", "served", "0.9 [0.85, 0.94]", "0.5684", "-", "-", "100", "12345678", "0"],
        ["3", "promised", "0.9123", "0.5", "-", "-", "-", "-", "-"],
        ["", "served", "-", "0.5684", "fast", "-", "-", "12345678", "0"],
    ]
    assert "promised" in History((), None, (version("4", TAGS),)).served_table()
    assert History((), None).served_table() == ""


def test_a_copy_has_not_served() -> None:
    assert list(without_served(TAGS | FEEDBACK)) == ["accuracy", "latency_p50_ms"]
    assert served_tags(FEEDBACK)["judged_rows"] == "100"
