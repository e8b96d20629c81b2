"""The canary of a model: a real registry, a real server, canaries that fail in every way."""

from __future__ import annotations

import logging
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import requests
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from tiny.server import running, until
from tiny.serving import save_tiny

from mlflow_pt_deploy.registry.addresses import source
from mlflow_pt_deploy.registry.canary import CANARY_ENDED_TAG, CANARY_TAG
from mlflow_pt_deploy.serving.app import Application
from mlflow_pt_deploy.serving.lifecycle.served_model import ServedModel
from mlflow_pt_deploy.serving.model.prediction_cache import PredictionCache
from mlflow_pt_deploy.serving.monitoring.monitor import Monitor
from mlflow_pt_deploy.serving.observability.prometheus import PrometheusMetrics
from mlflow_pt_deploy.serving.rollout.canary.canary import Canary
from mlflow_pt_deploy.serving.rollout.canary.duty import CanaryDuty, reordered
from mlflow_pt_deploy.serving.rollout.canary.endings import Endings
from mlflow_pt_deploy.serving.rollout.canary.limits import Limits
from mlflow_pt_deploy.serving.rollout.version_share import VersionShare, parse_option

KEY = "x-pt-deploy-key"


class Setup(NamedTuple):
    """One server process: the champion is version 1 of the registered model `tiny`."""

    client: MlflowClient
    model: ServedModel
    canary: Canary
    endings: Endings
    monitor: Monitor
    url: str
    folder: Path
    session: requests.Session

    def add(self, **habits: Any) -> str:
        """Register a version."""
        number = len(self.client.search_model_versions("name = 'tiny'")) + 1
        folder = save_tiny(self.folder / f"tiny-{number}", **habits)
        return str(self.client.create_model_version("tiny", str(folder)).version)

    def tag(self, value: str) -> dict[str, Any]:
        """What the canary is once a person has set the tag of the model."""
        self.client.set_registered_model_tag("tiny", CANARY_TAG, value)
        return self.poll()

    def poll(self) -> dict[str, Any]:
        self.canary.poll()
        return self.canary.status() or {"state": "off"}

    def ask(
        self, text: str = "red", path: str = "/invocations", **headers: str
    ) -> requests.Response:
        body = {"inputs": [text]}
        return self.session.post(self.url + path, json=body, headers=headers, timeout=20)

    def versions(self, keys: Sequence[str], text: str = "red") -> list[str]:
        """The version that answers each key; every answer is good."""
        answers = [self.ask(text, **{KEY: key}) for key in keys]
        assert {answer.status_code for answer in answers} == {200}
        return [answer.headers["x-model-version"] for answer in answers]


@contextmanager
def serving(folder: Path, options: dict[str, VersionShare], **habits: Any) -> Iterator[Setup]:
    client = MlflowClient()
    client.create_registered_model("tiny")
    client.create_model_version("tiny", str(save_tiny(folder / "tiny-1", **habits)))
    client.set_registered_model_alias("tiny", "champion", "1")
    metrics, endings = PrometheusMetrics(), Endings(None)
    model = ServedModel("tiny", source("models:/tiny@champion"), metrics=metrics)
    model.open()
    canary = Canary(model, options, endings, metrics)
    duty = CanaryDuty({"tiny": canary}, endings, Limits())
    application = Application({"tiny": model}, metrics=metrics, canaries={"tiny": canary})
    monitor = Monitor({"tiny": model}, [duty])
    with running(application) as url, requests.Session() as session:
        yield Setup(client, model, canary, endings, monitor, url, folder, session)


@pytest.fixture
def setup(tracking: str, tmp_path: Path) -> Iterator[Setup]:
    with serving(tmp_path, {}) as setup:
        yield setup


KEYS = [f"user-{number}" for number in range(60)]


def test_a_person_starts_widens_and_ends_it_by_the_tag(setup: Setup) -> None:
    assert setup.poll() == {"state": "off"}
    assert requests.get(f"{setup.url}/model", timeout=5).json()["canary"] is None
    two = setup.add()
    setup.client.set_registered_model_alias("tiny", "challenger", two)
    found = setup.tag("challenger:30%")
    assert (found["state"], found["version"], found["share"]) == ("running", two, 0.3)
    narrow = setup.versions(KEYS)
    assert set(narrow) == {"1", two}
    assert setup.versions(KEYS) == narrow, "a key keeps its version"
    assert setup.tag("2:60%")["share"] == 0.6
    wide = setup.versions(KEYS)
    assert wide.count(two) > narrow.count(two)
    assert all(w == two for n, w in zip(narrow, wide, strict=True) if n == two)
    assert setup.tag("off") == {"state": "off"}
    assert set(setup.versions(KEYS[:20])) == {"1"}


def test_the_page_says_what_both_did_and_metrics_are_by_version(setup: Setup) -> None:
    two = setup.add()
    setup.tag(f"{two}:50%")
    setup.versions(KEYS)
    until(lambda: setup.model.counts[two].compared > 0, 5)
    found = requests.get(f"{setup.url}/model", timeout=5).json()["canary"]
    assert (found["state"], found["uri"], found["share"]) == ("running", f"models:/tiny/{two}", 0.5)
    counts = found["counts"]
    assert counts["champion"]["requests"] + counts["canary"]["requests"] == len(KEYS)
    assert counts["canary"]["compared"] > counts["canary"]["disagreed"] == 0
    metrics = requests.get(f"{setup.url}/metrics", timeout=5).text
    for label in ("1", two):
        assert f'pt_deploy_requests_total{{model="tiny",status="200",version="{label}"}}' in metrics
        assert f'pt_deploy_compute_seconds_count{{model="tiny",version="{label}"}}' in metrics


def test_a_version_in_the_path_is_answered_by_it(setup: Setup) -> None:
    two = setup.add()
    setup.tag(f"{two}:0.000001%")
    for version, status in (("1", 200), (two, 200), ("9", 404)):
        path = f"/v2/models/tiny/versions/{version}"
        tensor = {"name": "text", "datatype": "BYTES", "shape": [1], "data": ["red"]}
        found = requests.post(f"{setup.url}{path}/infer", json={"inputs": [tensor]}, timeout=5)
        assert found.status_code == status
        if status == 200:
            assert found.headers["x-model-version"] == found.json()["model_version"] == version
        assert requests.get(f"{setup.url}{path}/ready", timeout=5).status_code == status
    assert requests.get(f"{setup.url}/v2/models/tiny", timeout=5).json()["versions"] == ["1", two]


def test_without_a_key_the_request_id_decides(setup: Setup) -> None:
    two = setup.add()
    setup.tag(f"{two}:50%")
    ids = {n: setup.ask(**{"x-request-id": str(n)}).headers["x-model-version"] for n in range(20)}
    again = {n: setup.ask(**{"x-request-id": str(n)}).headers["x-model-version"] for n in range(20)}
    assert ids == again and set(ids.values()) == {"1", two}
    assert {setup.ask().headers["x-model-version"] for _ in range(30)} == {"1", two}


def test_the_champion_answers_what_the_canary_fails(
    setup: Setup, caplog: pytest.LogCaptureFixture
) -> None:
    two = setup.add(fails_on="green")
    setup.tag(f"{two}:100%")
    assert set(setup.versions(KEYS[:3])) == {two}
    assert set(setup.versions(KEYS[:9], "green")) == {"1"}
    assert setup.ask("").status_code == 200
    for body in ({"inputs": [7]}, {"inputs": ["red"], "params": {"top_k": 9}}, {}):
        found = requests.post(f"{setup.url}/invocations", json=body, timeout=5)
        assert found.status_code == 400, "the client's fault"
    assert setup.ask("explode").status_code == 500, "both fail, as without a canary"
    mine = setup.model.counts[two]
    assert (mine.requests, mine.errors) == (3 + 9 + 1, 9)
    metrics = requests.get(f"{setup.url}/metrics", timeout=5).text
    assert f'pt_deploy_canary_failures_total{{model="tiny",version="{two}"}} 9.0' in metrics
    warned = [
        each for each in caplog.records if "answers" in each.message and "failed" in each.message
    ]
    assert len(warned) == 3, "the first failures only"


def test_a_slow_canary_has_a_part_of_the_deadline(setup: Setup) -> None:
    two = setup.add(slow_s=3)
    setup.tag(f"{two}:100%")
    start = time.monotonic()
    found = setup.ask("slow", **{"x-deadline-ms": "1000"})
    assert 0.4 < time.monotonic() - start < 1
    assert (found.status_code, found.headers["x-model-version"]) == (200, "1")
    assert setup.ask(**{"x-deadline-ms": "1000"}).status_code == 200, "its only thread is busy"
    mine, champion = setup.model.counts[two], setup.model.counts["1"]
    assert mine.errors == 2
    assert (champion.quantile_s(1.0) or 9) < 0.3, "the lost time is not the champion's"


def test_large_requests_and_images_are_encoded_by_each_version(setup: Setup) -> None:
    two = setup.add()
    setup.tag(f"{two}:100%")
    body = {"inputs": ["red blue blue " * 100] * 30, "params": {"top_k": 2}}
    found = requests.post(f"{setup.url}/invocations", json=body, timeout=10)
    assert found.headers["x-model-version"] == two
    assert [[each["label"] for each in row] for row in found.json()["predictions"]] == [
        ["blue", "red"]
    ] * 30
    until(lambda: setup.model.counts[two].compared == 8, 5)
    assert setup.model.counts[two].disagreed == 0


def test_rows_that_the_champion_has_cached_are_compared_too(setup: Setup) -> None:
    champion = setup.model.current
    assert champion is not None
    champion.pyfunc.service.cache = PredictionCache(1.0)
    csv = {"data": "text\nred\n", "headers": {"Content-Type": "text/csv"}, "timeout": 20}
    setup.session.post(f"{setup.url}/invocations", **csv)
    setup.tag(f"{setup.add()}:100%")
    running = setup.canary.running
    assert running is not None
    answer = setup.session.post(f"{setup.url}/invocations", **csv)
    assert answer.headers["x-model-version"] == "2"
    until(lambda: running.version.pyfunc.service.counts.compared == 1)


def test_labels_in_another_order_are_the_same_labels(setup: Setup) -> None:
    two = setup.add(reversed=True)
    assert setup.tag(f"{two}:100%")["state"] == "running"
    for word in ("red", "green", "blue"):
        found = setup.ask(word)
        assert found.headers["x-model-version"] == two
        assert found.json()["predictions"][0]["label"] == word
    until(lambda: setup.model.counts[two].compared, 5)
    assert setup.model.counts[two].disagreed == 0
    assert reordered([1, 2], ("a", "b", "c"), ("c", "b", "a")) == [0, 2, 1]


def test_what_cannot_be_a_canary_is_said(setup: Setup) -> None:
    other = setup.add(label="crimson")
    images = setup.add(images=True)
    unfit = setup.add(refuse="no")
    assert setup.tag("nobody:5%")["reason"] == (
        "models:/tiny@nobody does not exist; set the alias, or name another version"
    )
    for value, state, reason in (
        ("five", "refused", "the tag pt_deploy.canary is 'five'; write an alias"),
        ("77:5%", "refused", "models:/tiny/77 does not exist"),
        ("champion:5%", "inactive", "version 1 is the champion; there is nothing to compare"),
        ("1:5%", "inactive", "version 1 is the champion"),
        (
            f"{other}:5%",
            "refused",
            "labels are not the champion's: new are 'crimson'; missing are 'red'",
        ),
        (f"{images}:5%", "refused", "reads the column 'image' and the champion 'text'"),
        (f"{unfit}:5%", "refused", "no"),
    ):
        found = setup.tag(value)
        assert found["state"] == state and reason in found["reason"], found
        assert setup.canary.running is None
    assert set(setup.versions(KEYS[:5])) == {"1"}


def test_the_option_starts_it_and_the_tag_goes_first(tracking: str, tmp_path: Path) -> None:
    with serving(tmp_path, parse_option("canary", "models:/tiny/2=100%")) as setup:
        assert "models:/tiny/2 does not exist" in setup.poll()["reason"]
        two = setup.add()
        assert setup.poll()["state"] == "running"
        assert setup.tag("")["state"] == "off"
        setup.client.delete_registered_model_tag("tiny", CANARY_TAG)
        assert (setup.poll()["state"], setup.poll()["version"]) == ("running", two)


def test_a_promoted_canary_is_the_champion_and_continues_its_counts(setup: Setup) -> None:
    two = setup.add()
    setup.tag(f"{two}:100%")
    setup.versions(KEYS[:5])
    setup.client.set_registered_model_alias("tiny", "champion", two)
    setup.model.poll()
    assert set(setup.versions(KEYS[:5])) == {two}
    assert setup.poll()["state"] == "inactive"
    assert set(setup.versions(KEYS[:5])) == {two}
    assert setup.model.counts[two].requests == 15


def test_replaced_versions_are_freed(setup: Setup) -> None:
    two, three = setup.add(), setup.add()
    setup.tag(f"{two}:50%")
    setup.versions(KEYS[:10])
    assert setup.canary.running and setup.model.current
    canary, champion = weakref.ref(setup.canary.running.version), weakref.ref(setup.model.current)
    setup.client.set_registered_model_alias("tiny", "champion", three)
    setup.model.poll()
    assert set(setup.versions(KEYS[:10])) == {three}, "the pair was not checked yet"
    assert setup.poll()["state"] == "running"
    until(lambda: set(setup.versions(KEYS[:10])) == {two, three}, 5)
    until(lambda: champion() is None, 5)
    setup.tag("off")
    setup.versions(KEYS[:2])
    until(lambda: canary() is None, 5)


def test_a_registry_that_is_down_changes_nothing(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    two = setup.add()
    setup.tag(f"{two}:100%")

    def down(*arguments: object) -> None:
        raise MlflowException("down")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "get_registered_model", down)
        assert [setup.poll()["state"] for _ in range(3)] == ["running"] * 3
    assert sum("cannot be looked up" in each.message for each in caplog.records) == 1
    assert set(setup.versions(KEYS[:3])) == {two}


def load(setup: Setup, stop: threading.Event, statuses: list[int]) -> None:
    words = ("red", "green", "blue")
    with requests.Session() as session:
        while not stop.is_set():
            body = {"inputs": [words[len(statuses) % 3]]}
            statuses.append(session.post(f"{setup.url}/invocations", json=body).status_code)


@contextmanager
def under_load(setup: Setup) -> Iterator[None]:
    """Two clients until the block ends; every request is answered."""
    stop, statuses = threading.Event(), list[int]()
    clients = [threading.Thread(target=load, args=(setup, stop, statuses)) for _ in range(2)]
    for client in clients:
        client.start()
    try:
        yield
    finally:
        stop.set()
        for client in clients:
            client.join(20)
    assert set(statuses) == {200}


def judged(setup: Setup) -> bool:
    """Whether the canary is ended; ticks follow each other faster than in a server."""
    time.sleep(0.05)
    setup.monitor.tick()
    return (setup.canary.status() or {})["state"] == "ended"


def test_a_guardrail_ends_it_and_its_tag_keeps_it_out(setup: Setup) -> None:
    two = setup.add(wrong=True)
    setup.tag(f"{two}:50%")
    with under_load(setup):
        until(lambda: judged(setup), 30)
    found = setup.canary.status() or {}
    assert found["reason"].startswith("disagreement: ")
    assert setup.canary.running is None

    def tag() -> str | None:
        return setup.client.get_model_version("tiny", two).tags.get(CANARY_ENDED_TAG)

    until(tag)
    assert tag() == found["reason"]
    assert setup.poll()["state"] == "ended"
    until(lambda: setup.endings.all()[0][1].tagged)
    setup.client.delete_model_version_tag("tiny", two, CANARY_ENDED_TAG)
    assert setup.poll()["state"] == "running", "a person took it back"
    setup.monitor.tick()
    assert setup.canary.running is not None
    setup.client.set_model_version_tag("tiny", two, CANARY_ENDED_TAG, "by another server")
    assert setup.poll() | {"reason": "by another server"} == setup.poll()
    assert setup.canary.running is None


def test_a_registry_that_refuses_tags_changes_nothing_about_the_end(
    setup: Setup, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    two = setup.add()
    setup.tag(f"{two}:100%")

    def refuse(*arguments: object) -> None:
        raise MlflowException("read only")

    with monkeypatch.context() as patch, caplog.at_level(logging.INFO):
        patch.setattr(MlflowClient, "set_model_version_tag", refuse)
        setup.canary.end("a test")
        for _ in range(3):
            setup.monitor.tick()
            assert setup.poll()["state"] == "ended"
    assert sum("canary ended: a test" in each.message for each in caplog.records) == 1
    assert CANARY_ENDED_TAG not in setup.client.get_model_version("tiny", two).tags
