"""Unexpected errors: one sentence with the cause, an exit code, no traceback."""

from __future__ import annotations

import errno
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import sqlalchemy.exc
from mlflow.exceptions import MlflowException

from mlflow_pt_deploy import cli
from mlflow_pt_deploy.cli import main


@pytest.fixture
def run_failing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[BaseException], str]:
    """Standard error of a stage that raises this error."""

    def run(error: BaseException) -> str:
        def stage(_: object) -> dict[str, object]:
            raise error

        monkeypatch.setitem(cli._COMMANDS, "train", stage)
        assert main(["train", "--data", "x"]) == 1
        return capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (MemoryError(), "out of memory (MemoryError). Free memory, or use a smaller"),
        (RuntimeError("[enforce fail] can't allocate memory: 9 GB"), "out of memory ([enforce"),
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full ([Errno 28] No spa"),
        (PermissionError(13, "Permission denied", "/x"), "permission denied ([Errno 13] Permiss"),
        (FileNotFoundError(2, "No such file", "/x/y"), "a file cannot be used ([Errno 2] No such"),
        (MlflowException("quota\nexceeded"), "database failed (quota exceeded). Check that it"),
        (sqlite3.OperationalError("database is locked"), "failed (database is locked)."),
        (sqlalchemy.exc.OperationalError("x", {}, Exception("gone")), "database failed ("),
        (ConnectionResetError("reset"), "a server cannot be reached (reset)."),
        (KeyError("x"), "unexpected error: KeyError: 'x'."),
        (ValueError("a" * 2000 + " the reason"), "the reason."),
    ],
)
def test_the_kind_and_the_cause_are_reported(
    error: BaseException, sentence: str, run_failing: Callable[[BaseException], str]
) -> None:
    message = run_failing(error)
    assert sentence in message
    assert message.startswith("pt-deploy train: ") and message.count("\n") == 1
    assert "Traceback" not in message and len(message) < 1200
    path = Path(message.partition("The traceback is in ")[2].partition(";")[0])
    assert type(error).__name__ in path.expanduser().read_text()


def test_debug_mode_shows_the_traceback(
    run_failing: Callable[[BaseException], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PT_DEPLOY_DEBUG", "1")
    assert "Traceback" in run_failing(KeyError("x"))


def test_an_unwritable_home_does_not_hide_the_error(
    run_failing: Callable[[BaseException], str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PT_DEPLOY_HOME", str(tmp_path / "file"))
    assert run_failing(KeyError("x")).endswith(
        "KeyError: 'x'. PT_DEPLOY_DEBUG=1 shows the traceback.\n"
    )


def test_a_closed_pipe_prints_no_error() -> None:
    code = (
        "import sys; from mlflow_pt_deploy import cli\n"
        "cli._COMMANDS['train'] = lambda _: print('line\\n' * 100_000)\n"
        "sys.argv[1:] = ['train', '--data', 'x']; sys.exit(cli.main())"
    )
    read, write = os.pipe()
    os.close(read)
    run = subprocess.run(
        [sys.executable, "-c", code], stdout=write, stderr=subprocess.PIPE, check=False
    )
    os.close(write)
    assert (run.returncode, run.stderr) == (1, b"")
