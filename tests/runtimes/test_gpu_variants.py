"""Contract of the variants for a GPU, on a GPU. What the machine cannot build is skipped."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from mlflow_pt_deploy.artifacts import LoadedVariant, load_variant
from mlflow_pt_deploy.data import Splits
from mlflow_pt_deploy.models import load_classifier
from mlflow_pt_deploy.runtimes.aotinductor import AOTInductor
from mlflow_pt_deploy.runtimes.base import Variant
from mlflow_pt_deploy.runtimes.catalog import GPU_VARIANTS, ON_REQUEST, skip_reason
from mlflow_pt_deploy.runtimes.tensorrt import TensorRT
from mlflow_pt_deploy.system.device import CUDA
from mlflow_pt_deploy.training.inference import predict_logits

pytestmark = pytest.mark.gpu

LARGEST = 5.0  # largest logit of the tiny model
TOLERANCE = {
    "fp32": 1e-3,
    "bf16": 0.05,
    "fp16": 0.01,
    "int8-dynamic": 0.15,
    "fp8-dynamic": 0.15,
}
FOR_A_GPU = [variant for variant in (*GPU_VARIANTS, *ON_REQUEST) if variant.device == CUDA]
# each further compilation would take a minute
COMPILED = [AOTInductor("bf16", device=CUDA), TensorRT("fp16", device=CUDA)]
QUICK = [variant for variant in FOR_A_GPU if not variant.compiles]
CONTRACTS = [("teacher", variant) for variant in QUICK]
CONTRACTS += [("resnet", variant) for variant in QUICK if not skip_reason(variant, "resnet")]
CONTRACTS += [("teacher", variant) for variant in COMPILED]


@pytest.fixture(scope="module", params=CONTRACTS, ids=lambda pair: pair[1].name(pair[0]))
def contract(request: pytest.FixtureRequest) -> tuple[str, Variant]:
    model, variant = request.param
    if reason := variant.unsupported():
        pytest.skip(reason)
    for library in {"onnx": ("onnx", "onnxruntime")}.get(variant.extra, ()):
        pytest.importorskip(library)
    if model == "resnet":
        pytest.importorskip("pyarrow", reason="the tiny images are a Parquet file")
    return request.param


@pytest.fixture(scope="module")
def splits(contract: tuple[str, Variant], tiny_models: dict[str, tuple[Path, Splits]]) -> Splits:
    return tiny_models[contract[0]][1]


@pytest.fixture(scope="module")
def loaded(contract: tuple[str, Variant], exported: Callable[..., Path]) -> LoadedVariant:
    """Loaded with the golden check, on the device that the manifest names."""
    folder = exported(contract[1], contract[0])
    loaded = load_variant(folder, allow_code=True)
    assert loaded.device == "cuda"
    return loaded


@pytest.fixture(scope="module")
def expected(
    contract: tuple[str, Variant], splits: Splits, tiny_models: dict[str, tuple[Path, Splits]]
) -> np.ndarray:
    return predict_logits(load_classifier(str(tiny_models[contract[0]][0])), splits.train.rows)


def test_logits_equal_eager_fp32(
    contract: tuple[str, Variant], loaded: LoadedVariant, splits: Splits, expected: np.ndarray
) -> None:
    allowed = LARGEST * TOLERANCE[contract[1].precision]
    for size in (1, 2, 5, len(splits.train.rows)):
        found = loaded.logits(splits.train.rows[:size])
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected[:size], atol=allowed)


def test_concurrent_calls(
    contract: tuple[str, Variant], loaded: LoadedVariant, splits: Splits, expected: np.ndarray
) -> None:
    starts = range(0, 60, 3)
    batches = [loaded.preprocessor(splits.train.rows[at : at + 3]) for at in starts]
    with ThreadPoolExecutor(4) as pool:
        found = np.concatenate(list(pool.map(loaded.predict, batches * 5)))
    allowed = LARGEST * TOLERANCE[contract[1].precision]
    np.testing.assert_allclose(found, np.tile(expected[:60], (5, 1)), atol=allowed)


def test_buckets_of_a_server_are_captured(loaded: LoadedVariant, splits: Splits) -> None:
    import torch

    prepare = getattr(loaded.predict, "warm_up_buckets", None)
    if prepare is None:
        pytest.skip("it has no buckets")
    prepare(8, 1024, 64)
    before = torch.cuda.memory_reserved()
    for size in (1, 3, 8):
        loaded.logits(splits.train.rows[:size])
    assert torch.cuda.memory_reserved() == before


def test_a_device_by_its_number(
    contract: tuple[str, Variant], exported: Callable[..., Path], splits: Splits
) -> None:
    import torch

    last = f"cuda:{torch.cuda.device_count() - 1}"
    folder = exported(contract[1], contract[0])
    loaded = load_variant(folder, device=last, allow_code=True)  # with the golden check
    assert loaded.device == last
    assert np.isfinite(loaded.logits(splits.test.rows)).all()
