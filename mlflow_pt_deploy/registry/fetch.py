"""Fetch models from MLflow as private, verified copies.

A model is copied first, then verified, and loaded from the copy, so that it cannot be changed in
the artifact store between verification and loading.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow_pt_deploy.errors import ServingError
from mlflow_pt_deploy.registry.addresses import DIGEST_TAG, ResolvedVersion, version_tags
from mlflow_pt_deploy.registry.mlmodel import (
    FILE,
    MANIFEST,
    MLmodel,
    check_digest,
    digest,
    inference_config,
    read_mlmodel,
)
from mlflow_pt_deploy.system.regular_files import copy_file, copy_files, list_files

if TYPE_CHECKING:
    from mlflow_pt_deploy.serving.model.pyfunc import PtDeployPyFunc

ALLOW_CODE_ENV = "PT_DEPLOY_ALLOW_CODE"


@dataclass(frozen=True)
class Fetched:
    """A private copy of a model: verified, not loaded.

    Attributes:
        root: Folder of the copy.
        mlmodel: Its MLmodel file.
        tags: Registry tags of the version; empty if it is not registered.
    """

    root: Path
    mlmodel: MLmodel
    tags: Mapping[str, str]

    def options(self, model_config: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return all serving options. Only the operator or a promotion can allow code.

        Args:
            model_config: Options of the operator.

        Raises:
            ServingError: An option is invalid.
            UntrustedError: The artifact allows its own code.
        """
        config = self.mlmodel.operator_config(model_config)
        config["allow_code"] = bool(config.get("allow_code")) or environment_allows_code()
        self.mlmodel.check_claim(config["allow_code"])
        config["allow_code"] |= DIGEST_TAG in self.tags  # `fetch` has verified the digest
        return config

    def load(self, model_config: Mapping[str, Any] | None) -> PtDeployPyFunc:
        """Load the copy with the options of the operator.

        Raises:
            PtDeployError: The model is damaged, contains code that is not allowed, or is not
                supported on this machine.
        """
        return self.mlmodel.load(self.root, self.options(model_config))


def environment_allows_code() -> bool:
    """Whether ``PT_DEPLOY_ALLOW_CODE`` allows code."""
    return os.environ.get(ALLOW_CODE_ENV, "").lower() in {"1", "true"}


def inference_config_allows_code() -> bool:
    """Whether ``MLFLOW_PYFUNC_INFERENCE_CONFIG`` allows code."""
    with suppress(ServingError):
        return inference_config().get("allow_code") is True
    return False


def fetch(resolved: ResolvedVersion, folder: Path) -> Fetched:
    """Copy a version into a private folder and verify it against the digest of its promotion.

    Args:
        resolved: The version to fetch.
        folder: An empty folder that only this user can write to.

    Raises:
        ModelError: The model does not have the `pt_deploy` flavor.
        ArtifactError: The model contains special files, asks for code, or differs from the
            promoted content.
        MlflowException: MLflow cannot find or fetch the model.
    """
    root = _copy(resolved.uri, folder)
    list_files(root)
    mlmodel, tags = read_mlmodel(root), version_tags(resolved)
    if promoted := tags.get(DIGEST_TAG):
        check_digest(root, promoted, DIGEST_TAG)
    return Fetched(root, mlmodel, tags)


def fetch_mlmodel(uri: str, folder: Path) -> MLmodel:
    """Fetch and check only the MLmodel file of a model.

    Raises:
        As `fetch`.
    """
    return read_mlmodel(_copy(uri, folder, FILE).parent)


def fetch_digest(uri: str, folder: Path) -> str:
    """Return the digest for the promotion of a model, from the files in the artifact store.

    Raises:
        As `fetch`; also UntrustedError if the artifact allows its own code.
    """
    root = _copy(uri, folder, FILE).parent
    read_mlmodel(root).check_claim(allowed=False)
    target = root / MANIFEST
    target.parent.mkdir(exist_ok=True)
    _copy(uri, folder, MANIFEST).replace(target)
    return digest(root)


def _copy(uri: str, folder: Path, part: str = "") -> Path:
    """Copy a model folder, or one file of it, into `folder` without verification."""
    if os.path.isdir(uri):  # without MLflow, whose import takes a second
        return _copy_local(Path(uri, part), folder)
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
    from mlflow.store.artifact.runs_artifact_repo import RunsArtifactRepository
    from mlflow.tracking.artifact_utils import _get_root_uri_and_artifact_path

    root_uri, path = _get_root_uri_and_artifact_path(uri)
    path = "/".join(filter(None, (path, part)))
    repository = get_artifact_repository(root_uri)
    if not isinstance(repository, RunsArtifactRepository):  # models of a run are stored elsewhere
        repository = getattr(repository, "repo", repository)
    if not isinstance(repository, LocalArtifactRepository):
        return Path(repository.download_artifacts(path, str(folder)))
    source = Path(repository.artifact_dir, path)
    if not source.exists():
        raise MlflowException(f"{source} does not exist.", error_code=RESOURCE_DOES_NOT_EXIST)
    return _copy_local(source, folder)


def _copy_local(source: Path, folder: Path) -> Path:
    """Copy regular files only: MLflow's own copy follows links and opens devices."""
    if source.is_dir():
        source = source.resolve()  # the folder itself may be a link, its content may not
        copy_files(source, folder / source.name)
        return folder / source.name
    copy_file(source, folder / source.name)
    return folder / source.name
