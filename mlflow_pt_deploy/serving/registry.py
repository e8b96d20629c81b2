"""What is to be served, and what its address means at this moment.

The registry is asked each time and nothing is remembered, so that every gesture counts: an alias
moved, a version copied, a stage set. Knows nothing of loading or of HTTP.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mlflow_pt_deploy.errors import PtDeployError, ServingError, TrackingError
from mlflow_pt_deploy.serving.options import Options

DIGEST_TAG = "pt_deploy.digest"
_LONGEST_REASON = 1000


@dataclass(frozen=True)
class Target:
    """What somebody wants served.

    Attributes:
        uri: ``models:/NAME@champion``, ``models:/NAME/3``, ``runs:/...`` or a folder.
        model_config: Serving options; checked by name.
    """

    uri: str
    model_config: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        Options.from_config(self.model_config)


def registry_variables() -> dict[str, str]:
    """Environment variables by which a child talks to the registry that this process talks to.

    A program that calls us may have set it in Python; where MLflow is not loaded nobody has, and
    the environment already says which it is.
    """
    mlflow = sys.modules.get("mlflow")
    if mlflow is None:
        return {}
    return {
        "MLFLOW_TRACKING_URI": mlflow.get_tracking_uri(),
        "MLFLOW_REGISTRY_URI": mlflow.get_registry_uri(),
    }


@dataclass(frozen=True)
class Address:
    """One version, which never becomes another.

    Attributes:
        uri: What MLflow loads.
        name: The registered model, or None where the registry does not know the model.
        version: Its version there.
    """

    uri: str
    name: str | None = None
    version: str | None = None


class Served(NamedTuple):
    """What answers somewhere: what was asked for there, and the version that it became."""

    target: Target
    address: Address


Source = Callable[[], Target]
"""Asked at every look; a file's content may change, a word on the command line does not."""


def source(word: str, model_config: Mapping[str, Any] | None = None) -> Source:
    """Where a target comes from: an MLflow URI, or ``@FILE``.

    The file is JSON, ``{"uri": "models:/NAME/3", "model_config": {"num_threads": 2}}``, and is read
    again at every look; replace it by renaming, never by writing into it.

    Raises:
        ServingError: A serving option is wrong; names it.
    """
    if word.startswith("@"):
        return lambda: _read(Path(word[1:]))
    target = Target(word, dict(model_config or {}))
    return lambda: target


def resolve(uri: str) -> Address:
    """The version that `uri` names now.

    Raises:
        MlflowException: The registry does not answer, or knows no such model, version or alias.
    """
    if not uri.startswith("models:"):
        return Address(uri)
    from mlflow import MlflowClient
    from mlflow.store.artifact.utils.models import get_model_name_and_version

    found = get_model_name_and_version(MlflowClient(), uri)
    if len(found) == 1:  # models:/m-ID, a logged model that nobody registered
        return Address(uri)
    name, version = found
    return Address(f"models:/{name}/{version}", name, str(version))


def version_tags(address: Address) -> dict[str, str]:
    """What a promotion wrote on the version: its digest, its latency, ...; empty if unregistered.

    Raises:
        MlflowException: The registry does not answer.
    """
    if address.name is None or address.version is None:
        return {}
    from mlflow import MlflowClient

    return dict(MlflowClient().get_model_version(address.name, address.version).tags)


def in_words(error: Exception) -> PtDeployError:
    """An error of fetching or opening a model as one of ours, with MLflow's whole reason."""
    if isinstance(error, PtDeployError):
        return error
    # On one line: MLflow gives its reasons after the first one.
    text = str(error).partition("\nTraceback")[0] or type(error).__name__
    reason = " ".join(text.replace("#", " ").split())[:_LONGEST_REASON].rstrip(" .")
    return TrackingError(
        f"the model cannot be fetched or opened: {reason}. Look at its address, and at "
        "MLFLOW_TRACKING_URI."
    )


def _read(path: Path) -> Target:
    try:
        return Target(**json.loads(path.read_text(encoding="utf8")))
    except (OSError, ValueError, TypeError) as error:
        raise ServingError(
            f"{path.name} cannot be read as a target; write "
            '{"uri": "models:/NAME@champion", "model_config": {}}'
        ) from error
