"""Read the listing files of Amazon Berkeley Objects: product title to product type.

Format: https://amazon-berkeley-objects.s3.amazonaws.com/README.md. Nothing is downloaded.
Collins et al., "ABO", CVPR 2022 (arXiv 2110.06199).
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlflow_pt_deploy.data.splits import Splits, build_splits
from mlflow_pt_deploy.errors import DataError

MIN_ROWS = 50
"""Minimum number of titles per product type; types with fewer are skipped."""

_FILE_PATTERNS = (
    ("listings/metadata", "listings_*.json.gz"),
    ("metadata", "listings_*.json.gz"),
    (".", "*.json.gz"),
    (".", "*.json"),
)


def read_abo(folder: Path, *, source: str, seed: int, min_rows: int = MIN_ROWS) -> Splits:
    """Read all listings with an English title and cut them into splits.

    Args:
        folder: The unpacked ``abo-listings.tar``, or any folder with listing files.
        source: The value of ``--data``.
        seed: Random seed for cutting validation and test.
        min_rows: Product types with fewer titles are skipped.

    Raises:
        DataError: No listing files, a malformed line, or fewer than two product types left.
    """
    titles: list[str] = []
    types: list[str] = []
    skipped = 0
    for title, product_type in _listings(_find_files(folder)):
        if title and product_type:
            titles.append(title)
            types.append(product_type)
        else:
            skipped += 1
    counts = Counter(types)
    kept = {name for name, count in counts.items() if count >= min_rows}
    if len(kept) < 2:
        raise DataError(
            f"{folder}: {len(kept)} of {len(counts)} product types have {min_rows} or more English "
            "titles; at least two are needed. Add more listing files."
        )
    rows = [row for row, name in enumerate(types) if name in kept]
    train = ([titles[row] for row in rows], [types[row] for row in rows])
    notes = [
        f"listings skipped because they lack an English title or a product type: {skipped}",
        f"product types skipped because they have fewer than {min_rows} titles: "
        f"{len(counts) - len(kept)} ({len(titles) - len(rows)} rows)",
    ]
    return build_splits({"train": train}, name="abo", source=source, seed=seed, notes=notes)


def _find_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder. Give abo:FOLDER with ABO's listing files.")
    for subfolder, pattern in _FILE_PATTERNS:
        files = sorted((folder / subfolder).glob(pattern))
        if files:
            return files
    raise DataError(
        f"{folder} has no listing files. Unpack abo-listings.tar there, so that "
        "listings/metadata/listings_0.json.gz exists, or put *.json.gz or *.json files there."
    )


def _listings(files: list[Path]) -> Iterator[tuple[str, str]]:
    """Title and product type of each listing; an empty string if one is missing."""
    for file in files:
        for number, line in _lines(file):
            if not line.strip():
                continue
            try:
                listing = json.loads(line)
                yield _english(listing.get("item_name", [])), _product_type(listing)
            # ValueError: not UTF-8 or not JSON. The others: JSON of an unexpected structure.
            except (ValueError, TypeError, AttributeError, KeyError) as error:
                raise DataError(
                    f"{file.name}, line {number} is not an ABO listing ({type(error).__name__}): "
                    "each line must be a JSON object with item_name: [{language_tag, value}] and "
                    "product_type: [{value}]. Correct or remove the line."
                ) from error


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    number = 0
    try:
        with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                yield number, line
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(
            f"{file.name} cannot be read after line {number} ({type(error).__name__}); it may be "
            "damaged or truncated. Download it again."
        ) from error


def _english(names: list[dict[str, Any]]) -> str:
    """The en_US title, else the first other English title, else an empty string."""
    english = [name for name in names if name["language_tag"].startswith("en_")]
    english.sort(key=lambda name: name["language_tag"] != "en_US")
    return next((value for name in english if (value := name["value"].strip())), "")


def _product_type(listing: dict[str, Any]) -> str:
    types = listing.get("product_type", [])
    return types[0]["value"].strip() if types else ""
