"""Models of other tasks are rejected before their weights are loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers
from tiny import models
from tiny.models import LABELS, SMALL

from mlflow_pt_deploy.errors import ModelError
from mlflow_pt_deploy.models import load_classifier, new_classifier
from mlflow_pt_deploy.training.inference import predict_logits

SUPPORTED = "only single-label classification of one text or one image is supported"
TWO = ["no", "yes"]


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy to modify."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def change(folder: Path, name: str = "config.json", **changes: Any) -> str:
    """Change keys of a JSON file or create it; None removes a key."""
    path = folder / name
    found = json.loads(path.read_text(encoding="utf8")) if path.exists() else {}
    found = {key: it for key, it in {**found, **changes}.items() if it is not None}
    path.write_text(json.dumps(found), encoding="utf8")
    return str(folder)


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("BertForTokenClassification", "token classification"),
        ("BertForQuestionAnswering", "question answering"),
        ("BertForMultipleChoice", "multiple choice"),
        ("T5ForConditionalGeneration", "text-to-text generation"),
        ("CLIPModel", "zero shot image classification"),
        ("DetrForObjectDetection", "object detection"),
        ("SegformerForSemanticSegmentation", "semantic segmentation"),
        ("Wav2Vec2ForSequenceClassification", "audio classification"),
        ("Wav2Vec2ForCTC", "speech recognition"),
        ("VideoMAEForVideoClassification", "video classification"),
        ("LlavaForConditionalGeneration", "image text to text"),
        ("PatchTSTForRegression", "time series regression"),
        ("MyBertForStarRating", "star rating"),
    ],
)
def test_task_of_the_architecture(folder: Path, architecture: str, task: str) -> None:
    (folder / "model.safetensors").unlink()  # the weights are not needed
    change(folder, architectures=[architecture])
    with pytest.raises(ModelError, match=rf"is a model for {task} \({architecture}\); {SUPPORTED}"):
        load_classifier(str(folder))


@pytest.mark.parametrize(
    "architecture", ["BertModel", "BertForMaskedLM", "BertForPreTraining", "BertLMHeadModel"]
)
def test_pretrained_network_without_a_head(folder: Path, architecture: str) -> None:
    change(folder, architectures=[architecture])
    with pytest.raises(ModelError, match=f"not trained as a classifier.*{architecture}.*Fine-tune"):
        load_classifier(str(folder))


@pytest.mark.parametrize(
    ("changes", "task"),
    [
        ({"problem_type": "multi_label_classification"}, "multi-label classification"),
        ({"problem_type": "regression"}, r"regression, .*\(problem_type\)"),
        ({"id2label": {"0": "LABEL_0"}}, r"regression, scores or text pairs \(one output\)"),
        ({"id2label": {"0": "contradiction", "1": "entailment"}}, "text pairs"),
        ({"id2label": {"0": "Not_Entailment", "1": "Entailment"}}, "text pairs"),
        ({"sentence_transformers": {"version": "5"}}, "text pairs .a cross-encoder"),
    ],
)
def test_task_of_the_outputs(folder: Path, changes: dict[str, Any], task: str) -> None:
    with pytest.raises(ModelError, match=f"is a model for {task}.*; {SUPPORTED}"):
        load_classifier(change(folder, **changes))


def test_sentence_embeddings(folder: Path) -> None:
    change(folder, architectures=["BertModel"])
    change(folder, "modules.json")
    with pytest.raises(ModelError, match="is a model for sentence embeddings .*Fine-tune it first"):
        load_classifier(str(folder))
    assert new_classifier(str(folder), TWO).labels == tuple(TWO)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adapter_config.json", "is a PEFT adapter .*merge_and_unload"),
        ("model_index.json", "is a diffusers pipeline"),
    ],
)
@pytest.mark.parametrize("load", [load_classifier, lambda it: new_classifier(it, TWO)])
def test_formats_of_other_libraries(folder: Path, load: Any, name: str, message: str) -> None:
    change(folder, name)
    with pytest.raises(ModelError, match=message):
        load(str(folder))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model-q4.gguf", r"contains GGUF .llama.cpp. and no transformers model"),
        ("model.onnx", "contains ONNX and no transformers model"),
        ("pipeline.pkl", "contains pickle and no transformers model"),
        ("MLmodel", "is an MLflow model folder. Give its URI"),
        (
            "checkpoint-500/config.json",
            "but its subfolder checkpoint-500 has one. Give that folder",
        ),
        ("readme.txt", "it has no config.json"),
    ],
)
def test_folder_without_a_config(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    with pytest.raises(ModelError, match=message):
        load_classifier(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": None}, "has no model_type"),
        ({"model_type": None, "architecture": "resnet18"}, "is a timm model"),
        ({"quantization_config": {"quant_method": "gptq"}}, "is already quantized"),
        ({"id2label": {"0": "a", "1": "b", "2": "a"}}, "has the name 'a' twice"),
        ({"id2label": {"1": "a", "2": "b", "3": "c"}}, "does not number the outputs 0, 1, 2"),
        ({"id2label": {"0": "a", "1": "b"}}, "has 2 labels, and the weights have 3 outputs"),
        ({"num_hidden_layers": 1}, "weights have more layers than its config.json"),
        ({"num_hidden_layers": 3}, r"its weights do not match .*bert.encoder.layer.2"),
        ({"intermediate_size": 48}, "its weights do not match its config.json"),
        ({"hidden_act": "nothing"}, "no classifier can be loaded"),
        ({"num_attention_heads": "many"}, "no classifier can be loaded"),
    ],
)
def test_invalid_config(folder: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_classifier(change(folder, **changes))


@pytest.mark.parametrize("name", ["tokenizer_config.json", "config.json"])
def test_models_with_code(folder: Path, name: str) -> None:
    change(folder, name, auto_map={"AutoTokenizer": ["mine.Tokenizer", None]})
    with pytest.raises(ModelError, match=f"needs its own Python code .{name} has auto_map"):
        load_classifier(str(folder))


@pytest.mark.parametrize("content", [b"", b"[]", b'{"model_type": "bert",', b"\xff\xfe"])
def test_damaged_config(folder: Path, content: bytes) -> None:
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match="config.json (is damaged|does not contain a JSON object)"):
        load_classifier(str(folder))


def test_other_head_with_the_same_weight_names(tmp_path: Path) -> None:
    """ModernBERT's token and text classification heads have the same weight names."""
    ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2}
    ids |= {"cls_token_id": 0, "sep_token_id": 2}
    reference = models.save(
        tmp_path, "ModernBertForTokenClassification", models.pieces(), **SMALL, **ids
    )
    with pytest.raises(ModelError, match="is a model for token classification"):
        load_classifier(reference)


def test_head_of_another_task_is_replaced(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    change(folder, architectures=["BertForTokenClassification"])
    classifier = new_classifier(str(folder), list(LABELS.values()))  # the same number of labels
    assert "was trained for token classification; its head is replaced" in caplog.text
    old = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    fresh = classifier.network
    assert (fresh.bert.pooler.dense.weight == old.bert.pooler.dense.weight).all()
    assert not (fresh.classifier.weight == old.classifier.weight).any()


def test_problem_type_of_a_new_head(folder: Path) -> None:
    change(folder, problem_type="multi_label_classification")
    classifier = new_classifier(str(folder), TWO)
    assert classifier.network.config.problem_type == "single_label_classification"


def test_architecture_without_a_classifier(folder: Path) -> None:
    change(folder, model_type="wav2vec2", architectures=["Wav2Vec2ForCTC"])
    with pytest.raises(ModelError, match="speech recognition .*Use a pretrained encoder"):
        new_classifier(str(folder), TWO)


def test_missing_weights_of_the_body(tmp_path: Path) -> None:
    """Only a head and the pooling before it may be missing."""
    tokenizer = models.words()
    reference = models.save(tmp_path / "mlm", "BertForMaskedLM", tokenizer, **SMALL)
    assert predict_logits(new_classifier(reference, TWO), ["jazz"]).shape == (1, 2)
    change(tmp_path / "mlm", num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"its weights do not match .*bert.encoder.layer.2"):
        new_classifier(reference, TWO)
