"""Every runtime, and every variant: built by default or on request. One is added by one line."""

from __future__ import annotations

from mlflow_pt_deploy.errors import VariantError
from mlflow_pt_deploy.variants.aotinductor import AOTInductor
from mlflow_pt_deploy.variants.base import CONVOLUTIONAL, Variant
from mlflow_pt_deploy.variants.cascade import Cascade
from mlflow_pt_deploy.variants.eager import Eager
from mlflow_pt_deploy.variants.numpy import STATIC, NumPy
from mlflow_pt_deploy.variants.onnxruntime import OnnxRuntime
from mlflow_pt_deploy.variants.openvino import OpenVino
from mlflow_pt_deploy.variants.torchscript import TorchScript

RUNTIMES: dict[str, type[Variant]] = {
    kind.runtime: kind
    for kind in (Eager, TorchScript, AOTInductor, OnnxRuntime, OpenVino, NumPy, Cascade)
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

# Slow to build, slower than a neighbour in VARIANTS wherever they were measured, or for a GPU.
ON_REQUEST: tuple[Variant, ...] = (
    Eager("fp16"),
    AOTInductor("int8-static"),
    OpenVino("int8-accuracy"),
)
# A static student computes so little that a runtime's own cost decides.
STATIC_VARIANTS: tuple[Variant, ...] = (NumPy("fp32"), OnnxRuntime("fp32"))

# Of a network of convolutions these would quantize the last layer alone.
_LINEAR_ONLY = {variant for variant in VARIANTS if variant.precision == "int8-dynamic"} | {
    AOTInductor("int8-static")
}


def select(names: str) -> tuple[Variant, ...]:
    """The variants that a user asked for, and eager fp32, which all are compared with.

    Args:
        names: Runtimes or runtimes with a precision, separated by commas, e.g.
            ``onnxruntime,openvino-fp32``, and ``cascade``; empty for all but `ON_REQUEST`. What is
            there needs its precision: ``openvino`` does not build ``openvino-int8-accuracy``.

    Raises:
        VariantError: A name is not in the table.
    """
    every = tuple(dict.fromkeys(VARIANTS + STATIC_VARIANTS))
    wanted = {name.strip() for name in names.split(",") if name.strip()}
    known = {Cascade.runtime} | {v.runtime for v in every}
    known |= {_short(v) for v in (*every, *ON_REQUEST)}
    if unknown := sorted(wanted - known):
        raise VariantError(
            f"variants: there is no {', '.join(unknown)}; choose from {', '.join(sorted(known))}."
        )
    default = (
        variant
        for variant in every
        if not wanted or wanted & {variant.runtime, _short(variant)} or variant == VARIANTS[0]
    )
    return (*default, *(variant for variant in ON_REQUEST if _short(variant) in wanted))


def wants_cascades(names: str) -> bool:
    """Whether a user who asked for `names` (see `select`) wants cascades of them too."""
    return not names.strip() or Cascade.runtime in {name.strip() for name in names.split(",")}


def suits(variant: Variant, model_type: str) -> bool:
    """Whether a variant is built for models of a kind (`model_type` of their config.json)."""
    if model_type == STATIC:
        return variant in STATIC_VARIANTS
    return not isinstance(variant, NumPy)


def useless(variant: Variant, model_type: str) -> str:
    """Why a variant of such a model would gain nothing; empty where it may gain."""
    if model_type in CONVOLUTIONAL and variant in _LINEAR_ONLY:
        return (
            f"skipped: {_short(variant)} quantizes linear layers, and all but the last of this "
            "network are convolutions; int8-static of ONNX Runtime and OpenVINO quantize these"
        )
    return ""


def _short(variant: Variant) -> str:
    return f"{variant.runtime}-{variant.precision}"
