"""Limits and objective of a selection, from flags or a YAML file."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from mlflow_pt_deploy.errors import PolicyError
from mlflow_pt_deploy.system.device import CPU, CUDA

Objective = Literal["latency", "throughput", "size", "cost"]


class LimitSpec(NamedTuple):
    """What a limit of `Policy` is compared with."""

    metric: str
    dataset: str
    title: str
    unit: str


LIMITS: Mapping[str, LimitSpec] = {
    "max_latency_p95_ms": LimitSpec("latency_p95_ms", "", "p95 latency", "ms"),
    "max_artifact_mb": LimitSpec("artifact_mb", "", "artifact size", "MB"),
    "max_peak_rss_mb": LimitSpec("peak_rss_mb", "", "peak memory", "MB"),
    "max_peak_device_mb": LimitSpec("peak_device_mb", "", "peak device memory", "MB"),
    "min_throughput_rows_per_s": LimitSpec("throughput_rows_per_s", "", "throughput", "rows/s"),
    "min_class_recall": LimitSpec("class_recall", "validation", "lowest recall of a class", ""),
    "min_agreement_perturbed": LimitSpec(
        "agreement_perturbed", "", "agreement on perturbed rows", ""
    ),
    "min_batch_invariance": LimitSpec(
        "batch_invariance", "", "share of labels independent of the batch", ""
    ),
}
"""Limits of a policy by field name: ``max_METRIC`` or ``min_METRIC``."""

DEVICES = (CPU, CUDA)

_PRICES = ("price_per_core_hour", "price_per_gpu_hour")
_LISTS = ("runtimes", "devices")
_FRACTIONS = ("min_class_recall", "min_agreement_perturbed", "min_batch_invariance")
_MAX_FILE_BYTES = 2**16
_LOW_BELOW = 0.02


@dataclass(frozen=True)
class Policy:
    """Limits that a variant must meet, and the objective to optimize.

    The baseline always meets `retain` and `retain_low`.

    Attributes:
        retain: Minimum validation accuracy as a fraction of the baseline's, 0 to 1; 0.99 of a
            baseline with 0.900 requires 0.891.
        retain_low: The same with 95 % confidence (one-sided, paired), 0 to 1; 0: not required;
            -1: 0.02 below `retain`, so 0.97 by default.
        objective: ``latency`` (largest speedup, one row at a time), ``throughput`` (most rows/s),
            ``size`` (smallest artifact) or ``cost`` (cheapest per row in batches).
        max_latency_p95_ms: Maximum 95th percentile of the latency of one row.
        max_artifact_mb: Maximum size of the folder, in 10^6 bytes.
        max_peak_rss_mb: Maximum peak resident memory, in 10^6 bytes.
        max_peak_device_mb: Maximum memory on a GPU, in 10^6 bytes; not of variants on the CPU.
        min_throughput_rows_per_s: Minimum rows per second in batches.
        min_class_recall: Minimum share of correct validation rows in every class with five rows.
        min_agreement_perturbed: Minimum share of perturbed rows with the baseline's label.
        min_batch_invariance: Minimum share of rows whose label does not depend on the other rows of
            a batch.
        runtimes: Allowed runtimes; empty: all.
        devices: Allowed devices, ``cpu`` and ``cuda``; empty: all.
        price_per_core_hour: Price of one core for an hour, for the objective ``cost``.
        price_per_gpu_hour: Price of one GPU, without cores, for an hour, for the same objective.

    Raises:
        PolicyError: A field is invalid, or fields contradict each other; the message names them.
    """

    retain: float = 0.99
    retain_low: float = -1.0
    objective: Objective = "latency"
    max_latency_p95_ms: float | None = None
    max_artifact_mb: float | None = None
    max_peak_rss_mb: float | None = None
    max_peak_device_mb: float | None = None
    min_throughput_rows_per_s: float | None = None
    min_class_recall: float | None = None
    min_agreement_perturbed: float | None = None
    min_batch_invariance: float | None = None
    runtimes: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    price_per_core_hour: float | None = None
    price_per_gpu_hour: float | None = None

    def __post_init__(self) -> None:
        if self.retain_low == -1 and _is_number(self.retain):
            object.__setattr__(self, "retain_low", round(max(self.retain - _LOW_BELOW, 0.0), 6))
        for field in ("retain", "retain_low"):
            value = getattr(self, field)
            if not (_is_number(value) and 0 <= value <= 1):
                raise PolicyError(
                    f"{field} is {value!r}; give the fraction of the baseline's accuracy to keep "
                    "as a number from 0 to 1, e.g. 0.99."
                )
        if self.retain_low > self.retain:
            raise PolicyError(
                f"retain_low is {self.retain_low:g}, above retain ({self.retain:g}): the fraction "
                "that is kept with 95 % confidence is never above the measured one. Lower "
                "retain_low."
            )
        for field in (*LIMITS, *_PRICES):
            limit = getattr(self, field)
            if limit is not None and not (_is_number(limit) and limit > 0):
                raise PolicyError(
                    f"{field} is {limit!r}; give a number above 0, or leave it out for no limit."
                )
            if field in _FRACTIONS and limit is not None and limit > 1:
                raise PolicyError(f"{field} is {limit!r}; give a fraction of at most 1.")
        if self.objective not in get_args(Objective):
            allowed = ", ".join(map(repr, get_args(Objective)))
            raise PolicyError(f"objective is {self.objective!r}; choose from {allowed}.")
        if (self.objective == "cost") != (self.price_per_core_hour is not None):
            raise PolicyError(
                "objective cost and price_per_core_hour belong together; give both or neither."
            )
        if self.price_per_gpu_hour is not None and self.objective != "cost":
            raise PolicyError("price_per_gpu_hour is for the objective cost; leave it out.")
        _check_runtimes(self.runtimes)
        for name in self.devices:
            if name not in DEVICES:
                raise PolicyError(f"devices: {name} is unknown; choose from {', '.join(DEVICES)}.")

    def allows_device(self, device: str) -> bool:
        """Whether variants on a device, ``cpu`` or ``cuda``, may be chosen."""
        return not self.devices or device in self.devices

    def check_gpu_price(self) -> None:
        """Check, where variants on a GPU are measured, that their cost is known.

        Raises:
            PolicyError: The objective is the cost, and a GPU has no price.
        """
        unpriced = self.objective == "cost" and self.price_per_gpu_hour is None
        if unpriced and self.allows_device(CUDA):
            raise PolicyError(
                "objective cost needs price_per_gpu_hour, because there are variants on a GPU. "
                "Give the price of a GPU, or allow devices=cpu only."
            )

    def to_json(self) -> dict[str, Any]:
        """Return the fields that are set, as JSON values."""
        document = {name: value for name, value in asdict(self).items() if value is not None}
        document |= {name: list(getattr(self, name)) for name in _LISTS}
        if not self.devices:  # as digests were before there were GPU variants
            del document["devices"]
        return document

    @property
    def digest(self) -> str:
        """Twelve hexadecimal digits of a hash of all fields."""
        text = json.dumps(self.to_json(), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]


def read_policy(path: Path) -> Policy:
    """Read a policy from a YAML file.

        objective: throughput
        retain: 0.99
        retain_low: 0.97
        latency_p95_ms: {max: 20}
        class_recall: {min: 0.5}
        runtimes: [onnxruntime, numpy]

    Args:
        path: The file; its keys are metrics with limits, or fields of `Policy` without one.

    Raises:
        PolicyError: The file cannot be read, or a key or value is invalid; the message names it
            and the nearest known key.
    """
    import yaml

    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise PolicyError(f"{path} is larger than {_MAX_FILE_BYTES} bytes; give a policy file.")
        document = yaml.safe_load(path.read_text(encoding="utf8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise PolicyError(f"the policy file {path} cannot be read: {reason}") from error
    if not isinstance(document, dict) or not all(isinstance(key, str) for key in document):
        raise PolicyError(f"{path} is not a mapping of metrics to limits, e.g. 'retain: 0.99'.")
    values: dict[str, Any] = {}
    for key, value in document.items():
        values |= _fields_of(str(path), key, value)
    return Policy(**values)


def _fields_of(where: str, key: str, value: Any) -> dict[str, Any]:
    """The fields of `Policy` that one key of a file sets."""
    plain = {each.name for each in fields(Policy)} - set(LIMITS)
    metrics = {spec.metric: field[:3] for field, spec in LIMITS.items()}
    if key in _LISTS:
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            example = {"runtimes": "onnxruntime", "devices": CPU}[key]
            raise PolicyError(f"{where}: {key} must be a list of names, e.g. [{example}].")
        return {key: tuple(value)}
    if key in plain:
        return {key: value}
    if key not in metrics:
        raise PolicyError(f"{where}: {key} is unknown{_nearest(key, [*plain, *metrics])}.")
    bound = metrics[key]
    if not isinstance(value, dict) or set(value) != {bound}:
        raise PolicyError(f"{where}: {key} takes a {bound}, e.g. '{key}: {{{bound}: 1}}'.")
    return {f"{bound}_{key}": value[bound]}


def _check_runtimes(names: tuple[str, ...]) -> None:
    for name in names:
        from mlflow_pt_deploy.runtimes.catalog import RUNTIMES  # imports every runtime

        if name not in RUNTIMES:
            raise PolicyError(f"runtimes: {name} is unknown{_nearest(name, list(RUNTIMES))}.")


def _nearest(name: str, known: list[str]) -> str:
    """Hint at the nearest known name, or at all of them."""
    found = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; did you mean {found[0]}?" if found else f"; known are {', '.join(sorted(known))}"


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
