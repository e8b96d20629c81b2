"""Read splits from the Hugging Face hub with the `datasets` library.

The only module that uses `datasets`. It maps the hub's column names and hidden labels.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow_pt_deploy.data.files import STEMS, read_images, unused_columns
from mlflow_pt_deploy.data.label_kinds import format_list
from mlflow_pt_deploy.data.splits import Splits, build_splits
from mlflow_pt_deploy.data.validation import Pairs, reject_pair_columns
from mlflow_pt_deploy.errors import DataError, MissingExtraError

_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[^:\s]+)?")
_TEXT_COLUMNS = ("sentence", "title", "content")
_CURE = (
    "Check the name and the configuration (hf:OWNER/NAME:CONFIG). If the hub cannot be reached, "
    "set HTTPS_PROXY to a proxy or HF_ENDPOINT to a mirror, or download the data on another "
    "machine and give its folder as --data."
)


def read_hub(name: str, *, source: str, seed: int) -> Splits:
    """Load a data set from the hub or from the local cache of `datasets`.

    Args:
        name: ``OWNER/NAME`` or ``OWNER/NAME:CONFIG``.
        source: The value of ``--data``.
        seed: Random seed for cutting splits that the data set lacks.

    Raises:
        DataError: The name is invalid or unknown, the hub cannot be reached, or rows cannot be
            used.
        MissingExtraError: `datasets` is not installed.
    """
    if not _NAME.fullmatch(name):
        raise DataError(
            f"--data {source!r} is not a valid hub data set. Give hf:OWNER/NAME or "
            "hf:OWNER/NAME:CONFIG, e.g. hf:stanfordnlp/imdb."
        )
    try:
        import datasets  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ModuleNotFoundError as error:
        raise MissingExtraError("datasets", "hub") from error
    path, _, config = name.partition(":")
    try:
        loaded = datasets.load_dataset(path, config or None)
    # The error of a failed download depends on the HTTP library.
    except Exception as error:
        raise DataError(f"{source} cannot be loaded: {_reason(error)}. {_CURE}") from error
    return splits_from_hub(loaded, source=source, seed=seed)


def splits_from_hub(loaded: Mapping[str, Any], *, source: str, seed: int) -> Splits:
    """Convert a `datasets.DatasetDict` into splits.

    Raises:
        DataError: No train split, no usable columns, or rows that cannot be used.
    """
    given: dict[str, Pairs] = {}
    unused: dict[str, list[str]] = {}
    notes, column = [], "text"
    for split, stems in STEMS.items():
        stem = next((stem for stem in stems if stem in loaded), None)
        if stem is None:
            continue
        name, (rows, labels) = _pairs(split, loaded[stem])
        column = "image" if name == "image" else "text"
        # Benchmarks on the hub hide test labels as -1, which ClassLabel cannot name.
        if split != "train" and labels and not any(label is not None for label in labels):
            notes.append(f"the {split} split has no labels on the hub and is not used")
            continue
        given[split] = rows, labels
        unused[split] = [each for each in loaded[stem].features if each not in (name, "label")]
    if "train" not in given:
        raise DataError(f"{source} has no train split; it has {format_list(loaded)}.")
    name = source.removeprefix("hf:").partition("/")[2].replace(":", "-")
    notes += unused_columns(unused)
    return build_splits(given, name=name, source=source, column=column, seed=seed, notes=notes)


def _pairs(split: str, dataset: Any) -> tuple[str, Pairs]:
    """Name of the input column, and inputs and labels."""
    features = dataset.features
    reject_pair_columns(split, list(features))
    if "label" not in features:
        raise DataError(
            f"{split} has no column `label`; it has {format_list(features)}. Download it, rename "
            "the column and give the folder as --data."
        )
    kinds = {name: getattr(kind, "dtype", "") for name, kind in features.items()}
    name = input_column(split, {name: kind for name, kind in kinds.items() if name != "label"})
    labels = list(dataset["label"])
    names = getattr(features["label"], "names", None)
    if names is not None:
        labels = [None if label in (None, -1) else names[label] for label in labels]
    if name != "image":
        return name, (list(dataset[name]), labels)
    if hasattr(features[name], "decode"):  # encoded files instead of decoded images
        dataset = dataset.cast_column(name, type(features[name])(decode=False))
    return name, (read_images(split, list(dataset[name]), Path()), labels)


def input_column(split: str, kinds: Mapping[str, str]) -> str:
    """Choose the column that holds the input.

    Args:
        split: Name of the split, for error messages.
        kinds: Arrow data type of each column except `label`.

    Returns:
        ``text`` if it exists, else the only string column if its name is common, else ``image``.

    Raises:
        DataError: There is no such column.
    """
    strings = [name for name, kind in kinds.items() if kind in ("string", "large_string")]
    if "text" in strings:
        return "text"
    if len(strings) == 1 and strings[0] in _TEXT_COLUMNS:
        return strings[0]
    if "image" in kinds:
        return "image"
    raise DataError(
        f"{split} has no column `text` or `image`, and not exactly one string column named "
        f"{', '.join(_TEXT_COLUMNS)}; it has {format_list(kinds)}. Download it, rename the input "
        "column to `text` and give the folder as --data."
    )


def _reason(error: Exception) -> str:
    # DatasetGenerationError may contain rows, so its text is not shown.
    if isinstance(error, OSError | ValueError):
        first = " ".join(str(error).split())[:300].rstrip(".")
        return f"{type(error).__name__}: {first}"
    return type(error).__name__
