"""Eager PyTorch from safetensors: the fp32 baseline, 16-bit precisions and dynamic int8."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from mlflow_pt_deploy.runtimes.base import Inputs, Logits, Predict, Variant
from mlflow_pt_deploy.runtimes.export_check import check_int8
from mlflow_pt_deploy.system.device import CPU, CUDA, check_device, disable_tf32, kind_of

if TYPE_CHECKING:
    import torch

    from mlflow_pt_deploy.models import Classifier

_INT8 = "int8.safetensors"


@dataclass(frozen=True)
class Eager(Variant):
    """Eager PyTorch.

    ``int8-dynamic`` stores the int8 weight and the scale of each linear layer in safetensors,
    without pickle (Jacob et al. 2018, per tensor, symmetric).
    """

    runtime: ClassVar[str] = "eager"
    gpu_precisions: ClassVar[frozenset[str]] = frozenset({"fp32", "bf16", "fp16"})

    def export(
        self, module: Classifier, example: Inputs, calibration: Sequence[Inputs], folder: Path
    ) -> None:
        from mlflow_pt_deploy.models import save_classifier

        if self.precision == "int8-dynamic":
            module.network.config.save_pretrained(folder)
            module.save_processor(folder)
            quantized = quantize_linears(module)
            check_int8_linears(quantized)
            _save_int8(quantized, folder / _INT8)
        else:
            save_classifier(module, folder)

    def load(self, folder: Path, *, device: str, threads: int) -> Predict:
        import torch

        self.check_device_kind(device)
        if self.precision != "int8-dynamic":
            return EagerPredictor(load_eager(folder, self.precision, device, threads), device)
        torch.set_num_threads(threads)
        return EagerPredictor(_load_int8(folder), device)


class EagerPredictor:
    """A loaded eager variant.

    Args:
        module: The classifier.
        device: Its device.
    """

    def __init__(self, module: Any, device: str) -> None:
        self.module = module
        self._predict = torch_predict(module, device)

    def __call__(self, inputs: Inputs) -> Logits:
        return self._predict(inputs)


def load_eager(folder: Path, precision: str, device: str, threads: int) -> Any:
    """Load the classifier of an exported folder in a precision, on a device."""
    import torch

    from mlflow_pt_deploy.models import reload_classifier

    torch.set_num_threads(threads)
    check_device(device)
    if device != CPU:
        disable_tf32()
    return in_precision(reload_classifier(str(folder)), precision).to(device)


def in_precision(module: torch.nn.Module, precision: str) -> torch.nn.Module:
    """Convert a module's weights, in place, to ``fp32``, ``bf16`` or ``fp16``."""
    import torch

    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return module.to(dtypes.get(precision, torch.float32))


def torch_predict(module: Any, device: str) -> Predict:
    """Wrap a callable that maps input tensors on a device to logits.

    On a GPU inputs are copied through pinned memory. `pin_memory` takes it from PyTorch's cache of
    pinned blocks, which reuses a block once its copy is done, so it needs no buffers of its own.
    """
    import torch

    def predict(inputs: Inputs) -> Logits:
        with torch.inference_mode():
            logits = module(*(torch.from_numpy(array) for array in inputs.values()))
        return np.asarray(logits.float().numpy(), dtype=np.float32)

    # a compiled package runs on the current stream of the current device
    current = partial(torch.cuda.device, device) if kind_of(device) == CUDA else nullcontext

    def predict_on_gpu(inputs: Inputs) -> Logits:
        with torch.inference_mode(), current():
            pinned = [torch.from_numpy(array).pin_memory() for array in inputs.values()]
            logits = module(*(tensor.to(device, non_blocking=True) for tensor in pinned))
            return np.asarray(logits.float().cpu().numpy(), dtype=np.float32)

    if device == CPU:
        return predict
    disable_tf32()
    return predict_on_gpu


def quantize_linears(module: torch.nn.Module) -> torch.nn.Module:
    """Return a copy with dynamic int8 linear layers."""
    import warnings

    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deprecated")
        quantized: torch.nn.Module = torch.ao.quantization.quantize_dynamic(
            module, {torch.nn.Linear}, dtype=torch.qint8
        )
    return quantized


def check_int8_linears(quantized: torch.nn.Module) -> None:
    """Check that `quantize_linears` quantized most weight matrices.

    Raises:
        VariantError: Most matrices belong to other layers, such as convolutions or GPT-2's Conv1D.
    """
    quantized_count = len(_int8_linears(quantized))
    check_int8(quantized_count, quantized_count + len(weight_matrices(quantized)))


def weight_matrices(module: torch.nn.Module) -> list[torch.nn.Module]:
    """Layers whose weight is a matrix of parameters, without embeddings."""
    import torch

    return [
        layer
        for layer in module.modules()
        if isinstance(weight := getattr(layer, "weight", None), torch.nn.Parameter)
        and weight.dim() > 1
        and not isinstance(layer, torch.nn.Embedding)
    ]


def _save_int8(module: torch.nn.Module, path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().contiguous() for name, tensor in _plain_tensors(module)}
    for name, layer in _int8_linears(module):
        weight, bias = layer._packed_params._weight_bias()
        tensors[f"{name}.int8"] = weight.int_repr()
        tensors[f"{name}.scale"] = torch.tensor(weight.q_scale(), dtype=torch.float64)
        if bias is not None:
            tensors[f"{name}.bias"] = bias.detach()
    save_file(tensors, path)


def _load_int8(folder: Path) -> torch.nn.Module:
    import torch
    from safetensors.torch import load_file

    from mlflow_pt_deploy.models import blank_classifier

    module = quantize_linears(blank_classifier(folder))
    tensors = load_file(folder / _INT8)
    for name, layer in _int8_linears(module):
        weight = torch._make_per_tensor_quantized_tensor(
            tensors[f"{name}.int8"], float(tensors[f"{name}.scale"]), 0
        )
        layer.set_weight_bias(weight, tensors.get(f"{name}.bias"))
    for name, tensor in _plain_tensors(module):
        tensor.data.copy_(tensors[name])
    return module


def _plain_tensors(module: torch.nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _int8_linears(module: torch.nn.Module) -> list[tuple[str, Any]]:
    import torch

    kind = torch.ao.nn.quantized.dynamic.Linear
    return [(name, layer) for name, layer in module.named_modules() if isinstance(layer, kind)]
