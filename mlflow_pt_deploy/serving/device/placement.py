"""Decides where a worker loads a model: in its own process, or in those of its devices."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from mlflow_pt_deploy.artifacts import LoadedVariant, Manifest, load_description
from mlflow_pt_deploy.artifacts.loading import device_of
from mlflow_pt_deploy.model_config import ServingOptions
from mlflow_pt_deploy.serving.device.device_link import DeviceLink, device_names
from mlflow_pt_deploy.serving.device.model_store import ModelKey
from mlflow_pt_deploy.serving.device.processes import DeviceProcesses
from mlflow_pt_deploy.serving.device.remote_predictor import RemotePredictor, close_all
from mlflow_pt_deploy.serving.model.loader import load_here
from mlflow_pt_deploy.system.background import at_low_priority
from mlflow_pt_deploy.system.device import CUDA, kind_of


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
        device = device_of(manifest, options.device)
        if not needs_device_process(device, self._workers):
            return load_here(folder, manifest, options)
        return load_on_devices(self._processes, folder, device, options)


def needs_device_process(device: str, workers: int) -> bool:
    """Whether workers share one copy of a model; a single one has it in its own process."""
    return workers > 1 and kind_of(device) == CUDA


def load_on_devices(
    processes: DeviceProcesses, folder: Path, device: str, options: ServingOptions
) -> LoadedVariant:
    """Load a variant into the processes of a device's name; this process reads no weights.

    Raises:
        PtDeployError: See `load_variant`; `DeviceLostError`: a process does not start.
    """
    description = at_low_priority(partial(load_description, folder))  # it hashes all files
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
        close_all(links)
        raise
    where = names[0] if len(names) == 1 else device
    manifest, preprocessor, labels = description
    return LoadedVariant(manifest, preprocessor, labels, RemotePredictor(links), where)
