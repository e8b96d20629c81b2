"""Models loaded on demand and evicted: real versions, a real server and watcher."""

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
from tiny.server import running, until
from tiny.serving import save_tiny

from mlflow_pt_deploy.registry.addresses import source
from mlflow_pt_deploy.serving.app import Application
from mlflow_pt_deploy.serving.lifecycle import eviction
from mlflow_pt_deploy.serving.lifecycle.eviction import MemoryBudget
from mlflow_pt_deploy.serving.lifecycle.model_cache import ModelCache
from mlflow_pt_deploy.serving.lifecycle.registry_watcher import RegistryWatcher
from mlflow_pt_deploy.serving.lifecycle.served_model import ServedModel
from mlflow_pt_deploy.serving.observability.prometheus import PrometheusMetrics
from mlflow_pt_deploy.serving.worker import _describe as describe
from mlflow_pt_deploy.system.process_memory import resident_mb, trim


@pytest.fixture
def no_residency(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that was just loaded may be evicted."""
    monkeypatch.setattr(eviction, "MIN_RESIDENCY_S", 0.0)


def models_of(folder: Path, *names: str, metrics: Any = None, **habits: Any) -> list[ServedModel]:
    """A model for each name, whose label for red is its name."""
    return [
        ServedModel(
            name, source(str(save_tiny(folder / name, label=name, **habits))), metrics=metrics
        )
        for name in names
    ]


@contextmanager
def serving(
    models: Sequence[ServedModel], budget: MemoryBudget, poll_s: float = 0, **app: Any
) -> Iterator[str]:
    failures: list[Exception] = []
    watcher = RegistryWatcher(
        models, poll_s, budget=budget, on_opened=lambda: None, on_failed=failures.append
    )
    with running(Application({model.name: model for model in models}, **app)) as url:
        watcher.start()
        try:
            until(lambda: failures or requests.get(f"{url}/readyz", timeout=5).ok)
            assert not failures
            yield url
        finally:
            watcher.stop()
            watcher.join(10)


def ask(url: str, name: str, text: str = "red") -> requests.Response:
    return requests.post(f"{url}/models/{name}/invocations", json={"inputs": [text]}, timeout=10)


def label(url: str, name: str) -> str:
    """The label that a model gives once it answers."""
    until(lambda: ask(url, name).status_code == 200)
    return str(ask(url, name).json()["predictions"][0]["label"])


def test_the_least_recently_used_model_is_evicted_and_loaded_on_demand(
    tmp_path: Path, no_residency: None
) -> None:
    models = a, b, c = models_of(tmp_path, "a", "b", "c")
    with serving(models, MemoryBudget(max_models=2)) as url:
        assert a.current and b.current and not c.current
        assert label(url, "a") == "a"  # so b is the least recently used
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
        assert not a.current  # the first has no privilege


def test_two_models_in_turns_do_not_evict_each_other_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eviction, "MIN_RESIDENCY_S", 0.5)
    models = a, b = models_of(tmp_path, "a", "b")
    cache = ModelCache(models, MemoryBudget(max_models=1))
    cache.open()
    for first, second in ((a, b), (b, a)):
        second.acquire()
        until(lambda: not cache.reconcile())
        assert loaded(models) == [model is second for model in models]
        assert second.loaded_at - first.loaded_at >= 0.5


def test_memory_above_its_limit_evicts_all_but_one(tmp_path: Path, no_residency: None) -> None:
    models = a, b, _ = models_of(tmp_path, "a", "b", "c")
    used = 100.0
    cache = ModelCache(
        models, MemoryBudget(max_memory_mb=350), lambda: used * sum(map(bool, loaded(models)))
    )
    cache.open()
    assert loaded(models) == [True, True, True]
    b.acquire()
    used = 200.0
    assert cache.reconcile()  # one is evicted, then memory is checked again
    assert loaded(models) == [False, True, True]
    assert a.unloaded and "600 MB were resident" in a.unloaded.reason
    while cache.reconcile():
        pass
    assert loaded(models) == [False, True, False]
    used = 9000.0
    assert not cache.reconcile()
    assert b.current


def loaded(models: Sequence[ServedModel]) -> list[bool]:
    return [model.current is not None for model in models]


def test_memory_is_read_only_if_it_has_a_limit(tmp_path: Path) -> None:
    reads: list[float] = []

    def resident() -> float:
        reads.append(100.0)
        return reads[-1]

    models = models_of(tmp_path, "a", "b")
    for budget in (MemoryBudget(), MemoryBudget(max_models=2)):
        cache = ModelCache(models, budget, resident)
        cache.open()
        assert not cache.reconcile()
    assert reads == []
    assert not ModelCache(models, MemoryBudget(max_memory_mb=150), resident).reconcile()
    assert reads == [100.0]


def test_at_the_start_the_first_models_are_loaded(tmp_path: Path) -> None:
    models = models_of(tmp_path, "a", "b", "c")
    cache = ModelCache(
        models, MemoryBudget(max_memory_mb=150), lambda: 100.0 * sum(map(bool, loaded(models)))
    )
    cache.open()
    assert loaded(models) == [True, False, False]
    assert models[2].unloaded and "200 MB were resident" in models[2].unloaded.reason


def test_a_model_that_is_not_loaded_must_exist(tmp_path: Path) -> None:
    models = [*models_of(tmp_path, "a"), ServedModel("b", source(str(tmp_path / "nowhere")))]
    with pytest.raises(MlflowException, match="nowhere"):
        ModelCache(models, MemoryBudget(max_models=1)).open()


def test_requests_in_flight_are_answered_by_an_unloaded_model(tmp_path: Path) -> None:
    (model,) = models_of(tmp_path, "slow", predict_s=0.005, slow_s=0.5)
    with serving([model], MemoryBudget()) as url, ThreadPoolExecutor(1) as pool:
        version = weakref.ref(model.current)
        in_flight = pool.submit(ask, url, "slow", "slow red")
        until(lambda: model.current.pyfunc.service.batcher.executor.running_s)
        gone = model.unload("for the test")
        assert gone() is version() is not None
        assert in_flight.result().json()["predictions"][0]["label"] == "slow"
        until(lambda: gone() is None)


def test_memory_of_a_model_that_still_answers_evicts_no_other(
    tmp_path: Path, no_residency: None
) -> None:
    models = a, *_ = models_of(tmp_path, "a", "b", "c")
    cache = ModelCache(models, MemoryBudget(max_memory_mb=1), lambda: 9000.0)
    for model in models:
        model.open()
    busy = a.current
    assert cache.reconcile()
    assert loaded(models) == [False, True, True]
    assert cache.reconcile()
    assert loaded(models) == [False, True, True]
    del busy
    assert cache.reconcile()
    assert loaded(models) == [False, False, True]


def test_an_unloaded_model_follows_the_registry_by_its_address(
    tracking: str, tmp_path: Path, no_residency: None
) -> None:
    client = MlflowClient()
    client.create_registered_model("tiny")
    for number in ("one", "two", "bad"):
        habits = {"refuse": "it is damaged"} if number == "bad" else {"label": number}
        client.create_model_version("tiny", str(save_tiny(tmp_path / number, **habits)))
    client.set_registered_model_alias("tiny", "champion", "1")
    tiny = ServedModel("tiny", source("models:/tiny@champion"))
    models = [*models_of(tmp_path, "other"), tiny]
    with serving(models, MemoryBudget(max_models=1), poll_s=0.05) as url:
        about = f"{url}/models/tiny"
        assert requests.get(about, timeout=5).json()["version"] == "1"
        client.set_registered_model_alias("tiny", "champion", "3")
        until(lambda: requests.get(about, timeout=5).json()["version"] == "3")
        assert tiny.current is None and tiny.rejected is None
        until(lambda: "its version was rejected" in ask(url, "tiny").text)
        refused = ask(url, "tiny")
        assert (refused.status_code, refused.headers["Retry-After"] > "1") == (503, True)
        assert requests.get(about, timeout=5).json()["refused"]["reason"] == "it is damaged"
        client.set_registered_model_alias("tiny", "champion", "2")
        assert label(url, "tiny") == "two"


def test_metrics_count_loaded_models_and_evictions(tmp_path: Path, no_residency: None) -> None:
    pytest.importorskip("prometheus_client")
    metrics = PrometheusMetrics()
    models = models_of(tmp_path, "a", "b", metrics=metrics)
    with serving(models, MemoryBudget(max_models=1), metrics=metrics) as url:
        assert label(url, "b") == "b"
        lines = requests.get(f"{url}/metrics", timeout=5).text.splitlines()
    assert 'pt_deploy_loaded{model="a"} 0.0' in lines
    assert 'pt_deploy_loaded{model="b"} 1.0' in lines
    assert 'pt_deploy_unloads_total{model="a"} 1.0' in lines
    serving_a = [line for line in lines if "model_info{" in line and 'model="a"' in line]
    assert all(line.endswith(" 0.0") for line in serving_a)


def test_the_startup_banner_says_what_is_not_loaded(tmp_path: Path) -> None:
    models = models_of(tmp_path, "a", "b")
    ModelCache(models, MemoryBudget(max_models=1)).open()
    line = describe(models[1], 0)
    assert line.startswith("/models/b: ")
    assert line.endswith("loaded on demand (max_models is 1)")


def test_resident_memory_is_what_this_process_holds() -> None:
    before = resident_mb()
    held = np.ones(100_000_000, dtype=np.uint8)
    assert 90 < resident_mb() - before < 130
    del held
    trim()
    assert resident_mb() - before < 50
