"""What is to be the canary of a model: the option ``--canary`` and the registry's tag; pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from mlflow_pt_deploy.errors import ServingError

_OPTION = re.compile(r"models:/+([^/@]+)([@/])([^/@=]+)=([^=]*)")
_NEXT = re.compile(r",\s*(?=models:/)")
_SHARE = re.compile(r"(\d{1,3}(?:\.\d{1,6})?)\s*%")
_OFF = ("", "off")


@dataclass(frozen=True)
class Plan:
    """A canary that is wanted.

    Attributes:
        uri: ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``.
        share: Its share of the requests, above 0 and at most 1.
    """

    uri: str
    share: float


def parse_option(text: str) -> dict[str, Plan]:
    """Plans of the option ``--canary`` by registered model; several are separated by commas.

    Raises:
        ServingError: A part is not a canary, or two are of one model.
    """
    plans: dict[str, Plan] = {}
    for word in filter(None, _NEXT.split(text.strip())):
        found = _OPTION.fullmatch(word)
        if found is None:
            raise ServingError(
                f"{word!r} is not a canary; give a version and its share: "
                "models:/NAME@challenger=5%"
            )
        name, mark, target, share = found.groups()
        if name in plans:
            raise ServingError(f"two canaries are given for the model {name}; give one")
        plans[name] = Plan(f"models:/{name}{mark}{target}", _share(share, f"the canary {word!r}"))
    return plans


def parse_tag(name: str, value: str) -> Plan | None:
    """The plan of the tag ``pt_deploy.canary``, for example ``challenger:5%`` or ``7:5%``.

    Args:
        name: Name of the registered model.
        value: Value of the tag.

    Returns:
        None if the tag ends the canary: it is empty or ``off``.

    Raises:
        ServingError: The value is neither.
    """
    text = value.strip()
    if text.lower() in _OFF:
        return None
    target, colon, share = text.removeprefix("version:").rpartition(":")
    if not colon or not re.fullmatch(r"[\w.-]+", target):
        raise ServingError(
            f"the tag pt_deploy.canary is {value[:60]!r}; write an alias or a version and its "
            "share, for example challenger:5%, or off"
        )
    mark = "/" if target.isdecimal() else "@"
    fraction = _share(share, f"the tag pt_deploy.canary {value[:60]!r}")
    return Plan(f"models:/{name}{mark}{target}", fraction)


def wanted(name: str, tag: str | None, option: Plan | None) -> Plan | None:
    """The canary of a registered model: that of its tag, else that of the option.

    Args:
        name: Name of the registered model.
        tag: Its tag ``pt_deploy.canary``; None if it has none.
        option: The plan of the option.

    Raises:
        ServingError: See `parse_tag`.
    """
    return option if tag is None else parse_tag(name, tag)


def check_served(plans: Mapping[str, Plan], served: set[str]) -> None:
    """Check that the option names served models only.

    Raises:
        ServingError: A plan is of another registered model.
    """
    for name in sorted(plans.keys() - served):
        models = ", ".join(sorted(served)) or "none from the registry"
        raise ServingError(
            f"the canary of {name} has no champion: this server serves {models}; give a canary of "
            "a served model, or serve models:/" + f"{name}@champion"
        )


def _share(text: str, owner: str) -> float:
    """A share in percent as a fraction."""
    found = _SHARE.fullmatch(text.strip())
    share = float(found[1]) / 100 if found else 0.0
    if not 0 < share <= 1:
        raise ServingError(
            f"the share of {owner} is {text.strip()!r}; give more than 0% and at most 100%"
        )
    return share
