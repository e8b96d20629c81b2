"""TensorRT by ONNX Runtime: engines compiled on this machine when the variant is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from mlflow_pt_deploy.preprocessing import load_preprocessor
from mlflow_pt_deploy.runtimes.base import Inputs, Logits, Predict
from mlflow_pt_deploy.runtimes.onnx_gpu import cuda_provider, device_id, gpu_session
from mlflow_pt_deploy.runtimes.onnxruntime import FILE, OnnxRuntime
from mlflow_pt_deploy.system.paths import home
from mlflow_pt_deploy.system.regular_files import sha256

if TYPE_CHECKING:
    from mlflow_pt_deploy.preprocessing import Axis, Preprocessor

TENSORRT_PROVIDER = "TensorrtExecutionProvider"
MAX_ROWS = 256
"""Most rows of a call: engines are compiled for a range of shapes."""
_USUAL = {"batch": 8, "length": 32}


@dataclass(frozen=True)
class TensorRT(OnnxRuntime):
    """The graph of `OnnxRuntime` on TensorRT; operators that TensorRT lacks run on CUDA.

    The first load on a machine compiles engines, for minutes. They are kept in the cache folder of
    the user and not in the artifact, because an engine fits one GPU and one version of TensorRT.
    """

    runtime: ClassVar[str] = "tensorrt"
    compiles: ClassVar[bool] = True
    gpu_provider: ClassVar[str] = TENSORRT_PROVIDER

    def load(self, folder: Path, *, device: str, threads: int) -> Predict:
        if device == "cpu":
            return super().load(folder, device=device, threads=threads)
        engines = home() / "tensorrt" / sha256(folder / FILE)[:16]
        engines.mkdir(parents=True, exist_ok=True, mode=0o700)
        options = {
            "device_id": device_id(device),
            "trt_fp16_enable": "1" if self.precision == "fp16" else "0",
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": str(engines),
            **shape_profiles(load_preprocessor(folder)),
        }
        providers = [(TENSORRT_PROVIDER, options), cuda_provider(device)]
        return RowSlices(gpu_session(folder / FILE, providers, threads, device), MAX_ROWS)


class RowSlices:
    """A `Predict` that passes at most some rows at once to another."""

    def __init__(self, predict: Predict, max_rows: int) -> None:
        self._predict = predict
        self._max_rows = max_rows

    def __call__(self, inputs: Inputs) -> Logits:
        rows = len(next(iter(inputs.values())))
        if rows <= self._max_rows:
            return self._predict(inputs)
        starts = range(0, rows, self._max_rows)
        return np.concatenate([self._predict(self._slice(inputs, start)) for start in starts])

    def _slice(self, inputs: Inputs, start: int) -> Inputs:
        return {name: array[start : start + self._max_rows] for name, array in inputs.items()}


def shape_profiles(preprocessor: Preprocessor) -> dict[str, str]:
    """Options for the smallest, usual and largest shapes; others would compile another engine."""
    example = preprocessor.collate(preprocessor.warmup_rows()[:1])
    sizes: dict[str, Callable[[Axis], int]] = {
        "min": lambda axis: axis.minimum,
        "opt": lambda axis: min(_USUAL[axis.name], axis.maximum),
        "max": lambda axis: MAX_ROWS if axis.name == "batch" else axis.maximum,
    }

    def shape(name: str, size: Callable[[Axis], int]) -> str:
        dynamic = {dim: size(axis) for dim, axis in preprocessor.axes[name].items()}
        fixed = enumerate(example[name].shape)
        return f"{name}:" + "x".join(str(dynamic.get(dim, known)) for dim, known in fixed)

    return {
        f"trt_profile_{kind}_shapes": ",".join(shape(name, size) for name in example)
        for kind, size in sizes.items()
    }
