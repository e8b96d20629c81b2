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

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlflow_pt_deploy.artifact_files import list_files, open_to_readers, read_json, sha256
from mlflow_pt_deploy.errors import (
    ArtifactError,
    PtDeployError,
    UnsupportedError,
    UntrustedError,
    VariantError,
    first_line,
)
from mlflow_pt_deploy.hardware import cpu_flags, library_versions, usable_cores
from mlflow_pt_deploy.preprocess import (
    Preprocessor,
    Row,
    load_preprocessor,
    row_to_json,
)
from mlflow_pt_deploy.variants.base import Inputs, Logits, Predict, Variant
from mlflow_pt_deploy.variants.check import Probes
from mlflow_pt_deploy.variants.golden import GOLDEN, check_golden_rows
from mlflow_pt_deploy.variants.manifest import FORMAT, MANIFEST, Manifest, read_manifest

_LABELS = "labels.json"


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
    probes: Probes | None = None,
) -> Manifest:
    """Export a variant, check it, and put it into `target`, which appears complete or not at all.

    Args:
        variant: The runtime with its options.
        module: A `models.Classifier` in evaluation mode, on the CPU.
        target: The folder to create; an older one of that name is replaced.
        model: First part of the variant's name.
        example: A batch for tracing, see `Variant.export`.
        calibration: Batches for static quantization.
        golden_rows: Raw rows whose logits are kept to check the artifact wherever it is loaded.
        probes: Of the module, if there are any yet; one serves for all of its variants.

    Raises:
        VariantError: The runtime cannot express the model, or it answers otherwise than eager.
        OSError: The disk is full or not writable; nothing is left behind.
    """
    with staged(target, variant, model) as folder:
        variant.export(module, example, calibration, folder)
        module.preprocessor.save(folder)
        _write_json(folder / _LABELS, list(module.labels))
        predict = variant.load(folder, device=variant.export_device(), threads=1)
        (probes or Probes(module, golden_rows)).check(predict, variant.precision)
        write_golden(folder, predict, module.preprocessor, golden_rows)
    return read_manifest(target)


@contextmanager
def staged(target: Path, variant: Variant, model: str) -> Iterator[Path]:
    """A folder beside `target` to fill; sealed with a manifest and renamed when all went well."""
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield staging
        _seal(staging, variant, model)
        open_to_readers(staging)
        if target.exists():
            shutil.rmtree(target)
        staging.chmod(0o755)
        staging.rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def write_golden(
    folder: Path, predict: Predict, preprocessor: Preprocessor, rows: Sequence[Row]
) -> None:
    """Keep a few rows and the logits that the files in `folder` give for them.

    Raises:
        VariantError: One of the answers, alone or all in one batch, is NaN.
    """
    logits = [predict(preprocessor([row]))[0].tolist() for row in rows]
    if not (np.isfinite(logits).all() and np.isfinite(predict(preprocessor(rows))).all()):
        raise VariantError("real rows give NaN.")
    _write_json(folder / GOLDEN, {"rows": [row_to_json(row) for row in rows], "logits": logits})


def verify(folder: Path) -> Manifest:
    """Check every file of a variant against its manifest.

    Raises:
        ArtifactError: A file is missing, added or changed; names it.
    """
    manifest = _complete(folder)
    for name, digest in manifest.files.items():
        if sha256(folder / name) != digest:
            raise ArtifactError(
                f"{manifest.name}: {name} is not the file that was exported (SHA-256 differs). "
                "The artifact is corrupted; download or export it again."
            )
    return manifest


def _complete(folder: Path) -> Manifest:
    """The manifest of a folder that holds the files it names, and no others."""
    manifest = read_manifest(folder)
    found = {name for name in list_files(folder) if name != MANIFEST}
    if odd := sorted(found.symmetric_difference(manifest.files)):
        raise ArtifactError(
            f"{manifest.name}: {odd[0]} is missing or does not belong here. "
            "The artifact is incomplete; download or export it again."
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
        verified: The digests have been checked already, as part of a larger variant.

    Raises:
        ArtifactError: Incomplete, changed, or it does not answer as it did.
        UntrustedError: It carries code and `allow_code` is false.
        UnsupportedError: This machine lacks the instruction set or the device.
        MissingExtraError: The runtime's library is not installed.
    """
    manifest = _complete(folder) if verified else verify(folder)
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
    loaded = _loaded(folder, manifest, device, threads or usable_cores())
    if check_golden:
        check_golden_rows(loaded, folder)
    return loaded


def _loaded(folder: Path, manifest: Manifest, device: str, threads: int) -> LoadedVariant:
    """Read the runtime's files; a library's own error becomes one of ours, with its cause."""
    variant, labels = manifest.variant(), _read_labels(folder)
    if manifest.runtime == "eager":
        _check_shards(folder, manifest)
    preprocessor = load_preprocessor(folder)
    try:
        predict = variant.load(folder, device=device, threads=threads)
    except PtDeployError:
        raise
    except Exception as error:  # each runtime has its own, most derived from Exception alone
        raise ArtifactError(
            f"{manifest.name}: {manifest.runtime} cannot load its files "
            f"({type(error).__name__}: {first_line(error)[:300]}). Export the variant again."
        ) from error
    return LoadedVariant(manifest, preprocessor, labels, predict)


def _read_labels(folder: Path) -> tuple[str, ...]:
    labels = read_json(folder / _LABELS)
    if not isinstance(labels, list) or not labels or not all(isinstance(n, str) for n in labels):
        raise ArtifactError(
            f"{folder.name}: {_LABELS} is not a list of class names. Export the variant again."
        )
    return tuple(labels)


def _check_shards(folder: Path, manifest: Manifest) -> None:
    """Weights in several files are read from this folder alone: an index may name any path."""
    for name in manifest.files:
        if not name.endswith(".index.json"):
            continue
        index = read_json(folder / name)
        shards = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(shards, dict) or not all(
            isinstance(shard, str) and shard in manifest.files for shard in shards.values()
        ):
            raise ArtifactError(
                f"{manifest.name}: {name} names files that do not belong to the variant. The "
                "artifact is damaged; download it or export the variant again."
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
        "files": {name: sha256(folder / name) for name in list_files(folder)},
    }
    _write_json(folder / MANIFEST, {"format": FORMAT, **content})


def _write_json(path: Path, content: object) -> None:
    with path.open("w", encoding="utf8") as file:
        json.dump(content, file, indent=1, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
