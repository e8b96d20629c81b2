"""Shadows in a real registry: aliases, tags, and the baseline of a promotion."""

from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from tiny.serving import save_tiny

from mlflow_pt_deploy.registry.addresses import (
    AGREEMENT_TAG,
    BASELINE_TAG,
    RUN_TAG,
    ModelSpec,
    ResolvedVersion,
)
from mlflow_pt_deploy.serving.model.loaded_model import LoadedModel, load_version
from mlflow_pt_deploy.serving.rollout.shadow.lookup import (
    ShadowWish,
    look_up_targets,
    without_targets,
)
from mlflow_pt_deploy.serving.rollout.shadow.plan import (
    SHADOW,
    SHADOW_TAG,
    TEACHER,
    ShadowPlan,
    ShadowTarget,
)
from mlflow_pt_deploy.serving.rollout.version_share import parse_option

URI = "models:/tiny@challenger"
CHAMPION = {RUN_TAG: "7f", BASELINE_TAG: "2"}


@pytest.fixture
def client(tracking: str, tmp_path: Path) -> MlflowClient:
    """Versions 1 and 2 of one run, 3 of another."""
    client = MlflowClient()
    client.create_registered_model("tiny")
    for number, run in ((1, "7f"), (2, "7f"), (3, "8f")):
        source = str(save_tiny(tmp_path / f"tiny-{number}"))
        client.create_model_version("tiny", source, tags={RUN_TAG: run})
    return client


def look_up(
    shadow: str = "", teacher: float = 0.0, name: str | None = "tiny", **tags: Any
) -> list[ShadowTarget]:
    plan = ShadowPlan(name, "1", ("red",), "text")
    wish = ShadowWish(parse_option("shadow", shadow, 1.0), teacher)
    return list(look_up_targets(plan, CHAMPION | tags, wish))


def test_the_alias_means_what_it_means_now(client: MlflowClient) -> None:
    (absent,) = look_up(URI)
    assert absent.problem == f"{URI} does not exist. Set the alias, or name another version."
    client.set_registered_model_alias("tiny", "challenger", "3")
    assert look_up(f"{URI}=20%") == [ShadowTarget(SHADOW, URI, 0.2, "3")]
    assert look_up("models:/tiny/2") == [ShadowTarget(SHADOW, "models:/tiny/2", 1.0, "2")]
    client.set_registered_model_alias("tiny", "challenger", "1")
    (itself,) = look_up(URI)
    assert itself.problem == "version 1 answers itself. Shadow another version."


def test_the_tag_wins_over_the_option(client: MlflowClient) -> None:
    client.set_registered_model_alias("tiny", "next", "3")
    client.set_registered_model_tag("tiny", SHADOW_TAG, "next:20%")
    assert look_up("models:/tiny/2") == [ShadowTarget(SHADOW, "models:/tiny@next", 0.2, "3")]
    client.set_registered_model_tag("tiny", SHADOW_TAG, "next:0%")
    assert "has the share '0%'" in look_up()[0].problem
    client.set_registered_model_tag("tiny", SHADOW_TAG, "off")
    assert look_up("models:/tiny/2") == []
    client.delete_registered_model_tag("tiny", SHADOW_TAG)
    assert look_up() == []


def test_the_teacher_is_the_baseline_of_the_same_run(client: MlflowClient) -> None:
    assert look_up(teacher=0.01) == [ShadowTarget(TEACHER, "models:/tiny/2", 0.01, "2")]
    for copied in ("3", "9"):  # the numbers of another registered model
        (other,) = look_up(teacher=0.01, **{BASELINE_TAG: copied})
        assert other.problem.startswith("no baseline was registered with version 1 of tiny,")
    (folder,) = look_up(teacher=0.01, name=None)
    assert folder.problem.startswith("the served model is not in the registry")


def test_a_registry_that_does_not_answer_raises(tracking: str) -> None:
    with pytest.raises(MlflowException):
        look_up(URI)  # there is no model


def test_the_plan_has_what_the_shadow_must_match(tmp_path: Path) -> None:
    folder = str(save_tiny(tmp_path / "tiny"))
    loaded = load_version(ResolvedVersion(folder), ModelSpec(folder, {"num_threads": 2}))
    resolved = ResolvedVersion("models:/tiny/1", "tiny", "1")
    served = LoadedModel(loaded.pyfunc, resolved, loaded.spec, {AGREEMENT_TAG: "0.975"})
    expected = ShadowPlan(
        "tiny", "1", ("red", "green", "blue"), "text", {"num_threads": 2}, agreement=0.975
    )
    assert without_targets(served) == expected
    served.tags = {AGREEMENT_TAG: "much"}
    assert without_targets(served).agreement is None
