"""A start while the registry is down: the last good version is served from a local copy."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from tiny.server import free_port, running, until
from tiny.serving import save_tiny

from mlflow_pt_deploy.errors import ArtifactError
from mlflow_pt_deploy.registry.addresses import (
    ModelSpec,
    ResolvedVersion,
    ServedVersion,
    resolve,
    source,
)
from mlflow_pt_deploy.registry.mlmodel import MANIFEST
from mlflow_pt_deploy.registry.served_copy import ServedCopies
from mlflow_pt_deploy.serving.app import Application
from mlflow_pt_deploy.serving.lifecycle import served_model
from mlflow_pt_deploy.serving.lifecycle.registry_watcher import RegistryWatcher
from mlflow_pt_deploy.serving.lifecycle.served_model import ServedModel
from mlflow_pt_deploy.serving.observability.prometheus import PrometheusMetrics
from mlflow_pt_deploy.system.paths import home

URI = "models:/tiny@champion"


class Outage:
    """A registry, and what makes it answer or not."""

    def __init__(self, folder: Path) -> None:
        self.client = MlflowClient()
        self.client.create_registered_model("tiny")
        self.folder = folder
        self.lost: Callable[[], object] | None = None
        self.copies = ServedCopies(lambda: "registry")

    def promote(self, **habits: Any) -> str:
        number = len(list(self.folder.glob("tiny-*"))) + 1
        folder = save_tiny(self.folder / f"tiny-{number}", **habits)
        version = str(self.client.create_model_version("tiny", str(folder)).version)
        self.client.set_registered_model_alias("tiny", "champion", version)
        return version

    def find(self, uri: str) -> ResolvedVersion:
        if self.lost:
            self.lost()
        return resolve(uri)

    def model(self, **more: Any) -> ServedModel:
        return ServedModel("tiny", source(URI), find=self.find, copies=self.copies, **more)

    def served(self, **more: Any) -> ServedModel:
        """A model that serves, and whose copy is kept."""
        model = self.model(**more)
        model.open()
        model.keep_copy()
        return model


def refuse_connections() -> None:
    """What MLflow raises if nothing listens."""
    url = f"http://127.0.0.1:{free_port()}"
    MlflowClient(url, url).get_model_version_by_alias("tiny", "champion")


def deny() -> None:
    raise MlflowException("PERMISSION_DENIED: no")


@pytest.fixture
def registry(tracking: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Outage:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    registry = Outage(tmp_path)
    registry.promote(label="one")
    return registry


def test_the_copy_serves_until_the_registry_answers(
    registry: Outage, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mlflow_pt_deploy")
    registry.served()
    registry.lost = refuse_connections
    metrics = PrometheusMetrics()
    model = registry.model(metrics=metrics)
    model.open()
    assert model.current and model.current.label == "1"
    assert "version 1 is served from the copy of 20" in caplog.text
    status = model.status()
    assert status["registry_lost_since"]
    assert "Connection refused" in status["registry_error"]
    assert status["served_from_copy"].startswith("20")
    assert b'registry_up{model="tiny"} 0.0' in metrics.expose()
    model.poll()
    assert model.current.label == "1"
    registry.promote(label="two")
    registry.lost = None
    model.poll()
    assert model.current.label == "2"
    assert "the registry answers again" in caplog.text
    status = model.status()
    assert (status["registry_lost_since"], status["served_from_copy"]) == (None, None)
    assert b'registry_up{model="tiny"} 1.0' in metrics.expose()


def test_a_copy_is_answered_from(registry: Outage) -> None:
    registry.served()
    registry.lost = refuse_connections
    model = registry.model()
    model.open()
    with running(Application({"tiny": model})) as url:
        answer = requests.post(f"{url}/invocations", json={"inputs": ["red"]}, timeout=10)
        assert answer.json()["predictions"][0]["label"] == "one"
        assert answer.headers["X-Model-Version"] == "1"


def test_a_registry_that_hangs_is_waited_for_a_few_seconds(
    registry: Outage, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.served()
    monkeypatch.setattr(served_model, "DECIDE_S", 0.1)
    released = threading.Event()
    registry.lost = lambda: released.wait(60)
    model, start = registry.model(), time.monotonic()
    model.open()
    assert time.monotonic() - start < 30
    assert model.current and model.current.copied_at
    assert model.registry_error == "TimeoutError: the registry did not answer within 0.1 s"
    released.set()


def test_an_answer_is_not_replaced_by_the_copy(registry: Outage) -> None:
    registry.served()
    registry.lost = deny
    with pytest.raises(MlflowException, match="PERMISSION_DENIED"):
        registry.model().open()
    registry.lost = None
    registry.client.delete_registered_model_alias("tiny", "champion")
    with pytest.raises(MlflowException, match="alias champion not found"):
        registry.model().open()
    registry.promote(refuse="it answers differently here")
    with pytest.raises(ArtifactError, match="it answers differently here"):
        registry.model().open()


@pytest.mark.parametrize("keeps", [True, False])
def test_without_a_copy_the_error_is_the_registrys(registry: Outage, keeps: bool) -> None:
    if not keeps:
        registry.served()
        registry.copies = None  # type: ignore[assignment]
    registry.lost = refuse_connections
    with pytest.raises(MlflowException, match="Connection refused"):
        registry.model().open()


def test_a_damaged_copy_is_refused_with_the_registrys_error_and_made_again(
    registry: Outage, caplog: pytest.LogCaptureFixture
) -> None:
    registry.served()
    (manifest,) = (home() / "served").glob(f"*/*/{MANIFEST}")
    manifest.unlink()
    manifest.write_text("{} ")
    registry.lost = refuse_connections
    with pytest.raises(MlflowException, match="Connection refused"):
        registry.model().open()
    assert "tiny: the local copy cannot serve: the model differs from" in caplog.text
    registry.lost = None
    registry.served()
    registry.lost = refuse_connections
    registry.model().open()


def test_a_damaged_note_does_not_keep_a_server_from_starting(
    registry: Outage, caplog: pytest.LogCaptureFixture
) -> None:
    registry.served()
    (note,) = (home() / "served").glob("*/copy.json")
    note.write_text("{")
    model = registry.served()
    assert model.current and not model.current.copied_at
    assert "tiny: the local copy cannot be used: copy.json is not readable JSON" in caplog.text


def test_a_copy_that_cannot_be_written_is_logged_once(
    registry: Outage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PT_DEPLOY_HOME", str(tmp_path / "file"))
    model = registry.served()
    model.keep_copy()
    assert caplog.text.count("version 1 is not copied, so a start without the registry") == 1


def test_a_worker_that_restarts_in_an_outage_serves_the_copy_at_once(registry: Outage) -> None:
    registry.served()
    before = ServedVersion(ModelSpec(URI), resolve(URI))
    registry.lost = refuse_connections
    model = registry.model(last_served=before)
    model.open()
    assert model.current and model.current.label == "1" and model.current.copied_at


def test_an_evicted_model_comes_back_from_the_copy(registry: Outage) -> None:
    model = registry.served()
    model.unload("max_models is 1")
    registry.lost = refuse_connections
    model.reload()
    assert model.current and model.current.label == "1" and model.current.copied_at
    other = registry.model()
    other.register_unloaded("max_models is 1")
    assert other.status()["version"] == "1"
    assert other.registry_down_since
    other.reload()
    assert other.current and other.current.label == "1"


def test_the_watcher_copies_what_it_opens_and_what_it_swaps_to(registry: Outage) -> None:
    model = registry.model()
    watcher = RegistryWatcher([model], 0.05, on_opened=lambda: None, on_failed=lambda error: None)
    watcher.start()

    def kept() -> str | None:
        copy = registry.copies.find(URI)
        return copy.version.version if copy else None

    try:
        until(lambda: kept() == "1")
        registry.promote(refuse="no")
        until(lambda: model.rejected)
        assert kept() == "1"
        registry.promote(label="three")
        until(lambda: kept() == "3")
    finally:
        watcher.stop()
        watcher.join(10)


def test_the_options_of_the_operator_are_those_of_now(registry: Outage) -> None:
    registry.served()
    registry.lost = refuse_connections
    provider = source(URI, {"max_batch_rows": 4})
    model = ServedModel("tiny", provider, find=registry.find, copies=registry.copies)
    model.open()
    assert model.current and model.current.pyfunc.options.max_batch_rows == 4


def test_a_folder_is_not_copied(registry: Outage, tmp_path: Path) -> None:
    folder = str(save_tiny(tmp_path / "folder"))
    model = ServedModel("tiny", source(folder), copies=registry.copies)
    model.open()
    model.keep_copy()
    assert not (home() / "served").exists()
