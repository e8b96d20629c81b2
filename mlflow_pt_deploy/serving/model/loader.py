"""Load a model whose MLmodel file was validated; imports nothing of MLflow."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mlflow_pt_deploy.artifacts import LoadedVariant, load_variant, read_manifest, verify
from mlflow_pt_deploy.artifacts.manifest import Manifest
from mlflow_pt_deploy.errors import ArtifactError
from mlflow_pt_deploy.model_config import ServingOptions
from mlflow_pt_deploy.registry.mlmodel import FOLDER, MLmodel
from mlflow_pt_deploy.serving.model.pyfunc import PtDeployPyFunc
from mlflow_pt_deploy.system.background import at_low_priority

Placement = Callable[[Path, Manifest, ServingOptions], LoadedVariant]
"""Loads a variant somewhere: its folder, its manifest, all serving options."""


def load_checked(root: Path, mlmodel: MLmodel, config: Mapping[str, Any]) -> PtDeployPyFunc:
    """Load a model with a validated MLmodel file.

    Args:
        root: Folder of the model, writable only by this user.
        mlmodel: The validated MLmodel file.
        config: All serving options; `allow_code` was set by the operator or by a promotion.

    Raises:
        PtDeployError: The model is damaged, contains code that is not allowed, or is not supported
            on this machine.
    """
    options = ServingOptions.from_config(config)
    return PtDeployPyFunc(load_logged_variant(root, mlmodel, options), config)


def load_logged_variant(root: Path, mlmodel: MLmodel, options: ServingOptions) -> LoadedVariant:
    """Load the variant of a model after comparing its manifest with the MLmodel file.

    Raises:
        PtDeployError: See `load_checked`.
    """
    folder = root / FOLDER
    manifest = read_manifest(folder)  # the other files are verified on load
    if manifest.digest != mlmodel.logged_digest:
        raise ArtifactError(
            f"{manifest.name}: manifest.json is not the one that was logged (SHA-256 differs). "
            "The artifact is corrupted; log the variant again."
        )
    return _placements[-1](folder, manifest, options)


def load_here(folder: Path, manifest: Manifest, options: ServingOptions) -> LoadedVariant:
    """Load a variant into this process; see `Placement`."""
    at_low_priority(partial(verify, folder))  # it hashes all files, beside requests
    return load_variant(
        folder,
        verified=True,
        device=options.device,
        threads=options.num_threads,
        allow_code=options.allow_code,
    )


def use_placement(placement: Placement) -> None:
    """Load variants this way in this process from now on."""
    _placements.append(placement)


_placements: list[Placement] = [load_here]
