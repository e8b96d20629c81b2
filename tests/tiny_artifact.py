"""A model that mlflow-pt-deploy 0.1.0 saved (a static student in NumPy, 45 KB), and copies of it.

It stays as it is: what was saved by an earlier version loads, is served and promoted today.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

SAVED = Path(__file__).parent / "data" / "saved-by-0.1.0"


def copy_saved(folder: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(SAVED, folder / "model"))


def edit_mlmodel(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = root / "MLmodel"
    content = yaml.safe_load(path.read_text(encoding="utf8"))
    change(content)
    path.write_text(yaml.safe_dump(content), encoding="utf8")


def reseal(root: Path, **files: bytes) -> None:
    """Replace files of the variant (``labels_json`` for labels.json), all digests made right."""
    variant = root / "variant"
    for name, content in files.items():
        (variant / name.replace("_", ".")).write_bytes(content)
    manifest = json.loads((variant / "manifest.json").read_text(encoding="utf8"))
    found = {p.relative_to(variant).as_posix(): p for p in variant.rglob("*") if p.is_file()}
    del found["manifest.json"]
    manifest["files"] = {n: hashlib.sha256(p.read_bytes()).hexdigest() for n, p in found.items()}
    write_manifest(root, json.dumps(manifest).encode())


def write_manifest(root: Path, content: bytes) -> None:
    """Replace the manifest, and its digest in MLmodel."""
    (root / "variant" / "manifest.json").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    edit_mlmodel(root, lambda content: content["flavors"]["pt_deploy"].update(digest=digest))
