"""The shadow process for real: it counts right, is restarted, and never delays a request."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import mlflow
import pytest
import requests
from mlflow import MlflowClient
from tiny.registry import new_registry
from tiny.server import START_S, running, until
from tiny.serving import save_tiny

from mlflow_pt_deploy.registry.addresses import AGREEMENT_TAG, BASELINE_TAG, RUN_TAG, source
from mlflow_pt_deploy.serving.app import Application
from mlflow_pt_deploy.serving.lifecycle.served_model import ServedModel
from mlflow_pt_deploy.serving.monitoring.monitor import Monitor
from mlflow_pt_deploy.serving.rollout.shadow.client import ShadowClient
from mlflow_pt_deploy.serving.rollout.shadow.duty import ShadowDuty
from mlflow_pt_deploy.serving.rollout.shadow.plan import SHADOW, TEACHER
from mlflow_pt_deploy.serving.rollout.shadow.store import read_process
from mlflow_pt_deploy.serving.rollout.shadow.supervisor import ShadowSupervisor
from mlflow_pt_deploy.serving.settings import ServerSettings
from mlflow_pt_deploy.serving.worker_state import WorkerStates

SETTINGS = ServerSettings(
    shadow="models:/tiny@challenger",
    shadow_teacher="100%",
    shadow_priority="normal",  # the machine of the tests may be busy
)


class Server(NamedTuple):
    """An application with its monitor, which the tests tick."""

    url: str
    monitor: Monitor
    states: WorkerStates

    def ask(self, *rows: str) -> None:
        answer = requests.post(f"{self.url}/invocations", json={"inputs": rows}, timeout=30)
        assert answer.status_code == 200

    def status(self) -> dict[str, Any]:
        """The entry of ``/model``, after a tick."""
        self.monitor.tick()
        found: dict[str, Any] = requests.get(f"{self.url}/model", timeout=30).json()["shadow"]
        return found

    def version(self, role: str) -> dict[str, Any]:
        (found,) = (each for each in self.status()["versions"] if each["role"] == role)
        return found

    def until_active(self) -> int:
        """Wait until both shadows score; returns the process id."""
        until(self.status, START_S)
        until(lambda: {each["state"] for each in self.status()["versions"]} == {"active"}, START_S)
        pid: int = self.status()["process"]["pid"]
        return pid


def _registered(folder: Path, uri: str) -> None:
    """Version 1 serves; 2 answers otherwise; 3 is the baseline of 1."""
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    client.create_registered_model("tiny")
    for number, role in enumerate(("champion", "challenger", "baseline"), 1):
        model = save_tiny(folder / f"tiny-{number}", **({"wrong": True} if number == 2 else {}))
        tags = {RUN_TAG: "7f", BASELINE_TAG: "3", AGREEMENT_TAG: "0.9"}
        client.create_model_version("tiny", str(model), tags=tags)
        client.set_registered_model_alias("tiny", role, str(number))


@pytest.fixture(scope="module")
def server(
    empty_database: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("shadow")
    _, uri = new_registry(folder, empty_database)
    _registered(folder, uri)
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
            patch.setenv(name, uri)
        for set_uri in (mlflow.set_tracking_uri, mlflow.set_registry_uri):
            stack.callback(set_uri, "")
            set_uri(uri)
        run = folder / "run"
        run.mkdir()
        states = WorkerStates(run, 1)
        states.claim()
        stack.callback(states.close)
        model = ServedModel("tiny", source("models:/tiny@champion"))
        model.open()
        client = ShadowClient(run)
        duty = ShadowDuty({"tiny": model}, states, client, SETTINGS)
        monitor = Monitor({"tiny": model}, [duty], states)
        application = Application({"tiny": model}, states=states, shadows=client)
        url = stack.enter_context(running(application))
        stack.callback(monitor.stop)
        yield Server(url, monitor, states)


def test_labels_are_compared_and_figures_are_shown(server: Server) -> None:
    server.until_active()
    before = {role: server.version(role)["rows_compared"] for role in (SHADOW, TEACHER)}
    for _ in range(10):
        server.ask("red", "green green")
    for role in (SHADOW, TEACHER):
        until(lambda role=role: server.version(role)["rows_compared"] == before[role] + 20)  # type: ignore[misc]
    shadow, teacher = server.version(SHADOW), server.version(TEACHER)
    assert (shadow["version"], shadow["compared_with"], shadow["errors"]) == ("2", "1", 0)
    assert shadow["rows_disagreed"] == shadow["rows_compared"]
    assert 0.5 < shadow["disagreement"]["low"] < 1 == shadow["disagreement"]["value"]
    assert shadow["latency_p50_ms"] > 0
    assert (teacher["version"], teacher["rows_disagreed"]) == ("3", 0)
    assert teacher["agreement"]["high"] == 1 and teacher["agreement_at_promotion"] == 0.9
    assert teacher["drift"] is False
    counts = server.monitor.counts()["tiny"]
    assert counts["2"].compared == counts["2"].disagreed == shadow["rows_compared"]
    assert counts["2"].requests == 0, "it answered none"


def test_requests_go_on_while_the_process_is_stopped(server: Server) -> None:
    pid = server.until_active()
    before = server.status()["requests_dropped"]
    os.kill(pid, signal.SIGSTOP)
    try:
        for number in range(2000):
            server.ask("red " * 200)
            if number % 25 == 24 and server.status()["requests_dropped"] > before:
                break
        else:
            pytest.fail("nothing was dropped")
    finally:
        os.kill(pid, signal.SIGCONT)
    compared = server.version(SHADOW)["rows_compared"]
    until(lambda: server.ask("red") or server.version(SHADOW)["rows_compared"] > compared)
    assert server.status()["process"]["pid"] == pid


def test_a_killed_process_is_restarted_and_harms_no_request(server: Server) -> None:
    pid = server.until_active()
    compared = server.version(SHADOW)["rows_compared"]
    os.kill(pid, signal.SIGKILL)
    until(lambda: server.ask("red") or server.status()["process"]["ended"])
    assert server.status()["process"]["ended"] == "it was ended by SIGKILL"
    until(lambda: server.ask("red") or server.status()["process"]["pid"])
    process = server.status()["process"]
    assert process["pid"] != pid and process["restarts"] == 1
    assert server.version(SHADOW)["rows_compared"] == compared, "what was counted stays"


@pytest.fixture
def states(tmp_path: Path) -> WorkerStates:
    return WorkerStates(tmp_path, 1)


def test_it_has_the_lowest_priority_and_ends_with_its_supervisor(states: WorkerStates) -> None:
    supervisor = ShadowSupervisor(states, ServerSettings())
    try:
        supervisor.keep(True)
        pid = read_process(states).pid
        until(lambda: os.getpriority(os.PRIO_PROCESS, pid) == 19, START_S)
        if hasattr(os, "SCHED_IDLE"):
            until(lambda: os.sched_getscheduler(pid) == os.SCHED_IDLE, START_S)
        supervisor.keep(False)
        assert read_process(states).pid == 0
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    finally:
        supervisor.end()


def test_a_process_that_needs_too_much_memory_is_ended(states: WorkerStates) -> None:
    settings = ServerSettings(shadow_memory_mb=1, shadow_priority="normal")
    supervisor = ShadowSupervisor(states, settings)

    def ended() -> str:
        supervisor.keep(True)
        return read_process(states).ended

    try:
        until(ended, START_S)
        assert ended() == "it needs more than 1 MB (shadow_memory_mb)"
    finally:
        supervisor.end()
