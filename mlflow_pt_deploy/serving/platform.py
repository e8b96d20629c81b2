"""Settings from the environment of a platform: containers, clouds, Kubernetes.

Pure functions of environment variables. An option of the command line goes first, then its own
variable ``PT_DEPLOY_<OPTION>``, then the variable of the platform, then the default.

| platform | model | port | routes |
|---|---|---|---|
| SageMaker | /opt/ml/model | image: 8080 | /ping, /invocations |
| Vertex AI | | AIP_HTTP_PORT | AIP_HEALTH_ROUTE, AIP_PREDICT_ROUTE |
| Azure ML | AZUREML_MODEL_DIR | | configured there |
| KServe | /mnt/models | image: 8080 | configured there |
| Cloud Run, Knative, Heroku | | PORT | any |
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mlflow_pt_deploy.errors import ServingError
from mlflow_pt_deploy.option_fields import OptionSpec, option_specs
from mlflow_pt_deploy.serving.settings import ServerSettings

MODEL_ENV = "PT_DEPLOY_MODEL"
MODEL_FOLDERS = ("/opt/ml/model", "/mnt/models")
"""Where SageMaker and KServe put a model."""

_PREFIX = "PT_DEPLOY_"
_PORTS = ("AIP_HTTP_PORT", "PORT")
_ROUTES = {"AIP_PREDICT_ROUTE": "/invocations", "AIP_HEALTH_ROUTE": "/readyz"}
_BOOLEANS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


def default_model(
    environment: Mapping[str, str], has_model: Callable[[str], bool] | None = None
) -> str:
    """The model that is served if the command line names none.

    Args:
        environment: Environment variables.
        has_model: Whether a folder holds an MLflow model.

    Returns:
        ``$PT_DEPLOY_MODEL``; else the folder where the platform puts the model, or its only
        subfolder with a model.

    Raises:
        ServingError: There is none.
    """
    if model := environment.get(MODEL_ENV):
        return model
    has_model = has_model or _has_model
    azure = environment.get("AZUREML_MODEL_DIR")
    for folder in filter(None, (azure, *MODEL_FOLDERS)):
        for candidate in (folder, *_subfolders(folder)):
            if has_model(candidate):
                return candidate
    raise ServingError(
        f"no model was given. Give models:/NAME@champion, runs:/RUN_ID/NAME or a folder, or set "
        f"{MODEL_ENV}. There is none in {' or '.join(MODEL_FOLDERS)} either."
    )


def settings_from(environment: Mapping[str, str]) -> dict[str, Any]:
    """Settings of the server that environment variables name; see `ServerSettings`.

    Raises:
        ServingError: The value of a variable has the wrong type.
    """
    found: dict[str, Any] = {}
    for spec in option_specs(ServerSettings):
        names = [_PREFIX + spec.name.upper(), *(_PORTS if spec.name == "port" else ())]
        for name in names:
            if text := environment.get(name):
                found[spec.name] = _parse(name, text, spec)
                break
    return found


def routes_from(environment: Mapping[str, str]) -> dict[str, str]:
    """Additional paths that the platform wants, and the path of this server that answers."""
    found = {environment.get(name, ""): path for name, path in _ROUTES.items()}
    return {route: path for route, path in found.items() if route.startswith("/")}


def _parse(name: str, text: str, spec: OptionSpec) -> Any:
    try:
        return _BOOLEANS[text.lower()] if spec.type is bool else spec.type(text)
    except (KeyError, ValueError) as error:
        kind = {bool: "1 or 0", int: "a whole number", float: "a number"}[spec.type]
        raise ServingError(f"{name} is {text[:40]!r}; it must be {kind}: {spec.help}") from error


def _has_model(folder: str) -> bool:
    return Path(folder, "MLmodel").is_file()


def _subfolders(folder: str) -> list[str]:
    try:
        return sorted(entry.path for entry in os.scandir(folder) if entry.is_dir())
    except OSError:
        return []
