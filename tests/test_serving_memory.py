"""Models that come and go because memory is limited: real versions, a real server and watcher."""

import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from tiny_serving import running, save_tiny, until

from mlflow_pt_deploy.errors import ServingError
from mlflow_pt_deploy.registry.addresses import source
from mlflow_pt_deploy.serving.app import App
from mlflow_pt_deploy.serving.lifecycle import eviction as rooms
from mlflow_pt_deploy.serving.lifecycle.eviction import Room
from mlflow_pt_deploy.serving.lifecycle.model_cache import Keeper
from mlflow_pt_deploy.serving.lifecycle.process_memory import resident_mb, trim
from mlflow_pt_deploy.serving.lifecycle.registry_watcher import Watcher
from mlflow_pt_deploy.serving.lifecycle.served_model import Slot
from mlflow_pt_deploy.serving.observability.metrics import best_metrics
from mlflow_pt_deploy.serving.server import Settings, describe


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever was just loaded may go too."""
    monkeypatch.setattr(rooms, "STAY_S", 0.0)


def slots_of(folder: Path, *names: str, metrics: Any = None, **habits: Any) -> list[Slot]:
    """A slot each, whose label for red is its name."""
    return [
        Slot(name, source(str(save_tiny(folder / name, label=name, **habits))), metrics=metrics)
        for name in names
    ]


@contextmanager
def serving(slots: Sequence[Slot], room: Room, poll_s: float = 0, **app: Any) -> Iterator[str]:
    failures: list[Exception] = []
    watcher = Watcher(slots, poll_s, room=room, opened=lambda: None, failed=failures.append)
    with running(App({slot.name: slot for slot in slots}, **app)) as url:
        watcher.start()
        try:
            until(lambda: failures or requests.get(f"{url}/readyz", timeout=5).ok)
            assert not failures
            yield url
        finally:
            watcher.stop()
            watcher.join(10)


def ask(url: str, name: str) -> requests.Response:
    return requests.post(f"{url}/models/{name}/invocations", json={"inputs": ["red"]}, timeout=10)


def label(url: str, name: str) -> str:
    """The label that a model gives once it answers."""
    until(lambda: ask(url, name).status_code == 200)
    return str(ask(url, name).json()["predictions"][0]["label"])


def test_the_least_recently_used_goes_and_comes_back(tmp_path: Path, at_once: None) -> None:
    slots = a, b, c = slots_of(tmp_path, "a", "b", "c")
    with serving(slots, Room(max_models=2)) as url:
        assert a.current and b.current and not c.current
        assert label(url, "a") == "a"  # so b is the one that was used longest ago
        early = ask(url, "c")
        assert (early.status_code, early.headers["Retry-After"]) == (503, "1")
        assert early.json()["error_code"] == "TEMPORARILY_UNAVAILABLE"
        assert "not in memory and is being loaded" in early.json()["message"]
        assert label(url, "c") == "c"
        assert a.current and c.current and not b.current
        assert requests.get(f"{url}/readyz", timeout=5).status_code == 200
        told = requests.get(f"{url}/models/b", timeout=5).json()
        assert told["unloaded"]["reason"] == "max_models is 2"
        assert told["unloaded"]["since"] and told["uri"].endswith("/b")
        assert label(url, "b") == "b"
        assert requests.get(f"{url}/models/b", timeout=5).json()["unloaded"] is None
        assert not a.current  # the first is like all others


def test_who_was_just_loaded_stays_a_while_though_another_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rooms, "STAY_S", 0.5)
    slots = a, b = slots_of(tmp_path, "a", "b")
    keeper = Keeper(slots, Room(max_models=1))
    keeper.open()
    for first, second in ((a, b), (b, a)):
        second.ask()
        until(lambda: not keeper.attend())
        assert loaded(slots) == [slot is second for slot in slots]
        assert second.loaded - first.loaded >= 0.5


def test_memory_above_its_limit_unloads_all_but_one(tmp_path: Path, at_once: None) -> None:
    slots = a, b, _ = slots_of(tmp_path, "a", "b", "c")
    used = 100.0
    keeper = Keeper(slots, Room(max_memory_mb=350), lambda: used * sum(map(bool, loaded(slots))))
    keeper.open()
    assert loaded(slots) == [True, True, True]
    b.ask()
    used = 200.0
    assert keeper.attend()  # one goes, then it looks again
    assert loaded(slots) == [False, True, True]
    assert a.unloaded and "600 MB were resident" in a.unloaded.reason
    while keeper.attend():
        pass
    assert loaded(slots) == [False, True, False]
    used = 9000.0
    assert not keeper.attend()
    assert b.current


def loaded(slots: Sequence[Slot]) -> list[bool]:
    return [slot.current is not None for slot in slots]


def test_memory_is_read_only_where_it_has_a_limit(tmp_path: Path) -> None:
    reads: list[float] = []

    def resident() -> float:
        reads.append(100.0)
        return reads[-1]

    slots = slots_of(tmp_path, "a", "b")
    for room in (Room(), Room(max_models=2)):
        keeper = Keeper(slots, room, resident)
        keeper.open()
        assert not keeper.attend()
    assert reads == []
    assert not Keeper(slots, Room(max_memory_mb=150), resident).attend()
    assert reads == [100.0]


def test_at_the_start_the_first_ones_stay(tmp_path: Path) -> None:
    slots = slots_of(tmp_path, "a", "b", "c")
    keeper = Keeper(slots, Room(max_memory_mb=150), lambda: 100.0 * sum(map(bool, loaded(slots))))
    keeper.open()
    assert loaded(slots) == [True, False, False]
    assert slots[2].unloaded and "200 MB were resident" in slots[2].unloaded.reason


def test_a_model_that_is_not_loaded_must_be_there(tmp_path: Path) -> None:
    slots = [*slots_of(tmp_path, "a"), Slot("b", source(str(tmp_path / "nowhere")))]
    with pytest.raises(MlflowException, match="nowhere"):
        Keeper(slots, Room(max_models=1)).open()


def test_requests_in_flight_end_on_what_is_unloaded(tmp_path: Path) -> None:
    (slot,) = slots_of(tmp_path, "slow", predict_s=0.4)
    with serving([slot], Room()) as url, ThreadPoolExecutor(1) as pool:
        version = weakref.ref(slot.current)
        in_flight = pool.submit(ask, url, "slow")
        until(lambda: requests.get(f"{url}/livez", timeout=5).ok and slot.used > slot.loaded)
        gone = slot.unload("for the test")
        assert gone() is version() is not None
        assert in_flight.result().json()["predictions"][0]["label"] == "slow"
        until(lambda: gone() is None)


def test_memory_of_what_still_answers_is_no_reason_to_unload_more(
    tmp_path: Path, at_once: None
) -> None:
    slots = a, *_ = slots_of(tmp_path, "a", "b", "c")
    keeper = Keeper(slots, Room(max_memory_mb=1), lambda: 9000.0)
    for slot in slots:
        slot.open()
    busy = a.current
    assert keeper.attend()
    assert loaded(slots) == [False, True, True]
    assert keeper.attend()
    assert loaded(slots) == [False, True, True]
    del busy
    assert keeper.attend()
    assert loaded(slots) == [False, False, True]


def test_an_unloaded_model_follows_the_registry_by_its_address(
    tracking: str, tmp_path: Path, at_once: None
) -> None:
    client = MlflowClient()
    client.create_registered_model("tiny")
    for number in ("one", "two", "bad"):
        habits = {"refuse": "it is damaged"} if number == "bad" else {"label": number}
        client.create_model_version("tiny", str(save_tiny(tmp_path / number, **habits)))
    client.set_registered_model_alias("tiny", "champion", "1")
    tiny = Slot("tiny", source("models:/tiny@champion"))
    slots = [*slots_of(tmp_path, "other"), tiny]
    with serving(slots, Room(max_models=1), poll_s=0.05) as url:
        about = f"{url}/models/tiny"
        assert requests.get(about, timeout=5).json()["version"] == "1"
        client.set_registered_model_alias("tiny", "champion", "3")
        until(lambda: requests.get(about, timeout=5).json()["version"] == "3")
        assert tiny.current is None and tiny.refused is None
        until(lambda: "may not be loaded" in ask(url, "tiny").text)
        refused = ask(url, "tiny")
        assert (refused.status_code, refused.headers["Retry-After"] > "1") == (503, True)
        assert requests.get(about, timeout=5).json()["refused"]["reason"] == "it is damaged"
        client.set_registered_model_alias("tiny", "champion", "2")
        assert label(url, "tiny") == "two"


def test_metrics_count_what_is_loaded_and_what_went(tmp_path: Path, at_once: None) -> None:
    pytest.importorskip("prometheus_client")
    metrics = best_metrics()
    slots = slots_of(tmp_path, "a", "b", metrics=metrics)
    with serving(slots, Room(max_models=1), metrics=metrics) as url:
        assert label(url, "b") == "b"
        lines = requests.get(f"{url}/metrics", timeout=5).text.splitlines()
    assert 'pt_deploy_loaded{model="a"} 0.0' in lines
    assert 'pt_deploy_loaded{model="b"} 1.0' in lines
    assert 'pt_deploy_unloads_total{model="a"} 1.0' in lines
    assert not [line for line in lines if "model_info" in line and 'model="a"' in line]


def test_the_first_words_tell_what_is_not_loaded(tmp_path: Path) -> None:
    slots = slots_of(tmp_path, "a", "b")
    Keeper(slots, Room(max_models=1)).open()
    line = describe(slots[1], 0)
    assert line.startswith("/models/b: ")
    assert line.endswith("loaded when asked for (max_models is 1)")
    with pytest.raises(ServingError, match="max_models is -1; give 0"):
        Settings(max_models=-1)


def test_resident_memory_is_what_this_process_holds() -> None:
    before = resident_mb()
    held = np.ones(100_000_000, dtype=np.uint8)
    assert 90 < resident_mb() - before < 130
    del held
    trim()
    assert resident_mb() - before < 50
