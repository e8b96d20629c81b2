"""Drift on a real server: the same rows, other rows, the last hour, tags that cannot be used."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import requests
from mlflow import MlflowClient
from tiny.server import running
from tiny.serving import predict, save_tiny, tiny_variant

from mlflow_pt_deploy.evaluation.profile import Profile, RowCounts
from mlflow_pt_deploy.registry.addresses import source
from mlflow_pt_deploy.registry.profile_tags import PROFILE_TAG
from mlflow_pt_deploy.serving.app import Application
from mlflow_pt_deploy.serving.lifecycle.served_model import ServedModel
from mlflow_pt_deploy.serving.model.outputs import PredictionFormatter
from mlflow_pt_deploy.serving.monitoring.drift import STEP_S, WINDOW_S, DriftWatch
from mlflow_pt_deploy.serving.monitoring.monitor import Monitor, server_counts
from mlflow_pt_deploy.serving.observability.metrics import new_metrics
from mlflow_pt_deploy.serving.worker_state import WorkerStates

WORDS = ("red", "green", "blue", "red red", "green green green", "blue blue blue sky")


def texts(seed: int, count: int = 400) -> list[str]:
    return random.Random(seed).choices(WORDS, (5, 4, 3, 2, 2, 1), k=count)


def count(counts: RowCounts, rows: Sequence[str]) -> None:
    """Count rows as the optimize stage and the server do."""
    variant = tiny_variant()
    encoded = list(variant.preprocessor.encode(rows))
    best = PredictionFormatter(variant.labels).best(predict(variant.preprocessor.collate(encoded)))
    counts.count_rows(best, [encoded], variant.preprocessor.unknown_id)


def profile_of(rows: Sequence[str]) -> Profile:
    counts = RowCounts(labels=[0] * 3)
    count(counts, rows)
    return Profile.of(counts)


def open_tiny(folder: Path, tag: str | None, **options: Any) -> ServedModel:
    """A registered tiny model with this profile, loaded."""
    client = MlflowClient()
    client.create_registered_model("tiny")
    tags = {} if tag is None else {PROFILE_TAG: tag}
    client.create_model_version("tiny", str(save_tiny(folder / "tiny")), tags=tags)
    model = ServedModel("tiny", source("models:/tiny/1"), **options)
    model.open()
    return model


def send(url: str, rows: Sequence[str]) -> None:
    for start in range(0, len(rows), 100):
        body = {"inputs": list(rows[start : start + 100])}
        assert requests.post(f"{url}/invocations", json=body, timeout=10).status_code == 200


def verdicts(shifts: Sequence[dict[str, Any]]) -> dict[str, str]:
    return {shift["kind"]: shift["verdict"] for shift in shifts}


def series(url: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    from prometheus_client.parser import text_string_to_metric_families

    text = requests.get(f"{url}/metrics", timeout=5).text
    return {
        (sample.name.removeprefix("pt_deploy_"), frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_the_same_rows_are_the_same_and_others_have_moved(tracking: str, tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client")
    metrics = new_metrics()
    model = open_tiny(tmp_path, profile_of(texts(0)).to_tag(), metrics=metrics)
    watch = DriftWatch({"tiny": model})
    metrics.add_rows(watch.series)
    with running(Application({"tiny": model}, metrics=metrics, drift=watch)) as url:

        def drift() -> dict[str, Any]:
            return requests.get(f"{url}/model", timeout=5).json()["drift"]

        assert drift() == {"reason": "", "last_hour": [], "since_start": []}
        send(url, texts(1))
        found = drift()
        assert found["last_hour"] == found["since_start"] and found["reason"] == ""
        assert set(verdicts(found["last_hour"]).values()) == {"same"}
        assert found["last_hour"][0]["rows"] == 400
        send(url, ["a zebra is blue"] * 600)
        moved = {"labels", "scores", "lengths", "unknown"}
        assert verdicts(drift()["last_hour"]) == dict.fromkeys(moved, "moved")
        assert requests.get(f"{url}/models", timeout=5).json()[0]["drift"] == drift()
        found = series(url)
    of = {"model": "tiny", "version": "1"}.items()
    blue = texts(1).count("blue") + texts(1).count("blue blue blue sky") + 600
    assert found["rows_total", frozenset({*of, ("label", "blue")})] == blue
    assert found["score_bucket", frozenset({*of, ("le", "+Inf")})] == 1000
    assert found["row_tokens_bucket", frozenset({*of, ("le", "3.0")})] == 400 - texts(1).count(
        "blue blue blue sky"
    )
    assert found["row_tokens_count", frozenset(of)] == 1000
    unknown = texts(1).count("blue blue blue sky") + 3 * 600
    assert found["unknown_tokens_total", frozenset(of)] == unknown
    kind = frozenset({*of, ("kind", "unknown"), ("window", "since_start")})
    low, psi, high = (found[f"drift_{name}", kind] for name in ("psi_low", "psi", "psi_high"))
    assert 0.1 < low < psi < high


def test_the_last_hour_does_not_hide_behind_the_time_before(tracking: str, tmp_path: Path) -> None:
    model = open_tiny(tmp_path, profile_of(texts(0)).to_tag())
    (tmp_path / "run").mkdir()
    states = WorkerStates(tmp_path / "run", 1)
    states.claim()
    now = [1e9]
    watch = DriftWatch({"tiny": model}, states, clock=lambda: now[0])
    monitor = Monitor({"tiny": model}, [watch], states)
    monitor.tick()
    count(model.counts["1"], texts(1) * 10)
    for _ in range(int(WINDOW_S / STEP_S)):
        now[0] += STEP_S
        monitor.tick()
    assert len(states.document("snapshots")["snapshots"]) == 1 + WINDOW_S / STEP_S
    count(model.counts["1"], ["blue"] * 200)
    now[0] += STEP_S
    monitor.tick()
    status = watch.status("tiny")
    assert status is not None
    assert verdicts(status["last_hour"])["labels"] == "moved"
    assert verdicts(status["since_start"])["labels"] == "same"
    assert (status["last_hour"][0]["rows"], status["since_start"][0]["rows"]) == (200, 4200)
    for _ in range(100):
        now[0] += STEP_S
        monitor.tick()
    assert len(states.document("snapshots")["snapshots"]) < 20
    assert watch.status("tiny")["last_hour"] == []
    # a worker that takes over goes on with the snapshots of the one before
    other = DriftWatch({"tiny": model}, states, clock=lambda: now[0])
    assert other.status("tiny") == watch.status("tiny")
    other.lead(server_counts({"tiny": model}, states))
    assert states.document("snapshots")["snapshots"][-1]["at"] == now[0]
    states.close()


@pytest.mark.parametrize(
    ("tag", "reason", "warned"),
    [
        (None, "version 1 has no tag pt_deploy.profile", False),
        ("{", "the tag pt_deploy.profile of version 1 is damaged", True),
        (
            Profile.of(RowCounts(labels=[0] * 2)).to_tag(),
            "the profile of version 1 has 2 classes, the model 3",
            True,
        ),
    ],
)
def test_a_profile_that_cannot_be_used_is_ignored_and_logged_once(
    tracking: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    tag: str | None,
    reason: str,
    warned: bool,
) -> None:
    pytest.importorskip("prometheus_client")
    metrics = new_metrics()
    model = open_tiny(tmp_path, tag, metrics=metrics)
    watch = DriftWatch({"tiny": model})
    metrics.add_rows(watch.series)
    count(model.counts["1"], texts(0))
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            watch.follow()
            status = watch.status("tiny")
    assert status is not None and reason in status["reason"]
    assert (status["last_hour"], status["since_start"]) == ([], [])
    assert len([each for each in caplog.records if reason in each.message]) == warned
    exposed = (metrics.expose() or b"").decode()
    assert "pt_deploy_rows_total{" in exposed and "pt_deploy_drift_psi{" not in exposed


def test_a_replaced_version_keeps_its_series(tracking: str, tmp_path: Path) -> None:
    model = open_tiny(tmp_path, profile_of(texts(0)).to_tag())
    watch = DriftWatch({"tiny": model})
    watch.follow()
    count(model.counts["1"], texts(1))
    MlflowClient().create_model_version("tiny", str(save_tiny(tmp_path / "next")))
    model._provider = source("models:/tiny/2")
    model.poll()
    first, second = sorted(watch.series(), key=lambda each: each.version)
    assert (first.version, first.counts.rows, bool(first.shifts["last_hour"])) == ("1", 400, True)
    assert (second.version, second.counts.rows, second.profile) == ("2", 0, {})
    assert "has no tag" in (watch.status("tiny") or {})["reason"]
    other = ServedModel("other", source(str(tmp_path / "next")))
    other.open()
    both = DriftWatch({"tiny": model, "other": other})
    assert [each.model for each in (*both.series(), *both.series())] == ["tiny", "other"] * 2
    model.unload("a test")
    assert watch.status("tiny") is None
