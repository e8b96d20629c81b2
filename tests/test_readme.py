"""Every command in README.md runs as printed, on tiny data, with small budgets."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from mlflow_pt_deploy.cli import main
from mlflow_pt_deploy.cli_args import build_parser
from mlflow_pt_deploy.runtimes.catalog import select

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Appended to the printed flags, so that a test takes seconds: the last value of a flag counts. That
# the printed variants exist is checked for all pages.
SMALL_RUN = (
    "--epochs 1 --student-epochs 0 --static-epochs 1 --learning-rate 1e-3 --retain 0.1 "
    "--seconds 0.1 --threads 1 --variants numpy"
)
SMALL_OPTIMIZE = "--seconds 0.5 --threads 1 --variants eager-fp32"


def _blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def _commands(start: str) -> list[str]:
    """Lines of the shell blocks that begin with `start`."""
    lines = "".join(_blocks(README, "bash")).splitlines()
    return [line for line in lines if line.startswith(f"{start} ")]


def test_length_and_links() -> None:
    assert len(README.splitlines()) <= 150
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_shell_command_is_covered() -> None:
    """A new kind of command needs a test of its own below."""
    lines = "".join(_blocks(README, "bash")).splitlines()
    known = ("make", "pt-deploy run", "pt-deploy optimize", "pt-deploy serve")
    covered = [line for kind in (*known, "mlflow models serve", "curl") for line in _commands(kind)]
    assert sorted(lines) == sorted(covered)


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    phony = re.findall(r"^\.PHONY: (.*)", makefile, re.MULTILINE)[0].split()
    commands = _commands("make")
    assert len(commands) >= 2
    for command in commands:
        for target in command.split()[1:]:
            assert target in phony
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_mlflow_run_is_understood() -> None:
    """The line is printed within a sentence; MLflow would fetch the repository."""
    import yaml
    from mlflow.cli import run

    lines = re.findall(r"`mlflow run ([^`]*)`", README)
    assert lines
    for line in lines:
        values = run.make_context("mlflow run", shlex.split(line)).params
        points = yaml.safe_load((ROOT / "MLproject").read_text())["entry_points"]
        parameters = points[values["entry_point"]]["parameters"]
        assert all("default" in each for each in parameters.values())


@pytest.fixture
def folder(
    tracking: str,
    tmp_path: Path,
    tiny_model: Path,
    tiny_data: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """A working directory with the folders that README.md names."""
    from transformers import AutoTokenizer, BertConfig, BertModel

    shutil.copytree(tiny_data, tmp_path / "tickets")
    shutil.copytree(tiny_model, tmp_path / "my-model")
    config = BertConfig.from_pretrained(tiny_model, num_hidden_layers=3)
    BertModel(config).save_pretrained(tmp_path / "my-encoder")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "my-encoder")
    path = (str(Path(sys.executable).parent), os.environ["PATH"])
    monkeypatch.setenv("PATH", os.pathsep.join(path))  # pt-deploy and mlflow of this environment
    modules = (str(ROOT), os.environ.get("PYTHONPATH", ""))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(modules))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_run_then_serve_and_score(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The data block, `pt-deploy run`, both servers and the request, in the order of README.md."""
    (rows,) = _blocks(README, "csv")
    assert rows.splitlines()[0] == (folder / "tickets" / "train.csv").read_text().splitlines()[0]
    (run,) = _commands("pt-deploy run")
    assert main(shlex.split(f"{run} {SMALL_RUN}")[1:]) == 0
    assert "promoted: models:/tickets@champion is version 1" in capsys.readouterr().out
    (stock,) = _commands("mlflow models serve")
    (own,) = _commands("pt-deploy serve")
    (request,) = _commands("curl")
    with _served(stock, "-p 5001") as first, _served(own, "--port 5000") as second:
        for port in (first, second):
            answer = _answer(_replaced(request, ":5000/", f":{port}/"))
            assert answer.startswith('{"predictions": [[{"label": "'), answer


def test_optimize(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (optimize,) = _commands("pt-deploy optimize")
    assert main([*shlex.split(f"{optimize} {SMALL_OPTIMIZE}")[1:], "--json"]) == 0
    out = capsys.readouterr().out
    assert "next: pt-deploy promote --run" in out
    done = json.loads(out.strip().splitlines()[-1])
    (row,) = done["variants"]
    assert row["variant"].endswith("-eager-fp32") and not row["reason"]
    run = MlflowClient().get_run(done["run_id"])
    assert run.data.metrics["pyfunc_latency_p50_ms"] > 0
    assert "through mlflow.pyfunc's predict" in run.data.tags["mlflow.note.content"]


def test_python(folder: Path) -> None:
    (code,) = _blocks(README, "python")
    names: dict[str, Any] = {}
    small = 'variants="eager-fp32", seconds=0.1, threads=1'
    exec(_replaced(code, 'variants="onnxruntime"', small), names)
    assert names["promotion"].uri == "models:/tickets@champion"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_and_snippets_of_every_page_are_understood(page: Path) -> None:
    """Flags exist; Python parses. The pages' commands are not run."""
    text = page.read_text(encoding="utf8")
    for line in "".join(_blocks(text, "bash")).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if "pt-deploy" in words and "deployments" not in words:
            start = words.index("pt-deploy") + 1
            if words[start:] and words[start] != "--help":
                parsed = build_parser().parse_args(words[start:])
                select(getattr(parsed, "variants", ""))
    for code in _blocks(text, "python"):
        compile(code, str(page), "exec")


def _replaced(text: str, old: str, new: str) -> str:
    assert old in text
    return text.replace(old, new)


def _shell(command: str) -> str:
    """Standard output of a command that succeeds."""
    run = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


@contextmanager
def _served(command: str, port_flag: str) -> Iterator[int]:
    """Run a server on a free port instead of the printed one."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    flag, _ = port_flag.split()
    words = shlex.split(_replaced(command, port_flag, f"{flag} {port}"))
    with Path(f"{port}.log").open("w") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)
    try:
        _wait(lambda: process.poll() is not None or _is_ready(port))
        assert process.poll() is None, Path(f"{port}.log").read_text()
        yield port
    finally:
        process.terminate()
        process.wait(30)


def _is_ready(port: int) -> bool:
    probe = ["curl", "--silent", "--fail", f"http://127.0.0.1:{port}/ping"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


def _answer(command: str) -> str:
    return _shell(_replaced(command, "curl ", "curl --silent --show-error --fail "))


def _wait(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < end, "the server does not answer"
        time.sleep(0.2)
