"""ONNX Runtime: transformer fusions in fp32, or dynamic int8."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from mlflow_pt_deploy.errors import MissingExtraError, UnsupportedError, VariantError
from mlflow_pt_deploy.hardware import cpu_flags
from mlflow_pt_deploy.variants.base import Inputs, Logits, Predict, Variant

if TYPE_CHECKING:
    from mlflow_pt_deploy.models import Classifier

FILE = "model.onnx"
_NAMES = ("input_ids", "attention_mask")


@dataclass(frozen=True)
class OnnxRuntime(Variant):
    """An ONNX graph with free batch and length."""

    runtime: ClassVar[str] = "onnxruntime"
    extra: ClassVar[str | None] = "onnx"

    def export(
        self, module: Classifier, example: Inputs, calibration: Sequence[Inputs], folder: Path
    ) -> None:
        path = folder / FILE
        _to_onnx(module, example, path)
        if self.precision == "int8-dynamic":
            _quantize(path)
        elif hasattr(module.network.config, "num_attention_heads"):  # a static student has none
            _fuse(path, module.network.config)

    def load(self, folder: Path, *, device: str, threads: int) -> Predict:
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingExtraError("onnxruntime", "onnx") from error

        provider = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}.get(device)
        if provider not in onnxruntime.get_available_providers():
            raise UnsupportedError(f"this onnxruntime cannot use device={device}; use device=cpu.")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(str(folder / FILE), options, providers=[provider])

        def predict(inputs: Inputs) -> Logits:
            feed = {name: inputs[name] for name in _NAMES}
            return np.asarray(session.run(["logits"], feed)[0], dtype=np.float32)

        return predict


def _to_onnx(module: Classifier, example: Inputs, path: Path) -> None:
    try:
        import onnx
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(error.name or "onnx", "onnx") from error
    import torch

    tensors = tuple(torch.from_numpy(example[name]) for name in _NAMES)
    axes = {0: "batch", 1: "length"}
    # The TorchScript-based exporter takes 2 s where dynamo takes 20, and writes the graph that
    # ONNX Runtime's fusions know; they also expect attention as plain matrix products.
    attention = module.network.config._attn_implementation
    module.network.set_attn_implementation("eager")
    try:
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                module,
                tensors,
                str(path),
                input_names=list(_NAMES),
                output_names=["logits"],
                dynamic_axes={**dict.fromkeys(_NAMES, axes), "logits": {0: "batch"}},
                opset_version=17,
                dynamo=False,
            )
    except (RuntimeError, ValueError) as error:
        raise VariantError(f"export to ONNX failed: {str(error).splitlines()[0]}") from error
    finally:
        module.network.set_attn_implementation(attention)
    onnx.checker.check_model(str(path))


def _fuse(path: Path, config: Any) -> None:
    from onnxruntime.transformers import optimizer

    logging.getLogger("onnxruntime.transformers").setLevel(logging.ERROR)
    fused = optimizer.optimize_model(
        str(path),
        model_type="bert",
        num_heads=getattr(config, "num_attention_heads", 0),
        hidden_size=getattr(config, "hidden_size", 0),
        opt_level=0,
    )
    fused.save_model_to_file(str(path))


def _quantize(path: Path) -> None:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logging.getLogger().addFilter(_not_about_preprocessing)
    try:
        quantize_dynamic(
            str(path),
            str(path),
            weight_type=QuantType.QInt8,
            # Without VNNI the 8-bit products are added in 16 bits and saturate; 7-bit weights fit.
            reduce_range=not cpu_flags() & {"avx512_vnni", "avx_vnni"},
            extra_options={"MatMulConstBOnly": True, "DefaultTensorType": onnx.TensorProto.FLOAT},
        )
    finally:
        logging.getLogger().removeFilter(_not_about_preprocessing)


def _not_about_preprocessing(record: logging.LogRecord) -> bool:
    return "pre-processing before quantization" not in record.getMessage()
