"""Number of replicas, and the CPU cores of each."""

import os
from pathlib import Path

import pytest

from mlflow_pt_deploy.errors import ServingError
from mlflow_pt_deploy.system.cpu_allocation import (
    Share,
    count_replicas,
    describe_shares,
    share_cores,
)
from mlflow_pt_deploy.system.hardware import core_numbers, usable_cores


def test_replica_count_by_number_of_cores() -> None:
    assert [count_replicas(0, cores) for cores in (1, 2, 4, 7, 8, 16, 32, 128)] == [
        *(1, 1, 1, 1),
        *(2, 4, 8, 8),
    ]
    assert count_replicas(0, 64, fit=False) == 1
    assert count_replicas(3, 1) == 3


def test_cores_are_divided_evenly() -> None:
    assert share_cores(2, 8, range(8), False) == [Share(4), Share(4)]
    assert share_cores(2, 5, range(5), True) == [Share(2, (0, 1)), Share(3, (2, 3, 4))]
    assert share_cores(3, 2, (0, 1), False) == [Share(1), Share(1), Share(1)]
    quota = share_cores(2, 4, range(8), True)  # a container that sees more cores than it may use
    assert quota == [Share(2, (0, 1, 2, 3)), Share(2, (4, 5, 6, 7))]
    plan = describe_shares(share_cores(2, 5, range(5), True))
    assert plan == "2 replicas, each a process for 2 or 3 cores, pinned to 0,1 | 2,3,4"
    assert describe_shares([Share(2)]) == "1 process for 2 cores"
    with pytest.raises(ServingError, match="pin: 3 replicas need a core each, but there are 2"):
        share_cores(3, 2, (0, 1), True)


def test_pt_deploy_cores_limits_the_usable_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PT_DEPLOY_CORES", "1")
    assert usable_cores() == 1
    monkeypatch.setenv("PT_DEPLOY_CORES", "100000")
    most = usable_cores()
    monkeypatch.delenv("PT_DEPLOY_CORES")
    assert usable_cores() == most


@pytest.mark.skipif(not core_numbers(), reason="this system has no affinity")
def test_hyperthreads_of_a_core_are_adjacent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    for number in range(4):
        folder = tmp_path / f"sys/devices/system/cpu/cpu{number}/topology"
        folder.mkdir(parents=True)
        (folder / "physical_package_id").write_text("0\n")
        (folder / "core_id").write_text(f"{number % 2}\n")
    assert core_numbers(tmp_path) == [0, 2, 1, 3]
    assert core_numbers(tmp_path / "nothing there") == [0, 1, 2, 3]
