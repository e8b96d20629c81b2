"""Every runtime, and every variant that is built by default. Adding a runtime is one line here."""

from __future__ import annotations

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
    OpenVino("fp32"),
    OpenVino("bf16"),
    OpenVino("int8-static"),
)
