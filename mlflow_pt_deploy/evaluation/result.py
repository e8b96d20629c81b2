"""Data classes: one measurement with unit and samples, and all measurements of one variant."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mlflow_pt_deploy.errors import VariantError
from mlflow_pt_deploy.evaluation.profile import RowCounts
from mlflow_pt_deploy.system.device import CPU

UNITS: Mapping[str, str] = {
    "accuracy": "fraction",
    "macro_f1": "fraction",
    "agreement": "fraction",
    "agreement_perturbed": "fraction",
    "accuracy_drop": "fraction",
    "accuracy_kept": "fraction",
    "mcnemar_p": "probability",
    "class_recall": "fraction",
    "calibration_error": "fraction",
    "batch_invariance": "fraction",
    "confidence": "fraction",
    "latency_mean_ms": "ms",
    "latency_p50_ms": "ms",
    "latency_p95_ms": "ms",
    "latency_p99_ms": "ms",
    "throughput_rows_per_s": "rows/s",
    "best_batch_rows": "rows",
    "best_batch_tokens": "tokens",
    "device_ms": "ms",
    "speedup": "x",
    "speedup_over_cpu": "x",
    "artifact_mb": "MB",
    "peak_rss_mb": "MB",
    "peak_device_mb": "MB",
    "load_s": "s",
}
"""Every metric that is recorded, with its unit. One MB is 1,000,000 bytes."""


@dataclass(frozen=True)
class Measurement:
    """One metric value, optionally with a 95 % interval and raw samples.

    Attributes:
        name: Metric, a key of `UNITS`.
        value: Value in `unit`.
        unit: Unit of `value`, `low`, `high` and usually of `samples`.
        dataset: ``validation``, ``test``, a kind of perturbed rows, or empty: no dataset, or all
            perturbed rows.
        low: Lower end of the 95 % interval (of `accuracy_kept`: one-sided bound), or None.
        high: Upper end of the 95 % interval, or None.
        samples: Raw samples, e.g. milliseconds per row, or 1 for each correct row and 0 else.
    """

    name: str
    value: float
    unit: str
    dataset: str = ""
    low: float | None = None
    high: float | None = None
    samples: tuple[float, ...] = ()

    @classmethod
    def from_samples(
        cls,
        name: str,
        samples: Sequence[float],
        unit: str,
        *,
        dataset: str = "",
        statistic: Callable[[Sequence[float]], float] = statistics.median,
    ) -> Measurement:
        """Summarize raw samples by a statistic and keep them.

        Raises:
            VariantError: `samples` is empty.
        """
        if not samples:
            raise VariantError(f"{name} has no samples; at least one is needed.")
        raw = tuple(map(float, samples))
        return cls(name, float(statistic(raw)), unit, dataset, samples=raw)

    def to_json(self) -> dict[str, Any]:
        """Return JSON values for `from_json`."""
        return {**asdict(self), "samples": list(self.samples)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Measurement:
        """Create a measurement from the output of `to_json`.

        Raises:
            VariantError: A field is missing or unknown.
        """
        try:
            return cls(**{**document, "samples": tuple(document["samples"])})
        except (KeyError, TypeError) as error:
            raise VariantError(f"not the JSON of a measurement: {error}") from error


@dataclass(frozen=True)
class Result:
    """All measurements of one variant on this machine.

    Attributes:
        variant: Name, ``<model>-<runtime>-<precision>``, on a GPU with ``-cuda``.
        model: ``teacher``, ``student``, ...
        runtime: Key of `runtimes.catalog.RUNTIMES`.
        precision: ``fp32``, ``int8-dynamic``, ...
        device: ``cpu`` or ``cuda``.
        threads: Threads per call.
        folder: Folder of the artifact, or None if it was not built.
        reason: Why the variant could not be built or measured; empty on success.
        measurements: The measurements.
        baseline: Variant that `accuracy_drop` and `agreement` compare with, see `timed_against`.
        notes: Warnings about the variant, e.g. that it is at chance level.
        gpu: Clocks, power and temperature of the GPU, before the timing and under load.
        predicted: Predicted class of each row, by dataset.
        profile: Counts of the answers to the validation rows, or None.
    """

    variant: str
    model: str
    runtime: str
    precision: str
    device: str
    threads: int
    folder: Path | None
    reason: str = ""
    measurements: tuple[Measurement, ...] = ()
    baseline: str = ""
    notes: tuple[str, ...] = ()
    predicted: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    profile: RowCounts | None = None
    gpu: str = ""

    @property
    def timed_against(self) -> str:
        """Variant that `speedup` compares with: the baseline on the same device."""
        return self.baseline if self.device == CPU else f"{self.baseline}-{self.device}"

    def get(self, name: str, dataset: str = "") -> Measurement | None:
        """Return the measurement of a metric on a dataset, or None."""
        for each in self.measurements:
            if (each.name, each.dataset) == (name, dataset):
                return each
        return None

    def value(self, name: str, dataset: str = "") -> float | None:
        """Return the value of a metric on a dataset, or None."""
        found = self.get(name, dataset)
        return None if found is None else found.value

    def metrics(self, dataset: str = "") -> dict[str, float]:
        """Return metric values of a dataset by name, intervals as ``_low`` and ``_high``."""
        flat: dict[str, float] = {}
        for each in self.measurements:
            if each.dataset != dataset:
                continue
            flat[each.name] = each.value
            if each.low is not None:
                flat[f"{each.name}_low"] = each.low
            if each.high is not None:
                flat[f"{each.name}_high"] = each.high
        return flat

    def to_json(self) -> dict[str, Any]:
        """Return JSON values for `from_json`."""
        return {
            **asdict(self),
            "folder": None if self.folder is None else str(self.folder),
            "measurements": [each.to_json() for each in self.measurements],
            "notes": list(self.notes),
            "predicted": {name: list(labels) for name, labels in self.predicted.items()},
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Result:
        """Create a result from the output of `to_json`.

        Raises:
            VariantError: A field is missing or unknown.
        """
        try:
            folder = document["folder"]
            measurements = tuple(map(Measurement.from_json, document["measurements"]))
            # older documents have no `predicted`, `notes` and `profile`
            predicted, profile = document.get("predicted", {}), document.get("profile")
            parsed = {
                "folder": folder and Path(folder),
                "measurements": measurements,
                "notes": tuple(document.get("notes", ())),
                "predicted": {name: tuple(labels) for name, labels in predicted.items()},
                "profile": profile and RowCounts.from_json(profile),
            }
            return cls(**{**document, **parsed})
        except (KeyError, TypeError) as error:
            raise VariantError(f"not the JSON of a result: {error}") from error


def find_result(results: Iterable[Result], variant: str | None) -> Result | None:
    """Return the result of a variant, or None."""
    return next((each for each in results if each.variant == variant), None)


def find_baseline(results: Iterable[Result]) -> Result | None:
    """Return the result of the baseline, or None."""
    return next((each for each in results if each.variant == each.baseline), None)
