"""Tag of a registered version with the reason why a server rejected it, shown in the UI."""

from __future__ import annotations

import logging
import socket

from mlflow_pt_deploy.registry.addresses import ResolvedVersion

REFUSED_TAG = "pt_deploy.refused"
_MAX_REASON = 1000

_logger = logging.getLogger(__name__)


def note_refusal(version: ResolvedVersion, reason: str) -> None:
    """Set the tag `pt_deploy.refused` of a version, or remove it if the reason is empty.

    Never raises: a server may have no permission to write to the registry.
    """
    if version.name is None or version.version is None:
        return
    from mlflow import MlflowClient

    try:
        client = MlflowClient()
        if reason:
            text = f"{reason[:_MAX_REASON]} (server on {socket.gethostname()})"
            client.set_model_version_tag(version.name, version.version, REFUSED_TAG, text)
        else:
            client.delete_model_version_tag(version.name, version.version, REFUSED_TAG)
    except Exception as error:  # of MLflow or requests, depending on the store
        _logger.info("the tag %s cannot be written: %s", REFUSED_TAG, type(error).__name__)
