"""Loads a variant's folder, after every digest was checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlflow_pt_deploy.artifacts.golden import check_golden_rows
from mlflow_pt_deploy.artifacts.manifest import LABELS, MANIFEST, Manifest, read_manifest
from mlflow_pt_deploy.errors import (
    ArtifactError,
    PtDeployError,
    UnsupportedError,
    UntrustedError,
    root_cause,
)
from mlflow_pt_deploy.preprocessing import (
    Preprocessor,
    Row,
    load_preprocessor,
)
from mlflow_pt_deploy.runtimes.base import Logits, Predict, Variant
from mlflow_pt_deploy.system.hardware import cpu_flags, usable_cores
from mlflow_pt_deploy.system.regular_files import list_files, read_json, sha256


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
        if variant.stages:
            predict = variant.combine(_load_stages(folder, variant, device, threads))
        else:
            predict = variant.load(folder, device=device, threads=threads)
    except PtDeployError:
        raise
    except Exception as error:  # each runtime has its own, most derived from Exception alone
        raise ArtifactError(
            f"{manifest.name}: {manifest.runtime} cannot load its files "
            f"({type(error).__name__}: {root_cause(error)[:300]}). Export the variant again."
        ) from error
    return LoadedVariant(manifest, preprocessor, labels, predict)


def _load_stages(folder: Path, variant: Variant, device: str, threads: int) -> list[Predict]:
    """The variants that a variant consists of; their digests were checked with its own."""
    return [
        load_variant(
            folder / stage,
            device=device,
            threads=threads,
            allow_code=variant.allows_code,
            check_golden=False,
            verified=True,
        ).predict
        for stage in variant.stages
    ]


def _read_labels(folder: Path) -> tuple[str, ...]:
    labels = read_json(folder / LABELS)
    if not isinstance(labels, list) or not labels or not all(isinstance(n, str) for n in labels):
        raise ArtifactError(
            f"{folder.name}: {LABELS} is not a list of class names. Export the variant again."
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
