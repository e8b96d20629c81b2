"""Write a wheel of this package from its installed files, for models and images.

A model carries it, so that an environment can be built from the model alone. Format:
https://packaging.python.org/en/latest/specifications/binary-distribution-format/
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import zipfile
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import mlflow_pt_deploy
from mlflow_pt_deploy._version import __version__

WHEELS = "wheels"
"""Folder of wheels in a model."""

_NAME = "mlflow_pt_deploy"
_WHEEL = """\
Wheel-Version: 1.0
Generator: mlflow-pt-deploy
Root-Is-Purelib: true
Tag: py3-none-any
"""
_TIME = (1980, 1, 1, 0, 0, 0)  # equal files give an equal wheel


def write_wheel(folder: Path) -> Path | None:
    """Write the wheel of this package.

    Args:
        folder: Created if it does not exist.

    Returns:
        Path of the wheel; None if the package is not installed, so that its metadata is missing.
    """
    content = _wheel()
    if content is None:
        return None
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{_NAME}-{__version__}-py3-none-any.whl"
    path.write_bytes(content)
    return path


@cache  # a run logs dozens of models
def _wheel() -> bytes | None:
    """The wheel; None if the package is not installed."""
    try:
        installed = distribution("mlflow-pt-deploy")
    except PackageNotFoundError:
        return None
    info = f"{_NAME}-{__version__}.dist-info"
    root = Path(mlflow_pt_deploy.__file__).parent
    files = {
        f"{_NAME}/{path.relative_to(root).as_posix()}": path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.suffix != ".pyc"
    }
    # a source tree that was built once has PKG-INFO instead
    metadata = installed.read_text("METADATA") or installed.read_text("PKG-INFO") or ""
    files[f"{info}/METADATA"] = metadata.encode()
    files[f"{info}/entry_points.txt"] = (installed.read_text("entry_points.txt") or "").encode()
    files[f"{info}/WHEEL"] = _WHEEL.encode()
    files[f"{info}/RECORD"] = _record(files, f"{info}/RECORD")
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name, content in files.items():
            entry = zipfile.ZipInfo(name, _TIME)
            entry.external_attr = 0o100644 << 16
            wheel.writestr(entry, content, zipfile.ZIP_DEFLATED)
    return written.getvalue()


def _record(files: dict[str, bytes], own: str) -> bytes:
    """The list of all files with SHA-256 and size; without those for itself."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for name, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        writer.writerow([name, f"sha256={digest}", len(content)])
    writer.writerow([own, "", ""])
    return text.getvalue().encode()
