"""The registry: a version, an alias, and a reason that a person can read in the UI.

Only acts; who is promoted is decided elsewhere (`policy`).
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from mlflow_pt_deploy.errors import ModelError, TrackingError
from mlflow_pt_deploy.serving.fetch import fetch_digest
from mlflow_pt_deploy.serving.mlmodel import FLAVOR_NAME
from mlflow_pt_deploy.serving.registry import DIGEST_TAG

CHAMPION = "champion"
PREVIOUS = "previous"


@dataclass(frozen=True)
class Promotion:
    """What a promotion changed.

    Attributes:
        name: The registered model.
        version: The version that is `champion` now.
        previous: The version that was, or None where there was none or it is the same.
    """

    name: str
    version: str
    previous: str | None

    @property
    def uri(self) -> str:
        """What to serve."""
        return f"models:/{self.name}@{CHAMPION}"


def promote(
    model_uri: str, name: str, reason: str, tags: Mapping[str, str] | None = None
) -> Promotion:
    """Register a logged model and move the alias `champion` to it.

    The old champion keeps the alias `previous`. A model that is registered already under this
    name is not registered twice.

    Args:
        model_uri: ``models:/m-...`` of a logged pt_deploy model.
        name: Name of the registered model; created if it is new.
        reason: Why, in words; becomes the version's description.
        tags: More facts for the version, e.g. its latency.

    Raises:
        TrackingError: The registry refused, or the model is not one of ours.
        ArtifactError: Its MLmodel asks for code, or is damaged.
    """
    client = MlflowClient()
    try:
        digest = _digest(model_uri)
        version = _registered(client, model_uri, name)
        if version is None:
            version = str(mlflow.register_model(model_uri, name).version)
        client.update_model_version(name, version, reason)
        for key, value in {DIGEST_TAG: digest, **(tags or {})}.items():
            client.set_model_version_tag(name, version, key, value)
        before = champion(name)
        previous = before if before != version else None
        if previous is not None:
            client.set_registered_model_alias(name, PREVIOUS, previous)
        client.set_registered_model_alias(name, CHAMPION, version)
    except MlflowException as error:
        raise TrackingError(
            f"{name} was not promoted: {error.message} The alias {CHAMPION} is where it was, or "
            "see the registry; run pt-deploy promote again."
        ) from error
    return Promotion(name, version, previous)


def champion(name: str) -> str | None:
    """The version that the alias `champion` names, or None."""
    try:
        return str(MlflowClient().get_model_version_by_alias(name, CHAMPION).version)
    except MlflowException:
        return None


def _digest(model_uri: str) -> str:
    """The digest of what lies in the artifact store, not of what the MLmodel says of itself."""
    with tempfile.TemporaryDirectory(prefix="pt-deploy-promote-") as folder:
        try:
            return fetch_digest(model_uri, Path(folder))
        except ModelError as error:
            raise TrackingError(
                f"{model_uri} has no {FLAVOR_NAME} flavor. Promote what pt-deploy optimize logged."
            ) from error


def _registered(client: MlflowClient, model_uri: str, name: str) -> str | None:
    versions = client.search_model_versions(f"name = '{name}'")
    return next((str(v.version) for v in versions if v.source == model_uri), None)
