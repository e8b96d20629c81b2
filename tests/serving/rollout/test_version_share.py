"""Options and tags of canary and shadow: what is understood, and what is refused."""

from __future__ import annotations

import argparse

import pytest

from mlflow_pt_deploy.cli_args import build_parser
from mlflow_pt_deploy.errors import ServingError
from mlflow_pt_deploy.serving.rollout.version_share import (
    VersionShare,
    check_served,
    parse_option,
    parse_share,
    parse_tag,
)
from mlflow_pt_deploy.serving.settings import ServerSettings

TAG = "pt_deploy.canary"


def test_options_name_an_alias_or_a_version() -> None:
    assert parse_option("canary", "models:/a@challenger=5%, models:/b c,d/7=0.5 %") == {
        "a": VersionShare("models:/a@challenger", 0.05),
        "b c,d": VersionShare("models:/b c,d/7", 0.005),
    }
    assert parse_option("canary", "") == {}
    assert parse_option("shadow", "models:/a@x", 1.0) == {"a": VersionShare("models:/a@x", 1.0)}


def test_the_flag_is_given_once_for_each_model() -> None:
    words = [
        "serve",
        "models:/a@champion",
        "--canary",
        "models:/a@x=5%",
        "--canary",
        "models:/b/2=9%",
    ]
    parsed: argparse.Namespace = build_parser().parse_args(words)
    assert set(parse_option("canary", parsed.canary)) == {"a", "b"}
    assert not hasattr(build_parser().parse_args(words[:2]), "canary")


@pytest.mark.parametrize("role", ["canary", "shadow"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models:/a@x=0%", "has the share '0%'; give more than 0% and at most 100%"),
        ("models:/a@x=101%", "has the share '101%'"),
        ("models:/a@x=five", "has the share 'five'"),
        ("models:/a@x=5", "has the share '5'"),
        ("models:/a@x=-5%", "has the share '-5%'"),
        ("models:/a@x=nan%", "has the share 'nan%'"),
        ("models:/a@x=", "has the share ''"),
        ("models:/a=5%", "is 'models:/a=5%'; give a version and its share"),
        ("models:/a@x:5%", "is 'models:/a@x:5%'; give a version"),
        ("five", "is 'five'; give a version"),
        ("runs:/1/model=5%", "is 'runs:/1/model=5%'; give a version"),
        ("models:/a@x=5%,models:/a/3=5%", "names two versions of a, models:/a@x and models:/a/3"),
    ],
)
def test_a_wrong_option_is_refused(role: str, text: str, message: str) -> None:
    with pytest.raises(ServingError, match=f"{role} .*{message}"):
        ServerSettings(**{role: text})


def test_a_canary_needs_a_share() -> None:
    with pytest.raises(ServingError, match="canary is 'models:/a@x'; give a version and its share"):
        ServerSettings(canary="models:/a@x")
    with pytest.raises(ServingError, match="the tag pt_deploy.canary is 'challenger'; write an"):
        parse_tag(TAG, "a", "challenger")


def test_a_bad_share_of_the_teacher_is_named() -> None:
    assert parse_share("1%", "shadow_teacher") == 0.01
    with pytest.raises(ServingError, match="shadow_teacher has the share '0%'"):
        ServerSettings(shadow_teacher="0%")


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"canary_p99_ratio": 0.5}, "canary_p99_ratio is 0.5; give 1 or more, or 0"),
        ({"canary_disagreement": 10}, "canary_disagreement is 10; give a share below 1"),
        ({"canary_label_shift": float("nan")}, "canary_label_shift is nan; give more than 0"),
    ],
)
def test_a_wrong_limit_is_refused(limits: dict[str, float], message: str) -> None:
    with pytest.raises(ServingError, match=message):
        ServerSettings(**limits)  # type: ignore[arg-type]


def test_a_version_of_a_model_that_is_not_served_is_refused() -> None:
    plans = parse_option("canary", "models:/a@x=5%")
    check_served("canary", plans, {"a", "b"})
    with pytest.raises(ServingError, match="canary is models:/a@x, but this server serves b;"):
        check_served("canary", plans, {"b"})
    with pytest.raises(ServingError, match="serves none from the registry; .*models:/a@champion"):
        check_served("canary", plans, set())


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ("challenger:5%", VersionShare("models:/m@challenger", 0.05)),
        (" challenger:12.5 % ", VersionShare("models:/m@challenger", 0.125)),
        ("7:100%", VersionShare("models:/m/7", 1.0)),
        ("version:7:5%", VersionShare("models:/m/7", 0.05)),
        ("", None),
        ("Off", None),
    ],
)
def test_tags(value: str, wanted: VersionShare | None) -> None:
    assert parse_tag(TAG, "m", value) == wanted


def test_a_tag_without_a_share() -> None:
    assert parse_tag("pt_deploy.shadow", "m", "next", 1.0) == VersionShare("models:/m@next", 1.0)


@pytest.mark.parametrize(
    "value", ["challenger:0%", "challenger:some", "a:b:5%", "x/y:5%", "5%", ":5%", "a b", "@x"]
)
def test_a_wrong_tag_is_refused(value: str) -> None:
    with pytest.raises(ServingError, match=r"the tag pt_deploy\.canary (is|has the share) '"):
        parse_tag(TAG, "m", value)
