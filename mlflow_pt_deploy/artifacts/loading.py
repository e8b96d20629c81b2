"""Load a variant folder after verifying every digest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from mlflow_pt_deploy.artifacts.golden import check_golden_rows
from mlflow_pt_deploy.artifacts.manifest import LABELS, MANIFEST, Manifest, read_manifest
from mlflow_pt_deploy.errors import (
    ArtifactError,
    DeviceMemoryError,
    PtDeployError,
    UnsupportedError,
    UntrustedError,
    missing_extra,
    root_cause,
)
from mlflow_pt_deploy.preprocessing import (
    Preprocessor,
    Row,
    load_preprocessor,
)
from mlflow_pt_deploy.runtimes.base import Logits, Predict, Variant
from mlflow_pt_deploy.runtimes.device_memory import (
    DeviceMemoryGuard,
    hides_reason,
    was_out_of_memory,
)
from mlflow_pt_deploy.runtimes.portable import Portable, usable_device
from mlflow_pt_deploy.system.device import (
    AUTO,
    CPU,
    CUDA,
    kind_of,
    lacks_memory,
    missing_gpu,
    release_cached_memory,
)
from mlflow_pt_deploy.system.hardware import cpu_flags, usable_cores
from mlflow_pt_deploy.system.regular_files import list_files, read_json, sha256


class Description(NamedTuple):
    """What a variant says about itself: all of a `LoadedVariant` but the model."""

    manifest: Manifest
    preprocessor: Preprocessor
    labels: tuple[str, ...]


@dataclass(frozen=True)
class LoadedVariant:
    """A variant in memory, ready for inference.

    Attributes:
        manifest: Name, runtime, options and file digests.
        preprocessor: Converts raw rows to named arrays.
        labels: Class names, in the order of the logits.
        predict: Maps named arrays to logits, float32 (batch, classes).
        device: Where it runs: ``cpu``, ``cuda`` or ``cuda:N``.
        stage: Of a portable variant, the manifest of the stage that was loaded; else None.
    """

    manifest: Manifest
    preprocessor: Preprocessor
    labels: tuple[str, ...]
    predict: Predict
    device: str = CPU
    stage: Manifest | None = None

    @property
    def running(self) -> Manifest:
        """Manifest of the files that run: the loaded stage of a portable variant, or its own."""
        return self.stage or self.manifest

    def running_folder(self, folder: Path) -> Path:
        """The folder of `running`, in the variant's folder."""
        return folder / kind_of(self.device) if self.stage else folder

    def logits(self, rows: Sequence[Row]) -> Logits:
        """Compute the logits of raw rows as one batch, float32 (rows, classes)."""
        return self.predict(self.preprocessor(rows))


def verify(folder: Path) -> Manifest:
    """Check every file of a variant against its manifest.

    Raises:
        ArtifactError: A file is missing, added or changed; the message names it.
    """
    manifest = _read_complete_manifest(folder)
    for name, digest in manifest.files.items():
        if sha256(folder / name) != digest:
            raise ArtifactError(
                f"{manifest.name}: {name} is not the file that was exported (SHA-256 differs). "
                "The artifact is corrupted; download or export it again."
            )
    return manifest


def _read_complete_manifest(folder: Path) -> Manifest:
    """Read the manifest; check that the folder holds exactly the files that it lists."""
    manifest = read_manifest(folder)
    found = {name for name in list_files(folder) if name != MANIFEST}
    if different := sorted(found.symmetric_difference(manifest.files)):
        raise ArtifactError(
            f"{manifest.name}: {different[0]} is missing or unexpected. "
            "The artifact is incomplete; download or export it again."
        )
    return manifest


def load_description(folder: Path) -> Description:
    """Verify a variant like `load_variant`, without loading its model.

    Raises:
        ArtifactError: The folder is incomplete or changed.
    """
    manifest = verify(folder)
    return Description(manifest, load_preprocessor(folder), _read_labels(folder))


def device_of(manifest: Manifest, device: str) -> str:
    """The device that a variant is loaded onto: as named, or what ``auto`` means on this host."""
    if manifest.runtime == Portable.runtime:
        return usable_device(device)
    return manifest.device if device == AUTO else device


def load_variant(
    folder: Path,
    *,
    device: str = AUTO,
    threads: int = 0,
    allow_code: bool = False,
    check_golden: bool = True,
    verified: bool = False,
) -> LoadedVariant:
    """Load a variant after checking that it is complete, trusted and supported on this machine.

    Args:
        folder: Folder written by `write_variant`.
        device: ``auto``: the device that the variant was built for, of a portable one the GPU if
            there is one; or ``cpu``, ``cuda``, ``cuda:N``, if the runtime supports it.
        threads: Threads per call; 0 uses all cores available to this process.
        allow_code: Load formats that carry code. Allow only artifacts that you built yourself or
            whose digest is trusted.
        check_golden: Compare the logits of the golden rows with those stored at export; the same
            integer kernels can give other results on another processor.
        verified: The digests were verified before, by `verify` or as part of another variant.

    Raises:
        ArtifactError: The folder is incomplete or changed, or the golden check fails.
        UntrustedError: The variant carries code and `allow_code` is false.
        UnsupportedError: This machine lacks the instruction set or the device.
        MissingExtraError: The library of the runtime is not installed.
        DeviceMemoryError: The device has no memory for it.
    """
    manifest = _read_complete_manifest(folder) if verified else verify(folder)
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
    device = device_of(manifest, device)
    if manifest.runtime == Portable.runtime:
        return _load_usable_stage(folder, manifest, device, threads, check_golden)
    try:
        loaded = _load_files(folder, manifest, device, threads or usable_cores())
    except UnsupportedError as error:
        if manifest.device == CPU or not (lacking := missing_gpu()):
            raise
        raise _needs_gpu(manifest, lacking) from error
    if check_golden:
        check_golden_rows(loaded, folder)
    return loaded


def _load_usable_stage(
    folder: Path, manifest: Manifest, device: str, threads: int, check_golden: bool
) -> LoadedVariant:
    """Load the stage of a portable variant for a device, and nothing of the other."""
    loaded = load_variant(
        folder / kind_of(device),
        device=device,
        threads=threads,
        allow_code=manifest.variant().allows_code,
        check_golden=check_golden,
        verified=True,
    )
    return replace(loaded, manifest=manifest, stage=loaded.manifest)


def _needs_gpu(manifest: Manifest, lacking: str) -> UnsupportedError:
    """The error for a variant for GPUs on a host without one."""
    capability = manifest.options.get("capability")  # of compiled packages
    chip = f" of compute capability {capability}" if capability else ""
    return UnsupportedError(
        f"{manifest.name} needs an NVIDIA GPU{chip} with its driver, and this host offers none: "
        f"{lacking}. Choose a variant for this host: pt-deploy promote --run RUN_ID --name NAME "
        "--runtimes portable (or onnxruntime, openvino, ...)."
    )


def _load_files(folder: Path, manifest: Manifest, device: str, threads: int) -> LoadedVariant:
    """Load the files of the runtime; library errors become `ArtifactError` with the cause."""
    variant, labels = manifest.variant(), _read_labels(folder)
    if not variant.stages:
        _check_shards(folder, manifest)
    preprocessor = load_preprocessor(folder)
    try:
        if variant.stages:
            predict = variant.combine(_load_stages(folder, variant, device, threads))
        else:
            predict = variant.load(folder, device=device, threads=threads)
            if kind_of(device) == CUDA:
                predict = DeviceMemoryGuard(predict, f"{manifest.name} on {device}", device)
    except PtDeployError:
        raise
    except Exception as error:  # runtimes have no common base class for errors
        if missing := missing_extra(error):
            raise missing from error
        if not _found_no_memory(error, folder, device):
            raise ArtifactError(
                f"{manifest.name}: {manifest.runtime} cannot load its files "
                f"({type(error).__name__}: {root_cause(error)[:300]}). Export the variant again."
            ) from error
    else:
        return LoadedVariant(manifest, preprocessor, labels, predict, device)
    release_cached_memory()  # not within `except`: the frames of the error hold tensors
    raise DeviceMemoryError(
        f"{manifest.name} needs more memory than is free on {device}. Free some, choose a smaller "
        "variant, or give device=cpu."
    )


def _found_no_memory(error: Exception, folder: Path, device: str) -> bool:
    """Whether a load failed for memory."""
    if was_out_of_memory(error):
        return True
    if not hides_reason(error):
        return False
    size = sum((folder / name).stat().st_size for name in list_files(folder))
    return lacks_memory(device, size)


def _load_stages(folder: Path, variant: Variant, device: str, threads: int) -> list[Predict]:
    """Load the stages of a cascade; their digests were verified with the cascade."""
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
    """Check that an index of sharded weights names only files of this variant."""
    for name in manifest.files:
        if not name.endswith(".index.json"):
            continue
        index = read_json(folder / name)
        shards = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(shards, dict) or not all(
            isinstance(shard, str) and shard in manifest.files for shard in shards.values()
        ):
            raise ArtifactError(
                f"{manifest.name}: {name} names files outside of the variant. The "
                "artifact is damaged; download it or export the variant again."
            )
