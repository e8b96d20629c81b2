"""The device of a stage: what `auto` means on this machine, and whether it can be used."""

from __future__ import annotations

from dataclasses import replace

from mlflow_pt_deploy.config import Options
from mlflow_pt_deploy.errors import ModelError
from mlflow_pt_deploy.system.device import CPU, CUDA, check_gpus, resolve_device
from mlflow_pt_deploy.system.ranks import launched_ranks


def on_this_machine(options: Options) -> Options:
    """Return the options with the device that they mean here. Imports PyTorch.

    Raises:
        UnsupportedError: PyTorch cannot use the device, or there are fewer GPUs than processes.
        ModelError: Several processes were given one GPU.
    """
    device = resolve_device(options.device)
    processes = max(options.processes, launched_ranks().size)
    if processes > 1 and device not in (CPU, CUDA):
        raise ModelError(
            f"device is {device} and there are {processes} processes; each takes a GPU of its own. "
            "Give device=cuda."
        )
    if options.processes > 1 and device == CUDA:
        check_gpus(options.processes)
    return replace(options, device=device)
