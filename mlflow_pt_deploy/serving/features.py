"""What a server does besides answering: canaries, shadows, drift, feedback, served figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

from mlflow_pt_deploy.serving.lifecycle.served_model import ServedModel
from mlflow_pt_deploy.serving.monitoring.drift import DriftWatch
from mlflow_pt_deploy.serving.monitoring.feedback import FeedbackCollector
from mlflow_pt_deploy.serving.monitoring.feedback_store import FeedbackStore
from mlflow_pt_deploy.serving.monitoring.monitor import Duty, Monitor
from mlflow_pt_deploy.serving.monitoring.served_figures import ServedFigures
from mlflow_pt_deploy.serving.observability.metrics import Metrics
from mlflow_pt_deploy.serving.rollout.canary.canary import Canary
from mlflow_pt_deploy.serving.rollout.canary.duty import CanaryDuty
from mlflow_pt_deploy.serving.rollout.canary.endings import Endings
from mlflow_pt_deploy.serving.rollout.shadow.client import ShadowClient
from mlflow_pt_deploy.serving.rollout.shadow.duty import ShadowDuty
from mlflow_pt_deploy.serving.rollout.shadow.report import shadow_figures
from mlflow_pt_deploy.serving.rollout.version_share import parse_option
from mlflow_pt_deploy.serving.settings import ServerSettings
from mlflow_pt_deploy.serving.worker_state import WorkerStates


@dataclass(frozen=True)
class Features:
    """Features of a worker.

    Attributes:
        canaries: Canaries by model.
        monitor: Publishes counts and runs the duties of the features; not started.
        shadows: Samples answered requests.
        drift: Compares what is served with the rows of the promotion.
        feedback: Takes feedback, if it is on.
    """

    canaries: Mapping[str, Canary]
    monitor: Monitor
    shadows: ShadowClient | None = None
    drift: DriftWatch | None = None
    feedback: FeedbackCollector | None = None

    def poll(self, model: ServedModel) -> None:
        """Look up in the registry what is wanted beside a model; called after its own poll."""
        self.canaries[model.name].poll()


def features_alone(
    models: Mapping[str, ServedModel], settings: ServerSettings, metrics: Metrics
) -> Features:
    """Features of a process that shares no run directory with others: canaries only."""
    canaries, duty = _canaries(models, settings, metrics, None)
    return Features(canaries, Monitor(models, [duty]))


def features_of_worker(
    models: Mapping[str, ServedModel],
    settings: ServerSettings,
    metrics: Metrics,
    states: WorkerStates,
    since: str,
) -> Features:
    """Features of one worker of a server.

    Args:
        models: Models by name.
        settings: Server settings.
        metrics: Gets the figures of all workers.
        states: State of all workers.
        since: When the server started.
    """
    canaries, canary_duty = _canaries(models, settings, metrics, states)
    drift = DriftWatch(models, states)
    metrics.add_rows(drift.series)
    shadows = ShadowClient(states.folder)
    metrics.add_figures(partial(shadow_figures, states))
    duties: list[Duty] = [canary_duty, drift, ShadowDuty(models, states, shadows, settings)]
    feedback = None
    if settings.feedback_rows:
        store = FeedbackStore(states.folder, settings.feedback_rows)
        feedback = FeedbackCollector(models, store, metrics)
        duties.append(feedback)
    if settings.report_s:
        answers = feedback.store if feedback else None
        duties.append(ServedFigures(models, settings.report_s, since, answers))
    monitor = Monitor(models, duties, states, feedback.counts if feedback else dict)
    return Features(canaries, monitor, shadows, drift, feedback)


def _canaries(
    models: Mapping[str, ServedModel],
    settings: ServerSettings,
    metrics: Metrics,
    states: WorkerStates | None,
) -> tuple[dict[str, Canary], CanaryDuty]:
    plans, endings = parse_option("canary", settings.canary), Endings(states)
    canaries = {name: Canary(model, plans, endings, metrics) for name, model in models.items()}
    return canaries, CanaryDuty(canaries, endings, settings.canary_limits)
