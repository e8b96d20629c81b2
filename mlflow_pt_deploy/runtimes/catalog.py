"""Catalog of all runtimes and of the variants that are built by default or on request."""

from __future__ import annotations

from mlflow_pt_deploy.errors import VariantError
from mlflow_pt_deploy.model_types import CONVOLUTIONAL, STATIC
from mlflow_pt_deploy.runtimes.aotinductor import AOTInductor
from mlflow_pt_deploy.runtimes.base import Variant
from mlflow_pt_deploy.runtimes.cascade import Cascade
from mlflow_pt_deploy.runtimes.cuda_graphs import CudaGraphs
from mlflow_pt_deploy.runtimes.eager import Eager
from mlflow_pt_deploy.runtimes.numpy_static import NumPy
from mlflow_pt_deploy.runtimes.onnxruntime import OnnxRuntime
from mlflow_pt_deploy.runtimes.openvino import OpenVino
from mlflow_pt_deploy.runtimes.packed import MODEL_TYPE, Packed
from mlflow_pt_deploy.runtimes.portable import Portable
from mlflow_pt_deploy.runtimes.tensorrt import TensorRT
from mlflow_pt_deploy.runtimes.torchao import TorchAO
from mlflow_pt_deploy.runtimes.torchscript import TorchScript
from mlflow_pt_deploy.system.device import CPU, CUDA, kind_of

RUNTIMES: dict[str, type[Variant]] = {
    kind.runtime: kind
    for kind in (
        Eager,
        TorchScript,
        AOTInductor,
        OnnxRuntime,
        OpenVino,
        NumPy,
        Cascade,
        CudaGraphs,
        Packed,
        TensorRT,
        TorchAO,
        Portable,
    )
}

VARIANTS: tuple[Variant, ...] = (
    Eager("fp32"),
    Eager("bf16"),
    Eager("int8-dynamic"),
    TorchScript("fp32"),
    TorchScript("int8-dynamic"),
    AOTInductor("fp32"),
    AOTInductor("bf16"),
    OnnxRuntime("fp32"),
    OnnxRuntime("int8-dynamic"),
    OnnxRuntime("int8-static"),
    OpenVino("fp32"),
    OpenVino("bf16"),
    OpenVino("int8-static"),
)

# Slow to build, slower than a similar one in VARIANTS in all measurements, or for a GPU and either
# slow to build or quantized.
ON_REQUEST: tuple[Variant, ...] = (
    Eager("fp16"),
    AOTInductor("int8-static"),
    OpenVino("int8-accuracy"),
    CudaGraphs("fp32", device=CUDA),
    AOTInductor("fp32", device=CUDA),
    Packed("fp16", device=CUDA),
    TensorRT("fp32", device=CUDA),
    TensorRT("fp16", device=CUDA),
    TorchAO("int8-dynamic", device=CUDA),
    TorchAO("fp8-dynamic", device=CUDA),
)
GPU_VARIANTS: tuple[Variant, ...] = (
    Eager("fp32", device=CUDA),
    Eager("bf16", device=CUDA),
    Eager("fp16", device=CUDA),
    CudaGraphs("bf16", device=CUDA),
    CudaGraphs("fp16", device=CUDA),
    Packed("bf16", device=CUDA),
    AOTInductor("bf16", device=CUDA),
    AOTInductor("fp16", device=CUDA),
    OnnxRuntime("fp32", device=CUDA),
    OnnxRuntime("fp16", device=CUDA),
)
"""Built with ``device=cuda``, beside `VARIANTS`."""

# For a static student the overhead of the runtime dominates.
STATIC_VARIANTS: tuple[Variant, ...] = (NumPy("fp32"), OnnxRuntime("fp32"))

# These quantize linear layers only; a convolutional network has one.
_LINEAR_ONLY = {variant for variant in VARIANTS if variant.precision == "int8-dynamic"} | {
    AOTInductor("int8-static"),
    TorchAO("int8-dynamic", device=CUDA),
    TorchAO("fp8-dynamic", device=CUDA),
}


def select(names: str, device: str = CPU) -> tuple[Variant, ...]:
    """Return the requested variants, and eager fp32 as the baseline.

    Args:
        names: Runtimes or runtimes with a precision, separated by commas, e.g.
            ``onnxruntime,openvino-fp32``, ``cascade`` and ``portable``; empty selects all but
            `ON_REQUEST`. Those need their precision: ``openvino`` does not select
            ``openvino-int8-accuracy``.
        device: ``cuda`` adds `GPU_VARIANTS`; ``eager-fp16-cuda`` selects only the one for the GPU.

    Raises:
        VariantError: A name is not in the catalog.
    """
    on_device = GPU_VARIANTS if kind_of(device) == CUDA else ()
    regular = tuple(dict.fromkeys(VARIANTS + STATIC_VARIANTS + on_device))
    wanted = {name.strip() for name in names.split(",") if name.strip()}
    known = {Cascade.runtime, Portable.runtime} | {v.runtime for v in regular}
    known |= {_short_name(v) for v in (*regular, *ON_REQUEST)}
    if unknown := sorted(wanted - known):
        raise VariantError(
            f"variants: unknown {', '.join(unknown)}; choose from {', '.join(sorted(known))}."
        )
    default = (
        variant
        for variant in regular
        if not wanted or wanted & {variant.runtime, _short_name(variant)} or variant == VARIANTS[0]
    )
    return (*default, *(variant for variant in ON_REQUEST if _short_name(variant) in wanted))


def wants_cascades(names: str) -> bool:
    """Whether `names` (see `select`) include cascades."""
    return _wants(Cascade.runtime, names)


def wants_portable(names: str) -> bool:
    """Whether `names` (see `select`) include a portable variant of each model."""
    return _wants(Portable.runtime, names)


def _wants(runtime: str, names: str) -> bool:
    return not names.strip() or runtime in {name.strip() for name in names.split(",")}


def supports(variant: Variant, model_type: str) -> bool:
    """Whether a variant supports a model type (`model_type` in config.json)."""
    if model_type == STATIC:
        return variant in STATIC_VARIANTS
    return not isinstance(variant, NumPy)


def skip_reason(variant: Variant, model_type: str) -> str:
    """Reason why a variant has no benefit for a model type, or an empty string."""
    if model_type in CONVOLUTIONAL and variant in _LINEAR_ONLY:
        return (
            f"skipped: {_short_name(variant)} quantizes linear layers only, and all layers but the "
            "last are convolutions; int8-static of ONNX Runtime and OpenVINO quantizes convolutions"
        )
    if isinstance(variant, Packed) and model_type != MODEL_TYPE:
        return f"skipped: packed runs models of the type {MODEL_TYPE} only, and not {model_type}"
    return ""


def _short_name(variant: Variant) -> str:
    name = f"{variant.runtime}-{variant.precision}"
    return name if variant.device == CPU else f"{name}-{variant.device}"
