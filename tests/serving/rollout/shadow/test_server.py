"""`pt-deploy serve --shadow` with two workers: one process, the same figures from both."""

from __future__ import annotations

import os
import re
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
import requests
from tiny.registry import new_registry, register_tiny
from tiny.server import START_S, started, until

from mlflow_pt_deploy.errors import ServingError
from mlflow_pt_deploy.serving.api import serve

if not hasattr(socket, "SO_REUSEPORT"):
    pytest.skip("needs SO_REUSEPORT", allow_module_level=True)
CHAMPION, CHALLENGER = "models:/tiny@champion", "models:/tiny@challenger"


def test_a_shadow_of_a_model_that_is_not_served_stops_the_start() -> None:
    with pytest.raises(ServingError, match="but this server serves other"):
        serve("models:/other@champion", shadow=CHALLENGER)


def get(url: str) -> requests.Response | None:
    """A response over a connection of its own; None if it went to a process that ended."""
    try:
        return requests.get(url, timeout=30)
    except requests.ConnectionError:
        return None


def read(url: str) -> dict[str, Any]:
    response = get(f"{url}/model")
    found: dict[str, Any] = response.json() if response is not None else {}
    return found


def shadow(url: str) -> dict[str, Any]:
    found = (read(url).get("shadow") or {}).get("versions") or [{}]
    return dict(found[0])


def ask(url: str) -> None:
    answer = requests.post(f"{url}/invocations", json={"inputs": ["red"]}, timeout=30)
    assert answer.status_code == 200


def pid(url: str) -> int:
    """The shadow process; 0 if it is not known."""
    state = read(url).get("shadow")
    return (state and state["process"]["pid"]) or 0


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_two_workers_share_one_process_which_follows_the_lead(
    empty_database: Path, tmp_path: Path
) -> None:
    client, uri = new_registry(tmp_path, empty_database)
    register_tiny(client, tmp_path, {}, {"wrong": True})
    client.set_registered_model_alias("tiny", "challenger", "2")
    uris = dict.fromkeys(("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"), uri)
    words = (CHAMPION, "--replicas", "2", "--poll-s", "0.1", "--shadow-priority", "normal")
    with started(tmp_path / "scratch", *words, "--shadow", CHALLENGER, **uris) as served:
        url = served.url
        until(lambda: shadow(url).get("state") == "active", START_S)
        until(lambda: ask(url) or shadow(url).get("rows_compared", 0) >= 10, START_S)
        assert shadow(url)["rows_disagreed"] == shadow(url)["rows_compared"]
        seen = [shadow(url) for _ in range(8)]
        assert len({each["version"] for each in seen}) == 1, "whichever worker answers"
        check_metrics(url)
        first = pid(url)
        if Path("/proc").exists():
            leader = parent(first)
            os.kill(leader, signal.SIGKILL)
            until(lambda: not Path(f"/proc/{first}").exists())
            until(lambda: pid(url) not in (0, first), START_S)
            assert parent(pid(url)) != leader
            assert shadow(url)["rows_compared"] >= 10
        client.set_registered_model_tag("tiny", "pt_deploy.shadow", "off")
        until(lambda: "shadow" in (found := read(url)) and found["shadow"] is None, START_S)


def check_metrics(url: str) -> None:
    response = get(f"{url}/metrics")
    assert response is not None
    labels = '{model="tiny",role="shadow",shadow="2",version="1"}'
    for name in ("compared_rows", "disagreed_rows", "requests"):
        (value,) = re.findall(f"^pt_deploy_shadow_{name}_total{labels} (.+)$", response.text, re.M)
        assert float(value) >= 10
    assert "pt_deploy_shadow_up 1.0" in response.text
