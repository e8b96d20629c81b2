"""Who may score and look, what a server refuses to expose, and its limits."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from tiny_serving import running, save_tiny

from mlflow_pt_deploy.errors import ServingError
from mlflow_pt_deploy.serving.app import App
from mlflow_pt_deploy.serving.guard import (
    Guard,
    check_exposure,
    guard_from_environment,
    is_loopback,
)
from mlflow_pt_deploy.serving.registry import source
from mlflow_pt_deploy.serving.serve import serve
from mlflow_pt_deploy.serving.settings import Settings
from mlflow_pt_deploy.serving.slot import Slot

SCORE, ADMIN = "score-score-score-score", "admin-admin-admin-admin"


@pytest.fixture(scope="module")
def slot(tmp_path_factory: pytest.TempPathFactory) -> Slot:
    slot = Slot("tiny", source(str(save_tiny(tmp_path_factory.mktemp("guard") / "tiny"))))
    slot.open()
    return slot


@pytest.fixture(scope="module")
def guarded(slot: Slot) -> Iterator[str]:
    guard = Guard((b"an-older-token-still-valid", SCORE.encode()), (ADMIN.encode(),))
    with running(App({"tiny": slot}, guard=guard)) as url:
        yield url


def score(url: str, token: str | None, path: str = "/invocations") -> requests.Response:
    headers = {} if token is None else {"Authorization": token}
    return requests.post(url + path, json={"inputs": ["red"]}, headers=headers, timeout=10)


@pytest.mark.parametrize(
    "token",
    [None, "", SCORE, f"Basic {SCORE}", f"Bearer {ADMIN}", f"Bearer {SCORE}x", "Bearer", "Bearer "],
)
@pytest.mark.parametrize("path", ["/invocations", "/models/tiny/invocations"])
def test_without_its_token_nobody_scores(guarded: str, token: str | None, path: str) -> None:
    answer = score(guarded, token, path)
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert answer.json()["error_code"] == "UNAUTHENTICATED"
    assert not any(word in answer.text for word in (SCORE, ADMIN))


@pytest.mark.parametrize("token", [f"Bearer {SCORE}", f"bearer  {SCORE}"])
def test_with_its_token_one_scores(guarded: str, token: str) -> None:
    assert score(guarded, token).status_code == 200
    assert score(guarded, "Bearer an-older-token-still-valid").status_code == 200


@pytest.mark.parametrize("path", ["/metrics", "/model", "/models", "/models/tiny"])
def test_looking_behind_needs_the_admin_token(guarded: str, path: str) -> None:
    for headers in ({}, {"Authorization": f"Bearer {SCORE}"}):
        assert requests.get(guarded + path, headers=headers, timeout=5).status_code == 401
    headers = {"Authorization": f"Bearer {ADMIN}"}
    assert requests.get(guarded + path, headers=headers, timeout=5).status_code in (200, 501)


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/ping", "/health", "/version"])
def test_probes_need_none(guarded: str, path: str) -> None:
    assert requests.get(guarded + path, timeout=5).status_code == 200


def test_without_an_admin_token_who_may_score_may_look(slot: Slot) -> None:
    with running(App({"tiny": slot}, guard=Guard((SCORE.encode(),)))) as url:
        assert requests.get(f"{url}/model", timeout=5).status_code == 401
        headers = {"Authorization": f"Bearer {SCORE}"}
        assert requests.get(f"{url}/model", headers=headers, timeout=5).status_code == 200


def test_tokens_come_from_the_environment_or_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert guard_from_environment() == Guard()
    file = tmp_path / "tokens"
    file.write_text(f"{SCORE}\n{SCORE}-new\n\n")
    monkeypatch.setenv("PT_DEPLOY_TOKEN_FILE", str(file))
    monkeypatch.setenv("PT_DEPLOY_ADMIN_TOKEN", ADMIN)
    guard = guard_from_environment()
    assert guard == Guard((SCORE.encode(), f"{SCORE}-new".encode()), (ADMIN.encode(),))
    assert SCORE not in repr(guard)
    monkeypatch.setenv("PT_DEPLOY_ADMIN_TOKEN", "short")
    with pytest.raises(ServingError, match="fewer than 16 characters; make one: openssl"):
        guard_from_environment()
    for content in ("", " \n"):
        file.write_text(content)
        with pytest.raises(ServingError, match="PT_DEPLOY_TOKEN_FILE is empty"):
            guard_from_environment()
    monkeypatch.setenv("PT_DEPLOY_TOKEN_FILE", str(tmp_path / "none"))
    with pytest.raises(ServingError, match="PT_DEPLOY_TOKEN_FILE cannot be read"):
        guard_from_environment()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "model.example.com", ""])
def test_a_network_is_not_let_in_without_a_token(host: str) -> None:
    assert not is_loopback(host)
    with pytest.raises(ServingError, match="PT_DEPLOY_TOKEN is not set.*--insecure"):
        check_exposure(host, Guard(admin=(ADMIN.encode(),)), insecure=False)
    check_exposure(host, Guard(), insecure=True)
    check_exposure(host, Guard((SCORE.encode(),)), insecure=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "::1", "localhost"])
def test_this_machine_is(host: str) -> None:
    check_exposure(host, Guard(), insecure=False)


def test_serve_refuses_before_it_loads_anything() -> None:
    with pytest.raises(ServingError, match="0.0.0.0 can be reached"):
        serve("models:/tiny@champion", host="0.0.0.0")


def test_settings_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ServingError, match="belong together"):
        Settings(tls_cert="cert.pem")
    with pytest.raises(ServingError, match="none.pem is no file"):
        Settings(tls_cert=str(tmp_path / "none.pem"), tls_key=str(tmp_path / "none.pem"))
    with pytest.raises(ServingError, match="poll_s is -1"):
        Settings(poll_s=-1)
    with pytest.raises(ServingError, match="give more than 0"):
        Settings(max_body_mb=0)
