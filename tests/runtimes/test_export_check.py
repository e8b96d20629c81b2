"""Comparison of exports with eager fp32, on shapes other than that of the example."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from mlflow_pt_deploy.artifacts import write_variant
from mlflow_pt_deploy.data import Splits
from mlflow_pt_deploy.errors import VariantError
from mlflow_pt_deploy.models import Classifier, load_classifier
from mlflow_pt_deploy.models.text import TextClassifier
from mlflow_pt_deploy.runtimes import onnxruntime
from mlflow_pt_deploy.runtimes.base import Inputs, Logits, Predict
from mlflow_pt_deploy.runtimes.eager import Eager, torch_predict
from mlflow_pt_deploy.runtimes.export_check import TOLERANCE, Probes, check_int8
from mlflow_pt_deploy.runtimes.onnxruntime import FILE, OnnxRuntime
from mlflow_pt_deploy.runtimes.openvino import OpenVino
from mlflow_pt_deploy.runtimes.torchscript import TorchScript

ROWS = ["my card", "i want a refund please", "send money abroad"]


@pytest.fixture(scope="module")
def classifier(tiny_model: Path) -> Classifier:
    return load_classifier(str(tiny_model))


@pytest.fixture(scope="module")
def probes(classifier: Classifier) -> Probes:
    return Probes(classifier, ROWS)


@pytest.fixture(scope="module")
def eager(classifier: Classifier) -> Predict:
    return torch_predict(classifier, "cpu")


def changed(eager: Predict, when: Callable[[Inputs], bool], change: Callable) -> Predict:
    """Eager, with changed logits for some batches."""

    def predict(inputs: Inputs) -> Logits:
        logits = eager(inputs)
        return change(logits.copy()) if when(inputs) else logits

    return predict


def longest(inputs: Inputs) -> int:
    return inputs["input_ids"].shape[1]


def rows(inputs: Inputs) -> int:
    return len(inputs["input_ids"])


def nan_first(logits: Logits) -> Logits:
    logits[0] = np.nan
    return logits


def shifted(logits: Logits) -> Logits:
    logits[:, 0] += 8
    return logits


@pytest.mark.parametrize("precision", TOLERANCE)
def test_eager_passes(probes: Probes, eager: Predict, precision: str) -> None:
    probes.check(eager, precision)


@pytest.mark.parametrize("precision", TOLERANCE)
@pytest.mark.parametrize(
    ("when", "change", "reason"),
    [
        (lambda x: longest(x) == 128, nan_first, "NaN for rows of 2 and 128 tokens in one batch"),
        (
            lambda x: longest(x) > 100,
            shifted,
            "for rows of 2 and 128 tokens in one batch they",
        ),
        (lambda x: longest(x) == 2, shifted, r"for a row of 2 tokens they differ by \d"),
        (
            lambda x: rows(x) > 5,
            shifted,
            "for rows of 2, 3, 5, 7, 10 and 13 tokens in one batch they differ by",
        ),
        (lambda x: rows(x) == 3, lambda found: found[:2], r"shape is \(2, 3\) instead of \(3, 3\)"),
    ],
)
def test_errors_of_some_batches_are_found_in_every_precision(
    probes: Probes, eager: Predict, precision: str, when: Callable, change: Callable, reason: str
) -> None:
    with pytest.raises(VariantError, match=f"the logits differ from eager: .*{reason}"):
        probes.check(changed(eager, when, change), precision)


def test_dependence_on_other_rows_is_found(probes: Probes, eager: Predict) -> None:
    def noisy(inputs: Inputs) -> Logits:
        logits = eager(inputs)
        logits[:, 0] += 1 if rows(inputs) == 1 else -1  # within the tolerance of int8
        return logits

    with pytest.raises(VariantError, match=r"tokens in one batch they change in a batch by"):
        probes.check(noisy, "int8-static")


def test_failing_batch_is_named(probes: Probes, eager: Predict) -> None:
    def fails(inputs: Inputs) -> Logits:
        if longest(inputs) != 2:
            raise RuntimeError("Exception from src/x.cpp:3:\nthe length is 2\n")
        return eager(inputs)

    with pytest.raises(
        VariantError, match=r"^the variant fails on a row of 3 tokens: the length is 2$"
    ):
        probes.check(fails, "fp32")


def test_model_that_returns_nan_is_rejected(classifier: Classifier) -> None:
    broken = load_classifier(classifier.network.config.name_or_path)
    with torch.no_grad():
        broken.network.classifier.bias[0] = torch.nan
    with pytest.raises(VariantError, match="the model itself returns NaN for a row of 2 tokens"):
        Probes(broken, ROWS)


def test_images_are_checked_in_several_batch_sizes(tiny_resnet: Path, image_splits: Splits) -> None:
    model = load_classifier(str(tiny_resnet))
    images, eager = Probes(model, image_splits.validation.rows), torch_predict(model, "cpu")
    images.check(eager, "fp32")

    def one_batch_size(inputs: Inputs) -> Logits:
        return eager({"pixel_values": inputs["pixel_values"][:2].repeat(3, 0)[:5]})

    with pytest.raises(VariantError, match=r"one image their shape is \(3, 3\)"):
        images.check(one_batch_size, "fp32")


@dataclass(frozen=True)
class OneLength(TorchScript):
    """An export with the fixed length of its example."""

    def export(self, module, example, calibration, folder) -> None:
        class Cut(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.module = module

            def forward(self, ids, mask):
                length = example["input_ids"].shape[1]
                return self.module(ids[:, :length], mask[:, :length])

        super().export(Cut().eval(), example, calibration, folder)


def test_variant_that_differs_is_not_written(classifier: Classifier, tmp_path: Path) -> None:
    example = classifier.preprocessor(ROWS)
    with pytest.raises(VariantError, match="the logits differ from eager: for a row of 10 tokens"):
        write_variant(
            OneLength(), classifier, tmp_path / "v", model="m", example=example, golden_rows=ROWS
        )
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def windowed(classifier: Classifier) -> Classifier:
    """ModernBERT; padding 8 tokens after the end of a short row attends only to padding."""
    from transformers import ModernBertConfig, ModernBertForSequenceClassification

    assert isinstance(classifier, TextClassifier)
    torch.manual_seed(0)
    config = ModernBertConfig(
        vocab_size=len(classifier.tokenizer),
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=256,
        local_attention=8,
        initializer_range=0.3,
        pad_token_id=0,
        num_labels=3,
        reference_compile=False,
    )
    network = ModernBertForSequenceClassification(config).eval()
    return TextClassifier(network, classifier.tokenizer).eval()


def test_openvino_with_padding_beyond_an_attention_window(
    windowed: Classifier, tmp_path: Path
) -> None:
    example = windowed.preprocessor(ROWS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        OpenVino().export(windowed, example, [], tmp_path)
    predict = OpenVino().load(tmp_path, device="cpu", threads=1)
    Probes(windowed, ROWS).check(predict, "fp32")


@pytest.mark.parametrize(
    ("quantized", "total", "min_share", "rejected"),
    [
        (0, 38, 0.5, True),
        (18, 38, 0.5, True),
        (19, 38, 0.5, False),
        (1, 38, 0, False),
        (0, 38, 0, True),
        (0, 0, 0.5, True),
    ],
)
def test_required_share_of_int8(
    quantized: int, total: int, min_share: float, rejected: bool
) -> None:
    if not rejected:
        check_int8(quantized, total, min_share=min_share)
        return
    message = f"^only {quantized} of {total} weight matrices are int8"
    with pytest.raises(VariantError, match=message):
        check_int8(quantized, total, min_share=min_share)


@pytest.mark.parametrize("kind", ["constants", "shared"])
def test_weights_in_constant_and_identity_nodes_become_int8(
    classifier: Classifier, tmp_path: Path, kind: str
) -> None:
    """PyTorch exports shared weights, as in ALBERT, as one initializer and ``Identity`` nodes."""
    path = tmp_path / FILE
    onnxruntime._to_onnx(classifier, classifier.preprocessor(ROWS), path)
    model = onnx.load(str(path))
    graph = model.graph
    nodes = []
    for tensor in [each for each in graph.initializer if len(each.dims) == 2]:
        name = f"{tensor.name}.source"
        if kind == "constants":
            nodes.append(onnx.helper.make_node("Constant", [], [tensor.name], value=tensor))
            graph.initializer.remove(tensor)
        else:
            nodes.append(onnx.helper.make_node("Identity", [name], [tensor.name]))
            tensor.name = name
    kept = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *kept])
    onnx.save(model, str(path))
    onnxruntime._name_weights(path)
    onnxruntime._quantize(path)
    assert onnxruntime._int8_products(path) == (14, 14)
    predict = OnnxRuntime("int8-dynamic").load(tmp_path, device="cpu", threads=1)
    Probes(classifier, ROWS).check(predict, "int8-dynamic")


@pytest.mark.parametrize("variant", [Eager("int8-dynamic"), TorchScript("int8-dynamic")])
def test_layers_that_pytorch_does_not_quantize(
    classifier: Classifier, tmp_path: Path, variant: Eager | TorchScript
) -> None:
    """The layers of GPT-2 are `Conv1D`, not `torch.nn.Linear`."""
    from transformers import GPT2Config, GPT2ForSequenceClassification

    assert isinstance(classifier, TextClassifier)
    config = GPT2Config(
        vocab_size=len(classifier.tokenizer),
        n_positions=64,
        n_embd=16,
        n_layer=1,
        n_head=2,
        pad_token_id=0,
    )
    model = TextClassifier(GPT2ForSequenceClassification(config).eval(), classifier.tokenizer)
    with pytest.raises(VariantError, match="^only 1 of 5 weight matrices are int8"):
        variant.export(model, model.preprocessor(ROWS), [], tmp_path)
