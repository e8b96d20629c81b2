"""What `/model` and `/metrics` say, from the documents of a run directory."""

from pathlib import Path
from typing import Any

import pytest

from mlflow_pt_deploy.serving.model.version_counts import VersionCounts
from mlflow_pt_deploy.serving.rollout.shadow.plan import SHADOW, TEACHER, ShadowPlan, ShadowTarget
from mlflow_pt_deploy.serving.rollout.shadow.report import shadow_figures, shadow_status
from mlflow_pt_deploy.serving.rollout.shadow.store import (
    ACTIVE,
    REFUSED,
    Comparison,
    ProcessState,
    write_plans,
    write_process,
    write_results,
    write_sent,
)
from mlflow_pt_deploy.serving.worker_state import WorkerStates

URI = "models:/tiny@challenger"


@pytest.fixture
def states(tmp_path: Path) -> WorkerStates:
    return WorkerStates(tmp_path, 1)


def plan(states: WorkerStates, target: ShadowTarget, agreement: float | None = None) -> None:
    written = ShadowPlan("tiny", "3", ("red",), "text", agreement=agreement, targets=(target,))
    write_plans(states, {"tiny": written})


def only(states: WorkerStates) -> dict[str, Any]:
    status = shadow_status(states, "tiny")
    assert status is not None
    (entry,) = status["versions"]
    return dict(entry)


def compared(role: str, disagreed: int, total: int, state: str = ACTIVE) -> Comparison:
    counts = VersionCounts(compared=total, disagreed=disagreed)
    return Comparison("tiny", role, "3", "4", state, counts=counts)


def test_without_a_plan_nothing_is_said(states: WorkerStates) -> None:
    assert shadow_status(states, "tiny") is None
    assert list(shadow_figures(states)) == []


def test_the_state_says_what_is_missing(states: WorkerStates) -> None:
    plan(states, ShadowTarget(SHADOW, URI, 1.0, problem="absent."))
    assert (only(states)["state"], only(states)["reason"]) == ("inactive", "absent.")
    plan(states, ShadowTarget(SHADOW, URI, 1.0, "4"))
    write_process(states, ProcessState(0, 1, "it was ended by SIGKILL"))
    assert (only(states)["state"], only(states)["reason"]) == ("stopped", "it was ended by SIGKILL")
    write_process(states, ProcessState(7, 2, "it was ended by SIGKILL"))
    assert (only(states)["state"], only(states)["disagreement"]) == ("loading", None)
    refused = compared(SHADOW, 0, 0, REFUSED)
    refused.reason = "its labels differ."
    write_results(states, [refused], {})
    assert (only(states)["state"], only(states)["reason"]) == ("refused", "its labels differ.")


def test_disagreement_has_an_interval(states: WorkerStates) -> None:
    plan(states, ShadowTarget(SHADOW, URI, 0.2, "4"))
    write_process(states, ProcessState(7, 1))
    write_results(states, [compared(SHADOW, 10, 100)], {"tiny": 2})
    write_sent(states, {"sent": {"tiny": 100}, "dropped": {"tiny": 3}})
    status = shadow_status(states, "tiny")
    assert status is not None
    assert (status["requests_sent"], status["requests_dropped"]) == (100, 5)
    assert status["process"] == {"pid": 7, "restarts": 0, "ended": None}
    # Wilson's interval of 10 in 100
    assert only(states)["disagreement"] == {"value": 0.1, "low": 0.055229, "high": 0.174366}


@pytest.mark.parametrize(
    ("disagreed", "at_promotion", "drift"), [(10, 0.98, True), (10, 0.9, False), (10, None, None)]
)
def test_drift_is_less_agreement_than_at_the_promotion(
    states: WorkerStates, disagreed: int, at_promotion: float | None, drift: bool | None
) -> None:
    plan(states, ShadowTarget(TEACHER, "models:/tiny/4", 0.01, "4"), at_promotion)
    write_process(states, ProcessState(7, 1))
    assert only(states)["agreement"] is None and only(states)["drift"] is None
    write_results(states, [compared(TEACHER, disagreed, 100)], {})
    found = only(states)
    assert found["agreement"]["value"] == 0.9
    assert (found["agreement_at_promotion"], found["drift"]) == (at_promotion, drift)


def test_metrics_have_one_series_for_each_comparison(states: WorkerStates) -> None:
    write_process(states, ProcessState(0, 3))
    slow = compared(SHADOW, 10, 100)
    slow.counts.count_response(200, 0.1)
    write_results(states, [slow, compared(TEACHER, 1, 50)], {"tiny": 2})
    write_sent(states, {"sent": {"tiny": 100}, "dropped": {}})
    found = {
        (figure.name, figure.labels.get("role"), figure.labels.get("quantile")): figure.value
        for figure in shadow_figures(states)
    }
    assert found["shadow_up", None, None] == 0
    assert found["shadow_starts_total", None, None] == 3
    assert found["shadow_sent_total", None, None] == 100
    assert found["shadow_dropped_total", None, None] == 2
    assert found["shadow_disagreed_rows_total", SHADOW, None] == 10
    assert found["shadow_compared_rows_total", TEACHER, None] == 50
    assert 0.08 < found["shadow_seconds", SHADOW, "0.5"] < 0.13
