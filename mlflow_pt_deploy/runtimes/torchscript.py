"""TorchScript: traced and frozen, runs without Python between the operators."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from mlflow_pt_deploy.errors import VariantError, root_cause
from mlflow_pt_deploy.runtimes.base import Inputs, Predict, Variant
from mlflow_pt_deploy.runtimes.eager import check_int8_linears, quantize_linears, torch_predict
from mlflow_pt_deploy.system.device import check_device

if TYPE_CHECKING:
    from mlflow_pt_deploy.models import Classifier

FILE = "model.torchscript.pt"


@dataclass(frozen=True)
class TorchScript(Variant):
    """Frozen TorchScript trace; ``int8-dynamic`` traces the dynamically quantized module."""

    runtime: ClassVar[str] = "torchscript"
    gpu_precisions: ClassVar[frozenset[str]] = frozenset({"fp32"})
    carries_code: ClassVar[bool] = True

    def export(
        self, module: Classifier, example: Inputs, calibration: Sequence[Inputs], folder: Path
    ) -> None:
        import torch

        source: torch.nn.Module = module
        if self.precision == "int8-dynamic":
            source = quantize_linears(module)
            check_int8_linears(source)
        tensors = tuple(torch.from_numpy(array) for array in example.values())
        with warnings.catch_warnings(), torch.inference_mode():
            # PyTorch warns that TorchScript is deprecated, and the tracer warns of every Python
            # branch. `export_check` verifies the trace for other shapes.
            warnings.simplefilter("ignore")
            try:
                traced = torch.jit.freeze(torch.jit.trace(source, tensors, strict=False))
            except RuntimeError as error:
                raise VariantError(f"tracing failed: {root_cause(error)}") from error
            torch.jit.save(traced, str(folder / FILE))

    def load(self, folder: Path, *, device: str, threads: int) -> Predict:
        import torch

        self.check_device_kind(device)
        check_device(device)
        torch.set_num_threads(threads)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            module = torch.jit.load(str(folder / FILE), map_location=device)
        return torch_predict(module, device)
