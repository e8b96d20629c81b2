"""The duty of shadows: the leader looks them up and keeps their process running.

Every worker follows the plan that the leader publishes, and samples what it wants.
"""

from __future__ import annotations

import logging
import math
import random
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from mlflow_pt_deploy.registry.addresses import explain_load_error
from mlflow_pt_deploy.serving.lifecycle.served_model import ServedModel
from mlflow_pt_deploy.serving.monitoring.monitor import Duty, ServerCounts
from mlflow_pt_deploy.serving.rollout.shadow.client import ShadowClient
from mlflow_pt_deploy.serving.rollout.shadow.lookup import (
    ShadowWish,
    look_up_targets,
    without_targets,
)
from mlflow_pt_deploy.serving.rollout.shadow.plan import ShadowPlan
from mlflow_pt_deploy.serving.rollout.shadow.store import read_plans, write_plans, write_sent
from mlflow_pt_deploy.serving.rollout.shadow.supervisor import ShadowSupervisor
from mlflow_pt_deploy.serving.rollout.version_share import parse_option, parse_share
from mlflow_pt_deploy.serving.settings import ServerSettings
from mlflow_pt_deploy.serving.worker_state import WorkerStates

RETRY_S = 60.0
"""Seconds until the next look after the registry did not answer, if it is not polled."""

_logger = logging.getLogger(__name__)


class _Served(NamedTuple):
    """A version that answers, without its model in memory."""

    name: str
    plan: ShadowPlan
    tags: Mapping[str, str]


class ShadowDuty(Duty):
    """See `Duty`.

    Args:
        models: Models by name.
        states: State of all workers.
        client: Sends the samples of this worker.
        settings: Server settings.
    """

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        states: WorkerStates,
        client: ShadowClient,
        settings: ServerSettings,
    ) -> None:
        self._models = models
        self._states = states
        self._client = client
        self._poll_s = settings.poll_s
        teacher = settings.shadow_teacher
        self._wish = ShadowWish(
            parse_option("shadow", settings.shadow, 1.0),
            parse_share(teacher, "shadow_teacher") if teacher else 0.0,
        )
        self._supervisor = ShadowSupervisor(states, settings)
        self._plans: dict[str, ShadowPlan] = {}
        self._published: dict[str, ShadowPlan] = {}
        self._sent: dict[str, Any] = {}
        self._lookup: threading.Thread | None = None
        self._looked_for: dict[str, str] = {}
        self._look_at = 0.0
        self._error = ""

    def follow(self) -> None:
        """Sample what the plan wants, and publish what was sent."""
        self._client.follow(read_plans(self._states))
        sent = {"sent": dict(self._client.sent), "dropped": dict(self._client.dropped)}
        if sent != self._sent and any(sent.values()):
            write_sent(self._states, sent)
            self._sent = sent

    def lead(self, counts: ServerCounts) -> None:
        """Publish the plan, and keep the process running if a shadow is to score."""
        self._start_lookup()
        plans = self._plans
        if plans != self._published:
            write_plans(self._states, plans)
            self._published = plans
        self._supervisor.keep(any(plan.active for plan in plans.values()))

    def close(self, counts: ServerCounts) -> None:
        """End the process."""
        self._supervisor.end()

    def _start_lookup(self) -> None:
        """Look all shadows up on a thread: the registry may take minutes to answer."""
        if self._lookup is not None and self._lookup.is_alive():
            return
        current = {name: model.current for name, model in self._models.items()}
        served = [
            _Served(name, without_targets(version), version.tags)
            for name, version in current.items()
            if version is not None
        ]
        answering = {each.name: each.plan.answered for each in served}
        if answering == self._looked_for and time.monotonic() < self._look_at:
            return
        self._looked_for = answering
        pause_s = self._poll_s * random.uniform(0.8, 1.2) if self._poll_s else math.inf
        self._look_at = time.monotonic() + pause_s
        self._lookup = threading.Thread(
            target=self._look_up, args=(served,), name="shadow-lookup", daemon=True
        )
        self._lookup.start()

    def _look_up(self, served: Sequence[_Served]) -> None:
        """Renew the plans; that of a model stays if the registry does not answer."""
        error = ""
        for name, plan, tags in served:
            try:
                targets = look_up_targets(plan, tags, self._wish)
            except Exception as failure:
                error = f"{name}: the shadows cannot be looked up: {explain_load_error(failure)}"
                self._look_at = min(self._look_at, time.monotonic() + RETRY_S)
                continue
            others = {key: each for key, each in self._plans.items() if key != name}
            found = {name: replace(plan, targets=targets)} if targets else {}
            self._plans = {**others, **found}
        if error and error != self._error:
            _logger.warning("%s", error)
        self._error = error
