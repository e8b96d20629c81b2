"""Signals: no deadlock, no run left in state RUNNING, no child process left."""

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

from mlflow_pt_deploy.system import interrupt

WITHIN_S = 10.0
RANDOM_MOMENTS = int(os.environ.get("PT_DEPLOY_SIGNALS", "0"))
MARK = "PT_DEPLOY_TEST_PROCESS"

STAGE = """
import os, signal, subprocess, sys, threading, time
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from mlflow_pt_deploy import cli
from mlflow_pt_deploy.system import child_process, interrupt

def stage(_):
    interrupt.begin()
    {body}

cli._COMMANDS["train"] = stage
sys.argv[1:] = ["train", "--data", "x"]
sys.exit(cli.main())
"""
LOCKED = """
    lock = threading.Lock()
    print("ready", flush=True)
    while True:
        with lock:  # a handler that raised here would leave the lock held
            time.sleep(0.05)
        interrupt.check()
"""
BLOCKED = """
    print("ready", flush=True)
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()
"""
DESCENDANTS = """
    inner = "import time; time.sleep(600)"
    outer = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {inner!r}])"
    child_process.start([sys.executable, "-c", outer])
    print("ready", flush=True)
    time.sleep(600)
"""


def start_stage(body: str) -> subprocess.Popen[str]:
    """Start a process whose stage is `body`; its descendants inherit `MARK`.

    It does not inherit that SIGHUP is ignored, where the tests run under nohup.
    """
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


def wait_for_exit(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code, and the last line on standard error."""
    try:
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    return process.returncode, errors.strip().splitlines()[-1]


def processes(mark: str) -> list[int]:
    """Ids of processes with this value of `MARK`."""
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
def test_a_signal_while_a_lock_is_held_causes_no_deadlock(
    number: signal.Signals, code: int, word: str
) -> None:
    process = start_stage(LOCKED)
    process.send_signal(number)
    assert wait_for_exit(process) == (code, f"pt-deploy train: {word}")


def test_a_blocked_call_ends_at_the_deadline() -> None:
    process = start_stage(BLOCKED)
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert wait_for_exit(process) == (143, "pt-deploy train: terminated")
    assert interrupt.GRACE_S <= time.monotonic() - started < WITHIN_S


def test_a_second_signal_exits_immediately_and_kills_grandchildren(tmp_path: Path) -> None:
    if not Path("/proc/self/environ").exists():
        pytest.skip("processes are found by their environment, in /proc")
    process = start_stage(DESCENDANTS)
    mark = Path(f"/proc/{process.pid}/environ").read_bytes().decode()
    mark = mark.partition(f"{MARK}=")[2].partition("\0")[0]
    until = time.monotonic() + 30
    while len(processes(mark)) < 3:
        assert time.monotonic() < until
        time.sleep(0.05)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert wait_for_exit(process) == (143, "pt-deploy train: terminated")
    assert time.monotonic() - started < 4
    assert processes(mark) == []


class Pipeline:
    """`pt-deploy run` on tiny data, resumed until it is finished."""

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

    def has_child(self, what: str) -> bool:
        """Whether a child with this text in its command line runs."""
        for pid in processes(self.mark):
            with suppress(OSError):
                if what.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    return True
        return False

    def interrupt(
        self, process: subprocess.Popen[bytes], number: signal.Signals, *, done: bool = False
    ) -> None:
        """Send a signal, and check the exit code and that nothing is left."""
        process.send_signal(number)
        started = time.monotonic()
        code = process.wait(60)
        seconds = time.monotonic() - started
        log = self.log.read_text()[-3000:]
        # -number: the interpreter had not reached our handlers, so nothing had begun
        allowed = {128 + number, -number, 0} if done else {128 + number}
        assert code in allowed, log
        assert seconds < WITHIN_S, log
        assert "Traceback" not in log
        assert processes(self.mark) == []
        assert not MlflowClient().search_runs(["0"], "attributes.status = 'RUNNING'")

    def run_id(self) -> str:
        tag = "tags.pt_deploy.stage = 'run'"
        found = MlflowClient().search_runs(["0"], tag, order_by=["attributes.start_time ASC"])
        return found[0].info.run_id if found else ""


@pytest.fixture
def pipeline(
    tmp_path: Path,
    tiny_model: Path,
    tiny_data: Path,
    tracking: str,
    monkeypatch: pytest.MonkeyPatch,
) -> Pipeline:
    if not Path("/proc/self/environ").exists():
        pytest.skip("processes are found by their environment, in /proc")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    return Pipeline(tmp_path, tiny_model, tiny_data)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.05)


def test_a_run_interrupted_at_each_stage_leaves_nothing_and_resumes(pipeline: Pipeline) -> None:
    process = pipeline.start()
    wait_for(lambda: pipeline.has_child("artifacts.export_worker"), process)
    pipeline.interrupt(process, signal.SIGTERM)
    run_id = pipeline.run_id()
    again = pipeline.start(run_id)
    wait_for(lambda: pipeline.has_child("evaluation.worker"), again)
    pipeline.interrupt(again, signal.SIGINT)
    last = pipeline.start(run_id)
    assert last.wait(300) == 0, pipeline.log.read_text()[-3000:]
    assert MlflowClient().get_run(run_id).info.status == "FINISHED"
    assert "champion is version 1" in pipeline.log.read_text()
    assert not list((pipeline.folder / "temporary").glob("pt-deploy-*"))


@pytest.mark.skipif(not RANDOM_MOMENTS, reason="PT_DEPLOY_SIGNALS=50 sends 50 signals")
def test_a_run_interrupted_at_random_moments(pipeline: Pipeline) -> None:
    started = time.monotonic()
    assert pipeline.start().wait(600) == 0, pipeline.log.read_text()[-3000:]
    total_s = time.monotonic() - started
    random_source = random.Random(0)
    resumed = ""
    for count in range(RANDOM_MOMENTS):
        process = pipeline.start(resumed)
        with suppress(subprocess.TimeoutExpired):
            process.wait(
                0.3 + random_source.uniform(0, total_s)
            )  # the interpreter starts before that
        number = (signal.SIGTERM, signal.SIGINT)[count % 2]
        pipeline.interrupt(process, number, done=True)
        print(count, process.returncode, flush=True)
        runs = MlflowClient().search_runs(
            ["0"],
            "tags.pt_deploy.stage = 'run' and attributes.status = 'FAILED'",
            max_results=1,
        )
        resumed = runs[0].info.run_id if runs and count % 2 else ""
    assert not list((pipeline.folder / "temporary").glob("pt-deploy-*"))
