"""Words of the command line to served models: ``URI``, ``NAME=URI``, ``@FILE``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mlflow_pt_deploy.errors import ServingError
from mlflow_pt_deploy.registry.addresses import ModelSpec, ResolvedVersion, ServedVersion, source
from mlflow_pt_deploy.serving.lifecycle.served_model import ServedModel
from mlflow_pt_deploy.serving.observability.metrics import Metrics

_NAMED = re.compile(r"([A-Za-z0-9][\w.-]*)=(.+)")


def name_models(
    words: Sequence[str],
    model_config: Mapping[str, Any] | None = None,
    metrics: Metrics | None = None,
    served: Mapping[str, Any] | None = None,
) -> dict[str, ServedModel]:
    """A served model for each word, under the name it has or is given.

    Args:
        words: Of the command line.
        model_config: Serving options of all models.
        metrics: Counts swaps and rejections.
        served: What was served before under these names, see `WorkerStates.served`.

    Raises:
        ServingError: No models, two of one name, or a wrong option.
    """
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
        models[name] = ServedModel(name, provider, metrics=metrics, last_served=last)
    if not models:
        raise ServingError("there is nothing to serve; give models:/NAME@champion")
    return models


def _name(uri: str) -> str:
    """The registered model's name, or the last part of a path, as a part of a URL."""
    registered = re.fullmatch(r"models:/+([^/@]+)(?:[/@].*)?", uri)
    name = registered[1] if registered else uri.rstrip("/").rpartition("/")[2]
    return re.sub(r"[^\w.-]", "-", name.removeprefix("@")) or "model"
