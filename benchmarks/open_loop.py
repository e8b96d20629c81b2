"""Servers under open-loop load: how many requests a second, and how late the last of a hundred.

    python benchmarks/open_loop.py --model models:/NAME@champion --teacher HF_FOLDER \
        --data shared/data/banking77 --seconds 10 --out open_loop.json

Requests of one text come as a Poisson process from `poisson.c`, compiled here with gcc; latency
counts from the moment a request was due. One server runs at a time, and the generator shares its
cores. Printed for each server: goodput (the highest rate at which 99 of 100 requests are answered
with 200 in time), percentiles and CPU time per row at fixed rates, what happens at twice the rate
that saturates it, padding, time from start to first answer. `--peer NAME=COMMAND` adds a server of
your own; `{port}` in it is replaced, and the port must answer MLflow's protocol. A server that
does not start is a row with the reason.

Knows nothing of how the model was made; it talks to servers over HTTP only.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import numpy as np
from serving import SEED, commands, running, sample, save_teacher

LIMITS_MS = (40, 100)
_STEPS = 5  # of the search between a rate that is met and its double, which is not
_WAIT_S = 5
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Point:
    """One server at one rate.

    Attributes:
        rate: Requests that were due per second.
        good: Of those, answered with 200, per second.
        in_time: Share of requests answered with 200 in time, by limit in ms.
        p50_ms, p99_ms, p999_ms: Latency of all requests, those without a 200 as infinite (-1).
        refused: Share answered with 429.
        refused_p99_ms: Latency of those from the due time.
        failed: Share with any other answer, or none.
        cpu_ms: CPU time of the server's processes for each request answered with 200.
    """

    rate: float
    good: float
    in_time: dict[int, float]
    p50_ms: float
    p99_ms: float
    p999_ms: float
    refused: float
    refused_p99_ms: float
    failed: float
    cpu_ms: float

    def holds(self, limit_ms: int) -> bool:
        """Whether 99 of 100 requests were answered in time."""
        return self.in_time[limit_ms] >= 0.99


class Load:
    """The load generator, aimed at one server.

    Args:
        binary: `poisson.c`, compiled.
        bodies: A file of bodies, one a line.
        url: The server.
        session: Id of the session of its processes.
        connections: Most connections.
    """

    def __init__(
        self, binary: Path, bodies: Path, url: str, session: int, connections: int
    ) -> None:
        host, port = url.removeprefix("http://").split(":")
        self._where = [str(binary), host, port, "/invocations"]
        self._rest = [str(connections), str(_WAIT_S), str(bodies)]
        self._session = session

    def at(self, rate: float, seconds: float) -> Point:
        """Measure at a rate."""
        before = _cpu_s(self._session)
        words = [*self._where, f"{rate:.3f}", f"{seconds:g}", str(SEED), *self._rest]
        run = subprocess.run(words, capture_output=True, text=True, check=True)
        cpu_s = _cpu_s(self._session) - before
        table = np.array([line.split() for line in run.stdout.splitlines()], dtype=float)
        return _point(table.reshape(-1, 3), rate, seconds, cpu_s)

    def search(self, limit_ms: int, seconds: float, known: list[Point]) -> float:
        """The highest rate that holds, and every point looked at added to `known`; 0: none."""
        rate, best, failed = 4.0, 0.0, None
        while failed is None:
            earlier = [point for point in known if point.rate == rate]
            point = earlier[0] if earlier else self.at(rate, _enough(rate, seconds))
            known.extend([] if earlier else [point])
            best, failed = (rate, None) if point.holds(limit_ms) else (best, rate)
            rate *= 2
        for _ in range(_STEPS if best else 0):
            rate = (best * failed) ** 0.5
            known.append(point := self.at(rate, _enough(rate, seconds)))
            best, failed = (rate, failed) if point.holds(limit_ms) else (best, rate)
        return best


def _enough(rate: float, seconds: float) -> float:
    """At low rates longer, so that a hundredth is more than a request or two."""
    return max(seconds, min(60.0, seconds * 6, 200 / rate))


def _point(table: Any, rate: float, seconds: float, cpu_s: float) -> Point:
    latency, status = table[:, 1], table[:, 2]
    good, refused = status == 200, status == 429
    all_of_them = np.where(good, latency, np.inf)

    def percentile(values: Any, percent: float) -> float:
        if not len(values):
            return -1
        value = np.quantile(values, percent / 100, method="higher")
        return round(float(value), 2) if np.isfinite(value) else -1

    count = max(1, len(table))
    return Point(
        rate=rate,
        good=round(good.sum() / seconds, 1),
        in_time={limit: float((all_of_them <= limit).sum() / count) for limit in LIMITS_MS},
        p50_ms=percentile(all_of_them, 50),
        p99_ms=percentile(all_of_them, 99),
        p999_ms=percentile(all_of_them, 99.9),
        refused=float(refused.sum() / count),
        refused_p99_ms=percentile(latency[refused], 99),
        failed=float((~good & ~refused).sum() / count),
        cpu_ms=round(1000 * cpu_s / max(1, int(good.sum())), 4),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, write JSON, Markdown and a plot."""
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers are stopped too
    from mlflow_pt_deploy.data import load_data

    splits = load_data(options.data)
    texts = [row for row in splits.test.rows if isinstance(row, str)]
    rows = sample(texts, [splits.labels[at] for at in splits.test.targets])
    report: dict[str, Any] = {"data": options.data, "model": options.model, "servers": {}}
    with tempfile.TemporaryDirectory(prefix="open-loop-") as name:
        folder = Path(name)
        binary, bodies = _compile(folder), folder / "bodies.jsonl"
        lines = [json.dumps({"inputs": [text]}) for text, _ in rows]
        bodies.write_text("\n".join(lines) + "\n", encoding="utf8")
        teacher = save_teacher(options.teacher, folder) if options.teacher else folder
        for server, command in _servers(options, teacher).items():
            found = _measure(server, command, binary, bodies, options)
            report["servers"][server] = found
            print(f"{server}: {json.dumps(found)}", file=sys.stderr, flush=True)
    report["in_process_cpu_ms"] = _in_process(options.model, [text for text, _ in rows])
    options.out.write_text(json.dumps(report, indent=1), encoding="utf8")
    table = _table(report)
    options.out.with_suffix(".md").write_text(table, encoding="utf8")
    _plot(report["servers"], options.out.with_suffix(".png"))
    print(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="MLflow URI of our model")
    parser.add_argument("--teacher", type=Path, help="Hugging Face folder; without it no stock row")
    parser.add_argument("--data", required=True, help="as for pt-deploy: a folder, catalog, ...")
    parser.add_argument("--seconds", type=float, default=10, help="a point, after warm-up")
    parser.add_argument("--rates", type=float, nargs="*", default=[10, 100, 1000, 4000])
    parser.add_argument("--connections", type=int, default=512)
    parser.add_argument("--peer", action="append", default=[], help="NAME=COMMAND with {port}")
    parser.add_argument("--only", nargs="*", default=[], help="names of servers; none: all")
    parser.add_argument("--out", type=Path, default=Path("open_loop.json"))
    return parser


def _compile(folder: Path) -> Path:
    if shutil.which("gcc") is None:
        sys.exit("gcc, which compiles the load generator, is missing: apt-get install gcc")
    binary = folder / "poisson"
    source = Path(__file__).with_name("poisson.c")
    subprocess.run(["gcc", "-O2", "-o", str(binary), str(source), "-lm"], check=True)
    return binary


def _servers(options: argparse.Namespace, teacher: Path) -> dict[str, list[str]]:
    found = dict(reversed(commands(options.model, teacher).items()))  # ours first
    if not options.teacher:
        del found[next(name for name, command in found.items() if str(teacher) in command)]
    for word in options.peer:
        name, _, command = word.partition("=")
        found[name] = shlex.split(command)
    return {name: found[name] for name in found if not options.only or name in options.only}


def _measure(
    server: str, command: Sequence[str], binary: Path, bodies: Path, options: argparse.Namespace
) -> dict[str, Any]:
    start = time.monotonic()
    first = json.loads(bodies.read_text().splitlines()[0])
    try:
        with running(command, bodies.with_name("server.log")) as (url, session):
            _ask(url, first)
            started_s = round(time.monotonic() - start, 2)
            load = Load(binary, bodies, url, session, options.connections)
            load.at(20, min(3.0, options.seconds))
            points = [load.at(rate, options.seconds) for rate in options.rates]
            goodput = {limit: load.search(limit, options.seconds, points) for limit in LIMITS_MS}
            twice = load.at(2 * max(1.0, goodput[LIMITS_MS[-1]]), options.seconds)
            return {
                "start_to_first_answer_s": started_s,
                "goodput": goodput,
                "points": [asdict(point) for point in sorted(points, key=lambda p: p.rate)],
                "fixed": list(options.rates),
                "twice": asdict(twice),
                "padding_share": _padding(url),
            }
    except (SystemExit, OSError, subprocess.CalledProcessError) as error:
        if isinstance(error, SystemExit) and error.code == 143:
            raise
        return {"reason": f"{server} did not run: {str(error)[-500:]}"}


def _ask(url: str, body: Mapping[str, Any]) -> None:
    content = {"Content-Type": "application/json"}
    request = Request(f"{url}/invocations", json.dumps(body).encode(), content)
    with urlopen(request, timeout=60) as response:
        response.read()


def _padding(url: str) -> float | None:
    """Share of computed tokens that were padding; None where the server does not tell."""
    try:
        with urlopen(f"{url}/metrics", timeout=10) as response:
            lines = response.read().decode().splitlines()
    except OSError:
        return None
    total = {
        kind: sum(
            float(line.split()[-1])
            for line in lines
            if line.startswith(f"pt_deploy_batch_{kind}_total")
        )
        for kind in ("tokens", "padding_tokens")
    }
    computed = sum(total.values())
    return round(total["padding_tokens"] / computed, 4) if computed else None


def _cpu_s(session: int) -> float:
    """CPU time of all processes of a session so far."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / _TICKS


def _in_process(model: str, texts: Sequence[str]) -> float:
    """CPU milliseconds a row, all texts in one call, labels out."""
    import mlflow

    loaded = mlflow.pyfunc.load_model(model)
    loaded.predict(list(texts))
    start = time.process_time()
    loaded.predict(list(texts))
    return round(1000 * (time.process_time() - start) / len(texts), 4)


def _table(report: Mapping[str, Any]) -> str:
    lines = [
        "| server | " + " | ".join(f"goodput, p99 <= {limit} ms" for limit in LIMITS_MS)
        + " | start s | padding | at twice: good/s, 429, p99 of a 429 ms, else failed |",
        "|---|" + "--:|" * (len(LIMITS_MS) + 3),
    ]  # fmt: skip
    fixed = [
        "| server | rate | good/s | p50 ms | p99 ms | p99.9 ms | 429 | failed | CPU ms a row |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for server, found in report["servers"].items():
        if "reason" in found:
            lines.append(f"| {server} | {found['reason'].splitlines()[0]} |")
            continue
        goodput = " | ".join(f"{found['goodput'][limit]:.0f}" for limit in LIMITS_MS)
        twice = found["twice"]
        lines.append(
            f"| {server} | {goodput} | {found['start_to_first_answer_s']} "
            f"| {found['padding_share']} | {twice['good']:.0f} of {twice['rate']:.0f}, "
            f"{twice['refused']:.0%}, {twice['refused_p99_ms']}, {twice['failed']:.0%} |"
        )
        fixed += [
            f"| {server} | {p['rate']:g} | {p['good']} | {p['p50_ms']} | {p['p99_ms']} "
            f"| {p['p999_ms']} | {p['refused']:.0%} | {p['failed']:.0%} | {p['cpu_ms']} |"
            for p in found["points"]
            if p["rate"] in found["fixed"]
        ]
    own = f"In process, all texts in one call: {report['in_process_cpu_ms']} ms of CPU a row."
    return "\n".join([*lines, "", *fixed, "", own]) + "\n"


def _plot(servers: Mapping[str, Any], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    for server, found in servers.items():
        met = [point for point in found.get("points", []) if point["p99_ms"] > 0]
        axes.plot([p["rate"] for p in met], [p["p99_ms"] for p in met], "o-", label=server)
    for limit in LIMITS_MS:
        axes.axhline(limit, color="#999999", linewidth=0.8)
    axes.set(xscale="log", yscale="log", xlabel="requests due per second", ylabel="p99, ms")
    axes.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    main()
