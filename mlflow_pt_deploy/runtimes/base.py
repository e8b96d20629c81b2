"""Interface of the runtimes: `Variant` exports a model and loads it as a `Predict` callable."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from mlflow_pt_deploy.errors import UnsupportedError, VariantError
from mlflow_pt_deploy.runtimes.gpu_requirements import no_gpu_for
from mlflow_pt_deploy.system.device import CPU
from mlflow_pt_deploy.system.hardware import cpu_flags

if TYPE_CHECKING:
    from mlflow_pt_deploy.models import Classifier

Inputs = Mapping[str, npt.NDArray[Any]]
"""Named arrays, batch first, in the order of the model's arguments."""

Logits = npt.NDArray[np.float32]
Predict = Callable[[Inputs], Logits]
"""Maps named inputs, batch first, to logits, float32 (batch, classes)."""

BF16_FLAGS = frozenset({"avx512_bf16", "amx_bf16"})
VNNI_FLAGS = frozenset({"avx512_vnni", "avx_vnni"})
MIN_CALIBRATION_ROWS = 16


def pads_rows(predict: Predict) -> bool:
    """Whether the rows of a batch are padded to its longest row; a predictor may set `pads`."""
    return bool(getattr(predict, "pads", True))


def tokens_computed(predict: Predict, default: int) -> int:
    """Tokens of the last batch with padding; `default` for a predictor without `tokens`."""
    tokens = getattr(predict, "tokens", None)
    return default if tokens is None else int(tokens)


def streams_of(predict: Predict) -> tuple[Predict, int]:
    """Single-threaded predictor and the number of concurrent calls it supports, see `Streams`."""
    return getattr(predict, "single", predict), int(getattr(predict, "threads", 1))


def remote_calls(predict: Predict) -> int:
    """Concurrent calls that a predictor takes whose model is in another process.

    0: it computes in this one. A remote predictor sets `remote_calls`; it waits for the other
    process, so it must never run on an event loop.
    """
    return int(getattr(predict, "remote_calls", 0))


def trim_padding(inputs: Inputs) -> Inputs:
    """Remove the padding columns that all rows share; images have none."""
    if "attention_mask" not in inputs:
        return inputs
    longest = int(inputs["attention_mask"].sum(1).max())
    return {name: array[:, :longest] for name, array in inputs.items()}


def no_native_bf16() -> str | None:
    """Reason to skip bf16 on this CPU, or None if it has bf16 instructions."""
    if cpu_flags() & BF16_FLAGS:
        return None
    return "skipped: this processor has no bf16 instructions (avx512_bf16 or amx_bf16)"


def confidence(logits: Logits) -> npt.NDArray[np.float32]:
    """Largest softmax probability of each row, float32 (batch,)."""
    largest: npt.NDArray[np.float32] = 1 / np.exp(logits - logits.max(1, keepdims=True)).sum(1)
    return largest


def int8_saturates() -> bool:
    """Whether 8-bit weights overflow on this CPU, so that 7-bit weights are needed.

    Without VNNI two products of uint8 and int8 are added in 16 bits.
    """
    return not cpu_flags() & VNNI_FLAGS


def check_calibration(calibration: Sequence[Inputs]) -> None:
    """Check that there are enough calibration rows.

    Raises:
        VariantError: There are fewer than `MIN_CALIBRATION_ROWS` rows.
    """
    rows = sum(len(array) for batch in calibration for array in list(batch.values())[:1])
    if rows < MIN_CALIBRATION_ROWS:
        raise VariantError(
            f"static int8 needs at least {MIN_CALIBRATION_ROWS} rows of train to calibrate, "
            f"and got {rows}. Give more rows, or use dynamic int8."
        )


@dataclass(frozen=True)
class Variant(ABC):
    """A runtime with its options.

    A subclass is a frozen dataclass of its options, which are written to the manifest.

    Attributes:
        precision: ``fp32``, ``bf16``, ``fp16``, ``fp8-dynamic``, ``int8-dynamic``, ``int8-static``
            (calibrated) or ``int8-accuracy`` (calibrated with accuracy control against fp32).
        device: ``cpu`` or ``cuda``: the device that the files are exported, checked and measured
            on, and served on unless the user names another.
        runtime: Name of the runtime; the middle part of the variant's name.
        gpu_precisions: Precisions that run on a GPU.
        least_capability: Compute capability that the runtime needs of a GPU.
        extra: Extra of this distribution that the runtime needs, if any.
        compiles: True if the export runs a compiler; such exports are started first.
        stages: Subfolders of the variants that this one combines, see `combine`.
        carries_code: True if the file contains executable code, not only weights and a graph of
            known operators. Such a file is loaded only if its digest is trusted.
    """

    precision: str = "fp32"
    device: str = field(default=CPU, kw_only=True)

    runtime: ClassVar[str]
    gpu_precisions: ClassVar[frozenset[str]] = frozenset()
    least_capability: ClassVar[tuple[int, int]] = (0, 0)
    extra: ClassVar[str | None] = None
    compiles: ClassVar[bool] = False
    carries_code: ClassVar[bool] = False
    stages: ClassVar[tuple[str, ...]] = ()

    def name(self, model: str) -> str:
        """``<model>-<runtime>-<precision>``, on a GPU with ``-cuda``: ``student-openvino-fp32``."""
        name = f"{model}-{self.runtime}-{self.precision}"
        return name if self.device == CPU else f"{name}-{self.device}"

    def unsupported(self) -> str | None:
        """Reason why this machine does not build the variant, or None if it does.

        A missing library is not reported here: `export` and `load` raise `MissingExtraError`.
        """
        if self.device == CPU:
            return no_native_bf16() if self.precision == "bf16" else None
        if self.precision not in self.gpu_precisions:
            return f"skipped: {self._cpu_only()}"
        return no_gpu_for(self.precision, self.least_capability)

    def check_device_kind(self, device: str) -> None:
        """Check that the runtime has the precision on a kind of device.

        Raises:
            UnsupportedError: It runs on the CPU only.
        """
        if device != CPU and self.precision not in self.gpu_precisions:
            raise UnsupportedError(f"{self._cpu_only()}.")

    def _cpu_only(self) -> str:
        return f"{self.runtime}-{self.precision} runs on the CPU only; use device=cpu"

    def for_this_machine(self) -> Variant:
        """This variant with the options that an export on this machine gives it."""
        return self

    def required_cpu_flags(self) -> frozenset[str]:
        """CPU flags that the exported files require."""
        return frozenset()

    @abstractmethod
    def export(
        self, module: Classifier, example: Inputs, calibration: Sequence[Inputs], folder: Path
    ) -> None:
        """Export the model into an existing, empty folder.

        Args:
            module: The model in eager fp32, in evaluation mode, on the CPU.
            example: Batch for tracing, with more than one row and texts of different lengths.
            calibration: Batches of one row from `train`, for static quantization.
            folder: Output folder; the caller moves it to its final place.

        Raises:
            MissingExtraError: The runtime's library is not installed.
            VariantError: The model cannot be expressed in this runtime.
        """

    @abstractmethod
    def load(self, folder: Path, *, device: str, threads: int) -> Predict:
        """Load an exported folder.

        Args:
            folder: The variant's folder, with verified digests.
            device: ``cpu``, or ``cuda`` or ``cuda:N`` if the runtime supports it.
            threads: Maximum number of threads per call.

        Raises:
            MissingExtraError: The runtime's library is not installed.
            UnsupportedError: The runtime does not support the device.
        """

    @property
    def allows_code(self) -> bool:
        """Whether the stages may carry code; the digest of this variant covers them."""
        return False

    def combine(self, predictors: Sequence[Predict]) -> Predict:
        """Combine the predictors of the `stages`, in their order."""
        raise NotImplementedError(f"{self.runtime} has no stages")
