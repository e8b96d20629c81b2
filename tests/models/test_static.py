"""Static student: forward pass, initialization, saving and training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mlflow_pt_deploy.data import Splits
from mlflow_pt_deploy.errors import ModelError
from mlflow_pt_deploy.model_types import STATIC
from mlflow_pt_deploy.models import Classifier, load_classifier, new_static, save_classifier
from mlflow_pt_deploy.models.static import PRIMES, StaticConfig
from mlflow_pt_deploy.training.distillation import distillation_loss, start_student
from mlflow_pt_deploy.training.inference import evaluate, predict_logits
from mlflow_pt_deploy.training.optimization import Schedule
from mlflow_pt_deploy.training.trainer import fit

ROWS = ("my card", "i want a refund please", "", "send")


@pytest.fixture
def teacher(tiny_model: Path) -> Classifier:
    return load_classifier(str(tiny_model))


@pytest.fixture
def static(tiny_static: Path) -> Classifier:
    return load_classifier(str(tiny_static))


def expected_logits(static: Classifier, ids: list[int]) -> np.ndarray:
    """Logits of one row without padding, float64, computed with loops."""
    weights = {name: w.double().numpy() for name, w in static.network.state_dict().items()}
    config = static.network.config
    total = np.zeros(config.hidden_size)
    for start in range(len(ids)):
        for size in range(1, config.ngrams + 1):
            gram = ids[start : start + size]
            if len(gram) < size:
                continue
            if size == 1:
                total += weights["pieces.weight"][gram[0]]
            else:
                code = sum(token * prime for token, prime in zip(gram, PRIMES, strict=False))
                total += weights["grams.weight"][code % config.buckets]
    normal = (total - total.mean()) / np.sqrt(total.var() + static.network.norm.eps)
    normal = normal * weights["norm.weight"] + weights["norm.bias"]
    hidden = np.maximum(weights["hidden.weight"] @ normal + weights["hidden.bias"], 0)
    return weights["classifier.weight"] @ hidden + weights["classifier.bias"]


@pytest.mark.parametrize("row", ROWS)
def test_logits(static: Classifier, row: str) -> None:
    (ids,) = static.preprocessor.encode([row])
    (logits,) = predict_logits(static, [row])
    assert logits == pytest.approx(expected_logits(static, ids), abs=1e-4)


def test_word_order_matters_through_ngrams_only(static: Classifier) -> None:
    forward, backward = predict_logits(static, ["refund my card", "card my refund"])
    assert np.abs(forward - backward).max() > 1e-4
    static.network.grams.weight.data.zero_()
    forward, backward = predict_logits(static, ["refund my card", "card my refund"])
    assert np.abs(forward - backward).max() < 1e-5


def test_initialization_from_hidden_states_of_the_teacher(teacher: Classifier) -> None:
    student = start_student(teacher, 0, rows=["my card"], frequent=20)
    assert student.network.config.model_type == STATIC == StaticConfig.model_type
    embeddings = teacher.network.bert.embeddings.word_embeddings.weight
    pieces = student.network.pieces.weight
    begin, *_, end = ids = teacher.preprocessor.encode(["my card"])[0]
    known = {*range(20), *ids}
    assert set(pieces.any(dim=1).nonzero().flatten().tolist()) == known
    card, money = (
        teacher.network.bert(torch.tensor([[begin, piece, end]])).last_hidden_state[0, 1]
        for piece in ids[1:3]
    )
    ratio = (pieces[ids[1]] - pieces[ids[2]]) / (card - money)
    assert ratio.mean() > 0
    assert ratio.std() < 1e-4 * ratio.mean()  # same shift and scale for all
    assert pieces[sorted(known)].std().item() == pytest.approx(embeddings.std().item(), rel=1e-4)
    assert not student.network.grams.weight.any()  # unseen n-grams have no effect
    assert student.labels == teacher.labels
    student.network.pieces.weight.data.zero_()
    assert embeddings.any()


def test_save_and_load(static: Classifier, tmp_path: Path) -> None:
    save_classifier(static, tmp_path / "static")
    loaded = load_classifier(str(tmp_path / "static"))
    assert (predict_logits(loaded, ROWS) == predict_logits(static, ROWS)).all()
    assert loaded.network.config.ngrams == 3


@pytest.mark.parametrize("ngrams", [0, 4])
def test_ngrams_out_of_range(teacher: Classifier, ngrams: int) -> None:
    with pytest.raises(ModelError, match=f"ngrams {ngrams}: choose from 1 to 3"):
        new_static(teacher, ngrams=ngrams)


def test_training_on_soft_labels(teacher: Classifier, tiny_splits: Splits) -> None:
    torch.manual_seed(0)
    answers = predict_logits(teacher, tiny_splits.train.rows)
    student = start_student(teacher, 0)
    torch.nn.init.zeros_(student.network.classifier.weight)
    assert evaluate(student, tiny_splits.test) == pytest.approx(1 / 3)  # always the same prediction
    loss = distillation_loss(answers, tiny_splits.train.targets)
    fit(student, tiny_splits, loss, Schedule(epochs=6, batch_size=10))
    assert evaluate(student, tiny_splits.test) > 0.9


def test_default_batch_size_and_learning_rate(teacher: Classifier, static: Classifier) -> None:
    chosen = Schedule().resolved(teacher)
    assert (chosen.batch_size, chosen.learning_rate) == (32, 2e-4)
    chosen = Schedule().resolved(static)
    assert (chosen.batch_size, chosen.learning_rate) == (128, 2e-3)
    given = Schedule(batch_size=5, learning_rate=0.1)
    assert given.resolved(static) == given


def test_static_teacher(static: Classifier) -> None:
    with pytest.raises(ModelError, match="^the teacher is a static student itself"):
        start_student(static, 0)
