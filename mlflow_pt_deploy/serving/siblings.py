"""One answer for the whole server, whichever replica is asked.

Each replica tells at its Unix socket what it would answer by itself; whoever is asked by a client
asks the others, for a second at most. Nothing is kept in between, so nothing can be out of date.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlflow_pt_deploy.registry.addresses import Served
from mlflow_pt_deploy.serving.heard import PATIENCE_S, Heard, ask_replica, socket_of
from mlflow_pt_deploy.serving.http.mlflow_protocol import Answer

_NOT_READY = "TEMPORARILY_UNAVAILABLE"


class Siblings:
    """The replicas of a server, seen from one of them.

    Args:
        folder: Where all of them have their sockets; nobody else may enter it.
        index: Which of them this is, from 0.
        count: How many there are.
    """

    def __init__(self, folder: Path, index: int, count: int) -> None:
        self.index = index
        self._paths = [socket_of(folder, at) for at in range(count)]
        self._server: asyncio.Server | None = None

    async def listen(self, own: Callable[[str], Answer]) -> None:
        """Tell the others from now on what `own` answers to a path."""

        async def reply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with suppress(OSError, TimeoutError):
                async with asyncio.timeout(PATIENCE_S):
                    path = (await reader.readline()).decode().rstrip("\n")
                    answer = own(path)
                    writer.write(b"%d %d\n" % (answer.status, os.getpid()) + answer.body)
                    await writer.drain()
            writer.close()

        path = self._paths[self.index]
        path.unlink(missing_ok=True)  # of the one before, which was killed
        self._server = await asyncio.start_unix_server(reply, path)

    def close(self) -> None:
        """Tell them nothing more."""
        if self._server is not None:
            self._server.close()

    async def whole(self, path: str, own: Answer) -> Answer:
        """What the server as a whole answers to `path`; this replica by itself answers `own`."""
        mine = Heard(own.status, os.getpid(), own.body)
        heard = await asyncio.gather(
            *(ask_replica(at, path) for at in self._paths if at != self._paths[self.index])
        )
        heard.insert(self.index, mine)
        if path in ("/ping", "/health", "/readyz"):
            return _ready(path, own, heard)
        if own.status != 200:
            return own
        if path == "/metrics":
            from mlflow_pt_deploy.serving.observability.prometheus import join_series

            texts = [each and each.body for each in heard]
            return own._replace(body=await asyncio.to_thread(join_series, texts))
        return own._replace(body=json.dumps(_about(self.index, heard)).encode())


@dataclass(frozen=True)
class Seat:
    """What one of several replicas has that a server alone has not.

    Attributes:
        siblings: The others.
        sockets: At the port that all of them share.
        late: Load first and listen then, because the others serve already.
        served: What is known to have answered last, by the names of models.
    """

    siblings: Siblings
    sockets: Sequence[socket.socket]
    late: bool
    served: Mapping[str, Served]


def _ready(path: str, own: Answer, heard: Sequence[Heard | None]) -> Answer:
    """Ready only if all are: the kernel, not the client, chooses who answers the next request."""
    missing = [at for at, each in enumerate(heard) if each is None or each.status != 200]
    if not missing:
        return own
    body = json.dumps({"status": "loading", "replicas": missing}).encode()
    return Answer(503, body if path == "/readyz" else own.body, _NOT_READY)


def _about(index: int, heard: Sequence[Heard | None]) -> Any:
    """The pages of all, beside the facts of the one that was asked."""
    pages = [json.loads(each.body) if each and each.status == 200 else None for each in heard]
    mine = pages[index]
    if not isinstance(mine, list):
        return _with_replicas(index, heard, pages)
    return [
        _with_replicas(index, heard, [page and page[model] for page in pages])
        for model in range(len(mine))
    ]


def _with_replicas(
    index: int, heard: Sequence[Heard | None], pages: Sequence[dict[str, Any] | None]
) -> dict[str, Any]:
    replicas = [
        {"replica": at, "answers": bool(page), "pid": each and each.pid, **(page or {})}
        for at, (each, page) in enumerate(zip(heard, pages, strict=True))
    ]
    return {**(pages[index] or {}), "replica": index, "replicas": replicas}
