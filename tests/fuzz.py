"""Schemathesis against what the server says of itself in /openapi.json; pytest does not run it.

    python tests/fuzz.py --schemathesis OTHER_VENV/bin/schemathesis --cases 5000

Two tiny models are served, one that runs inline on the event loop and one on a thread.
Rounds, each with the next seed, go on until so many requests were sent. The one 5xx that a server
may answer is 504 to a request that came with a deadline; no answer at all is a fault too. At the
end the server must still be ready and right. What was sent and answered is counted from
schemathesis' HAR files. It sends JSON and CSV and no Parquet; for that see serving/test_hostile.py.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from tiny.serving import save_tiny

from mlflow_pt_deploy.serving.http.deadline import Deadline

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
from servers import PT_DEPLOY, ask, commands, running

# Those that hold for a lenient reader: what the document calls wrong may be answered all the same.
CHECKS = (
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
)
ANSWER_S = 20
ROUND_S = 3600
ROUNDS = 100


def main(arguments: Sequence[str] | None = None) -> int:
    """Fuzz and print what was seen; 1 if anything was wrong."""
    options = _parser().parse_args(arguments)
    schemathesis = shutil.which(options.schemathesis)
    if schemathesis is None:
        sys.exit("schemathesis is missing. Install it into another venv and name it there.")
    here = str(Path(__file__).resolve().parent)  # the tiny models' code, for the server
    os.environ["PYTHONPATH"] = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder = Path(name)
        quick, slow = save_tiny(folder / "quick"), save_tiny(folder / "slow", predict_s=0.002)
        command = [*commands(str(quick), folder)[PT_DEPLOY], str(slow)]
        # the slow one is loaded last, and must be there
        with running(command, folder / "server.log", "/models/slow/invocations") as run:
            start = [os.path.abspath(schemathesis), "run", f"{run.url}/openapi.json"]
            start += [f"--max-examples={options.examples}", f"--checks={','.join(CHECKS)}"]
            faults = fuzz(start, folder, options.cases, options.seed) + after(run.url)
        if faults:
            print((folder / "server.log").read_text(errors="replace")[-4000:], file=sys.stderr)
    print("\n".join(faults) or "nothing wrong")
    return 1 if faults else 0


def fuzz(start: Sequence[str], folder: Path, cases: int, seed: int) -> list[str]:
    """Rounds until enough was sent; each fault in words."""
    statuses: Counter[int] = Counter()
    faults: list[str] = []
    for number in range(ROUNDS):
        # what the other phases send does not depend on the seed
        phases = "fuzzing" if number else "examples,coverage,fuzzing"
        sent, said = _round([*start, f"--phases={phases}", f"--seed={seed + number}"], folder)
        statuses.update(entry["response"]["status"] for entry in sent)
        faults += [said] if said else []
        faults += [_told(entry) for entry in sent if is_fault(entry)]
        seen = ", ".join(f"{status}: {count}" for status, count in sorted(statuses.items()))
        print(f"seed {seed + number}: {statuses.total()} sent; {seen}; {len(faults)} faults")
        sys.stdout.flush()
        if statuses.total() >= cases or not sent:
            break
    if statuses.total() < cases:
        faults.append(f"only {statuses.total()} of {cases} requests were sent")
    return faults


def is_fault(entry: dict[str, Any]) -> bool:
    """Whether a HAR file's entry has no answer, or a 5xx but a missed deadline of its own."""
    status, headers = entry["response"]["status"], entry["request"]["headers"]
    if status == 504:
        given = [field["value"] for field in headers if field["name"].lower() == "x-deadline-ms"]
        return not any(Deadline.from_header(value, 0).expires_at for value in given)
    return not 100 <= status < 500


def after(url: str) -> list[str]:
    """Whether the server is there, ready and right when all is over; else why not."""
    try:
        for path in ("/livez", "/readyz"):
            urlopen(url + path, timeout=ANSWER_S).close()
        for path in ("/invocations", "/models/quick/invocations", "/models/slow/invocations"):
            for text in ("red", "green", "blue"):
                answer = ask(url + path, text, ANSWER_S)
                if not isinstance(answer, dict) or answer["label"] != text:
                    return [f"{path} answers {text} with {answer}"]
    except (OSError, ValueError) as error:
        return [f"afterwards the server is not well: {error}"]
    return []


def _round(command: Sequence[str], folder: Path) -> tuple[list[dict[str, Any]], str]:
    """What was sent and answered, and what schemathesis says if it is not content."""
    report = folder / "round.har"
    report.unlink(missing_ok=True)
    done = subprocess.run(
        [
            *command,
            f"--report-har-path={report}",
            f"--request-timeout={ANSWER_S}",
            "--continue-on-failure",
            "--suppress-health-check=all",
        ],
        check=False,
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=ROUND_S,
    )
    sent = json.loads(report.read_text())["log"]["entries"] if report.exists() else []
    return sent, (done.stdout + done.stderr)[-4000:] if done.returncode else ""


def _told(entry: dict[str, Any]) -> str:
    """A request and its status in one line, to ask it again."""
    request, status = entry["request"], entry["response"]["status"]
    headers = {field["name"]: field["value"] for field in request["headers"]}
    body = request.get("postData", {}).get("text", "")
    return f"{status}: {request['method']} {request['url']} {headers} {body[:2000]!r}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--schemathesis", default="schemathesis", help="its command")
    parser.add_argument("--cases", type=int, default=5000, help="requests to send at least")
    parser.add_argument("--examples", type=int, default=200, help="a round and operation")
    parser.add_argument("--seed", type=int, default=1, help="of the first round")
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is stopped too
    sys.exit(main())
