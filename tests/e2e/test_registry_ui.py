"""A person promotes and goes back in MLflow's own UI; a running server follows.

With SCREENSHOTS=FOLDER the pages are saved there, for the documentation.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
import requests
from mlflow import MlflowClient
from tiny.mlflow_server import mlflow_server
from tiny.optimized import VARIANTS, Made, optimized_run
from tiny.server import started, until

from mlflow_pt_deploy.pipeline.promotion_stage import promote_choice, read_optimized
from mlflow_pt_deploy.registry.addresses import DIGEST_TAG
from mlflow_pt_deploy.registry.history import read_history
from mlflow_pt_deploy.registry.refusal import REFUSED_TAG

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed"),
]

FASTER = {**VARIANTS, "student-openvino-int8": Made(359, 358, 20.0)}


@pytest.fixture(scope="module")
def server(empty_database: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """MLflow's server on an empty database."""
    folder = tmp_path_factory.mktemp("mlflow")
    database = shutil.copyfile(empty_database, folder / "ui.db")
    with mlflow_server(folder, f"sqlite:///{database}") as (url, _):
        yield url


@pytest.fixture
def ui(server: str, tracking: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The server, as MLflow's tracking server of this process and of its children."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", server)
    mlflow.set_tracking_uri(server)
    mlflow.set_registry_uri(server)
    mlflow.set_experiment("shop")  # its artifacts go through the server
    return server


@pytest.fixture
def page() -> Iterator[object]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(60_000)
        yield page
        browser.close()


def shot(page: object, name: str) -> None:
    if folder := os.environ.get("SCREENSHOTS"):
        page.wait_for_timeout(1000)  # type: ignore[attr-defined]
        page.screenshot(path=str(Path(folder, f"{name}.png")))  # type: ignore[attr-defined]


def move_champion(page: object, url: str, version: str) -> None:
    """Give a version the alias `champion`, on its page."""
    page.goto(f"{url}/#/models/shop/versions/{version}")  # type: ignore[attr-defined]
    page.locator('button[data-component-id*="aliaseditor"]').first.click()  # type: ignore[attr-defined]
    dialog = page.locator('[role="dialog"]')  # type: ignore[attr-defined]
    dialog.locator("input").first.fill("champion")
    page.keyboard.press("Enter")  # type: ignore[attr-defined]
    shot(page, f"alias-{version}")
    dialog.get_by_text("Save aliases").click()
    dialog.wait_for(state="hidden")


class Load(threading.Thread):
    """One client that scores without pause."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self._url, self._stop_now = url, threading.Event()
        self.versions: list[str] = []
        self.failed: list[int] = []

    def run(self) -> None:
        with requests.Session() as session:
            while not self._stop_now.wait(0.01):
                body = {"inputs": ["my card"]}
                answer = session.post(f"{self._url}/invocations", json=body, timeout=60)
                if answer.status_code == 200:
                    self.versions.append(answer.headers["X-Model-Version"])
                else:
                    self.failed.append(answer.status_code)

    def __enter__(self) -> Load:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_now.set()
        self.join()


def test_a_person_reads_the_reason_and_moves_the_alias(
    ui: str, page: object, tmp_path: Path
) -> None:
    for variants in (VARIANTS, FASTER):
        promote_choice(read_optimized(optimized_run(variants)), "shop")
    client = MlflowClient()
    champion, before = (
        str(client.get_model_version_by_alias("shop", alias).version)
        for alias in ("champion", "previous")
    )
    words = ("models:/shop@champion", "--replicas", "1", "--poll-s", "1")
    with started(tmp_path / "scratch", *words) as served, Load(served.url) as load:
        page.goto(f"{ui}/#/models/shop")  # type: ignore[attr-defined]
        page.get_by_text("@ champion").first.wait_for()  # type: ignore[attr-defined]
        shot(page, "model")
        page.goto(f"{ui}/#/models/shop/versions/{champion}")  # type: ignore[attr-defined]
        page.get_by_text("Compared with version").first.wait_for()  # type: ignore[attr-defined]
        page.get_by_text("the promise is kept").first.wait_for()  # type: ignore[attr-defined]
        shot(page, "version")
        until(lambda: load.versions)
        assert load.versions[-1] == champion
        move_champion(page, ui, before)
        moved = time.monotonic()
        until(lambda: load.versions[-1] == before)
        assert time.monotonic() - moved < 10
        assert read_history("shop").moved_by_hand

        # a version that is not what was promoted is refused, with the reason for the person
        client.set_model_version_tag("shop", champion, DIGEST_TAG, f"v2:{'0' * 64}")
        move_champion(page, ui, champion)
        until(lambda: REFUSED_TAG in client.get_model_version("shop", champion).tags)
        assert load.versions[-1] == before
        page.goto(f"{ui}/#/models/shop/versions/{champion}")  # type: ignore[attr-defined]
        page.get_by_text("differs from the promoted one").first.wait_for()  # type: ignore[attr-defined]
        shot(page, "refused")
    assert not load.failed
    assert len(load.versions) > 50
    assert set(load.versions) == {champion, before}


def test_promote_model_in_the_ui_is_a_promotion(ui: str, page: object, tmp_path: Path) -> None:
    """The button copies a version to another registered model; a server follows its latest."""
    promote_choice(read_optimized(optimized_run()), "boutique")
    client = MlflowClient()
    version = str(client.get_model_version_by_alias("boutique", "champion").version)
    client.copy_model_version(f"models:/boutique/{version}", "boutique-prod")
    words = ("models:/boutique-prod/latest", "--replicas", "1", "--poll-s", "1")
    with started(tmp_path / "scratch", *words) as served, Load(served.url) as load:
        page.goto(f"{ui}/#/models/boutique/versions/{version}")  # type: ignore[attr-defined]
        page.get_by_role("button", name="Promote model").click()  # type: ignore[attr-defined]
        dialog = page.locator('[role="dialog"]')  # type: ignore[attr-defined]
        dialog.locator("input").first.click()
        page.get_by_text("boutique-prod").last.click()  # type: ignore[attr-defined]
        shot(page, "promote-model")
        dialog.get_by_role("button", name="Promote").last.click()
        until(lambda: load.versions and load.versions[-1] == "2", 60)
    assert not load.failed


def test_what_was_served_stands_beside_what_was_promised(
    ui: str, page: object, tmp_path: Path
) -> None:
    promote_choice(read_optimized(optimized_run()), "market")
    client = MlflowClient()
    version = client.get_model_version_by_alias("market", "champion")
    words = ("models:/market@champion", "--replicas", "1", "--report-s", "1")
    with started(tmp_path / "scratch", *words, "--feedback-rows", "100") as served:
        for turn in range(3):
            for at in range(10):
                answer = requests.post(
                    f"{served.url}/invocations",
                    json={"inputs": ["my card"]},
                    headers={"X-Request-Id": f"id-{turn}-{at}"},
                    timeout=60,
                )
                assert answer.status_code == 200
            label = answer.json()["predictions"][0]["label"]
            items = [{"request_id": f"id-{turn}-{at}", "label": label} for at in range(10)]
            sent = requests.post(f"{served.url}/feedback", json={"feedback": items}, timeout=60)
            assert sent.json()["taken"] == 10
            count = str(10 * (turn + 1))

            def written(count: str = count) -> bool:
                tags = client.get_model_version("market", str(version.version)).tags
                return tags.get("served.judged_rows") == count

            until(written)
        served.process.terminate()
        assert served.process.wait(60) == 0
    page.goto(f"{ui}/#/models/market/versions/{version.version}")  # type: ignore[attr-defined]
    page.get_by_text("served.accuracy_low").first.scroll_into_view_if_needed()  # type: ignore[attr-defined]
    shot(page, "served-tags")
    experiment = client.get_run(version.run_id).info.experiment_id
    page.goto(f"{ui}/#/experiments/{experiment}/runs/{version.run_id}")  # type: ignore[attr-defined]
    page.get_by_text("served_accuracy", exact=True).first.wait_for()  # type: ignore[attr-defined]
    shot(page, "served-metrics")
    page.goto(  # type: ignore[attr-defined]
        f"{ui}/#/experiments/{experiment}/runs/{version.run_id}/model-metrics"
    )
    page.get_by_text("served_accuracy", exact=True).first.wait_for()  # type: ignore[attr-defined]
    shot(page, "served-over-time")
    steps = [point.step for point in client.get_metric_history(version.run_id, "served_requests")]
    assert len(steps) == len(set(steps)) > 1, "MLflow draws points of one step as a bar"
