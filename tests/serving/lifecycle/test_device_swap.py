"""Swaps on a device that has no memory for two versions: real server, tiny models, tiny device."""

from __future__ import annotations

import gc
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests
from mlflow import MlflowClient
from tiny.server import running, until
from tiny.serving import DEVICE, save_tiny

from mlflow_pt_deploy.errors import DeviceMemoryError
from mlflow_pt_deploy.registry.addresses import ModelSpec, resolve
from mlflow_pt_deploy.registry.refusal import REFUSED_TAG
from mlflow_pt_deploy.serving.app import Application
from mlflow_pt_deploy.serving.lifecycle import device_swap, served_model
from mlflow_pt_deploy.serving.lifecycle.eviction import MemoryBudget
from mlflow_pt_deploy.serving.lifecycle.model_cache import ModelCache
from mlflow_pt_deploy.serving.lifecycle.served_model import ServedModel
from mlflow_pt_deploy.serving.model.pyfunc import PtDeployPyFunc


@pytest.fixture(autouse=True)
def units(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The device has 4 units, and waiting for it is short."""
    monkeypatch.setattr(DEVICE, "units", 4)
    monkeypatch.setattr(device_swap, "_PAUSE_S", 0.1)
    monkeypatch.setattr(device_swap, "LOAD_S", 0.05)
    device_swap.free_memory()
    assert DEVICE.used == 0
    yield


class Versions:
    """Versions of a registered model, and the one that is wanted."""

    def __init__(self, folder: Path) -> None:
        self.client = MlflowClient()
        self.client.create_registered_model("tiny")
        self._folder = folder
        self.wanted = 1

    def add(self, **habits: Any) -> None:
        number = len(list(self._folder.glob("tiny-*"))) + 1
        folder = save_tiny(self._folder / f"tiny-{number}", label=f"v{number}", **habits)
        self.client.create_model_version("tiny", str(folder))

    def tag(self, number: int) -> str | None:
        """Why a server refused a version."""
        found = self.client.get_model_version("tiny", str(number)).tags.get(REFUSED_TAG)
        return found and str(found)

    def model(self, **more: Any) -> ServedModel:
        return ServedModel("tiny", lambda: ModelSpec(f"models:/tiny/{self.wanted}"), **more)

    def opened(self, **more: Any) -> ServedModel:
        model = self.model(**more)
        model.open()
        return model


@pytest.fixture
def versions(tracking: str, tmp_path: Path) -> Versions:
    versions = Versions(tmp_path)
    versions.add(memory=3, predict_s=0.002, slow_s=0.4)
    return versions


def label(model: ServedModel) -> str | None:
    return model.current.label if model.current else None


def ask(url: str, text: str = "red", session: Any = requests) -> requests.Response:
    return session.post(f"{url}/invocations", json={"inputs": [text]}, timeout=10)


def test_a_swap_under_load_answers_each_request_once(versions: Versions) -> None:
    versions.add(memory=3, load_s=0.1)
    model = versions.opened()
    stop, statuses = threading.Event(), Counter[int]()
    words = {"1": "v1", "2": "v2"}

    def client(number: int) -> None:
        with requests.Session() as session:
            while not stop.is_set():
                answer = ask(url, session=session)
                statuses[answer.status_code] += 1
                if answer.status_code == 200:
                    version = answer.headers["X-Model-Version"]
                    assert answer.json()["predictions"][0]["label"] == words[version]
                    continue
                assert answer.status_code == 503, answer.text
                assert answer.headers["Retry-After"] == "1"
                time.sleep(0.01)

    with running(Application({"tiny": model})) as url, ThreadPoolExecutor(5) as pool:
        clients = [pool.submit(client, number) for number in range(4)]
        slow = pool.submit(ask, url, "slow red")
        until(lambda: model.running_s > 0.1)
        versions.wanted = 2
        poll = threading.Thread(target=model.poll)
        poll.start()
        until(lambda: model.ended)
        early = ask(url)
        assert "the device has no memory for two" in early.json()["message"]
        assert requests.get(f"{url}/readyz", timeout=5).status_code == 503
        assert model.status()["version"] == "1"
        poll.join(20)
        until(lambda: ask(url).headers.get("X-Model-Version") == "2")
        stop.set()
        for each in clients:
            each.result()
        assert slow.result().headers["X-Model-Version"] == "1"
        assert requests.get(f"{url}/readyz", timeout=5).status_code == 200
    assert set(statuses) == {200, 503}
    assert model.ended is None and model.rejected is None
    assert DEVICE.used == 3


def test_two_versions_that_fit_are_both_in_memory(versions: Versions) -> None:
    versions.add(memory=1)
    model = versions.opened()
    first = model.current
    versions.wanted = 2
    model.poll()
    assert (label(model), DEVICE.used) == ("2", 4)
    assert first is not None


def test_a_version_that_never_fits_is_rejected_and_the_old_one_serves_on(
    versions: Versions, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions.add(memory=5)
    model = versions.opened()
    first = model.loaded_at
    versions.wanted = 2
    model.poll()
    assert label(model) == "1"
    assert model.loaded_at > first, "it was loaded again"
    assert model.rejected and model.rejected.alone
    assert (versions.tag(2) or "").startswith("5 units do not fit the tiny device")
    assert "version 2 was rejected, version 1 stays" in caplog.text
    again = model.current
    now = time.monotonic() + 61
    monkeypatch.setattr(time, "monotonic", lambda: now)
    model.poll()
    assert model.current is again, "the current version ends once for it"
    assert model.rejected.retry_s == 2 * served_model.RETRY_S
    versions.wanted = 1
    model.poll()
    assert model.rejected is None


@pytest.mark.parametrize("habits", [{"memory": 3, "refuse": "no"}, {"memory": 5}])
def test_whatever_fails_the_old_version_comes_back(
    versions: Versions, habits: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Also if its own load fails at first: then at the next poll."""
    versions.add(**habits)
    model = versions.opened()
    versions.wanted = 2
    model._end(resolve("models:/tiny/1"))  # a version that fails for another reason only now
    DEVICE.units = 2
    model.poll()
    assert label(model) is None and model.rejected and model.ended
    polls = caplog.text.count("cannot be loaded again")
    model.poll()
    assert caplog.text.count("version 1, which ended, cannot be loaded again") == polls + 1
    DEVICE.units = 4
    model.poll()
    assert label(model) == "1" and model.ended is None
    assert model.rejected.version.version == "2"


def test_requests_that_do_not_end_keep_their_version(versions: Versions) -> None:
    versions.add(memory=3)
    model = versions.opened(grace_s=0.05)
    held = model.current
    versions.wanted = 2
    model.poll()
    assert model.current is held
    assert model.rejected and "version 1 did not end within 0.05 s" in model.rejected.reason
    assert model.rejected.alone and model.ended is None


def test_memory_that_others_hold_for_a_moment_is_waited_for(
    versions: Versions, monkeypatch: pytest.MonkeyPatch
) -> None:
    versions.add(memory=4)
    monkeypatch.setattr(device_swap, "LOAD_S", 20)
    model = versions.opened()
    DEVICE.used += 1
    release = threading.Timer(0.2, DEVICE.free, (1,))
    release.start()
    versions.wanted = 2
    model.poll()
    release.join()
    assert label(model) == "2"


def test_workers_that_share_a_device_all_swap(
    versions: Versions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One loads into the memory that another one freed: that one waits for the other's."""
    versions.add(memory=3, load_s=0.05)
    monkeypatch.setattr(DEVICE, "units", 6)
    monkeypatch.setattr(device_swap, "LOAD_S", 20)
    workers = [versions.opened(), versions.opened()]
    versions.wanted = 2
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(ServedModel.poll, workers))
    assert [label(each) for each in workers] == ["2", "2"]
    assert all(each.rejected is None for each in workers)
    assert DEVICE.used == 6


def test_a_model_on_the_cpu_does_not_end_for_one_on_a_device(versions: Versions) -> None:
    versions.add()
    model = versions.model()
    versions.wanted = 2
    model.open()
    first = model.current
    versions.add(memory=5)
    versions.wanted = 3
    model.poll()
    assert model.current is first
    assert model.rejected and not model.rejected.alone


def test_the_first_version_must_fit(versions: Versions) -> None:
    DEVICE.units = 2
    with pytest.raises(DeviceMemoryError, match="3 units do not fit"):
        versions.opened()


def test_an_eviction_meanwhile_finds_nothing_to_unload(versions: Versions) -> None:
    model = versions.opened()
    cache = ModelCache([model], MemoryBudget(max_models=1))
    model._end(resolve("models:/tiny/1"))
    assert model.unload("max_models is 1")() is None
    assert model.unloaded is None
    assert not cache.reconcile()


def test_a_version_is_freed_without_a_garbage_collection(versions: Versions) -> None:
    gc.disable()
    try:
        model = versions.opened()
        assert model.current and DEVICE.used == 3
        batcher = model.current.pyfunc.service.batcher
        model.current = None
        assert batcher.submit([[2]]).shape == (1, 3), "a late caller is answered"
        del batcher
        assert DEVICE.used == 0
    finally:
        gc.enable()


def test_no_memory_for_the_warm_up_ends_the_current_version_too(
    versions: Versions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where graphs are captured, PyTorch's own error comes from the warm-up."""
    warm_up = PtDeployPyFunc.warm_up

    def capture(self: PtDeployPyFunc) -> None:
        if DEVICE.used > 3:
            raise RuntimeError("CUDA error: out of memory")
        warm_up(self)

    versions.add(memory=1)
    model = versions.opened()
    monkeypatch.setattr(PtDeployPyFunc, "warm_up", capture)
    versions.wanted = 2
    model.poll()
    assert (label(model), DEVICE.used) == ("2", 1)
