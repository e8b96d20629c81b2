"""Buckets of CUDA graphs; on the CPU the same code calls the module instead of a graph."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mlflow_pt_deploy.data import Splits
from mlflow_pt_deploy.models import Classifier, load_classifier
from mlflow_pt_deploy.variants import load_variant
from mlflow_pt_deploy.variants.aotinductor import AOTInductor, load_package
from mlflow_pt_deploy.variants.base import Inputs
from mlflow_pt_deploy.variants.cuda_graphs import Captured, CudaGraphs
from mlflow_pt_deploy.variants.eager import Eager, in_precision

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
def test_logits_are_those_of_the_module(
    classifier: Classifier, tiny_splits: Splits, size: int, device: str
) -> None:
    inputs = classifier.preprocessor(tiny_splits.train.rows[:size])
    wanted = expected(classifier, inputs)
    predict = graphs(classifier, device)
    for _ in range(2):  # a capture, then replays alone
        np.testing.assert_allclose(predict(inputs), wanted, atol=1e-3)


def test_earlier_rows_leave_nothing_behind(
    classifier: Classifier, tiny_splits: Splits, device: str
) -> None:
    preprocessor = classifier.preprocessor
    batches = [preprocessor(["card " * 6] * 4), preprocessor(["refund", "a"]), preprocessor([""])]
    wanted = [expected(classifier, batch) for batch in batches]
    predict = graphs(classifier, device)
    for batch, logits in zip(batches, wanted, strict=True):
        np.testing.assert_allclose(predict(batch), logits, atol=1e-3)


def test_answers_are_the_callers_to_keep(classifier: Classifier, device: str) -> None:
    predict = graphs(classifier, device)
    first = predict(classifier.preprocessor(["card"]))
    kept = first.copy()
    predict(classifier.preprocessor(["refund"]))
    np.testing.assert_array_equal(first, kept)


def test_the_smallest_bucket_that_holds_a_batch(classifier: Classifier) -> None:
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
    assert [(len(part.places), part.rows) for part in parts] == [(8, 8), (8, 8), (3, 4)]


def test_many_tokens_are_split_by_length(classifier: Classifier) -> None:
    predict = graphs(classifier, "cpu", rows=(1, 8, 64))
    lengths = [100, 5, 9, 8, 2] + [16] * 30
    parts = predict.parts(arrays(lengths))
    assert [(part.length, part.rows) for part in parts] == [(8, 8), (16, 64), (128, 1)]
    assert sorted(np.concatenate([part.places for part in parts])) == list(range(len(lengths)))
    assert len(predict.parts(arrays(lengths[:8]))) == 1


def test_split_rows_come_back_in_their_order(
    classifier: Classifier, tiny_splits: Splits, device: str
) -> None:
    rows = [" ".join(["card"] * (1 + 37 * index % 90)) for index in range(50)]
    inputs = classifier.preprocessor(rows)
    wanted = expected(classifier, inputs)
    predict = graphs(classifier, device)
    assert len(predict.parts(inputs)) > 3
    np.testing.assert_allclose(predict(inputs), wanted, atol=1e-3)


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


def test_images_have_no_length(tiny_resnet: Path, image_splits: Splits, device: str) -> None:
    classifier = load_classifier(str(tiny_resnet))
    inputs = classifier.preprocessor(image_splits.test.rows[:6])
    wanted = expected(classifier, inputs)
    example = {name: array[:1] for name, array in inputs.items()}
    predict = CudaGraphs(classifier.to(device), example, device=device, rows=(1, 4), lengths=())
    np.testing.assert_allclose(predict(inputs), wanted, atol=1e-2)


def arrays(lengths: list[int]) -> dict[str, np.ndarray]:
    shape = (len(lengths), max(lengths))
    mask = (np.arange(shape[1]) < np.array(lengths)[:, None]).astype(np.int64)
    return {"input_ids": np.ones(shape, dtype=np.int64), "attention_mask": mask}


def test_one_bucket_by_itself(classifier: Classifier, device: str) -> None:
    inputs = classifier.preprocessor(["my card", "a refund"])
    wanted = expected(classifier, inputs)
    captured = Captured(classifier.to(device), inputs, device)
    for name, array in inputs.items():
        captured.inputs[name][:] = array[::-1]
    captured.launch()
    np.testing.assert_allclose(captured.logits()[::-1], wanted, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_eager_on_a_gpu(exported: Callable[..., Path], tiny_splits: Splits, precision: str) -> None:
    folder = exported(Eager(precision))
    rows = tiny_splits.test.rows
    wanted = load_variant(folder, device="cpu").logits(rows)
    found = load_variant(folder, device="cuda").logits(rows)  # and the golden rows are right
    np.testing.assert_allclose(found, wanted, atol=5 * (1e-3 if precision == "fp32" else 5e-2))


@pytest.mark.gpu
def test_aotinductor_on_a_gpu(
    exported: Callable[..., Path], tiny_splits: Splits, classifier: Classifier
) -> None:
    folder = exported(AOTInductor("bf16", device="cuda"))
    loaded = load_variant(folder, device="cuda", allow_code=True)
    inputs = classifier.preprocessor(tiny_splits.test.rows)
    wanted = expected(classifier, inputs)
    allowed = 5 * 5e-2
    np.testing.assert_allclose(loaded.predict(inputs), wanted, atol=allowed)
    replayed = CudaGraphs(load_package(folder, "cuda"), inputs, device="cuda", lengths=(16, 128))
    np.testing.assert_allclose(replayed(inputs), wanted, atol=allowed)


def test_half_precision_is_in_place(classifier: Classifier) -> None:
    import torch

    assert in_precision(classifier, "fp16") is classifier
    assert next(classifier.parameters()).dtype == torch.float16


def test_a_package_for_a_gpu_says_so() -> None:
    import torch

    variant = AOTInductor("bf16", device="cuda")
    assert variant.name("student") == "student-aotinductor-bf16-cuda"
    if not torch.cuda.is_available():
        assert variant.unsupported() == "skipped: PyTorch sees no CUDA device here"
