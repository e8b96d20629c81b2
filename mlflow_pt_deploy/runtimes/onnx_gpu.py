"""ONNX Runtime on a GPU: execution providers, their options, and sessions on them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mlflow_pt_deploy.errors import UnsupportedError
from mlflow_pt_deploy.runtimes.base import Inputs, Logits, Predict

Provider = tuple[str, dict[str, str]]
"""Name and options of an execution provider."""

CUDA_PROVIDER = "CUDAExecutionProvider"
_CUDA_OPTIONS = {
    # TF32 is the default; its 10-bit mantissa would fail the golden check.
    "use_tf32": "0",
    # By default the arena doubles with each extension, and convolutions are tried out per shape.
    "arena_extend_strategy": "kSameAsRequested",
    "cudnn_conv_algo_search": "HEURISTIC",
}


def run_session(session: Any, inputs: Inputs) -> Logits:
    """Logits of a batch."""
    return np.asarray(session.run(["logits"], dict(inputs))[0], dtype=np.float32)


def gpu_session(path: Path, providers: Sequence[Provider], threads: int, device: str) -> Predict:
    """Load a graph on a GPU; `run` copies the inputs to the device and the logits back.

    Raises:
        UnsupportedError: ONNX Runtime cannot use the first of the providers here.
    """
    import onnxruntime

    if no_provider(providers[0][0]):
        raise _unusable(device)
    if hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()  # CUDA's libraries of the nvidia packages that PyTorch brings
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=list(providers))
    if providers[0][0] not in session.get_providers():
        raise _unusable(device)  # onnxruntime falls back to the CPU with a warning only
    return partial(run_session, session)


def cuda_provider(device: str) -> Provider:
    """ONNX Runtime's CUDA provider for ``cuda`` or ``cuda:N``."""
    return CUDA_PROVIDER, {"device_id": device_id(device), **_CUDA_OPTIONS}


def device_id(device: str) -> str:
    """Number of a CUDA device: ``1`` for ``cuda:1``."""
    return device.partition(":")[2] or "0"


def no_provider(provider: str) -> str | None:
    """Reason to skip a variant if the installed onnxruntime lacks a provider, or None."""
    try:
        import onnxruntime
    except ImportError:
        return None  # reported by export and load
    if provider in onnxruntime.get_available_providers():
        return None
    return f"skipped: the installed onnxruntime has no {provider}; install onnxruntime-gpu"


def _unusable(device: str) -> UnsupportedError:
    return UnsupportedError(
        f"the installed onnxruntime does not support device={device}; use device=cpu, or install "
        "onnxruntime-gpu and the CUDA libraries that it needs."
    )
