"""The ways to run a model on a GPU that `gpu.py` compares.

What is built by the product is loaded by `load_variant`, as a server would.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_packed import LONGEST, Encoded, PackedBert, PackedGraphs, pack

from mlflow_pt_deploy.artifacts import load_variant, write_variant
from mlflow_pt_deploy.errors import VariantError
from mlflow_pt_deploy.models import TextClassifier, load_classifier
from mlflow_pt_deploy.runtimes.aotinductor import AOTInductor, load_package
from mlflow_pt_deploy.runtimes.base import Inputs, Logits, Variant
from mlflow_pt_deploy.runtimes.cuda_graphs import LENGTHS, CudaGraphs
from mlflow_pt_deploy.runtimes.eager import Eager, in_precision
from mlflow_pt_deploy.runtimes.torchscript import TorchScript

GOLDEN_ROWS = 4


@dataclass(frozen=True)
class Form:
    """A loaded model.

    Attributes:
        predict: Encoded rows to logits, copies included.
        module: Takes tensors on the device; returns logits on the device.
        arrays: Encoded rows to the arrays that `module` takes as tensors.
    """

    predict: Callable[[Encoded], Logits]
    module: Callable[..., torch.Tensor]
    arrays: Callable[[Encoded], Inputs]


@dataclass(frozen=True)
class Source:
    """A model to be run.

    Attributes:
        classifier: In eager fp32, on the CPU.
        rows: Texts for examples and golden rows.
        folder: Where variants are written.
        device: ``cuda`` or ``cpu``.
        failed: Why a variant could not be built, by its name.
    """

    classifier: TextClassifier
    rows: Sequence[str]
    folder: Path
    device: str
    failed: dict[str, str] = field(default_factory=dict)

    def written(self, variant: Variant) -> Path:
        """The folder of a variant; it is exported when it is first asked for."""
        target = self.folder / variant.name("model")
        if not target.exists():
            if reason := self.failed.get(target.name):
                raise VariantError(reason)
            write(variant, self.classifier, self.rows, target)
        return target


def write(variant: Variant, classifier: TextClassifier, rows: Sequence[str], target: Path) -> None:
    """Export a variant as ``pt-deploy optimize`` would."""
    by_length = sorted(rows, key=len)
    example = classifier.preprocessor([by_length[0], by_length[len(rows) // 2], by_length[-1]])
    write_variant(
        variant,
        classifier,
        target,
        model="model",
        example=example,
        golden_rows=rows[:GOLDEN_ROWS],
    )


class Build:
    """An AOTInductor package being compiled in a process of its own, which may crash."""

    def __init__(self, source: Source, variant: AOTInductor) -> None:
        self.target = source.folder / variant.name("model")
        self._log = source.folder / f"{self.target.name}.log"
        example = source.folder / "example.json"
        example.write_text(json.dumps(list(source.rows[:64])), encoding="utf8")
        paths = (source.written(Eager()), example, self.target)
        command = [
            sys.executable,
            "-X",
            "faulthandler",
            __file__,
            variant.precision,
            variant.device,
        ]
        # a few packages are compiled at once, and each would start a process per core
        environment = {"TORCHINDUCTOR_COMPILE_THREADS": "4", **os.environ}
        with self._log.open("w", encoding="utf8") as log:
            self._process = subprocess.Popen(
                [*command, *map(str, paths)], env=environment, stdout=log, stderr=log
            )

    def wait(self, seconds: float) -> str:
        """Why it failed; empty if it did not."""
        try:
            code = self._process.wait(max(1, seconds))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            return "its compilation was stopped: it took too long"
        log = self._log.read_text(encoding="utf8")
        return f"exit code {code}: {log[-1500:]}" if code else ""


def _build(precision: str, device: str, eager: str, example: str, target: str) -> None:
    """What the process of a `Build` does."""
    warnings.simplefilter("ignore")
    classifier = load_classifier(eager)
    assert isinstance(classifier, TextClassifier)
    rows = json.loads(Path(example).read_text(encoding="utf8"))
    write(AOTInductor(precision, device=device), classifier, rows, Path(target))


def _product(source: Source, variant: Variant) -> Form:
    folder = source.written(variant)
    loaded = load_variant(folder, device=source.device, allow_code=True)
    if isinstance(variant, AOTInductor):
        module = load_package(folder, source.device)
    else:  # TorchScript's function is not reached from here; its kernels are eager's
        module = _eager(source, variant.precision)
    collate = source.classifier.preprocessor.collate
    return Form(lambda encoded: loaded.predict(collate(encoded)), module, collate)


def _eager(source: Source, precision: str) -> torch.nn.Module:
    return in_precision(copy.deepcopy(source.classifier), precision).to(source.device)


def _tf32(source: Source) -> Form:
    form = _product(source, Eager())

    def predict(encoded: Encoded) -> Logits:
        with _allow_tf32():
            return form.predict(encoded)

    def module(*tensors: torch.Tensor) -> torch.Tensor:
        with _allow_tf32():
            return form.module(*tensors)

    return Form(predict, module, form.arrays)


@contextmanager
def _allow_tf32() -> Iterator[None]:
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


def _graphs(source: Source, module: Callable[..., torch.Tensor]) -> Form:
    preprocessor = source.classifier.preprocessor
    lengths = [length for length in LENGTHS if length < preprocessor.max_length]
    graphs = CudaGraphs(
        module,
        preprocessor(source.rows[:1]),
        device=source.device,
        lengths=[*lengths, preprocessor.max_length],
    )
    return Form(lambda encoded: graphs(preprocessor.collate(encoded)), module, preprocessor.collate)


def _eager_graphs(source: Source, precision: str) -> Form:
    return _graphs(source, _eager(source, precision))


def package(source: Source) -> AOTInductor:
    """The package that is measured."""
    return AOTInductor("bf16", device=source.device)


def _package_graphs(source: Source) -> Form:
    return _graphs(source, load_package(source.written(package(source)), source.device))


def _packed(
    source: Source,
    precision: str,
    *,
    compiled: bool = False,
    quantized: str = "",
    graphs: bool = True,
) -> Form:
    module: Any = PackedBert(copy.deepcopy(source.classifier.network))
    module = in_precision(module, precision).to(source.device).eval()
    if quantized:
        _quantize(module, quantized)
    if compiled:
        module = torch.compile(module, dynamic=True)
    device = source.device

    def plain(encoded: Encoded) -> Logits:
        arrays = pack(encoded, 0, 2)
        tensors = [torch.from_numpy(array) for array in arrays.values()]
        if device != "cpu":
            tensors = [tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors]
        with torch.inference_mode():
            logits = module(*tensors, longest=max(map(len, encoded)))
        found: Logits = logits.float().cpu().numpy()[: len(encoded)]
        return found

    predict = PackedGraphs(module, device) if graphs else plain
    return Form(predict, partial(module, longest=LONGEST[2]), lambda encoded: pack(encoded, 0, 2))


def _quantize(module: torch.nn.Module, kind: str) -> None:
    """Quantize the encoder's linear layers by torchao: weights ahead, activations as they come."""
    from torchao import quantization

    if kind == "fp8":
        config = quantization.Float8DynamicActivationFloat8WeightConfig(
            granularity=quantization.PerRow()
        )
    else:
        config = quantization.Int8DynamicActivationInt8WeightConfig()
    quantization.quantize_(
        module, config, lambda layer, name: isinstance(layer, torch.nn.Linear) and "layers" in name
    )


BASELINE = "eager fp32"
# The forms for which packages are compiled, in their order.
PACKAGES = ("aotinductor bf16", "aotinductor bf16 + graphs")
# What is built in seconds comes first: where time runs out, the last ones are not run.
FORMS: Mapping[str, Callable[[Source], Form]] = {
    BASELINE: lambda source: _product(source, Eager()),
    "eager fp32, TF32 allowed": _tf32,
    "eager fp16": lambda source: _product(source, Eager("fp16")),
    "eager bf16": lambda source: _product(source, Eager("bf16")),
    "torchscript fp32": lambda source: _product(source, TorchScript()),
    "eager fp32 + graphs": lambda source: _eager_graphs(source, "fp32"),
    "eager fp16 + graphs": lambda source: _eager_graphs(source, "fp16"),
    "eager bf16 + graphs": lambda source: _eager_graphs(source, "bf16"),
    "packed bf16": lambda source: _packed(source, "bf16", graphs=False),
    "packed fp16 + graphs": lambda source: _packed(source, "fp16"),
    "packed bf16 + graphs": lambda source: _packed(source, "bf16"),
    "packed, compiled bf16 + graphs": lambda source: _packed(source, "bf16", compiled=True),
    PACKAGES[0]: lambda source: _product(source, package(source)),
    PACKAGES[1]: _package_graphs,
    "packed, compiled fp8 + graphs": lambda source: _packed(
        source, "bf16", compiled=True, quantized="fp8"
    ),
    "packed, compiled int8 + graphs": lambda source: _packed(
        source, "bf16", compiled=True, quantized="int8"
    ),
}


def labels(form: Form, encoded: Encoded) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Index of the largest logit of each row."""
    found: np.ndarray[Any, np.dtype[np.int64]] = form.predict(encoded).argmax(1)
    return found


if __name__ == "__main__":
    _build(*sys.argv[1:])
