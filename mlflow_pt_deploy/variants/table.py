"""Every runtime, and every variant: built by default or on request. One is added by one line."""

from __future__ import annotations

from mlflow_pt_deploy.errors import VariantError
from mlflow_pt_deploy.variants.aotinductor import AOTInductor
from mlflow_pt_deploy.variants.base import Variant
from mlflow_pt_deploy.variants.eager import Eager
from mlflow_pt_deploy.variants.onnxruntime import OnnxRuntime
from mlflow_pt_deploy.variants.openvino import OpenVino
from mlflow_pt_deploy.variants.torchscript import TorchScript

RUNTIMES: dict[str, type[Variant]] = {
    kind.runtime: kind for kind in (Eager, TorchScript, AOTInductor, OnnxRuntime, OpenVino)
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

# Slow to build, or slower than a neighbour in VARIANTS wherever they were measured.
ON_REQUEST: tuple[Variant, ...] = (
    AOTInductor("int8-static"),
    OpenVino("int8-accuracy"),
)


def select(names: str) -> tuple[Variant, ...]:
    """The variants that a user asked for, and eager fp32, which all are compared with.

    Args:
        names: Runtimes or runtimes with a precision, separated by commas, e.g.
            ``onnxruntime,openvino-fp32``; empty for all of `VARIANTS`. What is in `ON_REQUEST`
            needs its precision: ``openvino`` does not build ``openvino-int8-accuracy``.

    Raises:
        VariantError: A name is not in the table.
    """
    wanted = {name.strip() for name in names.split(",") if name.strip()}
    known = {v.runtime for v in VARIANTS} | {_short(v) for v in (*VARIANTS, *ON_REQUEST)}
    if unknown := sorted(wanted - known):
        raise VariantError(
            f"variants: there is no {', '.join(unknown)}; choose from {', '.join(sorted(known))}."
        )
    default = (
        variant
        for variant in VARIANTS
        if not wanted or wanted & {variant.runtime, _short(variant)} or variant == VARIANTS[0]
    )
    return (*default, *(variant for variant in ON_REQUEST if _short(variant) in wanted))


def _short(variant: Variant) -> str:
    return f"{variant.runtime}-{variant.precision}"
