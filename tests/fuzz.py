"""Schemathesis against the server's /openapi.json; not run by pytest.

    python tests/fuzz.py --schemathesis OTHER_VENV/bin/schemathesis --cases 5000

Serves two tiny models, one that runs inline on the event loop and one on a thread. Runs rounds
with increasing seeds until enough requests were sent. The only 5xx allowed is 504 for a request
with a deadline; a missing response is a fault too. At the end the server must be ready and its
predictions right. Requests and responses are counted in schemathesis' HAR files. It sends JSON and
CSV; for Parquet see serving/test_bombs.py.
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

# Checks for a lenient parser: a request that the document does not allow may be answered with 200.
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
    """Fuzz and print the result; returns 1 if there are faults."""
    options = _parser().parse_args(arguments)
    schemathesis = shutil.which(options.schemathesis)
    if schemathesis is None:
        sys.exit("schemathesis is missing. Install it into another venv and name it there.")
    here = str(Path(__file__).resolve().parent)  # code of the tiny models, for the server
    os.environ["PYTHONPATH"] = os.pathsep.join([here, os.environ.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        folder = Path(name)
        quick, slow = save_tiny(folder / "quick"), save_tiny(folder / "slow", predict_s=0.002)
        command = [*commands(str(quick), folder)[PT_DEPLOY], str(slow)]
        # the slow model is loaded last
        with running(command, folder / "server.log", "/models/slow/invocations") as run:
            start = [os.path.abspath(schemathesis), "run", f"{run.url}/openapi.json"]
            start += [f"--max-examples={options.examples}", f"--checks={','.join(CHECKS)}"]
            faults = fuzz(start, folder, options.cases, options.seed) + after(run.url)
        if faults:
            print((folder / "server.log").read_text(errors="replace")[-4000:], file=sys.stderr)
    print("\n".join(faults) or "no faults")
    return 1 if faults else 0


def fuzz(start: Sequence[str], folder: Path, cases: int, seed: int) -> list[str]:
    """Run rounds until enough requests were sent; returns descriptions of faults."""
    statuses: Counter[int] = Counter()
    faults: list[str] = []
    for number in range(ROUNDS):
        # requests of the other phases do not depend on the seed
        phases = "fuzzing" if number else "examples,coverage,fuzzing"
        sent, output = _round([*start, f"--phases={phases}", f"--seed={seed + number}"], folder)
        statuses.update(entry["response"]["status"] for entry in sent)
        faults += [output] if output else []
        faults += [_describe(entry) for entry in sent if is_fault(entry)]
        seen = ", ".join(f"{status}: {count}" for status, count in sorted(statuses.items()))
        print(f"seed {seed + number}: {statuses.total()} sent; {seen}; {len(faults)} faults")
        sys.stdout.flush()
        if statuses.total() >= cases or not sent:
            break
    if statuses.total() < cases:
        faults.append(f"only {statuses.total()} of {cases} requests were sent")
    return faults


def is_fault(entry: dict[str, Any]) -> bool:
    """Whether a HAR entry has no response or a 5xx, except 504 for its own deadline."""
    status, headers = entry["response"]["status"], entry["request"]["headers"]
    if status == 504:
        given = [field["value"] for field in headers if field["name"].lower() == "x-deadline-ms"]
        return not any(Deadline.from_header(value, 0).expires_at for value in given)
    return not 100 <= status < 500


def after(url: str) -> list[str]:
    """Faults of the server after the last round: not ready, or wrong predictions."""
    try:
        for path in ("/livez", "/readyz"):
            urlopen(url + path, timeout=ANSWER_S).close()
        for path in ("/invocations", "/models/quick/invocations", "/models/slow/invocations"):
            for text in ("red", "green", "blue"):
                answer = ask(url + path, text, ANSWER_S)
                if not isinstance(answer, dict) or answer["label"] != text:
                    return [f"{path} answers {text} with {answer}"]
    except (OSError, ValueError) as error:
        return [f"the server does not respond after the last round: {error}"]
    return []


def _round(command: Sequence[str], folder: Path) -> tuple[list[dict[str, Any]], str]:
    """HAR entries of one round, and schemathesis' output if it failed."""
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


def _describe(entry: dict[str, Any]) -> str:
    """A request and its status in one line, enough to repeat it."""
    request, status = entry["request"], entry["response"]["status"]
    headers = {field["name"]: field["value"] for field in request["headers"]}
    body = request.get("postData", {}).get("text", "")
    return f"{status}: {request['method']} {request['url']} {headers} {body[:2000]!r}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--schemathesis", default="schemathesis", help="command of schemathesis")
    parser.add_argument("--cases", type=int, default=5000, help="least number of requests")
    parser.add_argument(
        "--examples", type=int, default=200, help="examples per round and operation"
    )
    parser.add_argument("--seed", type=int, default=1, help="seed of the first round")
    return parser


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # stops the server too
    sys.exit(main())
