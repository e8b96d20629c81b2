"""Signals: no lock that they could hang in, no run left running, no child left over."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from mlflow import MlflowClient

from mlflow_pt_deploy import interrupt

WITHIN_S = 10.0
RANDOM_MOMENTS = int(os.environ.get("PT_DEPLOY_SIGNALS", "0"))
MARK = "PT_DEPLOY_TEST_FAMILY"

STAGE = """
import os, subprocess, sys, threading, time
from mlflow_pt_deploy import child, cli, interrupt

def stage(_):
    interrupt.begin()
    {body}

cli._CALLS["train"] = stage
sys.argv[1:] = ["train", "--data", "x"]
sys.exit(cli.main())
"""
LOCKED = """
    lock = threading.Lock()
    print("ready", flush=True)
    while True:
        with lock:  # a handler that raises in here would leave the lock to the cleanup
            time.sleep(0.05)
        interrupt.check()
"""
FOR_EVER = """
    print("ready", flush=True)
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()
"""
FAMILY = """
    inner = "import time; time.sleep(600)"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    child.start([sys.executable, "-c", outer])
    print("ready", flush=True)
    time.sleep(600)
"""


def start_stage(body: str) -> subprocess.Popen[str]:
    """A process in such a stage; it and what it starts have `MARK` in their environment."""
    process = subprocess.Popen(
        [sys.executable, "-c", STAGE.format(body=body.strip())],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, MARK: str(random.getrandbits(64))},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code, and the last line on standard error."""
    try:
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, errors.strip().splitlines()[-1]


def family(mark: str) -> list[int]:
    """Processes with this value of `MARK`."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
    return found


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [
        (signal.SIGTERM, 143, "terminated"),
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGHUP, 129, "hung up"),
    ],
)
def test_a_signal_that_arrives_while_a_lock_is_held_hangs_nothing(
    number: signal.Signals, code: int, word: str
) -> None:
    process = start_stage(LOCKED)
    process.send_signal(number)
    assert ended(process) == (code, f"pt-deploy train: {word}")


def test_a_call_that_never_returns_is_ended_by_the_deadline() -> None:
    process = start_stage(FOR_EVER)
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert ended(process) == (143, "pt-deploy train: terminated")
    assert interrupt.GRACE_S <= time.monotonic() - started < WITHIN_S


def test_a_second_signal_ends_at_once_and_grandchildren_with_it(tmp_path: Path) -> None:
    if not Path("/proc/self/environ").exists():
        pytest.skip("processes are found by their environment, in /proc")
    process = start_stage(FAMILY)
    mark = Path(f"/proc/{process.pid}/environ").read_bytes().decode()
    mark = mark.partition(f"{MARK}=")[2].partition("\0")[0]
    until = time.monotonic() + 30
    while len(family(mark)) < 3:
        assert time.monotonic() < until
        time.sleep(0.05)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert ended(process) == (143, "pt-deploy train: terminated")
    assert time.monotonic() - started < 4
    assert family(mark) == []


class Line:
    """`pt-deploy run` on tiny data, started again and again until it is done."""

    def __init__(self, folder: Path, model: Path, data: Path) -> None:
        self.folder, self._model, self._data = folder, model, data
        self.log = folder / "log"

    def start(self, resume: str = "") -> subprocess.Popen[bytes]:
        small = "--epochs 2 --student-epochs 0 --static-epochs 1 --seconds 0.01 --threads 1"
        words = f"run --data {self._data} --teacher {self._model} {small}".split()
        words += ["--variants", "eager-fp32,onnxruntime-fp32"]
        words += ["--resume", resume] if resume else []
        self.mark = str(random.getrandbits(64))
        with self.log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "mlflow_pt_deploy.cli", *words],
                stdout=log,
                stderr=log,
                env={**os.environ, MARK: self.mark},
                start_new_session=True,
            )

    def family(self, what: str) -> bool:
        """Whether a child with this in its command line runs."""
        for pid in family(self.mark):
            with suppress(OSError):
                if what.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return True
        return False

    def interrupted(
        self, process: subprocess.Popen[bytes], number: signal.Signals, *, done: bool = False
    ) -> None:
        """Send a signal, and check what it must leave behind."""
        process.send_signal(number)
        started = time.monotonic()
        code = process.wait(60)
        seconds = time.monotonic() - started
        said = self.log.read_text()[-3000:]
        # -number: the interpreter had not come to our handlers, so nothing was begun
        allowed = {128 + number, -number, 0} if done else {128 + number}
        assert code in allowed, said
        assert seconds < WITHIN_S, said
        assert "Traceback" not in said
        assert family(self.mark) == []
        assert not MlflowClient().search_runs(["0"], "attributes.status = 'RUNNING'")

    def run_id(self) -> str:
        tag = "tags.pt_deploy.stage = 'run'"
        found = MlflowClient().search_runs(["0"], tag, order_by=["attributes.start_time ASC"])
        return found[0].info.run_id if found else ""


@pytest.fixture
def line(
    tmp_path: Path,
    tiny_model: Path,
    tiny_data: Path,
    tracking: str,
    monkeypatch: pytest.MonkeyPatch,
) -> Line:
    if not Path("/proc/self/environ").exists():
        pytest.skip("processes are found by their environment, in /proc")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    return Line(tmp_path, tiny_model, tiny_data)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.05)


def test_a_run_that_is_interrupted_at_each_stage_leaves_nothing_and_goes_on(line: Line) -> None:
    process = line.start()
    wait_for(lambda: line.family("variants.export"), process)
    line.interrupted(process, signal.SIGTERM)
    run_id = line.run_id()
    again = line.start(run_id)
    wait_for(lambda: line.family("measure.worker"), again)
    line.interrupted(again, signal.SIGINT)
    last = line.start(run_id)
    assert last.wait(300) == 0, line.log.read_text()[-3000:]
    assert MlflowClient().get_run(run_id).info.status == "FINISHED"
    assert "champion is version 1" in line.log.read_text()
    assert not list((line.folder / "temporary").glob("pt-deploy-*"))


@pytest.mark.skipif(not RANDOM_MOMENTS, reason="PT_DEPLOY_SIGNALS=50 sends as many signals")
def test_a_run_that_is_interrupted_at_random_moments(line: Line) -> None:
    started = time.monotonic()
    assert line.start().wait(600) == 0, line.log.read_text()[-3000:]
    whole_s = time.monotonic() - started
    draw = random.Random(0)
    resumed = ""
    for count in range(RANDOM_MOMENTS):
        process = line.start(resumed)
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.3 + draw.uniform(0, whole_s))  # before that Python itself starts
        number = (signal.SIGTERM, signal.SIGINT)[count % 2]
        line.interrupted(process, number, done=True)
        print(count, process.returncode, flush=True)
        runs = MlflowClient().search_runs(
            ["0"],
            "tags.pt_deploy.stage = 'run' and attributes.status = 'FAILED'",
            max_results=1,
        )
        resumed = runs[0].info.run_id if runs and count % 2 else ""
    assert not list((line.folder / "temporary").glob("pt-deploy-*"))
