"""``pt-deploy serve`` as a process: its port, its watcher, its first words and its end.

Knows uvicorn; what is answered is the `app`'s business.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn

from mlflow_pt_deploy.errors import PtDeployError, ServingError, TrackingError
from mlflow_pt_deploy.hardware import usable_cores
from mlflow_pt_deploy.serving.access import AccessLog
from mlflow_pt_deploy.serving.app import App
from mlflow_pt_deploy.serving.guard import check_exposure, guard_from_environment
from mlflow_pt_deploy.serving.metrics import Metrics, best_metrics
from mlflow_pt_deploy.serving.registry import source
from mlflow_pt_deploy.serving.room import Room
from mlflow_pt_deploy.serving.rows import EXAMPLES
from mlflow_pt_deploy.serving.slot import Slot
from mlflow_pt_deploy.serving.spans import spans_from_environment
from mlflow_pt_deploy.serving.watcher import Watcher

_NAMED = re.compile(r"([A-Za-z0-9][\w.-]*)=(.+)")
_SWITCH_S = 0.5e-3
_LOG_FORMAT = "%(asctime)s %(levelname)s %(message)s"


@dataclass(frozen=True)
class Settings:
    """Where and how a server listens.

    Attributes:
        host: Address to listen on; only this machine by default.
        port: TCP port; 0 takes a free one.
        poll_s: Seconds between looks at the registry; 0: serve what was found at the start.
        grace_s: Seconds that requests in flight have to finish after the server was told to stop.
        access_log: Write a line of JSON for each request to standard error.
        insecure: Listen beyond this machine though no token is set.
        tls_cert: A PEM file with the certificate and its chain; with `tls_key`, the server speaks
            HTTPS and nothing else.
        tls_key: A PEM file with its key.
        max_body_mb: Longest request body.
        max_connections: Most connections at a time; more are answered with 503.
        max_models: Most models in memory, see `serving.room.Room`; the least recently used goes.
        max_memory_mb: The process's resident memory above which models go, likewise.
    """

    host: str = "127.0.0.1"
    port: int = 5000
    poll_s: float = 5.0
    grace_s: int = 30
    access_log: bool = False
    insecure: bool = False
    tls_cert: str = ""
    tls_key: str = ""
    max_body_mb: float = 4.0
    max_connections: int = 1024
    max_models: int = 0
    max_memory_mb: float = 0.0

    def __post_init__(self) -> None:
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ServingError("tls_cert and tls_key belong together; give both, or neither")
        for path in filter(None, (self.tls_cert, self.tls_key)):
            if not os.access(path, os.R_OK):
                raise ServingError(f"{path} cannot be read; give a PEM file")
        for name in ("poll_s", "grace_s"):
            if getattr(self, name) < 0:
                raise ServingError(f"{name} is {getattr(self, name)}; give seconds from 0 on")
        if self.max_body_mb <= 0 or self.max_connections < 1:
            raise ServingError("max_body_mb and max_connections must be above 0")
        Room(self.max_models, self.max_memory_mb)  # checks them


def serve(*models: str, model_config: Mapping[str, Any] | None = None, **settings: Any) -> None:
    """Serve models until told to stop, and follow their addresses in the registry.

    Args:
        *models: Anything that MLflow loads (``models:/NAME@champion``, a run's model, a folder),
            ``@FILE`` (see `registry.source`), or either with a name of your own before it:
            ``NAME=URI``. The first answers ``/invocations``, each ``/models/NAME/invocations``.
        model_config: Serving options of all models, see `serving.options.Options`.
        **settings: See `Settings`.

    Raises:
        ServingError: An option is wrong; names it.
        TrackingError: A model cannot be found or fetched.
        PtDeployError: A model may not serve.
    """
    chosen, guard, metrics = Settings(**settings), guard_from_environment(), best_metrics()
    check_exposure(chosen.host, guard, chosen.insecure)
    slots = name_slots(models, model_config, metrics)
    spans = spans_from_environment()
    app = App(
        slots,
        spans=spans,
        guard=guard,
        metrics=metrics,
        access=AccessLog() if chosen.access_log else None,
        max_body_bytes=int(chosen.max_body_mb * 2**20),
    )
    server = _Server(app, slots, chosen)
    with _our_log(), _quiet_end(), _fair_threads(), _serving_environment():
        server.run()
    if spans is not None:
        spans.close()
    if server.failure is not None:
        raise _in_words(server.failure) from server.failure


def name_slots(
    models: Sequence[str],
    model_config: Mapping[str, Any] | None = None,
    metrics: Metrics | None = None,
) -> dict[str, Slot]:
    """A slot for each word of the command line, under the name it has or is given.

    Raises:
        ServingError: No models, two of one name, or a wrong option.
    """
    slots: dict[str, Slot] = {}
    for word in models:
        named = _NAMED.fullmatch(word)
        name, uri = (named[1], named[2]) if named else (_name(word), word)
        if name in slots:
            raise ServingError(f"two models are called {name}; name them: {name}=... other=...")
        slots[name] = Slot(name, source(uri, model_config), metrics=metrics)
    if not slots:
        raise ServingError("there is nothing to serve; give models:/NAME@champion")
    return slots


def _name(uri: str) -> str:
    """The registered model's name, or the last part of a path, as a part of a URL."""
    registered = re.fullmatch(r"models:/+([^/@]+)(?:[/@].*)?", uri)
    name = registered[1] if registered else uri.rstrip("/").rpartition("/")[2]
    return re.sub(r"[^\w.-]", "-", name.removeprefix("@")) or "model"


class _Server(uvicorn.Server):
    """Listens first, loads then, and says so when it is ready."""

    def __init__(self, app: App, slots: Mapping[str, Slot], settings: Settings) -> None:
        config = uvicorn.Config(
            app,
            host=settings.host,
            port=settings.port,
            lifespan="off",
            ws="none",
            http=_http(),
            access_log=False,
            log_level="warning",
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=settings.grace_s,
            limit_concurrency=settings.max_connections,
            ssl_certfile=settings.tls_cert or None,
            ssl_keyfile=settings.tls_key or None,
        )
        super().__init__(config)
        self.failure: Exception | None = None
        self._settings = settings
        self._slots = slots
        self._watcher = Watcher(
            list(slots.values()),
            settings.poll_s,
            room=Room(settings.max_models, settings.max_memory_mb),
            opened=self._say,
            failed=self._fail,
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._watcher.start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._watcher.stop()
        await super().shutdown(sockets)

    def _fail(self, error: Exception) -> None:
        self.failure = error
        self.should_exit = True

    def _say(self) -> None:
        port = self.servers[0].sockets[0].getsockname()[1]
        host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
        url = f"http{'s' if self.config.is_ssl else ''}://{host}:{port}"
        first = next(iter(self._slots.values()))
        assert first.current is not None
        row = EXAMPLES[first.current.pyfunc.loaded.preprocessor.column]
        example = f"""-H 'Content-Type: application/json' -d '{{"inputs": ["{row}"]}}'"""
        print(f"{first.current.name} on {url}   try: curl {url}/invocations {example}", flush=True)
        for slot in self._slots.values():
            print(f"  {describe(slot, self._settings.poll_s)}", flush=True)


def describe(slot: Slot, poll_s: float) -> str:
    """What serves in a slot and within which limits, in one line."""
    version = slot.current
    if version is None:
        assert slot.unloaded is not None
        return f"/models/{slot.name}: {slot.uri}, loaded when asked for ({slot.unloaded.reason})"
    options = version.pyfunc.options
    followed = version.address.uri != slot.uri and poll_s
    follows = f", follows {slot.uri} every {poll_s:g} s" if followed else ""
    return (
        f"/models/{slot.name}: {version.name}, version {version.label}{follows}; "
        f"{options.device}, {options.num_threads or usable_cores()} threads a call, batches up to "
        f"{options.max_batch_rows} rows and {options.max_batch_tokens} tokens, queue of "
        f"{options.queue_rows} rows, deadline {options.deadline_ms:g} ms"
    )


def _http() -> Any:
    """The parser in C with our limits; without the extra `serve`, h11, which has its own."""
    try:
        from mlflow_pt_deploy.serving.connection import BoundedProtocol
    except ModuleNotFoundError:
        return "h11"
    return BoundedProtocol


def _in_words(error: Exception) -> PtDeployError:
    if isinstance(error, PtDeployError):
        return error
    line = next(iter(str(error).splitlines()), type(error).__name__)
    return TrackingError(
        f"the model cannot be fetched: {line} Look at the address, and at MLFLOW_TRACKING_URI."
    )


@contextmanager
def _our_log() -> Iterator[None]:
    """Our own log on standard error, unless the program that calls us has set up logging."""
    logger = logging.getLogger("mlflow_pt_deploy")
    if logging.getLogger().handlers or logger.handlers:
        yield
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(_LOG_FORMAT))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)


@contextmanager
def _fair_threads() -> Iterator[None]:
    """Let the event loop's thread and the models' take turns often.

    Python lets a busy thread go on for 5 ms while others wait; a model then waits ten times as long
    for its turn as it computes.
    """
    before = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_S)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


@contextmanager
def _serving_environment() -> Iterator[None]:
    """What MLflow's own server sets, which the pyfunc and the flavor read."""
    wanted = {
        "_MLFLOW_IS_IN_SERVING_ENVIRONMENT": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    }
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


@contextmanager
def _quiet_end() -> Iterator[None]:
    """Let SIGTERM end the server with status 0: uvicorn raises it again when all is done."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
