"""Pages: probes, metadata of models, admin pages, feedback."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any, NamedTuple

from mlflow_pt_deploy.serving.http.open_inference import (
    MODELS,
    ROOT,
    model_metadata,
    server_metadata,
)
from mlflow_pt_deploy.serving.http.openapi import document
from mlflow_pt_deploy.serving.http.response import (
    RETRY_AFTER,
    Response,
    error_response,
    json_response,
)
from mlflow_pt_deploy.serving.lifecycle.served_model import ServedModel
from mlflow_pt_deploy.serving.model.loaded_model import LoadedModel
from mlflow_pt_deploy.serving.monitoring.drift import DriftWatch
from mlflow_pt_deploy.serving.monitoring.feedback import FeedbackCollector
from mlflow_pt_deploy.serving.monitoring.monitor import server_counts
from mlflow_pt_deploy.serving.observability.metrics import Metrics
from mlflow_pt_deploy.serving.rollout.canary.canary import Canary
from mlflow_pt_deploy.serving.rollout.shadow.report import shadow_status
from mlflow_pt_deploy.serving.worker_state import WorkerStates

PROBE, SCORING, ADMIN = "probe", "scoring", "admin"
FEEDBACK = "/feedback"


class Page(NamedTuple):
    """A page.

    Attributes:
        path: Its path, without the version of a model.
        access: `PROBE`: no token, not in the access log; `SCORING`: a scoring token; `ADMIN`: an
            admin token, and it is written on a thread.
        write: Makes the response.
        takes_body: Whether it is asked with POST; `write` then gets the body, on a thread.
    """

    path: str
    access: str
    write: Callable[..., Response]
    takes_body: bool = False


class Pages:
    """The pages of a server.

    Args:
        models: Models by name.
        metrics: Exposed at ``/metrics``.
        hang_s: Seconds after which a running batch makes ``/livez`` fail; 0: never.
        states: State of all workers of this server.
        is_listening: Whether the other ports of this worker are open.
        drift: Compares what is served with the rows of the promotion, if given.
        canaries: Canaries by model.
        feedback: Takes feedback, if given.
    """

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        metrics: Metrics,
        hang_s: float,
        states: WorkerStates | None,
        is_listening: Callable[[], bool],
        drift: DriftWatch | None = None,
        canaries: Mapping[str, Canary] | None = None,
        feedback: FeedbackCollector | None = None,
    ) -> None:
        self._models = models
        self._metrics = metrics
        self._hang_s = hang_s
        self._states = states
        self._is_listening = is_listening
        self._drift = drift
        self._canaries = canaries or {}
        self._feedback = feedback
        first = next(iter(models))
        probes: dict[str, Callable[[], Response]] = {
            "/ping": self._ping,
            "/health": self._ping,
            "/version": _mlflow_version,
            "/livez": self._livez,
            "/readyz": self._readyz,
            "/openapi.json": self._openapi,
            f"{ROOT}/health/live": partial(self._health, "live", self._livez),
            f"{ROOT}/health/ready": partial(self._health, "ready", self._readyz),
        }
        admin: dict[str, Callable[[], Response]] = {
            "/metrics": self._exposition,
            "/model": partial(self._status, first),
            "/models": self._all_status,
            **{f"/models/{name}": partial(self._status, name) for name in models},
        }
        self._pages = {path: Page(path, PROBE, write) for path, write in probes.items()}
        self._pages |= {path: Page(path, ADMIN, write) for path, write in admin.items()}
        take = feedback.take if feedback else _feedback_is_off
        self._pages[FEEDBACK] = Page(FEEDBACK, SCORING, take, takes_body=True)
        self._pages[ROOT] = Page(ROOT, SCORING, lambda: json_response(server_metadata()))
        self._of_models: dict[str, tuple[str, Callable[[str], Response]]] = {}
        for name in models:
            self._of_models[MODELS + name] = SCORING, partial(self._metadata, name)
            self._of_models[f"{MODELS}{name}/ready"] = PROBE, partial(self._model_ready, name)

    def add_route(self, route: str, path: str) -> None:
        """Answer `route` like `path`, unless it has a page of its own."""
        self._pages.setdefault(route, self._pages[path]._replace(path=route))

    def find(self, path: str, version: str = "") -> Page | None:
        """The page of a path.

        Args:
            path: Without the version of a model.
            version: The version in the path; empty if there is none.
        """
        if path in self._of_models:
            access, write = self._of_models[path]
            return Page(path, access, partial(write, version))
        return None if version else self._pages.get(path)

    @property
    def hangs(self) -> bool:
        """Whether a model has been computing one batch for longer than `hang_s`."""
        limit = self._hang_s
        return bool(limit) and any(each.running_s > limit for each in self._models.values())

    def _livez(self) -> Response:
        if self.hangs:
            return Response(503, b'{"status": "hangs"}', "TEMPORARILY_UNAVAILABLE")
        return Response(200, b"{}")

    def _readyz(self) -> Response:
        alive = self._livez()
        if alive.status != 200:
            return alive
        if self._states is not None and self._states.draining:
            return Response(503, b'{"status": "draining"}', "TEMPORARILY_UNAVAILABLE")
        own = all(map(_can_answer, self._models.values()))
        own = own and self._is_listening()
        if own and (self._states is None or self._states.started()):
            return Response(200, b'{"status": "ready"}')
        return Response(503, b'{"status": "loading"}', "TEMPORARILY_UNAVAILABLE")

    def _ping(self) -> Response:
        return Response(self._readyz().status, b"\n")

    def _health(self, field: str, probe: Callable[[], Response]) -> Response:
        """A probe in the form of the Open Inference Protocol."""
        found = probe()
        body = json.dumps({field: found.status == 200}).encode()
        return found._replace(body=body)

    def _model_ready(self, name: str, version: str) -> Response:
        """Whether a model is in memory, or is loaded on demand, as for ``/readyz``."""
        model = self._models[name]
        current = model.current
        if version and current is not None and version not in self._labels(name, current):
            return unknown_version(name, current.label)
        if (current is None and version) or not _can_answer(model):
            body = json.dumps({"name": name, "ready": False}).encode()
            return Response(503, body, "TEMPORARILY_UNAVAILABLE")
        return json_response({"name": name, "ready": True})

    def _metadata(self, name: str, version: str) -> Response:
        model = self._models[name]
        current = model.acquire()  # so that an evicted one is loaded
        if current is None:
            return unavailable(model)
        labels = self._labels(name, current)
        if version and version not in labels:
            return unknown_version(name, current.label)
        loaded = current.pyfunc.loaded
        runtime, column = loaded.manifest.runtime, loaded.preprocessor.column
        return json_response(model_metadata(name, labels, runtime, column))

    def _labels(self, name: str, current: LoadedModel) -> list[str]:
        """Versions that answer requests: the current one, and the canary."""
        running = self._canaries[name].running if self._canaries else None
        return [current.label, *([running.label] if running else [])]

    def _openapi(self) -> Response:
        current = next(iter(self._models.values())).current
        column = current.pyfunc.loaded.preprocessor.column if current else None
        return json_response(document(self._models, column))

    def _status(self, name: str) -> Response:
        status = self._model_status(name)
        if self._states is not None:
            status["replicas"] = self._states.of_model(name)
            status["shadow"] = shadow_status(self._states, name)
        return json_response(status)

    def _canary_status(self, name: str) -> dict[str, Any] | None:
        """The canary of a model, with the counts of both versions since the server started."""
        canary, current = self._canaries[name], self._models[name].current
        status = canary.status()
        if status is None or current is None:
            return status
        counts = server_counts(self._models, self._states)[name]
        labels = {"champion": current.label, "canary": status["version"]}
        return status | {
            "counts": {
                role: counts[label].summary() for role, label in labels.items() if label in counts
            }
        }

    def _all_status(self) -> Response:
        return json_response([self._model_status(name) for name in self._models])

    def _model_status(self, name: str) -> dict[str, Any]:
        status = self._models[name].status()
        if self._canaries:
            status["canary"] = self._canary_status(name)
        if self._drift is not None:
            status["drift"] = self._drift.status(name)
        if self._feedback is not None:
            status["feedback"] = self._feedback.status(name)
        return status

    def _exposition(self) -> Response:
        text = self._metrics.expose()
        if text is None:
            message = "metrics need an extra: pip install 'mlflow-pt-deploy[serve]'"
            return error_response(501, "NOT_IMPLEMENTED", message)
        return Response(200, text, content_type=self._metrics.content_type)


def unavailable(model: ServedModel) -> Response:
    """The response while no version of a model is in memory."""
    retry, message = RETRY_AFTER, "the model is still loading"
    if model.rejected and model.unloaded:
        retry = ("retry-after", str(max(1, round(model.rejected.remaining_s))))
        message = "the model is not in memory and its version was rejected; see /model"
    elif model.ended:
        message = "another version is being loaded, and the device has no memory for two; retry"
    elif model.unloaded:
        message = "the model is not in memory and is being loaded; retry in a moment"
    return error_response(503, "TEMPORARILY_UNAVAILABLE", message, retry)


def unknown_version(name: str, served: str) -> Response:
    """The response to a request for a version that does not serve."""
    message = f"this version of {name} does not serve; {served} does, ask for it or for none"
    return error_response(404, "RESOURCE_DOES_NOT_EXIST", message)


def _can_answer(model: ServedModel) -> bool:
    """Whether a model is in memory, in that of its device too, or is loaded on demand."""
    current = model.current
    return bool(model.unloaded) if current is None else current.pyfunc.service.ready


def _feedback_is_off(body: bytes) -> Response:
    message = "feedback is off; start the server with --feedback-rows and a number of rows"
    return error_response(404, "FEATURE_DISABLED", message)


@cache  # the lookup reads files, and this runs on the event loop
def _mlflow_version() -> Response:
    from importlib.metadata import version

    return Response(200, version("mlflow-skinny").encode())
