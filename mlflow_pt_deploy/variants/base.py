"""The one interface that every runtime implements.

Knows nothing of training, of measuring or of MLflow.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from mlflow_pt_deploy.errors import VariantError
from mlflow_pt_deploy.hardware import cpu_flags

if TYPE_CHECKING:
    from mlflow_pt_deploy.models import Classifier

Inputs = Mapping[str, npt.NDArray[Any]]
"""Named arrays, batch first, in the order of the model's arguments."""

Logits = npt.NDArray[np.float32]
Predict = Callable[[Inputs], Logits]
"""Named inputs, batch first, to logits: float32 (batch, classes)."""

BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
VNNI_FLAGS = frozenset({"avx512_vnni", "avx_vnni"})
MIN_CALIBRATION_ROWS = 16
CONVOLUTIONAL = frozenset(
    {
        *("bit", "convnext", "convnextv2", "efficientnet", "hgnet_v2", "mobilenet_v1"),
        *("mobilenet_v2", "poolformer", "pp_lcnet", "regnet", "resnet", "textnet"),
    }
)
"""`model_type` of networks that consist of convolutions."""


def pads_rows(predict: Predict) -> bool:
    """Whether a row costs more beside a longer one; what knows better has an attribute `pads`."""
    return bool(getattr(predict, "pads", True))


def tokens_computed(predict: Predict, otherwise: int) -> int:
    """Tokens of its last batch, padding included; what knows has an attribute `tokens`."""
    tokens = getattr(predict, "tokens", None)
    return otherwise if tokens is None else int(tokens)


def streams_of(predict: Predict) -> tuple[Predict, int]:
    """What computes a batch with one thread, and how many may at once; see `Streams`."""
    return getattr(predict, "single", predict), int(getattr(predict, "threads", 1))


def no_native_bf16() -> str | None:
    """Why bf16 is pointless on this processor, or None where it is not."""
    if cpu_flags() & BF16_FLAGS:
        return None
    return "skipped: this processor has no bf16 instructions (avx512_bf16 or amx_bf16)"


def confidence(logits: Logits) -> npt.NDArray[np.float32]:
    """Largest softmax probability of each row, float32 (batch,)."""
    sure: npt.NDArray[np.float32] = 1 / np.exp(logits - logits.max(1, keepdims=True)).sum(1)
    return sure


def int8_saturates() -> bool:
    """Whether sums of 8-bit products overflow on this processor, where 7-bit weights do not.

    Without VNNI two products of uint8 and int8 are added in 16 bits.
    """
    return not cpu_flags() & VNNI_FLAGS


def check_calibration(calibration: Sequence[Inputs]) -> None:
    """Refuse to fix the ranges of activations on a handful of rows.

    Raises:
        VariantError: There are fewer than `MIN_CALIBRATION_ROWS`.
    """
    rows = sum(len(array) for batch in calibration for array in list(batch.values())[:1])
    if rows < MIN_CALIBRATION_ROWS:
        raise VariantError(
            f"static int8 needs at least {MIN_CALIBRATION_ROWS} rows of train to calibrate, "
            f"and got {rows}. Give more rows, or use dynamic int8."
        )


@dataclass(frozen=True)
class Variant(ABC):
    """A way to run a model: a runtime with its options.

    A subclass is a frozen dataclass of its own options; the object is its own record and is
    written into the manifest as it is.

    Attributes:
        precision: ``fp32``, ``bf16``, ``fp16``, ``int8-dynamic``, ``int8-static`` (calibrated) or
            ``int8-accuracy`` (calibrated, and held to the fp32 model's answers).
        runtime: What executes the model; the middle part of the variant's name.
        extra: The extra of this distribution that the runtime needs, if any.
        compiles: True where an export takes a compiler's time; such exports begin first.
        carries_code: True where the file holds a program and not only weights and a graph of
            known operators; such a file is loaded only when somebody vouches for its digest.
    """

    precision: str = "fp32"

    runtime: ClassVar[str]
    extra: ClassVar[str | None] = None
    compiles: ClassVar[bool] = False
    carries_code: ClassVar[bool] = False

    def name(self, model: str) -> str:
        """``<model>-<runtime>-<precision>``, e.g. ``student-openvino-fp32``."""
        return f"{model}-{self.runtime}-{self.precision}"

    def unsupported(self) -> str | None:
        """Why this machine should not build the variant, or None where it can.

        A missing library is not reported here: `export` and `load` raise `MissingExtraError`.
        """
        return no_native_bf16() if self.precision == "bf16" else None

    def required_cpu_flags(self) -> frozenset[str]:
        """Instruction sets that the exported files cannot run without."""
        return frozenset()

    def export_device(self) -> str:
        """Device that the exported files are made for and checked on."""
        return "cpu"

    @abstractmethod
    def export(
        self, module: Classifier, example: Inputs, calibration: Sequence[Inputs], folder: Path
    ) -> None:
        """Write the native files into an existing, empty folder.

        Args:
            module: The model in eager fp32, in evaluation mode, on the CPU.
            example: A batch of more than one row, texts of mixed lengths, for tracing.
            calibration: Batches of one row from `train`, for static quantization.
            folder: Where to write; the caller moves it into place when all is there.

        Raises:
            MissingExtraError: The runtime's library is not installed.
            VariantError: The model cannot be expressed in this runtime.
        """

    @abstractmethod
    def load(self, folder: Path, *, device: str, threads: int) -> Predict:
        """Read what `export` wrote.

        Args:
            folder: The variant's folder, digests already verified.
            device: ``cpu``, or ``cuda`` where the runtime can.
            threads: Threads that one call may use.

        Raises:
            MissingExtraError: The runtime's library is not installed.
            UnsupportedError: The runtime cannot use the device.
        """
