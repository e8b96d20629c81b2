"""Goodput and tails under Poisson arrivals: our champion and the servers it is compared with.

    python benchmarks/serving.py --model models:/NAME@champion --teacher HF_FOLDER \
        --data FOLDER --seconds 5 --out serving.json

Servers run one after the other, never two at a time. Each is asked one test text a request at
rates that double until the tail breaks twice, then between the last good rate and the first bad
one, and at last at twice the best. Requests are sent when they are due, whatever became of those
before (`poisson.c`), and a request that is not answered with 200 counts as infinitely late. Each
says that it is of no use after 100 ms, which servers may heed. The load generator shares the cores
with the server, for all servers alike. Before all of them the same texts go through our model
without a server (`batch.py`): what of a row's CPU time is the server's shows beside it.
"""

from __future__ import annotations

import argparse
import json
import math
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from servers import (
    HANDLERS,
    PT_DEPLOY,
    SEED,
    Server,
    StartError,
    ask,
    commands,
    common_parser,
    cpu_seconds,
    handler_commands,
    machine,
    path_of,
    running,
    sample,
    save_teacher,
)

HERE = Path(__file__).resolve().parent
LIMITS_MS = (40, 100)
MOST_PER_S = 65_536


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
        refused_p99_ms: How soon.
        errors: Not answered at all, or neither with 200 nor with 429.
        cpu_us: CPU microseconds of the server's processes for each 200.
    """

    rate: float
    answered_share: float
    good_per_s: float
    p50_ms: float | None
    p99_ms: float | None
    p999_ms: float | None
    p99_all_ms: float | None
    refused_share: float
    refused_p99_ms: float | None
    errors: int
    cpu_us: float | None

    @property
    def tail_ms(self) -> float:
        """Within which 99 % of all requests were answered with 200."""
        return math.inf if self.p99_all_ms is None else self.p99_all_ms

    def keeps(self, limit_ms: float) -> bool:
        """Whether that is within the limit."""
        return self.tail_ms <= limit_ms


@dataclass
class Result:
    """What was seen of one server, or why it could not start."""

    server: str
    reason: str = ""
    start_s: float | None = None
    points: list[Point] = field(default_factory=list)
    best: dict[int, float] = field(default_factory=dict)
    overload: Point | None = None
    padding_share: float | None = None

    @property
    def peak(self) -> Point | None:
        """At the highest rate that kept the longest of `LIMITS_MS`."""
        best = max(self.best.values(), default=0.0)
        return next((point for point in self.points if point.rate == best), None)


Load = Callable[[float], Point]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, write JSON, Markdown and a plot."""
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers are stopped too
    from mlflow_pt_deploy.data import load_data

    splits = load_data(options.data)
    texts = [row for row in splits.test.rows if isinstance(row, str)]
    rows = sample(texts, [splits.labels[at] for at in splits.test.targets])
    results: list[Result] = []
    alone_us = _batch_cpu_us(options)
    with tempfile.TemporaryDirectory(prefix="open-loop-") as name:
        folder = Path(name)
        generator = build_generator(folder)
        bodies = folder / "bodies.jsonl"
        bodies.write_text("".join(json.dumps({"inputs": [text]}) + "\n" for text, _ in rows))
        for server, command in _all_commands(options, folder).items():
            result = Result(server)
            results.append(result)
            try:
                with running(command, folder / "server.log", path_of(server)) as run:
                    result.start_s = run.start_s
                    _examine(result, _load(generator, run, bodies, options), options)
                    result.padding_share = _padding_share(run.url)
            except StartError as error:
                result.reason = str(error)
            print(result, file=sys.stderr, flush=True)
            _write(results, alone_us, options)
    print(table(results))
    print(rates_table(results))
    print(_beside_batch(results, alone_us))


def _batch_cpu_us(options: argparse.Namespace) -> float:
    """CPU microseconds a row of our model in a batch job."""
    command = [sys.executable, str(HERE / "batch.py"), "--model", options.model]
    command += ["--data", options.data, "--seconds", str(options.seconds)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=300)
    return float(json.loads(done.stdout)["cpu_us"])


def _beside_batch(results: Sequence[Result], alone_us: float) -> str:
    """How much of the CPU time of a served row is the model's."""
    text = f"Batch inference without a server takes {alone_us:g} CPU µs a row"
    ours = next((r for r in results if r.server == PT_DEPLOY and r.peak), None)
    if ours is None or ours.peak is None or not ours.peak.cpu_us:
        return f"{text}.\n"
    share = alone_us / ours.peak.cpu_us
    return f"{text}, {share:.2f} of what `{PT_DEPLOY}` takes at its highest rate.\n"


def build_generator(folder: Path) -> Path:
    """The load generator, compiled."""
    program = folder / "poisson"
    subprocess.run(["gcc", "-O2", "-o", program, HERE / "poisson.c", "-lm"], check=True)
    return program


def search(load: Load, first: float, limit_ms: float, seen: dict[float, Point]) -> float:
    """The highest rate that keeps the limit: doubled until one breaks it, then three between."""

    def good(rate: float) -> bool:
        if rate not in seen:
            seen[rate] = load(rate)
            if not seen[rate].keeps(limit_ms):  # the machine may have paused: look twice
                seen[rate] = min(seen[rate], load(rate), key=lambda point: point.tail_ms)
        return seen[rate].keeps(limit_ms)

    low, high = 0.0, first
    while high <= MOST_PER_S and good(high):
        low, high = high, high * 2
    if not low:
        return 0.0
    for _ in range(3):
        middle = float(round(math.sqrt(low * high)))
        low, high = (middle, high) if good(middle) else (low, middle)
    return low


def _examine(result: Result, load: Load, options: argparse.Namespace) -> None:
    load(options.first_rate)  # warm-up
    seen: dict[float, Point] = {}
    for limit in LIMITS_MS:
        result.best[limit] = search(load, options.first_rate, limit, seen)
    best = max(result.best.values())
    for rate in options.rates:
        if rate not in seen and rate <= best:
            seen[rate] = load(rate)
    result.points = [seen[rate] for rate in sorted(seen)]
    if best:
        result.overload = load(2 * best)


def _load(generator: Path, run: Server, bodies: Path, options: argparse.Namespace) -> Load:
    host, port = run.url.removeprefix("http://").split(":")

    def load(rate: float) -> Point:
        before = cpu_seconds(run.pid)
        words = [rate, options.seconds, SEED + 1, host, port, run.path, bodies]
        words += [options.connections, max(LIMITS_MS)]
        done = subprocess.run(
            [str(word) for word in (generator, *words)],
            check=True,
            capture_output=True,
            text=True,
            timeout=options.seconds + 60,
        )
        used = cpu_seconds(run.pid) - before
        point = _point(json.loads(done.stdout), used)
        if point.errors:
            _settle(run.url + run.path)
        print(f"  {point}", file=sys.stderr, flush=True)
        return point

    return load


def _padding_share(url: str) -> float | None:
    """Of all tokens that the model computed, where the server tells; None where it does not."""
    try:
        with urlopen(f"{url}/metrics", timeout=10) as response:
            lines = response.read().decode().splitlines()
    except (OSError, ValueError):
        return None

    def total(name: str) -> float:
        return sum(float(line.split()[-1]) for line in lines if line.startswith(name + "{"))

    padding, tokens = (
        total("pt_deploy_batch_padding_tokens_total"),
        total("pt_deploy_batch_tokens_total"),
    )
    return round(padding / (padding + tokens), 3) if tokens else None


def _settle(address: str) -> None:
    """Let a server that queues without limit come to its end of the queue."""
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
        **{key: raw[key] for key in ("p50_ms", "p99_ms", "p999_ms", "p99_all_ms")},
        refused_share=round(refused / max(1, raw["sent"]), 4),
        refused_p99_ms=raw["refused_p99_ms"],
        errors=raw["sent"] - good - refused,
        cpu_us=round(used_s / good * 1e6, 1) if good else None,
    )


def _all_commands(options: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
    """Ours first."""
    found = commands(options.model, save_teacher(options.teacher, folder))
    found = {PT_DEPLOY: found.pop(PT_DEPLOY), **found}
    pythons = {name: getattr(options, f"{name.lower()}_python") for name in HANDLERS}
    found |= handler_commands(pythons, options.model, options.teacher, folder)
    only = options.only or found
    return {name: command for name, command in found.items() if name in only}


def _parser() -> argparse.ArgumentParser:
    parser = common_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=10, help="a point")
    parser.add_argument("--first-rate", type=float, default=8, help="requests/s to double from")
    parser.add_argument("--rates", type=float, nargs="*", default=[8, 64, 512, 2048])
    parser.add_argument("--connections", type=int, default=512, help="most at a time")
    for name in HANDLERS:
        option = f"--{name.lower()}-python"
        parser.add_argument(option, help=f"interpreter of a venv with {name} and us")
    parser.add_argument("--only", nargs="+", help="names of servers, as in the table")
    parser.add_argument("--out", type=Path, default=Path("serving.json"))
    return parser


def table(results: Sequence[Result]) -> str:
    """The results as Markdown."""
    lines = [
        "| server | start s | good/s, p99 <= 40 ms | <= 100 ms | p50, p99, p99.9 ms there "
        "| CPU µs/row | padding | at twice that: good/s | 429 | 429's p99 ms | errors |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for result in results:
        if result.reason:
            lines.append(f"| {result.server} | {result.reason} " + "| " * 9 + "|")
            continue
        there, over = result.peak, result.overload
        cells = [
            f"{result.start_s:g}",
            *(f"{result.best.get(limit, 0):g}" for limit in LIMITS_MS),
            f"{there.p50_ms:.1f}, {there.p99_ms:.1f}, {there.p999_ms:.1f}" if there else "-",
            f"{there.cpu_us:g}" if there else "-",
            f"{result.padding_share:.1%}" if result.padding_share is not None else "-",
            f"{over.good_per_s:g}" if over else "-",
            f"{over.refused_share:.0%}" if over else "-",
            f"{over.refused_p99_ms:.1f}" if over and over.refused_p99_ms else "-",
            f"{over.errors}" if over else "-",
        ]
        lines.append(f"| {result.server} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def rates_table(results: Sequence[Result]) -> str:
    """p50, p99 and p99.9 of the 200s at each rate, as Markdown, and how many are missing."""
    lines = [
        "| server | requests/s offered | p50 ms | p99 ms | p99.9 ms | not answered with 200 |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for result in results:
        for point in result.points:
            times = [point.p50_ms, point.p99_ms, point.p999_ms]
            cells = ["-" if time is None else f"{time:.1f}" for time in times]
            missing = f"{1 - point.answered_share:.1%}" if point.answered_share < 1 else "none"
            lines.append(f"| {result.server} | {point.rate:g} | {' | '.join(cells)} | {missing} |")
    return "\n".join(lines) + "\n"


def _write(results: Sequence[Result], alone_us: float, options: argparse.Namespace) -> None:
    report = {
        "results": [asdict(result) for result in results],
        "batch_cpu_us": alone_us,
        "seconds": options.seconds,
        "data": options.data,
        "machine": machine(),
    }
    options.out.write_text(json.dumps(report, indent=1), encoding="utf8")
    told = (table(results), rates_table(results), _beside_batch(results, alone_us))
    options.out.with_suffix(".md").write_text("\n".join(told), encoding="utf8")
    _plot(results, options.out.with_suffix(".png"))


def _plot(results: Sequence[Result], path: Path) -> None:
    """p99 against the offered rate, both logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for result in results:
        seen = [point for point in result.points if point.p99_ms is not None]
        if seen:
            rates, tails = zip(*((point.rate, point.p99_ms) for point in seen), strict=True)
            axes.plot(rates, tails, marker="o", label=result.server)
    for limit in LIMITS_MS:
        axes.axhline(limit, color="grey", linestyle=":")
    axes.set(xscale="log", yscale="log", xlabel="requests/s offered", ylabel="p99 ms of the 200s")
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
