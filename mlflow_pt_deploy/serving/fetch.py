"""Private, checked copies of models: the one way by which a model comes in from MLflow.

A model is copied first and checked then, and the copy is what is loaded, so that a writer of the
artifact store cannot change it in between. Knows MLflow's stores; does not know what a model is
loaded for.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow_pt_deploy.artifact_files import copy_file, copy_files, list_files
from mlflow_pt_deploy.serving.mlmodel import (
    FILE,
    MANIFEST,
    MLmodel,
    check_digest,
    digest,
    read_mlmodel,
)
from mlflow_pt_deploy.serving.registry import DIGEST_TAG, Address, version_tags

if TYPE_CHECKING:
    from mlflow.pyfunc import PyFuncModel

ALLOW_CODE_ENV = "PT_DEPLOY_ALLOW_CODE"


@dataclass(frozen=True)
class Fetched:
    """A private copy of a model: checked, nothing of it loaded.

    Attributes:
        root: The copy.
        mlmodel: Its MLmodel file.
        tags: What the registry says of the version; empty if it is not registered.
    """

    root: Path
    mlmodel: MLmodel
    tags: Mapping[str, str]

    def options(self, given: Mapping[str, Any] | None) -> dict[str, Any]:
        """All serving options; code is allowed by the operator or by the promotion alone.

        Args:
            given: The operator's ``model_config``.

        Raises:
            ServingError: One of them is wrong.
            UntrustedError: The artifact allows its own code.
        """
        config = self.mlmodel.operator_config(given)
        config["allow_code"] = bool(config.get("allow_code")) or environment_allows_code()
        self.mlmodel.check_claim(config["allow_code"])
        config["allow_code"] |= DIGEST_TAG in self.tags  # `fetch` has compared it
        return config

    def load(self, given: Mapping[str, Any] | None) -> PyFuncModel:
        """Load the copy as MLflow would, with the operator's ``model_config``.

        Raises:
            PtDeployError: It is damaged, carries code that is not allowed, or cannot run here.
        """
        return self.mlmodel.load(self.root, self.options(given))


def environment_allows_code() -> bool:
    """Whether the operator allows code by the environment variable."""
    return os.environ.get(ALLOW_CODE_ENV, "").lower() in {"1", "true"}


def inference_config_allows_code() -> bool:
    """Whether the operator allows code by MLflow's environment variable."""
    try:
        config = json.loads(os.environ.get("MLFLOW_PYFUNC_INFERENCE_CONFIG") or "{}")
    except ValueError:
        return False
    return isinstance(config, dict) and config.get("allow_code") is True


def fetch(address: Address, folder: Path) -> Fetched:
    """Copy a version into a private folder and check it, its promotion's digest included.

    Args:
        address: What to fetch.
        folder: An empty folder that only this user can write to.

    Raises:
        ModelError: It is no model of ours.
        ArtifactError: It holds other than regular files, asks for code, or is not what was
            promoted.
        MlflowException: MLflow cannot find or fetch it.
    """
    root = _copied(address.uri, folder)
    list_files(root)
    mlmodel, tags = read_mlmodel(root), version_tags(address)
    if promoted := tags.get(DIGEST_TAG):
        check_digest(root, promoted, DIGEST_TAG)
    return Fetched(root, mlmodel, tags)


def fetch_mlmodel(uri: str, folder: Path) -> MLmodel:
    """Fetch and check the MLmodel file of a model, and nothing else of it.

    Raises:
        As `fetch`.
    """
    return read_mlmodel(_copied(uri, folder, FILE).parent)


def fetch_digest(uri: str, folder: Path) -> str:
    """The digest that a promotion of a model writes down, from the files in the store.

    Raises:
        As `fetch`; also UntrustedError where the artifact allows its own code.
    """
    root = _copied(uri, folder, FILE).parent
    read_mlmodel(root).check_claim(allowed=False)
    target = root / MANIFEST
    target.parent.mkdir(exist_ok=True)
    _copied(uri, folder, MANIFEST).replace(target)
    return digest(root)


def _copied(uri: str, folder: Path, part: str = "") -> Path:
    """A model's folder, or one file of it, copied below `folder`; not checked yet."""
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import RESOURCE_DOES_NOT_EXIST
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository
    from mlflow.store.artifact.runs_artifact_repo import RunsArtifactRepository
    from mlflow.tracking.artifact_utils import _get_root_uri_and_artifact_path

    root_uri, place = _get_root_uri_and_artifact_path(uri)
    place = "/".join(filter(None, (place, part)))
    repository = get_artifact_repository(root_uri)
    if not isinstance(repository, RunsArtifactRepository):  # a run's models are stored elsewhere
        repository = getattr(repository, "repo", repository)
    if not isinstance(repository, LocalArtifactRepository):
        return Path(repository.download_artifacts(place, str(folder)))
    # MLflow's own copy follows links and opens devices.
    source = Path(repository.artifact_dir, place)
    if not source.exists():
        raise MlflowException(f"there is no {source}.", error_code=RESOURCE_DOES_NOT_EXIST)
    if source.is_dir():
        source = source.resolve()  # the operator may name a link; what is in it may not be one
        copy_files(source, folder / source.name)
        return folder / source.name
    copy_file(source, folder / source.name)
    return folder / source.name
