"""Swaps and killed workers under load: how many requests are lost, and what a swap costs.

    python benchmarks/swaps.py --first FOLDER --second FOLDER --swaps 30 --kills 3

Registers two saved models as versions of one, serves ``models:/NAME@champion`` with two workers,
and moves the alias again and again while keep-alive clients send one row at a time. Then it kills
workers with SIGKILL. A request is *failed* if it is answered with anything but 200; *cut* if its
connection ended without an answer. Only a killed worker may cut requests, at most one a connection.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import os
import signal
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from servers import machine, running

NAME = "swaps"
_POLL_S = 0.5
_SETTLE_S = 3.0
_AFTER_KILL_S = 12.0
_WORKER_BYTES = 100e6


@dataclass
class Seen:
    """What one client saw.

    Attributes:
        answers: (start by `time.monotonic`, seconds, version) of each answer with status 200.
        failed: (start, status) of each other answer.
        cut: Start of each request whose connection ended without an answer.
    """

    answers: list[tuple[float, float, str]] = field(default_factory=list)
    failed: list[tuple[float, int]] = field(default_factory=list)
    cut: list[float] = field(default_factory=list)


class KeepAliveClient(threading.Thread):
    """Sends one request after the other on a keep-alive connection, and connects again if cut."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self._address = urlsplit(url)
        self._stop_now = threading.Event()

    def next_request(self) -> tuple[str, str, str]:
        """Path, media type and body of the next request."""
        raise NotImplementedError

    def on_answer(self, start: float, status: int, version: str) -> None:
        """Take an answer to the request that began at `start`."""
        raise NotImplementedError

    def on_cut(self, start: float) -> None:
        """Take the end of a connection without an answer."""
        raise NotImplementedError

    def run(self) -> None:
        connection = self._connect()
        while not self._stop_now.is_set():
            path, media, body = self.next_request()
            start = time.monotonic()
            try:
                connection.request("POST", path, body, {"Content-Type": media})
                response = connection.getresponse()
                response.read()
            except (OSError, http.client.HTTPException):
                self.on_cut(start)
                connection.close()
                connection = self._connect()
                continue
            self.on_answer(start, response.status, response.headers.get("x-model-version", ""))
        connection.close()

    def end(self) -> None:
        """Stop after the current request."""
        self._stop_now.set()
        self.join(60)

    def _connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection(
            self._address.hostname or "", self._address.port, timeout=60
        )


class Client(KeepAliveClient):
    """Sends one text, every hundredth time another, and keeps what it saw."""

    def __init__(self, url: str, text: str, rare: str = "") -> None:
        super().__init__(url)
        texts = [text] * 99 + [rare or text]
        self._bodies = itertools.cycle([json.dumps({"inputs": [each]}) for each in texts])
        self.seen = Seen()

    def next_request(self) -> tuple[str, str, str]:
        """See `KeepAliveClient`."""
        return "/invocations", "application/json", next(self._bodies)

    def on_answer(self, start: float, status: int, version: str) -> None:
        """See `KeepAliveClient`."""
        if status == 200:
            self.seen.answers.append((start, time.monotonic() - start, version))
        else:
            self.seen.failed.append((start, status))

    def on_cut(self, start: float) -> None:
        """See `KeepAliveClient`."""
        self.seen.cut.append(start)


def register(folder: Path, models: Sequence[Path]) -> list[str]:
    """Log saved models as versions of `NAME`, in a tracking store in `folder`."""
    import mlflow

    from mlflow_pt_deploy import flavor

    store = f"sqlite:///{folder}/mlflow.db"
    os.environ["MLFLOW_TRACKING_URI"] = os.environ["MLFLOW_REGISTRY_URI"] = store
    mlflow.set_tracking_uri(store)
    experiment = mlflow.create_experiment(NAME, f"file://{folder}/artifacts")
    versions = []
    for model in models:
        with mlflow.start_run(experiment_id=experiment):
            info = flavor.log_model(model, NAME, registered_model_name=NAME)
        versions.append(str(info.registered_model_version))
    return versions


def workers_of(pid: int) -> list[int]:
    """Process ids of the workers that run: children of the main process that hold a model."""
    import psutil  # type: ignore[import-untyped]  # MLflow brings it

    found = []
    for child in psutil.Process(pid).children():
        with suppress(psutil.Error):  # it has just ended
            if child.status() != psutil.STATUS_ZOMBIE and child.memory_info().rss > _WORKER_BYTES:
                found.append(child.pid)
    return found


def p99_ms(seen: Sequence[Seen], start: float, end: float) -> float:
    """99th percentile of the latency of requests that began in an interval."""
    found = [s for each in seen for (at, s, _) in each.answers if start <= at < end]
    return 1000 * float(np.percentile(found, 99)) if found else float("nan")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one JSON document; exit status 1 if a request was lost."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--first", type=Path, required=True, help="folder of a saved variant")
    parser.add_argument("--second", type=Path, required=True)
    parser.add_argument("--swaps", type=int, default=30)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--text", default="where is my card")
    parsed = parser.parse_args(arguments)
    from mlflow import MlflowClient

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        versions = register(folder, (parsed.first, parsed.second))
        registry = MlflowClient()
        registry.set_registered_model_alias(NAME, "champion", versions[0])
        command = [sys.executable, "-m", "mlflow_pt_deploy.cli", "serve"]
        command += [f"models:/{NAME}@champion", "--replicas", "2", "--poll-s", str(_POLL_S)]
        with running(command, folder / "serve.log") as server:
            wait_until_ready(server.url)
            clients = [Client(server.url, parsed.text) for _ in range(parsed.clients)]
            for client in clients:
                client.start()
            time.sleep(_SETTLE_S)
            steady = (time.monotonic() - _SETTLE_S + 1, time.monotonic())
            delays = [
                _swap(registry, versions[at % 2], clients) for at in range(1, parsed.swaps + 1)
            ]
            swapped = (steady[1], time.monotonic())
            for _ in range(parsed.kills):
                os.kill(workers_of(server.pid)[0], signal.SIGKILL)
                time.sleep(_AFTER_KILL_S)
            for client in clients:
                client.end()
            seen = [client.seen for client in clients]
    cut_by_swaps = sum(at < swapped[1] - 0.5 for each in seen for at in each.cut)
    cut_by_kills = sum(len(each.cut) for each in seen) - cut_by_swaps
    failed = Counter(status for each in seen for _, status in each.failed)
    document = {
        **machine(),
        "clients": parsed.clients,
        "requests": sum(len(each.answers) for each in seen),
        "swaps": parsed.swaps,
        "swap_delay_s": {"median": float(np.median(delays)), "most": max(delays)},
        "p99_ms": {"steady": p99_ms(seen, *steady), "while_swapping": p99_ms(seen, *swapped)},
        "kills": parsed.kills,
        "failed": dict(failed),
        "cut_by_swaps": cut_by_swaps,
        "cut_by_kills": cut_by_kills,
    }
    print(json.dumps(document, indent=1))
    return int(bool(failed) or cut_by_swaps > 0 or cut_by_kills > parsed.kills * parsed.clients)


def wait_until_ready(url: str) -> None:
    """Return when all workers have loaded the model."""
    for _ in range(600):
        with suppress(OSError), urllib.request.urlopen(f"{url}/readyz", timeout=60):
            return
        time.sleep(0.1)
    raise SystemExit("the server was not ready within 60 s")


def _swap(registry: object, version: str, clients: Sequence[Client]) -> float:
    """Move the alias; seconds until every client's latest answer is of the new version."""
    registry.set_registered_model_alias(NAME, "champion", version)  # type: ignore[attr-defined]
    start = time.monotonic()
    while not all(
        client.seen.answers and client.seen.answers[-1][2] == version for client in clients
    ):
        if time.monotonic() - start > 60:
            raise SystemExit(f"version {version} was not served everywhere within 60 s")
        time.sleep(0.01)
    return time.monotonic() - start


if __name__ == "__main__":
    sys.exit(main())
