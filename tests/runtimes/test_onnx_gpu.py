"""ONNX Runtime and TensorRT on a GPU: what can be told without one, and the fp16 file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mlflow_pt_deploy.artifacts import load_variant
from mlflow_pt_deploy.data import Splits
from mlflow_pt_deploy.errors import UnsupportedError
from mlflow_pt_deploy.models import load_classifier
from mlflow_pt_deploy.runtimes.onnx_gpu import CUDA_PROVIDER, cuda_provider, no_provider
from mlflow_pt_deploy.runtimes.onnxruntime import FILE, OnnxRuntime
from mlflow_pt_deploy.runtimes.tensorrt import RowSlices, TensorRT, shape_profiles
from mlflow_pt_deploy.training.inference import predict_logits

onnx = pytest.importorskip("onnx", reason="needs the extra onnx")
HAS_CUDA = no_provider(CUDA_PROVIDER) is None


@pytest.mark.parametrize("model", ["teacher", "resnet"])
def test_fp16_file_on_the_cpu(
    exported: Callable[..., Path], tiny_models: dict[str, tuple[Path, Splits]], model: str
) -> None:
    folder = exported(OnnxRuntime("fp16"), model)
    graph = onnx.load(str(folder / FILE)).graph
    types = [tensor.data_type for tensor in graph.initializer if len(tensor.dims) > 1]
    assert types.count(onnx.TensorProto.FLOAT16) > 0.9 * len(types)
    assert [out.type.tensor_type.elem_type for out in graph.output] == [onnx.TensorProto.FLOAT]
    loaded = load_variant(folder, threads=1)
    source, splits = tiny_models[model]
    rows = splits.test.rows
    error = loaded.logits(rows) - predict_logits(load_classifier(str(source)), rows)
    assert 1e-5 < np.abs(error).max() < 0.05


@pytest.mark.skipif(HAS_CUDA, reason="this onnxruntime has CUDA")
@pytest.mark.parametrize("kind", [OnnxRuntime, TensorRT])
def test_without_the_provider(
    kind: type[OnnxRuntime], exported: Callable[..., Path], tmp_path: Path
) -> None:
    assert no_provider(kind.gpu_provider) == (
        f"skipped: the installed onnxruntime has no {kind.gpu_provider}; install onnxruntime-gpu"
    )
    folder = exported(OnnxRuntime("fp16"))
    with pytest.raises(UnsupportedError, match=r"device=cuda:1; use device=cpu, or install"):
        kind("fp16", device="cuda").load(folder, device="cuda:1", threads=1)


def test_int8_runs_on_the_cpu_only(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="onnxruntime-int8-static runs on the CPU only"):
        OnnxRuntime("int8-static").load(tmp_path, device="cuda", threads=1)


def test_number_of_the_device() -> None:
    assert cuda_provider("cuda")[1]["device_id"] == "0"
    assert cuda_provider("cuda:3")[1]["device_id"] == "3"


def test_engines_have_profiles_for_the_shapes_of_the_model(
    tiny_model: Path, tiny_resnet: Path
) -> None:
    assert shape_profiles(load_classifier(str(tiny_model)).preprocessor) == {
        "trt_profile_min_shapes": "input_ids:1x2,attention_mask:1x2",
        "trt_profile_opt_shapes": "input_ids:8x32,attention_mask:8x32",
        "trt_profile_max_shapes": "input_ids:256x128,attention_mask:256x128",
    }
    images = shape_profiles(load_classifier(str(tiny_resnet)).preprocessor)
    assert images["trt_profile_max_shapes"] == "pixel_values:256x3x32x32"


def test_rows_beyond_the_profile_are_another_call() -> None:
    sizes = []

    def predict(inputs):
        sizes.append(len(inputs["rows"]))
        return inputs["rows"] * 2

    rows = np.arange(10, dtype=np.float32)[:, None]
    np.testing.assert_array_equal(RowSlices(predict, 4)({"rows": rows}), rows * 2)
    assert sizes == [4, 4, 2]
    sizes.clear()
    RowSlices(predict, 4)({"rows": rows[:4]})
    assert sizes == [4]


def test_tensorrt_writes_the_files_of_onnxruntime(exported: Callable[..., Path]) -> None:
    folder = exported(TensorRT("fp16"))
    assert (folder / FILE).is_file()
    assert load_variant(folder, device="cpu", threads=1).logits(["card"]).shape == (1, 3)
