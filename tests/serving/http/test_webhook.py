"""MLflow's webhooks: what is accepted, what is refused, and that it makes all workers poll."""

from __future__ import annotations

import json
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
from mlflow.entities.webhook import WebhookEvent
from mlflow.webhooks.delivery import _generate_hmac_signature
from mlflow.webhooks.types import get_example_payload_for_event
from tiny.server import running, until
from tiny.serving import save_tiny

from mlflow_pt_deploy.errors import ServingError
from mlflow_pt_deploy.registry.addresses import ResolvedVersion, source
from mlflow_pt_deploy.serving.app import Application
from mlflow_pt_deploy.serving.http.auth import TokenAuth, auth_from_environment
from mlflow_pt_deploy.serving.http.webhook import MAX_AGE_S, MAX_BYTES, WebhookReceiver
from mlflow_pt_deploy.serving.lifecycle.registry_watcher import MIN_POLL_S, RegistryWatcher
from mlflow_pt_deploy.serving.lifecycle.served_model import ServedModel
from mlflow_pt_deploy.serving.worker_state import WorkerStates

SECRET = "a secret of 16 or more"
NOW = 1_800_000_000


def body(entity: str = "model_version_alias", action: str = "created") -> str:
    """What MLflow sends for an event."""
    event = WebhookEvent(entity, action)
    return json.dumps(
        {"entity": entity, "action": action, "data": get_example_payload_for_event(event)}
    )


def signed(
    text: str, secret: str = SECRET, sent: float | str = NOW, delivery: str = ""
) -> dict[str, str]:
    """Headers that MLflow sends with a body."""
    delivery, stamp = (
        delivery or str(uuid.uuid4()),
        sent if isinstance(sent, str) else str(int(sent)),
    )
    return {
        "x-mlflow-delivery-id": delivery,
        "x-mlflow-timestamp": stamp,
        "x-mlflow-signature": _generate_hmac_signature(secret, delivery, stamp, text),
    }


def receiver(*secrets: str) -> WebhookReceiver:
    keys = [secret.encode() for secret in secrets or (SECRET,)]
    return WebhookReceiver(keys, lambda: None, clock=lambda: NOW)


@pytest.mark.parametrize(
    ("entity", "action"),
    [
        ("registered_model", "created"),
        ("model_version", "created"),
        ("model_version_tag", "set"),
        ("model_version_alias", "created"),
        ("model_version_alias", "deleted"),
    ],
)
def test_events_of_the_registry_are_accepted(entity: str, action: str) -> None:
    text = body(entity, action)
    assert receiver().check(signed(text), text.encode()).status == 202


def test_a_secret_can_be_rotated() -> None:
    text = body()
    both = receiver("the new secret of both", SECRET)
    assert both.check(signed(text), text.encode()).status == 202
    assert both.check(signed(text, "the new secret of both"), text.encode()).status == 202


@pytest.mark.parametrize("missing", ["delivery-id", "timestamp", "signature"])
def test_an_unsigned_delivery_is_refused(missing: str) -> None:
    text = body()
    headers = signed(text)
    del headers[f"x-mlflow-{missing}"]
    answer = receiver().check(headers, text.encode())
    assert answer.status == 401
    assert b"is missing; create MLflow's webhook with a secret" in answer.body


@pytest.mark.parametrize(
    "change",
    [
        {"x-mlflow-signature": "v1,"},
        {"x-mlflow-signature": "v1,ü☃"},
        {"x-mlflow-signature": "none"},
        {"x-mlflow-delivery-id": "another"},
        {"x-mlflow-timestamp": str(NOW + 1)},
        signed(body(), "another secret that is long"),
        signed(body("model_version", "created")),
    ],
    ids=[
        "empty",
        "not ASCII",
        "no version",
        "other id",
        "other time",
        "other secret",
        "other body",
    ],
)
def test_a_forged_delivery_is_refused(change: dict[str, str]) -> None:
    text = body()
    answer = receiver().check(signed(text) | change, text.encode())
    assert answer.status == 401
    assert b"does not fit; give the webhook the secret in PT_DEPLOY_WEBHOOK_SECRET" in answer.body
    assert SECRET.encode() not in answer.body


@pytest.mark.parametrize(
    "sent", [NOW - MAX_AGE_S - 1, NOW + MAX_AGE_S + 1, 0, "soon", "-1", "9" * 5000]
)
def test_a_late_delivery_is_refused(sent: float | str) -> None:
    text = body()
    answer = receiver().check(signed(text, sent=sent), text.encode())
    assert answer.status == 401
    assert b"more than 300 s off this server's clock; set both clocks" in answer.body


def test_a_replayed_delivery_is_ignored_as_long_as_its_time_is_valid() -> None:
    now = float(NOW)
    receiver = WebhookReceiver([SECRET.encode()], lambda: None, clock=lambda: now)
    text = body()
    headers = signed(text, sent=NOW + MAX_AGE_S)
    statuses = []
    for now in (NOW, NOW + 1, NOW + 2 * MAX_AGE_S, NOW + 2 * MAX_AGE_S + 1):
        statuses.append(receiver.check(headers, text.encode()).status)
        receiver.check(signed(text, sent=now), text.encode())
    assert statuses == [202, 200, 200, 401]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "[" * 100_000,
        '{"entity": ["model_version"]}',
        body("prompt", "created"),
        body("budget_policy", "exceeded"),
    ],
    ids=lambda text: text[:30],
)
def test_another_event_is_refused(text: str) -> None:
    answer = receiver().check(signed(text), text.encode())
    assert answer.status == 400
    assert b"create the webhook for model_version_alias.created" in answer.body


def test_a_short_secret_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PT_DEPLOY_WEBHOOK_SECRET", "short")
    with pytest.raises(ServingError, match="PT_DEPLOY_WEBHOOK_SECRET: a token has fewer than 16"):
        auth_from_environment()
    monkeypatch.setenv("PT_DEPLOY_WEBHOOK_SECRET", SECRET)
    assert auth_from_environment().webhook == (SECRET.encode(),)


@pytest.fixture
def model(tmp_path: Path) -> ServedModel:
    model = ServedModel("tiny", source(str(save_tiny(tmp_path / "tiny"))))
    model.open()
    return model


@pytest.fixture
def states(tmp_path: Path) -> WorkerStates:
    (tmp_path / "run").mkdir()
    return WorkerStates(tmp_path / "run", 2)


@pytest.fixture
def url(model: ServedModel, states: WorkerStates) -> Iterator[str]:
    auth = TokenAuth((b"score-score-score",), webhook=(SECRET.encode(),))
    application = Application(
        {"tiny": model}, auth=auth, on_registry_change=states.note_registry_change
    )
    with running(application) as url:
        yield f"{url}/webhook"


def post(url: str, text: str, headers: dict[str, Any]) -> requests.Response:
    return requests.post(url, text, headers=headers, timeout=10)


def test_a_delivery_needs_no_token_and_is_noted_for_all_workers(
    url: str, states: WorkerStates
) -> None:
    text = body()
    headers = signed(text, sent=time.time())
    assert states.registry_changed_at() == 0
    assert post(url, text, headers).status_code == 202
    first = states.registry_changed_at()
    assert abs(first - time.time_ns()) < 60e9
    again = post(url, text, headers)
    assert (again.status_code, again.json()["status"][:7]) == (200, "ignored")
    assert post(url, text, headers | {"x-mlflow-signature": "v1,x"}).status_code == 401
    assert states.registry_changed_at() == first
    assert post(url, text, signed(text, sent=time.time())).status_code == 202
    assert states.registry_changed_at() > first


def test_methods_and_long_bodies_are_refused(url: str, states: WorkerStates) -> None:
    get = requests.get(url, timeout=10)
    assert (get.status_code, get.headers["allow"]) == (405, "POST")
    text = "x" * (MAX_BYTES + 1)
    long = post(url, text, signed(text, sent=time.time()))
    assert long.status_code == 413
    assert f"longer than {MAX_BYTES} bytes" in long.json()["message"]
    assert states.registry_changed_at() == 0


@pytest.mark.parametrize("secrets", [(), (SECRET.encode(),)])
def test_without_a_secret_or_anything_that_polls_there_is_no_webhook(
    model: ServedModel, secrets: tuple[bytes, ...]
) -> None:
    on_change = None if secrets else lambda: None
    application = Application(
        {"tiny": model}, auth=TokenAuth(webhook=secrets), on_registry_change=on_change
    )
    with running(application) as url:
        assert post(f"{url}/webhook", "", {}).status_code == 404


def test_changes_make_every_worker_poll_at_most_once_a_second(
    tmp_path: Path, states: WorkerStates
) -> None:
    folder = str(save_tiny(tmp_path / "tiny"))
    models = [ServedModel(name, source(folder)) for name in ("first", "second")]
    watchers = [follow(model, 3600, states) for model in models]
    begun = time.monotonic()
    while not all(model.polls >= 2 for model in models):
        states.note_registry_change()
        time.sleep(0.02)
    most = (time.monotonic() - begun) / MIN_POLL_S + 2
    for watcher in watchers:
        watcher.stop()
        watcher.join(10)
    assert all(model.polls <= most for model in models)


def test_a_change_during_a_poll_is_polled_after_it(tmp_path: Path, states: WorkerStates) -> None:
    folder, gate, asked = str(save_tiny(tmp_path / "tiny")), threading.Event(), list[str]()

    def find(uri: str) -> ResolvedVersion:
        asked.append(uri)
        assert len(asked) == 1 or gate.wait(30)
        return ResolvedVersion(uri)

    watcher = follow(ServedModel("tiny", source(folder), find=find), 3600, states)
    states.note_registry_change()
    until(lambda: len(asked) == 2)
    states.note_registry_change()
    time.sleep(0.3)
    gate.set()
    until(lambda: len(asked) == 3)
    watcher.stop()
    watcher.join(10)


def test_without_polling_a_change_is_not_followed(tmp_path: Path, states: WorkerStates) -> None:
    model = ServedModel("tiny", source(str(save_tiny(tmp_path / "tiny"))))
    watcher = follow(model, 0, states)
    states.note_registry_change()
    time.sleep(0.5)
    assert model.polls == 0
    watcher.stop()
    watcher.join(10)


def follow(model: ServedModel, poll_s: float, states: WorkerStates) -> RegistryWatcher:
    """A watcher that has opened a model."""
    opened = threading.Event()
    watcher = RegistryWatcher(
        [model],
        poll_s,
        on_opened=opened.set,
        on_failed=lambda error: None,
        changed_at=states.registry_changed_at,
    )
    watcher.start()
    assert opened.wait(30)
    return watcher
