"""Bearer tokens: who may score, who may read the admin pages, and what needs a token."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from tiny.server import running
from tiny.serving import save_tiny

from mlflow_pt_deploy.errors import ServingError
from mlflow_pt_deploy.registry.addresses import source
from mlflow_pt_deploy.serving.api import serve
from mlflow_pt_deploy.serving.app import Application
from mlflow_pt_deploy.serving.http.auth import (
    TokenAuth,
    auth_from_environment,
    is_loopback,
    require_auth_unless_loopback,
)
from mlflow_pt_deploy.serving.lifecycle.served_model import ServedModel

SCORE, ADMIN = "score-score-score-score", "admin-admin-admin-admin"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    model = ServedModel("tiny", source(str(save_tiny(tmp_path_factory.mktemp("guard") / "tiny"))))
    model.open()
    return model


@pytest.fixture(scope="module")
def guarded(model: ServedModel) -> Iterator[str]:
    auth = TokenAuth((b"an-older-token-still-valid", SCORE.encode()), (ADMIN.encode(),))
    with running(Application({"tiny": model}, auth=auth)) as url:
        yield url


def score(url: str, token: str | None, path: str = "/invocations") -> requests.Response:
    headers = {} if token is None else {"Authorization": token}
    return requests.post(url + path, json={"inputs": ["red"]}, headers=headers, timeout=10)


@pytest.mark.parametrize(
    "token",
    [None, "", SCORE, f"Basic {SCORE}", f"Bearer {ADMIN}", f"Bearer {SCORE}x", "Bearer", "Bearer "],
)
@pytest.mark.parametrize("path", ["/invocations", "/models/tiny/invocations"])
def test_without_a_scoring_token_a_request_is_401(
    guarded: str, token: str | None, path: str
) -> None:
    answer = score(guarded, token, path)
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert answer.json()["error_code"] == "UNAUTHENTICATED"
    assert not any(word in answer.text for word in (SCORE, ADMIN))


@pytest.mark.parametrize("token", [f"Bearer {SCORE}", f"bearer  {SCORE}"])
def test_each_of_several_scoring_tokens_is_accepted(guarded: str, token: str) -> None:
    assert score(guarded, token).status_code == 200
    assert score(guarded, "Bearer an-older-token-still-valid").status_code == 200


@pytest.mark.parametrize("path", ["/metrics", "/model", "/models", "/models/tiny"])
def test_admin_pages_need_the_admin_token(guarded: str, path: str) -> None:
    for headers in ({}, {"Authorization": f"Bearer {SCORE}"}):
        assert requests.get(guarded + path, headers=headers, timeout=5).status_code == 401
    headers = {"Authorization": f"Bearer {ADMIN}"}
    assert requests.get(guarded + path, headers=headers, timeout=5).status_code in (200, 501)


@pytest.mark.parametrize("path", ["/livez", "/readyz", "/ping", "/health", "/version"])
def test_probes_need_no_token(guarded: str, path: str) -> None:
    assert requests.get(guarded + path, timeout=5).status_code == 200


def test_without_an_admin_token_the_scoring_token_reads_admin_pages(model: ServedModel) -> None:
    with running(Application({"tiny": model}, auth=TokenAuth((SCORE.encode(),)))) as url:
        assert requests.get(f"{url}/model", timeout=5).status_code == 401
        headers = {"Authorization": f"Bearer {SCORE}"}
        assert requests.get(f"{url}/model", headers=headers, timeout=5).status_code == 200


def test_tokens_come_from_the_environment_or_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert auth_from_environment() == TokenAuth()
    file = tmp_path / "tokens"
    file.write_text(f"{SCORE}\n{SCORE}-new\n\n")
    monkeypatch.setenv("PT_DEPLOY_TOKEN_FILE", str(file))
    monkeypatch.setenv("PT_DEPLOY_ADMIN_TOKEN", ADMIN)
    auth = auth_from_environment()
    assert auth == TokenAuth((SCORE.encode(), f"{SCORE}-new".encode()), (ADMIN.encode(),))
    assert SCORE not in repr(auth)
    monkeypatch.setenv("PT_DEPLOY_ADMIN_TOKEN", "short")
    with pytest.raises(ServingError, match="fewer than 16 characters; make one: openssl"):
        auth_from_environment()
    for content in ("", " \n"):
        file.write_text(content)
        with pytest.raises(ServingError, match="PT_DEPLOY_TOKEN_FILE is empty"):
            auth_from_environment()
    monkeypatch.setenv("PT_DEPLOY_TOKEN_FILE", str(tmp_path / "none"))
    with pytest.raises(ServingError, match="PT_DEPLOY_TOKEN_FILE cannot be read"):
        auth_from_environment()


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.4", "model.example.com", ""])
def test_a_host_that_others_reach_needs_a_token(host: str) -> None:
    assert not is_loopback(host)
    with pytest.raises(ServingError, match="PT_DEPLOY_TOKEN is not set.*--insecure"):
        require_auth_unless_loopback(host, TokenAuth(admin=(ADMIN.encode(),)), insecure=False)
    require_auth_unless_loopback(host, TokenAuth(), insecure=True)
    require_auth_unless_loopback(host, TokenAuth((SCORE.encode(),)), insecure=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.3.2.1", "::1", "localhost"])
def test_a_loopback_host_needs_no_token(host: str) -> None:
    require_auth_unless_loopback(host, TokenAuth(), insecure=False)


def test_serve_refuses_before_it_loads_anything() -> None:
    with pytest.raises(ServingError, match="0.0.0.0 can be reached"):
        serve("models:/tiny@champion", host="0.0.0.0")
