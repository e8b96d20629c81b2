"""OpenVINO: IR in fp32, run in fp32 or bf16, or quantized to int8 with NNCF."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from mlflow_pt_deploy.errors import MissingExtraError, VariantError, root_cause
from mlflow_pt_deploy.model_types import CONVOLUTIONAL
from mlflow_pt_deploy.runtimes.base import (
    Inputs,
    Logits,
    Predict,
    Variant,
    check_calibration,
)
from mlflow_pt_deploy.runtimes.eager import torch_predict
from mlflow_pt_deploy.runtimes.export_check import check_int8

if TYPE_CHECKING:
    from mlflow_pt_deploy.models import Classifier

_FILE = "model.xml"
_PRODUCT_OPS = {"MatMul", "Convolution", "GroupConvolution"}
# Operations between stored weights and the product that uses them.
_DECOMPRESSION_OPS = {"Convert", "Subtract", "Multiply", "FakeQuantize", "Reshape", "Transpose"}
_Item = tuple[Inputs, npt.NDArray[np.int64]]


@dataclass(frozen=True)
class OpenVino(Variant):
    """OpenVINO IR with a dynamic batch axis and, for texts, a dynamic length.

    ``int8-static`` calibrates activations on rows of `train` (NNCF post-training quantization, with
    its transformer mode for transformers). ``int8-accuracy`` calibrates on half of the rows and
    compares labels with the fp32 model on the other half. While too many labels differ, it reverts
    the layer with the largest effect to fp32, which can take minutes.

    Attributes:
        max_drop: Maximum share of held-out rows, 0 to 1, with another label (``int8-accuracy``).
    """

    max_drop: float = 0.005

    runtime: ClassVar[str] = "openvino"
    extra: ClassVar[str | None] = "openvino"

    def export(
        self, module: Classifier, example: Inputs, calibration: Sequence[Inputs], folder: Path
    ) -> None:
        openvino = _openvino()
        model = _convert(openvino, module, example)
        if self.precision == "int8-static":
            model = _calibrate(model, module, calibration)
            check_int8(*_int8_products(model))
        elif self.precision == "int8-accuracy":
            model = _calibrate_with_accuracy_control(self.max_drop, model, module, calibration)
            check_int8(*_int8_products(model), min_share=0)  # limited by the accuracy
        openvino.save_model(model, str(folder / _FILE), compress_to_fp16=False)

    def load(self, folder: Path, *, device: str, threads: int) -> Predict:
        openvino = _openvino()
        self.check_device_kind(device)
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
            result = request.infer(dict(inputs), share_inputs=True)
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

    tensors = {name: torch.from_numpy(array) for name, array in example.items()}
    try:
        with warnings.catch_warnings(), torch.inference_mode(), _unmask_empty_queries():
            warnings.simplefilter("ignore")
            model = openvino.convert_model(module, example_input=tensors)
    except Exception as error:  # OpenVINO's exceptions derive from Exception only
        raise VariantError(f"OpenVINO: {root_cause(error)}") from error
    for port, name in zip(model.inputs, example, strict=True):
        port.get_tensor().set_names({name})
    axes = module.preprocessor.axes
    model.reshape(
        {
            name: [-1 if dim in axes[name] else size for dim, size in enumerate(array.shape)]
            for name, array in example.items()
        }
    )
    model.output(0).get_tensor().set_names({"logits"})  # NNCF compares outputs by name
    return model


@contextmanager
def _unmask_empty_queries() -> Iterator[None]:
    """Let queries whose keys are all masked attend to all keys while a model is converted.

    These are padding positions that are further from the text than an attention window. A softmax
    over no keys is 0 in PyTorch and NaN in OpenVINO, whose next layer propagates it to the text.
    """
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask

    def mask(*args: Any, **options: Any) -> Any:
        visible = sdpa_mask(*args, **options)
        return None if visible is None else visible | ~visible.any(-1, keepdim=True)

    ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] = mask
    try:
        yield
    finally:
        del ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]


def _model_type(module: Classifier) -> dict[str, Any]:
    """Model type for NNCF, which has special rules for transformers."""
    if module.network.config.model_type in CONVOLUTIONAL:
        return {}
    return {"model_type": _nncf().ModelType.TRANSFORMER}


def _quantization_parameters(module: Classifier, **more: Any) -> Any:
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet as Ranges

    if module.network.config.model_type in CONVOLUTIONAL:
        # The default, the mean of the rows' extremes, would clip bright images.
        more["activations_range_estimator_params"] = Ranges.MINMAX
    return _nncf().AdvancedQuantizationParameters(**more)


def _calibrate(model: Any, module: Classifier, calibration: Sequence[Inputs]) -> Any:
    nncf = _nncf()
    check_calibration(calibration)
    try:
        return nncf.quantize(
            model,
            nncf.Dataset(calibration, dict),
            subset_size=len(calibration),
            advanced_parameters=_quantization_parameters(module),
            **_model_type(module),
        )
    except Exception as error:  # NNCF raises many types
        raise VariantError(f"NNCF: {root_cause(error)}") from error


def _calibrate_with_accuracy_control(
    max_drop: float, model: Any, module: Classifier, calibration: Sequence[Inputs]
) -> Any:
    nncf = _nncf()
    check_calibration(calibration)
    calibrated, held_out = calibration[::2], _label_batches(module, calibration[1::2])
    parameters = _quantization_parameters(
        module,
        # Reverting a layer restores its weights, but not the scale that smooth quantization moved
        # into its input: in NNCF 3.4 the combination degrades the model with every reverted layer.
        smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=-1),
    )
    try:
        quantized = nncf.quantize_with_accuracy_control(
            model,
            nncf.Dataset(calibrated, dict),
            nncf.Dataset(held_out, lambda item: dict(item[0])),
            _agreement,
            max_drop=max_drop,
            subset_size=len(calibrated),
            advanced_quantization_parameters=parameters,
            **_model_type(module),
        )
    except Exception as error:  # NNCF raises many types
        raise VariantError(f"NNCF: {root_cause(error)}") from error
    _check_drop(quantized, held_out, max_drop)
    return quantized


def _check_drop(model: Any, held_out: Sequence[_Item], max_drop: float) -> None:
    """Check the accuracy: NNCF returns its last attempt even if the drop is too large."""
    compiled = _openvino().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    drop = 1 - _agreement(compiled, held_out)[0]
    if drop > max_drop:
        raise VariantError(
            f"int8-accuracy: the label of {drop:.1%} of {len(held_out)} held-out rows changes, the "
            f"limit is {max_drop:.1%}. Increase max_drop, or use fp32."
        )


def _int8_products(model: Any) -> tuple[int, int]:
    """Number of products with int8 weights, and of all products with weights."""
    weights = [
        type_
        for node in model.get_ops()
        if node.get_type_name() in _PRODUCT_OPS
        for type_ in filter(None, map(_weight_type, node.input_values()))
    ]
    return sum(type_ != "f32" for type_ in weights), len(weights)


def _weight_type(value: Any) -> str:
    """Element type of the constant that an input is computed from; empty for activations."""
    node, rounded = value.get_node(), False
    while node.get_type_name() in _DECOMPRESSION_OPS:
        rounded = rounded or node.get_type_name() == "FakeQuantize"
        node = node.input_value(0).get_node()
    if node.get_type_name() != "Constant":
        return ""
    return "i8" if rounded else str(node.get_element_type().get_type_name())


def _nncf() -> Any:
    try:
        import nncf
    except ImportError as error:
        raise MissingExtraError("nncf", "openvino") from error
    logging.getLogger("nncf").setLevel(logging.ERROR)
    return nncf


def _label_batches(module: Classifier, batches: Sequence[Inputs]) -> list[_Item]:
    """Pair each batch with the labels of the fp32 model, int64 (batch,)."""
    predict = torch_predict(module, "cpu")
    return [(batch, predict(batch).argmax(axis=1)) for batch in batches]


def _agreement(compiled: Any, items: Iterable[_Item]) -> tuple[float, list[list[Logits]]]:
    """Share of rows with an unchanged label, and the logits, by which NNCF ranks layers."""
    logits, unchanged = [], []
    for batch, labels in items:
        logits.append([np.array(compiled(dict(batch))[0], dtype=np.float32)])
        unchanged.extend(logits[-1][0].argmax(axis=1) == labels)
    return float(np.mean(unchanged)), logits
