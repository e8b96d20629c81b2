"""OpenVINO: an intermediate representation in fp32, run in bf16, or calibrated to int8 by NNCF."""

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

from mlflow_pt_deploy.errors import MissingExtraError, UnsupportedError, VariantError, first_line
from mlflow_pt_deploy.variants.base import (
    CONVOLUTIONAL,
    Inputs,
    Logits,
    Predict,
    Variant,
    check_calibration,
)
from mlflow_pt_deploy.variants.check import check_int8
from mlflow_pt_deploy.variants.eager import torch_predict

if TYPE_CHECKING:
    from mlflow_pt_deploy.models import Classifier

_FILE = "model.xml"
_PRODUCTS = {"MatMul", "Convolution", "GroupConvolution"}
# What lies between stored weights and the product that uses them.
_DECOMPRESSION = {"Convert", "Subtract", "Multiply", "FakeQuantize", "Reshape", "Transpose"}
_Item = tuple[Inputs, npt.NDArray[np.int64]]


@dataclass(frozen=True)
class OpenVino(Variant):
    """OpenVINO IR with free batch and, for texts, length.

    ``int8-static`` calibrates activations on rows of `train` (NNCF post-training quantization,
    for transformers in their mode). ``int8-accuracy`` calibrates on half of them and compares
    labels with the fp32 model's own on the other half; while too many differ, it puts the layer
    that costs most back to fp32. That can take minutes.

    Attributes:
        max_drop: Share of held-out rows, 0 to 1, whose label ``int8-accuracy`` may change.
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
            model = _calibrate_held_to(self.max_drop, model, module, calibration)
            check_int8(*_int8_products(model), least=0)  # as many as its answers allow
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
        with warnings.catch_warnings(), torch.inference_mode(), _every_query_sees_a_key():
            warnings.simplefilter("ignore")
            model = openvino.convert_model(module, example_input=tensors)
    except Exception as error:  # OpenVINO's own exceptions derive from Exception alone
        raise VariantError(f"OpenVINO: {first_line(error)}") from error
    for port, name in zip(model.inputs, example, strict=True):
        port.get_tensor().set_names({name})
    axes = module.preprocessor.axes
    model.reshape(
        {
            name: [-1 if at in axes[name] else size for at, size in enumerate(array.shape)]
            for name, array in example.items()
        }
    )
    model.output(0).get_tensor().set_names({"logits"})  # NNCF compares outputs by name
    return model


@contextmanager
def _every_query_sees_a_key() -> Iterator[None]:
    """Let queries whose keys are all masked attend to all keys, while a model is converted.

    Such are padded positions further from the text than an attention window. Softmax over nothing
    is 0 in PyTorch's attention and NaN in OpenVINO's, where the next layer spreads it to the text.
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


def _family(module: Classifier) -> dict[str, Any]:
    """What NNCF should know of the model: transformers have layers of rules of their own."""
    if module.network.config.model_type in CONVOLUTIONAL:
        return {}
    return {"model_type": _nncf().ModelType.TRANSFORMER}


def _parameters(module: Classifier, **more: Any) -> Any:
    from nncf.quantization.range_estimator import RangeEstimatorParametersSet as Ranges

    if module.network.config.model_type in CONVOLUTIONAL:
        # By default the mean of the rows' extremes, which cuts bright images off.
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
            advanced_parameters=_parameters(module),
            **_family(module),
        )
    except Exception as error:  # NNCF raises its own, OpenVINO's and Python's
        raise VariantError(f"NNCF: {first_line(error)}") from error


def _calibrate_held_to(
    max_drop: float, model: Any, module: Classifier, calibration: Sequence[Inputs]
) -> Any:
    nncf = _nncf()
    check_calibration(calibration)
    fitted, held_out = calibration[::2], _labelled(module, calibration[1::2])
    parameters = _parameters(
        module,
        # Putting a layer back restores its weights, and not what smoothing moved into its input:
        # in NNCF 3.4 the two together make the model worse with every layer.
        smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=-1),
    )
    try:
        held = nncf.quantize_with_accuracy_control(
            model,
            nncf.Dataset(fitted, dict),
            nncf.Dataset(held_out, lambda item: dict(item[0])),
            _agreement,
            max_drop=max_drop,
            subset_size=len(fitted),
            advanced_quantization_parameters=parameters,
            **_family(module),
        )
    except Exception as error:  # NNCF raises its own, OpenVINO's and Python's
        raise VariantError(f"NNCF: {first_line(error)}") from error
    _check_drop(held, held_out, max_drop)
    return held


def _check_drop(model: Any, held_out: Sequence[_Item], max_drop: float) -> None:
    """NNCF returns its last attempt, also where that is not good enough."""
    compiled = _openvino().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    drop = 1 - _agreement(compiled, held_out)[0]
    if drop > max_drop:
        raise VariantError(
            f"int8-accuracy: {drop:.1%} of {len(held_out)} held-out rows change their label, "
            f"allowed are {max_drop:.1%}. Allow more (max_drop), or use fp32."
        )


def _int8_products(model: Any) -> tuple[int, int]:
    """How many products with weights have int8 weights, and how many there are."""
    weights = [
        type_
        for node in model.get_ops()
        if node.get_type_name() in _PRODUCTS
        for type_ in filter(None, map(_weight_type, node.input_values()))
    ]
    return sum(type_ != "f32" for type_ in weights), len(weights)


def _weight_type(value: Any) -> str:
    """Element type of the constant that an input is made from; empty for activations."""
    node, rounded = value.get_node(), False
    while node.get_type_name() in _DECOMPRESSION:
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


def _labelled(module: Classifier, batches: Sequence[Inputs]) -> list[_Item]:
    """Batches with the labels that the fp32 model gives them, int64 (batch,)."""
    predict = torch_predict(module, "cpu")
    return [(batch, predict(batch).argmax(axis=1)) for batch in batches]


def _agreement(compiled: Any, items: Iterable[_Item]) -> tuple[float, list[list[Logits]]]:
    """Share of rows that keep their label, and each batch's logits, by which NNCF ranks layers."""
    logits, kept = [], []
    for batch, labels in items:
        logits.append([np.array(compiled(dict(batch))[0], dtype=np.float32)])
        kept.extend(logits[-1][0].argmax(axis=1) == labels)
    return float(np.mean(kept)), logits
