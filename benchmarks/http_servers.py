"""HTTP servers: what each costs before a model runs.

    python benchmarks/http_servers.py --seconds 10 --clients 8 32 --python VENV/bin/python

The same trivial application (it reads the body and answers 60 constant bytes) runs behind each
server, one process each, one after the other. The last row is ``pt-deploy serve``, which also
parses JSON, runs a model that counts words, and formats predictions. Clients are closed loops (wrk)
on the same cores as the server. A server that VENV does not have is a row with the reason.
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
SERVERS = (
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
    print(f"| server | {' | '.join(titles)} |\n|---{'|--:' * 3 * len(titles)}|")
    with tempfile.TemporaryDirectory(prefix="http-servers-") as name:
        folder = Path(name)
        lua = write_lua(folder, ["red green blue and some more words"])
        for server, command in _commands(options, folder).items():
            try:
                with running(command, folder / "log") as run:
                    address = run.url + run.path
                    cells = [_cells(address, n, options.seconds, lua) for n in options.clients]
            except StartError as error:
                cells = [str(error), *[""] * (3 * len(titles) - 1)]
            print(f"| {server} | {' | '.join(cells)} |", flush=True)


def _commands(options: argparse.Namespace, folder: Path) -> dict[str, list[str]]:
    tests = str(HERE.parent / "tests")  # code of the tiny model, for its server too
    os.environ["PYTHONPATH"] = os.pathsep.join([tests, os.environ.get("PYTHONPATH", "")])
    sys.path.insert(0, tests)
    from tiny.serving import save_tiny  # type: ignore[import-not-found]

    start = [options.python, str(HERE / "handlers" / "http_server.py")]
    ours = commands(str(save_tiny(folder / "tiny")), folder)[PT_DEPLOY]
    return {server: [*start, server] for server in options.servers} | {PT_DEPLOY: ours}


def _cells(address: str, clients: int, seconds: int, lua: Path) -> str:
    wrk(address, clients, max(1, seconds // 4), lua)
    seen = wrk(address, clients, seconds, lua)
    rate = (seen["requests"] - seen["errors"]) / seen["seconds"]
    return f"{rate:.0f} | {seen['p99_ms']:.2f} | {seen['errors']:.0f}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=int, default=10, help="seconds per point after warm-up")
    parser.add_argument("--clients", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--servers", nargs="+", choices=SERVERS, default=SERVERS)
    parser.add_argument("--python", default=sys.executable, help="interpreter that has the servers")
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # stops the servers too
    main()
