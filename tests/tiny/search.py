"""A synthetic objective for the search tests.

A transformer of n layers has accuracy 0.9 - 0.3 / n and latency n ms; a static student has accuracy
0.55 and latency 0.1 ms. Each factor of 10 between the learning rate and 1e-4 costs 0.2 accuracy.
The accuracy after each epoch grows linearly from nine tenths of the final value.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import optuna

from mlflow_pt_deploy.search import (
    STATIC,
    TRANSFORMER,
    CompletedTrial,
    FailedTrial,
    Outcome,
    Report,
    Space,
    StudyConfig,
    StudyResult,
    TrialParams,
)

RATES = (1e-5, 1e-3)
SPACE = Space(
    replace(
        TRANSFORMER, variants=("openvino-fp32",), layers=(1, 4), epochs=(2, 3), learning_rate=RATES
    ),
    replace(STATIC, variants=("numpy-fp32", "eager-fp32"), epochs=(2, 3), learning_rate=RATES),
)


def objective(point: TrialParams) -> Outcome:
    best = 0.9 - 0.3 / point.layers if point.layers else 0.55
    miss = 0.2 * abs(math.log10(point.learning_rate) + 4)
    return Outcome(best - miss, point.layers or 0.1)


def evaluate(point: TrialParams, report: Report) -> Outcome:
    outcome = objective(point)
    for epoch in range(1, point.epochs + 1):
        report(epoch, outcome.accuracy * (0.9 + 0.1 * epoch / point.epochs))
    return outcome


@contextmanager
def fast_folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory where possible, because SQLite writes often and waits for the disk."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=memory) as name:
        yield Path(name)


def stored(config: StudyConfig) -> optuna.Study:
    """Load the study with plain Optuna."""
    return optuna.load_study(study_name=config.study, storage=config.storage)


def records(found: StudyResult) -> list[CompletedTrial | FailedTrial]:
    both: list[CompletedTrial | FailedTrial] = [*found.finished, *found.dropped]
    return sorted(both, key=lambda record: record.number)


def numbers(found: StudyResult) -> list[int]:
    return [record.number for record in records(found)]


def points(found: StudyResult) -> list[TrialParams]:
    return [record.point for record in records(found) if record.point is not None]


SCRIPT = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from mlflow_pt_deploy.search import StudyConfig, search
from tiny.search import SPACE, evaluate

def slow(point, report):
    if report.number == {hang}:
        report(1, 0.4)
        Path({marker!r}).touch()
        time.sleep(600)
    return evaluate(point, report)

config = StudyConfig("students", {storage!r}, trials={trials}, heartbeat_s={heartbeat})
search(slow, SPACE, config)
"""


def start(config: StudyConfig, marker: Path, *, hang: int = -1) -> subprocess.Popen[bytes]:
    """Start a search in another process; in trial `hang` it creates the file `marker` and hangs."""
    script = SCRIPT.format(
        tests=str(Path(__file__).parents[1]),
        hang=hang,
        marker=str(marker),
        storage=config.storage,
        trials=config.trials,
        heartbeat=config.heartbeat_s,
    )
    return subprocess.Popen([sys.executable, "-c", script])
