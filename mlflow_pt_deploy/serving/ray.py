"""The server as a Ray Serve application: Ray starts replicas and routes, each replica is ours.

    serve run mlflow_pt_deploy.serving.ray:app model=models:/NAME@champion num_replicas=2

Ray's proxy passes a request to a replica, which answers it by `Application`: protocol, batching,
deadlines and load shedding are those of ``pt-deploy serve``. Each replica follows the alias by
itself: a swap is one assignment, so no request fails and no process starts. A rollout by Ray would
start a process for each replica, which takes seconds and memory for both.
"""
# Ray reads the annotation of `app` as a class, so they are not postponed here.

import os
import sys
import threading
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

from mlflow_pt_deploy.errors import MissingExtraError, ServingError
from mlflow_pt_deploy.model_config import ServingOptions, parse_value
from mlflow_pt_deploy.option_fields import option_specs
from mlflow_pt_deploy.serving.model_names import check_folder, registered_names
from mlflow_pt_deploy.serving.rollout.version_share import check_served, parse_option
from mlflow_pt_deploy.serving.settings import ServerSettings
from mlflow_pt_deploy.system.hardware import CORES_ENV, SWITCH_S

if TYPE_CHECKING:
    from mlflow_pt_deploy.serving.asgi import AsgiAdapter

NAME = "pt-deploy"
"""Name of the deployment, by which a Serve configuration file changes Ray's options."""

# Ray's default of 5 would leave nothing to batch; beyond it requests wait in Ray's proxy.
_MAX_ONGOING_REQUESTS = 256
# Ray's replicas share no run directory, in which these keep what all have answered.
_ABSENT = ("report_s", "feedback_rows")
_SETTINGS = (
    "poll_s",
    "hang_s",
    "max_body_mb",
    "max_models",
    "max_memory_mb",
    "cache_mb",
    "access_log",
    "canary",
    "canary_p99_ratio",
    "canary_disagreement",
    "canary_label_shift",
)


class AppOptions(BaseModel):
    """Arguments of `app`. Any other argument is a server setting or a serving option.

    Attributes:
        model: As for ``pt-deploy serve``; several are separated by commas.
        num_replicas: Replicas, or ``auto`` for Ray's autoscaling.
        autoscaling_config: Ray's autoscaling options.
        max_ongoing_requests: Most requests that Ray passes to a replica at a time.
        ray_actor_options: Ray's options of a replica, such as ``num_cpus``, ``num_gpus`` and
            ``runtime_env``; a model takes as many threads as there are CPUs.
    """

    model_config = ConfigDict(extra="allow")

    model: str
    num_replicas: int | Literal["auto"] | None = None
    autoscaling_config: dict[str, Any] | None = None
    max_ongoing_requests: int = _MAX_ONGOING_REQUESTS
    ray_actor_options: dict[str, Any] | None = None


def app(options: AppOptions) -> Any:
    """Build the application that ``serve run`` deploys.

    Raises:
        MissingExtraError: Ray Serve is not installed.
        ServingError: An option is invalid or unknown.
    """
    try:
        from ray import serve
    except ImportError as error:
        raise MissingExtraError("ray", "ray") from error

    words = [word.strip() for word in options.model.split(",") if word.strip()]
    for word in words:
        check_folder(word)
    settings, model_options = _split(options.model_extra or {})
    if settings.canary:
        check_served("canary", parse_option("canary", settings.canary), registered_names(words))

    def build() -> "AsgiAdapter":
        return load_replica(words, settings, model_options)

    given = options.model_dump(
        include={"num_replicas", "autoscaling_config", "ray_actor_options"}, exclude_none=True
    )
    deployment = serve.deployment(
        name=NAME, max_ongoing_requests=options.max_ongoing_requests, **given
    )
    return deployment(serve.ingress(build)(Replica)).bind()


class Replica:
    """A replica, as Ray sees it; requests go to the ASGI application that Ray keeps as `app`."""

    app: "AsgiAdapter"

    def check_health(self) -> None:
        """Called by Ray, which replaces the replica if this raises.

        Raises:
            ServingError: The model has been computing one batch for longer than `hang_s`.
        """
        if self.app.application.hangs:
            raise ServingError("the model has been computing one batch for longer than hang_s")


def load_replica(
    words: list[str], settings: ServerSettings, model_options: Mapping[str, Any]
) -> "AsgiAdapter":
    """Load the models in this process, and answer by them.

    Args:
        words: Models, as on the command line of ``pt-deploy serve``.
        settings: Server settings.
        model_options: Serving options of all models.

    Raises:
        ServingError: A model cannot be opened.
    """
    _prepare_process()
    from mlflow_pt_deploy.registry.addresses import explain_load_error
    from mlflow_pt_deploy.serving.asgi import AsgiAdapter
    from mlflow_pt_deploy.serving.features import features_alone
    from mlflow_pt_deploy.serving.model_names import name_models
    from mlflow_pt_deploy.serving.observability.metrics import new_metrics
    from mlflow_pt_deploy.serving.worker import new_application, new_watcher

    metrics = new_metrics()
    models = name_models(words, model_options, metrics, cache_mb=settings.cache_mb)
    loaded, failures = threading.Event(), list[Exception]()

    def fail(error: Exception) -> None:
        failures.append(error)
        loaded.set()

    features = features_alone(models, settings, metrics)
    watcher = new_watcher(
        models,
        settings,
        on_opened=loaded.set,
        on_failed=fail,
        beside=features.poll,
    )
    watcher.start()
    loaded.wait()
    if failures:
        raise ServingError(str(explain_load_error(failures[0])))
    features.monitor.start()

    def stop() -> None:
        watcher.stop()
        features.monitor.stop()

    return AsgiAdapter(new_application(models, settings, metrics, features, on_stop=stop))


def _split(given: Mapping[str, Any]) -> tuple[ServerSettings, dict[str, Any]]:
    """Server settings and serving options among arguments, which are texts on the command line."""
    values: dict[str, Any] = {
        name: parse_value(value) if isinstance(value, str) else value
        for name, value in given.items()
    }
    kinds = {spec.name: spec.type for spec in option_specs(ServerSettings)}
    if absent := sorted(values.keys() & set(_ABSENT)):
        raise ServingError(
            f"{', '.join(absent)}: Ray's replicas share no counts or answers. Leave it out, or use "
            "pt-deploy serve."
        )
    if rays := sorted(values.keys() & kinds.keys() - set(_SETTINGS)):
        raise ServingError(
            f"{', '.join(rays)}: Ray Serve does this. Give it in Ray's configuration; the settings "
            f"here are {', '.join(_SETTINGS)}."
        )
    own = {name: values.pop(name) for name in _SETTINGS if name in values}
    for name, value in own.items():
        kind = type(value) if isinstance(value, (bool, str)) else float
        if kind is not (kinds[name] if kinds[name] in (bool, str) else float):
            wanted = {bool: "true or false", str: "a text"}.get(kinds[name], "a number")
            raise ServingError(f"{name} is {value!r}; give {wanted}")
    settings = ServerSettings(**own)
    ServingOptions.from_config(values)  # reports a wrong option before replicas start
    return settings, values


def _prepare_process() -> None:
    """Give the model the CPUs that Ray assigned, before libraries read how many there are."""
    import ray

    from mlflow_pt_deploy.serving.worker import SERVING_VARIABLES

    cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1)
    os.environ.setdefault(CORES_ENV, str(max(1, int(cpus))))
    os.environ.update(SERVING_VARIABLES)
    sys.setswitchinterval(SWITCH_S)
