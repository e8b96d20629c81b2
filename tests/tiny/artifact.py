"""A model saved by mlflow-pt-deploy 0.1.0 (a static student in NumPy, 45 KB), and copies of it.

The fixture never changes: models saved by an earlier version must load, serve and be promoted.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mlflow_pt_deploy.errors import ArtifactError
from mlflow_pt_deploy.registry.addresses import ModelSpec, ResolvedVersion
from mlflow_pt_deploy.serving.model.loaded_model import load_version

SAVED = Path(__file__).parents[1] / "fixtures" / "saved-by-0.1.0"


def copy_saved(folder: Path) -> Path:
    """A copy to modify."""
    return Path(shutil.copytree(SAVED, folder / "model"))


def edit_mlmodel(root: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = root / "MLmodel"
    content = yaml.safe_load(path.read_text(encoding="utf8"))
    change(content)
    path.write_text(yaml.safe_dump(content), encoding="utf8")


def in_pyfunc(**keys: object) -> Callable[[dict[str, Any]], object]:
    """Return a change of the python_function flavor for `edit_mlmodel`."""
    return lambda content: content["flavors"]["python_function"].update(keys)


def reseal(root: Path, **files: bytes) -> None:
    """Replace files of the variant (``labels_json`` for labels.json) and update all digests."""
    variant = root / "variant"
    for name, content in files.items():
        (variant / name.replace("_", ".")).write_bytes(content)
    manifest = json.loads((variant / "manifest.json").read_text(encoding="utf8"))
    found = {p.relative_to(variant).as_posix(): p for p in variant.rglob("*") if p.is_file()}
    del found["manifest.json"]
    manifest["files"] = {n: hashlib.sha256(p.read_bytes()).hexdigest() for n, p in found.items()}
    write_manifest(root, json.dumps(manifest).encode())


def write_manifest(root: Path, content: bytes) -> None:
    """Replace the manifest and its digest in MLmodel."""
    (root / "variant" / "manifest.json").write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    edit_mlmodel(root, lambda content: content["flavors"]["pt_deploy"].update(digest=digest))


def expect_rejection(root: Path, match: str | None = None) -> str:
    """Return the error on loading the model: one short message, within five seconds."""
    start = time.monotonic()
    with pytest.raises(ArtifactError, match=match) as caught:
        load_version(ResolvedVersion(str(root)), ModelSpec(str(root)))
    assert time.monotonic() - start < 5
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700, message
    return message
