"""Promote a logged model: register a version, describe it and move the alias `champion`.

Which variant to promote is decided in `selection.policy`.
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
from mlflow_pt_deploy.registry.addresses import DIGEST_TAG
from mlflow_pt_deploy.registry.fetch import fetch_digest
from mlflow_pt_deploy.registry.mlmodel import FLAVOR_NAME

CHAMPION = "champion"
PREVIOUS = "previous"


@dataclass(frozen=True)
class Promotion:
    """Result of a promotion.

    Attributes:
        name: Name of the registered model.
        version: The new `champion` version.
        previous: The former `champion` version, or None if there was none or it is the same.
    """

    name: str
    version: str
    previous: str | None

    @property
    def uri(self) -> str:
        """URI of the champion."""
        return f"models:/{self.name}@{CHAMPION}"


def promote(
    model_uri: str, name: str, reason: str, tags: Mapping[str, str] | None = None
) -> Promotion:
    """Register a logged model and move the alias `champion` to it.

    The former champion gets the alias `previous`. If the logged model is already registered under
    this name, its version is reused.

    Args:
        model_uri: ``models:/m-...`` of a logged pt_deploy model.
        name: Name of the registered model; created if it does not exist.
        reason: Why the model is promoted; stored as the description of the version.
        tags: Additional tags of the version, e.g. its latency.

    Raises:
        TrackingError: The registry rejects the request, or the model lacks the `pt_deploy` flavor.
        ArtifactError: The MLmodel file asks for code, or is damaged.
    """
    client = MlflowClient()
    try:
        digest = _digest(model_uri)
        version = _registered_version(client, model_uri, name)
        if version is None:
            version = str(mlflow.register_model(model_uri, name).version)
        client.update_model_version(name, version, reason)
        for key, value in {DIGEST_TAG: digest, **(tags or {})}.items():
            client.set_model_version_tag(name, version, key, value)
        current = champion(name)
        previous = current if current != version else None
        if previous is not None:
            client.set_registered_model_alias(name, PREVIOUS, previous)
        client.set_registered_model_alias(name, CHAMPION, version)
    except MlflowException as error:
        raise TrackingError(
            f"{name} was not promoted: {error.message} Check the alias {CHAMPION} in the registry "
            "and run pt-deploy promote again."
        ) from error
    return Promotion(name, version, previous)


def champion(name: str) -> str | None:
    """Return the version with the alias `champion`, or None."""
    try:
        return str(MlflowClient().get_model_version_by_alias(name, CHAMPION).version)
    except MlflowException:
        return None


def _digest(model_uri: str) -> str:
    """Compute the digest from the files in the artifact store."""
    with tempfile.TemporaryDirectory(prefix="pt-deploy-promote-") as folder:
        try:
            return fetch_digest(model_uri, Path(folder))
        except ModelError as error:
            raise TrackingError(
                f"{model_uri} has no {FLAVOR_NAME} flavor. Promote a model logged by pt-deploy "
                "optimize."
            ) from error


def _registered_version(client: MlflowClient, model_uri: str, name: str) -> str | None:
    versions = client.search_model_versions(f"name = '{name}'")
    return next((str(v.version) for v in versions if v.source == model_uri), None)
