"""What is known about shadows, for ``/model`` and ``/metrics``; read from the run directory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from mlflow_pt_deploy.evaluation.statistics import Estimate, proportion
from mlflow_pt_deploy.serving.observability.metrics import Figure
from mlflow_pt_deploy.serving.rollout.shadow.plan import TEACHER, ShadowPlan, ShadowTarget
from mlflow_pt_deploy.serving.rollout.shadow.store import (
    LOADING,
    Comparison,
    ProcessState,
    read_plans,
    read_process,
    read_results,
    read_sent,
)
from mlflow_pt_deploy.serving.worker_state import WorkerStates

_INACTIVE, _STOPPED = "inactive", "stopped"
_QUANTILES = (0.5, 0.99)


def shadow_status(states: WorkerStates, name: str) -> dict[str, Any] | None:
    """The entry ``shadow`` of ``/model``; None if the model has no shadow.

    Args:
        states: The run directory.
        name: Served model.
    """
    plan = read_plans(states).get(name)
    if plan is None:
        return None
    process, (comparisons, dropped_there) = read_process(states), read_results(states)
    by_key = {each.key: each for each in comparisons}
    sent, dropped = read_sent(states)
    return {
        "versions": [
            _entry(
                plan,
                target,
                by_key.get((name, target.role, plan.answered, target.version or "")),
                process,
            )
            for target in plan.targets
        ],
        "requests_sent": sent[name],
        "requests_dropped": dropped[name] + dropped_there[name],
        "process": {
            "pid": process.pid or None,
            "restarts": max(0, process.starts - 1),
            "ended": process.ended or None,
        },
    }


def _entry(
    plan: ShadowPlan, target: ShadowTarget, found: Comparison | None, process: ProcessState
) -> dict[str, Any]:
    """A shadow in ``/model``."""
    state, reason = (found.state, found.reason) if found else (LOADING, "")
    if not process.pid:
        state, reason = _STOPPED, process.ended
    if target.problem:
        state, reason = _INACTIVE, target.problem
    entry = {
        "role": target.role,
        "uri": target.uri,
        "version": target.version,
        "compared_with": plan.answered,
        "share": target.share,
        "state": state,
        "reason": reason or None,
    }
    comparison = found or Comparison("", target.role, "", "")
    return entry | _counted(comparison) | _agreement(comparison, plan.agreement)


def _counted(comparison: Comparison) -> dict[str, Any]:
    counts = comparison.counts
    p50, p99 = (counts.quantile_s(share) for share in _QUANTILES)
    return {
        "requests": counts.requests,
        "errors": counts.errors,
        "rows_compared": counts.compared,
        "rows_disagreed": counts.disagreed,
        "latency_p50_ms": None if p50 is None else round(p50 * 1000, 3),
        "latency_p99_ms": None if p99 is None else round(p99 * 1000, 3),
    }


def _agreement(comparison: Comparison, at_promotion: float | None) -> dict[str, Any]:
    """Disagreement of a shadow; of a teacher the agreement, beside that at the promotion."""
    counts = comparison.counts
    if comparison.role != TEACHER:
        found = proportion(counts.disagreed, counts.compared) if counts.compared else None
        return {"disagreement": _interval(found)}
    agreed = counts.compared - counts.disagreed
    found = proportion(agreed, counts.compared) if counts.compared else None
    known = found is not None and at_promotion is not None
    return {
        "agreement": _interval(found),
        "agreement_at_promotion": at_promotion,
        "drift": found.high < at_promotion if known and found and at_promotion else None,
    }


def _interval(found: Estimate | None) -> dict[str, float] | None:
    return found and {key: round(value, 6) for key, value in found._asdict().items()}


def shadow_figures(states: WorkerStates) -> Iterator[Figure]:
    """Metrics of all shadows since the server started."""
    process, (comparisons, dropped_there) = read_process(states), read_results(states)
    if not process.starts:
        return
    sent, dropped = read_sent(states)
    yield Figure("shadow_up", "1 while the shadow process runs", {}, float(process.pid > 0))
    yield Figure("shadow_starts_total", "Starts of the shadow process", {}, process.starts)
    for name in sorted(sent | dropped | dropped_there):
        of, lost = {"model": name}, dropped[name] + dropped_there[name]
        yield Figure("shadow_sent_total", "Requests sent to the shadow process", of, sent[name])
        yield Figure("shadow_dropped_total", "Sampled requests that were dropped", of, lost)
    for each in comparisons:
        yield from _figures(each)


def _figures(comparison: Comparison) -> Iterator[Figure]:
    counts = comparison.counts
    of = {
        "model": comparison.model,
        "version": comparison.answered,
        "shadow": comparison.version,
        "role": comparison.role,
    }
    for name, about, value in (
        ("requests", "Requests that a shadow scored", counts.requests),
        ("errors", "Those for which it raised an error", counts.errors),
        ("compared_rows", "Rows that a shadow and the served version scored", counts.compared),
        ("disagreed_rows", "Those with different labels", counts.disagreed),
    ):
        yield Figure(f"shadow_{name}_total", about, of, value)
    for share in _QUANTILES:
        seconds = counts.quantile_s(share)
        if seconds is not None:
            quantile = {**of, "quantile": f"{share:g}"}
            yield Figure("shadow_seconds", "Time that a shadow took", quantile, seconds)
