"""Trainings of two processes: resumed from one, one killed, both terminated, started wrongly."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlflow
import pytest

from mlflow_pt_deploy.cli import main
from mlflow_pt_deploy.config import Options
from mlflow_pt_deploy.errors import TrainingError
from mlflow_pt_deploy.pipeline.stages import train_teacher
from mlflow_pt_deploy.pipeline.training_group import check_launch
from mlflow_pt_deploy.system import child_process as child
from mlflow_pt_deploy.system.ranks import Ranks
from mlflow_pt_deploy.training.training_state import Epoch

WITHIN_S = 120


@pytest.fixture
def options(tiny_data: Path, tiny_model: Path, tracking: str) -> Options:
    return Options(data=str(tiny_data), teacher=str(tiny_model), epochs=2, batch_size=20)


class Killed(BaseException):
    """Simulates a power failure."""


@pytest.mark.slow
def test_a_training_of_one_process_is_resumed_by_two(
    options: Options, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def die(epoch: Epoch) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("mlflow_pt_deploy.pipeline.training_run._log_epoch", lambda *_: die(_[-1]))
        with pytest.raises(Killed):
            train_teacher(options)
    (run_id,) = mlflow.search_runs(output_format="list")
    run_id = run_id.info.run_id
    done = train_teacher(replace(options, processes=2, resume=run_id))
    assert done.run_id == run_id
    assert done.validation_accuracy > 0.9
    history = mlflow.MlflowClient().get_metric_history(run_id, "train_loss")
    assert [metric.step for metric in history] == [2]  # by process 0 alone
    shown = capfd.readouterr()
    assert shown.out.count("epoch 2/2") == 1
    assert "Warning" not in shown.err
    assert not child._running


def wait_for(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + WITHIN_S
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.05)


def checkpoints() -> list[Path]:
    return list(Path(os.environ["PT_DEPLOY_HOME"]).glob("*/checkpoint.pt"))


@pytest.mark.slow
def test_a_killed_process_ends_the_training(options: Options) -> None:
    def kill() -> None:
        wait_for(lambda: bool(checkpoints()))
        child.kill(next(iter(child._running)))

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(TrainingError, match=r"training process 1 was killed .* --resume continues"):
        train_teacher(replace(options, epochs=100_000, processes=2))
    killer.join()
    assert not child._running


def test_a_signal_ends_both_processes_and_keeps_a_checkpoint(options: Options) -> None:
    given = {"data": options.data, "teacher": options.teacher, "epochs": 100_000, "processes": 2}
    flags = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    process = subprocess.Popen(
        child.command("cli", "train", *flags),
        env=child.environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(lambda: bool(checkpoints()))
    (checkpoint,) = checkpoints()
    (other,) = children(process.pid)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=WITHIN_S)
    assert (process.returncode, said.splitlines()[-1]) == (143, "pt-deploy train: terminated")
    assert checkpoint.exists()
    wait_for(lambda: not Path(f"/proc/{other}").exists())


def children(pid: int) -> list[int]:
    """Training processes of a command."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [
        int(each)
        for each in found
        if b"training_process" in Path(f"/proc/{each}/cmdline").read_bytes()
    ]


@pytest.mark.slow
def test_another_process_says_why_it_cannot_train(options: Options, tmp_path: Path) -> None:
    from mlflow_pt_deploy.data import load_data

    fewer = load_data(options.data, limit=60)
    with pytest.raises(TrainingError, match=r"training process 1: it read other rows than process"):
        train_teacher(replace(options, processes=2), fewer)


def test_parameters_that_mlflow_run_has_logged_do_not_clash(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = mlflow.MlflowClient()
    run_id = client.create_run("0").info.run_id
    for name, value in (("learning_rate", "0"), ("seed", "0")):
        client.log_param(run_id, name, value)
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    train_teacher(replace(options, epochs=0))
    found = client.get_run(run_id).data.params
    assert (found["learning_rate"], found["seed"]) == ("0", "0")
    assert float(found["resolved_learning_rate"]) > 0


@pytest.mark.parametrize(
    ("stage", "processes", "message"),
    [
        ("distill-static", 1, "a static student .* is trained by one. Start the command without"),
        ("train", 3, "processes is 3, and torchrun started 2. Leave --processes out"),
    ],
)
def test_torchrun_starts_what_two_can_train(stage: str, processes: int, message: str) -> None:
    check_launch("train", Options(processes=2), Ranks(size=2))
    with pytest.raises(TrainingError, match=message):
        check_launch(stage, Options(processes=processes), Ranks(size=2))


def test_torchrun_processes_do_not_share_a_gpu() -> None:
    options = Options()
    object.__setattr__(options, "device", "cuda:1")  # as on a machine with two
    check_launch("train", options, Ranks())
    with pytest.raises(TrainingError, match="device=cuda:1 is one GPU, and torchrun started 2"):
        check_launch("train", options, Ranks(size=2))


def test_torchrun_does_not_start_the_whole_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in Ranks(rank=1, size=2, local_size=2).environment().items():
        monkeypatch.setenv(name, value)
    assert main(["run"]) == 1
    assert "Give pt-deploy run --processes 2 instead" in capsys.readouterr().err
