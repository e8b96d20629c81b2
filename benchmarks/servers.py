"""Servers under test: commands, start and stop, and the rows of the requests."""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from urllib.error import URLError
from urllib.request import Request, urlopen

SEED = 0
TEACHER, OURS, PT_DEPLOY = "mlflow, transformers flavor", "mlflow, pt_deploy flavor", "pt-deploy"
HANDLERS = {"LitServe": "lit.py", "BentoML": "bento.py", "TorchServe": "torchserve.py"}
START_S = 180


class StartError(Exception):
    """A server did not start; the message is its last line of output."""


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        url: Base URL.
        path: Path of scoring requests.
        pid: Process id of the main process.
        start_s: Seconds from the command to the first response.
    """

    url: str
    path: str
    pid: int
    start_s: float


def sample(data: str) -> list[tuple[str, str]]:
    """Unique test texts with labels, shuffled because data sets are often sorted by label."""
    from mlflow_pt_deploy.data import load_data

    splits = load_data(data)
    texts = [row for row in splits.test.rows if isinstance(row, str)]
    labels = [splits.labels[at] for at in splits.test.targets]
    unique = list(dict(zip(texts, labels, strict=True)).items())
    random.Random(SEED).shuffle(unique)
    return unique


def save_teacher(teacher: Path, folder: Path) -> Path:
    """Save the teacher as in MLflow's documentation, as a text-classification pipeline."""
    import mlflow.transformers
    from transformers import pipeline

    target = folder / "teacher"
    # without them the flavor loads the model in another process to find its requirements
    mlflow.transformers.save_model(
        pipeline("text-classification", model=str(teacher)),
        path=str(target),
        pip_requirements=["transformers", "torch"],
    )
    return target


def commands(model: str, teacher: Path) -> dict[str, list[str]]:
    """Commands of servers by name; each takes ``--port``, some start with NAME=VALUE."""
    stock = [sys.executable, "-m", "mlflow", "models", "serve", "--env-manager", "local", "-m"]
    return {
        TEACHER: [*stock, str(teacher)],
        OURS: ["UVICORN_LOOP=mlflow_pt_deploy.serving.uvicorn_loop:new_loop", *stock, model],
        PT_DEPLOY: [sys.executable, "-m", "mlflow_pt_deploy.cli", "serve", model],
    }


def handler_commands(
    pythons: Mapping[str, str | None], model: str, teacher: Path, folder: Path
) -> dict[str, list[str]]:
    """Commands of other serving libraries, each with our artifact and with the plain teacher.

    Args:
        pythons: Interpreter for each of `HANDLERS`; None skips it.
        model: MLflow URI of our model.
        teacher: Hugging Face folder.
        folder: Folder for the artifact and for files of the servers.
    """
    found: dict[str, list[str]] = {}
    if not any(pythons.values()):
        return found
    import mlflow

    artifact = mlflow.artifacts.download_artifacts(model, dst_path=str(folder / "artifact"))
    for name, python in pythons.items():
        if python:
            start = [python, str(Path(__file__).resolve().parent / "handlers" / HANDLERS[name])]
            if name == "TorchServe":
                start += ["--folder", str(folder / "torchserve")]
            found[f"{name}, our artifact"] = [*start, "--artifact", artifact]
            found[f"{name}, eager teacher"] = [*start, "--teacher", str(teacher.resolve())]
    return found


def path_of(server: str) -> str:
    """Path of scoring requests: MLflow's, except for TorchServe."""
    return "/predictions/classifier" if server.startswith("TorchServe") else "/invocations"


def common_parser(description: str | None) -> argparse.ArgumentParser:
    """Parser with the options that all benchmarks have in common."""
    found = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    found.add_argument("--model", required=True, help="MLflow URI of our model")
    found.add_argument("--teacher", required=True, type=Path, help="Hugging Face folder")
    found.add_argument("--data", required=True, help="as for pt-deploy: a folder, catalog, ...")
    return found


def machine() -> dict[str, object]:
    """Description of this machine."""
    return {"cores": len(os.sched_getaffinity(0)), "platform": platform.platform()}


@contextmanager
def running(command: Sequence[str], log: Path, path: str = "/invocations") -> Iterator[Server]:
    """Run a server on a free port until the block ends; then stop all its processes.

    Raises:
        StartError: It ended, or did not respond in time.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = dict(word.split("=", 1) for word in takewhile(lambda word: "=" in word, command))
    command = command[len(variables) :]
    programs = os.pathsep.join([str(Path(command[0]).parent), os.environ.get("PATH", "")])
    root = str(Path(__file__).resolve().parents[1])
    environment = (
        os.environ
        | variables
        | {
            "PATH": programs,
            "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "HF_HUB_OFFLINE": "1",
        }
    )
    begin = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port)],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _await_answer(url + path, process, log)
            yield Server(url, path, process.pid, round(time.monotonic() - begin, 2))
        finally:
            _stop(process)


def ask(address: str, text: str, timeout: float = 60) -> object:
    """The prediction for one text; `address` is the server's URL with the path."""
    body = json.dumps({"inputs": [text]}).encode()
    request = Request(address, body, {"Content-Type": "application/json"})
    with urlopen(request, timeout=timeout) as response:
        answer = json.load(response)
    return answer["predictions"][0] if isinstance(answer, dict) else answer[0]


def cpu_seconds(pid: int) -> float:
    """CPU seconds of a process and its descendants, threads included."""
    ticks = 0
    for member in processes(pid):
        try:
            fields = Path(f"/proc/{member}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def processes(pid: int) -> list[int]:
    """A process and its descendants."""
    found = [pid]
    for member in found:
        for tasks in Path(f"/proc/{member}/task").glob("*/children"):
            try:
                found += map(int, tasks.read_text().split())
            except OSError:
                continue
    return found


def _stop(process: subprocess.Popen[bytes]) -> None:
    members = processes(process.pid)  # some of them start their own sessions
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(10)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
    for member in members:
        try:
            os.kill(member, signal.SIGKILL)
        except ProcessLookupError:
            continue


def _await_answer(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end and process.poll() is None:
        try:
            ask(address, "hello")
            return
        except (URLError, OSError, ValueError):
            time.sleep(0.05)
    lines = log.read_text(errors="replace").strip().splitlines()
    raise StartError(lines[-1] if lines else f"no answer within {START_S} s")
