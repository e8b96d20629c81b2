"""From a reference to a folder on this machine; what the hub has is downloaded into its cache.

The small files come first, so that a model of another task is refused before its weights travel.
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

NO_NETWORK = "one that needs no network: minilm for text, resnet for images."
_ID = re.compile(r"([\w.-]+/)?[\w.-]+", re.ASCII)  # of the hub: OWNER/NAME, or an old NAME
_SETTINGS = ["*.json", "*.txt", "*.model", "*.spm", "*.tiktoken"]
_WEIGHTS = (["model.safetensors", "model-*.safetensors"], ["pytorch_model*.bin"])


def locate(reference: str) -> tuple[Path, bool]:
    """The folder of a reference, the weights perhaps not yet in it.

    Args:
        reference: A folder or a Hugging Face id.

    Returns:
        The folder, and whether it is the hub's cache: then `fetch_weights` completes it.

    Raises:
        ModelError: There is no such folder, or the hub has no such model or cannot be reached.
    """
    if not reference.strip():
        raise ModelError(f"no model is given. Give a local Hugging Face folder, or {NO_NETWORK}")
    path = Path(reference).expanduser()
    if path.is_dir():
        return path, False
    if path.exists():
        raise ModelError(f"{reference} is a file. Give the folder that holds it.")
    if _is_path(reference):
        raise ModelError(
            f"{reference}: no classifier can be loaded from there (there is no such folder). Give "
            f"a local Hugging Face folder, the id of a model on the hub, or {NO_NETWORK}"
        )
    return _snapshot(reference, _SETTINGS), True


def fetch_weights(reference: str) -> None:
    """Download the weights of a hub model beside its small files: safetensors if it has them."""
    for patterns in _WEIGHTS:
        folder = _snapshot(reference, patterns)
        if any(any(folder.glob(pattern)) for pattern in patterns):
            return


def _is_path(reference: str) -> bool:
    """Whether a reference can only be meant as a path: it is no possible id of the hub."""
    if reference.startswith((".", "~", os.sep)) or "://" in reference:
        return True
    parent, _, _ = reference.partition("/")
    if "/" in reference and Path(parent).is_dir():
        return True
    return _ID.fullmatch(reference) is None


def _snapshot(reference: str, patterns: list[str]) -> Path:
    try:
        # It asks the hub once and fails at once, where transformers would retry each file.
        return Path(snapshot_download(reference, allow_patterns=patterns, ignore_patterns="*/*"))
    except GatedRepoError as error:
        problem = "the hub gives it only to those who accepted its licence; do so and set HF_TOKEN"
        raise ModelError(f"{reference}: no classifier can be loaded: {problem}.") from error
    except RepositoryNotFoundError as error:
        raise ModelError(
            f"{reference}: no classifier can be loaded: it is no folder here, and the hub has no "
            f"such model, or only for some (set HF_TOKEN). Check the name, or give {NO_NETWORK}"
        ) from error
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{reference}: no classifier can be loaded: it is no folder here, not in the hub's "
            f"cache, and the hub cannot be asked ({_cause(error)}). Give a local Hugging Face "
            "folder, the id of a model on the hub (behind a proxy set HTTPS_PROXY or HF_ENDPOINT), "
            f"or {NO_NETWORK}"
        ) from error


def _cause(error: BaseException) -> str:
    """The innermost reason: the hub's library wraps the network's own error."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
