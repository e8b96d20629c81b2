"""One process per device, whichever worker starts it; restarts have a backoff."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
from tiny.server import until

from mlflow_pt_deploy.errors import DeviceLostError
from mlflow_pt_deploy.serving.device.channel import HELLO, Channel
from mlflow_pt_deploy.serving.device.processes import (
    BACKOFF_S,
    MAX_BACKOFF_S,
    DeviceProcesses,
    StartState,
)


def test_the_first_start_is_at_once_and_later_ones_wait_longer_and_longer() -> None:
    state = StartState()
    assert state.remaining_s(0.0) == 0
    waits = []
    for _ in range(8):
        now = state.started_at + state.backoff_s
        assert state.remaining_s(now) == 0
        state = state.after_start(now)
        waits.append(state.remaining_s(now))
    assert waits == [BACKOFF_S * 2**n for n in range(6)] + [MAX_BACKOFF_S] * 2
    assert state.starts == 8


def test_after_a_long_run_the_wait_is_short_again() -> None:
    state = StartState(starts=7, started_at=100.0, backoff_s=MAX_BACKOFF_S)
    assert state.after_start(100 + 2 * MAX_BACKOFF_S).backoff_s == BACKOFF_S


def pid_of(channel: Channel) -> int:
    channel.send({"request": HELLO})
    return int(channel.receive().header["pid"])


def test_all_workers_reach_one_process_and_it_is_replaced_after_its_end(
    new_processes: Callable[[], DeviceProcesses],
) -> None:
    workers = new_processes()
    others = DeviceProcesses(workers._states, os.getpid(), 60.0, "text")

    def connect(number: int) -> int:
        with closing((workers, others)[number % 2].connect("cpu")) as channel:
            return pid_of(channel)

    with ThreadPoolExecutor(4) as threads:
        pids = set(threads.map(connect, range(4)))
    assert len(pids) == 1 and workers.state("cpu").starts == 1
    (pid,) = pids
    with closing(workers.connect("cpu")) as channel:
        pid_of(channel)
        os.kill(pid, signal.SIGKILL)
        channel.wait_until_closed()
    starters = [child for each in (workers, others) for child in each._children]
    next(child for child in starters if child.pid == pid).wait(10)  # its listener is closed too
    workers._states.publish("device-cpu", {"starts": 1, "started_at": 1e12, "backoff_s": 1.0})
    with pytest.raises(DeviceLostError, match=r"the process of cpu has ended; it is started again"):
        workers.connect("cpu")
    workers._states.publish("device-cpu", {"starts": 1, "started_at": 0.0, "backoff_s": 1.0})
    with closing(others.connect("cpu")) as channel:
        assert pid_of(channel) != pid
        # a second one finds the device taken
        from mlflow_pt_deploy.system import child_process

        words = (str(workers._states.folder), "cpu", *workers._arguments)
        late = child_process.start(
            child_process.command("serving.device.process", *words),
            env=child_process.environment(TMPDIR=str(workers._states.folder / "tmp-late")),
        )
        until(lambda: late.poll() is not None)
        assert late.returncode == 0
        assert pid_of(channel) != late.pid
    for child in others._children:
        child.kill()
        child.wait()


def test_a_process_that_does_not_start_is_an_error(
    new_processes: Callable[[], DeviceProcesses], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = new_processes()
    monkeypatch.setattr(broken, "_arguments", ("no", "arguments"))
    with pytest.raises(DeviceLostError, match="does not start; the log says why"):
        broken.connect("cpu")
