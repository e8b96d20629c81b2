"""The option and the tag of a canary: what is understood, and what is refused."""

from __future__ import annotations

import argparse

import pytest

from mlflow_pt_deploy.cli_args import build_parser
from mlflow_pt_deploy.errors import ServingError
from mlflow_pt_deploy.serving.rollout.plan import (
    Plan,
    check_served,
    parse_option,
    parse_tag,
    wanted,
)
from mlflow_pt_deploy.serving.settings import ServerSettings


def test_options_name_an_alias_or_a_version() -> None:
    found = parse_option("models:/a@challenger=5%, models:/b c,d/7=0.5 %")
    assert found == {
        "a": Plan("models:/a@challenger", 0.05),
        "b c,d": Plan("models:/b c,d/7", 0.005),
    }
    assert parse_option("") == {}


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
    assert set(parse_option(parsed.canary)) == {"a", "b"}
    assert not hasattr(build_parser().parse_args(words[:2]), "canary")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models:/a@x=0%", r"the share of the canary 'models:/a@x=0%' is '0%'; give more than 0%"),
        ("models:/a@x=101%", "'101%'; give more than 0% and at most 100%"),
        ("models:/a@x=five", "'five'; give more than 0%"),
        ("models:/a@x=5", "'5'; give more than 0%"),
        ("models:/a@x=-5%", "'-5%'; give more than 0%"),
        ("models:/a@x=nan%", "'nan%'; give more than 0%"),
        ("models:/a@x", "'models:/a@x' is not a canary; give a version and its share"),
        ("five", "'five' is not a canary"),
        ("runs:/1/model=5%", "is not a canary"),
        ("models:/a@x=5%,models:/a@y=5%", "two canaries are given for the model a; give one"),
    ],
)
def test_a_wrong_option_is_refused(text: str, message: str) -> None:
    with pytest.raises(ServingError, match=message):
        ServerSettings(canary=text)


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


def test_a_canary_of_a_model_that_is_not_served_is_refused() -> None:
    plans = parse_option("models:/a@x=5%")
    check_served(plans, {"a", "b"})
    with pytest.raises(
        ServingError, match="the canary of a has no champion: this server serves b;"
    ):
        check_served(plans, {"b"})
    with pytest.raises(ServingError, match="serves none from the registry; .*models:/a@champion"):
        check_served(plans, set())


@pytest.mark.parametrize(
    ("value", "plan"),
    [
        ("challenger:5%", Plan("models:/m@challenger", 0.05)),
        (" challenger:12.5 % ", Plan("models:/m@challenger", 0.125)),
        ("7:100%", Plan("models:/m/7", 1.0)),
        ("version:7:5%", Plan("models:/m/7", 0.05)),
        ("", None),
        ("Off", None),
    ],
)
def test_the_tag_goes_before_the_option(value: str, plan: Plan | None) -> None:
    option = Plan("models:/m@other", 0.5)
    assert parse_tag("m", value) == wanted("m", value, option) == plan
    assert wanted("m", None, option) == option
    assert wanted("m", None, None) is None


@pytest.mark.parametrize("value", ["challenger", "challenger:0%", "a:b:5%", "x/y:5%", "5%", ":5%"])
def test_a_wrong_tag_is_refused(value: str) -> None:
    with pytest.raises(ServingError, match="the tag pt_deploy.canary"):
        parse_tag("m", value)
