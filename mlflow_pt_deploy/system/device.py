"""Devices that a model can run on: names, checks, free memory.

PyTorch is imported only where a device other than the CPU is asked about.
"""

from __future__ import annotations

import ctypes
import re
import sys

from mlflow_pt_deploy.errors import UnsupportedError, root_cause

AUTO, CPU, CUDA = "auto", "cpu", "cuda"

DEVICE_FORM = "auto, cpu, cuda, or one GPU such as cuda:1"

_NAME = re.compile(r"auto|cpu|cuda(:\d{1,2})?", re.ASCII)
# ONNX Runtime raises errors of no kind of its own
_OUT_OF_MEMORY = re.compile(
    r"CUDA.*out[ _]of[ _]memory|Failed to allocate memory|BFCArena", re.IGNORECASE
)


def is_device(name: str) -> bool:
    """Whether a string is the name of a device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``."""
    return _NAME.fullmatch(name) is not None


def kind_of(device: str) -> str:
    """``cpu`` or ``cuda``: a device without its number."""
    return device.partition(":")[0]


def has_cuda() -> bool:
    """Whether PyTorch finds a CUDA device; False if PyTorch is not installed."""
    try:
        import torch
    except ImportError:
        return False
    return bool(torch.cuda.is_available())


def has_driver() -> bool:
    """Whether the library of NVIDIA's driver can be loaded; takes no time, unlike PyTorch."""
    try:
        ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return False
    return True


def missing_gpu() -> str:
    """What this host lacks to use a GPU, as a part of a sentence; empty if it lacks nothing."""
    if not has_driver():
        return "it has no NVIDIA driver"
    try:
        import torch
    except ImportError:
        return ""  # another library may use the GPU
    found = torch.cuda.is_available()
    return "" if found else f"PyTorch {torch.__version__} finds no CUDA device"


def check_device(name: str) -> None:
    """Check that PyTorch can use a device.

    Args:
        name: PyTorch's name: ``cuda``, ``cuda:1``, ...

    Raises:
        UnsupportedError: It cannot; the message has the reason.
    """
    import torch

    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UnsupportedError(
            f"device={name}: PyTorch cannot use it here ({root_cause(error)}). Give "
            "device=cpu, or install the driver and a build of PyTorch for this GPU."
        ) from error


def resolve_device(name: str) -> str:
    """Return the device to use: for ``auto`` a GPU if PyTorch finds one, else the CPU.

    Raises:
        UnsupportedError: PyTorch cannot use the given GPU.
    """
    if name == AUTO:
        return CUDA if has_cuda() else CPU
    if name != CPU:
        check_device(name)
    return name


def check_gpus(processes: int) -> None:
    """Check that each of the processes can have a CUDA device of its own.

    Raises:
        UnsupportedError: PyTorch sees fewer devices.
    """
    import torch

    found = torch.cuda.device_count()
    if processes > found:
        raise UnsupportedError(
            f"processes is {processes}, and PyTorch sees {found} GPUs; each process takes one. "
            f"Give at most {found} processes."
        )


def gpu_name(device: str = CUDA) -> str:
    """Name of a GPU; empty without one, or before something else imported PyTorch."""
    # importing torch takes seconds
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return ""
    return str(torch.cuda.get_device_name(device))


def disable_tf32() -> None:
    """Disable TF32 for the whole process.

    It is PyTorch's default for convolutions on a GPU, and its 10-bit mantissa would fail the golden
    check of fp32.
    """
    import torch

    torch.backends.cudnn.allow_tf32 = False


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a runtime's error says that the device has no memory left."""
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None


def release_cached_memory() -> None:
    """Return memory that PyTorch's allocator keeps for later to the device."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def failed_allocations(device: str) -> int:
    """How often PyTorch's allocator found no memory on a device so far."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized() or kind_of(device) != CUDA:
        return 0
    return int(torch.cuda.memory_stats(device).get("num_ooms", 0))


def lacks_memory(device: str, size: int) -> bool:
    """Whether less than `size` bytes are free on a CUDA device."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized() or kind_of(device) != CUDA:
        return False
    return bool(torch.cuda.mem_get_info(device)[0] < size)
