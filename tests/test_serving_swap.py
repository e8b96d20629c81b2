"""Promotion without restart: a real registry, a real server, versions that are slow or unfit."""

import json
import logging
import platform
import threading
import time
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from tiny_serving import running, save_tiny, until

from mlflow_pt_deploy.errors import ArtifactError, ServingError, TrackingError
from mlflow_pt_deploy.registry.addresses import (
    DIGEST_TAG,
    Address,
    Served,
    Target,
    resolve,
    source,
)
from mlflow_pt_deploy.serving.api import serve
from mlflow_pt_deploy.serving.app import App
from mlflow_pt_deploy.serving.lifecycle.registry_watcher import Watcher
from mlflow_pt_deploy.serving.lifecycle.served_model import RETRY_S, Slot
from mlflow_pt_deploy.serving.model.loaded_model import Version, load_version
from mlflow_pt_deploy.serving.server import name_slots

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
def following(slots: Sequence[Slot]) -> Iterator[str]:
    """The application on a free port, and the watcher that opens and follows its slots."""
    watcher = Watcher(slots, POLL_S, opened=lambda: None, failed=lambda error: None)
    with running(App({slot.name: slot for slot in slots})) as url:
        watcher.start()
        try:
            yield url
        finally:
            watcher.stop()
            watcher.join(10)


def ask(url: str, session: Any = requests) -> requests.Response:
    return session.post(f"{url}/invocations", json={"inputs": ["red"]}, timeout=10)


def version(url: str) -> str:
    return ask(url).headers.get("X-Model-Version", "")


def test_ready_only_when_loaded_and_warm(registry: Registry) -> None:
    registry.promote(registry.add(label="slow", load_s=0.5))
    with following([Slot("tiny", source(URI))]) as url:
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
    slot = Slot("tiny", source(URI))
    stop = threading.Event()

    def client(_: int) -> set[str]:
        seen = set()
        with requests.Session() as session:
            while not stop.is_set():
                answer = ask(url, session)
                assert answer.status_code == 200, answer.text
                told = answer.headers["X-Model-Version"]
                assert answer.json()["predictions"][0]["label"] == words[told]
                seen.add(told)
        return seen

    with following([slot]) as url, ThreadPoolExecutor(8) as pool:
        until(lambda: slot.current)
        clients = [pool.submit(client, number) for number in range(8)]
        try:
            for target in ("2", "1", "2", "1", "2"):
                registry.promote(target)
                until(lambda target=target: slot.current.label == target)  # type: ignore[misc]
                time.sleep(0.05)
        finally:
            stop.set()
        assert all(future.result() == {"1", "2"} for future in clients)


def test_requests_in_flight_end_on_the_old_version_which_is_then_freed(
    registry: Registry,
) -> None:
    registry.promote(registry.add(label="slow", predict_s=0.4))
    slot = Slot("tiny", source(URI))
    with following([slot]) as url, ThreadPoolExecutor(1) as pool:
        until(lambda: slot.current)
        old = weakref.ref(slot.current)
        in_flight = pool.submit(ask, url)
        time.sleep(0.1)
        registry.promote("1")
        until(lambda: slot.current.label == "1")
        assert version(url) == "1"
        answer = in_flight.result()
        assert answer.headers["X-Model-Version"] == "2"
        assert answer.json()["predictions"][0]["label"] == "slow"
        until(lambda: old() is None)


def test_an_unfit_version_is_refused_and_not_tried_again_at_once(
    registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    tried: list[str | None] = []

    def load(address: Address, target: Target) -> Version:
        tried.append(address.version)
        return load_version(address, target)

    slot = Slot("tiny", source(URI), load=load)
    with following([slot]) as url:
        until(lambda: slot.current)
        registry.promote(registry.add(refuse="it answers differently here"))
        until(lambda: slot.refused)
        time.sleep(10 * POLL_S)
        assert tried == ["1", "2"]
        assert version(url) == "1"
        refused = requests.get(f"{url}/model", timeout=5).json()["refused"]
        assert refused["reason"] == "it answers differently here"
        assert (refused["version"], refused["uri"]) == ("2", URI)
        assert 0 < refused["tried_again_in_s"] <= RETRY_S
        assert "version 2 is refused, version 1 stays" in caplog.text
        registry.promote(registry.add(label="three"))
        until(lambda: slot.current.label == "3")
        assert requests.get(f"{url}/model", timeout=5).json()["refused"] is None


def test_other_library_versions_are_told_in_the_log(
    registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    Slot("tiny", source(URI)).open()
    assert f"exported with python 2.7 (here {platform.python_version()})" in caplog.text


def test_who_starts_again_opens_what_served_before_and_then_looks(registry: Registry) -> None:
    before = Served(Target(URI), resolve(URI))
    registry.promote(registry.add(refuse="it answers differently here"))
    slot = Slot("tiny", source(URI), before=before)
    slot.open()
    assert slot.current and slot.current.label == "1"
    slot.look()
    assert slot.current.label == "1"
    assert slot.refused and slot.refused.address.version == "2"
    registry.client.delete_registered_model_alias("tiny", "champion")
    Slot("tiny", source(URI), before=before).open()
    with pytest.raises(MlflowException, match="alias champion not found"):
        Slot("tiny", source(URI)).open()


def test_where_what_served_before_is_gone_the_alias_counts(registry: Registry) -> None:
    before = Served(Target(URI), resolve(URI))
    registry.promote(registry.add(label="two"))
    unfit = registry.add(refuse="it answers differently here")
    registry.client.delete_model_version("tiny", "1")
    slot = Slot("tiny", source(URI), before=before)
    slot.open()
    assert slot.current and slot.current.label == "2"
    assert slot.refused is None
    registry.promote(unfit)
    with pytest.raises(ArtifactError, match="it answers differently here"):
        Slot("tiny", source(URI), before=before).open()


def test_going_back_forgets_the_refusal(registry: Registry) -> None:
    slot = Slot("tiny", source(URI))
    slot.open()
    registry.promote(registry.add(refuse="no"))
    slot.look()
    assert slot.refused and slot.refused.pause_s == RETRY_S
    registry.promote("1")
    slot.look()
    assert slot.refused is None


def test_a_refused_version_is_tried_again_later_and_ever_later(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    slot = Slot("tiny", source(URI))
    slot.open()
    registry.promote(registry.add(refuse="no"))
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    pauses = []
    for _ in range(9):
        slot.look()
        assert slot.refused
        pauses.append(slot.refused.pause_s)
        now += slot.refused.pause_s
    assert pauses == [60, 120, 240, 480, 960, 1920, 3600, 3600, 3600]


def test_a_registry_that_is_lost_takes_nothing_down_and_is_told_once(
    registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    lost = threading.Event()

    def find(uri: str) -> Address:
        if lost.is_set():
            raise MlflowException("http://user:secret@registry does not answer")
        return resolve(uri)

    caplog.set_level(logging.INFO, "mlflow_pt_deploy")
    slot = Slot("tiny", source(URI), find=find)
    with following([slot]) as url:
        until(lambda: slot.current)
        lost.set()
        until(lambda: slot.lost)
        time.sleep(5 * POLL_S)
        assert version(url) == "1"
        assert requests.get(f"{url}/readyz", timeout=5).status_code == 200
        assert requests.get(f"{url}/model", timeout=5).json()["registry_lost_since"]
        assert caplog.text.count("cannot find out what to serve") == 1
        assert "secret" not in caplog.text
        registry.promote(registry.add(label="two"))
        lost.clear()
        until(lambda: slot.current.label == "2")
        assert "the registry answers again" in caplog.text
        assert requests.get(f"{url}/model", timeout=5).json()["registry_lost_since"] is None


def test_an_alias_that_is_deleted_changes_nothing(registry: Registry) -> None:
    slot = Slot("tiny", source(URI))
    slot.open()
    registry.client.delete_registered_model_alias("tiny", "champion")
    slot.look()
    assert slot.current and slot.current.label == "1"
    assert slot.lost


def test_latest_and_stages_are_followed_too(registry: Registry) -> None:
    slot = Slot("tiny", source("models:/tiny/latest"))
    slot.open()
    registry.add(label="two")
    slot.look()
    assert slot.current and slot.current.label == "2"
    assert resolve("models:/tiny/1") == Address("models:/tiny/1", "tiny", "1")


def test_a_digest_that_the_registry_does_not_hold_is_refused(registry: Registry) -> None:
    registry.client.set_model_version_tag("tiny", "1", DIGEST_TAG, "f" * 64)
    with pytest.raises(ArtifactError, match="is not what was promoted"):
        Slot("tiny", source(URI)).open()


def test_nothing_stays_on_disk_after_a_version(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    slot = Slot("tiny", source(URI))
    slot.open()
    assert len(list(folder.iterdir())) == 1
    registry.promote(registry.add(refuse="no"))
    slot.look()
    assert len(list(folder.iterdir())) == 1
    slot.current = None
    assert list(folder.iterdir()) == []


def test_model_tells_what_was_logged_beside_what_is_observed(registry: Registry) -> None:
    registry.client.set_model_version_tag("tiny", "1", "latency_p50_ms", "0.5")
    slot = Slot("tiny", source(URI))
    with following([slot]) as url:
        until(lambda: slot.current)
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
    slot = Slot("tiny", source(f"@{file}"))
    slot.open()
    first = slot.current
    slot.look()
    assert slot.current is first
    file.write_text(json.dumps({"uri": "models:/tiny/1", "model_config": {"max_batch_rows": 4}}))
    slot.look()
    assert slot.current and slot.current.pyfunc.options.max_batch_rows == 4
    file.write_text(json.dumps({"uri": "models:/tiny/2"}))
    slot.look()
    assert slot.current.label == "2"
    file.write_text("{")
    slot.look()
    assert slot.current.label == "2"
    assert slot.lost


def test_names_of_models() -> None:
    words = ["models:/a@champion", "b=models:/a/3", "models:/c/latest", "some/folder/", "@x.json"]
    assert list(name_slots(words, None)) == ["a", "b", "c", "folder", "x.json"]
    with pytest.raises(ServingError, match="two models are called a"):
        name_slots(["models:/a@x", "models:/a@y"], None)
    with pytest.raises(ServingError, match="model_config has no threads"):
        name_slots(["models:/a@x"], {"threads": 2})
    with pytest.raises(ServingError, match="nothing to serve"):
        name_slots([], None)


def test_a_first_model_that_may_not_serve_ends_the_server(registry: Registry) -> None:
    registry.promote(registry.add(refuse="it answers differently here"))
    with pytest.raises(ArtifactError, match="it answers differently here"):
        serve(URI, port=0)
    with pytest.raises(TrackingError, match="cannot be fetched.*alias nobody.*not found"):
        serve("models:/tiny@nobody", port=0)
