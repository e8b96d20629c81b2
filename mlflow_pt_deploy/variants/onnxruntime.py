"""ONNX Runtime: fp32, dynamic int8, or int8 calibrated on rows of train."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from mlflow_pt_deploy.errors import MissingExtraError, UnsupportedError, VariantError, first_line
from mlflow_pt_deploy.variants.base import (
    CONVOLUTIONAL,
    Inputs,
    Logits,
    Predict,
    Variant,
    check_calibration,
    int8_saturates,
)
from mlflow_pt_deploy.variants.check import check_int8
from mlflow_pt_deploy.variants.streams import Streams

if TYPE_CHECKING:
    from mlflow_pt_deploy.models import Classifier

FILE = "model.onnx"
# On a GPU its default is TF32, whose ten bits of mantissa would fail the golden check.
_PROVIDERS: dict[str, tuple[str, dict[str, str]]] = {
    "cpu": ("CPUExecutionProvider", {}),
    "cuda": ("CUDAExecutionProvider", {"use_tf32": "0"}),
}
# On the CPU the kernels of what these two fuse are slow: a sum, layer norm and GELU by themselves
# take 10 to 17 % less of a text's time in int8 and 9 to 13 % in fp32, with the same answers but for
# rounding.
_NOT_FUSED = ["SkipLayerNormFusion", "BiasGeluFusion"]
_QUANTIZED = ("MatMul", "Gemm", "Gather")
_PRODUCTS = {"MatMul", "Gemm", "Conv", "Einsum", "MatMulInteger", "ConvInteger"}
_VIEWS = {"DequantizeLinear", "Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze"}
# Between convolutions everything stays int8: each step out of it and back would cost more.
_CONVOLUTIONS = ("Conv", "Gemm", "Add", "Relu", "Clip", "MaxPool", "GlobalAveragePool")


@dataclass(frozen=True)
class OnnxRuntime(Variant):
    """An ONNX graph with free batch and, for texts, length.

    ``int8-static`` fixes the ranges of activations on rows of `train`, which saves measuring them
    at each call: QDQ format, weights per channel (Jacob et al. 2018), attention, softmax and
    layer norm in fp32; of convolutional networks everything is int8.
    """

    runtime: ClassVar[str] = "onnxruntime"
    extra: ClassVar[str | None] = "onnx"

    def export(
        self, module: Classifier, example: Inputs, calibration: Sequence[Inputs], folder: Path
    ) -> None:
        path = folder / FILE
        _to_onnx(module, example, path)
        if self.precision == "fp32":
            return
        _name_weights(path)
        if self.precision == "int8-dynamic":
            _quantize(path)
        else:
            check_calibration(calibration)
            _calibrate(path, calibration, module.network.config.model_type in CONVOLUTIONAL)
        check_int8(*_int8_products(path))

    def load(self, folder: Path, *, device: str, threads: int) -> Predict:
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingExtraError("onnxruntime", "onnx") from error

        unusable = UnsupportedError(
            f"this onnxruntime cannot use device={device}; use device=cpu, or install "
            "onnxruntime-gpu and the CUDA libraries that it names."
        )
        provider, settings = _PROVIDERS.get(device, ("", {}))
        if provider not in onnxruntime.get_available_providers():
            raise unusable

        def session(threads: int) -> Predict:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            # Threads that wait for work spin, which is fast; here they give up soon: at 90 rows/s
            # the default burns 16 ms of CPU a row, this 6, at the same latency.
            options.add_session_config_entry("session.intra_op.spin_duration_us", "50")
            loaded = onnxruntime.InferenceSession(
                str(folder / FILE),
                options,
                providers=[(provider, settings)],
                disabled_optimizers=_NOT_FUSED if device == "cpu" else [],
            )
            if provider not in loaded.get_providers():  # it would compute on the CPU, and say so
                raise unusable  # in a warning alone

            def predict(inputs: Inputs) -> Logits:
                return np.asarray(loaded.run(["logits"], dict(inputs))[0], dtype=np.float32)

            return predict

        if device != "cpu":
            return session(threads)
        single = session(1)
        return Streams(session(threads) if threads > 1 else single, single, threads=threads)


def _to_onnx(module: Classifier, example: Inputs, path: Path) -> None:
    try:
        import onnx
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(error.name or "onnx", "onnx") from error
    import torch

    tensors = tuple(torch.from_numpy(array) for array in example.values())
    free = module.preprocessor.axes
    axes = {name: {at: axis.name for at, axis in free[name].items()} for name in example}
    # The TorchScript-based exporter takes 2 s where dynamo takes 20, and writes the graph that
    # ONNX Runtime's fusions know; they also expect attention as plain matrix products.
    attention = module.network.config._attn_implementation if _has_attention(module) else None
    if attention:
        module.network.set_attn_implementation("eager")
    try:
        with warnings.catch_warnings(), torch.inference_mode():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                module,
                tensors,
                str(path),
                input_names=list(example),
                output_names=["logits"],
                dynamic_axes={**axes, "logits": {0: "batch"}},
                opset_version=17,
                dynamo=False,
            )
    except (RuntimeError, ValueError) as error:
        raise VariantError(f"export to ONNX failed: {first_line(error)}") from error
    finally:
        if attention:
            module.network.set_attn_implementation(attention)
    onnx.checker.check_model(str(path))


def _has_attention(module: Classifier) -> bool:
    return hasattr(module.network.config, "num_attention_heads")


def _name_weights(path: Path) -> None:
    """Let products use initializers, the only weights that ONNX Runtime quantizes.

    PyTorch writes some as ``Constant`` nodes, and of weights that layers share, as ALBERT's do, an
    ``Identity`` each.
    """
    import onnx

    model = onnx.load(str(path))
    graph = model.graph
    weights, kept = {tensor.name for tensor in graph.initializer}, []
    same: dict[str, str] = {}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].HasField("t"):
            tensor = node.attribute[0].t
            tensor.name = node.output[0]
            graph.initializer.append(tensor)
            weights.add(tensor.name)
            continue
        node.input[:] = [same.get(name, name) for name in node.input]
        if node.op_type == "Identity" and node.input[0] in weights:
            same[node.output[0]] = node.input[0]  # it stays, for graphs within nodes
        kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)
    onnx.save(model, str(path))


def _int8_products(path: Path) -> tuple[int, int]:
    """How many products with weights have int8 weights, and how many there are."""
    import onnx

    graph = onnx.load(str(path)).graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    weights = []
    for node in graph.node:
        if node.op_type in _PRODUCTS:
            weights += [types[name] for name in node.input[:2] if name in types]
        elif node.op_type in _VIEWS and node.input[0] in types:
            types[node.output[0]] = types[node.input[0]]
    integers = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
    return sum(type_ in integers for type_ in weights), len(weights)


def _quantize(path: Path) -> None:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logging.getLogger().addFilter(_not_about_preprocessing)
    try:
        quantize_dynamic(
            str(path),
            str(path),
            weight_type=QuantType.QInt8,
            reduce_range=int8_saturates(),
            extra_options={"MatMulConstBOnly": True, "DefaultTensorType": onnx.TensorProto.FLOAT},
        )
    finally:
        logging.getLogger().removeFilter(_not_about_preprocessing)


class _Rows:
    """Calibration batches, as ONNX Runtime asks for them."""

    def __init__(self, calibration: Sequence[Inputs]) -> None:
        self._batches = iter(calibration)

    def get_next(self) -> dict[str, Any] | None:
        batch = next(self._batches, None)
        return None if batch is None else dict(batch)


def _calibrate(path: Path, calibration: Sequence[Inputs], convolutional: bool) -> None:
    from onnxruntime.quantization import QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    try:
        with tempfile.TemporaryDirectory() as scratch:
            prepared = str(Path(scratch) / FILE)
            # Its symbolic inference gives up on free lengths; types and ranks are all it takes.
            quant_pre_process(str(path), prepared, skip_symbolic_shape=True)
            quantize_static(
                prepared,
                str(path),
                _Rows(calibration),
                op_types_to_quantize=list(_CONVOLUTIONS if convolutional else _QUANTIZED),
                nodes_to_exclude=[] if convolutional else _without_weight(prepared),
                per_channel=True,
                reduce_range=int8_saturates(),
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                extra_options={
                    # The mean of the rows' extremes: a row's outlier widens no other's steps. But
                    # a bright image is no outlier, and cutting it off would cost more.
                    "CalibMovingAverage": not convolutional,
                    "OpTypesToExcludeOutputQuantization": (
                        [] if convolutional else list(_QUANTIZED)
                    ),
                },
            )
    except Exception as error:  # ONNX Runtime's own derive from Exception alone
        raise VariantError(f"ONNX Runtime: {first_line(error)}") from error


def _without_weight(path: str) -> list[str]:
    """Names of products and look-ups between activations alone, such as attention's."""
    import onnx

    graph = onnx.load(path).graph
    kept = onnx.TensorProto.FLOAT
    weights = {tensor.name for tensor in graph.initializer if tensor.data_type == kept}
    return [
        node.name
        for node in graph.node
        if node.op_type in _QUANTIZED and not weights & set(node.input)
    ]


def _not_about_preprocessing(record: logging.LogRecord) -> bool:
    return "pre-processing before quantization" not in record.getMessage()
