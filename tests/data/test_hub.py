"""Hub data sets: names, columns, and the missing library."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from mlflow_pt_deploy.data import load_data
from mlflow_pt_deploy.data.hub import input_column, splits_from_hub
from mlflow_pt_deploy.errors import DataError, MissingExtraError


@pytest.mark.parametrize("spec", ["hf:", "hf:imdb", "hf:a/b/c", "hf:a/b:", "hf:a b/c", "hf:/c"])
def test_invalid_name(spec: str) -> None:
    with pytest.raises(DataError, match="is not a valid hub data set. Give hf:OWNER/NAME or"):
        load_data(spec)


@pytest.mark.parametrize("spec", ["hf:stanfordnlp/imdb", "hf:nyu-mll/glue:sst2"])
def test_missing_library_names_the_extra(spec: str) -> None:
    if importlib.util.find_spec("datasets"):
        pytest.skip("datasets is installed, and tests use no network")
    with pytest.raises(MissingExtraError, match=r"pip install 'mlflow-pt-deploy\[hub\]'"):
        load_data(spec)


@pytest.mark.parametrize(
    ("kinds", "column"),
    [
        ({"text": "string"}, "text"),
        ({"title": "string", "text": "large_string"}, "text"),
        ({"idx": "int32", "sentence": "string"}, "sentence"),
        ({"title": "large_string"}, "title"),
        ({"content": "string", "stars": "float32"}, "content"),
    ],
)
def test_input_column(kinds: dict[str, str], column: str) -> None:
    assert input_column("train", kinds) == column


@pytest.mark.parametrize(
    "kinds", [{}, {"title": "string", "content": "string"}, {"id": "string"}, {"text": "int64"}]
)
def test_missing_or_ambiguous_input_column(kinds: dict[str, str]) -> None:
    with pytest.raises(DataError, match="train has no column `text` or `image`, and not exactly"):
        input_column("train", kinds)


def test_image_column() -> None:
    assert input_column("train", {"image": "PIL.Image.Image"}) == "image"
    assert input_column("train", {"image": "PIL.Image.Image", "text": "string"}) == "text"


def hub_dataset(labels: list[int | None], names: list[str]) -> Any:
    datasets = pytest.importorskip("datasets", reason="needs the extra `hub`")
    label = datasets.ClassLabel(names=names)
    features = datasets.Features({"sentence": datasets.Value("string"), "label": label})
    rows = {"sentence": [f"row {n}" for n in range(len(labels))], "label": labels}
    return datasets.Dataset.from_dict(rows, features=features)


def test_class_labels_become_names_and_hidden_test_labels_are_not_used() -> None:
    loaded = {
        "train": hub_dataset([0, 1] * 20, ["negative", "positive"]),
        "dev": hub_dataset([1, 0], ["negative", "positive"]),
        "test": hub_dataset([-1, -1], ["negative", "positive"]),
    }
    splits = splits_from_hub(loaded, source="hf:nyu-mll/glue:sst2", seed=0)
    assert (splits.name, splits.labels) == ("glue-sst2", ("negative", "positive"))
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (32, 2, 8)
    assert splits.validation.targets.tolist() == [1, 0]
    assert "the test split has no labels on the hub and is not used" in splits.notes


def test_row_without_a_label() -> None:
    loaded = {"train": hub_dataset([0, 1, -1, None], ["a", "b"])}
    with pytest.raises(DataError, match=r"`label` is missing or blank in 2 rows \(row 3, 4;"):
        splits_from_hub(loaded, source="hf:a/b", seed=0)


def test_no_train_split() -> None:
    with pytest.raises(DataError, match="hf:a/b has no train split; it has unsupervised"):
        splits_from_hub({"unsupervised": None}, source="hf:a/b", seed=0)
