"""Scores samples of answered requests by their shadows, and compares the labels."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from mlflow_pt_deploy.registry.addresses import ModelSpec, ResolvedVersion, explain_load_error
from mlflow_pt_deploy.serving.model.loaded_model import LoadedModel, load_version
from mlflow_pt_deploy.serving.rollout.shadow.message import Sample
from mlflow_pt_deploy.serving.rollout.shadow.plan import ShadowPlan, ShadowTarget, label_problem
from mlflow_pt_deploy.serving.rollout.shadow.store import ACTIVE, LOADING, REFUSED, Comparison

RETRY_S = 300.0
MAX_KEPT = 50
"""Comparisons that are kept; the oldest ones are dropped."""

_OWN_OPTIONS = {"device": "cpu", "num_threads": 1}

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Failure:
    """A version that cannot be loaded, and when it was tried, by `time.monotonic`."""

    reason: str
    tried_at: float


class ShadowScorer:
    """Holds the shadows in memory; one thread uses it.

    Args:
        comparisons: Those of a process before this one, which are continued.
        load: Loads a version, or raises.

    Attributes:
        comparisons: By their keys; read by other threads.
    """

    def __init__(
        self,
        comparisons: Iterable[Comparison] = (),
        load: Callable[[ResolvedVersion, ModelSpec], LoadedModel] = load_version,
    ) -> None:
        self.comparisons = {each.key: each for each in comparisons}
        self._load = load
        self._plans: Mapping[str, ShadowPlan] = {}
        self._loaded: dict[str, LoadedModel | _Failure] = {}

    def follow(self, plans: Mapping[str, ShadowPlan]) -> None:
        """Load the shadows of these plans, and free others."""
        self._plans = plans
        wanted = {_load_key(plan, target) for plan in plans.values() for target in plan.active}
        self._loaded = {key: each for key, each in self._loaded.items() if key in wanted}
        for name, plan in plans.items():
            for target in plan.active:
                self._prepare(self._comparison(name, plan, target), plan, target)

    def score(self, sample: Sample) -> None:
        """Let all shadows of a request score its rows; never raises."""
        plan = self._plans.get(sample.model)
        if plan is None or plan.answered != sample.version:
            return
        for target in plan.active:
            comparison = self._comparison(sample.model, plan, target)
            loaded = self._loaded.get(_load_key(plan, target))
            if comparison.state != ACTIVE or sample.point >= target.share:
                continue
            assert isinstance(loaded, LoadedModel)
            self._compare(comparison, loaded, sample)

    def _comparison(self, name: str, plan: ShadowPlan, target: ShadowTarget) -> Comparison:
        new = Comparison(name, target.role, plan.answered, target.version or "")
        found = self.comparisons.get(new.key)
        if found is None:
            kept = {**self.comparisons, new.key: new}
            # one assignment: another thread iterates over the dict
            self.comparisons = dict(list(kept.items())[-MAX_KEPT:])
        return found or new

    def _prepare(self, comparison: Comparison, plan: ShadowPlan, target: ShadowTarget) -> None:
        """Load the version of a target unless it is loaded, and check its labels."""
        key = _load_key(plan, target)
        found = self._loaded.get(key)
        if found is None or _is_due(found):
            comparison.state, comparison.reason = LOADING, ""
            found = self._loaded[key] = self._try_load(plan, target)
        if isinstance(found, _Failure):
            comparison.state, comparison.reason = REFUSED, found.reason
            return
        loaded = found.pyfunc.loaded
        problem = label_problem(plan.labels, loaded.labels)
        if loaded.preprocessor.column != plan.column:
            problem = f"it reads {loaded.preprocessor.column}s instead of {plan.column}s."
        comparison.state, comparison.reason = (REFUSED if problem else ACTIVE), problem

    def _try_load(self, plan: ShadowPlan, target: ShadowTarget) -> LoadedModel | _Failure:
        uri = f"models:/{plan.registered_model}/{target.version}"
        resolved = ResolvedVersion(uri, plan.registered_model, target.version)
        try:
            loaded = self._load(resolved, ModelSpec(uri, {**plan.model_config, **_OWN_OPTIONS}))
        except Exception as error:
            reason = str(explain_load_error(error))
            _logger.error(
                "shadow: version %s of %s cannot score; next try in %g s: %s",
                target.version,
                plan.registered_model,
                RETRY_S,
                reason,
            )
            return _Failure(reason, time.monotonic())
        _logger.info("shadow: version %s of %s scores", target.version, plan.registered_model)
        return loaded

    def _compare(self, comparison: Comparison, shadow: LoadedModel, sample: Sample) -> None:
        counts, service = comparison.counts, shadow.pyfunc.service
        started = time.perf_counter()
        try:
            found = service.predict(sample.rows, bounded=False)
            best = [at for part in found for at, _ in service.formatter.best(part)]
        except Exception as error:
            if not counts.errors:
                _logger.warning(
                    "shadow: version %s raised %s", comparison.version, type(error).__name__
                )
            counts.count_response(500, time.perf_counter() - started)
            return
        counts.count_response(200, time.perf_counter() - started)
        names = shadow.pyfunc.loaded.labels
        answered = sample.labels
        counts.disagreed += sum(
            names[at] != label for at, label in zip(best, answered, strict=True)
        )
        counts.compared += len(answered)


def _load_key(plan: ShadowPlan, target: ShadowTarget) -> str:
    return json.dumps([plan.registered_model, target.version, plan.model_config], sort_keys=True)


def _is_due(found: LoadedModel | _Failure) -> bool:
    return isinstance(found, _Failure) and time.monotonic() - found.tried_at >= RETRY_S
