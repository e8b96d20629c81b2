"""What the response cache gives: a mix of repeated queries, with the cache and without it.

    python benchmarks/cache.py --model static=FOLDER --model transformer=FOLDER --seconds 10

Serves each saved model with ``--cache-mb`` 0 and with the given size, in turns. Closed-loop clients
on keep-alive connections send one row at a time, drawn from a Zipf distribution: of `--texts`
different ones the k-th most frequent is asked in proportion to 1/k**exponent. Each run starts with
an empty cache. The clients run on the same cores as the server.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
from servers import SEED, machine, running

_WORDS = ("my", "the", "card", "payment", "transfer", "refund", "limit", "pin", "abroad", "fee")


@dataclass(frozen=True)
class Point:
    """One model with one size of the cache.

    Attributes:
        model: Name of the model.
        cache_mb: Size of the cache; 0: none.
        requests_per_s: Median of the rounds.
        p50_ms, p99_ms: Latency, medians of the rounds.
        hit_rate: Share of rows that were found, of the last round; None without a cache.
    """

    model: str
    cache_mb: float
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    hit_rate: float | None


def texts(count: int) -> list[str]:
    """Different texts of 4 to 15 words."""
    draw = np.random.default_rng(SEED)
    lengths = draw.integers(4, 16, count)
    return [f"{' '.join(draw.choice(_WORDS, size))} {at}" for at, size in enumerate(lengths)]


def zipf_order(count: int, exponent: float, length: int, seed: int) -> list[int]:
    """Indices of texts in the order in which a client asks for them."""
    weights = 1 / np.arange(1, count + 1) ** exponent
    draw = np.random.default_rng(seed)
    return [int(at) for at in draw.choice(count, length, p=weights / weights.sum())]


def ask_for(url: str, bodies: Sequence[str], order: Sequence[int], until: float) -> list[float]:
    """Send requests until a time by `time.monotonic`; returns their latencies in seconds."""
    address = urlsplit(url)
    connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=60)
    seconds: list[float] = []
    while (start := time.monotonic()) < until:
        body = bodies[order[len(seconds) % len(order)]]
        connection.request("POST", "/invocations", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        response.read()
        if response.status != 200:
            raise SystemExit(f"status {response.status}")
        seconds.append(time.monotonic() - start)
    connection.close()
    return seconds


def measure(model: Path, cache_mb: float, options: argparse.Namespace) -> list[float | None]:
    """Serve a model and send requests; returns requests/s, p50 and p99 in ms, and the hit rate."""
    bodies = [json.dumps({"inputs": [text]}) for text in texts(options.texts)]
    command = [sys.executable, "-m", "mlflow_pt_deploy.cli", "serve", str(model)]
    command += ["--replicas", "1", "--cache-mb", f"{cache_mb:g}"]
    with (
        tempfile.TemporaryDirectory() as folder,
        running(command, Path(folder) / "log") as server,
    ):
        until, found = time.monotonic() + options.seconds, list[list[float]]()

        def client(number: int) -> None:
            order = zipf_order(options.texts, options.exponent, 20_000, number)
            found.append(ask_for(server.url, bodies, order, until))

        clients = [threading.Thread(target=client, args=(at,)) for at in range(options.clients)]
        for each in clients:
            each.start()
        for each in clients:
            each.join()
        with urllib.request.urlopen(f"{server.url}/model", timeout=60) as response:
            cache = json.load(response)["cache"]
    seconds = np.concatenate(found)
    p50, p99 = (1000 * np.percentile(seconds, [50, 99])).tolist()
    return [len(seconds) / options.seconds, p50, p99, cache and cache["hit_rate"]]


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a Markdown table, and write JSON."""
    options = _parser().parse_args(arguments)
    models = dict(word.split("=", 1) for word in options.model)
    sizes = (0.0, options.cache_mb)
    rounds: dict[tuple[str, float], list[list[float | None]]] = {}
    for _ in range(options.rounds):
        for name, folder in models.items():
            for size in sizes:
                rounds.setdefault((name, size), []).append(measure(Path(folder), size, options))
    points = []
    for (name, size), measured in rounds.items():
        rate, p50, p99 = (
            statistics.median(float(one[at] or 0) for one in measured) for at in range(3)
        )
        points.append(Point(name, size, rate, p50, p99, measured[-1][3]))
    print(
        "| model | cache | requests/s | p50, ms | p99, ms | hit rate |\n|---|--:|--:|--:|--:|--:|"
    )
    for each in points:
        hits = "" if each.hit_rate is None else f"{each.hit_rate:.2f}"
        print(
            f"| {each.model} | {each.cache_mb:g} MB | {each.requests_per_s:.0f} "
            f"| {each.p50_ms:.2f} | {each.p99_ms:.2f} | {hits} |"
        )
    if options.out:
        document = {
            "machine": machine(),
            "options": vars(options) | {"out": str(options.out)},
            "points": [asdict(each) for each in points],
        }
        options.out.write_text(json.dumps(document, indent=2))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", action="append", required=True, metavar="NAME=FOLDER")
    parser.add_argument("--cache-mb", type=float, default=64)
    parser.add_argument("--texts", type=int, default=10_000, help="different texts")
    parser.add_argument("--exponent", type=float, default=1.0, help="of the Zipf distribution")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="write the results as JSON")
    return parser


if __name__ == "__main__":
    main()
