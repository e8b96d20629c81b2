"""The HTTP fronts that are compared: one that is here answers, one that is not says why."""

import importlib.util
import shutil
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS / "handlers")]
front = importlib.import_module("front")
fronts = importlib.import_module("fronts")


def test_the_fronts_that_are_asked_for_are_those_that_there_are() -> None:
    assert tuple(front.FRONTS) == fronts.FRONTS
    assert len(front.ANSWER) == 60


@pytest.mark.skipif(shutil.which("wrk") is None, reason="no wrk")
def test_a_row_for_each_front(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = "hypercorn, uvloop and h11"
    if importlib.util.find_spec("hypercorn"):
        pytest.skip("hypercorn is here")
    monkeypatch.setenv("PYTHONPATH", "")  # it is set for the tiny model, and must be undone
    both = ["uvicorn, uvloop and httptools", missing]
    fronts.main(["--seconds", "1", "--clients", "2", "--fronts", *both])
    lines = capsys.readouterr().out.splitlines()
    assert len({line.count("|") for line in lines}) == 1
    rows = {cells[1].strip(): cells for line in lines[2:] if (cells := line.split("|"))}
    assert rows[missing][2].strip() == "ModuleNotFoundError: No module named 'hypercorn'"
    for name in ("uvicorn, uvloop and httptools", "pt-deploy, the short way"):
        rate, p99_ms, errors = (float(cell) for cell in rows[name][2:5])
        assert rate > 1 and p99_ms > 0 and errors == 0
