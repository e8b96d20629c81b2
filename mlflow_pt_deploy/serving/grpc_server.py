"""The gRPC server of a worker, on the worker's event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

import grpc

from mlflow_pt_deploy.serving.grpc_adapter import GrpcAdapter

if TYPE_CHECKING:
    from mlflow_pt_deploy.serving.app import Application

_POLL_S = 0.1


class GrpcServer:
    """Serves an `Application` over gRPC on the event loop of a worker.

    Args:
        application: Answers the requests.
        address: Host and port.
        tls: PEM private key and certificate chain, or None.
        max_body_bytes: Longest message.
        max_calls: Most concurrent calls.
        idle_s: Seconds after which an idle connection is closed.
        grace_s: Seconds that calls in flight have to finish.
        stopping: Whether the server is shutting down.
        on_failed: Called if the port cannot be listened on.

    Attributes:
        listening: Whether calls are accepted.
    """

    def __init__(
        self,
        application: Application,
        address: str,
        *,
        tls: tuple[bytes, bytes] | None,
        max_body_bytes: int,
        max_calls: int,
        idle_s: float,
        grace_s: float,
        stopping: Callable[[], bool],
        on_failed: Callable[[Exception], None],
    ) -> None:
        self._application = application
        self._address = address
        self._tls = tls
        self._max_calls = max_calls
        self._grace_s = grace_s
        self._stopping = stopping
        self._on_failed = on_failed
        self._options = [
            ("grpc.so_reuseport", 1),
            ("grpc.max_receive_message_length", max_body_bytes),
            ("grpc.max_connection_idle_ms", round(max(1.0, idle_s) * 1000)),
        ]
        self._closing = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self.listening = False

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Listen as soon as the event loop runs."""
        self._loop, self._task = loop, loop.create_task(self._serve())

    def close(self) -> None:
        """Wait for calls in flight, if the event loop has ended before them."""
        self._closing = True
        if self._loop is not None and self._task is not None and not self._loop.is_running():
            self._loop.run_until_complete(self._task)

    async def _serve(self) -> None:
        server = grpc.aio.server(options=self._options, maximum_concurrent_rpcs=self._max_calls)
        server.add_generic_rpc_handlers((GrpcAdapter(self._application).handler(),))
        try:
            if self._tls is None:
                server.add_insecure_port(self._address)
            else:
                server.add_secure_port(self._address, grpc.ssl_server_credentials([self._tls]))
            await server.start()
        except RuntimeError as error:
            self._on_failed(error)
            return
        self.listening = True
        while not (self._closing or self._stopping()):
            await asyncio.sleep(_POLL_S)
        self.listening = False
        await server.stop(self._grace_s)
