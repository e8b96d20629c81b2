"""A model registry of its own for tests, and tiny models in it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from tiny.serving import save_tiny

NAME = "tiny"


def new_registry(folder: Path, empty_database: Path) -> tuple[MlflowClient, str]:
    """The client of a registry in `folder`, and its URI."""
    uri = f"sqlite:///{shutil.copyfile(empty_database, folder / 'mlflow.db')}"
    return MlflowClient(tracking_uri=uri, registry_uri=uri), uri


def register_tiny(client: MlflowClient, folder: Path, *habits: dict[str, Any]) -> None:
    """Register a tiny model for each of `habits` as versions of `NAME`; the first is champion."""
    client.create_registered_model(NAME)
    for number, each in enumerate(habits, 1):
        client.create_model_version(NAME, str(save_tiny(folder / f"tiny-{number}", **each)))
    client.set_registered_model_alias(NAME, "champion", "1")
