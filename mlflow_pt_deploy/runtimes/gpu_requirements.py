"""What a variant needs of a GPU: a device at all, a chip that is new enough, or the same chip."""

from __future__ import annotations

from mlflow_pt_deploy.errors import UnsupportedError
from mlflow_pt_deploy.system.device import has_cuda

NO_DEVICE = "skipped: PyTorch finds no CUDA device"
# Matrix products in this precision; https://developer.nvidia.com/cuda-gpus lists the chips.
_LEAST: dict[str, tuple[int, int]] = {
    "bf16": (8, 0),
    "int8-dynamic": (7, 5),
    "fp8-dynamic": (8, 9),
}


def no_gpu_for(precision: str, least: tuple[int, int] = (0, 0)) -> str | None:
    """Reason to skip a precision on this machine's first GPU, or None if it can run there.

    Args:
        precision: See `Variant.precision`.
        least: Compute capability that the runtime itself needs.
    """
    if not has_cuda():
        return NO_DEVICE
    import torch

    return chip_too_old(precision, torch.cuda.get_device_capability(), least)


def chip_too_old(
    precision: str, found: tuple[int, int], least: tuple[int, int] = (0, 0)
) -> str | None:
    """Reason to skip a precision on a chip of the compute capability `found`, or None."""
    least = max(least, _LEAST.get(precision, (0, 0)))
    if found >= least:
        return None
    return (
        f"skipped: {precision} needs a GPU of compute capability {_text(least)}, and this one has "
        f"{_text(found)}"
    )


def capability_of(device: str) -> str:
    """Compute capability of a CUDA device, such as ``9.0``."""
    import torch

    return _text(torch.cuda.get_device_capability(device))


def check_capability(required: str, found: str) -> None:
    """Check that a compiled package runs on a chip.

    Args:
        required: Compute capability that it was compiled for; empty if it is not known.
        found: Compute capability of the device.

    Raises:
        UnsupportedError: They differ: machine code is made for one chip.
    """
    if required and required != found:
        raise UnsupportedError(
            f"this package was compiled for a GPU of compute capability {required}, and the device "
            f"has {found}. Choose another variant, or run pt-deploy optimize on this machine."
        )


def _text(capability: tuple[int, int]) -> str:
    return "{}.{}".format(*capability)
