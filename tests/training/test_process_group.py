"""Processes that train together: shares of a batch, and two real ones under torchrun."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny.processes import trained_weights

from mlflow_pt_deploy.errors import TrainingError
from mlflow_pt_deploy.models import load_classifier
from mlflow_pt_deploy.system import child_process as child
from mlflow_pt_deploy.system.ranks import Ranks, launched_ranks
from mlflow_pt_deploy.training.process_group import ProcessGroup, check_shares


def test_shares_are_a_batch() -> None:
    batch = np.array([5, 3, 8, 1, 9])
    shares = [ProcessGroup(rank, 2).share(batch) for rank in (0, 1)]
    assert [rows.tolist() for rows, _ in shares] == [[5, 8, 9], [3, 1]]
    # (6/5 of the mean of 3 rows + 4/5 of the mean of 2) / 2 is the mean of 5
    assert [weight for _, weight in shares] == [6 / 5, 4 / 5]


def test_a_short_share_is_filled_and_weighs_its_own_rows_only() -> None:
    batch = np.array([5, 3])
    rows, weight = ProcessGroup(2, 3).share(batch)
    assert rows.tolist() == [5]
    assert weight == 0
    rows, weight = ProcessGroup(1, 2).share(batch, least=2)
    assert rows.tolist() == [5, 3]
    assert weight == 1


def test_a_process_alone_sends_nothing() -> None:
    alone = ProcessGroup()
    model = torch.nn.Linear(2, 2)
    assert alone.wrap(model, ()) is model
    assert alone.sum(3.0) == 3
    assert alone.broadcast(b"bytes") == b"bytes"
    alone.share_buffers(model)
    alone.check_same("digest")
    rows, weight = alone.share(np.array([4, 2]))
    assert (rows.tolist(), weight) == ([4, 2], 1)


@pytest.mark.parametrize(
    ("processes", "least", "message"),
    [
        (33, 1, "processes is 33, and a batch of 32 rows has no 1 for each. Give at most 32"),
        (17, 2, "has no 2 for each. Give at most 16"),
    ],
)
def test_more_processes_than_shares_are_refused(processes: int, least: int, message: str) -> None:
    check_shares(processes - 1, 32, least=least)
    with pytest.raises(TrainingError, match=message):
        check_shares(processes, 32, least=least)


def test_ranks_are_those_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in Ranks().environment():
        monkeypatch.delenv(name, raising=False)
    assert launched_ranks() == Ranks()
    place = Ranks(rank=3, size=4, local_rank=1, local_size=2)
    for name, value in place.environment().items():
        monkeypatch.setenv(name, value)
    assert launched_ranks() == place
    monkeypatch.setenv("LOCAL_RANK", "")
    with pytest.raises(TrainingError, match="LOCAL_RANK='', .* torchrun sets all four"):
        launched_ranks()


def test_two_processes_train_as_one(tiny_model: Path, tiny_data: Path, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = Path(__file__).parents[1] / "tiny" / "processes.py"
    arguments = [str(script), str(tiny_model), str(tiny_data), str(tmp_path)]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", *arguments],
        env=child.environment(GLOO_SOCKET_IFNAME="lo", OMP_NUM_THREADS="1"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    one = trained_weights(tiny_model, tiny_data)
    before = load_classifier(str(tiny_model)).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in one)
    moved = sum(float((one[name] - before[name]).abs().sum()) for name in one)
    apart = sum(float((one[name] - first[name]).abs().sum()) for name in one)
    assert moved > 0
    assert apart < 0.01 * moved  # sums in another order; Adam enlarges it where gradients are tiny
