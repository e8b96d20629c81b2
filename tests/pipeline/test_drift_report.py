"""The command drift: from the registry and from a running server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mlflow import MlflowClient
from tiny.registry import register_tiny
from tiny.server import free_port, running

from mlflow_pt_deploy.cli import main
from mlflow_pt_deploy.evaluation.drift import compare
from mlflow_pt_deploy.evaluation.profile import Profile, RowCounts
from mlflow_pt_deploy.pipeline.drift_report import DriftReport
from mlflow_pt_deploy.registry.addresses import source
from mlflow_pt_deploy.registry.profile_tags import PROFILE_TAG, SERVED_TAG
from mlflow_pt_deploy.serving.app import Application
from mlflow_pt_deploy.serving.http.auth import TokenAuth
from mlflow_pt_deploy.serving.lifecycle.served_model import ServedModel
from mlflow_pt_deploy.serving.monitoring.drift import DriftWatch

TOKEN = "a-token-of-a-test"


def counts(*labels: int) -> RowCounts:
    found = RowCounts(labels=[0] * len(labels))
    for at, rows in enumerate(labels):
        found.count_rows([(at, 0.9)] * rows, [[[2, 3]] * rows], unknown_id=1)
    return found


PROFILE = Profile.of(counts(600, 300, 100)).to_tag()


def served(found: RowCounts) -> str:
    return json.dumps({**found.to_json(), "since": "2026-11-28T09:00", "until": "2026-11-28T10:00"})


@pytest.fixture
def client(tracking: str, tmp_path: Path) -> MlflowClient:
    """A champion without tags."""
    client = MlflowClient()
    register_tiny(client, tmp_path, {})
    return client


def command(
    capsys: pytest.CaptureFixture[str], *words: str, status: int = 0
) -> tuple[str, dict[str, object]]:
    capsys.readouterr()
    assert main(["drift", *words, "--json"]) == status
    shown = capsys.readouterr()
    assert "Traceback" not in shown.err
    lines = shown.out.strip().splitlines()
    return shown.out + shown.err, json.loads(lines[-1]) if lines else {}


def test_what_servers_wrote_to_the_registry_is_compared(
    client: MlflowClient, capsys: pytest.CaptureFixture[str]
) -> None:
    client.set_model_version_tag("tiny", "1", PROFILE_TAG, PROFILE)
    client.set_model_version_tag("tiny", "1", SERVED_TAG, served(counts(610, 290, 100)))
    shown, document = command(capsys, "tiny")
    assert (
        "tiny/1: what comes still looks like the rows that decided its promotion (written " in shown
    )
    assert document["verdict"] == "same"
    client.set_model_version_tag("tiny", "1", SERVED_TAG, served(counts(100, 300, 600)))
    for name in ("tiny", "tiny@champion", "tiny/1"):
        shown, document = command(capsys, name, status=4)
        assert "no longer looks like" in shown and "(labels; written to the registry)." in shown
        assert document["verdict"] == "moved"
    client.set_model_version_tag("tiny", "1", SERVED_TAG, served(counts(20, 30, 10)))
    shown, document = command(capsys, "tiny")
    assert "too few rows to say" in shown and document["verdict"] == "too few rows"


@pytest.mark.parametrize(
    ("profile", "served_tag", "message"),
    [
        (None, served(counts(9, 9, 9)), "tiny/1 has no tag pt_deploy.profile: it was promoted by"),
        ("{}", served(counts(9, 9, 9)), "the tag pt_deploy.profile of tiny/1 is damaged"),
        (PROFILE, None, "no server wrote what it answered"),
        (PROFILE, "7", "the tag pt_deploy.served_profile of tiny/1 is damaged"),
        (PROFILE, served(counts(0, 0, 0)), "tiny/1 has answered no rows"),
        (PROFILE, served(counts(9, 9)), "has 3 classes and the served rows have 2"),
    ],
)
def test_what_is_missing_or_damaged_is_named(
    client: MlflowClient,
    capsys: pytest.CaptureFixture[str],
    profile: str | None,
    served_tag: str | None,
    message: str,
) -> None:
    for key, value in ((PROFILE_TAG, profile), (SERVED_TAG, served_tag)):
        if value is not None:
            client.set_model_version_tag("tiny", "1", key, value)
    shown, _ = command(capsys, "tiny", status=1)
    assert message in shown


@pytest.mark.parametrize("name", ["none", "tiny/7", "tiny@nobody"])
def test_an_unknown_version_is_named(
    client: MlflowClient, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    shown, _ = command(capsys, name, status=1)
    assert "cannot be found" in shown and "NAME/VERSION" in shown


def test_a_running_server_is_asked(
    client: MlflowClient, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    client.set_model_version_tag("tiny", "1", PROFILE_TAG, PROFILE)
    model = ServedModel("shop", source("models:/tiny@champion"))
    model.open()
    auth = TokenAuth((TOKEN.encode(),))
    app = Application({"shop": model}, auth=auth, drift=DriftWatch({"shop": model}))
    with running(app) as url:
        shown, _ = command(capsys, "tiny", "--url", url, status=1)
        assert "needs its admin token: set PT_DEPLOY_ADMIN_TOKEN, or PT_DEPLOY_TOKEN" in shown
        monkeypatch.setenv("PT_DEPLOY_TOKEN", TOKEN)
        shown, _ = command(capsys, "tiny", "--url", url, status=1)
        assert "tiny/1 has answered no rows" in shown
        fields = counts(620, 290, 90)
        for name, value in fields.to_json().items():
            setattr(model.counts["1"], name, value)
        shown, document = command(capsys, "tiny", "--url", f"{url}/")
        assert "still looks like" in shown and set(document["windows"]) == {
            "last_hour",
            "since_start",
        }
        model.counts["1"].count_rows([(2, 0.9)] * 4000, [[[2, 3]] * 4000])
        for name in ("tiny", "tiny/1", "shop"):
            shown, document = command(capsys, name, "--url", url, status=4)
            assert "(labels; last hour)." in shown
        for name, message in (
            ("other", f"{url} does not serve other; it serves shop"),
            ("tiny/2", f"{url} serves tiny/1, not tiny/2"),
            ("tiny@champion", "the server decides which version it serves"),
        ):
            shown, _ = command(capsys, name, "--url", url, status=1)
            assert message in shown
        model.unload("a test")
        shown, _ = command(capsys, "tiny", "--url", url, status=1)
        assert "holds no version of tiny in memory" in shown


def test_a_server_without_a_profile_says_why(
    client: MlflowClient, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ServedModel("tiny", source("models:/tiny@champion"))
    model.open()
    with running(Application({"tiny": model}, drift=DriftWatch({"tiny": model}))) as url:
        shown, _ = command(capsys, "tiny", "--url", url, status=1)
        assert "version 1 has no tag pt_deploy.profile" in shown
        shown, _ = command(capsys, "tiny", "--url", f"{url}/ping", status=1)
        assert "is not a pt-deploy server: /models answered 404" in shown


def test_no_server(tracking: str, capsys: pytest.CaptureFixture[str]) -> None:
    for url in (f"http://127.0.0.1:{free_port()}", "127.0.0.1", "nonsense://x"):
        shown, _ = command(capsys, "tiny", "--url", url, status=1)
        assert f"no pt-deploy server answers at {url}" in shown


def test_the_last_hour_decides_unless_it_has_too_few_rows() -> None:
    usual = Profile.from_tag(PROFILE, "the tag")
    same = compare(usual, Profile.of(counts(620, 290, 90)))
    moved = compare(usual, Profile.of(counts(100, 300, 600)))
    few = compare(usual, Profile.of(counts(6, 3, 1)))
    for windows, expected in (
        ((same, moved), ("last_hour", "same")),
        ((moved, same), ("last_hour", "moved")),
        ((few, moved), ("since_start", "moved")),
        (([], same), ("since_start", "same")),
        ((few, few), ("last_hour", "too few rows")),
    ):
        report = DriftReport(
            "tiny/1", dict(zip(("last_hour", "since_start"), windows, strict=True))
        )
        assert (report.window, report.verdict) == expected
        assert f"{expected[0].replace('_', ' ')})." in report.text()
