"""Integrated gradients of tiny networks, by Captum."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tiny import models as tiny

from mlflow_pt_deploy.artifacts import LoadedVariant, load_variant
from mlflow_pt_deploy.artifacts.writing import write_variant
from mlflow_pt_deploy.errors import MissingExtraError, UnsupportedError
from mlflow_pt_deploy.explanation.explainer import Explainer
from mlflow_pt_deploy.explanation.integrated_gradients import METHOD
from mlflow_pt_deploy.models import load_classifier
from mlflow_pt_deploy.runtimes.base import Logits
from mlflow_pt_deploy.runtimes.eager import Eager
from mlflow_pt_deploy.runtimes.numpy_static import NumPy

TEXT = "please help me with my card, today"


@pytest.fixture
def captum() -> None:
    pytest.importorskip("captum", reason="captum is not installed: the extra explain")


def never(rows: object) -> Logits:
    raise AssertionError("gradients need no other rows")


def variant(folder: Path, reference: str) -> LoadedVariant:
    classifier = load_classifier(reference)
    write_variant(
        Eager(),
        classifier,
        folder,
        model="teacher",
        example=classifier.preprocessor(["play", "play some"]),
        calibration=[],
        golden_rows=["play"],
    )
    return load_variant(folder, threads=1)


def test_values_sum_to_the_difference_of_the_logits(captum: None, eager_variant: Path) -> None:
    loaded = load_variant(eager_variant, threads=1)
    explainer = Explainer(loaded, METHOD)
    logits = loaded.logits([TEXT])[0]
    logits -= logits.mean()
    for label, logit in zip(loaded.labels, logits, strict=True):
        found = explainer.explain(TEXT, label, never)
        total = sum(each["value"] for each in found["contributions"])
        assert found["method"] == METHOD
        assert found["logit"] == pytest.approx(logit, abs=1e-4)
        assert found["base"] + total + found["delta"] == pytest.approx(logit, abs=1e-3)
        assert abs(found["delta"]) < 0.02 * max(1, abs(logit - found["base"]))
    found = explainer.explain(TEXT, "card", never)
    best = max(found["contributions"], key=lambda each: each["value"])
    assert TEXT[best["start"] : best["end"]] == "card"


@pytest.mark.parametrize("text", ["", "card " * 200])
def test_empty_and_truncated_texts(captum: None, eager_variant: Path, text: str) -> None:
    found = Explainer(load_variant(eager_variant), METHOD).explain(text, "card", never)
    assert found["truncated"] == bool(text)
    assert len(found["contributions"]) == (126 if text else 0)
    assert abs(found["delta"]) < 0.05 * max(1, abs(found["logit"] - found["base"]))


@pytest.mark.parametrize(
    ("architecture", "config"),
    [
        ("RobertaForSequenceClassification", {**tiny.SMALL, **tiny.ROBERTA}),
        ("GPT2ForSequenceClassification", {"n_embd": 16, "n_layer": 2, "n_head": 2}),
    ],
)
def test_other_architectures(
    captum: None, architecture: str, config: dict[str, int], tmp_path: Path
) -> None:
    tokenizer = tiny.plain("<pad>") if "GPT2" in architecture else tiny.pieces()
    config = {**config, "pad_token_id": tokenizer.pad_token_id}
    reference = tiny.save(tmp_path / "model", architecture, tokenizer, **config)
    loaded = variant(tmp_path / "variant", reference)
    text = "play some jazz"
    found = Explainer(loaded, METHOD).explain(text, "good", never)
    logits = loaded.logits([text])[0]
    assert found["logit"] == pytest.approx(logits[1] - logits.mean(), abs=1e-4)
    assert abs(found["delta"]) < 1e-2
    assert [text[at["start"] : at["end"]] for at in found["contributions"]] == text.split()


def test_a_check_stops_the_passes(captum: None, eager_variant: Path) -> None:
    def stop() -> None:
        raise TimeoutError

    with pytest.raises(TimeoutError):
        Explainer(load_variant(eager_variant), METHOD).explain(TEXT, "card", never, stop)


def test_captum_missing_names_the_extra(
    eager_variant: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [*sys.modules, "captum"]:
        if name.partition(".")[0] == "captum":
            monkeypatch.setitem(sys.modules, name, None)
    loaded = load_variant(eager_variant)
    with pytest.raises(MissingExtraError, match=r"captum is not installed.*\[explain\]"):
        Explainer(loaded, METHOD)


def test_variants_without_gradients_are_refused(
    exported: Callable[..., Path], eager_variant: Path
) -> None:
    eager = load_variant(eager_variant)
    half = replace(eager, manifest=replace(eager.manifest, precision="bf16"))
    for loaded in (load_variant(exported(NumPy(), "static")), half):
        with pytest.raises(UnsupportedError, match="has no gradients.*explain_method=auto"):
            Explainer(loaded, METHOD)


def test_a_network_that_takes_no_embeddings_is_refused(
    captum: None, exported: Callable[..., Path]
) -> None:
    loaded = load_variant(exported(Eager(), "static"))
    with pytest.raises(UnsupportedError, match="takes embeddings, and Static"):
        Explainer(loaded, METHOD)
