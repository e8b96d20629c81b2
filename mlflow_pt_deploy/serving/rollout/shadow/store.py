"""What is written about shadows into the run directory, so that all workers say the same.

shadow-plan.json                 by the leader: what is to be scored
shadow-process.json              by the leader: whether the shadow process runs
shadow-results.json              by the shadow process: what it compared
counts-shadow.json               the same as counts of versions
shadow-sent-<index>-<pid>.json   by each worker: requests sent and dropped
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from mlflow_pt_deploy.serving.model.version_counts import VersionCounts
from mlflow_pt_deploy.serving.rollout.shadow.plan import ShadowPlan
from mlflow_pt_deploy.serving.worker_state import WorkerStates

LOADING, ACTIVE, REFUSED = "loading", "active", "refused"

_PLAN, _PROCESS, _RESULTS, _COUNTS = (
    "shadow-plan",
    "shadow-process",
    "shadow-results",
    "counts-shadow",
)
_SENT = "shadow-sent"


@dataclass
class Comparison:
    """The answers of one version compared with those of its shadow.

    Attributes:
        model: Served model.
        role: See `ShadowTarget`.
        answered: Label of the version that answered.
        version: Version of the shadow.
        state: `LOADING`, `ACTIVE` or `REFUSED`.
        reason: Why it is refused.
        counts: Requests, errors and latencies of the shadow; rows compared, and disagreed on.
    """

    model: str
    role: str
    answered: str
    version: str
    state: str = LOADING
    reason: str = ""
    counts: VersionCounts = field(default_factory=VersionCounts)

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What tells it from other comparisons."""
        return self.model, self.role, self.answered, self.version


@dataclass(frozen=True)
class ProcessState:
    """The shadow process, as its leader sees it.

    Attributes:
        pid: Its process id; 0: it does not run.
        starts: How often it was started.
        ended: Why it ended last; empty if it never did by itself.
    """

    pid: int = 0
    starts: int = 0
    ended: str = ""


def write_plans(states: WorkerStates, plans: Mapping[str, ShadowPlan]) -> None:
    """Publish the plans by model."""
    states.publish(_PLAN, {name: plan.to_json() for name, plan in plans.items()})


def read_plans(states: WorkerStates) -> dict[str, ShadowPlan]:
    """The plans by model; empty before there are any."""
    return {name: ShadowPlan.from_json(plan) for name, plan in states.document(_PLAN).items()}


def write_process(states: WorkerStates, state: ProcessState) -> None:
    """Publish the state of the shadow process."""
    states.publish(_PROCESS, asdict(state))


def read_process(states: WorkerStates) -> ProcessState:
    """The state of the shadow process."""
    return ProcessState(**states.document(_PROCESS))


def write_results(
    states: WorkerStates, comparisons: Iterable[Comparison], dropped: Mapping[str, int]
) -> None:
    """Publish what was compared, and the requests that the process dropped, by model."""
    kept = list(comparisons)
    documents = [{**vars(each), "counts": each.counts.to_json()} for each in kept]
    states.publish(_RESULTS, {"comparisons": documents, "dropped": dict(dropped)})
    counts: dict[str, dict[str, Counter[str]]] = {}
    for each in kept:
        of_version = counts.setdefault(each.model, {}).setdefault(each.version, Counter())
        of_version["compared"] += each.counts.compared
        of_version["disagreed"] += each.counts.disagreed
    states.publish(_COUNTS, counts)


def read_results(states: WorkerStates) -> tuple[list[Comparison], Counter[str]]:
    """What was compared, and the requests that the process dropped, by model."""
    document = states.document(_RESULTS)
    found = [
        Comparison(**{**each, "counts": VersionCounts.from_json(each["counts"])})
        for each in document.get("comparisons", ())
    ]
    return found, Counter(document.get("dropped", {}))


def write_sent(states: WorkerStates, sent: Mapping[str, Any]) -> None:
    """Publish what this worker sent: requests by model as ``sent`` and ``dropped``."""
    states.publish(f"{_SENT}-{states.index}-{os.getpid()}", sent)


def read_sent(states: WorkerStates) -> tuple[Counter[str], Counter[str]]:
    """Requests that all workers sent, and those that they dropped, by model."""
    sent, dropped = Counter[str](), Counter[str]()
    for document in states.published(f"{_SENT}-*"):
        sent.update(document["sent"])
        dropped.update(document["dropped"])
    return sent, dropped
