"""A variant on disk: written to the side and renamed, digests checked before anything is loaded.

    <name>/
    ├── manifest.json        what this is, and the SHA-256 of every other file
    ├── labels.json          names of the classes
    ├── golden.json          a few rows and the logits that this very artifact gave for them
    ├── preprocessor.json, for texts tokenizer.json
    └── ...                  the runtime's own files

Knows the format; does not know how any runtime writes or reads its files.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mlflow_pt_deploy.errors import ArtifactError, UnsupportedError, UntrustedError
from mlflow_pt_deploy.hardware import cpu_flags, library_versions, usable_cores
from mlflow_pt_deploy.preprocess import (
    Preprocessor,
    Row,
    load_preprocessor,
    row_from_json,
    row_to_json,
)
from mlflow_pt_deploy.variants.base import Inputs, Logits, Predict, Variant
from mlflow_pt_deploy.variants.cascade import Cascade
from mlflow_pt_deploy.variants.table import RUNTIMES

FORMAT = 1
_MANIFEST = "manifest.json"
_LABELS = "labels.json"
_GOLDEN = "golden.json"
# Largest |difference| to the golden logits, as a share of their largest magnitude. Integer kernels
# round differently from one instruction set to the next; fp32 ones hardly do.
_TOLERANCE = {
    "fp32": 1e-3,
    "bf16": 5e-2,
    "fp16": 1e-2,
    "int8-dynamic": 1e-1,
    "int8-static": 1e-1,
    "int8-accuracy": 1e-1,
    "mixed": 1e-1,
}


@dataclass(frozen=True)
class Manifest:
    """What a variant's folder says of itself.

    Attributes:
        name: ``<model>-<runtime>-<precision>``.
        model: ``teacher``, ``student`` or ``model``.
        runtime: Key of `RUNTIMES`.
        precision: See `Variant.precision`.
        options: The variant's own options, as given.
        cpu_flags: Instruction sets without which the native files cannot run.
        libraries: Versions that wrote the folder.
        files: Relative path to SHA-256, for every file but the manifest.
        digest: SHA-256 of the manifest itself; it stands for the whole folder.
    """

    name: str
    model: str
    runtime: str
    precision: str
    options: dict[str, Any]
    cpu_flags: tuple[str, ...]
    libraries: dict[str, str]
    files: dict[str, str]
    digest: str = field(default="", compare=False)

    @property
    def carries_code(self) -> bool:
        """Whether the native files hold a program, see `Variant.carries_code`."""
        # A cascade says it of its stages; where that is a lie, its stages refuse to load.
        return RUNTIMES[self.runtime].carries_code or bool(self.options.get("trusted"))

    @property
    def runtimes(self) -> tuple[str, ...]:
        """What must be installed to run it: its own runtime, or those of a cascade's stages."""
        if self.runtime != Cascade.runtime:
            return (self.runtime,)
        return tuple(self.options[stage].split("-")[1] for stage in ("fast", "strong"))


@dataclass(frozen=True)
class LoadedVariant:
    """A variant that is ready to answer.

    Attributes:
        manifest: What it is.
        preprocessor: Raw rows to named arrays.
        labels: Names of the classes, in the order of the logits.
        predict: Named arrays to logits, float32 (batch, classes).
    """

    manifest: Manifest
    preprocessor: Preprocessor
    labels: tuple[str, ...]
    predict: Predict

    def logits(self, rows: Sequence[Row]) -> Logits:
        """Logits of raw rows, float32 (rows, classes), as one batch."""
        return self.predict(self.preprocessor(rows))


def write_variant(
    variant: Variant,
    module: Any,
    target: Path,
    *,
    model: str,
    example: Inputs,
    calibration: Sequence[Inputs] = (),
    golden_rows: Sequence[Row],
) -> Manifest:
    """Export a variant into `target`, which appears complete or not at all.

    Args:
        variant: The runtime with its options.
        module: A `models.Classifier` in evaluation mode, on the CPU.
        target: The folder to create; an older one of that name is replaced.
        model: First part of the variant's name.
        example: A batch for tracing, see `Variant.export`.
        calibration: Batches for static quantization.
        golden_rows: Raw rows whose logits are kept to check the artifact wherever it is loaded.

    Raises:
        VariantError: The runtime cannot express the model.
        OSError: The disk is full or not writable; nothing is left behind.
    """
    with staged(target, variant, model) as folder:
        variant.export(module, example, calibration, folder)
        module.preprocessor.save(folder)
        _write_json(folder / _LABELS, list(module.labels))
        write_golden(folder, variant, module.preprocessor, golden_rows)
    return read_manifest(target)


@contextmanager
def staged(target: Path, variant: Variant, model: str) -> Iterator[Path]:
    """A folder beside `target` to fill; sealed with a manifest and renamed when all went well."""
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield staging
        _seal(staging, variant, model)
        if target.exists():
            shutil.rmtree(target)
        staging.chmod(0o755)
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_golden(
    folder: Path, variant: Variant, preprocessor: Preprocessor, rows: Sequence[Row]
) -> None:
    """Keep a few rows and the logits that the files in `folder` give for them."""
    predict = variant.load(folder, device=variant.export_device(), threads=1)
    logits = [predict(preprocessor([row]))[0].tolist() for row in rows]
    _write_json(folder / _GOLDEN, {"rows": [row_to_json(row) for row in rows], "logits": logits})


def read_manifest(folder: Path) -> Manifest:
    """Read a variant's manifest; nothing is verified yet.

    Raises:
        ArtifactError: There is none, or it is not of a format this version reads.
    """
    try:
        text = (folder / _MANIFEST).read_bytes()
        content = json.loads(text)
        if content.pop("format", None) == FORMAT and content["runtime"] in RUNTIMES:
            content["cpu_flags"] = tuple(content["cpu_flags"])
            return Manifest(**content, digest=hashlib.sha256(text).hexdigest())
    # The last three: JSON, but of another shape.
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise ArtifactError(
            f"{folder.name} is not a variant: its {_MANIFEST} is missing or unreadable. "
            "Export the variant again."
        ) from error
    raise ArtifactError(
        f"{folder.name} was written by another version of mlflow-pt-deploy (this one reads "
        f"format {FORMAT}). Install the version that wrote it, or export again."
    )


def verify(folder: Path) -> Manifest:
    """Check every file of a variant against its manifest.

    Raises:
        ArtifactError: A file is missing, added or changed; names it.
    """
    manifest = read_manifest(folder)
    found = {name for name in _files(folder) if name != _MANIFEST}
    if odd := sorted(found.symmetric_difference(manifest.files)):
        raise ArtifactError(
            f"{manifest.name}: {odd[0]} is missing or does not belong here. "
            "The artifact is incomplete; download or export it again."
        )
    for name, digest in manifest.files.items():
        if _sha256(folder / name) != digest:
            raise ArtifactError(
                f"{manifest.name}: {name} is not the file that was exported (SHA-256 differs). "
                "The artifact is corrupted; download or export it again."
            )
    return manifest


def load_variant(
    folder: Path,
    *,
    device: str = "cpu",
    threads: int = 0,
    allow_code: bool = False,
    check_golden: bool = True,
    verified: bool = False,
) -> LoadedVariant:
    """Load a variant, after checking that it is whole, trusted and right for this machine.

    Args:
        folder: What `write_variant` wrote.
        device: ``cpu``, or ``cuda`` where the runtime can.
        threads: Threads one call may use; 0 takes every core this process may run on.
        allow_code: Load formats that carry code. Say yes only to what you built yourself or whose
            digest somebody vouched for.
        check_golden: Compare the answers to the golden rows with those of the machine that
            exported; the same integer file scores differently on different processors.
        verified: The files have been checked already, as part of a larger variant.

    Raises:
        ArtifactError: Incomplete, changed, or it does not answer as it did.
        UntrustedError: It carries code and `allow_code` is false.
        UnsupportedError: This machine lacks the instruction set or the device.
        MissingExtraError: The runtime's library is not installed.
    """
    manifest = read_manifest(folder) if verified else verify(folder)
    if manifest.carries_code and not allow_code:
        raise UntrustedError(
            f"{manifest.name} ({manifest.runtime}) carries executable code. Load it from a "
            "registered version that pt-deploy promoted, or allow it: model_config "
            "allow_code=true, or PT_DEPLOY_ALLOW_CODE=1."
        )
    if missing := sorted(set(manifest.cpu_flags) - cpu_flags()):
        raise UnsupportedError(
            f"{manifest.name} was compiled for a processor with {', '.join(missing)}, which this "
            "machine lacks. Choose another variant, or run pt-deploy optimize on this machine."
        )
    variant = RUNTIMES[manifest.runtime](precision=manifest.precision, **manifest.options)
    loaded = LoadedVariant(
        manifest,
        load_preprocessor(folder),
        tuple(json.loads((folder / _LABELS).read_text(encoding="utf8"))),
        variant.load(folder, device=device, threads=threads or usable_cores()),
    )
    if check_golden:
        _check_golden(loaded, folder)
    return loaded


def _check_golden(loaded: LoadedVariant, folder: Path) -> None:
    golden = json.loads((folder / _GOLDEN).read_text(encoding="utf8"))
    expected = np.asarray(golden["logits"], dtype=np.float32)
    rows = [row_from_json(row) for row in golden["rows"]]
    actual = np.concatenate([loaded.logits([row]) for row in rows])
    worst = float(np.abs(actual - expected).max())
    allowed = _TOLERANCE[loaded.manifest.precision] * float(np.abs(expected).max())
    if not worst <= allowed:  # also catches NaN
        raise ArtifactError(
            f"{loaded.manifest.name} answers differently here than where it was exported: its "
            f"logits are off by {worst:.3g}, allowed {allowed:.3g}. Run pt-deploy optimize on "
            "this machine."
        )


def _seal(folder: Path, variant: Variant, model: str) -> None:
    options = asdict(variant)
    precision = options.pop("precision")
    content: dict[str, Any] = {
        "name": variant.name(model),
        "model": model,
        "runtime": variant.runtime,
        "precision": precision,
        "options": options,
        "cpu_flags": sorted(variant.required_cpu_flags()),
        "libraries": library_versions(),
        "files": {name: _sha256(folder / name) for name in sorted(_files(folder))},
    }
    _write_json(folder / _MANIFEST, {"format": FORMAT, **content})


def _files(folder: Path) -> list[str]:
    return [p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: Path, content: object) -> None:
    with path.open("w", encoding="utf8") as file:
        json.dump(content, file, indent=1, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
