"""Names of devices, and errors that say that a device is full."""

from __future__ import annotations

import pytest
import torch

from mlflow_pt_deploy.errors import UnsupportedError
from mlflow_pt_deploy.system import device


@pytest.mark.parametrize("name", ["auto", "cpu", "cuda", "cuda:0", "cuda:15"])
def test_names(name: str) -> None:
    assert device.is_device(name)
    assert device.kind_of(name) in ("auto", "cpu", "cuda")


@pytest.mark.parametrize(
    "name", ["", "gpu", "CUDA", "cuda:", "cuda:x", "cuda:-1", "cuda:123", "cpu:0", "cuda:1\n"]
)
def test_other_names(name: str) -> None:
    assert not device.is_device(name)


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA driver error: out of memory"), True),
        (RuntimeError("CUDA failure 2: out of memory ; GPU=0 ; hostname=x"), True),
        (RuntimeError("[ONNXRuntimeError] : 6 : Failed to allocate memory for requested"), True),
        (RuntimeError("CUDA error: device-side assert triggered"), False),
        (RuntimeError("out of memory"), False),
        (MemoryError(), False),
    ],
)
def test_out_of_memory(error: BaseException, full: bool) -> None:
    assert device.is_out_of_memory(error) == full


def test_without_a_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert not device.has_cuda() and device.gpu_name() == ""
    device.release_cached_memory()
    assert device.failed_allocations("cuda") == 0
    assert not device.lacks_memory("cuda", 2**60)


def test_auto_is_a_gpu_if_there_is_one() -> None:
    assert device.resolve_device("cpu") == "cpu"
    if torch.cuda.is_available():
        assert device.resolve_device("auto") == device.resolve_device("cuda") == "cuda"
        return
    assert device.resolve_device("auto") == "cpu"
    with pytest.raises(UnsupportedError, match="device=cuda:1: PyTorch cannot use it here"):
        device.resolve_device("cuda:1")
