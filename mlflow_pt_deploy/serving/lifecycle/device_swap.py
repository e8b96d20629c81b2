"""What a swap needs where a device has no memory for two versions: see that one is freed, and wait
for memory that others still hold."""

from __future__ import annotations

import gc
import time
import traceback
import weakref
from collections.abc import Callable
from typing import Any

from mlflow_pt_deploy.errors import DeviceMemoryError
from mlflow_pt_deploy.serving.model.loaded_model import LoadedModel
from mlflow_pt_deploy.system.device import release_cached_memory

LOAD_S = 30.0
"""Seconds for which a load is tried: other workers free their version when they poll."""

_PAUSE_S, _MAX_PAUSE_S = 0.5, 4.0
# A collection stops all threads for about 0.1 s.
_CHECK_S, _COLLECT_S = 0.02, 0.5


def wait_until_freed(version: weakref.ref[Any], executor: weakref.ref[Any], seconds: float) -> bool:
    """Wait until no request uses a version and no batch its executor.

    Returns:
        Whether that was within `seconds`.
    """
    end = time.monotonic() + seconds
    while version() is not None:
        if time.monotonic() >= end:
            return False
        time.sleep(_CHECK_S)
    while True:
        free_memory()
        if executor() is None:
            return True
        if time.monotonic() >= end:
            return False
        time.sleep(_COLLECT_S)


def free_memory() -> None:
    """Return the memory of objects that nothing uses to the device."""
    gc.unfreeze()  # services refer to themselves, and are frozen while they serve
    gc.collect()
    release_cached_memory()


def load_patiently(load: Callable[[], LoadedModel]) -> LoadedModel:
    """Load as soon as the device has memory.

    Raises:
        DeviceMemoryError: It had none within `LOAD_S`.
        Exception: Another error of `load`.
    """
    end, pause_s = time.monotonic() + LOAD_S, _PAUSE_S
    while True:
        try:
            return load()
        except DeviceMemoryError:
            if time.monotonic() + pause_s > end:
                raise
        time.sleep(pause_s)
        free_memory()
        pause_s = min(2 * pause_s, _MAX_PAUSE_S)


def clear_frames(error: Exception) -> None:
    """Drop the local variables of an error's frames, which may hold a model."""
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__cause__ or seen.__context__
