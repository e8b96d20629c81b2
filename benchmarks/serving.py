"""Goodput and tail latency under Poisson arrivals: our champion and other servers.

    python benchmarks/serving.py --model models:/NAME@champion --teacher HF_FOLDER \
        --data FOLDER --seconds 5 --out serving.json

Servers run one after the other, never two at a time. Each request has one test text. The rate
doubles until a latency limit is exceeded twice, then the search continues between the last good
and the first bad rate; the last point is at twice the best rate. Requests are sent at their due
time independent of earlier responses (`poisson.c`). A request that is not answered with 200 counts
as infinitely late. Each request has a deadline of 100 ms, which a server may use. The load
generator runs on the same cores as the server. Before that, the same texts are scored without a
server (`batch.py`), to show the server's share of the CPU time.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rates import LIMITS_MS, Load, Point, build_generator, loader, padding_share, search
from servers import (
    HANDLERS,
    PT_DEPLOY,
    StartError,
    commands,
    common_parser,
    handler_commands,
    machine,
    path_of,
    running,
    sample,
    save_teacher,
)
from tables import Result, beside_batch, plot, rates_table, table

HERE = Path(__file__).resolve().parent


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, write JSON, Markdown and a plot."""
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # stops the servers too
    rows = sample(options.data)
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
                    load = loader(
                        generator,
                        run,
                        bodies,
                        seconds=options.seconds,
                        connections=options.connections,
                    )
                    _examine(result, load, options)
                    result.padding_share = padding_share(run.url)
            except StartError as error:
                result.reason = str(error)
            if server == PT_DEPLOY:  # once before and once after it: the machine's speed varies
                alone_us = round((alone_us + _batch_cpu_us(options)) / 2, 1)
            print(result, file=sys.stderr, flush=True)
            _write(results, alone_us, options)
    print(table(results))
    print(rates_table(results))
    print(beside_batch(results, alone_us))


def _batch_cpu_us(options: argparse.Namespace) -> float:
    """CPU microseconds per row of our model in a batch job."""
    command = [sys.executable, str(HERE / "batch.py"), "--model", options.model]
    command += ["--data", options.data, "--seconds", str(options.seconds)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, timeout=300)
    return float(json.loads(done.stdout)["cpu_us"])


def _examine(result: Result, load: Load, options: argparse.Namespace) -> None:
    load(options.first_rate)  # warm-up
    seen: dict[float, Point] = {}
    for limit in LIMITS_MS:
        search(load, options.first_rate, limit, seen)
    for limit in LIMITS_MS:  # a later point may keep the limit at a higher rate
        kept = [rate for rate, point in seen.items() if point.keeps(limit)]
        result.best[limit] = max(kept, default=0.0)
    best = max(result.best.values())
    for rate in options.rates:
        if rate not in seen and rate <= best:
            seen[rate] = load(rate)
    result.points = [seen[rate] for rate in sorted(seen)]
    if best:
        result.overload = load(2 * best)


def _all_commands(options: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
    """Commands of all servers, ours first."""
    found = commands(options.model, save_teacher(options.teacher, folder))
    found = {PT_DEPLOY: found.pop(PT_DEPLOY), **found}
    pythons = {name: getattr(options, f"{name.lower()}_python") for name in HANDLERS}
    found |= handler_commands(pythons, options.model, options.teacher, folder)
    only = options.only or found
    return {name: command for name, command in found.items() if name in only}


def _parser() -> argparse.ArgumentParser:
    parser = common_parser(__doc__)
    parser.add_argument("--seconds", type=float, default=10, help="seconds per point")
    parser.add_argument("--first-rate", type=float, default=8, help="requests/s of the first point")
    parser.add_argument("--rates", type=float, nargs="*", default=[8, 64, 512, 2048])
    parser.add_argument("--connections", type=int, default=512, help="most concurrent connections")
    for name in HANDLERS:
        option = f"--{name.lower()}-python"
        parser.add_argument(option, help=f"interpreter that has {name} and this package")
    parser.add_argument("--only", nargs="+", help="names of servers as in the table")
    parser.add_argument("--out", type=Path, default=Path("serving.json"))
    return parser


def _write(results: Sequence[Result], alone_us: float, options: argparse.Namespace) -> None:
    report = {
        "results": [asdict(result) for result in results],
        "batch_cpu_us": alone_us,
        "seconds": options.seconds,
        "data": options.data,
        "machine": machine(),
    }
    options.out.write_text(json.dumps(report, indent=1), encoding="utf8")
    texts = (table(results), rates_table(results), beside_batch(results, alone_us))
    options.out.with_suffix(".md").write_text("\n".join(texts), encoding="utf8")
    plot(results, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
