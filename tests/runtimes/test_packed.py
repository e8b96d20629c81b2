"""BERT over packed rows; on the CPU attention is computed row by row."""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from transformers import BertConfig, ResNetConfig

from mlflow_pt_deploy.artifacts import load_variant
from mlflow_pt_deploy.data import Splits
from mlflow_pt_deploy.errors import UnsupportedError, VariantError
from mlflow_pt_deploy.models import Classifier, load_classifier
from mlflow_pt_deploy.runtimes.base import Inputs, pads_rows
from mlflow_pt_deploy.runtimes.catalog import skip_reason
from mlflow_pt_deploy.runtimes.packed import (
    ROWS,
    TOKENS,
    Bucket,
    Packed,
    PackedPredictor,
    bucket_of,
    check_packable,
    pack,
    reachable_buckets,
    row_slices,
)


@pytest.fixture(scope="module")
def classifier(tiny_model: Path) -> Classifier:
    return load_classifier(str(tiny_model))


@pytest.fixture(scope="module")
def predict(classifier: Classifier) -> PackedPredictor:
    from mlflow_pt_deploy.runtimes.packed_bert import PackedBert

    return PackedPredictor(PackedBert(classifier.network).eval(), "cpu")


def padded(classifier: Classifier, inputs: Inputs) -> np.ndarray:
    import torch

    with torch.inference_mode():
        return classifier(*(torch.from_numpy(array) for array in inputs.values())).numpy()


@pytest.mark.parametrize("size", [1, 2, 33])
def test_logits_are_those_of_the_padded_model(
    classifier: Classifier, predict: PackedPredictor, tiny_splits: Splits, size: int
) -> None:
    rows = [*tiny_splits.train.rows[: size - 1], "card " * 100]
    inputs = classifier.preprocessor(rows)
    for _ in range(2):
        np.testing.assert_allclose(predict(inputs), padded(classifier, inputs), atol=1e-4)
    assert not pads_rows(predict)


def test_a_batch_beyond_the_largest_bucket(
    classifier: Classifier, predict: PackedPredictor
) -> None:
    rows = ["card", "a refund", "transfer it"] * 350
    inputs = classifier.preprocessor(rows)
    few = predict({name: array[:3] for name, array in inputs.items()})
    np.testing.assert_allclose(predict(inputs), np.tile(few, (350, 1)), atol=1e-4)


def test_concurrent_calls(
    classifier: Classifier, predict: PackedPredictor, tiny_splits: Splits
) -> None:
    batches = [classifier.preprocessor(tiny_splits.train.rows[at : at + 3]) for at in range(12)]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(predict, batches))
    for logits, batch in zip(found, batches, strict=True):
        np.testing.assert_allclose(logits, padded(classifier, batch), atol=1e-4)


def test_what_is_packed() -> None:
    ids = np.array([[7, 8, 9], [5, 0, 0]])
    arrays = pack(ids, np.array([[1, 1, 1], [1, 0, 0]], dtype=bool), Bucket(6, 3, 32))
    assert arrays["ids"].tolist() == [7, 8, 9, 5, 0, 0]
    assert arrays["places"].tolist() == [0, 1, 2, 0, 0, 0]
    assert arrays["ends"].tolist() == [0, 3, 4, 4]


def test_smallest_sufficient_bucket() -> None:
    assert bucket_of(np.array([3])) == Bucket(16, 4, 32)
    assert bucket_of(np.array([30, 40] * 3)) == Bucket(256, 32, 128)
    assert bucket_of(np.array([700])) == Bucket(768, 4, 700)


def test_large_batches_are_cut() -> None:
    assert row_slices(np.array([5])) == [slice(0, 1)]
    assert row_slices(np.full(ROWS[-1] + 1, 2)) == [slice(0, ROWS[-1]), slice(ROWS[-1], 1025)]
    long = row_slices(np.full(100, 512))
    assert [part.stop - part.start for part in long] == [64, 36]
    assert TOKENS[-1] == 64 * 512


def test_every_batch_of_a_server_has_a_captured_bucket() -> None:
    random = np.random.default_rng(0)
    reachable = reachable_buckets(max_rows=32, max_tokens=512, longest=128)
    found = {bucket_of(np.array([length])) for length in range(2, 129)}
    for rows in random.integers(1, 33, 3000):
        lengths = random.integers(2, 1 + min(128, random.integers(2, 129)), rows)
        if len(lengths) == 1 or lengths.sum() <= 512:
            found.add(bucket_of(lengths))
    assert found <= set(reachable)
    assert len(reachable) < 40
    assert reachable == sorted(reachable, reverse=True)
    assert reachable_buckets(1, 1, 16) == [Bucket(16, 4, 32)]


def test_variant_on_the_cpu(exported: Callable[..., Path], tiny_splits: Splits) -> None:
    loaded = load_variant(exported(Packed("bf16")), threads=1)
    inputs = loaded.preprocessor(tiny_splits.test.rows)
    reference = padded(load_classifier(str(exported(Packed("bf16")))), inputs)
    np.testing.assert_allclose(loaded.predict(inputs), reference, atol=0.25)


@pytest.mark.parametrize(
    ("config", "side", "problem"),
    [
        (ResNetConfig(), "right", "runs BERT only, and the model type is resnet"),
        (BertConfig(is_decoder=True), "right", "the model is a decoder. Use cudagraphs"),
        (BertConfig(), "left", "rows are padded on the left. Use cudagraphs"),
        (
            BertConfig(hidden_size=60, num_attention_heads=5),
            "right",
            "attention heads are 12 wide. Use cudagraphs",
        ),
    ],
)
def test_other_models_are_refused(
    config: object, side: str, problem: str, classifier: Classifier
) -> None:
    preprocessor = copy.copy(classifier.preprocessor)
    preprocessor.padding_side = side
    with pytest.raises(VariantError, match=problem):
        check_packable(config, preprocessor)


def test_other_model_types_are_a_row_with_a_reason() -> None:
    variant = Packed("bf16", device="cuda")
    assert skip_reason(variant, "bert") == ""
    assert "packed runs models of the type bert only, and not resnet" in skip_reason(
        variant, "resnet"
    )


def test_fp32_has_no_kernel_on_a_gpu(tmp_path: Path) -> None:
    variant = Packed(device="cuda")
    assert variant.unsupported() == "skipped: packed-fp32 runs on the CPU only; use device=cpu"
    with pytest.raises(UnsupportedError, match="packed-fp32 runs on the CPU only; use device=cpu"):
        variant.load(tmp_path, device="cuda", threads=1)
