"""`root_cause` with real error texts of the libraries used for export and loading."""

from __future__ import annotations

import warnings
from pathlib import Path

import onnxruntime
import openvino
import pytest
import torch

from mlflow_pt_deploy.errors import VariantError, root_cause

OPENVINO = """Check 'false' failed at src/frontends/common_translators/src/unconverted_ops.cpp:151:
FrontEnd API failed with OpConversionFailure:
Model wasn't fully converted. Failed operations detailed log:
-- SequenceMark with a message:
This is OpenVINO internal type. Consumer: util::PtFrameworkNode
Axis -2 out of the tensor rank range [-1, 0].

Summary:
-- Conversion is failed for: SequenceMark, aten::cat
"""
NODE = """Exception from src/inference/src/cpp/infer_request.cpp:224:
Exception from src/plugins/intel_cpu/src/node.cpp:823:
[CPU] FullyConnected node with name 'aten::linear/Add' could not create a primitive descriptor.

"""
ORT = (
    "[ONNXRuntimeError] : 1 : FAIL : Non-zero status code returned while running Concat node. "
    "Name:'/network/Concat_92' Status Message: /onnxruntime_src/core/framework/op_kernel.cc:87 "
    "virtual OrtValue* onnxruntime::OpKernelContext::OutputMLValue(int, const TensorShape&) "
    "[ONNXRuntimeError] : 1 : FAIL : Shape mismatch attempting to re-use buffer. {1} != {2}.\n"
)
EXPORT = """Constraints violated (length)! For more information, run with TORCH_LOGS="+dynamic".
  - You marked length as dynamic but your code specialized it to be a constant (9).
  - You marked length as dynamic but your code specialized it to be a constant (9).
Suggested fixes:
  length = 9

The error above occurred when calling torch.export.export. If you would like to view some more
"""
TORCHSCRIPT = """The following operation failed in the TorchScript interpreter.
Traceback of TorchScript (most recent call last):
/home/me/.venv/lib/python3.11/site-packages/torch/nn/modules/linear.py(134): forward
/home/me/convert.py(74): <module>
RuntimeError: mat1 and mat2 shapes cannot be multiplied (1x5 and 2x2)
"""
WORKER = """Caught ValueError in worker 0.
Original Traceback (most recent call last):
  File "/home/me/x.py", line 3, in f
ValueError: three is odd
"""
SQLITE = """(sqlite3.OperationalError) unable to open database file
(Background on this error at: https://sqlalche.me/e/20/e3q8)"""
HUB = """We couldn't connect to 'https://huggingface.co' to load the files.
Check your internet connection.

Read more at 'https://huggingface.co/docs'."""
INDUCTOR = """backend='inductor' raised:
CppCompileError: C++ compile error

Command:
g++ /tmp/torchinductor_me/x.cpp

Output:
x.cpp:3: error"""
LIBRARY = (
    'Exception from src/inference/src/cpp/core.cpp:117:\nCannot load library "/home/me/.venv/lib/'
    'python3.11/site-packages/openvino/libs/libgpu.so": libOpenCL.so.1: No such file\n'
)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (OPENVINO, "Conversion is failed for: SequenceMark, aten::cat"),
        (
            NODE,
            "[CPU] FullyConnected node with name 'aten::linear/Add' could not create a primitive "
            "descriptor.",
        ),
        (
            "Exception from src/plugins/intel_cpu/src/graph.cpp:1628:\nNode a/b of type Gather\n"
            "Check 'index < size' failed at src/nodes/gather.cpp:116:\nindices exceed data size\n",
            "indices exceed data size",
        ),
        (ORT, "Shape mismatch attempting to re-use buffer. {1} != {2}."),
        (
            EXPORT,
            "Constraints violated (length)! You marked length as dynamic but your code specialized "
            "it to be a constant (9).",
        ),
        (TORCHSCRIPT, "RuntimeError: mat1 and mat2 shapes cannot be multiplied (1x5 and 2x2)"),
        (WORKER, "ValueError: three is odd"),
        (SQLITE, "(sqlite3.OperationalError) unable to open database file"),
        (
            HUB,
            "We couldn't connect to 'https://huggingface.co' to load the files. Check your "
            "internet connection.",
        ),
        (INDUCTOR, "CppCompileError: C++ compile error"),
        (LIBRARY, 'Cannot load library "libgpu.so": libOpenCL.so.1: No such file'),
        ("failed:\n\n", "failed"),
        ("\n  two\twords \n", "two words"),
    ],
)
def test_root_cause(text: str, cause: str) -> None:
    assert root_cause(RuntimeError(text)) == cause


def test_error_without_text_uses_its_cause() -> None:
    outer = VariantError()
    outer.__cause__ = ValueError("three is odd")
    assert root_cause(outer) == "three is odd"
    assert root_cause(ValueError()) == "ValueError"
    assert root_cause(KeyError("pad_id")) == "KeyError: 'pad_id'"


def test_long_text_is_shortened_in_the_middle() -> None:
    found = root_cause(ValueError("first " + "word " * 200 + "(caused by: connection refused)"))
    assert len(found) <= 310
    assert found.startswith("first word word")
    assert " word ... word " in found
    assert found.endswith("(caused by: connection refused)")
    assert len(root_cause(ValueError("x" * 5000))) <= 310


def test_os_errors_keep_the_whole_path() -> None:
    with pytest.raises(OSError, match="No such file") as caught:
        Path("/no/such/model.onnx").read_bytes()
    assert root_cause(caught.value) == "[Errno 2] No such file or directory: '/no/such/model.onnx'"


def test_errors_of_the_installed_libraries(tmp_path: Path) -> None:
    garbage = tmp_path / "model.onnx"
    garbage.write_bytes(b"\x08garbage")
    with pytest.raises(Exception, match="Protobuf") as caught:
        onnxruntime.InferenceSession(str(garbage))
    assert root_cause(caught.value).startswith("Load model from model.onnx failed:")
    with pytest.raises(Exception, match="Unable to read") as caught:
        openvino.Core().read_model(str(garbage.rename(tmp_path / "model.xml")))
    assert "src/" in str(caught.value)
    assert root_cause(caught.value).startswith('Unable to read the model: "model.xml" Please check')


class Failing(torch.nn.Module):
    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("three is odd")


def test_wrapped_error_without_its_wrapper() -> None:
    with pytest.raises(RuntimeError) as caught, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        openvino.convert_model(Failing(), example_input=torch.zeros(1, 2))
    assert str(caught.value).startswith("Couldn't get TorchScript module by tracing.")
    assert root_cause(caught.value) == "three is odd"
