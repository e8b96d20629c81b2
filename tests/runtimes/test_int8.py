"""Int8 variants: quantized operators, accuracy control, and variants on request."""

from __future__ import annotations

import copy
import random
import tempfile
import warnings
from collections import Counter
from itertools import permutations
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
from conftest import FILLERS, KEYWORDS

from mlflow_pt_deploy.data import Splits
from mlflow_pt_deploy.errors import VariantError
from mlflow_pt_deploy.models import Classifier, load_classifier
from mlflow_pt_deploy.runtimes.aotinductor import AOTInductor
from mlflow_pt_deploy.runtimes.base import Variant
from mlflow_pt_deploy.runtimes.catalog import ON_REQUEST, VARIANTS, select
from mlflow_pt_deploy.runtimes.eager import Eager
from mlflow_pt_deploy.runtimes.onnxruntime import OnnxRuntime
from mlflow_pt_deploy.runtimes.openvino import OpenVino
from mlflow_pt_deploy.training.inference import predict_logits


@pytest.fixture(scope="module")
def classifier(tiny_model: Path) -> Classifier:
    return load_classifier(str(tiny_model))


def export(variant: Variant, classifier: Classifier, rows: list[str], folder: Path) -> None:
    batches = [classifier.preprocessor([row]) for row in rows]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        variant.export(classifier, classifier.preprocessor(["a", "my card"]), batches, folder)


@pytest.mark.parametrize("precision", ["fp32", "int8-dynamic", "int8-static"])
def test_onnxruntime_does_not_use_the_slow_fusions(
    classifier: Classifier,
    tiny_splits: Splits,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
) -> None:
    variant = OnnxRuntime(precision)
    export(variant, classifier, tiny_splits.train.rows[:16], tmp_path)
    executed = tmp_path / "executed.onnx"
    original = onnxruntime.InferenceSession

    def session(path: str, options: onnxruntime.SessionOptions, **settings: object) -> object:
        options.optimized_model_filepath = str(executed)
        return original(path, options, **settings)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    variant.load(tmp_path, device="cpu", threads=1)
    kinds = Counter(node.op_type for node in onnx.load(executed).graph.node)
    assert kinds["LayerNormalization"] == 5, "two per layer and one for the embeddings"
    assert kinds["Gelu"] == 2
    assert not kinds.keys() & {"SkipLayerNormalization", "BiasGelu"}


def test_onnxruntime_quantizes_products_with_weights_only(
    classifier: Classifier,
    tiny_splits: Splits,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, scratch = tmp_path / "variant", tmp_path / "scratch"
    folder.mkdir(), scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    export(OnnxRuntime("int8-static"), classifier, tiny_splits.train.rows[:16], folder)
    assert [path.name for path in folder.iterdir()] == ["model.onnx"]
    assert not list(scratch.iterdir())

    graph = onnx.load(folder / "model.onnx").graph
    dequantized = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    integer, float_ = Counter(), Counter()
    for node in graph.node:
        inputs = list(node.input[:1] if node.op_type == "Gather" else node.input[:2])
        kind = integer if set(inputs) <= dequantized else float_
        kind[node.op_type] += 1
    # Two layers of query, key, value, output and two feed-forward; pooler and head.
    assert integer["MatMul"] + integer["Gemm"] == 2 * 6 + 2
    assert float_["Gemm"] == 0
    assert float_["MatMul"] == 2 * 2  # attention's two products of activations
    assert integer["Gather"] == 3  # words, positions, segments
    weights = {tensor.name: tensor for tensor in graph.initializer}
    assert not any(
        tensor.data_type == onnx.TensorProto.FLOAT and len(tensor.dims) == 2
        for tensor in weights.values()
    )


def nearly_ambiguous(classifier: Classifier) -> list[str]:
    """64 rows with words of two labels, whose label int8 errors can change."""
    draw = random.Random(0)
    rows = [
        " ".join(
            [
                *draw.sample(FILLERS, draw.randint(1, 6)),
                draw.choice(first),
                *draw.sample(FILLERS, draw.randint(0, 3)),
                draw.choice(second),
            ]
        )
        for first, second in permutations(KEYWORDS.values(), 2)
        for _ in range(50)
    ]
    best = np.sort(predict_logits(classifier, rows), axis=1)
    margins = best[:, 2] - best[:, 1]
    return [rows[i] for i in np.argsort(margins) if margins[i] > 0.05][:64]


def test_accuracy_control_reverts_layers_until_labels_agree(
    classifier: Classifier, tmp_path: Path
) -> None:
    rows = nearly_ambiguous(classifier)
    expected = predict_logits(classifier, rows[1::2]).argmax(axis=1)  # the held-out half
    quantizers, agreement = [], []
    for max_drop in (1.0, 0.0):
        folder = tmp_path / str(max_drop)
        folder.mkdir()
        variant = OpenVino("int8-accuracy", max_drop=max_drop)
        export(variant, classifier, rows, folder)
        nodes = openvino.Core().read_model(str(folder / "model.xml")).get_ops()
        quantizers.append(sum(node.get_type_name() == "FakeQuantize" for node in nodes))
        predict = variant.load(folder, device="cpu", threads=1)
        actual = [predict(classifier.preprocessor([row]))[0].argmax() for row in rows[1::2]]
        agreement.append((actual == expected).mean())
    assert agreement[0] < 1 == agreement[1]
    assert quantizers[0] > quantizers[1]


def test_unreachable_max_drop(classifier: Classifier, tiny_splits: Splits, tmp_path: Path) -> None:
    variant, shallow = OpenVino("int8-accuracy", max_drop=-0.1), copy.deepcopy(classifier)
    del shallow.network.bert.encoder.layer[1:]  # reverting a layer takes seconds
    message = r"label of 0.0% of 8 held-out rows changes, the limit is -10.0%. Increase max_drop"
    with pytest.raises(VariantError, match=message):
        export(variant, shallow, tiny_splits.train.rows[:16], tmp_path)
    assert not list(tmp_path.iterdir())


def test_variants_on_request_must_be_named() -> None:
    assert select("")[: len(VARIANTS)] == VARIANTS
    assert not set(select("")) & set(ON_REQUEST)
    assert not set(VARIANTS) & set(ON_REQUEST)
    assert set(select("openvino,aotinductor")) & set(ON_REQUEST) == set()
    assert select("openvino-int8-accuracy") == (Eager("fp32"), OpenVino("int8-accuracy"))
    assert select("aotinductor-int8-static, eager-bf16") == (
        Eager("fp32"),
        Eager("bf16"),
        AOTInductor("int8-static"),
    )
    with pytest.raises(
        VariantError, match=r"unknown int8; choose from .*openvino-fp32, openvino-int8-accuracy, "
    ):
        select("int8")
