"""Portable: one model for hosts with a GPU and hosts without, as two complete variants.

They are in the subfolders ``cpu`` and ``cuda``. Only the one that the host can use is loaded, so
only its libraries are needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from mlflow_pt_deploy.errors import VariantError
from mlflow_pt_deploy.runtimes.base import Inputs, Predict, Variant
from mlflow_pt_deploy.system.device import AUTO, CPU, CUDA, has_cuda, has_driver

if TYPE_CHECKING:
    from mlflow_pt_deploy.models import Classifier


@dataclass(frozen=True)
class Portable(Variant):
    """A variant for the CPU and one for a GPU, of the same model.

    Its figures are those of the GPU.

    Attributes:
        cpu, cuda: Names of the two variants.
        trusted: True if either variant carries code.
    """

    precision: str = "mixed"
    device: str = field(default=CUDA, kw_only=True)
    cpu: str = ""
    cuda: str = ""
    trusted: bool = False

    runtime: ClassVar[str] = "portable"
    stages: ClassVar[tuple[str, ...]] = (CPU, CUDA)

    @property
    def allows_code(self) -> bool:
        return self.trusted

    def export(
        self, module: Classifier, example: Inputs, calibration: Sequence[Inputs], folder: Path
    ) -> None:
        raise VariantError("a portable variant is written from two others; use write_portable.")

    def load(self, folder: Path, *, device: str, threads: int) -> Predict:
        raise VariantError("a portable variant is loaded by one of its stages; use load_variant.")


def usable_device(device: str) -> str:
    """The device on which a portable variant runs on this host.

    Args:
        device: ``auto``: ``cuda`` if PyTorch finds a GPU, else ``cpu``; others stay. Without a
            driver PyTorch is not imported to ask.
    """
    if device != AUTO:
        return device
    return CUDA if has_driver() and has_cuda() else CPU
