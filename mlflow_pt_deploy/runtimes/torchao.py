"""torchao on a GPU: linear layers in int8 or fp8, quantized when the variant is loaded."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mlflow_pt_deploy.errors import MissingExtraError
from mlflow_pt_deploy.runtimes.base import Inputs, Predict, Variant
from mlflow_pt_deploy.runtimes.eager import EagerPredictor, load_eager, weight_matrices
from mlflow_pt_deploy.runtimes.export_check import check_int8

if TYPE_CHECKING:
    import torch

    from mlflow_pt_deploy.models import Classifier

# cuBLAS multiplies int8 and fp8 matrices only if both sides of a weight are multiples of this.
_STEP = 16


@dataclass(frozen=True)
class TorchAO(Variant):
    """Eager bf16 with dynamically quantized linear layers, by torchao's ``quantize_``.

    Stores the weights that were trained, in safetensors, and quantizes them at load: weights per
    output channel, activations per token. Layers of other sizes, such as a head with few classes,
    stay in bf16.
    """

    runtime: ClassVar[str] = "torchao"
    extra: ClassVar[str | None] = "quantize"
    gpu_precisions: ClassVar[frozenset[str]] = frozenset({"int8-dynamic", "fp8-dynamic"})

    def unsupported(self) -> str | None:
        if reason := super().unsupported():
            return reason
        if find_spec("torchao") is None:
            return "skipped: torchao is not installed; pip install 'mlflow-pt-deploy[quantize]'"
        return None

    def export(
        self, module: Classifier, example: Inputs, calibration: Sequence[Inputs], folder: Path
    ) -> None:
        from mlflow_pt_deploy.models import save_classifier

        matrices = weight_matrices(module)
        kind = self.precision.partition("-")[0]
        check_int8(sum(map(_fits, matrices)), len(matrices), kind=kind)
        save_classifier(module, folder)

    def load(self, folder: Path, *, device: str, threads: int) -> Predict:
        module = load_eager(folder, "bf16", device, threads)
        quantize(module, self.precision)
        return EagerPredictor(module, device)


def quantize(module: torch.nn.Module, precision: str) -> None:
    """Quantize a module's linear layers in place.

    Args:
        module: In bf16, on its device.
        precision: ``int8-dynamic`` or ``fp8-dynamic``.

    Raises:
        MissingExtraError: torchao is not installed.
    """
    with warnings.catch_warnings():
        # torchao 0.18 has invalid escapes in strings, and uses what PyTorch 2.13 deprecates
        warnings.simplefilter("ignore")
        try:
            from torchao import quantization
        except ImportError as error:
            raise MissingExtraError("torchao", "quantize") from error

        configs = {
            "int8-dynamic": quantization.Int8DynamicActivationInt8WeightConfig,
            "fp8-dynamic": quantization.Float8DynamicActivationFloat8WeightConfig,
        }
        # the other settings are for a compiler
        config = configs[precision](granularity=quantization.PerRow(), set_inductor_config=False)
        quantization.quantize_(module, config, lambda layer, _: _fits(layer))


def _fits(layer: Any) -> bool:
    import torch

    return isinstance(layer, torch.nn.Linear) and not any(
        size % _STEP for size in layer.weight.shape
    )
