"""A server under load for an hour: promotions, a canary, killed workers; is its memory flat?

    python benchmarks/soak.py --minutes 60

Serves the tiny models of the tests with two workers. Clients send MLflow's JSON, CSV and the Open
Inference Protocol on keep-alive connections. A canary gets 5 % of the requests, the alias
`champion` is moved every minute, and a worker is killed with SIGKILL every five. Every request must
be answered with 200, or refused with 429 or 503; only a killed worker may cut a connection. The
canary is as good as the champion, so nothing may end it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from canary import register
from servers import machine, running
from swaps import KeepAliveClient, wait_until_ready, workers_of

NAME = "soak"
REFUSED = (429, 503)
MAX_GROWTH = 0.02
_WARM_UP = 1 / 6
_SAMPLE_S = 2.0


class Format(NamedTuple):
    """A body that one row is sent in."""

    path: str
    media: str
    body: str


def formats(text: str) -> list[Format]:
    """One text in each format."""
    tensor = {"name": "text", "datatype": "BYTES", "shape": [1], "data": [text]}
    return [
        Format("/invocations", "application/json", json.dumps({"inputs": [text]})),
        Format("/invocations", "text/csv", f"text\n{text}\n"),
        Format(f"/v2/models/{NAME}/infer", "application/json", json.dumps({"inputs": [tensor]})),
    ]


class MixedClient(KeepAliveClient):
    """Sends each request in a random format.

    Attributes:
        statuses: Answers by status.
        versions: Answers with status 200 by version.
        cut: Requests whose connection ended without an answer.
    """

    def __init__(self, url: str, seed: int) -> None:
        super().__init__(url)
        self._random = random.Random(seed)
        self._bodies = [
            each for text in ("red", "green blue", "blue " * 40) for each in formats(text)
        ]
        self.statuses: Counter[int] = Counter()
        self.versions: Counter[str] = Counter()
        self.cut = 0

    def next_request(self) -> tuple[str, str, str]:
        """See `KeepAliveClient`."""
        return self._random.choice(self._bodies)

    def on_answer(self, start: float, status: int, version: str) -> None:
        """See `KeepAliveClient`."""
        self.statuses[status] += 1
        if status == 200:
            self.versions[version] += 1

    def on_cut(self, start: float) -> None:
        """See `KeepAliveClient`."""
        self.cut += 1


def disturb(
    registry: Any, pid: int, seconds: float, swap_s: float, kill_s: float
) -> dict[str, Any]:
    """Move the alias and kill workers until the time is over; samples the workers' memory."""
    start = time.monotonic()
    next_swap, next_kill = start + swap_s, start + kill_s
    swaps = kills = 0
    samples: list[tuple[float, float]] = []
    while (now := time.monotonic()) < start + seconds:
        if now >= next_swap:
            swaps, next_swap = swaps + 1, now + swap_s
            registry.set_registered_model_alias(NAME, "champion", str(1 + swaps % 2))
        if now >= next_kill and len(workers := workers_of(pid)) == 2:
            os.kill(workers[kills % 2], signal.SIGKILL)
            kills, next_kill = kills + 1, now + kill_s
        samples += [(now - start, each) for each in _resident_mb(pid)]
        time.sleep(_SAMPLE_S)
    ended = registry.get_model_version(NAME, "3").tags.get("pt_deploy.canary_ended")
    memory = growth(samples, seconds)
    return {"swaps": swaps, "kills": kills, "memory": memory, "canary_ended": ended}


def growth(samples: Sequence[tuple[float, float]], seconds: float) -> dict[str, float]:
    """A worker's memory in MB after the warm-up and at the end, and its growth as a fraction.

    Args:
        samples: (seconds since the start, MB) of each worker.
        seconds: Duration; the warm-up is the first sixth.
    """
    warm = [mb for at, mb in samples if _WARM_UP * seconds <= at < 2 * _WARM_UP * seconds]
    last = [mb for at, mb in samples if at >= (1 - _WARM_UP) * seconds]
    first, end = statistics.median(warm), statistics.median(last)
    return {"warm_mb": first, "end_mb": end, "growth": end / first - 1}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one JSON document; exit status 1 if a promise was broken."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--swap-s", type=float, default=60.0)
    parser.add_argument("--kill-s", type=float, default=300.0)
    parser.add_argument("--clients", type=int, default=6)
    parsed = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        registry = register(folder, NAME, ({}, {}, {}))
        registry.set_registered_model_tag(NAME, "pt_deploy.canary", "3:5%")
        command = [sys.executable, "-m", "mlflow_pt_deploy.cli", "serve"]
        command += [f"models:/{NAME}@champion", "--replicas", "2", "--poll-s", "0.5"]
        command += ["--feedback-rows", "1000", "--cache-mb", "1"]
        with running(command, folder / "serve.log") as server:
            wait_until_ready(server.url)
            clients = [MixedClient(server.url, seed) for seed in range(parsed.clients)]
            for client in clients:
                client.start()
            done = disturb(registry, server.pid, 60 * parsed.minutes, parsed.swap_s, parsed.kill_s)
            for client in clients:
                client.end()
            tracebacks = (folder / "serve.log").read_text(encoding="utf8").count("Traceback")
    statuses = sum((client.statuses for client in clients), Counter[int]())
    cut = sum(client.cut for client in clients)
    document = {
        **machine(),
        **done,
        "clients": parsed.clients,
        "statuses": dict(statuses),
        "versions": dict(sum((client.versions for client in clients), Counter[str]())),
        "cut": cut,
        "tracebacks": tracebacks,
    }
    print(json.dumps(document, indent=1))
    lost = statuses.keys() - {200, *REFUSED}
    grown = done["memory"]["growth"] > MAX_GROWTH
    broken = [lost, grown, tracebacks, done["canary_ended"], cut > done["kills"] * parsed.clients]
    return int(any(broken))


def _resident_mb(pid: int) -> list[float]:
    import psutil  # type: ignore[import-untyped]  # MLflow brings it

    found = []
    for worker in workers_of(pid):
        with suppress(psutil.Error):  # it has just ended
            found.append(psutil.Process(worker).memory_info().rss / 1e6)
    return found


if __name__ == "__main__":
    sys.exit(main())
