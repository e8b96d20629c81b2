"""Synthetic catalog: reproducible, marked as synthetic, neither trivial nor random."""

from __future__ import annotations

import numpy as np
import pytest

from mlflow_pt_deploy.data import Splits, load_data
from mlflow_pt_deploy.data.synthetic import TEST_ROWS, TRAIN_ROWS, VALIDATION_ROWS


@pytest.fixture(scope="module")
def catalog() -> Splits:
    return load_data("catalog")


def test_sizes_and_classes(catalog: Splits) -> None:
    sizes = (len(catalog.train), len(catalog.validation), len(catalog.test))
    assert sizes == (TRAIN_ROWS, VALIDATION_ROWS, TEST_ROWS) == (1000, 800, 400)
    assert len(catalog.labels) == 12
    assert np.bincount(catalog.train.targets).min() >= 50


def test_marked_as_synthetic(catalog: Splits) -> None:
    assert catalog.synthetic
    assert catalog.notes[0].startswith("synthetic: the product titles are generated")


def test_same_rows_on_every_machine(catalog: Splits) -> None:
    digests = (catalog.train.digest, catalog.validation.digest, catalog.test.digest)
    assert digests == ("5df8c5a0", "da23cb44", "19441265")
    assert load_data("catalog", seed=1).train.digest != digests[0]


def test_titles_are_unique(catalog: Splits) -> None:
    rows = [*catalog.train.rows, *catalog.validation.rows, *catalog.test.rows]
    assert len({row.casefold() for row in rows}) == len(rows)


def test_lengths_vary(catalog: Splits) -> None:
    words = [len(row.split()) for row in catalog.train.rows]
    assert min(words) == 2
    assert 25 <= max(words) <= 45


def test_limit_is_noted(catalog: Splits) -> None:
    small = load_data("catalog", limit=48)
    assert (len(small.train), len(small.validation), len(small.test)) == (48, 48, 48)
    assert small.labels == catalog.labels
    assert any(note.startswith("limited to 48 rows per split") for note in small.notes)


def test_accuracy_of_a_linear_model(catalog: Splits) -> None:
    sklearn_text = pytest.importorskip("sklearn.feature_extraction.text")
    sklearn_svm = pytest.importorskip("sklearn.svm")
    tfidf = sklearn_text.TfidfVectorizer(ngram_range=(1, 2))
    model = sklearn_svm.LinearSVC(random_state=0)
    model.fit(tfidf.fit_transform(catalog.train.rows), catalog.train.targets)
    predicted = model.predict(tfidf.transform(catalog.test.rows))
    assert 0.88 <= np.mean(predicted == catalog.test.targets) <= 0.95
