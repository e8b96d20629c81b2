"""CUDA graphs per bucket; on the CPU the same code calls the module instead of a graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mlflow_pt_deploy.artifacts import load_variant
from mlflow_pt_deploy.data import Splits
from mlflow_pt_deploy.models import Classifier, load_classifier
from mlflow_pt_deploy.runtimes.aotinductor import AOTInductor, load_package
from mlflow_pt_deploy.runtimes.base import Inputs
from mlflow_pt_deploy.runtimes.cuda_graphs import CapturedGraph, CudaGraphs
from mlflow_pt_deploy.runtimes.eager import Eager, in_precision

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def classifier(tiny_model: Path) -> Classifier:
    return load_classifier(str(tiny_model))


def graphs(classifier: Classifier, device: str, **options) -> CudaGraphs:
    example = classifier.preprocessor(["a card"])
    options = {"rows": (1, 4, 8), "lengths": (8, 16, 128), **options}
    return CudaGraphs(classifier.to(device), example, device=device, **options)


def expected(classifier: Classifier, inputs: Inputs) -> np.ndarray:
    import torch

    with torch.inference_mode():
        logits = classifier.cpu()(*(torch.from_numpy(array) for array in inputs.values()))
    return logits.numpy()


@pytest.mark.parametrize("size", [1, 3, 4, 8, 20, 33])
def test_logits_equal_those_of_the_module(
    classifier: Classifier, tiny_splits: Splits, size: int, device: str
) -> None:
    inputs = classifier.preprocessor(tiny_splits.train.rows[:size])
    reference = expected(classifier, inputs)
    predict = graphs(classifier, device)
    for _ in range(2):  # first with captures, then with replays only
        np.testing.assert_allclose(predict(inputs), reference, atol=1e-3)


def test_earlier_batches_have_no_effect(
    classifier: Classifier, tiny_splits: Splits, device: str
) -> None:
    preprocessor = classifier.preprocessor
    batches = [preprocessor(["card " * 6] * 4), preprocessor(["refund", "a"]), preprocessor([""])]
    reference = [expected(classifier, batch) for batch in batches]
    predict = graphs(classifier, device)
    for batch, logits in zip(batches, reference, strict=True):
        np.testing.assert_allclose(predict(batch), logits, atol=1e-3)


def test_results_are_not_overwritten_by_later_calls(classifier: Classifier, device: str) -> None:
    predict = graphs(classifier, device)
    first = predict(classifier.preprocessor(["card"]))
    kept = first.copy()
    predict(classifier.preprocessor(["refund"]))
    np.testing.assert_array_equal(first, kept)


def test_smallest_sufficient_bucket_is_used(classifier: Classifier) -> None:
    predict = graphs(classifier, "cpu")
    for rows, longest, bucket in [
        (1, 5, (1, 8)),
        (3, 8, (4, 8)),
        (5, 9, (8, 16)),
        (8, 17, (8, 128)),
    ]:
        (part,) = predict.parts(arrays([longest] * rows))
        assert (part.rows, part.length) == bucket
    parts = predict.parts(arrays([5] * 19))
    assert [(len(part.indices), part.rows) for part in parts] == [(8, 8), (8, 8), (3, 4)]


def test_large_batches_are_split_by_length(classifier: Classifier) -> None:
    predict = graphs(classifier, "cpu", rows=(1, 8, 64))
    lengths = [100, 5, 9, 8, 2] + [16] * 30
    parts = predict.parts(arrays(lengths))
    assert [(part.length, part.rows) for part in parts] == [(8, 8), (16, 64), (128, 1)]
    assert sorted(np.concatenate([part.indices for part in parts])) == list(range(len(lengths)))
    assert len(predict.parts(arrays(lengths[:8]))) == 1


def test_results_of_split_batches_are_in_row_order(
    classifier: Classifier, tiny_splits: Splits, device: str
) -> None:
    rows = [" ".join(["card"] * (1 + 37 * index % 90)) for index in range(50)]
    inputs = classifier.preprocessor(rows)
    reference = expected(classifier, inputs)
    predict = graphs(classifier, device)
    assert len(predict.parts(inputs)) > 3
    np.testing.assert_allclose(predict(inputs), reference, atol=1e-3)


def test_buckets_are_captured_once(classifier: Classifier) -> None:
    calls = []

    def counted(*tensors):
        calls.append(tuple(tensors[0].shape))
        return classifier(*tensors)

    example = classifier.preprocessor(["a card"])
    predict = CudaGraphs(counted, example, device="cpu", rows=(1, 4), lengths=(8, 128))
    predict.warm_up()
    assert calls == [(4, 128), (4, 8), (1, 128), (1, 8)]
    calls.clear()
    predict(classifier.preprocessor(["card", "refund"]))
    assert calls == [(4, 8)]


def test_images(tiny_resnet: Path, image_splits: Splits, device: str) -> None:
    classifier = load_classifier(str(tiny_resnet))
    inputs = classifier.preprocessor(image_splits.test.rows[:6])
    reference = expected(classifier, inputs)
    example = {name: array[:1] for name, array in inputs.items()}
    predict = CudaGraphs(classifier.to(device), example, device=device, rows=(1, 4), lengths=())
    np.testing.assert_allclose(predict(inputs), reference, atol=1e-2)


def arrays(lengths: list[int]) -> dict[str, np.ndarray]:
    shape = (len(lengths), max(lengths))
    mask = (np.arange(shape[1]) < np.array(lengths)[:, None]).astype(np.int64)
    return {"input_ids": np.ones(shape, dtype=np.int64), "attention_mask": mask}


def test_captured_graph(classifier: Classifier, device: str) -> None:
    inputs = classifier.preprocessor(["my card", "a refund"])
    reference = expected(classifier, inputs)
    captured = CapturedGraph(classifier.to(device), inputs, device)
    for name, array in inputs.items():
        captured.inputs[name][:] = array[::-1]
    captured.launch()
    np.testing.assert_allclose(captured.logits()[::-1], reference, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_eager_on_a_gpu(exported: Callable[..., Path], tiny_splits: Splits, precision: str) -> None:
    folder = exported(Eager(precision))
    rows = tiny_splits.test.rows
    reference = load_variant(folder, device="cpu").logits(rows)
    found = load_variant(folder, device="cuda").logits(rows)  # includes the golden check
    np.testing.assert_allclose(found, reference, atol=5 * (1e-3 if precision == "fp32" else 5e-2))


@pytest.mark.gpu
def test_aotinductor_on_a_gpu(
    exported: Callable[..., Path], tiny_splits: Splits, classifier: Classifier
) -> None:
    folder = exported(AOTInductor("bf16", device="cuda"))
    loaded = load_variant(folder, device="cuda", allow_code=True)
    inputs = classifier.preprocessor(tiny_splits.test.rows)
    reference = expected(classifier, inputs)
    allowed = 5 * 5e-2
    np.testing.assert_allclose(loaded.predict(inputs), reference, atol=allowed)
    replayed = CudaGraphs(load_package(folder, "cuda"), inputs, device="cuda", lengths=(16, 128))
    np.testing.assert_allclose(replayed(inputs), reference, atol=allowed)


def test_half_precision_is_in_place(classifier: Classifier) -> None:
    import torch

    assert in_precision(classifier, "fp16") is classifier
    assert next(classifier.parameters()).dtype == torch.float16


def test_package_for_a_gpu() -> None:
    import torch

    variant = AOTInductor("bf16", device="cuda")
    assert variant.name("student") == "student-aotinductor-bf16-cuda"
    if not torch.cuda.is_available():
        assert variant.unsupported() == "skipped: PyTorch finds no CUDA device"
