"""Perturbed rows: seeded, of each kind, and never empty."""

from __future__ import annotations

import io

from PIL import Image

from mlflow_pt_deploy.data.perturbation import perturb

TEXTS = ("cheap red running shoes", "blue dress", "a", "  ", "ÄPFEL und Birnen")


def test_texts_are_changed_in_six_ways() -> None:
    found = perturb(TEXTS)
    assert sorted(found) == ["case", "dropped", "joined", "negated", "swapped", "typos"]
    assert all(len(rows) == len(TEXTS) for rows in found.values())
    assert all(
        isinstance(row, str) and (row.strip() or row == "  ") for r in found.values() for row in r
    )
    assert "running shoes cheap red" in found["swapped"]
    assert "cheap not red running shoes" in found["negated"]
    assert {"CHEAP RED RUNNING SHOES", "A"} < set(found["case"])
    assert {len(row.split()) for row in found["dropped"]} == {0, 1, 2, 3}
    (typo,) = (row for row in found["typos"] if len(row) == len(TEXTS[0]))
    assert sorted(typo) == sorted(TEXTS[0]) and typo != TEXTS[0]
    assert all(any(row.startswith(text) for text in TEXTS) for row in found["joined"])


def test_a_seed_gives_the_same_rows_and_a_sample_is_bounded() -> None:
    rows = tuple(f"text number {number} of many" for number in range(300))
    assert perturb(rows) == perturb(rows)
    assert perturb(rows, seed=1) != perturb(rows)
    assert {len(found) for found in perturb(rows, per_kind=10).values()} == {10}
    assert perturb(()) == {"blur": (), "crop": (), "light": ()}


def test_images_are_changed_in_three_ways() -> None:
    file = io.BytesIO()
    Image.linear_gradient("L").resize((40, 24)).save(file, "PNG")
    found = perturb((file.getvalue(),))
    assert sorted(found) == ["blur", "crop", "light"]
    sizes = {
        name: Image.open(io.BytesIO(row)).size
        for name, (row,) in found.items()  # type: ignore[arg-type]
    }
    assert sizes == {"blur": (40, 24), "crop": (30, 18), "light": (40, 24)}
    assert found["light"][0] != file.getvalue()
