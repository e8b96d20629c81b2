"""Variants that say they were built for a GPU, made without one."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a variant's manifest, and give it the digests of the files as they are."""
    path = folder / "manifest.json"
    content = json.loads(path.read_text(encoding="utf8"))
    found = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    del found["manifest.json"]
    content["files"] = {n: hashlib.sha256(p.read_bytes()).hexdigest() for n, p in found.items()}
    change(content)
    path.write_text(json.dumps(content), encoding="utf8")


def built_for_cuda(folder: Path, target: Path) -> Path:
    """A copy of a variant for the CPU whose manifest says that it was built for a GPU."""
    shutil.copytree(folder, target)

    def change(content: dict[str, Any]) -> None:
        content["name"] += "-cuda"
        content["options"]["device"] = "cuda"

    edit_manifest(target, change)
    return target
