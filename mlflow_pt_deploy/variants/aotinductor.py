"""AOTInductor: the exported graph compiled by g++ into a library, no Python between kernels."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from mlflow_pt_deploy.errors import UnsupportedError, VariantError
from mlflow_pt_deploy.hardware import cpu_flags
from mlflow_pt_deploy.variants.base import Inputs, Predict, Variant
from mlflow_pt_deploy.variants.eager import torch_predict

if TYPE_CHECKING:
    from mlflow_pt_deploy.models import Classifier

_FILE = "model.pt2"
# Inductor compiles with -march=native, so the library may use all of these that the host has.
_COMPILED_FOR = frozenset({"avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16"})


@dataclass(frozen=True)
class AOTInductor(Variant):
    """``torch.export`` with free batch and length, then Inductor's ahead-of-time package."""

    runtime: ClassVar[str] = "aotinductor"
    compiles: ClassVar[bool] = True
    carries_code: ClassVar[bool] = True

    def unsupported(self) -> str | None:
        if shutil.which(os.environ.get("CXX", "g++")) is None:
            return "skipped: no C++ compiler; install g++ (or set CXX)"
        return super().unsupported()

    def required_cpu_flags(self) -> frozenset[str]:
        return _COMPILED_FOR & cpu_flags()

    def export(
        self, module: Classifier, example: Inputs, calibration: Sequence[Inputs], folder: Path
    ) -> None:
        import copy

        import torch
        from torch._inductor import aoti_compile_and_package

        source = copy.deepcopy(module).bfloat16() if self.precision == "bf16" else module
        tensors = tuple(torch.from_numpy(example[name]) for name in ("input_ids", "attention_mask"))
        axes = {
            0: torch.export.Dim("batch", min=1, max=65536),
            1: torch.export.Dim("length", min=2, max=module.preprocessor.max_length),
        }
        try:
            with torch.no_grad():
                program = torch.export.export(
                    source, tensors, dynamic_shapes={"input_ids": axes, "attention_mask": axes}
                )
                aoti_compile_and_package(program, package_path=str(folder / _FILE))
        except Exception as error:  # torch.export and Inductor raise a dozen unrelated kinds
            raise VariantError(f"AOTInductor: {type(error).__name__}: {_first(error)}") from error

    def load(self, folder: Path, *, device: str, threads: int) -> Predict:
        import torch
        from torch._inductor import aoti_load_package

        if device != "cpu":
            raise UnsupportedError("this package was compiled for the CPU; use device=cpu.")
        torch.set_num_threads(threads)
        return torch_predict(aoti_load_package(str(folder / _FILE)), device)


def _first(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "no message")
