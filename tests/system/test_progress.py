"""Progress: a bar in a terminal, lines in a log file."""

from __future__ import annotations

import io
import sys

import pytest

from mlflow_pt_deploy.system import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_file_gets_occasional_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with progress.progress("training", 1000, "batches") as shown:
        for _ in range(1000):
            shown.update()
    assert capsys.readouterr().err == ""  # faster than the interval
    monkeypatch.setattr(progress, "LINE_INTERVAL_S", 0.0)
    with progress.progress("building", 3, "variants", done=1) as shown:
        shown.update(note="teacher-eager-fp32")
        shown.update()
    assert capsys.readouterr().err == (
        "building: 2/3 variants, 0 s, teacher-eager-fp32\nbuilding: 3/3 variants, 0 s\n"
    )
    with progress.progress("predicting", 0, "rows") as shown:  # how many is unknown
        shown.update(7)
    assert capsys.readouterr().err == "predicting: 7 rows, 0 s\n"


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    monkeypatch.setattr(sys, "stderr", Terminal())
    with progress.progress("training", 10, "batches") as shown:
        for _ in range(10):
            shown.update(note="loss 0.1")
    assert "\r" in sys.stderr.getvalue() and "training" in sys.stderr.getvalue()
