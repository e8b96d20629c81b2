"""Sends requests at a rate (`poisson.c`), and finds the highest rate within a latency limit."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from servers import SEED, Server, ask, cpu_seconds

LIMITS_MS = (40, 100)
_MOST_PER_S = 65_536
_COMPUTED = "pt_deploy_compute_seconds_sum"
_STREAMS = "pt_deploy_streams"


@dataclass(frozen=True)
class Point:
    """One server at one rate.

    Attributes:
        rate: Requests offered per second.
        answered_share: Share answered with 200, in time or not.
        good_per_s: Requests answered with 200 within the longest of `LIMITS_MS`, per second.
        p50_ms: Of the 200s, from the time a request was due; p99_ms and p999_ms too.
        p99_all_ms: Of all requests, others than 200 counted as infinite; None: infinite.
        refused_share: Share answered with 429.
        refused_p50_ms: Latency of the 429s; refused_p99_ms too.
        refused_after_p99_ms: The same from the time of sending, which may be later than due.
        sent_late_p99_ms: Delay of the load generator itself.
        errors: No response, or a status other than 200 and 429.
        cpu_us: CPU microseconds of the server's processes per 200.
        model_share: Share of the time in which the model computed, if the server has this metric.
    """

    rate: float
    answered_share: float
    good_per_s: float
    p50_ms: float | None
    p99_ms: float | None
    p999_ms: float | None
    p99_all_ms: float | None
    refused_share: float
    refused_p50_ms: float | None
    refused_p99_ms: float | None
    refused_after_p99_ms: float | None
    sent_late_p99_ms: float | None
    errors: int
    cpu_us: float | None
    model_share: float | None = None

    @property
    def tail_ms(self) -> float:
        """Time within which 99 % of all requests were answered with 200."""
        return math.inf if self.p99_all_ms is None else self.p99_all_ms

    def keeps(self, limit_ms: float) -> bool:
        """Whether `tail_ms` is within the limit."""
        return self.tail_ms <= limit_ms


Load = Callable[[float], Point]


def build_generator(folder: Path) -> Path:
    """Compile the load generator."""
    program = folder / "poisson"
    subprocess.run(
        ["gcc", "-O2", "-o", program, Path(__file__).with_name("poisson.c"), "-lm"], check=True
    )
    return program


def search(load: Load, first: float, limit_ms: float, seen: dict[float, Point]) -> float:
    """Highest rate within the limit: doubles until it is exceeded, then bisects three times."""

    def good(rate: float) -> bool:
        if rate not in seen:
            seen[rate] = load(rate)
            if not seen[rate].keeps(limit_ms):  # measure again: the machine may have paused
                seen[rate] = min(seen[rate], load(rate), key=lambda point: point.tail_ms)
        return seen[rate].keeps(limit_ms)

    low, high = 0.0, first
    while high <= _MOST_PER_S and good(high):
        low, high = high, high * 2
    if not low:
        return 0.0
    for _ in range(3):
        middle = float(round(math.sqrt(low * high)))
        low, high = (middle, high) if good(middle) else (low, middle)
    return low


def loader(generator: Path, run: Server, bodies: Path, *, seconds: float, connections: int) -> Load:
    """Create a function that loads a server at a rate.

    Args:
        generator: Program from `build_generator`.
        run: The server.
        bodies: File with one request body per line, sent in turn.
        seconds: Duration of each load.
        connections: Most concurrent connections.
    """
    host, port = run.url.removeprefix("http://").split(":")

    def load(rate: float) -> Point:
        before, computed = cpu_seconds(run.pid), series(run.url, _COMPUTED)
        words = [rate, seconds, SEED + 1, host, port, run.path, bodies]
        words += [connections, max(LIMITS_MS)]
        done = subprocess.run(
            [str(word) for word in (generator, *words)],
            check=True,
            capture_output=True,
            text=True,
            timeout=seconds + 60,
        )
        raw = json.loads(done.stdout)
        point = _point(raw, cpu_seconds(run.pid) - before)
        if computed is not None:
            busy_s = (series(run.url, _COMPUTED) or 0) - computed
            busy_s /= series(run.url, _STREAMS) or 1
            point = replace(point, model_share=round(busy_s / raw["seconds"], 3))
        if point.errors:
            _settle(run.url + run.path)
        print(f"  {point}", file=sys.stderr, flush=True)
        return point

    return load


def padding_share(url: str) -> float | None:
    """Share of padding among the computed tokens; None if the server has no such metric."""
    padding = series(url, "pt_deploy_batch_padding_tokens_total")
    tokens = series(url, "pt_deploy_batch_tokens_total")
    return round(padding / (padding + tokens), 3) if padding is not None and tokens else None


def series(url: str, name: str) -> float | None:
    """A series of a server's `/metrics`, summed over labels; None if there is none."""
    try:
        with urlopen(f"{url}/metrics", timeout=10) as response:
            lines = response.read().decode().splitlines()
    except (OSError, ValueError):
        return None
    found = [float(line.split()[-1]) for line in lines if line.startswith(name + "{")]
    return sum(found) if found else None


def _settle(address: str) -> None:
    """Wait until a server with an unbounded queue has emptied it."""
    try:
        ask(address, "hello", timeout=120)
    except (OSError, ValueError):
        return


def _point(raw: dict[str, Any], used_s: float) -> Point:
    good, refused = (raw["statuses"].get(status, 0) for status in ("200", "429"))
    return Point(
        rate=raw["rate"],
        answered_share=round(good / max(1, raw["sent"]), 4),
        good_per_s=round(raw["in_time"] / raw["seconds"], 1),
        **{key: value for key, value in raw.items() if key.endswith("_ms")},
        refused_share=round(refused / max(1, raw["sent"]), 4),
        errors=raw["sent"] - good - refused,
        cpu_us=round(used_s / good * 1e6, 1) if good else None,
    )
