"""The processes of one training: started here, or by torchrun.

    process 0: the stage, its run, its prints ─┐
    process 1: pipeline.training_process ──────┼─► the same `fit`, each with its share of a batch
    process 2: ...                             ┘

Process 0 is the command itself, so a training with one process needs none of this. The other
processes load the same data and model by the stage's options.
"""

from __future__ import annotations

import json
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import mlflow

from mlflow_pt_deploy.config import Options
from mlflow_pt_deploy.errors import TrainingError, describe_exit
from mlflow_pt_deploy.system import child_process as child
from mlflow_pt_deploy.system import interrupt
from mlflow_pt_deploy.system.environment import environment
from mlflow_pt_deploy.system.hardware import THREAD_VARIABLES, usable_cores
from mlflow_pt_deploy.system.ranks import Ranks, launched_ranks

if TYPE_CHECKING:
    from mlflow_pt_deploy.training.process_group import ProcessGroup

RENDEZVOUS = "PT_DEPLOY_RENDEZVOUS"
_STATIC_STAGE = "distill-static"
_EXIT_WAIT_S = 5.0


@contextmanager
def training_group(stage: str, options: Options) -> Iterator[ProcessGroup]:
    """Join the training's other processes for the block, as process 0; start them if needed.

    A static student is trained by one process: it takes seconds, and its gradients are sparse.

    Args:
        stage: Stage tag of the training.
        options: Options by which the other processes load the same data and model.

    Raises:
        TrainingError: Another process cannot start, or ended.
    """
    from mlflow_pt_deploy.training.process_group import ProcessGroup, joined

    ranks = launched_ranks()
    check_launch(stage, options, ranks)
    if ranks.size > 1:
        with joined(ranks, options.device) as group:
            yield group
    elif options.processes == 1 or stage == _STATIC_STAGE:
        yield ProcessGroup()
    else:
        with _started_group(stage, options) as group:
            yield group


def check_launch(stage: str, options: Options, ranks: Ranks) -> None:
    """Check that torchrun's processes can train this stage.

    Raises:
        TrainingError: The stage is trained by one process, or `processes` or `device` contradicts
            torchrun.
    """
    if ranks.size == 1:
        return
    if stage == _STATIC_STAGE:
        raise TrainingError(
            f"torchrun started {ranks.size} processes, and a static student (student_layers 0) is "
            "trained by one. Start the command without torchrun."
        )
    if ":" in options.device:
        raise TrainingError(
            f"device={options.device} is one GPU, and torchrun started {ranks.size} processes. "
            "Give --device cuda, and each process takes a GPU."
        )
    if options.processes not in (1, ranks.size):
        raise TrainingError(
            f"processes is {options.processes}, and torchrun started {ranks.size}. Leave "
            "--processes out."
        )


@contextmanager
def _started_group(stage: str, options: Options) -> Iterator[ProcessGroup]:
    from mlflow_pt_deploy.training.process_group import joined

    with tempfile.TemporaryDirectory(prefix="pt-deploy-processes-") as folder:
        rendezvous = f"file://{Path(folder) / 'rendezvous'}"
        variables = _loopback_variables()
        others: list[subprocess.Popen[str]] = []
        try:
            for rank in range(1, options.processes):
                others.append(_start(stage, options, rank, rendezvous, variables))
            for rank, process in enumerate(others, start=1):
                assert process.stdout is not None
                if process.stdout.readline() != "ready\n":
                    raise _lost(rank, process)
            place = Ranks(0, options.processes, 0, options.processes)
            with environment(**variables), joined(place, options.device, rendezvous) as group:
                yield group
        except RuntimeError as error:  # a collective failed, or the training itself
            if lost := _first_lost(others):
                raise lost from error
            raise
        finally:
            for process in others:
                child.end(process)


def _start(
    stage: str, options: Options, rank: int, rendezvous: str, variables: dict[str, str]
) -> subprocess.Popen[str]:
    place = Ranks(rank, options.processes, rank, options.processes)
    threads = str(max(1, usable_cores() // options.processes))
    process = child.start(
        child.command("pipeline.training_process"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=child.environment(
            **dict.fromkeys(THREAD_VARIABLES, threads),
            **place.environment(),
            **variables,
            **{RENDEZVOUS: rendezvous},
            MLFLOW_TRACKING_URI=mlflow.get_tracking_uri(),
            MLFLOW_REGISTRY_URI=mlflow.get_registry_uri(),
        ),
    )
    assert process.stdin is not None
    with suppress(OSError):  # it died; its output is read by the caller
        json.dump({"stage": stage, "options": options.to_json()}, process.stdin)
        process.stdin.close()
    return process


def _loopback_variables() -> dict[str, str]:
    """Let gloo and NCCL connect by the loopback interface: a host name may lead nowhere."""
    names = [name for _, name in socket.if_nameindex() if name.startswith("lo")]
    if not names:
        return {}
    return {"GLOO_SOCKET_IFNAME": names[0], "NCCL_SOCKET_IFNAME": names[0]}


def _first_lost(others: list[subprocess.Popen[str]]) -> TrainingError | None:
    """The error of the first process that ended; a failed collective may be noticed before it."""
    deadline = time.monotonic() + _EXIT_WAIT_S
    while time.monotonic() < deadline:
        interrupt.check()  # an interrupt kills the processes
        for rank, process in enumerate(others, start=1):
            if process.poll():  # 0: it has finished its part
                return _lost(rank, process)
        time.sleep(0.05)
    return None


def _lost(rank: int, process: subprocess.Popen[str]) -> TrainingError:
    interrupt.check()
    assert process.stdout is not None
    said = process.stdout.read().strip().splitlines()
    if said:
        return TrainingError(f"training process {rank}: {json.loads(said[-1])['error']}")
    outcome = describe_exit(process.wait(), ", probably out of memory; give fewer --processes")
    return TrainingError(
        f"training process {rank} {outcome}, so the training ended; --resume continues it from "
        "its last checkpoint."
    )
