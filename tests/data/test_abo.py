"""Amazon Berkeley Objects listing files, in the layout of the archive."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from mlflow_pt_deploy.data import load_data
from mlflow_pt_deploy.data.abo import read_abo
from mlflow_pt_deploy.errors import DataError


def listing(title: str, kind: str, tag: str = "en_US") -> dict[str, Any]:
    names = [{"language_tag": tag, "value": title}]
    return {"item_id": "B0", "item_name": names, "product_type": [{"value": kind}]}


def lines(*listings: Any) -> bytes:
    return "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in listings).encode()


MANY = [listing(f"{kind} {n}", kind) for kind in ("SHOES", "SOFA") for n in range(60)]


def test_layout_of_the_archive(tmp_path: Path) -> None:
    folder = tmp_path / "listings" / "metadata"
    folder.mkdir(parents=True)
    (folder / "listings_0.json.gz").write_bytes(gzip.compress(lines(*MANY[:70])))
    (folder / "listings_1.json.gz").write_bytes(gzip.compress(lines(*MANY[70:]) + b"\n"))
    (tmp_path / "README.json").write_text("not a listing")

    splits = load_data(f"abo:{tmp_path}")

    assert (splits.name, splits.source) == ("abo", f"abo:{tmp_path}")
    assert splits.labels == ("SHOES", "SOFA")
    assert (len(splits.train), len(splits.validation), len(splits.test)) == (86, 10, 24)
    assert load_data(f"abo:{tmp_path}").test.digest == splits.test.digest
    assert load_data(f"abo:{folder}").test.digest == splits.test.digest


def test_rare_types_and_titles_in_other_languages_are_skipped(tmp_path: Path) -> None:
    british = listing("SOFA british", "SOFA", "en_GB")
    both = listing("SOFA american", "SOFA")
    both["item_name"].insert(0, {"language_tag": "en_AU", "value": "SOFA australian"})
    skipped = [
        listing("Schuhe", "SHOES", "de_DE"),
        listing("  ", "SHOES"),
        {"product_type": [{"value": "SOFA"}]},
        {**listing("typeless", "SOFA"), "product_type": []},
    ]
    rare = [listing(f"lamp {n}", "LAMP") for n in range(49)]
    (tmp_path / "all.json").write_bytes(lines(*MANY, british, both, *skipped, *rare))

    splits = load_data(f"abo:{tmp_path}")

    rows = {*splits.train.rows, *splits.validation.rows, *splits.test.rows}
    assert splits.labels == ("SHOES", "SOFA")
    assert {"SOFA british", "SOFA american"} < rows
    assert not {"SOFA australian", "Schuhe", "typeless"} & rows
    assert splits.notes[:2] == (
        "listings skipped because they lack an English title or a product type: 4",
        "product types skipped because they have fewer than 50 titles: 1 (49 rows)",
    )


@pytest.mark.parametrize(
    "bad",
    [
        b'{"item_name": [',
        b"[1, 2]",
        b'"text"',
        b'{"item_name": null}',
        b'{"item_name": ["chair"]}',
        b'{"item_name": [{"value": "chair"}]}',
        b'{"product_type": "CHAIR"}',
        b'{"item_name": "\xff"}',
    ],
)
def test_malformed_line(tmp_path: Path, bad: bytes) -> None:
    (tmp_path / "x.json").write_bytes(lines(*MANY[:3]) + bad + b"\n")
    with pytest.raises(DataError, match="x.json, line 4 is not an ABO listing .*Correct or remove"):
        load_data(f"abo:{tmp_path}")


def test_truncated_file(tmp_path: Path) -> None:
    (tmp_path / "listings_0.json.gz").write_bytes(gzip.compress(lines(*MANY))[:-20])
    with pytest.raises(DataError, match="listings_0.json.gz cannot be read after line .*Download"):
        load_data(f"abo:{tmp_path}")


def test_file_that_is_not_gzip(tmp_path: Path) -> None:
    (tmp_path / "listings_0.json.gz").write_bytes(lines(*MANY))
    with pytest.raises(DataError, match="listings_0.json.gz cannot be read after line 0"):
        load_data(f"abo:{tmp_path}")


def test_too_few_product_types(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(lines(*MANY[:70]))
    with pytest.raises(DataError, match="1 of 2 product types have 50 or more English titles"):
        load_data(f"abo:{tmp_path}")
    assert len(read_abo(tmp_path, source="abo:x", seed=0, min_rows=10).labels) == 2


def test_missing_folder_and_missing_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere is not a folder. Give abo:FOLDER"):
        load_data("abo:nowhere")
    with pytest.raises(DataError, match="has no listing files. Unpack abo-listings.tar there"):
        load_data(f"abo:{tmp_path}")
