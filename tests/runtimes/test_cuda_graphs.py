"""CUDA graphs per bucket; on the CPU the same code calls the module instead of a graph."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from mlflow_pt_deploy.artifacts import load_variant
from mlflow_pt_deploy.data import Splits
from mlflow_pt_deploy.models import Classifier, load_classifier
from mlflow_pt_deploy.runtimes.aotinductor import AOTInductor, load_package
from mlflow_pt_deploy.runtimes.base import Inputs
from mlflow_pt_deploy.runtimes.captured_graph import CapturedGraph, GraphLanes, GraphPart
from mlflow_pt_deploy.runtimes.cuda_graphs import (
    CudaGraphs,
    GraphPredictor,
    lengths_up_to,
    reachable_buckets,
)
from mlflow_pt_deploy.runtimes.eager import in_precision

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def classifier(tiny_model: Path) -> Classifier:
    return load_classifier(str(tiny_model))


def graphs(classifier: Classifier, device: str, **options) -> GraphPredictor:
    example = classifier.preprocessor(["a card"])
    options = {"rows": (1, 4, 8), "lengths": (8, 16, 128), **options}
    return GraphPredictor(classifier.to(device), example, device=device, **options)


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


def test_a_batch_is_computed_in_its_bucket(classifier: Classifier) -> None:
    calls = []

    def counted(*tensors):
        calls.append(tuple(tensors[0].shape))
        return classifier(*tensors)

    example = classifier.preprocessor(["a card"])
    predict = GraphPredictor(counted, example, device="cpu", rows=(1, 4), lengths=(8, 128))
    predict.warm_up_buckets(4, 512, 128)
    assert not calls  # there is nothing to capture on the CPU
    predict(classifier.preprocessor(["card", "refund"]))
    assert calls == [(4, 8)]


def test_warm_up_captures_each_bucket_in_each_lane() -> None:
    import torch

    made = []

    def make(bucket: int):
        made.append(bucket)
        return torch.clone, {"values": np.zeros((bucket, 2), dtype=np.float32)}

    lanes = GraphLanes(make, "cpu", count=3)
    lanes.warm_up([4, 1])
    assert made == [4, 1] * 3
    lanes.warm_up([4, 1])
    lanes.launch([GraphPart(4, 4, lambda buffers: None)])()
    assert made == [4, 1] * 3


def test_images(tiny_resnet: Path, image_splits: Splits, device: str) -> None:
    classifier = load_classifier(str(tiny_resnet))
    inputs = classifier.preprocessor(image_splits.test.rows[:6])
    reference = expected(classifier, inputs)
    example = {name: array[:1] for name, array in inputs.items()}
    predict = GraphPredictor(classifier.to(device), example, device=device, rows=(1, 4), lengths=())
    predict.warm_up_buckets(4, 64, 4)
    np.testing.assert_allclose(predict(inputs), reference, atol=1e-2)


def arrays(lengths: list[int]) -> dict[str, np.ndarray]:
    shape = (len(lengths), max(lengths))
    mask = (np.arange(shape[1]) < np.array(lengths)[:, None]).astype(np.int64)
    return {"input_ids": np.ones(shape, dtype=np.int64), "attention_mask": mask}


def test_captured_graph(classifier: Classifier, device: str) -> None:
    import torch

    inputs = classifier.preprocessor(["my card", "a refund"])
    reference = expected(classifier, inputs)
    stream = None if device == "cpu" else torch.cuda.Stream()
    captured = CapturedGraph(classifier.to(device), inputs, device, stream)
    for name, array in inputs.items():
        captured.inputs[name][:] = array[::-1]
    captured.launch()
    np.testing.assert_allclose(captured.logits()[::-1], reference, atol=1e-3)


def test_two_batches_are_in_flight_at_once(classifier: Classifier, device: str) -> None:
    first = classifier.preprocessor(["card"])
    second = classifier.preprocessor(["refund"])
    references = [expected(classifier, first), expected(classifier, second)]
    predict = graphs(classifier, device)
    pending = [predict.launch(first), predict.launch(second)]
    found = [collect() for collect in reversed(pending)][::-1]
    np.testing.assert_allclose(found, references, atol=1e-3)


def test_concurrent_calls(classifier: Classifier, tiny_splits: Splits, device: str) -> None:
    batches = [classifier.preprocessor(tiny_splits.train.rows[at : at + 3]) for at in range(24)]
    references = [expected(classifier, batch) for batch in batches]
    predict = graphs(classifier, device)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(predict, batches))
    for logits, reference in zip(found, references, strict=True):
        np.testing.assert_allclose(logits, reference, atol=1e-3)


def test_a_batch_that_fails_frees_its_lane() -> None:
    import torch

    def make(bucket: int):
        if bucket == 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.clone, {"values": np.zeros((bucket, 2), dtype=np.float32)}

    lanes = GraphLanes(make, "cpu", count=1)

    def part(bucket: int) -> GraphPart:
        return GraphPart(bucket, bucket, lambda buffers: buffers["values"].fill(bucket))

    with pytest.raises(torch.OutOfMemoryError):
        lanes.launch([part(3), part(0)])
    with pytest.raises(torch.OutOfMemoryError):
        lanes.warm_up([3, 0])
    assert [len(logits) for logits in lanes.launch([part(2), part(3), part(2)])()] == [2, 3, 2]


def test_the_second_of_two_lanes_is_captured_when_it_is_needed() -> None:
    import torch

    made = []

    def make(bucket: int):
        made.append(bucket)
        return torch.clone, {"values": np.zeros((bucket, 2), dtype=np.float32)}

    lanes = GraphLanes(make, "cpu")
    part = GraphPart(1, 1, lambda buffers: None)
    lanes.launch([part])()
    lanes.launch([part])()
    assert made == [1]
    first = lanes.launch([part])
    lanes.launch([part])()
    first()
    assert made == [1, 1]


def test_buckets_that_a_server_needs() -> None:
    rows, lengths = (1, 2, 4, 8), (16, 64, 128)
    # two rows of up to 32 tokens need the length 64; a long row is alone
    found = reachable_buckets(rows, lengths, max_rows=8, max_tokens=64, longest=128)
    assert found == [(8, 16), (4, 64), (4, 16), (2, 64), (2, 16), (1, 128), (1, 64), (1, 16)]
    assert reachable_buckets(rows, lengths, max_rows=3, max_tokens=9999, longest=20)[0] == (4, 64)
    assert reachable_buckets(rows, (), max_rows=8, max_tokens=12, longest=4) == [
        (4, 0),
        (2, 0),
        (1, 0),
    ]
    assert lengths_up_to(128) == (16, 32, 64, 128)
    assert lengths_up_to(100) == (16, 32, 64, 100)
    assert lengths_up_to(0) == ()


@pytest.mark.parametrize("model", ["teacher", "resnet"])
def test_variant_on_the_cpu(
    exported: Callable[..., Path], tiny_models: dict[str, tuple[Path, Splits]], model: str
) -> None:
    loaded = load_variant(exported(CudaGraphs(), model), threads=1)
    assert not loaded.manifest.carries_code
    rows = tiny_models[model][1].test.rows[:5]
    inputs = loaded.preprocessor(rows)
    reference = expected(load_classifier(str(tiny_models[model][0])), inputs)
    np.testing.assert_allclose(loaded.predict(inputs), reference, atol=1e-3)


@pytest.mark.gpu
def test_aotinductor_package_in_a_graph(
    exported: Callable[..., Path], tiny_splits: Splits, classifier: Classifier
) -> None:
    folder = exported(AOTInductor("bf16", device="cuda"))
    inputs = classifier.preprocessor(tiny_splits.test.rows)
    reference = expected(classifier, inputs)
    package = load_package(folder, "cuda")
    replayed = GraphPredictor(package, inputs, device="cuda", lengths=(16, 128))
    np.testing.assert_allclose(replayed(inputs), reference, atol=5 * 5e-2)


def test_half_precision_is_in_place(classifier: Classifier) -> None:
    import torch

    assert in_precision(classifier, "fp16") is classifier
    assert next(classifier.parameters()).dtype == torch.float16
