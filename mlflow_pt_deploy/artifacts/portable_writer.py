"""Combine a variant for the CPU and one for a GPU into a portable variant."""

from __future__ import annotations

import shutil
from pathlib import Path

from mlflow_pt_deploy.artifacts.loading import verify
from mlflow_pt_deploy.artifacts.manifest import Manifest
from mlflow_pt_deploy.artifacts.writing import check_same_inputs, staged
from mlflow_pt_deploy.errors import VariantError
from mlflow_pt_deploy.runtimes.catalog import RUNTIMES
from mlflow_pt_deploy.runtimes.portable import Portable
from mlflow_pt_deploy.system.device import CPU, CUDA


def write_portable(cpu_folder: Path, cuda_folder: Path, target: Path) -> Manifest:
    """Combine two variants of a model into `target`. The folder is created atomically.

    Nothing is loaded: each variant keeps the golden rows of its export, and a portable variant has
    none of its own.

    Args:
        cpu_folder: Folder of the variant for hosts without a GPU.
        cuda_folder: Folder of the variant for hosts with one.
        target: Folder to create; an existing one is replaced.

    Raises:
        VariantError: The variants are not for these devices, are combinations themselves, or their
            models, class names or preprocessing differ.
        ArtifactError: A folder is incomplete or changed.
        OSError: The disk is full or not writable; partial output is removed.
    """
    cpu, cuda = verify(cpu_folder), verify(cuda_folder)
    for manifest, device in ((cpu, CPU), (cuda, CUDA)):
        _check_stage(manifest, device)
    if cpu.model != cuda.model:
        raise VariantError(
            f"{cpu.name} and {cuda.name} cannot form a portable variant: their models differ. "
            "Export both from one model."
        )
    shared = check_same_inputs(
        cpu_folder, cuda_folder, "form a portable variant", "Export both from one model."
    )
    portable = Portable(cpu=cpu.name, cuda=cuda.name, trusted=cpu.carries_code or cuda.carries_code)
    with staged(target, portable, cpu.model) as folder:
        shutil.copytree(cpu_folder, folder / CPU)
        shutil.copytree(cuda_folder, folder / CUDA)
        for part in shared:
            shutil.copyfile(cpu_folder / part, folder / part)
    return verify(target)


def _check_stage(manifest: Manifest, device: str) -> None:
    """Check that a variant is for a device, and not made of other variants."""
    if RUNTIMES[manifest.runtime].stages:
        raise VariantError(
            f"{manifest.name} cannot be a part of a portable variant: it is made of variants "
            f"itself ({manifest.runtime}). Give a single one."
        )
    if manifest.device != device:
        raise VariantError(
            f"{manifest.name} was built for device={manifest.device}, and a portable variant needs "
            f"one for device={device} in its place. Give the one for the CPU first."
        )
