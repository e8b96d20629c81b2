"""Which HTTP front: what the ways into Python cost before a model is asked.

    python benchmarks/fronts.py --seconds 10 --clients 8 32 --python VENV/bin/python

The same trivial application (it reads a request's body, and answers 60 bytes that never change)
behind each front, one process each, one after the other; and pt-deploy's own short way, which does
more: it also reads the JSON, asks a model that counts words, and writes the answer. Clients are
closed loops (wrk) that share the cores with the server. A front that VENV lacks is a row with the
reason.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from closed_loop import write_lua, wrk
from servers import PT_DEPLOY, StartError, commands, running

HERE = Path(__file__).resolve().parent
FRONTS = (
    "uvicorn, uvloop and httptools",
    "uvicorn, asyncio and h11",
    "granian, ASGI",
    "granian, RSGI",
    "hypercorn, uvloop and h11",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure all and print Markdown."""
    options = _parser().parse_args(arguments)
    if shutil.which("wrk") is None:
        sys.exit("wrk, the load generator, is missing. Install it with: apt-get install wrk")
    titles = [f"{clients} clients: requests/s | p99 ms | errors" for clients in options.clients]
    print(f"| front | {' | '.join(titles)} |\n|---{'|--:' * 3 * len(titles)}|")
    with tempfile.TemporaryDirectory(prefix="fronts-") as name:
        folder = Path(name)
        lua = write_lua(folder, ["red green blue and some more words"])
        for front, command in _commands(options, folder).items():
            try:
                with running(command, folder / "log") as run:
                    address = run.url + run.path
                    cells = [_cells(address, n, options.seconds, lua) for n in options.clients]
            except StartError as error:
                cells = [str(error), *[""] * (3 * len(titles) - 1)]
            print(f"| {front} | {' | '.join(cells)} |", flush=True)


def _commands(options: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
    tests = str(HERE.parent / "tests")  # the tiny model's code, also for its server
    os.environ["PYTHONPATH"] = os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")])
    sys.path.insert(0, tests)
    from tiny_serving import save_tiny  # type: ignore[import-not-found]

    start = [options.python, str(HERE / "handlers" / "front.py")]
    ours = commands(str(save_tiny(folder / "tiny")), folder)[PT_DEPLOY]
    return {front: [*start, front] for front in options.fronts} | {"pt-deploy, the short way": ours}


def _cells(address: str, clients: int, seconds: int, lua: Path) -> str:
    wrk(address, clients, max(1, seconds // 4), lua)
    seen = wrk(address, clients, seconds, lua)
    rate = (seen["requests"] - seen["errors"]) / seen["seconds"]
    return f"{rate:.0f} | {seen['p99_ms']:.2f} | {seen['errors']:.0f}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=int, default=10, help="a point, after warm-up")
    parser.add_argument("--clients", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--fronts", nargs="+", choices=FRONTS, default=FRONTS)
    parser.add_argument("--python", default=sys.executable, help="of a venv with the fronts")
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that servers are stopped too
    main()
