"""Parses model arguments of the command line: ``URI``, ``NAME=URI``, ``@FILE``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow_pt_deploy.errors import ServingError
from mlflow_pt_deploy.registry.addresses import ModelSpec, ResolvedVersion, ServedVersion, source

if TYPE_CHECKING:
    from mlflow_pt_deploy.serving.lifecycle.served_model import ServedModel
    from mlflow_pt_deploy.serving.observability.metrics import Metrics

_NAMED = re.compile(r"([A-Za-z0-9][\w.-]*)=(.+)")
_REGISTERED = re.compile(r"models:/+([^/@]+)(?:[/@].*)?")
_SCHEME = re.compile("[A-Za-z][A-Za-z0-9+.-]+:")


def name_models(
    words: Sequence[str],
    model_config: Mapping[str, Any] | None = None,
    metrics: Metrics | None = None,
    served: Mapping[str, Any] | None = None,
    **parts: Any,
) -> dict[str, ServedModel]:
    """Create a served model for each argument.

    Args:
        words: Model arguments.
        model_config: Serving options of all models.
        metrics: Counts swaps and rejections.
        served: Versions that were served under these names before, see `WorkerStates.served`.
        **parts: Other arguments of `ServedModel`.

    Returns:
        Models by name: the given one, else the registered model's or the last part of the path.

    Raises:
        ServingError: There is no model, two have the same name, or an option is invalid.
    """
    from mlflow_pt_deploy.serving.lifecycle.served_model import ServedModel

    models: dict[str, ServedModel] = {}
    for word in words:
        named = _NAMED.fullmatch(word)
        name, uri = (named[1], named[2]) if named else (_name(word), word)
        if name in models:
            raise ServingError(f"two models are called {name}; name them: {name}=... other=...")
        before = (served or {}).get(name)
        last = None
        if before:
            last = ServedVersion(ModelSpec(**before["spec"]), ResolvedVersion(**before["version"]))
        provider = source(uri, model_config)
        models[name] = ServedModel(name, provider, metrics=metrics, last_served=last, **parts)
    if not models:
        raise ServingError("there is nothing to serve; give models:/NAME@champion")
    return models


def registered_names(words: Sequence[str]) -> set[str]:
    """Registered models among model arguments.

    Raises:
        ServingError: A file of ``@FILE`` cannot be read.
    """
    found = (_REGISTERED.fullmatch(source(_uri(word))().uri) for word in words)
    return {registered[1] for registered in found if registered}


def _uri(word: str) -> str:
    """A model argument without its name."""
    named = _NAMED.fullmatch(word)
    return named[2] if named else word


def _name(uri: str) -> str:
    """The registered model's name, or the last part of a path, with URL-safe characters."""
    registered = _REGISTERED.fullmatch(uri)
    name = registered[1] if registered else uri.rstrip("/").rpartition("/")[2]
    return re.sub(r"[^\w.-]", "-", name.removeprefix("@")) or "model"


def check_folder(word: str) -> None:
    """Check that a model given as a folder exists; URIs with a scheme are not checked.

    Args:
        word: Model argument, see `serve`.

    Raises:
        ServingError: The folder does not exist, or MLflow did not save it.
    """
    uri = _uri(word)
    if uri.startswith("@") or _SCHEME.match(uri):
        return
    folder = Path(uri)
    if (folder / "MLmodel").is_file():
        return
    fault = "is no MLflow model: it has no file MLmodel" if folder.is_dir() else "is not a folder"
    if not folder.exists():
        fault = "is not there"
    cure = "Give a folder that MLflow saved, models:/NAME@champion or runs:/RUN_ID/NAME"
    if (folder / "config.json").is_file():
        cure = f"Make variants of it with pt-deploy optimize --model {uri}, and serve one of them"
    raise ServingError(f"the model {uri} {fault}. {cure}.")
