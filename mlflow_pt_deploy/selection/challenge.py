"""Decide whether a chosen variant replaces the current champion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mlflow_pt_deploy.errors import PolicyError
from mlflow_pt_deploy.evaluation.result import Result
from mlflow_pt_deploy.evaluation.statistics import mcnemar_p, paired_drop
from mlflow_pt_deploy.selection.comparison import cost, is_tied, overall_speedup
from mlflow_pt_deploy.selection.policy import Policy
from mlflow_pt_deploy.system.device import CPU

# Timings of two runs are not interleaved: they differ by this much without a cause.
_MARGIN = 0.05

_METRICS = {
    "latency": ("latency_mean_ms", "ms per row", 1),
    "throughput": ("throughput_rows_per_s", "rows/s", -1),
    "size": ("artifact_mb", "MB", 1),
}


@dataclass(frozen=True)
class Measured:
    """A result and the conditions under which it was measured.

    Attributes:
        result: The measurements.
        run_id: Run of the optimize stage that measured it.
        conditions: Digest of the validation rows as ``validation``, the ``hardware``, and the
            ``gpu`` if there is one.
    """

    result: Result
    run_id: str
    conditions: Mapping[str, str]


@dataclass(frozen=True)
class Verdict:
    """Whether the challenger replaces the champion, and why."""

    replaces: bool
    reason: str


def challenge(challenger: Measured, champion: Measured, policy: Policy) -> Verdict:
    """Compare two variants on the same validation rows.

    The challenger replaces the champion if it is not shown to be less accurate (95 % interval of
    the paired difference) and is better in the objective beyond noise.

    Args:
        challenger: The chosen variant.
        champion: The variant that is served now.
        policy: Its objective is compared.

    Raises:
        PolicyError: They were measured on other rows or other hardware, or a measurement is
            missing; the message names the remedy.
    """
    _check_comparable(challenger, champion)
    new, old = _correct(challenger.result), _correct(champion.result)
    drop = paired_drop(old, new)
    quality = (
        f"accuracy {new.mean():.4f} against {old.mean():.4f}, "
        f"difference {0 - 100 * drop.value:+.2f} points "
        f"[{-100 * drop.high:+.2f}, {-100 * drop.low:+.2f}], McNemar p {mcnemar_p(old, new):.2g}"
    )
    better, speed = _objective(challenger, champion, policy)
    if drop.low > 0:
        return Verdict(False, f"it is less accurate beyond noise: {quality}; {speed}")
    if not better:
        return Verdict(
            False, f"its {policy.objective} is not better beyond noise: {speed}; {quality}"
        )
    return Verdict(True, f"its {policy.objective} is better: {speed}; {quality}")


def _check_comparable(challenger: Measured, champion: Measured) -> None:
    names = {"validation": "validation rows", "hardware": "hardware"}
    if CPU not in (challenger.result.device, champion.result.device):
        names["gpu"] = "hardware"
    for key, what in names.items():
        new, old = challenger.conditions.get(key), champion.conditions.get(key)
        if new is None or new != old:
            raise PolicyError(
                f"the champion was measured on other {what} ({old or 'unknown'} instead of "
                f"{new or 'unknown'}), so the two cannot be compared. Measure both on the same "
                "with pt-deploy compare --data, or replace it without a comparison: --replace"
            )
    for measured in (challenger, champion):
        result = measured.result
        accuracy = result.get("accuracy", "validation")
        if accuracy is None or not accuracy.samples:
            raise PolicyError(
                f"{result.variant} has no answers for single validation rows, so it cannot be "
                "compared. Measure it again with pt-deploy optimize, or give --replace"
            )


def _objective(challenger: Measured, champion: Measured, policy: Policy) -> tuple[bool, str]:
    """Whether the challenger is better in the objective beyond noise, and both numbers."""
    new, old = challenger.result, champion.result
    if challenger.run_id == champion.run_id:  # interleaved with the same baseline
        better = cost(new, policy) < cost(old, policy) and not is_tied(old, new, policy)
        if policy.objective == "latency":
            factors = (each.value if each else 0.0 for each in map(overall_speedup, (new, old)))
            return better, "{:.3g}x against {:.3g}x".format(*factors)
        return better, f"{cost(new, policy):.4g} against {cost(old, policy):.4g}".replace("-", "")
    if policy.objective == "cost":
        ours, theirs, unit, sign = cost(new, policy), cost(old, policy), "per million rows", 1
    else:
        metric, unit, sign = _METRICS[policy.objective]
        ours, theirs = _value(new, metric), _value(old, metric)
    ratio = ours / theirs if sign > 0 else theirs / ours
    return ratio < 1 - _MARGIN, f"{ours:.4g} against {theirs:.4g} {unit}"


def _value(result: Result, metric: str) -> float:
    value = result.value(metric)
    if value is None:
        raise PolicyError(f"{result.variant} has no {metric}. Measure it again, or give --replace")
    return value


def _correct(result: Result) -> npt.NDArray[np.bool_]:
    found = result.get("accuracy", "validation")
    samples: Sequence[float] = found.samples if found else ()
    return np.asarray(samples, dtype=np.float64) > 0
