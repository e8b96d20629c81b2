"""Write a variant folder atomically: export to a temporary folder, check, seal, rename."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from mlflow_pt_deploy.artifacts.golden import GOLDEN
from mlflow_pt_deploy.artifacts.loading import load_variant
from mlflow_pt_deploy.artifacts.manifest import FORMAT, LABELS, MANIFEST, Manifest, read_manifest
from mlflow_pt_deploy.errors import VariantError
from mlflow_pt_deploy.preprocessing import Preprocessor, Row, load_preprocessor, row_to_json
from mlflow_pt_deploy.runtimes.base import Inputs, Predict, Variant
from mlflow_pt_deploy.runtimes.export_check import Probes
from mlflow_pt_deploy.system.device import CPU
from mlflow_pt_deploy.system.hardware import library_versions
from mlflow_pt_deploy.system.regular_files import list_files, open_to_readers, read_json, sha256


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
    """Export and check a variant, then move it to `target`. The folder is created atomically.

    Args:
        variant: The runtime with its options.
        module: A `models.Classifier` in evaluation mode, on the CPU.
        target: Folder to create; an existing one is replaced.
        model: First part of the variant's name.
        example: A batch for tracing, see `Variant.export`.
        calibration: Batches for static quantization.
        golden_rows: Raw rows whose logits are stored for the golden check.
        probes: Reference outputs of `module`, shared by all of its variants; None creates them.

    Raises:
        VariantError: The runtime does not support the model, or its output differs from eager.
        OSError: The disk is full or not writable; partial output is removed.
    """
    variant = variant.for_this_machine()
    with staged(target, variant, model) as folder:
        variant.export(module, example, calibration, folder)
        module.preprocessor.save(folder)
        _write_json(folder / LABELS, list(module.labels))
        predict = variant.load(folder, device=variant.device, threads=1)
        (probes or Probes(module, golden_rows)).check(predict, variant.precision)
        write_golden(folder, predict, module.preprocessor, golden_rows)
    return read_manifest(target)


@contextmanager
def staged(target: Path, variant: Variant, model: str) -> Iterator[Path]:
    """Yield a temporary folder; on success add the manifest and rename it to `target`."""
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
    """Store golden rows and their logits in `folder`.

    Raises:
        VariantError: A logit is NaN or infinite, for a single row or for all rows in one batch.
    """
    logits = [predict(preprocessor([row]))[0].tolist() for row in rows]
    if not (np.isfinite(logits).all() and np.isfinite(predict(preprocessor(rows))).all()):
        raise VariantError("real rows give NaN.")
    _write_json(folder / GOLDEN, {"rows": [row_to_json(row) for row in rows], "logits": logits})


def check_same_inputs(first: Path, second: Path, purpose: str, cure: str) -> tuple[str, ...]:
    """Check that two variants have the same class names and preprocessing.

    Args:
        first, second: Folders with verified digests.
        purpose: What the two were to do together, for the message.
        cure: How to get two that can, for the message.

    Returns:
        Names of the files that are the same.

    Raises:
        VariantError: A file differs; the message names it.
    """
    one, other = read_manifest(first), read_manifest(second)
    shared = (LABELS, *load_preprocessor(first).files)
    for part in shared:
        if one.files[part] != other.files.get(part):
            raise VariantError(
                f"{one.name} and {other.name} cannot {purpose}: their {part} differ. {cure}"
            )
    return shared


def _seal(folder: Path, variant: Variant, model: str) -> None:
    """Write the manifest with the digest of every file."""
    options = asdict(variant)
    precision = options.pop("precision")
    for name, default in (("device", CPU), ("capability", "")):
        if options.get(name) == default:  # as manifests were before there were GPU variants
            del options[name]
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


def replace_golden_rows(folder: Path, *, allow_code: bool = False) -> None:
    """Replace the golden rows, which are rows of the user's data, by made ones.

    The digest of the variant changes. Stages have golden rows of their own; those of a portable
    variant must both run on this machine.

    Args:
        folder: A verified variant folder; changed in place.
        allow_code: See `load_variant`.

    Raises:
        PtDeployError: The variant cannot be loaded on this machine.
    """
    for manifest in sorted(folder.rglob(MANIFEST), key=lambda path: -len(path.parts)):
        part = manifest.parent
        _reseal(part)  # its stages have changed
        if not (part / GOLDEN).exists():
            continue  # a portable variant: each stage has its own
        loaded = load_variant(part, allow_code=allow_code, check_golden=False)
        rows = _made_rows(loaded.preprocessor.column)
        write_golden(part, loaded.predict, loaded.preprocessor, rows)
        _reseal(part)


def _made_rows(column: str) -> list[Row]:
    """A few rows that are not user data: texts, or PNG files."""
    if column == "text":
        return ["some text", "Another text, which is a little longer than the first one.", "?"]
    from mlflow_pt_deploy.preprocessing.image import example_image

    return [example_image(), example_image(48, 32)]


def _reseal(folder: Path) -> None:
    """Write the manifest anew with the digests of the files as they are."""
    content = read_json(folder / MANIFEST)
    names = [name for name in list_files(folder) if name != MANIFEST]
    content["files"] = {name: sha256(folder / name) for name in names}
    _write_json(folder / MANIFEST, content)
