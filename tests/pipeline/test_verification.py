"""Verify on this machine, and copies to other names and servers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient
from tiny.artifact import SAVED
from tiny.optimized import optimized_run

from mlflow_pt_deploy import flavor
from mlflow_pt_deploy.artifacts.golden import GOLDEN
from mlflow_pt_deploy.artifacts.manifest import MANIFEST
from mlflow_pt_deploy.cli import main
from mlflow_pt_deploy.errors import TrackingError
from mlflow_pt_deploy.pipeline.promotion_stage import promote_choice, read_optimized
from mlflow_pt_deploy.pipeline.transfer import copy_champion
from mlflow_pt_deploy.pipeline.verification import verify_model
from mlflow_pt_deploy.registry.addresses import DIGEST_TAG
from mlflow_pt_deploy.registry.history import read_history
from mlflow_pt_deploy.system.regular_files import sha256

CHAMPION = "models:/shop@champion"


@pytest.fixture
def shop(tracking: str) -> str:
    """A registered model with a champion."""
    promote_choice(read_optimized(optimized_run()), "shop")
    return tracking


def changed(folder: Path, scale: float) -> Path:
    """A copy of the saved variant whose golden logits are multiplied."""
    shutil.copytree(SAVED / "variant", folder)
    golden = json.loads((folder / GOLDEN).read_text())
    golden["logits"] = [[scale * value for value in row] for row in golden["logits"]]
    (folder / GOLDEN).write_text(json.dumps(golden))
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][GOLDEN] = sha256(folder / GOLDEN)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


def test_the_same_model_passes(shop: str, capsys: pytest.CaptureFixture[str]) -> None:
    done = verify_model(CHAMPION)
    assert (done.status, done.changed_labels, done.slowdown) == ("pass", 0, None)
    assert "0 of 4 golden rows" in done.findings[0] or "golden rows get another" in done.findings[0]
    assert main(["verify", CHAMPION]) == 0
    assert capsys.readouterr().out.startswith("pass: models:/shop/")


def test_slower_than_logged_is_degraded(shop: str, capsys: pytest.CaptureFixture[str]) -> None:
    client = MlflowClient()
    version = client.get_model_version_by_alias("shop", "champion").version
    client.set_model_version_tag("shop", version, "latency_p50_ms", "0.000001")
    assert main(["verify", CHAMPION, "--latency"]) == 4
    shown = capsys.readouterr().out
    assert shown.startswith("degraded") and "1e-06 ms where it was logged" in shown
    client.set_model_version_tag("shop", version, "latency_p50_ms", "1000000")
    assert verify_model(CHAMPION, latency=True).status == "pass"
    client.delete_model_version_tag("shop", version, "latency_p50_ms")
    assert "no latency was logged" in verify_model(CHAMPION, latency=True).findings[1]


def test_other_logits_or_files_are_wrong(shop: str, tmp_path: Path) -> None:
    with mlflow.start_run():
        info = flavor.log_model(changed(tmp_path / "changed", 3.0), "changed")
    done = verify_model(f"models:/{info.model_id}")
    assert done.status == "wrong"
    assert "the logits differ by" in done.findings[0]
    client = MlflowClient()
    version = client.get_model_version_by_alias("shop", "champion").version
    client.set_model_version_tag("shop", version, DIGEST_TAG, f"v2:{'0' * 64}")
    assert main(["verify", CHAMPION]) == 5
    with pytest.raises(TrackingError, match="cannot be fetched or opened"):
        verify_model("models:/none@champion")


def test_a_champion_is_copied_to_another_name(shop: str) -> None:
    done = copy_champion("shop", "shop-prod", verify=True)
    assert done.uri == "models:/shop-prod@champion"
    client = MlflowClient()
    here, there = (
        client.get_model_version_by_alias(name, "champion") for name in ("shop", "shop-prod")
    )
    assert there.tags[DIGEST_TAG] == here.tags[DIGEST_TAG]
    assert "copied from shop/" in there.description
    assert mlflow.pyfunc.load_model(done.uri).predict(["my card"])
    assert read_history("shop-prod").events[0].why.startswith("copied from shop/")
    assert copy_champion("shop", "shop-prod").previous == "1"


def test_a_champion_is_copied_to_another_server(
    shop: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.db"
    shutil.copyfile(shop.removeprefix("sqlite:///"), other)
    uri = f"sqlite:///{other}"
    words = ("promote", "--name", "shop", "--to", "prod", "--registry-uri", uri, "--verify")
    assert main(words) == 0
    assert "a verified copy of the champion of shop" in capsys.readouterr().out
    there = MlflowClient(uri, uri)
    assert there.get_model_version_by_alias("prod", "champion").tags[DIGEST_TAG]
    assert mlflow.get_tracking_uri() == shop
    assert [model.name for model in MlflowClient().search_registered_models()] == ["shop"]


def test_a_copy_that_differs_is_removed(shop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = MlflowClient.log_artifacts

    def corrupt(self: MlflowClient, run_id: str, local: str, path: str) -> None:
        (Path(local) / "variant" / MANIFEST).write_text("{}")
        real(self, run_id, local, path)

    monkeypatch.setattr(MlflowClient, "log_artifacts", corrupt)
    with pytest.raises(Exception, match="differs from the promoted one"):
        copy_champion("shop", "prod")
    assert not MlflowClient().search_model_versions("name = 'prod'")
    assert read_history("prod").champion is None
