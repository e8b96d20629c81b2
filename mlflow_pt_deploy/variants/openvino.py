"""OpenVINO: an intermediate representation in fp32, run in bf16, or calibrated to int8 by NNCF."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from mlflow_pt_deploy.errors import MissingExtraError, UnsupportedError, VariantError
from mlflow_pt_deploy.variants.base import Inputs, Logits, Predict, Variant

if TYPE_CHECKING:
    from mlflow_pt_deploy.models import Classifier

_FILE = "model.xml"
_NAMES = ("input_ids", "attention_mask")


@dataclass(frozen=True)
class OpenVino(Variant):
    """OpenVINO IR with free batch and length.

    ``int8-static`` calibrates activations on rows of `train` (NNCF post-training quantization,
    transformer mode).
    """

    runtime: ClassVar[str] = "openvino"
    extra: ClassVar[str | None] = "openvino"

    def export(
        self, module: Classifier, example: Inputs, calibration: Sequence[Inputs], folder: Path
    ) -> None:
        openvino = _openvino()
        model = _convert(openvino, module, example)
        if self.precision == "int8-static":
            model = _calibrate(model, calibration)
        openvino.save_model(model, str(folder / _FILE), compress_to_fp16=False)

    def load(self, folder: Path, *, device: str, threads: int) -> Predict:
        openvino = _openvino()
        if device != "cpu":
            raise UnsupportedError("the OpenVINO variants run on the CPU; use device=cpu.")
        compiled = openvino.compile_model(
            str(folder / _FILE),
            "CPU",
            {
                "INFERENCE_NUM_THREADS": threads,
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_PRECISION_HINT": "bf16" if self.precision == "bf16" else "f32",
            },
        )
        request = compiled.create_infer_request()

        def predict(inputs: Inputs) -> Logits:
            result = request.infer({name: inputs[name] for name in _NAMES}, share_inputs=True)
            return np.array(result[0], dtype=np.float32)

        return predict


def _openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise MissingExtraError("openvino", "openvino") from error
    return openvino


def _convert(openvino: Any, module: Classifier, example: Inputs) -> Any:
    import torch

    tensors = {name: torch.from_numpy(example[name]) for name in _NAMES}
    try:
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")
            model = openvino.convert_model(module, example_input=tensors)
    except Exception as error:  # OpenVINO's own exceptions derive from Exception alone
        raise VariantError(f"OpenVINO: {str(error).splitlines()[0]}") from error
    for port, name in zip(model.inputs, _NAMES, strict=True):
        port.get_tensor().set_names({name})
    return model


def _calibrate(model: Any, calibration: Sequence[Inputs]) -> Any:
    try:
        import nncf
    except ImportError as error:
        raise MissingExtraError("nncf", "openvino") from error
    if not calibration:
        raise VariantError("int8-static needs calibration rows; train has none.")
    logging.getLogger("nncf").setLevel(logging.ERROR)
    batches = [{name: batch[name] for name in _NAMES} for batch in calibration]
    return nncf.quantize(
        model,
        nncf.Dataset(batches),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(batches),
    )
