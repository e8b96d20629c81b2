"""``pt-deploy serve`` in one process: its port, its watcher, its first words and its end.

Knows uvicorn; what is answered is the `app`'s business, and who its neighbours are the `parent`'s.
"""

from __future__ import annotations

import asyncio
import os
import re
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn

from mlflow_pt_deploy.environment import environment
from mlflow_pt_deploy.errors import ServingError
from mlflow_pt_deploy.hardware import usable_cores
from mlflow_pt_deploy.serving.access import AccessLog
from mlflow_pt_deploy.serving.app import App
from mlflow_pt_deploy.serving.files import room_for_loans
from mlflow_pt_deploy.serving.front import missing, open_front
from mlflow_pt_deploy.serving.guard import guard_from_environment
from mlflow_pt_deploy.serving.log import Say
from mlflow_pt_deploy.serving.loop import SWITCH_S
from mlflow_pt_deploy.serving.metrics import Metrics, best_metrics
from mlflow_pt_deploy.serving.port import several_handles, take_port
from mlflow_pt_deploy.serving.registry import Served, in_words, source
from mlflow_pt_deploy.serving.room import Room
from mlflow_pt_deploy.serving.rows import EXAMPLES
from mlflow_pt_deploy.serving.serve import NAMED
from mlflow_pt_deploy.serving.served import with_served
from mlflow_pt_deploy.serving.settings import Settings
from mlflow_pt_deploy.serving.siblings import Seat
from mlflow_pt_deploy.serving.slot import Slot
from mlflow_pt_deploy.serving.spans import spans_from_environment
from mlflow_pt_deploy.serving.watcher import Watcher
from mlflow_pt_deploy.sigterm import on_sigterm

_LOOK_S = 0.05


def build_server(
    models: Sequence[str],
    model_config: Mapping[str, Any] | None,
    settings: Settings,
    say: Say,
    seat: Seat | None = None,
) -> Server:
    """A server that does not run yet.

    Args:
        models: Words of the command line, see `serve.serve`.
        model_config: Serving options of all of them.
        settings: Where and how it listens.
        say: Told when all models are ready.
        seat: Its place among the replicas, where it is one.

    Raises:
        ServingError: An option is wrong; names it.
    """
    metrics = best_metrics()
    slots = name_slots(models, model_config, metrics, seat.served if seat else None)
    app = App(
        slots,
        spans=spans_from_environment(),
        guard=guard_from_environment(),
        metrics=metrics,
        access=AccessLog() if settings.access_log else None,
        max_body_bytes=int(settings.max_body_mb * 2**20),
        siblings=seat.siblings if seat else None,
        hang_s=settings.hang_s,
    )
    return Server(app, slots, settings, say, seat)


def run_server(server: Server) -> None:
    """Serve until told to stop.

    Raises:
        ServingError: The port is taken, or the address is not this machine's.
        TrackingError: A model cannot be found or fetched.
        PtDeployError: A model may not serve.
    """
    # Uvicorn raises SIGTERM again when all is done; the status shall be 0.
    with on_sigterm(lambda: None), _fair_threads(), _serving_environment():
        settings = server.settings
        sockets = server.seat.sockets if server.seat else take_port(settings.host, settings.port)
        server.run(several_handles(sockets))
    if server.app.spans is not None:
        server.app.spans.close()
    if server.failure is not None:
        raise in_words(server.failure) from server.failure


def name_slots(
    models: Sequence[str],
    model_config: Mapping[str, Any] | None = None,
    metrics: Metrics | None = None,
    served: Mapping[str, Served] | None = None,
) -> dict[str, Slot]:
    """A slot for each word of the command line, under the name it has or is given.

    `served` is what answered before under these names.

    Raises:
        ServingError: No models, two of one name, or a wrong option.
    """
    slots: dict[str, Slot] = {}
    for word in models:
        named = NAMED.fullmatch(word)
        name, uri = (named[1], named[2]) if named else (_name(word), word)
        if name in slots:
            raise ServingError(f"two models are called {name}; name them: {name}=... other=...")
        before = (served or {}).get(name)
        slots[name] = Slot(name, source(uri, model_config), metrics=metrics, before=before)
    if not slots:
        raise ServingError("there is nothing to serve; give models:/NAME@champion")
    return slots


def _name(uri: str) -> str:
    """The registered model's name, or the last part of a path, as a part of a URL."""
    registered = re.fullmatch(r"models:/+([^/@]+)(?:[/@].*)?", uri)
    name = registered[1] if registered else uri.rstrip("/").rpartition("/")[2]
    return re.sub(r"[^\w.-]", "-", name.removeprefix("@")) or "model"


class Server(uvicorn.Server):
    """Listens first, loads then, and says so when it is ready; a late replica loads first.

    Attributes:
        app: What answers.
        seat: Its place among the replicas, or None.
        settings: As given.
        failure: Why it ended, where a model could not be opened.
    """

    def __init__(
        self, app: App, slots: Mapping[str, Slot], settings: Settings, say: Say, seat: Seat | None
    ) -> None:
        super().__init__(_config(app, settings))
        self.app = app
        self.seat = seat
        self.failure: Exception | None = None
        self._say = say
        self._opened = False
        self.settings = settings
        self._slots = slots
        self._watcher = Watcher(
            list(slots.values()),
            settings.poll_s,
            room=Room(settings.max_models, settings.max_memory_mb),
            opened=self._open,
            failed=self._fail,
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        if self.seat is not None:
            await self.seat.siblings.listen(with_served(self.app.own, self._slots))
            if self.seat.late:
                self._watcher.start()
                while not self._opened:
                    if self.should_exit:
                        return
                    await asyncio.sleep(_LOOK_S)
        loans = room_for_loans(self.settings.max_connections)
        state = self.server_state
        self.app.front = open_front(self.app.quick, lambda: state.default_headers, loans)
        await super().startup(sockets)
        if self.seat is not None and self.seat.late:
            self._say(self._first_words())
        elif self.started:
            self._watcher.start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._watcher.stop()
        await super().shutdown(sockets)
        if self.app.front is not None:
            self.app.front.close()
        if self.seat is not None:
            self.seat.siblings.close()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.seat is None:
            super().handle_exit(sig, frame)
        else:  # the terminal tells all processes; to be told twice is nothing special here
            self.should_exit = True

    def _open(self) -> None:
        self._opened = True
        if self.seat is None or not self.seat.late:
            self._say(self._first_words())

    def _fail(self, error: Exception) -> None:
        self.failure = error
        self.should_exit = True

    def _first_words(self) -> list[str]:
        port = self.servers[0].sockets[0].getsockname()[1]
        host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
        url = f"http{'s' if self.config.is_ssl else ''}://{host}:{port}"
        first = next(iter(self._slots.values()))
        assert first.current is not None
        row = EXAMPLES[first.current.pyfunc.loaded.preprocessor.column]
        example = f"""-H 'Content-Type: application/json' -d '{{"inputs": ["{row}"]}}'"""
        poll_s = self.settings.poll_s
        return [
            f"{first.current.name} on {url}   try: curl {url}/invocations {example}",
            *(f"  {describe(slot, poll_s)}" for slot in self._slots.values()),
            *(f"  {note}" for note in [missing()] if note),
        ]


def _config(app: App, settings: Settings) -> uvicorn.Config:
    return uvicorn.Config(
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
        from mlflow_pt_deploy.serving.connection import Connection
    except ModuleNotFoundError:
        return "h11"
    return Connection


@contextmanager
def _fair_threads() -> Iterator[None]:
    """Let the event loop's thread and the models' take turns often."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_S)
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
    with environment(**{name: it for name, it in wanted.items() if name not in os.environ}):
        yield
