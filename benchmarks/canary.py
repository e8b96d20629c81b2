"""A canary under load: its share, and how fast a bad one is ended without a failed request.

    python benchmarks/canary.py --requests 50000

Serves the tiny models of the tests with two workers: what is measured is the server. First a good
canary gets 5 % of the requests. Then canaries that raise, answer wrongly or are slow are started,
and the seconds until no request reaches them are counted. A request is *failed* if it is answered
with anything but 200, or not at all.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from servers import machine, running
from swaps import Client, wait_until_ready

NAME, SHARE = "canary", 0.05
FAULTS: dict[str, dict[str, Any]] = {
    "raises": {"fails_on": "green"},
    "raises for 1 % of the rows": {"fails_on": "blue"},
    "answers wrongly": {"wrong": True},
    "is slow": {"predict_s": 0.1},
}
_TESTS = Path(__file__).resolve().parents[1] / "tests"
_END_S = 60.0


def register(folder: Path, name: str, habits: Sequence[dict[str, Any]]) -> Any:
    """Register tiny models in a tracking store in `folder`; the first is champion.

    Servers that are started from here on use that store, and keep no files beyond `folder`.
    """
    sys.path.insert(0, str(_TESTS))
    from mlflow import MlflowClient
    from tiny.serving import save_tiny  # type: ignore[import-not-found]

    store = f"sqlite:///{folder}/mlflow.db"
    paths = (str(_TESTS), str(_TESTS.parent), os.environ.get("PYTHONPATH", ""))
    os.environ |= {
        "MLFLOW_TRACKING_URI": store,
        "MLFLOW_REGISTRY_URI": store,
        "PT_DEPLOY_HOME": str(folder / "home"),
        "PYTHONPATH": os.pathsep.join(paths),
    }
    registry = MlflowClient(tracking_uri=store, registry_uri=store)
    registry.create_registered_model(name)
    for number, each in enumerate(habits, 1):
        registry.create_model_version(name, str(save_tiny(folder / f"model-{number}", **each)))
    registry.set_registered_model_alias(name, "champion", "1")
    return registry


def answers(clients: Sequence[Client], version: str = "") -> int:
    """Answers of a version, or all of them."""
    return sum(
        not version or found == version for client in clients for _, _, found in client.seen.answers
    )


def share(registry: Any, clients: Sequence[Client], requests: int) -> dict[str, Any]:
    """The share of a good canary, and how many standard deviations it is off."""
    _start(registry, clients, "2")
    before, mine = answers(clients), answers(clients, "2")
    while answers(clients) - before < requests:
        time.sleep(0.5)
    total, taken = answers(clients) - before, answers(clients, "2") - mine
    deviation = math.sqrt(total * SHARE * (1 - SHARE))
    return {
        "requests": total,
        "share": taken / total,
        "deviations": (taken - SHARE * total) / deviation,
        "ended": "pt_deploy.canary_ended" in registry.get_model_version(NAME, "2").tags,
    }


def end(registry: Any, clients: Sequence[Client], version: str) -> dict[str, Any]:
    """Seconds from the tag that starts a bad canary to the one that ends it."""
    begun = time.monotonic()
    registry.set_registered_model_tag(NAME, "pt_deploy.canary", f"{version}:{SHARE:.0%}")
    while time.monotonic() - begun < _END_S:
        reason = registry.get_model_version(NAME, version).tags.get("pt_deploy.canary_ended")
        if reason:
            return {"ended_after_s": time.monotonic() - begun, "reason": reason}
        time.sleep(0.2)
    return {"ended_after_s": None, "reason": None}


def main(arguments: Sequence[str] | None = None) -> int:
    """Print one JSON document; exit status 1 if a promise was broken."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--requests", type=int, default=50_000)
    parser.add_argument("--clients", type=int, default=8)
    parsed = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        registry = register(folder, NAME, ({}, {}, *FAULTS.values()))
        command = [sys.executable, "-m", "mlflow_pt_deploy.cli", "serve"]
        command += [f"models:/{NAME}@champion", "--replicas", "2", "--poll-s", "0.5"]
        with running(command, folder / "serve.log") as server:
            wait_until_ready(server.url)
            clients = [Client(server.url, "green", rare="blue") for _ in range(parsed.clients)]
            for client in clients:
                client.start()
            good = share(registry, clients, parsed.requests)
            bad = {
                fault: end(registry, clients, str(number)) for number, fault in enumerate(FAULTS, 3)
            }
            for client in clients:
                client.end()
    seen = [client.seen for client in clients]
    failed = sum(len(each.failed) + len(each.cut) for each in seen)
    document = {**machine(), "clients": parsed.clients, "good": good, "bad": bad, "failed": failed}
    print(json.dumps(document, indent=1))
    late = any((each["ended_after_s"] or _END_S) > 30 for each in bad.values())
    return int(bool(failed) or good["ended"] or abs(good["deviations"]) > 4 or late)


def _start(registry: Any, clients: Sequence[Client], version: str) -> None:
    """Start a canary, and wait until every worker has it."""
    registry.set_registered_model_tag(NAME, "pt_deploy.canary", f"{version}:{SHARE:.0%}")
    begun = time.monotonic()
    while not answers(clients, version):
        if time.monotonic() - begun > _END_S:
            raise SystemExit(f"the canary did not answer within {_END_S:g} s")
        time.sleep(0.1)
    time.sleep(5)


if __name__ == "__main__":
    sys.exit(main())
