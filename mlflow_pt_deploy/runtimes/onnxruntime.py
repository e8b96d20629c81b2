"""ONNX Runtime: fp32, dynamic int8, int8 calibrated on rows of train; on a GPU fp32 and fp16."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from mlflow_pt_deploy.errors import MissingExtraError, VariantError, root_cause
from mlflow_pt_deploy.model_types import CONVOLUTIONAL
from mlflow_pt_deploy.runtimes.base import (
    Inputs,
    Predict,
    Variant,
    check_calibration,
    int8_saturates,
)
from mlflow_pt_deploy.runtimes.export_check import check_int8
from mlflow_pt_deploy.runtimes.onnx_gpu import (
    CUDA_PROVIDER,
    cuda_provider,
    gpu_session,
    no_provider,
    run_session,
)
from mlflow_pt_deploy.runtimes.streams import Streams
from mlflow_pt_deploy.system.device import CPU

if TYPE_CHECKING:
    from mlflow_pt_deploy.models import Classifier

FILE = "model.onnx"
# On the CPU the fused kernels of these two are slower than the separate operators: without them a
# text takes 10 to 17 % less time in int8 and 9 to 13 % in fp32.
_DISABLED_FUSIONS = ["SkipLayerNormFusion", "BiasGeluFusion"]
_QUANTIZED_OPS = ("MatMul", "Gemm", "Gather")
_PRODUCT_OPS = {"MatMul", "Gemm", "Conv", "Einsum", "MatMulInteger", "ConvInteger"}
_VIEW_OPS = {"DequantizeLinear", "Identity", "Transpose", "Reshape", "Squeeze", "Unsqueeze"}
# Everything between convolutions stays int8: conversions to fp32 and back would cost more.
_CONVOLUTIONAL_OPS = ("Conv", "Gemm", "Add", "Relu", "Clip", "MaxPool", "GlobalAveragePool")


@dataclass(frozen=True)
class OnnxRuntime(Variant):
    """ONNX graph with a dynamic batch axis and, for texts, a dynamic length.

    ``int8-static`` calibrates the ranges of activations on rows of `train`: QDQ format, weights per
    channel (Jacob et al. 2018), attention, softmax and layer norm in fp32. Convolutional networks
    are quantized completely. ``fp16`` keeps the inputs and the logits in their types.
    """

    runtime: ClassVar[str] = "onnxruntime"
    extra: ClassVar[str | None] = "onnx"
    gpu_precisions: ClassVar[frozenset[str]] = frozenset({"fp32", "fp16"})
    gpu_provider: ClassVar[str] = CUDA_PROVIDER

    def unsupported(self) -> str | None:
        reason = super().unsupported()
        return reason if reason or self.device == CPU else no_provider(self.gpu_provider)

    def export(
        self, module: Classifier, example: Inputs, calibration: Sequence[Inputs], folder: Path
    ) -> None:
        path = folder / FILE
        _to_onnx(module, example, path)
        if self.precision == "fp32":
            return
        if self.precision == "fp16":
            _to_fp16(path)
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

        self.check_device_kind(device)
        if device != CPU:
            return gpu_session(folder / FILE, [cuda_provider(device)], threads, device)

        def session(threads: int) -> Predict:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = threads
            # Idle threads spin for a short time only: at 90 rows/s a row takes 6 ms of CPU time
            # instead of 16 with the default, at the same latency.
            options.add_session_config_entry("session.intra_op.spin_duration_us", "50")
            loaded = onnxruntime.InferenceSession(
                str(folder / FILE),
                options,
                providers=["CPUExecutionProvider"],
                disabled_optimizers=_DISABLED_FUSIONS,
            )
            return partial(run_session, loaded)

        single = session(1)
        return Streams(session(threads) if threads > 1 else single, single, threads=threads)


def _to_fp16(path: Path) -> None:
    """Convert the graph in place; inputs and logits keep their types."""
    import onnx
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of weights too small for fp16, which become 0
            model = convert_float_to_float16(onnx.load(str(path)), keep_io_types=True)
        OnnxModel(model).topological_sort()  # the converter appends the casts of the inputs
        onnx.checker.check_model(model)
    except Exception as error:  # the converter and onnx raise many types
        raise VariantError(f"conversion to fp16 failed: {root_cause(error)}") from error
    onnx.save(model, str(path))


def _to_onnx(module: Classifier, example: Inputs, path: Path) -> None:
    try:
        import onnx
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(error.name or "onnx", "onnx") from error
    import torch

    tensors = tuple(torch.from_numpy(array) for array in example.values())
    dynamic = module.preprocessor.axes
    axes = {name: {dim: axis.name for dim, axis in dynamic[name].items()} for name in example}
    # The TorchScript-based exporter takes 2 s instead of 20 s with dynamo, and its graph matches
    # ONNX Runtime's fusions, which also expect attention as plain matrix products.
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
        raise VariantError(f"export to ONNX failed: {root_cause(error)}") from error
    finally:
        if attention:
            module.network.set_attn_implementation(attention)
    onnx.checker.check_model(str(path))


def _has_attention(module: Classifier) -> bool:
    return hasattr(module.network.config, "num_attention_heads")


def _name_weights(path: Path) -> None:
    """Convert all weights to initializers, the only weights that ONNX Runtime quantizes.

    PyTorch exports some weights as ``Constant`` nodes, and shared weights, as in ALBERT, as
    ``Identity`` nodes.
    """
    import onnx

    model = onnx.load(str(path))
    graph = model.graph
    weights, kept = {tensor.name for tensor in graph.initializer}, []
    aliases: dict[str, str] = {}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].HasField("t"):
            tensor = node.attribute[0].t
            tensor.name = node.output[0]
            graph.initializer.append(tensor)
            weights.add(tensor.name)
            continue
        node.input[:] = [aliases.get(name, name) for name in node.input]
        if node.op_type == "Identity" and node.input[0] in weights:
            aliases[node.output[0]] = node.input[0]  # the node stays, for subgraphs
        kept.append(node)
    del graph.node[:]
    graph.node.extend(kept)
    onnx.save(model, str(path))


def _int8_products(path: Path) -> tuple[int, int]:
    """Number of products with int8 weights, and of all products with weights."""
    import onnx

    graph = onnx.load(str(path)).graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    weights = []
    for node in graph.node:
        if node.op_type in _PRODUCT_OPS:
            weights += [types[name] for name in node.input[:2] if name in types]
        elif node.op_type in _VIEW_OPS and node.input[0] in types:
            types[node.output[0]] = types[node.input[0]]
    integers = (onnx.TensorProto.INT8, onnx.TensorProto.UINT8)
    return sum(type_ in integers for type_ in weights), len(weights)


def _quantize(path: Path) -> None:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logging.getLogger().addFilter(_drop_preprocessing_hint)
    try:
        quantize_dynamic(
            str(path),
            str(path),
            weight_type=QuantType.QInt8,
            reduce_range=int8_saturates(),
            extra_options={"MatMulConstBOnly": True, "DefaultTensorType": onnx.TensorProto.FLOAT},
        )
    finally:
        logging.getLogger().removeFilter(_drop_preprocessing_hint)


class _CalibrationReader:
    """Iterates over calibration batches with ONNX Runtime's reader interface."""

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
            # Symbolic shape inference fails for dynamic lengths and is not needed.
            quant_pre_process(str(path), prepared, skip_symbolic_shape=True)
            quantize_static(
                prepared,
                str(path),
                _CalibrationReader(calibration),
                op_types_to_quantize=list(_CONVOLUTIONAL_OPS if convolutional else _QUANTIZED_OPS),
                nodes_to_exclude=[] if convolutional else _without_weight(prepared),
                per_channel=True,
                reduce_range=int8_saturates(),
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                extra_options={
                    # The mean of the rows' extremes limits the effect of outliers in texts. For
                    # images it would clip bright ones.
                    "CalibMovingAverage": not convolutional,
                    "OpTypesToExcludeOutputQuantization": (
                        [] if convolutional else list(_QUANTIZED_OPS)
                    ),
                },
            )
    except Exception as error:  # ONNX Runtime's exceptions derive from Exception only
        raise VariantError(f"ONNX Runtime: {root_cause(error)}") from error


def _without_weight(path: str) -> list[str]:
    """Names of products and lookups without weights, such as those of attention."""
    import onnx

    graph = onnx.load(path).graph
    float_type = onnx.TensorProto.FLOAT
    weights = {tensor.name for tensor in graph.initializer if tensor.data_type == float_type}
    return [
        node.name
        for node in graph.node
        if node.op_type in _QUANTIZED_OPS and not weights & set(node.input)
    ]


def _drop_preprocessing_hint(record: logging.LogRecord) -> bool:
    return "pre-processing before quantization" not in record.getMessage()
