"""Workers share a model on a real GPU."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tiny.server import until

from mlflow_pt_deploy.artifacts import LoadedVariant, load_variant, write_variant
from mlflow_pt_deploy.model_config import ServingOptions
from mlflow_pt_deploy.models import load_classifier
from mlflow_pt_deploy.runtimes.eager import Eager
from mlflow_pt_deploy.serving.device.executor import stream_contexts
from mlflow_pt_deploy.serving.device.placement import load_on_devices
from mlflow_pt_deploy.serving.device.processes import DeviceProcesses
from mlflow_pt_deploy.serving.device.remote_predictor import RemotePredictor

pytestmark = pytest.mark.gpu

TEXTS = ["my card", "refund the money to my account please", "wire abroad"] * 5


@pytest.fixture(scope="module")
def variant(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A `teacher-eager-fp32`, made without libraries for images."""
    folder = tmp_path_factory.mktemp("gpu") / "teacher-eager-fp32"
    classifier = load_classifier(str(tiny_model))
    write_variant(
        Eager(),
        classifier,
        folder,
        model="teacher",
        example=classifier.preprocessor(TEXTS[:3]),
        calibration=[],
        golden_rows=TEXTS[:3],
    )
    return folder


def predictor_of(loaded: LoadedVariant) -> RemotePredictor:
    assert isinstance(loaded.predict, RemotePredictor)
    return loaded.predict


def test_threads_have_streams_of_their_own() -> None:
    import torch

    seen = {torch.cuda.default_stream(0)}
    for enter in stream_contexts("cuda:0"):
        with enter():
            seen.add(torch.cuda.current_stream())
    assert len(seen) == 3


def test_workers_share_a_model_and_get_it_back_after_the_end_of_its_process(
    variant: Path, new_processes: Callable[[], DeviceProcesses]
) -> None:
    processes = new_processes()
    here = load_variant(variant, device="cuda")
    options = ServingOptions(device="cuda:0")
    workers = [load_on_devices(processes, variant, "cuda:0", options) for _ in range(3)]
    predictors = [predictor_of(worker) for worker in workers]
    batches = [here.preprocessor(TEXTS[: size + 1]) for size in range(len(TEXTS))]
    expected = [here.predict(batch) for batch in batches]
    calls = [(each, batch) for batch in batches for each in predictors]
    with ThreadPoolExecutor(9) as threads:
        found = list(threads.map(lambda call: call[0](call[1]), calls))
    for at, logits in enumerate(found):
        np.testing.assert_allclose(logits, expected[at // len(predictors)], atol=1e-3)
    (pid,) = {each.status()[0]["pid"] for each in predictors}
    os.kill(pid, signal.SIGKILL)
    until(lambda: not any(each.ready for each in predictors))
    until(lambda: all(each.ready for each in predictors), 120)
    for each in predictors:
        np.testing.assert_allclose(each(batches[3]), expected[3], atol=1e-3)


def test_cuda_means_all_gpus(variant: Path, new_processes: Callable[[], DeviceProcesses]) -> None:
    import torch

    options = ServingOptions(device="cuda")
    loaded = load_on_devices(new_processes(), variant, "cuda", options)
    devices = [each["device"] for each in predictor_of(loaded).status()]
    assert devices == [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    here = load_variant(variant, device="cuda")
    batch = here.preprocessor(TEXTS)
    for _ in devices:
        np.testing.assert_allclose(loaded.predict(batch), here.predict(batch), atol=1e-3)
