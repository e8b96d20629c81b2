"""The monitor: counts of all workers, and one leader."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from tiny.serving import save_tiny

from mlflow_pt_deploy.registry.addresses import source
from mlflow_pt_deploy.serving.lifecycle.served_model import ServedModel
from mlflow_pt_deploy.serving.model.version_counts import VersionCounts
from mlflow_pt_deploy.serving.monitoring.monitor import Monitor, ServerCounts
from mlflow_pt_deploy.serving.worker_state import WorkerStates


class Recorder:
    def __init__(self) -> None:
        self.followed = 0
        self.led: list[ServerCounts] = []
        self.closed: list[ServerCounts] = []

    def follow(self) -> None:
        self.followed += 1

    def lead(self, counts: ServerCounts) -> None:
        self.led.append(counts)

    def close(self, counts: ServerCounts) -> None:
        self.closed.append(counts)


class Failing(Recorder):
    def lead(self, counts: ServerCounts) -> None:
        raise RuntimeError("broken")


@pytest.fixture
def model(tmp_path: Path) -> ServedModel:
    model = ServedModel("tiny", source(str(save_tiny(tmp_path / "tiny"))))
    model.open()
    return model


@contextmanager
def worker(folder: Path, model: ServedModel, duty: Recorder) -> Iterator[Monitor]:
    states = WorkerStates(folder, 2)
    states.claim()
    yield Monitor({"tiny": model}, [Failing(), duty], states)
    states.close()


def test_one_worker_leads_with_the_counts_of_all(model: ServedModel, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    first, second = Recorder(), Recorder()
    with ExitStack() as stack:
        leader = stack.enter_context(worker(folder, model, first))
        other = stack.enter_context(worker(folder, model, second))
        check(leader, other, model, folder, first, second)


def check(
    leader: Monitor,
    other: Monitor,
    model: ServedModel,
    folder: Path,
    first: Recorder,
    second: Recorder,
) -> None:
    model.counts = {"3": VersionCounts(requests=2), "4": VersionCounts(requests=5)}
    leader.tick()
    other.tick()  # one process stands for both, so it publishes the same file
    assert (first.followed, second.followed, second.led) == (1, 1, [])
    (folder / "counts-7-1.json").write_text('{"tiny": {"3": {"requests": 40}}}')  # a dead worker's
    leader.tick()
    counts = first.led[-1]["tiny"]
    assert (counts["3"].requests, counts["4"].requests) == (2 + 2 + 40, 5 + 5)
    other.stop()
    leader.stop()
    leader.stop()
    assert (len(first.closed), second.closed) == (1, [])


def test_a_process_without_workers_leads_itself(model: ServedModel) -> None:
    duty = Recorder()
    monitor = Monitor({"tiny": model}, [duty])
    model.counts = {"3": VersionCounts(requests=2)}
    monitor.tick()
    assert duty.led[0]["tiny"]["3"].requests == 2


def test_counts_that_all_workers_keep_together_are_added_once(
    model: ServedModel, tmp_path: Path
) -> None:
    states = WorkerStates(tmp_path, 1)
    shared = {"tiny": {"3": VersionCounts(judged=5, correct=4), "2": VersionCounts(judged=1)}}
    monitor = Monitor({"tiny": model}, [], states, lambda: shared)
    for pid in (1, 2):
        (tmp_path / f"counts-0-{pid}.json").write_text('{"tiny": {"3": {"requests": 40}}}')
    found = monitor.counts()["tiny"]
    assert (found["3"].requests, found["3"].judged, found["3"].correct) == (80, 5, 4)
    assert found["2"].judged == 1
