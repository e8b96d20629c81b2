"""AOTInductor: the exported graph, compiled ahead of time into a native library."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mlflow_pt_deploy.errors import MissingExtraError, UnsupportedError, VariantError, root_cause
from mlflow_pt_deploy.runtimes.base import (
    VNNI_FLAGS,
    Inputs,
    Predict,
    Variant,
    check_calibration,
    int8_saturates,
)
from mlflow_pt_deploy.runtimes.eager import in_precision, torch_predict
from mlflow_pt_deploy.runtimes.export_check import check_int8
from mlflow_pt_deploy.runtimes.gpu_requirements import capability_of, check_capability
from mlflow_pt_deploy.system.device import CPU, check_device, kind_of
from mlflow_pt_deploy.system.hardware import cpu_flags

if TYPE_CHECKING:
    import torch

    from mlflow_pt_deploy.models import Classifier
    from mlflow_pt_deploy.preprocessing import Axis

_FILE = "model.pt2"
# Inductor compiles with -march=native: the library may use any of these flags that the host has.
_COMPILED_FOR = frozenset({"avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16"}) | VNNI_FLAGS


@dataclass(frozen=True)
class AOTInductor(Variant):
    """``torch.export`` with dynamic batch and length, compiled to an AOTInductor package.

    ``int8-static`` quantizes the exported graph with torchao's x86 post-training quantization,
    calibrated on rows of `train`: linear layers only, weights per channel.
    A package runs on the kind of device that it was compiled on.

    Attributes:
        capability: Compute capability of the GPU that a package was compiled for, such as ``9.0``;
            empty on the CPU, and before the export.
    """

    capability: str = ""

    runtime: ClassVar[str] = "aotinductor"
    compiles: ClassVar[bool] = True
    carries_code: ClassVar[bool] = True
    gpu_precisions: ClassVar[frozenset[str]] = frozenset({"fp32", "bf16", "fp16"})
    least_capability: ClassVar[tuple[int, int]] = (7, 0)  # of Triton

    def unsupported(self) -> str | None:
        if reason := super().unsupported():
            return reason
        if shutil.which(os.environ.get("CXX", "g++")) is None:
            return "skipped: no C++ compiler; install g++ (or set CXX)"
        if self.device != CPU and find_spec("triton") is None:
            return "skipped: AOTInductor compiles for a GPU with Triton; install triton"
        return None

    def for_this_machine(self) -> AOTInductor:
        return self if self.device == CPU else replace(self, capability=capability_of(self.device))

    def required_cpu_flags(self) -> frozenset[str]:
        return _COMPILED_FOR & cpu_flags()

    def export(
        self, module: Classifier, example: Inputs, calibration: Sequence[Inputs], folder: Path
    ) -> None:
        import copy

        import torch
        from torch._inductor import aoti_compile_and_package

        static = self.precision == "int8-static"
        if static:
            _require_torchao()
            check_calibration(calibration)
        source = in_precision(copy.deepcopy(module), self.precision).to(self.device)
        axes = module.preprocessor.axes
        try:
            with torch.no_grad():
                program = _export_graph(source, example, axes, self.device)
                if static:
                    program = _export_graph(_calibrate(program, calibration), example, axes)
                aoti_compile_and_package(
                    program,
                    package_path=str(folder / _FILE),
                    inductor_configs=_compile_options(static),
                )
        except VariantError:
            raise
        except Exception as error:  # torch.export and Inductor raise many unrelated types
            raise VariantError(
                f"AOTInductor: {type(error).__name__}: {root_cause(error)}"
            ) from error

    def load(self, folder: Path, *, device: str, threads: int) -> Predict:
        import torch

        if kind_of(device) != self.device:
            raise UnsupportedError(
                f"device={device}: this package was compiled for {self.device}; use "
                f"device={self.device}, or another variant."
            )
        check_device(device)
        if device != CPU:
            check_capability(self.capability, capability_of(device))
        torch.set_num_threads(threads)
        return torch_predict(load_package(folder, device), device)


def load_package(folder: Path, device: str) -> Callable[..., torch.Tensor]:
    """Load the compiled function of an exported folder; it maps tensors on `device` to logits.

    On a GPU it can be captured into a CUDA graph.
    """
    import torch

    with torch.inference_mode():
        return _load_function(str(folder / _FILE), torch.device(device))


def _compile_options(static: bool) -> dict[str, Any]:
    from torch._inductor import config

    # Int8 kernels need constant weights; otherwise weights are dequantized to fp32.
    options: dict[str, Any] = {"freezing": static}
    if hasattr(config.aot_inductor, "precompile_headers"):
        # Precompiling two headers takes 14 s and saves 2 s per package.
        options["aot_inductor.precompile_headers"] = False
    return options


def _load_function(path: str, device: torch.device) -> Callable[..., torch.Tensor]:
    """Load the package directly; `aoti_load_package` first imports the compiler, for 2 s."""
    import torch

    # On a GPU without the runtime's locks, whose events a CUDA graph cannot capture.
    single_threaded = device.type == "cuda"
    index = -1 if device.index is None else device.index
    try:
        runner = torch._C._aoti.AOTIModelPackageLoader(path, "model", single_threaded, 1, index)
    except (AttributeError, TypeError):  # private API that may change
        from torch._inductor import aoti_load_package

        package: Callable[..., torch.Tensor] = aoti_load_package(
            path, run_single_threaded=single_threaded, device_index=index
        )
        return package

    lock = threading.Lock() if single_threaded else nullcontext()

    def call(*tensors: torch.Tensor) -> torch.Tensor:
        with lock:
            (logits,) = runner.boxed_run(list(tensors))
        return logits

    return call


def _require_torchao() -> None:
    try:
        import torchao  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("torchao", "quantize") from error


def _tensors(batch: Inputs, device: str = "cpu") -> tuple[torch.Tensor, ...]:
    import torch

    return tuple(torch.from_numpy(array).to(device) for array in batch.values())


def _export_graph(
    module: torch.nn.Module,
    example: Inputs,
    axes: Mapping[str, Mapping[int, Axis]],
    device: str = "cpu",
) -> Any:
    """Export the module's graph with dynamic input axes within their bounds."""
    import torch

    named = {axis for dynamic in axes.values() for axis in dynamic.values()}
    dims = {axis: torch.export.Dim(axis.name, min=axis.minimum, max=axis.maximum) for axis in named}
    shapes = {name: {dim: dims[axis] for dim, axis in axes[name].items()} for name in example}
    return torch.export.export(module, _tensors(example, device), dynamic_shapes=shapes)


def _calibrate(program: Any, calibration: Sequence[Inputs]) -> torch.nn.Module:
    """Quantize the graph, with activation ranges from the calibration rows."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    config = x86.get_default_x86_inductor_quantization_config()
    if int8_saturates():
        # By default the quantizer reduces the activations to 7 bits, which costs more accuracy.
        config = replace(config, weight=replace(config.weight, quant_min=-64, quant_max=63))
    quantizer = x86.X86InductorQuantizer().set_global(config)
    prepared = prepare_pt2e(program.module(), quantizer)
    for batch in calibration:
        prepared(*_tensors(batch))
    quantized: torch.nn.Module = convert_pt2e(prepared)
    _check_int8(quantized)
    return quantized


def _check_int8(quantized: Any) -> None:
    """Check that most linear layers and convolutions have int8 weights."""
    weights = [
        str(node.args[1].target)
        for node in quantized.graph.nodes
        if str(node.target).startswith(("aten.linear.", "aten.conv"))
    ]
    check_int8(sum("dequantize" in weight for weight in weights), len(weights))
