"""Resolve a model reference to a local folder; hub models are downloaded to the hub cache.

Small files are downloaded first, so that a model of another task is rejected before its weights
are downloaded.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    RepositoryNotFoundError,
)

from mlflow_pt_deploy.errors import ModelError

NO_NETWORK = "a built-in model that needs no network: minilm for text, resnet for images."
_ID = re.compile(r"([\w.-]+/)?[\w.-]+", re.ASCII)  # hub id: OWNER/NAME, or a legacy NAME
_SETTINGS = ["*.json", "*.txt", "*.model", "*.spm", "*.tiktoken"]
_WEIGHTS = (["model.safetensors", "model-*.safetensors"], ["pytorch_model*.bin"])


def locate(reference: str) -> tuple[Path, bool]:
    """Find the folder of a reference; download the small files of a hub model.

    Args:
        reference: A folder or a Hugging Face id.

    Returns:
        The folder, and whether it is in the hub cache and still needs `fetch_weights`.

    Raises:
        ModelError: The folder or hub model does not exist, or the hub cannot be reached.
    """
    if not reference.strip():
        raise ModelError(f"no model is given. Give a local Hugging Face folder, or {NO_NETWORK}")
    path = Path(reference).expanduser()
    if path.is_dir():
        return path, False
    if path.exists():
        raise ModelError(f"{reference} is a file. Give the folder that contains it.")
    if _is_path(reference):
        raise ModelError(
            f"{reference}: no classifier can be loaded (there is no such folder). Give a local "
            f"Hugging Face folder, the id of a model on the hub, or {NO_NETWORK}"
        )
    return _snapshot(reference, _SETTINGS), True


def fetch_weights(reference: str) -> None:
    """Download the weights of a hub model, preferably safetensors."""
    for patterns in _WEIGHTS:
        folder = _snapshot(reference, patterns)
        if any(any(folder.glob(pattern)) for pattern in patterns):
            return


def _is_path(reference: str) -> bool:
    """Whether a reference is a path and cannot be a hub id."""
    if reference.startswith((".", "~", os.sep)) or "://" in reference:
        return True
    parent, _, _ = reference.partition("/")
    if "/" in reference and Path(parent).is_dir():
        return True
    return _ID.fullmatch(reference) is None


def _snapshot(reference: str, patterns: list[str]) -> Path:
    try:
        # Fails after one request, while transformers would retry each file.
        return Path(snapshot_download(reference, allow_patterns=patterns, ignore_patterns="*/*"))
    except GatedRepoError as error:
        problem = "access is restricted; accept its licence on the hub and set HF_TOKEN"
        raise ModelError(f"{reference}: no classifier can be loaded: {problem}.") from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"{reference}: no classifier can be loaded: it is not a local folder, and the hub has "
            f"no such model or it is private (set HF_TOKEN). Check the name, or give {NO_NETWORK}"
        ) from error
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{reference}: no classifier can be loaded: it is not a local folder, not in the hub "
            f"cache, and the hub cannot be reached ({_cause(error)}). Give a local Hugging Face "
            "folder, the id of a model on the hub (behind a proxy set HTTPS_PROXY or HF_ENDPOINT), "
            f"or {NO_NETWORK}"
        ) from error


def _cause(error: BaseException) -> str:
    """The innermost cause; huggingface_hub wraps network errors."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
