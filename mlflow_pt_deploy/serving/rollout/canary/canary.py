"""The canary of one model in this worker: started, widened and dropped as the registry says.

The registry's tag is read after each poll of the model, on another thread. A guardrail ends a
canary through a file of the run directory, which every worker reads once a second. Requests see one
attribute, `Canary.running`, which is assigned.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Mapping
from typing import Any

from mlflow_pt_deploy.errors import ServingError
from mlflow_pt_deploy.registry.addresses import (
    ModelSpec,
    ResolvedVersion,
    resolve,
    version_tags,
)
from mlflow_pt_deploy.registry.canary import CANARY_ENDED_TAG, CANARY_TAG, canary_tag
from mlflow_pt_deploy.serving.lifecycle.served_model import ServedModel
from mlflow_pt_deploy.serving.model.loaded_model import LoadedModel, load_version
from mlflow_pt_deploy.serving.observability.metrics import Metrics
from mlflow_pt_deploy.serving.rollout.canary.endings import Ending, Endings
from mlflow_pt_deploy.serving.rollout.canary.running_canary import RunningCanary, check_pair
from mlflow_pt_deploy.serving.rollout.version_share import VersionShare, parse_tag
from mlflow_pt_deploy.system.clock import now
from mlflow_pt_deploy.system.process_memory import freeze_gc

OFF, INACTIVE, LOADING, RUNNING = "off", "inactive", "loading", "running"
REFUSED, ENDED = "refused", "ended"

# what MLflow answers where a version or an alias does not exist
_MISSING = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")

_logger = logging.getLogger(__name__)


class Canary:
    """The canary of a served model, if one is wanted.

    Args:
        model: The champion.
        options: Plans of the command line, by registered model.
        endings: Why canaries were ended.
        metrics: Observes the calls of the canary.

    Attributes:
        running: The canary that answers requests, or None.
    """

    def __init__(
        self,
        model: ServedModel,
        options: Mapping[str, VersionShare],
        endings: Endings,
        metrics: Metrics | None = None,
    ) -> None:
        self.running: RunningCanary | None = None
        self._model = model
        self._options = options
        self._endings = endings
        self._metrics = metrics or Metrics()
        self._lock = threading.Lock()
        self._state = (OFF, "")
        self._fault = ""
        self._plan: VersionShare | None = None
        self._version = ""
        self._served: ServedModel | None = None
        self._served_as: tuple[ResolvedVersion, dict[str, Any]] | None = None
        self._forgiven: set[Ending] = set()

    @property
    def name(self) -> str:
        """Name of the model."""
        return self._model.name

    @property
    def champion(self) -> LoadedModel | None:
        """The champion that is in memory."""
        return self._model.current

    def poll(self) -> None:
        """Do what the registry wants now; never raises, and a registry that is down is no reason.

        Loads a version, so it may take long; one call at a time.
        """
        try:
            self._poll()
        except ServingError as error:
            self._stop(REFUSED, str(error))
        except Exception as error:
            if self._fault != (fault := type(error).__name__):
                _logger.warning("%s: the canary cannot be looked up (%s)", self.name, fault)
            self._fault = fault
        else:
            self._fault = ""

    def follow(self) -> None:
        """Drop the canary if it was ended; called once a second."""
        running = self.running
        if running is not None and (ending := self._ending(running.label)):
            self._stop(ENDED, ending.text)

    def end(self, reason: str) -> None:
        """End the canary in all workers; called in one of them."""
        running = self.running
        if running is not None:
            ending = Ending(running.label, reason, now(), socket.gethostname())
            self._endings.write(self.name, ending)
            self.follow()

    def status(self) -> dict[str, Any] | None:
        """Its entry in ``/model``; None if no canary is wanted."""
        (state, reason), plan, running = self._state, self._plan, self.running
        if state == OFF:
            return None
        return {
            "state": state,
            "reason": reason or None,
            "uri": plan.uri if plan else None,
            "version": self._version or None,
            "share": plan.share if plan else None,
            "since": running.since if running else None,
        }

    def _poll(self) -> None:
        champion = self._model.current
        if champion is None or champion.resolved.name is None:
            missing = "the champion is not in memory" if champion is None else ""
            self._stop(INACTIVE if self._plan else OFF, missing)
            return
        name = champion.resolved.name
        tag = canary_tag(name)
        self._plan, self._version = None, ""
        option = self._options.get(name)
        self._plan = plan = option if tag is None else parse_tag(CANARY_TAG, name, tag)
        if plan is None:
            self._stop(OFF, "")
            return
        endings = self._endings.of_model(self.name)  # first: the tag is written before it says so
        version, tags = _look_up(plan)
        self._version = version.version or ""
        if version == champion.resolved:
            reason = f"version {version.version} is the champion; there is nothing to compare"
            self._stop(INACTIVE, reason)
        elif reason := self._ended(version, tags.get(CANARY_ENDED_TAG), endings):
            self._stop(ENDED, reason)
        else:
            self._run(champion, version, plan)

    def _ended(
        self, version: ResolvedVersion, tag: str | None, endings: Mapping[str, Ending]
    ) -> str:
        """Why a version must not run; empty if it may.

        An ending of this server ends with its tag: a person removes that in the registry.
        """
        if tag is not None:
            return tag or f"the version has the tag {CANARY_ENDED_TAG}"
        label = version.version or ""
        if label in endings and endings[label].tagged:
            self._forgiven.add(endings[label])
        ending = self._ending(label)
        return ending.text if ending else ""

    def _ending(self, version: str) -> Ending | None:
        """The ending of a version that was not taken back."""
        ending = self._endings.of_model(self.name).get(version)
        if ending is None or ending._replace(tagged=True) in self._forgiven:
            return None
        return ending

    def _run(self, champion: LoadedModel, version: ResolvedVersion, plan: VersionShare) -> None:
        """Load the version if that is necessary, and let it answer."""
        loaded = self._load(champion, version, plan)
        running = self.running
        same = running is not None and running.version is loaded
        if same and (running.champion, running.share) == (champion.label, plan.share):  # type: ignore[union-attr]
            return
        check_pair(champion, loaded)
        if ending := self._ending(loaded.label):  # while it was loaded
            self._stop(ENDED, ending.text)
            return
        self._model.count(loaded)
        since = running.since if running is not None and same else now()
        with self._lock:
            self.running = RunningCanary(
                loaded, self.name, champion.label, plan.share, since, self._metrics
            )
            self._set_state(
                RUNNING, f"version {loaded.label} answers {plan.share:.4g} of the requests"
            )
        if not same:
            freeze_gc()

    def _load(
        self, champion: LoadedModel, version: ResolvedVersion, plan: VersionShare
    ) -> LoadedModel:
        """The loaded canary.

        Raises:
            ServingError: It cannot be loaded, or is not to be compared with the champion.
        """
        spec = ModelSpec(plan.uri, champion.spec.model_config)
        key = version, dict(spec.model_config)
        served = self._served  # the monitor's thread may drop it
        if served is None or self._served_as != key:
            self._stop(LOADING, f"version {version.version} is being loaded")
            served = self._served = ServedModel(
                self.name,
                lambda: spec,
                metrics=_CanaryMetrics(self._metrics),
                find=lambda uri: version,
                load=self._load_beside,
            )
            self._served_as = key
        if served.current is None:
            served.poll()
        if served.current is None:
            raise ServingError(served.rejected.reason if served.rejected else served.registry_error)
        return served.current

    def _load_beside(self, version: ResolvedVersion, spec: ModelSpec) -> LoadedModel:
        """Load a canary; it never runs on the event loop, where a slow one would delay all.

        Raises:
            ServingError: It is not to be compared with the champion.
        """
        loaded = load_version(version, spec)
        if champion := self._model.current:
            check_pair(champion, loaded)
        loaded.pyfunc.service.forbid_inline()
        return loaded

    def _stop(self, state: str, reason: str) -> None:
        """Answer no more requests; the memory is freed with the last of them."""
        with self._lock:
            self.running = None
            waits = state == REFUSED and self._served and not self._served.current
            if not waits:  # the time of its next try is kept
                self._served = None
            self._set_state(state, reason)

    def _set_state(self, state: str, reason: str) -> None:
        """Set the state, and log it if it is new."""
        if (state, reason) == self._state:
            return
        self._state = state, "" if state in (RUNNING, LOADING) else reason
        level = logging.WARNING if state in (REFUSED, ENDED) else logging.INFO
        _logger.log(level, "%s: canary %s%s", self.name, state, reason and f": {reason}")


class _CanaryMetrics(Metrics):
    """Observes the calls of a canary; the series of the model are the champion's."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def version_activated(self, name: str, version: LoadedModel, seconds: float) -> None:
        """See `Metrics`."""
        self._metrics.version_loaded(name, version)


def _look_up(plan: VersionShare) -> tuple[ResolvedVersion, dict[str, str]]:
    """The version that is wanted, and its tags.

    Raises:
        ServingError: It does not exist.
        MlflowException: The registry is not reachable.
    """
    from mlflow.exceptions import MlflowException

    try:
        version = resolve(plan.uri)
        return version, version_tags(version)
    except MlflowException as error:
        if error.error_code not in _MISSING:
            raise
        raise ServingError(
            f"{plan.uri} does not exist; set the alias, or name another version"
        ) from error
