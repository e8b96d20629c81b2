"""Main process of ``pt-deploy serve``: runs granian, its workers and their shutdown.

Imports neither MLflow nor NumPy: workers are forked from it and must set their CPU share first.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from granian.constants import HTTPModes, Interfaces, Loops, SSLProtocols
from granian.http import HTTP1Settings
from granian.log import LogLevels
from granian.server import Server as GranianServer

from mlflow_pt_deploy.errors import ServingError
from mlflow_pt_deploy.registry.addresses import registry_variables
from mlflow_pt_deploy.serving.monitoring.feedback_store import create_store
from mlflow_pt_deploy.serving.observability.server_log import log_granian, server_log
from mlflow_pt_deploy.serving.port import hold_port
from mlflow_pt_deploy.serving.settings import ServerSettings
from mlflow_pt_deploy.serving.worker import WorkerJob, load_worker
from mlflow_pt_deploy.serving.worker_state import WorkerStates, new_run_folder
from mlflow_pt_deploy.system.clock import now
from mlflow_pt_deploy.system.cpu_allocation import Share

ReadyCallback = Callable[[Sequence[str]], None]

RESTART_BACKOFF_S, MAX_RESTART_BACKOFF_S = 1.0, 60.0
_POLL_S = 0.02

_logger = logging.getLogger(__name__)


def run_server(
    models: Sequence[str],
    model_config: Mapping[str, Any] | None,
    settings: ServerSettings,
    shares: Sequence[Share],
    on_ready: ReadyCallback,
) -> None:
    """Serve until SIGTERM or SIGINT.

    Args:
        models: Model arguments of the command line.
        model_config: Serving options of all models.
        settings: Where and how to listen.
        shares: CPU share of each worker.
        on_ready: Called with the startup banner once all workers are ready.

    Raises:
        ServingError: The port is taken, or a model cannot be opened at the first start.
    """
    with server_log(settings.log_format), ExitStack() as stack:
        held = [stack.enter_context(each) for each in hold_port(settings.host, settings.port)]
        if settings.grpc_port:
            for each in hold_port(settings.host, settings.grpc_port, "--grpc-port"):
                stack.enter_context(each)
        folder = new_run_folder()
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        address = held[0].getsockname()
        (folder / "metrics").mkdir()
        if settings.feedback_rows:
            create_store(folder)
        job = WorkerJob(
            list(models),
            dict(model_config or {}),
            replace(settings, port=address[1]),
            address[0],
            folder,
            list(shares),
            registry_variables(),
            os.getpid(),
            now(),
        )
        _MainProcess(job, on_ready).run()


class _MainProcess:
    """Runs granian until a signal stops it; starts it again if its workers crash in a loop."""

    def __init__(self, job: WorkerJob, on_ready: ReadyCallback) -> None:
        self._job = job
        self._on_ready = on_ready
        self._states = WorkerStates(job.folder, len(job.shares))
        self._stopping = threading.Event()
        self._announced = False
        self._failure = ""
        self._granian: Any = None

    def run(self) -> None:
        backoff_s = RESTART_BACKOFF_S
        while not self._stopping.is_set():
            started = time.monotonic()
            self._granian = self._new_granian()
            try:
                self._granian.serve(
                    target_loader=partial(load_worker, self._job), wrap_loader=False
                )
            except SystemExit:  # granian gave up on workers that crash again and again
                if not self._announced:
                    self._failure = self._failure or "no worker could start; the log says why"
                    break
                if time.monotonic() - started > MAX_RESTART_BACKOFF_S:
                    backoff_s = RESTART_BACKOFF_S
                _logger.error("workers crashed repeatedly; restart in %g s", backoff_s)
                self._stopping.wait(backoff_s)
                backoff_s = min(2 * backoff_s, MAX_RESTART_BACKOFF_S)
        if self._failure:
            raise ServingError(self._failure)

    def _new_granian(self) -> Any:
        settings = self._job.settings
        workers = len(self._job.shares)
        server = GranianServer(
            "mlflow_pt_deploy.serving.worker:load_worker",
            address=self._job.address,
            port=settings.port,
            interface=Interfaces.RSGI,
            workers=workers,
            loop=Loops.auto,
            http=HTTPModes.http1,
            websockets=False,
            backlog=max(128, settings.max_connections),
            backpressure=max(1, settings.max_connections // workers),
            http1_settings=HTTP1Settings(header_read_timeout=round(settings.keep_alive_s * 1000)),
            log_level=LogLevels.warning,
            log_dictconfig={"loggers": {"_granian": {"handlers": [], "level": "WARNING"}}},
            ssl_cert=Path(settings.tls_cert) if settings.tls_cert else None,
            ssl_key=Path(settings.tls_key) if settings.tls_key else None,
            ssl_protocol_min=SSLProtocols.tls12,
            respawn_failed_workers=True,
            workers_kill_timeout=max(1, round(settings.grace_s)),
        )
        log_granian()
        server.on_startup(self._take_signals)
        return server

    def _take_signals(self) -> None:
        """Install signal handlers; after granian installed its own, before it starts workers."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        threading.Thread(target=self._wait_until_ready, daemon=True).start()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """SIGTERM drains, SIGINT skips the drain; a second signal kills the workers."""
        again = self._stopping.is_set()
        self._stopping.set()
        if again:
            self._stop_granian()
            for worker in self._granian.wrks:
                worker.kill()
        elif number == signal.SIGINT:
            self._stop_granian()
        else:
            threading.Thread(target=self._drain, daemon=True).start()

    def _drain(self) -> None:
        self._states.start_draining()
        time.sleep(self._job.settings.drain_s)
        self._stop_granian()

    def _stop_granian(self) -> None:
        self._states.start_stopping()
        self._granian.signal_handler_interrupt()

    def _wait_until_ready(self) -> None:
        while not (self._stopping.is_set() or self._announced):
            if failure := self._states.failure():
                self._failure = failure
                self._stopping.set()
                self._stop_granian()
            elif self._states.started():
                self._announced = True
                self._on_ready(self._states.read()[0]["banner"])
            time.sleep(_POLL_S)
