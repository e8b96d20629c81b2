"""Models in the memory of a device process, each loaded once and freed after its last user."""

from __future__ import annotations

import gc
import logging
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mlflow_pt_deploy.artifacts import LoadedVariant, load_variant, read_manifest
from mlflow_pt_deploy.errors import ArtifactError, ServingError
from mlflow_pt_deploy.model_config import Limits
from mlflow_pt_deploy.serving.device.executor import HeldModel, device_context
from mlflow_pt_deploy.system.device import release_cached_memory

_logger = logging.getLogger(__name__)


class ModelKey(NamedTuple):
    """What a worker wants to be loaded; workers with equal keys share one copy.

    Attributes:
        digest: Digest of the manifest.
        allow_code: Whether the variant may carry code.
        threads: CPU threads of a call; 0: chosen by the runtime.
        max_batch_rows, max_batch_tokens: Limits of a call.
    """

    digest: str
    allow_code: bool
    threads: int
    max_batch_rows: int
    max_batch_tokens: int


def parse_key(header: dict[str, Any]) -> ModelKey:
    """The key in the header of a message.

    Raises:
        ServingError: It has another form.
    """
    found = header.get("key")
    kinds = [str, bool, int, int, int]
    if not isinstance(found, list) or [type(each) for each in found] != kinds:
        raise ServingError("a message names no model")
    return ModelKey(*found)


@dataclass
class _Entry:
    model: HeldModel
    users: int = 0


class ModelStore:
    """Loads models onto one device and counts their users; thread-safe.

    Args:
        device: ``cpu`` or ``cuda:N``.
    """

    def __init__(self, device: str) -> None:
        self._device = device
        self._lock = threading.Lock()
        self._loading = threading.Lock()  # one load at a time, beside running batches
        self._entries: dict[ModelKey, _Entry] = {}

    def acquire(self, key: ModelKey, folder: Path) -> HeldModel:
        """A model for one more user; it is loaded if it is not in memory.

        Args:
            key: What to load.
            folder: The variant's folder, a private copy of the worker.

        Raises:
            PtDeployError: See `load_variant`.
        """
        if found := self._find(key):
            return found
        with self._loading:
            if found := self._find(key):
                return found
            loaded = _load(key, folder, self._device)
            limits = Limits(
                max_batch_rows=key.max_batch_rows, max_batch_tokens=key.max_batch_tokens
            )
            with self._lock:
                entry = self._entries[key] = _Entry(HeldModel(loaded, limits), users=1)
        _logger.info("%s: %s was loaded", self._device, loaded.manifest.name)
        return entry.model

    def release(self, key: ModelKey) -> None:
        """Count one user less; the last one frees the model."""
        with self._lock:
            entry = self._entries[key]
            entry.users -= 1
            if entry.users:
                return
            del self._entries[key]
        name = entry.model.loaded.manifest.name
        del entry
        _release_memory()
        _logger.info("%s: %s was freed", self._device, name)

    def _find(self, key: ModelKey) -> HeldModel | None:
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            entry.users += 1
            return entry.model


def _load(key: ModelKey, folder: Path, device: str) -> LoadedVariant:
    manifest = read_manifest(folder)
    if manifest.digest != key.digest:
        raise ArtifactError(
            f"{manifest.name}: manifest.json is not the one that the worker has checked (SHA-256 "
            "differs). The artifact was changed meanwhile; download it again."
        )
    try:
        with device_context(device):
            return load_variant(
                folder, device=device, threads=key.threads, allow_code=key.allow_code
            )
    except Exception:
        _release_memory()
        raise


def _release_memory() -> None:
    gc.collect()  # networks have reference cycles
    release_cached_memory()
