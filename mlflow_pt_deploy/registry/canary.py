"""Tags of a canary: the one that a person sets to start it, and the one that says why it ended."""

from __future__ import annotations

import logging

CANARY_TAG = "pt_deploy.canary"
"""Tag of a registered model: which version is its canary, and its share of the requests."""

CANARY_ENDED_TAG = "pt_deploy.canary_ended"
"""Tag of a version: why a server ended it as a canary. It is not started while it has this tag."""

_MAX_TEXT = 1000

_logger = logging.getLogger(__name__)


def canary_tag(name: str) -> str | None:
    """The tag `pt_deploy.canary` of a registered model; None if it has none.

    Raises:
        MlflowException: The registry is not reachable.
    """
    from mlflow import MlflowClient

    tag: str | None = MlflowClient().get_registered_model(name).tags.get(CANARY_TAG)
    return tag


def note_canary_ended(name: str, version: str, text: str) -> bool:
    """Set the tag `pt_deploy.canary_ended` of a version; returns whether it was written.

    Never raises: a server may have no permission to write to the registry.
    """
    from mlflow import MlflowClient

    try:
        client = MlflowClient()
        client.set_model_version_tag(name, version, CANARY_ENDED_TAG, text[:_MAX_TEXT])
    except Exception as error:  # of MLflow or requests, depending on the store
        _logger.debug("the tag %s cannot be written: %s", CANARY_ENDED_TAG, type(error).__name__)
        return False
    return True
