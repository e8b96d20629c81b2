"""What is asked for: options, shares, the tag; bad input is named."""

import json

import pytest

from mlflow_pt_deploy.errors import ServingError
from mlflow_pt_deploy.serving.rollout.shadow_plan import (
    SHADOW,
    SHADOW_TAG,
    TEACHER,
    ShadowOption,
    ShadowPlan,
    ShadowTarget,
    check_served,
    label_problem,
    parse_shadows,
    parse_share,
    wanted_shadow,
)

URI = "models:/tiny@challenger"
OPTION = ShadowOption("tiny", URI, 1.0)


def test_shadows_are_parsed() -> None:
    assert parse_shadows("") == ()
    assert parse_shadows(URI) == (OPTION,)
    assert parse_shadows(f"{URI}=2.5%, models:/other/7=100%") == (
        ShadowOption("tiny", URI, 0.025),
        ShadowOption("other", "models:/other/7", 1.0),
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "tiny@challenger",
            "shadow is 'tiny@challenger'; give models:/NAME@ALIAS, or with a share",
        ),
        ("models:/tiny", "shadow is 'models:/tiny'; give models:/NAME@ALIAS"),
        (f"{URI}:20%", "shadow is 'models:/tiny@challenger:20%'; give"),
        (f"{URI}=0%", "has the share '0%'; give more than 0% and at most 100%, e.g. 20%"),
        (f"{URI}=101%", "shadow models:/tiny@challenger has the share '101%'"),
        (f"{URI}=-1%", "has the share '-1%'"),
        (f"{URI}=nan%", "has the share 'nan%'"),
        (f"{URI}=half", "has the share 'half'"),
        (f"{URI}=20", "has the share '20'"),
        (f"{URI}=", "has the share ''"),
        (
            f"{URI},models:/tiny/3",
            "two shadows of tiny, models:/tiny@challenger and models:/tiny/3",
        ),
    ],
)
def test_a_bad_shadow_is_named(text: str, message: str) -> None:
    with pytest.raises(ServingError, match=message):
        parse_shadows(text)


def test_a_bad_share_of_the_teacher_is_named() -> None:
    assert parse_share("1%", "shadow_teacher") == 0.01
    with pytest.raises(ServingError, match="shadow_teacher has the share '0%'"):
        parse_share("0%", "shadow_teacher")


@pytest.mark.parametrize("words", [["models:/tiny@champion"], ["a=models:/tiny/3"], ["@file"]])
def test_a_shadow_of_a_served_model_is_accepted(words: list[str]) -> None:
    check_served([OPTION], words)


@pytest.mark.parametrize("words", [["models:/other@champion"], ["/a/tiny"], ["tiny=runs:/1/tiny"]])
def test_a_shadow_of_a_model_that_is_not_served_is_named(words: list[str]) -> None:
    with pytest.raises(ServingError, match="shadow is models:/tiny@challenger, but tiny is not"):
        check_served([OPTION], words)
    check_served([], words)


@pytest.mark.parametrize(
    ("tag", "wanted"),
    [
        (None, OPTION),
        ("", None),
        ("off", None),
        (" OFF ", None),
        ("next", ShadowOption("tiny", "models:/tiny@next", 1.0)),
        ("challenger:20%", ShadowOption("tiny", URI, 0.2)),
    ],
)
def test_the_tag_wins_over_the_option(tag: str | None, wanted: ShadowOption | None) -> None:
    tags = {} if tag is None else {SHADOW_TAG: tag}
    others = [ShadowOption("other", "models:/other@challenger", 1.0)]
    assert wanted_shadow("tiny", tags, [*others, OPTION]) == wanted


@pytest.mark.parametrize(
    "tag", ["challenger:0%", "challenger:101%", "challenger:some", "a b", "@x"]
)
def test_a_bad_tag_is_named(tag: str) -> None:
    with pytest.raises(ServingError, match=r"the tag pt_deploy\.shadow (is|has the share) '"):
        wanted_shadow("tiny", {SHADOW_TAG: tag}, [])


def test_a_plan_samples_as_much_as_its_targets_want() -> None:
    targets = (
        ShadowTarget(TEACHER, "b", 0.01, "1"),
        ShadowTarget(SHADOW, "a", 0.2, "4"),
        ShadowTarget(SHADOW, "a", 1.0, problem="absent"),
    )
    plan = ShadowPlan("tiny", "3", ("red", "green"), "text", {"num_threads": 2}, 0.98, targets)
    assert plan.share == 0.2
    assert [target.version for target in plan.active] == ["1", "4"]
    assert ShadowPlan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert ShadowPlan("tiny", "3", (), "text").share == 0


def test_labels_that_differ_are_named() -> None:
    assert label_problem(["red", "green"], ["green", "red"]) == ""
    assert label_problem(["red", "green"], ["green", "maroon"]) == (
        "its labels differ: it lacks red, it adds maroon. Shadow a version with the same labels."
    )
    many = [str(number) for number in range(9)]
    assert "it adds 0, 1, 2 and 6 more" in label_problem([], many)
