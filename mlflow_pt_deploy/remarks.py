"""What a reader must know before trusting a table of results. Pure; decides nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mlflow_pt_deploy.measure.result import Result

_UNEVEN = 1.5
_CLEAR = 1.1
_MOST_NAMES = 3


def remarks(results: Sequence[Result]) -> list[str]:
    """Notes of the results, one for each model, then timings that contradict each other.

    Args:
        results: From `measure`; failed ones have a reason of their own.
    """
    worked = [each for each in results if not each.reason]
    return [*_of_models(worked), *_of_timing(worked)]


def _of_models(results: Sequence[Result]) -> list[str]:
    found: dict[str, list[Result]] = {}
    for each in results:
        if each.notes:
            found.setdefault(each.model, []).append(each)
    words = []
    for model, noted in found.items():
        others = f" (and {len(noted) - 1} more of {model})" if len(noted) > 1 else ""
        words.append(f"{noted[0].variant}{others} {'; '.join(noted[0].notes)}.")
    return words


def _of_timing(results: Sequence[Result]) -> list[str]:
    by_name = {each.variant: each for each in results}
    found = [
        f"{each.variant} {ratio:.3g}x, interleaved {each.value('speedup'):.3g}x"
        for each in results
        if (ratio := _contradiction(each, by_name.get(each.baseline))) is not None
    ]
    if not found:
        return []
    more = f" and {len(found) - _MOST_NAMES} more" if len(found) > _MOST_NAMES else ""
    return [
        "The machine was uneven while timing: by p50, which is taken at different times, "
        f"{'; '.join(found[:_MOST_NAMES])}{more}. Trust the interleaved one (speedup)."
    ]


def _contradiction(result: Result, baseline: Result | None) -> float | None:
    """The ratio of both p50s where it contradicts the interleaved speedup, else None.

    A cascade's median says nothing of the rows that it defers.
    """
    speedup, p50 = result.get("speedup"), result.value("latency_p50_ms")
    theirs = baseline.value("latency_p50_ms") if baseline else None
    if speedup is None or not p50 or not theirs or result.runtime == "cascade":
        return None
    ratio = theirs / p50
    low = speedup.value if speedup.low is None else speedup.low
    high = speedup.value if speedup.high is None else speedup.high
    if low <= ratio <= high:
        return None
    apart = abs(math.log(ratio / speedup.value)) > math.log(_UNEVEN)
    clear = min(abs(math.log(ratio)), abs(math.log(speedup.value))) > math.log(_CLEAR)
    opposed = clear and (ratio > 1) != (speedup.value > 1)
    return ratio if apart or opposed else None
