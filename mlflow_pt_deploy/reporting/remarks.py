"""Warnings shown below a table of results."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mlflow_pt_deploy.evaluation.result import Result
from mlflow_pt_deploy.selection.policy import Policy

_MAX_RATIO = 1.5  # of the p50 ratio to the interleaved speedup
_MIN_EFFECT = 1.1
_MAX_NAMES = 3
_MAX_NOISE = 1.2  # of the baseline's speedup over itself


def remarks(results: Sequence[Result]) -> list[str]:
    """Return the notes of the results, one per model, and a warning about inconsistent timings.

    Args:
        results: From `measure`; failed results are ignored.
    """
    succeeded = [each for each in results if not each.reason]
    return [
        *_device_remark(succeeded),
        *_model_remarks(succeeded),
        *_timing_remarks(succeeded),
    ]


def headline(results: Sequence[Result], chosen: Result | None, policy: Policy | None) -> str:
    """Return what a reader must know before the table: worthless timings, a broken promise.

    Args:
        results: From `measure`.
        chosen: The chosen variant.
        policy: Of the choice.
    """
    warnings = [
        _noise_warning(each, results)
        for each in results
        if each.baseline and each.variant == each.timed_against
    ]
    if chosen is not None and policy is not None:
        kept, text = promise_on_test(chosen, policy)
        warnings.append("" if kept else text)
    return " ".join(filter(None, warnings))


def promise_on_test(chosen: Result, policy: Policy) -> tuple[bool, str]:
    """Compare the accuracy on the test rows, which decided nothing, with the policy's promise.

    Returns:
        Whether the test rows keep `retain_low` of the baseline's accuracy (also if there are none),
        and a sentence with both numbers, empty for the baseline.
    """
    kept, accuracy = chosen.get("accuracy_kept", "test"), chosen.value("accuracy", "test")
    if chosen.variant == chosen.baseline or not policy.retain_low or kept is None:
        return True, ""
    held = kept.value >= policy.retain_low
    verdict = "the promise is kept" if held else "THE PROMISE IS NOT KEPT"
    return held, (
        f"On the test rows, which decided nothing, {chosen.variant} keeps {kept.value:.1%} of the "
        f"baseline's accuracy (accuracy {accuracy:.4f}); promised are {policy.retain_low:.0%} "
        f"(retain_low): {verdict}."
    )


def _device_remark(results: Sequence[Result]) -> list[str]:
    """Say what `speedup` compares with, where variants of several devices are in one table."""
    against = list(dict.fromkeys(each.timed_against for each in results))
    if len(against) < 2:
        return []
    over = [
        f"{each.variant} is {factor.value:.3g}x as fast as {each.baseline}"
        for each in results
        if each.variant == each.timed_against
        and (factor := each.get("speedup_over_cpu")) is not None
    ]
    return [
        f"A speedup is over the baseline on the same device ({', '.join(against)}); milliseconds "
        "compare devices" + "".join(f"; for single rows {text}" for text in over) + "."
    ]


def _noise_warning(baseline: Result, results: Sequence[Result]) -> str:
    """Warn if a baseline, measured against itself, is not about as fast as itself."""
    speedup = baseline.get("speedup")
    if speedup is None or speedup.low is None or speedup.high is None:
        return ""
    noise = max(speedup.value, 1 / speedup.value)
    if noise <= _MAX_NOISE:
        return ""
    several = len({each.device for each in results if not each.reason}) > 1
    where = f" on {baseline.device}" if several else ""
    return (
        f"The timings{where} are unreliable: the baseline, measured against itself, is "
        f"{speedup.value:.3g}x as fast [{speedup.low:.3g}, {speedup.high:.3g}] instead of 1x. Do "
        f"not trust speedups under {noise:.2g}x; measure again on a quiet machine."
    )


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
        if (ratio := _inconsistent_ratio(each, by_name.get(each.timed_against))) is not None
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
