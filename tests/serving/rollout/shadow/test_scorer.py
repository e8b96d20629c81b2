"""Shadows score real rows: what is counted, what is refused, what an error leaves."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny.serving import save_tiny

from mlflow_pt_deploy.errors import ArtifactError
from mlflow_pt_deploy.registry.addresses import ModelSpec, ResolvedVersion
from mlflow_pt_deploy.serving.model.loaded_model import LoadedModel, load_version
from mlflow_pt_deploy.serving.rollout.shadow.message import Sample
from mlflow_pt_deploy.serving.rollout.shadow.plan import SHADOW, TEACHER, ShadowPlan, ShadowTarget
from mlflow_pt_deploy.serving.rollout.shadow.scorer import MAX_KEPT, RETRY_S, ShadowScorer
from mlflow_pt_deploy.serving.rollout.shadow.store import ACTIVE, REFUSED, Comparison

LABELS = ("red", "green", "blue")


class Versions:
    """Loads versions from folders, and remembers which."""

    def __init__(self, folder: Path, **habits: dict[str, Any]) -> None:
        self.loaded: list[str] = []
        self._folders = {
            version.removeprefix("v"): save_tiny(folder / version, **each)
            for version, each in habits.items()
        }

    def __call__(self, resolved: ResolvedVersion, spec: ModelSpec) -> LoadedModel:
        assert resolved.version is not None
        assert (spec.model_config["num_threads"], spec.model_config["device"]) == (1, "cpu")
        self.loaded.append(resolved.version)
        folder = str(self._folders[resolved.version])
        return load_version(ResolvedVersion(folder), ModelSpec(folder, spec.model_config))


def plans(*targets: ShadowTarget, **parts: Any) -> dict[str, ShadowPlan]:
    facts = {"labels": LABELS, "column": "text", "model_config": {"num_threads": 2}} | parts
    return {"tiny": ShadowPlan("tiny", "3", targets=targets, **facts)}


def target(version: str, role: str = SHADOW, share: float = 1.0) -> ShadowTarget:
    return ShadowTarget(role, f"models:/tiny/{version}", share, version)


def sample(*rows: Any, answered: str = "", version: str = "3", point: float = 0.0) -> Sample:
    texts = [json.dumps({"label": answered or row, "score": 1.0}) for row in rows]
    return Sample("tiny", version, point, texts, rows)


def only(scorer: ShadowScorer) -> Comparison:
    (found,) = scorer.comparisons.values()
    return found


def test_rows_with_another_label_are_counted(tmp_path: Path) -> None:
    scorer = ShadowScorer(load=Versions(tmp_path, v4={}))
    scorer.follow(plans(target("4")))
    scorer.score(sample("red", "green", "blue"))
    scorer.score(sample("red", "green", answered="red"))
    scorer.score(sample("red", version="2"))  # what another version answered is not compared
    found = only(scorer)
    assert found.key == ("tiny", SHADOW, "3", "4")
    assert (found.state, found.counts.compared, found.counts.disagreed) == (ACTIVE, 5, 1)
    assert (found.counts.requests, found.counts.errors) == (2, 0)
    assert found.counts.quantile_s(0.5) is not None


def test_each_shadow_has_its_share_and_its_version_is_loaded_once(tmp_path: Path) -> None:
    versions = Versions(tmp_path, v1={}, v4={"wrong": True})
    scorer = ShadowScorer(load=versions)
    both = plans(target("1", TEACHER, 0.01), target("4", SHADOW, 0.5))
    for _ in range(2):
        scorer.follow(both)
    for point in (0.005, 0.3, 0.7):
        scorer.score(sample("red", point=point))
    counts = {key[1]: each.counts for key, each in scorer.comparisons.items()}
    assert (counts[TEACHER].compared, counts[TEACHER].disagreed) == (1, 0)
    assert (counts[SHADOW].compared, counts[SHADOW].disagreed) == (2, 2)
    assert versions.loaded == ["1", "4"]
    scorer.follow(plans(target("4", TEACHER)))
    scorer.score(sample("red"))
    assert versions.loaded == ["1", "4"], "in another role"
    scorer.follow({})
    scorer.follow(both)
    assert versions.loaded == ["1", "4", "1", "4"], "freed in between"


def test_an_error_of_the_model_is_counted_and_tells_no_rows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scorer = ShadowScorer(load=Versions(tmp_path, v4={}))
    scorer.follow(plans(target("4")))
    for _ in range(2):
        scorer.score(sample("red explode", answered="red"))
    scorer.score(sample("nan"))
    scorer.score(sample("red"))
    counts = only(scorer).counts
    assert (counts.requests, counts.errors, counts.compared) == (4, 3, 1)
    told = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert [line for line in told if "shadow" in line] == [
        "shadow: version 4 raised RuntimeError"
    ], "once"
    assert "explode" not in caplog.text and "secret" not in caplog.text


def test_images_are_scored(tmp_path: Path) -> None:
    from io import BytesIO

    from PIL import Image

    image = BytesIO()
    Image.fromarray(np.full((8, 8, 3), (255, 0, 0), np.uint8)).save(image, "PNG")
    scorer = ShadowScorer(load=Versions(tmp_path, v4={"images": True}))
    scorer.follow(plans(target("4"), column="image"))
    scorer.score(sample(image.getvalue(), answered="red"))
    scorer.score(sample(b"no image", answered="red"))
    counts = only(scorer).counts
    assert (counts.requests, counts.errors, counts.compared, counts.disagreed) == (2, 1, 1, 0)


@pytest.mark.parametrize(
    ("habits", "reason"),
    [
        ({"label": "maroon"}, "its labels differ: it lacks red, it adds maroon."),
        ({"images": True}, "it reads images instead of texts."),
        ({"refuse": "it is damaged. Log it again."}, "it is damaged. Log it again."),
    ],
)
def test_a_version_that_cannot_be_compared_is_refused(
    tmp_path: Path, habits: dict[str, Any], reason: str
) -> None:
    scorer = ShadowScorer(load=Versions(tmp_path, v4=habits))
    scorer.follow(plans(target("4")))
    scorer.score(sample("red"))
    found = only(scorer)
    assert found.state == REFUSED and found.reason.startswith(reason)
    assert found.counts.requests == 0


def test_a_version_that_could_not_be_loaded_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, states = Versions(tmp_path, v4={}), [True]

    def load(resolved: ResolvedVersion, spec: ModelSpec) -> LoadedModel:
        if states:
            states.pop()
            raise ArtifactError("the store is away.")
        return folder(resolved, spec)

    scorer = ShadowScorer(load=load)
    for _ in range(2):
        scorer.follow(plans(target("4")))
        assert only(scorer).state == REFUSED
    import time

    later = time.monotonic() + RETRY_S
    monkeypatch.setattr(time, "monotonic", lambda: later)
    scorer.follow(plans(target("4")))
    assert (only(scorer).state, only(scorer).reason) == (ACTIVE, "")


def test_old_comparisons_are_continued_and_bounded(tmp_path: Path) -> None:
    old = [Comparison("tiny", SHADOW, "3", str(number)) for number in range(MAX_KEPT)]
    old[4].counts.compared = 7
    scorer = ShadowScorer(old, Versions(tmp_path, v4={}, v99={}))
    scorer.follow(plans(target("4"), target("99", TEACHER)))
    scorer.score(sample("red"))
    assert scorer.comparisons["tiny", SHADOW, "3", "4"].counts.compared == 8
    assert len(scorer.comparisons) == MAX_KEPT
    assert ("tiny", SHADOW, "3", "0") not in scorer.comparisons
