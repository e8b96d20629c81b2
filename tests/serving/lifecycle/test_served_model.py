"""Hot swap: a real registry, a real server, versions that are slow or cannot serve."""

import json
import logging
import platform
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from tiny.server import running, until
from tiny.serving import save_tiny

from mlflow_pt_deploy.errors import ArtifactError
from mlflow_pt_deploy.registry.addresses import (
    DIGEST_TAG,
    ModelSpec,
    ResolvedVersion,
    ServedVersion,
    resolve,
    source,
)
from mlflow_pt_deploy.serving.app import Application
from mlflow_pt_deploy.serving.lifecycle.registry_watcher import RegistryWatcher
from mlflow_pt_deploy.serving.lifecycle.served_model import RETRY_S, ServedModel
from mlflow_pt_deploy.serving.model.loaded_model import LoadedModel, load_version

URI = "models:/tiny@champion"
POLL_S = 0.05


class Registry:
    """A registered model whose versions are made by habit."""

    def __init__(self, folder: Path) -> None:
        self.client = MlflowClient()
        self.client.create_registered_model("tiny")
        self.folder = folder

    def add(self, **habits: Any) -> str:
        number = len(self.client.search_model_versions("name = 'tiny'")) + 1
        folder = save_tiny(self.folder / f"tiny-{number}", **habits)
        return str(self.client.create_model_version("tiny", str(folder)).version)

    def promote(self, version: str) -> None:
        self.client.set_registered_model_alias("tiny", "champion", version)


@pytest.fixture
def registry(tracking: str, tmp_path: Path) -> Registry:
    registry = Registry(tmp_path)
    registry.promote(registry.add(label="one"))
    return registry


@contextmanager
def following(models: Sequence[ServedModel]) -> Iterator[str]:
    """The application on a free port, and the watcher that opens and follows its models."""
    watcher = RegistryWatcher(models, POLL_S, on_opened=lambda: None, on_failed=lambda error: None)
    with running(Application({model.name: model for model in models})) as url:
        watcher.start()
        try:
            yield url
        finally:
            watcher.stop()
            watcher.join(10)


def ask(url: str, session: Any = requests, text: str = "red") -> requests.Response:
    return session.post(f"{url}/invocations", json={"inputs": [text]}, timeout=10)


def failed(clients: Sequence[Future[None]]) -> bool:
    return any(client.done() for client in clients)


def version(url: str) -> str:
    return ask(url).headers.get("X-Model-Version", "")


@pytest.mark.filterwarnings("ignore:.*stages:FutureWarning")
def test_a_stage_set_by_hand_is_followed(registry: Registry) -> None:
    """MLflow's UI still has stages, beside aliases."""
    second = registry.add(label="two")
    set_stage = registry.client.transition_model_version_stage
    set_stage("tiny", "1", "Production")
    with following([ServedModel("tiny", source("models:/tiny/Production"))]) as url:
        until(lambda: requests.get(f"{url}/readyz", timeout=5).status_code == 200)
        assert ask(url).headers["X-Model-Version"] == "1"
        set_stage("tiny", second, "Production", archive_existing_versions=True)
        until(lambda: ask(url).headers["X-Model-Version"] == second)


def test_ready_only_when_loaded_and_warm(registry: Registry) -> None:
    registry.promote(registry.add(label="slow", load_s=0.5))
    with following([ServedModel("tiny", source(URI))]) as url:
        assert requests.get(f"{url}/livez", timeout=5).status_code == 200
        for path in ("/readyz", "/ping"):
            assert requests.get(url + path, timeout=5).status_code == 503
            assert requests.head(url + path, timeout=5).status_code == 503
        early = ask(url)
        assert early.status_code == 503
        assert early.headers["Retry-After"] == "1"
        assert "still loading" in early.json()["message"]
        until(lambda: requests.get(f"{url}/readyz", timeout=5).status_code == 200)
        assert ask(url).json()["predictions"][0]["label"] == "slow"


def test_swaps_under_load_fail_no_request_and_mix_no_versions(registry: Registry) -> None:
    registry.add(label="two", load_s=0.05)
    words = {"1": "one", "2": "two"}
    model = ServedModel("tiny", source(URI))
    stop = threading.Event()
    latest = [""] * 8

    def client(number: int) -> None:
        with requests.Session() as session:
            while not stop.is_set():
                answer = ask(url, session)
                assert answer.status_code == 200, answer.text
                latest[number] = answer.headers["X-Model-Version"]
                assert answer.json()["predictions"][0]["label"] == words[latest[number]]

    with following([model]) as url, ThreadPoolExecutor(8) as pool:
        until(lambda: model.current)
        clients = [pool.submit(client, number) for number in range(8)]
        try:
            for target in ("2", "1", "2", "1", "2"):
                registry.promote(target)
                until(lambda target=target: latest == [target] * 8 or failed(clients))  # type: ignore[misc]
        finally:
            stop.set()
        for future in clients:
            future.result()


def test_requests_in_flight_end_on_the_old_version_which_is_then_freed(
    registry: Registry,
) -> None:
    registry.promote(registry.add(label="slow", predict_s=0.005, slow_s=0.5))
    model = ServedModel("tiny", source(URI))
    with following([model]) as url, ThreadPoolExecutor(1) as pool:
        until(lambda: model.current)
        old = weakref.ref(model.current)
        in_flight = pool.submit(ask, url, text="slow red")
        until(lambda: model.current.pyfunc.service.batcher.executor.running_s)
        registry.promote("1")
        until(lambda: model.current.label == "1")
        assert version(url) == "1"
        answer = in_flight.result()
        assert answer.headers["X-Model-Version"] == "2"
        assert answer.json()["predictions"][0]["label"] == "slow"
        until(lambda: old() is None)


def test_a_version_that_cannot_serve_is_rejected_and_not_tried_again_at_once(
    registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    tried: list[str | None] = []

    def load(version: ResolvedVersion, spec: ModelSpec) -> LoadedModel:
        tried.append(version.version)
        return load_version(version, spec)

    model = ServedModel("tiny", source(URI), load=load)
    with following([model]) as url:
        until(lambda: model.current)
        registry.promote(registry.add(refuse="it answers differently here"))
        until(lambda: model.rejected)
        polls = model.polls
        until(lambda: model.polls > polls + 10)
        assert tried == ["1", "2"]
        assert version(url) == "1"
        refused = requests.get(f"{url}/model", timeout=5).json()["refused"]
        assert refused["reason"] == "it answers differently here"
        assert (refused["version"], refused["uri"]) == ("2", URI)
        assert 0 < refused["tried_again_in_s"] <= RETRY_S
        assert "version 2 was rejected, version 1 stays" in caplog.text
        registry.promote(registry.add(label="three"))
        until(lambda: model.current.label == "3")
        assert requests.get(f"{url}/model", timeout=5).json()["refused"] is None


def test_other_library_versions_are_logged(
    registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    ServedModel("tiny", source(URI)).open()
    assert f"exported with python 2.7 (here {platform.python_version()})" in caplog.text


def test_a_restart_opens_what_was_served_last_and_then_polls(registry: Registry) -> None:
    before = ServedVersion(ModelSpec(URI), resolve(URI))
    registry.promote(registry.add(refuse="it answers differently here"))
    model = ServedModel("tiny", source(URI), last_served=before)
    model.open()
    assert model.current and model.current.label == "1"
    model.poll()
    assert model.current.label == "1"
    assert model.rejected and model.rejected.version.version == "2"
    registry.client.delete_registered_model_alias("tiny", "champion")
    ServedModel("tiny", source(URI), last_served=before).open()
    with pytest.raises(MlflowException, match="alias champion not found"):
        ServedModel("tiny", source(URI)).open()


def test_the_alias_decides_if_what_was_served_last_is_gone(registry: Registry) -> None:
    before = ServedVersion(ModelSpec(URI), resolve(URI))
    registry.promote(registry.add(label="two"))
    unfit = registry.add(refuse="it answers differently here")
    registry.client.delete_model_version("tiny", "1")
    model = ServedModel("tiny", source(URI), last_served=before)
    model.open()
    assert model.current and model.current.label == "2"
    assert model.rejected is None
    registry.promote(unfit)
    with pytest.raises(ArtifactError, match="it answers differently here"):
        ServedModel("tiny", source(URI), last_served=before).open()


def test_going_back_forgets_the_rejection(registry: Registry) -> None:
    model = ServedModel("tiny", source(URI))
    model.open()
    registry.promote(registry.add(refuse="no"))
    model.poll()
    assert model.rejected and model.rejected.retry_s == RETRY_S
    registry.promote("1")
    model.poll()
    assert model.rejected is None


def test_a_rejected_version_is_tried_again_with_growing_delay(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ServedModel("tiny", source(URI))
    model.open()
    registry.promote(registry.add(refuse="no"))
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    pauses = []
    for _ in range(9):
        model.poll()
        assert model.rejected
        pauses.append(model.rejected.retry_s)
        now += model.rejected.retry_s
    assert pauses == [60, 120, 240, 480, 960, 1920, 3600, 3600, 3600]


def test_a_registry_that_does_not_answer_changes_nothing_and_is_logged_once(
    registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    lost = threading.Event()

    def find(uri: str) -> ResolvedVersion:
        if lost.is_set():
            raise MlflowException("http://user:secret@registry does not answer")
        return resolve(uri)

    caplog.set_level(logging.INFO, "mlflow_pt_deploy")
    model = ServedModel("tiny", source(URI), find=find)
    with following([model]) as url:
        until(lambda: model.current)
        lost.set()
        until(lambda: model.registry_down_since)
        polls = model.polls
        until(lambda: model.polls > polls + 5)
        assert version(url) == "1"
        assert requests.get(f"{url}/readyz", timeout=5).status_code == 200
        status = requests.get(f"{url}/model", timeout=5).json()
        assert status["registry_lost_since"]
        assert status["registry_error"] == "MlflowException: http://registry does not answer"
        assert caplog.text.count("the wanted version cannot be looked up") == 1
        assert "secret" not in caplog.text
        registry.promote(registry.add(label="two"))
        lost.clear()
        until(lambda: model.current.label == "2")
        assert "the registry answers again" in caplog.text
        assert requests.get(f"{url}/model", timeout=5).json()["registry_lost_since"] is None


def test_status_shows_what_is_being_prepared(registry: Registry) -> None:
    with loading(registry) as (models, release), following(models) as url:
        slow = models[0]
        until(lambda: slow.preparing)
        preparing = requests.get(f"{url}/model", timeout=5).json()["preparing"]
        assert preparing["version"] == "2"
        assert preparing["since"]
        assert version(url) == "1"
        release()
        until(lambda: slow.current.label == "2")
        assert requests.get(f"{url}/model", timeout=5).json()["preparing"] is None


def test_a_stalled_download_does_not_hold_up_other_models(registry: Registry) -> None:
    with loading(registry) as (models, release), following(models):
        slow, other = models
        until(lambda: slow.preparing and other.current)
        polls = other.polls
        until(lambda: other.polls > polls + 3)
        registry.add(label="three")
        until(lambda: other.current.label == "3")
        assert slow.preparing
        release()


@contextmanager
def loading(registry: Registry) -> Iterator[tuple[list[ServedModel], Callable[[], None]]]:
    """A model whose second version takes until it is released, and another one."""
    released = threading.Event()

    def load(version: ResolvedVersion, spec: ModelSpec) -> LoadedModel:
        if version.version == "2":
            assert released.wait(30)
        return load_version(version, spec)

    slow = ServedModel("tiny", source(URI), load=load)
    slow.open()
    registry.promote(registry.add(label="two"))
    other = ServedModel("other", source("models:/tiny/latest"))
    other.open()
    try:
        yield [slow, other], released.set
    finally:
        released.set()


def test_an_alias_that_is_deleted_changes_nothing(registry: Registry) -> None:
    model = ServedModel("tiny", source(URI))
    model.open()
    registry.client.delete_registered_model_alias("tiny", "champion")
    model.poll()
    assert model.current and model.current.label == "1"
    assert model.registry_down_since


def test_latest_and_stages_are_followed_too(registry: Registry) -> None:
    model = ServedModel("tiny", source("models:/tiny/latest"))
    model.open()
    registry.add(label="two")
    model.poll()
    assert model.current and model.current.label == "2"
    assert resolve("models:/tiny/1") == ResolvedVersion("models:/tiny/1", "tiny", "1")


def test_a_digest_that_the_registry_does_not_hold_is_refused(registry: Registry) -> None:
    registry.client.set_model_version_tag("tiny", "1", DIGEST_TAG, "f" * 64)
    with pytest.raises(ArtifactError, match="differs from the promoted one"):
        ServedModel("tiny", source(URI)).open()


def test_nothing_stays_on_disk_after_a_version(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    model = ServedModel("tiny", source(URI))
    model.open()
    assert len(list(folder.iterdir())) == 1
    registry.promote(registry.add(refuse="no"))
    model.poll()
    assert len(list(folder.iterdir())) == 1
    model.current = None
    assert list(folder.iterdir()) == []


def test_model_shows_logged_and_observed_latency(registry: Registry) -> None:
    registry.client.set_model_version_tag("tiny", "1", "latency_p50_ms", "0.5")
    model = ServedModel("tiny", source(URI))
    with following([model]) as url:
        until(lambda: model.current)
        ask(url)
        about = requests.get(f"{url}/model", timeout=5).json()
        assert about["logged"] == {"latency_p50_ms": 0.5}
        assert about["observed"]["answers"] == 1
        assert about["observed"]["latency_p50_ms"] > 0
        assert (about["registered_model"], about["version"], about["uri"]) == ("tiny", "1", URI)


def test_a_file_may_say_what_is_served(registry: Registry, tmp_path: Path) -> None:
    registry.add(label="two")
    file = tmp_path / "target.json"
    file.write_text(json.dumps({"uri": "models:/tiny/1"}))
    model = ServedModel("tiny", source(f"@{file}"))
    model.open()
    first = model.current
    model.poll()
    assert model.current is first
    file.write_text(json.dumps({"uri": "models:/tiny/1", "model_config": {"max_batch_rows": 4}}))
    model.poll()
    assert model.current and model.current.pyfunc.options.max_batch_rows == 4
    file.write_text(json.dumps({"uri": "models:/tiny/2"}))
    model.poll()
    assert model.current.label == "2"
    file.write_text("{")
    model.poll()
    assert model.current.label == "2"
    assert model.registry_down_since


def test_a_batch_of_a_replaced_version_still_counts_as_running(
    registry: Registry, tmp_path: Path
) -> None:
    registry.promote(registry.add(predict_s=0.002, slow_s=1.5))
    model = ServedModel("tiny", source(URI))
    model.open()
    with running(Application({"tiny": model}, hang_s=0.2)) as url, ThreadPoolExecutor(1) as pool:
        first = model.current
        assert first is not None
        slow = pool.submit(ask, url, text="slow")
        until(lambda: model.running_s)
        registry.promote("1")
        model.poll()
        assert model.current is not first
        del first
        until(lambda: requests.get(f"{url}/livez", timeout=10).status_code == 503)
        assert slow.result().status_code == 200
        assert model.running_s == 0
        assert requests.get(f"{url}/livez", timeout=10).status_code == 200
