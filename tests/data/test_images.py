"""Rows that are images: sources of their bytes, and error messages."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from conftest import COLOURS, picture

from mlflow_pt_deploy.data import Splits, load_data
from mlflow_pt_deploy.data.hub import splits_from_hub
from mlflow_pt_deploy.errors import DataError
from mlflow_pt_deploy.models import load_classifier
from mlflow_pt_deploy.training.trainer import check_fit

SECRET = "patient-0042"
FILES = [picture("L", (8, 8), shade) for shade in range(8)]
TRUNCATED = picture("RGB", (90, 90), (1, 2, 3), "JPEG")[:-90]
LABELS = ["dark", "light"] * 4


def write(folder: Path, images: list[Any], labels: list[str] | None = None) -> str:
    for split in ("train", "validation", "test"):
        frame = pd.DataFrame({"image": images, "label": labels or LABELS[: len(images)]})
        frame.to_parquet(folder / f"{split}.parquet")
    return str(folder)


def write_files(folder: Path) -> list[str]:
    (folder / "pictures").mkdir()
    for number, file in enumerate(FILES):
        (folder / "pictures" / f"{number}.png").write_bytes(file)
    return [f"pictures/{number}.png" for number in range(len(FILES))]


def test_bytes_paths_and_structs_of_both(tmp_path: Path) -> None:
    paths = write_files(tmp_path)
    forms: list[list[Any]] = [
        FILES,
        paths,
        [{"bytes": file, "path": None} for file in FILES],
        [{"bytes": file, "path": "elsewhere.png"} for file in FILES],
        [{"bytes": None, "path": path} for path in paths],
    ]
    for images in forms:
        splits = load_data(write(tmp_path, images))
        assert splits.column == "image"
        assert splits.train.rows == tuple(FILES)
        assert splits.labels == ("dark", "light")


def test_csv_with_paths_of_images(tmp_path: Path) -> None:
    frame = pd.DataFrame({"image": write_files(tmp_path), "label": LABELS})
    frame.to_csv(tmp_path / "rows.csv", index=False)
    splits = load_data(str(tmp_path / "rows.csv"))
    assert {*splits.train.rows, *splits.validation.rows, *splits.test.rows} == set(FILES)


def test_path_of_a_missing_file(tmp_path: Path) -> None:
    message = r"train: `image` does not name a file in the folder .* in 1 row \(row 8; the first"
    paths = write_files(tmp_path)[:7]
    for name in (SECRET, SECRET * 1000, "pictures"):
        with pytest.raises(DataError, match=message) as caught:
            load_data(write(tmp_path, [*paths, name]))
        assert SECRET not in str(caught.value)


@pytest.mark.parametrize(
    ("image", "fault"),
    [
        (None, r"is missing or blank in 1 row \(row 8;"),
        (b"", r"is missing or blank in 1 row \(row 8;"),
        ({"bytes": None, "path": None}, r"is missing or blank in 1 row \(row 8;"),
    ],
)
def test_row_without_an_image(tmp_path: Path, image: Any, fault: str) -> None:
    rows = FILES[:7] if not isinstance(image, dict) else [{"bytes": it} for it in FILES[:7]]
    with pytest.raises(DataError, match=f"train: `image` {fault}"):
        load_data(write(tmp_path, [*rows, image]))


def test_pixels_instead_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="`image` is not the bytes of an image file in 4 rows"):
        load_data(write(tmp_path, [[0, 128, 255]] * 4))


def test_splits_with_different_input_columns(tmp_path: Path) -> None:
    spec = write(tmp_path, FILES)
    pd.DataFrame({"text": ["a"], "label": ["dark"]}).to_parquet(tmp_path / "test.parquet")
    with pytest.raises(DataError, match="different input columns in its files: image, text. Use"):
        load_data(spec)


@pytest.mark.parametrize(
    ("broken", "fault"),
    [
        (TRUNCATED, "is a damaged or truncated image; give the whole file"),
        (SECRET.encode(), "is not an image of a supported format; use one of JPEG, PNG,"),
        (picture("1", (6100, 6100), 0), "has 37,210,000 pixels; the limit is 36,000,000"),
    ],
    ids=["truncated", "text", "large"],
)
def test_invalid_image_is_reported_before_training(
    tmp_path: Path, tiny_resnet: Path, broken: bytes, fault: str
) -> None:
    splits = load_data(write(tmp_path, [*FILES[:5], broken, *FILES[6:]]))
    message = rf"^train: `image` {fault}.*, or remove the row \(row 6; the first row after"
    with pytest.raises(DataError, match=message) as caught:
        check_fit(load_classifier(str(tiny_resnet)), splits)
    assert SECRET not in str(caught.value)


def test_model_for_the_other_input_column(
    tiny_model: Path, tiny_resnet: Path, tiny_splits: Splits, image_splits: Splits
) -> None:
    for model, splits in ((tiny_model, image_splits), (tiny_resnet, tiny_splits)):
        with pytest.raises(DataError, match="the model reads a column `.*Choose another teacher"):
            check_fit(load_classifier(str(model)), splits)


def test_digits() -> None:
    splits = load_data("digits")
    assert (splits.name, splits.column) == ("digits", "image")
    assert splits.labels == tuple("0123456789")
    assert len(splits.train) + len(splits.validation) + len(splits.test) == 1797
    assert not splits.synthetic
    assert all(row.startswith(b"\x89PNG") for row in splits.train.rows if isinstance(row, bytes))
    assert load_data("digits").train.digest == splits.train.digest
    assert load_data("digits", limit=20).notes[-1].startswith("limited to 20 rows")


def test_hub_data_set_of_images() -> None:
    datasets = pytest.importorskip("datasets", reason="needs the extra `hub`")
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(COLOURS))}
    )
    rows = {"image": [{"bytes": file} for file in FILES], "label": [0, 1, 2, 0, 1, 2, 0, 1]}
    loaded = {"train": datasets.Dataset.from_dict(rows, features=features)}
    splits = splits_from_hub(loaded, source="hf:a/b", seed=0)
    assert splits.column == "image"
    assert {*splits.train.rows, *splits.validation.rows, *splits.test.rows} == set(FILES)
