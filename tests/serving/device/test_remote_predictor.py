"""A worker computes in the process of a device, which is replaced when it ends."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tiny.server import until

from mlflow_pt_deploy.artifacts import Manifest, load_variant, read_manifest
from mlflow_pt_deploy.artifacts.loading import device_of
from mlflow_pt_deploy.errors import ArtifactError, DeviceLostError
from mlflow_pt_deploy.model_config import ServingOptions
from mlflow_pt_deploy.runtimes.base import remote_calls
from mlflow_pt_deploy.serving.device import device_link
from mlflow_pt_deploy.serving.device.device_link import DeviceLink
from mlflow_pt_deploy.serving.device.placement import (
    DevicePlacement,
    load_on_devices,
    needs_device_process,
)
from mlflow_pt_deploy.serving.device.processes import DeviceProcesses
from mlflow_pt_deploy.serving.device.remote_predictor import RemotePredictor, least_busy
from mlflow_pt_deploy.serving.model.inference_service import InferenceService
from mlflow_pt_deploy.system.device import has_cuda

from .conftest import OPTIONS, VARIANT, key_of

LOADED = load_variant(VARIANT)
TEXTS = ["my card was declined", "a refund please", "send money abroad " * 5, "pin"]


@pytest.mark.parametrize(
    ("device", "workers", "needed"),
    [("cuda", 2, True), ("cuda:1", 8, True), ("cuda", 1, False), ("cpu", 8, False)],
)
def test_several_workers_share_a_gpu(device: str, workers: int, needed: bool) -> None:
    assert needs_device_process(device, workers) is needed


@pytest.mark.parametrize(
    ("runtime", "device", "expected"),
    [
        ("eager", "auto", "cuda"),
        ("eager", "cpu", "cpu"),
        ("portable", "cuda:1", "cuda:1"),
        ("portable", "auto", "cuda" if has_cuda() else "cpu"),
    ],
)
def test_a_portable_variant_needs_no_gpu(runtime: str, device: str, expected: str) -> None:
    built_for = {"device": "cuda"}
    manifest = Manifest("name", "teacher", runtime, "fp32", built_for, (), {}, {})
    assert device_of(manifest, device) == expected


def test_a_model_on_the_cpu_is_in_the_worker(processes: DeviceProcesses) -> None:
    placement = DevicePlacement(processes, 2)
    loaded = placement(VARIANT, read_manifest(VARIANT), ServingOptions())
    assert not remote_calls(loaded.predict) and loaded.device == "cpu"


def test_the_least_busy_device_that_is_ready_gets_the_batch() -> None:
    def link(rows: int, ready: bool = True) -> SimpleNamespace:
        return SimpleNamespace(rows=rows, ready=ready, problem="the process has ended")

    links = [link(3), link(1, ready=False), link(2)]
    assert least_busy(links) is links[2]  # type: ignore[arg-type]
    with pytest.raises(DeviceLostError, match="has ended; retry later"):
        least_busy(links[1:2])  # type: ignore[arg-type]


def test_logits_equal_those_of_the_model_here(processes: DeviceProcesses) -> None:
    remote = load_on_devices(processes, VARIANT, "cpu", OPTIONS)
    assert (remote.labels, remote.manifest, remote.device) == (
        LOADED.labels,
        LOADED.manifest,
        "cpu",
    )
    batches = [LOADED.preprocessor([text] * size) for text in TEXTS for size in (1, 3, 8)]
    with ThreadPoolExecutor(4) as threads:
        for batch, found in zip(batches, threads.map(remote.predict, batches), strict=True):
            np.testing.assert_allclose(found, LOADED.predict(batch), atol=1e-5)


def test_the_service_keeps_batches_in_flight_and_never_computes_on_the_event_loop(
    processes: DeviceProcesses,
) -> None:
    remote = load_on_devices(processes, VARIANT, "cpu", OPTIONS)
    service = InferenceService(remote, OPTIONS)
    service.warm_up()
    assert service.batcher.concurrency.streams == remote_calls(remote.predict) == 3
    assert not service.runs_inline and not service._should_run_inline(1)
    (logits,) = service.predict(TEXTS)
    np.testing.assert_allclose(logits, LOADED.logits(TEXTS), atol=1e-5)
    assert service.batcher.executor.running_s == 0  # watched in the process


def test_a_changed_folder_is_refused_by_its_worker(
    processes: DeviceProcesses, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(VARIANT, tmp_path / "variant"))
    (folder / "static.json").write_text("{}")
    with pytest.raises(ArtifactError, match="SHA-256 differs"):
        load_on_devices(processes, folder, "cpu", OPTIONS)


def test_an_error_of_the_process_has_its_class_here(processes: DeviceProcesses) -> None:
    link = DeviceLink(processes, "cpu", {"folder": str(VARIANT), "key": list(key_of("0" * 64))})
    with pytest.raises(ArtifactError, match="not the one that the worker has checked"):
        link.open()
    assert not link.ready


def open_link(processes: DeviceProcesses) -> DeviceLink:
    key = list(key_of(LOADED.manifest.digest))
    link = DeviceLink(processes, "cpu", {"folder": str(VARIANT), "key": key})
    link.open()
    return link


def test_a_batch_goes_to_the_other_device_while_one_is_lost(
    processes: DeviceProcesses, new_processes: Callable[[], DeviceProcesses]
) -> None:
    links = [open_link(new_processes()), open_link(processes)]
    predictor = RemotePredictor(links)
    batch = LOADED.preprocessor(TEXTS)
    predictor.warm_up_buckets(32, 2048, 64)
    os.kill(links[0].pid, signal.SIGKILL)
    until(lambda: not links[0].ready)
    assert predictor.ready and "has ended" in predictor.status()[0]["problem"]
    np.testing.assert_allclose(predictor(batch), LOADED.predict(batch), atol=1e-5)
    until(lambda: links[0].ready)
    np.testing.assert_allclose(links[0].predict(batch), LOADED.predict(batch), atol=1e-5)
    assert [link["starts"] for link in predictor.status()] == [2, 1]


def test_a_link_is_freed_with_its_predictor(processes: DeviceProcesses) -> None:
    predictor = RemotePredictor([open_link(processes)])
    gone = weakref.ref(predictor._links[0])
    del predictor
    gc.collect()
    until(lambda: gone() is None)


def test_a_process_that_is_stopped_is_killed(
    new_processes: Callable[[], DeviceProcesses], monkeypatch: pytest.MonkeyPatch
) -> None:
    processes = new_processes()
    link = open_link(processes)
    monkeypatch.setattr(processes, "hang_s", 0.05)
    monkeypatch.setattr(device_link, "_STOPPED_S", 0.1)
    os.kill(link.pid, signal.SIGSTOP)
    with pytest.raises(DeviceLostError, match="has ended and is started again; retry later"):
        link.predict(LOADED.preprocessor(TEXTS))
    until(lambda: not link.ready)
    link.close()
