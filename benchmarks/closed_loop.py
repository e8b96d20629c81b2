"""Requests per second and latency: our champion against MLflow's stock transformers flavor.

    python benchmarks/closed_loop.py --model models:/NAME@champion --teacher HF_FOLDER \
        --data FOLDER --seconds 20 --clients 1 8 32 --out results.json

Measures three servers, one after the other for each number of clients, never two at a time:
`mlflow models serve` with the teacher in MLflow's transformers flavor, `mlflow models serve` with
our model, and `pt-deploy serve` with our model. Clients are closed loops (wrk, Debian package
`wrk`) that send one test text per request. The load generator runs on the same cores as the server.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from servers import TEACHER, ask, commands, common_parser, machine, running, sample, save_teacher

# Each connection takes the next body; `done` prints wrk's raw numbers (microseconds) as JSON.
_LUA = """
local bodies, at = {}, 0
for line in io.lines("%(bodies)s") do bodies[#bodies + 1] = line end
wrk.method = "POST"
wrk.headers["Content-Type"] = "application/json"
request = function()
  at = at %% #bodies + 1
  return wrk.format(nil, nil, nil, bodies[at])
end
done = function(summary, latency)
  local e = summary.errors
  io.write(string.format(
    '\\nRESULT {"requests": %%d, "seconds": %%f, "p50_ms": %%f, "p99_ms": %%f, "errors": %%d}\\n',
    summary.requests, summary.duration / 1e6, latency:percentile(50) / 1e3,
    latency:percentile(99) / 1e3, e.connect + e.read + e.write + e.status + e.timeout))
end
"""


@dataclass(frozen=True)
class Point:
    """One server under one load.

    Attributes:
        server: Which server.
        clients: Closed-loop clients.
        requests_per_s: Requests answered with 200 per second.
        p50_ms: Median latency.
        p99_ms: 99th percentile of the latency.
        errors: Requests that failed, timed out or were not answered with 200.
        seconds: Duration of the measurement, warm-up excluded.
    """

    server: str
    clients: int
    requests_per_s: float
    p50_ms: float
    p99_ms: float
    errors: int
    seconds: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, write JSON and Markdown."""
    options = _parser().parse_args(arguments)
    if shutil.which("wrk") is None:
        sys.exit("wrk, the load generator, is missing. Install it with: apt-get install wrk")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # stops the servers too
    rows = sample(options.data)
    with tempfile.TemporaryDirectory(prefix="serving-") as name:
        folder = Path(name)
        lua = write_lua(folder, [text for text, _ in rows])
        servers = commands(options.model, save_teacher(options.teacher, folder))
        points: list[Point] = []
        accuracy: dict[str, float] = {}
        for clients in options.clients:
            for server, command in servers.items():
                with running(command, folder / "server.log") as run:
                    if server not in accuracy:
                        accuracy[server] = _accuracy(run.url + run.path, rows[: options.rows])
                    address = run.url + run.path
                    points.append(_measure(server, address, clients, options.seconds, lua))
                print(f"{points[-1]}", file=sys.stderr, flush=True)
    table = _table(points, accuracy)
    report = {
        "points": [asdict(point) for point in points],
        "accuracy": accuracy,
        "accuracy_rows": min(options.rows, len(rows)),
        "data": options.data,
        "machine": machine(),
    }
    options.out.write_text(json.dumps(report, indent=1), encoding="utf8")
    options.out.with_suffix(".md").write_text(table, encoding="utf8")
    print(table)


def _parser() -> argparse.ArgumentParser:
    parser = common_parser(__doc__)
    parser.add_argument("--seconds", type=int, default=20, help="seconds per point after warm-up")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--rows", type=int, default=300, help="rows for the accuracy")
    parser.add_argument("--out", type=Path, default=Path("results.json"))
    return parser


def write_lua(folder: Path, texts: Sequence[str]) -> Path:
    """Write a wrk script that sends one text per request, in turn."""
    bodies = folder / "bodies.jsonl"
    lines = [json.dumps({"inputs": [text]}) for text in texts]
    bodies.write_text("\n".join(lines) + "\n", encoding="utf8")
    script = folder / "post.lua"
    script.write_text(_LUA % {"bodies": bodies}, encoding="utf8")
    return script


def _accuracy(address: str, rows: Sequence[tuple[str, str]]) -> float:
    """Accuracy of a server's predictions, one text per request."""
    right = [ask(address, text)["label"] == label for text, label in rows]  # type: ignore[index]
    return right.count(True) / len(rows)


def _measure(server: str, address: str, clients: int, seconds: int, lua: Path) -> Point:
    wrk(address, clients, max(3, seconds // 4), lua)
    result = wrk(address, clients, seconds, lua)
    return Point(
        server,
        clients,
        requests_per_s=round((result["requests"] - result["errors"]) / result["seconds"], 1),
        p50_ms=round(result["p50_ms"], 2),
        p99_ms=round(result["p99_ms"], 2),
        errors=int(result["errors"]),
        seconds=round(result["seconds"], 2),
    )


def wrk(address: str, clients: int, seconds: int, lua: Path) -> dict[str, float]:
    """Run wrk and return its result, see `_LUA`; exits if wrk fails."""
    command = ["wrk", "-t1", f"-c{clients}", f"-d{seconds}s", "--timeout", "60s", "-s", str(lua)]
    run = subprocess.run(
        [*command, address],
        check=False,
        capture_output=True,
        text=True,
        timeout=seconds + 90,
    )
    for line in run.stdout.splitlines():
        if line.startswith("RESULT "):
            result: dict[str, float] = json.loads(line.removeprefix("RESULT "))
            return result
    sys.exit(f"wrk failed: {run.stdout}{run.stderr}")


def _table(points: Sequence[Point], accuracy: dict[str, float]) -> str:
    lines = [
        "| server | clients | requests/s | p50 ms | p99 ms | errors | accuracy | x stock |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    stock = {point.clients: point.requests_per_s for point in points if point.server == TEACHER}
    for point in points:
        times = point.requests_per_s / stock[point.clients] if stock.get(point.clients) else 0
        lines.append(
            f"| {point.server} | {point.clients} | {point.requests_per_s:g} | {point.p50_ms:g} "
            f"| {point.p99_ms:g} | {point.errors} | {accuracy[point.server]:.3f} | {times:.1f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
