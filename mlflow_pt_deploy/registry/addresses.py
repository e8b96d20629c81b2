"""Resolve model URIs to registered versions.

Every call queries the registry and nothing is cached, so that a moved alias, a copied version or a
changed stage takes effect at the next poll.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mlflow_pt_deploy.errors import PtDeployError, ServingError, TrackingError
from mlflow_pt_deploy.model_config import ServingOptions

DIGEST_TAG = "pt_deploy.digest"

BASELINE_TAG = "pt_deploy.baseline"
"""Tag of a version: the version that was registered with it as the baseline."""

RUN_TAG = "pt_deploy.run"
"""Tag of a version: run of the optimize stage that measured it."""

AGREEMENT_TAG = "pt_deploy.agreement"
"""Tag of a version: share of the validation rows with the label of the baseline."""

LOGGED_METRICS = ("accuracy", "latency_p50_ms", "speedup")
"""Metrics that a promotion copies to the tags of a version."""

_MAX_REASON = 1000


@dataclass(frozen=True)
class ModelSpec:
    """A model to serve and its serving options.

    Attributes:
        uri: ``models:/NAME@champion``, ``models:/NAME/3``, ``runs:/...`` or a folder.
        model_config: Serving options; names and types are validated.
    """

    uri: str
    model_config: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ServingOptions.from_config(self.model_config)


def registry_variables() -> dict[str, str]:
    """Return environment variables that give a child process the registry of this process.

    The calling program may have set the URIs in Python. If MLflow is not imported, the environment
    is already correct.
    """
    mlflow = sys.modules.get("mlflow")
    if mlflow is None:
        return {}
    return {
        "MLFLOW_TRACKING_URI": mlflow.get_tracking_uri(),
        "MLFLOW_REGISTRY_URI": mlflow.get_registry_uri(),
    }


@dataclass(frozen=True)
class ResolvedVersion:
    """An immutable model version.

    Attributes:
        uri: URI that MLflow loads.
        name: Name of the registered model, or None if the model is not registered.
        version: Version number, or None if the model is not registered.
    """

    uri: str
    name: str | None = None
    version: str | None = None


class ServedVersion(NamedTuple):
    """The version that a server serves, and the specification it was resolved from."""

    spec: ModelSpec
    version: ResolvedVersion


SpecProvider = Callable[[], ModelSpec]
"""Returns the current specification; called at every poll, because a file may change."""


def source(argument: str, model_config: Mapping[str, Any] | None = None) -> SpecProvider:
    """Create the provider for a command line argument: an MLflow URI or ``@FILE``.

    The file contains JSON, ``{"uri": "models:/NAME/3", "model_config": {"num_threads": 2}}``. It
    is read at every poll. Replace it by renaming another file, so that it is never half written.

    Args:
        argument: An MLflow URI, a folder, or ``@FILE``.
        model_config: Serving options for a URI; ignored for a file.

    Raises:
        ServingError: A serving option is invalid; the message names it.
    """
    if argument.startswith("@"):
        return lambda: _read_spec(Path(argument[1:]))
    spec = ModelSpec(argument, dict(model_config or {}))
    return lambda: spec


def resolve(uri: str) -> ResolvedVersion:
    """Return the version that `uri` refers to now.

    Raises:
        MlflowException: The registry is not reachable, or has no such model, version or alias.
    """
    if not uri.startswith("models:"):
        return ResolvedVersion(uri)
    from mlflow import MlflowClient
    from mlflow.store.artifact.utils.models import get_model_name_and_version

    found = get_model_name_and_version(MlflowClient(), uri)
    if len(found) == 1:  # models:/m-ID, a logged model that is not registered
        return ResolvedVersion(uri)
    name, version = found
    return ResolvedVersion(f"models:/{name}/{version}", name, str(version))


def version_tags(resolved: ResolvedVersion) -> dict[str, str]:
    """Return the registry tags of the version, e.g. digest and latency; empty if unregistered.

    Raises:
        MlflowException: The registry is not reachable.
    """
    if resolved.name is None or resolved.version is None:
        return {}
    from mlflow import MlflowClient

    return dict(MlflowClient().get_model_version(resolved.name, resolved.version).tags)


def find_baseline(name: str, tags: Mapping[str, str]) -> ResolvedVersion | None:
    """Return the version that was registered as the baseline of a promotion, or None.

    Args:
        name: Registered model.
        tags: Tags of the version that was promoted. A copy in another registered model has the
            tags of the original, so the version must be of the same run.

    Raises:
        MlflowException: The registry is not reachable.
    """
    version = tags.get(BASELINE_TAG)
    if version is None:
        return None
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        found = MlflowClient().get_model_version(name, version)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    if found.tags.get(RUN_TAG) != tags.get(RUN_TAG):
        return None
    return ResolvedVersion(f"models:/{name}/{version}", name, version)


def logged_metrics(tags: Mapping[str, str]) -> dict[str, float]:
    """Metrics that a promotion copied to a version's tags; those that are not numbers are left out.

    Args:
        tags: See `version_tags`.
    """
    found = {}
    for key in LOGGED_METRICS:
        with suppress(KeyError, ValueError):
            found[key] = float(tags[key])
    return found


def without_password(text: str) -> str:
    """A text without the user and password of URIs in it."""
    return re.sub(r"://[^/@\s]+@", "://", text)


def explain_load_error(error: Exception) -> PtDeployError:
    """Convert an error on fetching or opening a model to a `PtDeployError` with MLflow's reason."""
    if isinstance(error, PtDeployError):
        return error
    # Join all lines: MLflow gives the cause after the first line.
    text = str(error).partition("\nTraceback")[0] or type(error).__name__
    reason = " ".join(text.replace("#", " ").split())[:_MAX_REASON].rstrip(" .")
    return TrackingError(
        f"the model cannot be fetched or opened: {reason}. Check its address and "
        "MLFLOW_TRACKING_URI."
    )


def _read_spec(path: Path) -> ModelSpec:
    try:
        return ModelSpec(**json.loads(path.read_text(encoding="utf8")))
    except (OSError, ValueError, TypeError) as error:
        raise ServingError(
            f"{path.name} is not a valid model file; write "
            '{"uri": "models:/NAME@champion", "model_config": {}}'
        ) from error
