"""Warnings shown below a table of results."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mlflow_pt_deploy.evaluation.result import Result

_MAX_RATIO = 1.5  # of the p50 ratio to the interleaved speedup
_MIN_EFFECT = 1.1
_MAX_NAMES = 3


def remarks(results: Sequence[Result]) -> list[str]:
    """Return the notes of the results, one per model, and a warning about inconsistent timings.

    Args:
        results: From `measure`; failed results are ignored.
    """
    succeeded = [each for each in results if not each.reason]
    return [*_model_remarks(succeeded), *_timing_remarks(succeeded)]


def _model_remarks(results: Sequence[Result]) -> list[str]:
    by_model: dict[str, list[Result]] = {}
    for each in results:
        if each.notes:
            by_model.setdefault(each.model, []).append(each)
    texts = []
    for model, noted in by_model.items():
        others = f" (and {len(noted) - 1} more of {model})" if len(noted) > 1 else ""
        texts.append(f"{noted[0].variant}{others} {'; '.join(noted[0].notes)}.")
    return texts


def _timing_remarks(results: Sequence[Result]) -> list[str]:
    by_name = {each.variant: each for each in results}
    found = [
        f"{each.variant} {ratio:.3g}x, interleaved {each.value('speedup'):.3g}x"
        for each in results
        if (ratio := _inconsistent_ratio(each, by_name.get(each.baseline))) is not None
    ]
    if not found:
        return []
    more = f" and {len(found) - _MAX_NAMES} more" if len(found) > _MAX_NAMES else ""
    return [
        "The speed of the machine varied during timing: by p50, measured at different times, "
        f"{'; '.join(found[:_MAX_NAMES])}{more}. Trust the interleaved value (speedup)."
    ]


def _inconsistent_ratio(result: Result, baseline: Result | None) -> float | None:
    """Return the ratio of both p50s if it contradicts the interleaved speedup, else None.

    Cascades are skipped, because their median does not include deferred rows.
    """
    speedup, p50 = result.get("speedup"), result.value("latency_p50_ms")
    baseline_p50 = baseline.value("latency_p50_ms") if baseline else None
    if speedup is None or not p50 or not baseline_p50 or result.runtime == "cascade":
        return None
    ratio = baseline_p50 / p50
    low = speedup.value if speedup.low is None else speedup.low
    high = speedup.value if speedup.high is None else speedup.high
    if low <= ratio <= high:
        return None
    far_apart = abs(math.log(ratio / speedup.value)) > math.log(_MAX_RATIO)
    significant = min(abs(math.log(ratio)), abs(math.log(speedup.value))) > math.log(_MIN_EFFECT)
    opposite = significant and (ratio > 1) != (speedup.value > 1)
    return ratio if far_apart or opposite else None
