"""A `Predict` whose model is in the memory of device processes."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlflow_pt_deploy.artifacts import LoadedVariant, load_description
from mlflow_pt_deploy.artifacts.manifest import Manifest
from mlflow_pt_deploy.errors import DeviceLostError
from mlflow_pt_deploy.model_config import ServingOptions
from mlflow_pt_deploy.runtimes.base import Inputs, Logits
from mlflow_pt_deploy.serving.device.device_link import DeviceLink, device_names
from mlflow_pt_deploy.serving.device.model_store import ModelKey
from mlflow_pt_deploy.serving.device.processes import DeviceProcesses
from mlflow_pt_deploy.serving.model.loader import load_here
from mlflow_pt_deploy.system.device import AUTO, CUDA, kind_of

CALLS_PER_DEVICE = 3
"""Batches of a worker in flight for each device: two in computation, one that waits."""


class RemotePredictor:
    """Sends each batch to the device with the fewest rows in flight.

    Args:
        links: One for each device; they are open, and closed with the last reference to this.

    Attributes:
        pads: See `pads_rows`.
        remote_calls: See `runtimes.base.remote_calls`.
    """

    def __init__(self, links: Sequence[DeviceLink]) -> None:
        self._links = tuple(links)
        self._lock = threading.Lock()
        self.pads = any(link.pads for link in links)
        self.remote_calls = CALLS_PER_DEVICE * len(links)
        weakref.finalize(self, _close, self._links)

    @property
    def ready(self) -> bool:
        """Whether at least one device has the model."""
        return any(link.ready for link in self._links)

    def __call__(self, inputs: Inputs) -> Logits:
        rows = len(next(iter(inputs.values())))
        with self._lock:
            link = least_busy(self._links)
            link.rows += rows
        try:
            return link.predict(inputs)
        finally:
            with self._lock:
                link.rows -= rows

    def warm_up_buckets(self, max_rows: int, max_tokens: int, longest: int) -> None:
        """Let each model prepare itself for batches of up to these sizes, if it can."""
        for link in self._links:
            link.warm_up([max_rows, max_tokens, longest])

    def status(self) -> list[dict[str, Any]]:
        """Its part of ``/model``."""
        return [link.status() for link in self._links]


class DevicePlacement:
    """Decides where a worker loads its models; see `loader.use_placement`.

    Args:
        processes: Connects to device processes.
        workers: Workers of the server.
    """

    def __init__(self, processes: DeviceProcesses, workers: int) -> None:
        self._processes = processes
        self._workers = workers

    def __call__(self, folder: Path, manifest: Manifest, options: ServingOptions) -> LoadedVariant:
        device = manifest.device if options.device == AUTO else options.device
        if not needs_device_process(device, self._workers):
            return load_here(folder, manifest, options)
        return load_on_devices(self._processes, folder, device, options)


def needs_device_process(device: str, workers: int) -> bool:
    """Whether workers share one copy of a model; a single one has it in its own process."""
    return workers > 1 and kind_of(device) == CUDA


def least_busy(links: Sequence[DeviceLink]) -> DeviceLink:
    """The link that is ready and has the fewest rows in flight.

    Raises:
        DeviceLostError: None is ready.
    """
    ready = [link for link in links if link.ready]
    if not ready:
        raise DeviceLostError(f"{links[0].problem}; retry later")
    return min(ready, key=lambda link: link.rows)


def load_on_devices(
    processes: DeviceProcesses, folder: Path, device: str, options: ServingOptions
) -> LoadedVariant:
    """Load a variant into the processes of a device's name; this process reads no weights.

    Raises:
        PtDeployError: See `load_variant`; `DeviceLostError`: a process does not start.
    """
    description = load_description(folder)
    key = ModelKey(
        description.manifest.digest,
        options.allow_code,
        options.num_threads,
        options.max_batch_rows,
        options.max_batch_tokens,
    )
    request = {"folder": str(folder.absolute()), "key": list(key)}
    names = device_names(processes, device)
    links = [DeviceLink(processes, name, request) for name in names]
    try:
        for link in links:
            link.open()
    except BaseException:
        _close(links)
        raise
    where = names[0] if len(names) == 1 else device
    manifest, preprocessor, labels = description
    return LoadedVariant(manifest, preprocessor, labels, RemotePredictor(links), where)


def _close(links: Sequence[DeviceLink]) -> None:
    for link in links:
        link.close()
