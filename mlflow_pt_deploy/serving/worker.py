"""A worker process: models, registry watcher, watchdog, application.

Forked or spawned by granian. What libraries read once at import, such as the number of threads, is
set before they are imported.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlflow_pt_deploy.registry.addresses import explain_load_error
from mlflow_pt_deploy.serving.settings import ServerSettings
from mlflow_pt_deploy.serving.worker_state import WorkerStates
from mlflow_pt_deploy.system.child_process import signal_at_parent_death
from mlflow_pt_deploy.system.cpu_allocation import Share
from mlflow_pt_deploy.system.hardware import CORES_ENV, SWITCH_S, THREAD_VARIABLES, usable_cores

if TYPE_CHECKING:
    from mlflow_pt_deploy.serving.app import Application
    from mlflow_pt_deploy.serving.features import Features
    from mlflow_pt_deploy.serving.grpc_server import GrpcServer
    from mlflow_pt_deploy.serving.lifecycle.registry_watcher import RegistryWatcher
    from mlflow_pt_deploy.serving.lifecycle.served_model import ServedModel
    from mlflow_pt_deploy.serving.observability.metrics import Metrics
    from mlflow_pt_deploy.serving.rollout.canary.canary import Canary
    from mlflow_pt_deploy.serving.rsgi import RsgiAdapter

SERVING_VARIABLES = {
    # MLflow's own server sets it; the pyfunc and the flavor read it
    "_MLFLOW_IS_IN_SERVING_ENVIRONMENT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}
"""Environment variables of every process that serves."""

PATIENCE_VARIABLES = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "30"}
"""Environment variables that the user may set. A worker asks again every few seconds anyway, so it
waits less than MLflow's minutes and notices soon that the registry is back."""

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerJob:
    """Configuration of a worker; picklable.

    Attributes:
        models: Model arguments of the command line.
        model_config: Serving options of all models.
        settings: Server settings; the port is not 0.
        address: IP address to listen on.
        folder: The run directory.
        shares: CPU share of each worker.
        environment: Environment variables that locate the registry.
        main_pid: Process id of the main process.
        since: When the server started.
    """

    models: Sequence[str]
    model_config: Mapping[str, Any]
    settings: ServerSettings
    address: str
    folder: Path
    shares: Sequence[Share]
    environment: Mapping[str, str]
    main_pid: int
    since: str


def load_worker(job: WorkerJob) -> RsgiAdapter:
    """Build the RSGI application of this process.

    A worker that replaces another one loads its models before this returns, and so before it
    listens. Until then connections go to the other workers.
    """
    states = WorkerStates(job.folder, len(job.shares))
    index = states.claim()
    _prepare_process(job, states, index)
    from mlflow_pt_deploy.registry.served_copy import ServedCopies
    from mlflow_pt_deploy.serving.features import features_of_worker
    from mlflow_pt_deploy.serving.http.auth import auth_from_environment
    from mlflow_pt_deploy.serving.model_names import name_models
    from mlflow_pt_deploy.serving.observability.metrics import new_metrics
    from mlflow_pt_deploy.serving.platform import routes_from
    from mlflow_pt_deploy.serving.rsgi import RsgiAdapter
    from mlflow_pt_deploy.serving.watchdog import Watchdog

    settings = job.settings
    if len(job.shares) > 1:
        _share_devices(job, states)
    metrics = new_metrics()
    if predecessor := states.predecessor():
        metrics.forget_process(predecessor)
    served = states.served()
    copies = None if settings.no_copy else ServedCopies()
    models = name_models(
        job.models,
        job.model_config,
        metrics,
        served,
        copies=copies,
        cache_mb=settings.cache_mb,
        grace_s=settings.grace_s,
    )
    features = features_of_worker(models, settings, metrics, states, job.since)
    publisher = _StatePublisher(states, models, features.canaries, settings)
    watcher = new_watcher(
        models,
        settings,
        on_opened=publisher.opened,
        on_failed=publisher.failed,
        on_polled=publisher.publish,
        changed_at=states.registry_changed_at if auth_from_environment().webhook else None,
        beside=features.poll,
    )
    watchdog = Watchdog(
        models, states, job.main_pid, settings.hang_s, settings.grace_s, tick=metrics.sample
    )

    grpc_server: GrpcServer | None = None

    def start(loop: asyncio.AbstractEventLoop) -> None:
        watchdog.watch(application, loop)
        features.monitor.start()
        if grpc_server is not None:
            grpc_server.start(loop)

    def stop() -> None:
        if grpc_server is not None:
            grpc_server.close()  # first: its calls in flight still need the other parts
        watchdog.stop()
        watcher.stop()
        features.monitor.stop()

    application = new_application(
        models,
        settings,
        metrics,
        features,
        states=states,
        routes=routes_from(os.environ),
        is_listening=lambda: grpc_server is None or grpc_server.listening,
        on_start=start,
        on_stop=stop,
        on_registry_change=states.note_registry_change,
    )
    grpc_server = _grpc_server(application, job, states, publisher)
    watcher.start()
    if served:
        publisher.ready.wait()
    return RsgiAdapter(application)


def _share_devices(job: WorkerJob, states: WorkerStates) -> None:
    """Load models on GPUs once for all workers."""
    from mlflow_pt_deploy.serving.device.placement import DevicePlacement
    from mlflow_pt_deploy.serving.device.processes import DeviceProcesses
    from mlflow_pt_deploy.serving.model.loader import use_placement

    settings = job.settings
    cores = [core for share in job.shares for core in share.pinned]
    processes = DeviceProcesses(states, job.main_pid, settings.hang_s, settings.log_format, cores)
    use_placement(DevicePlacement(processes, len(job.shares)))


def new_application(
    models: Mapping[str, ServedModel],
    settings: ServerSettings,
    metrics: Metrics,
    features: Features,
    **parts: Any,
) -> Application:
    """An application with the settings of a server.

    Args:
        models: Models by name.
        settings: Server settings.
        metrics: Counts responses.
        features: What is done besides answering.
        **parts: Other arguments of `Application`.
    """
    from mlflow_pt_deploy.serving.app import Application
    from mlflow_pt_deploy.serving.http.auth import auth_from_environment
    from mlflow_pt_deploy.serving.observability.access_log import AccessLog
    from mlflow_pt_deploy.serving.observability.tracing import tracer_from_environment

    return Application(
        models,
        auth=auth_from_environment(),
        metrics=metrics,
        access_log=AccessLog() if settings.access_log else None,
        tracer=tracer_from_environment(),
        max_body_bytes=settings.max_body_bytes,
        hang_s=settings.hang_s,
        canaries=features.canaries,
        shadows=features.shadows,
        drift=features.drift,
        feedback=features.feedback,
        **parts,
    )


def new_watcher(
    models: Mapping[str, ServedModel], settings: ServerSettings, **callbacks: Any
) -> RegistryWatcher:
    """A registry watcher with the settings of a server; `callbacks`: see `RegistryWatcher`."""
    from mlflow_pt_deploy.serving.lifecycle.eviction import MemoryBudget
    from mlflow_pt_deploy.serving.lifecycle.registry_watcher import RegistryWatcher

    budget = MemoryBudget(settings.max_models, settings.max_memory_mb)
    return RegistryWatcher(list(models.values()), settings.poll_s, budget=budget, **callbacks)


def _grpc_server(
    application: Application, job: WorkerJob, states: WorkerStates, publisher: _StatePublisher
) -> GrpcServer | None:
    """The gRPC server of this worker, if there is to be one."""
    settings = job.settings
    if not settings.grpc_port:
        return None
    from mlflow_pt_deploy.serving.grpc_server import GrpcServer

    host = f"[{job.address}]" if ":" in job.address else job.address
    tls = None
    if settings.tls_cert:
        tls = Path(settings.tls_key).read_bytes(), Path(settings.tls_cert).read_bytes()

    def fail(error: Exception) -> None:
        publisher.failed(error)
        _logger.error("gRPC cannot listen on port %d: %s", settings.grpc_port, error)
        os._exit(1)

    return GrpcServer(
        application,
        f"{host}:{settings.grpc_port}",
        tls=tls,
        max_body_bytes=settings.max_body_bytes,
        max_calls=max(1, settings.max_connections // len(job.shares)),
        idle_s=settings.keep_alive_s,
        grace_s=settings.grace_s,
        stopping=lambda: states.stopping,
        on_failed=fail,
    )


class _StatePublisher:
    """Writes the state of this worker to the run directory."""

    def __init__(
        self,
        states: WorkerStates,
        models: Mapping[str, ServedModel],
        canaries: Mapping[str, Canary],
        settings: ServerSettings,
    ) -> None:
        self._states = states
        self._models = models
        self._canaries = canaries
        self._settings = settings
        self.ready = threading.Event()
        self._banner: Sequence[str] = ()
        self._lock = threading.Lock()

    def opened(self) -> None:
        """Record that all models are loaded, or left unloaded within the memory budget."""
        self._banner = _banner(self._models, self._settings)
        self.publish()
        self.ready.set()

    def failed(self, error: Exception) -> None:
        """Record that a model cannot be opened."""
        self._states.write({"failed": str(explain_load_error(error))})
        self.ready.set()

    def publish(self) -> None:
        """Write the state file."""
        with self._lock:  # models are polled on several threads
            self._states.write(self._state())

    def _state(self) -> dict[str, Any]:
        versions = {name: model.current for name, model in self._models.items()}
        return {
            "ready": True,
            "banner": list(self._banner),
            "served": {
                name: {"spec": asdict(version.spec), "version": asdict(version.resolved)}
                for name, version in versions.items()
                if version
            },
            "models": {
                name: model.status() | {"canary": self._canaries[name].status()}
                for name, model in self._models.items()
            },
        }


def _prepare_process(job: WorkerJob, states: WorkerStates, index: int) -> None:
    """Set signals, CPU share, folders and logging before any library is imported."""
    import signal

    from mlflow_pt_deploy.serving.observability.server_log import configure_log, log_granian

    os.setpgid(0, 0)  # Ctrl-C in a terminal reaches the main process only
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a fork inherits the main process's handler
    # elsewhere the watchdog notices it. SIGTERM does not do: granian's handler waits, with the GIL
    # held, for a worker whose pipe to the main process is gone
    signal_at_parent_death(signal.SIGKILL)
    share = job.shares[index % len(job.shares)]
    if share.pinned:
        os.sched_setaffinity(0, share.pinned)
    defaults = {**dict.fromkeys(THREAD_VARIABLES, str(share.cores)), **PATIENCE_VARIABLES}
    os.environ.update(
        {
            **{name: value for name, value in defaults.items() if name not in os.environ},
            **job.environment,
            CORES_ENV: str(share.cores),
            "TMPDIR": str(states.scratch),
            "PROMETHEUS_MULTIPROC_DIR": str(job.folder / "metrics"),
            **SERVING_VARIABLES,
        }
    )
    tempfile.tempdir = None  # drop the main process's cached value
    sys.setswitchinterval(SWITCH_S)
    replica = index if len(job.shares) > 1 else None
    configure_log(job.settings.log_format, replica)
    log_granian()


def _banner(models: Mapping[str, ServedModel], settings: ServerSettings) -> list[str]:
    """The startup banner."""
    from mlflow_pt_deploy.serving.model.inputs import EXAMPLES

    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    url = f"http{'s' if settings.tls_cert else ''}://{host}:{settings.port}"
    first = next(iter(models.values()))
    assert first.current is not None
    row = EXAMPLES[first.current.pyfunc.loaded.preprocessor.column]
    example = f"""-H 'Content-Type: application/json' -d '{{"inputs": ["{row}"]}}'"""
    grpc = [f"  gRPC on {host}:{settings.grpc_port}"] if settings.grpc_port else []
    return [
        f"{first.current.name} on {url}   try: curl {url}/invocations {example}",
        *(f"  {_describe(model, settings.poll_s)}" for model in models.values()),
        *grpc,
    ]


def _describe(model: ServedModel, poll_s: float) -> str:
    """One line of the banner: the version served under a name, and its limits."""
    version = model.current
    if version is None:
        assert model.unloaded is not None
        return f"/models/{model.name}: {model.uri}, loaded on demand ({model.unloaded.reason})"
    options = version.pyfunc.options
    copied = ""
    if version.copied_at:
        copied = f" (from the copy of {version.copied_at}: the registry does not answer)"
    followed = version.resolved.uri != model.uri and poll_s
    follows = f", follows {model.uri} every {poll_s:g} s" if followed else ""
    return (
        f"/models/{model.name}: {version.name}, version {version.label}{copied}{follows}; "
        f"{version.pyfunc.loaded.device}, {options.num_threads or usable_cores()} threads a call, "
        f"batches up to {options.max_batch_rows} rows and {options.max_batch_tokens} tokens, "
        f"queue of {options.queue_rows} rows, deadline {options.deadline_ms:g} ms"
    )
