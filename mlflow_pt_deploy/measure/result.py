"""A number with its unit and its evidence, and all the numbers of one variant.

Knows names and units; does not know how a number came about, nor what it is good for.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlflow_pt_deploy.errors import VariantError

UNITS: Mapping[str, str] = {
    "accuracy": "fraction",
    "macro_f1": "fraction",
    "agreement": "fraction",
    "accuracy_drop": "fraction",
    "confidence": "fraction",
    "latency_mean_ms": "ms",
    "latency_p50_ms": "ms",
    "latency_p95_ms": "ms",
    "latency_p99_ms": "ms",
    "throughput_rows_per_s": "rows/s",
    "best_batch_rows": "rows",
    "speedup": "x",
    "artifact_mb": "MB",
    "peak_rss_mb": "MB",
    "load_s": "s",
}
"""Every metric that is recorded, with its unit. One MB is 1,000,000 bytes."""


@dataclass(frozen=True)
class Measurement:
    """One number, tied to what it was measured on.

    Attributes:
        name: Metric, as in `UNITS`.
        value: The number, in `unit`.
        unit: Unit of `value`, `low`, `high` and mostly of `samples`.
        dataset: ``validation`` or ``test``; empty where the number belongs to neither.
        low: Lower end of the 95 % interval, where there is one.
        high: Upper end of it.
        samples: Raw evidence, e.g. the milliseconds of each row, or 0/1 for each row answered.
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
        """Sum up raw samples by one statistic and keep them.

        Raises:
            VariantError: There are no samples.
        """
        if not samples:
            raise VariantError(f"{name} has no samples. Measure at least one before summing up.")
        raw = tuple(map(float, samples))
        return cls(name, float(statistic(raw)), unit, dataset, samples=raw)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values that `from_json` reads back."""
        return {**asdict(self), "samples": list(self.samples)}

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Measurement:
        """Read what `to_json` gave.

        Raises:
            VariantError: A field is missing or unknown.
        """
        try:
            return cls(**{**document, "samples": tuple(document["samples"])})
        except (KeyError, TypeError) as error:
            raise VariantError(f"not a measurement that to_json wrote: {error}") from error


@dataclass(frozen=True)
class Result:
    """What is known about one variant on this machine.

    Attributes:
        variant: Its name, ``<model>-<runtime>-<precision>``.
        model: ``teacher``, ``student``, ...
        runtime: What executes it.
        precision: ``fp32``, ``int8-dynamic``, ...
        device: Where it was measured, ``cpu`` or ``cuda``.
        threads: Threads that one call could use.
        folder: Where the artifact is; None where nothing was built.
        reason: Why there is nothing (or not all) to report, in words; empty when all went well.
        measurements: The numbers.
        baseline: The variant that `speedup`, `accuracy_drop` and `agreement` compare with.
        notes: What to know of the variant before trusting it, e.g. that it is at chance level.
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

    def get(self, name: str, dataset: str = "") -> Measurement | None:
        """The measurement of that name on that dataset, or None."""
        for each in self.measurements:
            if (each.name, each.dataset) == (name, dataset):
                return each
        return None

    def value(self, name: str, dataset: str = "") -> float | None:
        """The number of that name on that dataset, or None."""
        found = self.get(name, dataset)
        return None if found is None else found.value

    def metrics(self, dataset: str = "") -> dict[str, float]:
        """Flat numbers of one dataset (or of none), ``_low`` and ``_high`` where there are."""
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
        """Plain JSON values that `from_json` reads back."""
        return {
            **asdict(self),
            "folder": None if self.folder is None else str(self.folder),
            "measurements": [each.to_json() for each in self.measurements],
            "notes": list(self.notes),
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Result:
        """Read what `to_json` gave.

        Raises:
            VariantError: A field is missing or unknown.
        """
        try:
            folder = document["folder"]
            measurements = tuple(map(Measurement.from_json, document["measurements"]))
            notes = tuple(document.get("notes", ()))  # older documents have none
            changed = {
                "folder": folder and Path(folder),
                "measurements": measurements,
                "notes": notes,
            }
            return cls(**{**document, **changed})
        except (KeyError, TypeError) as error:
            raise VariantError(f"not a result that to_json wrote: {error}") from error
