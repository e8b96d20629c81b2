"""Which versions shadow a served model: the options, the tag, and the plan of a server; pure.

A shadow scores the rows of answered requests too. Its answers are compared and discarded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from mlflow_pt_deploy.errors import ServingError

SHADOW_TAG = "pt_deploy.shadow"
"""Tag of a registered model: ``challenger:20%``; empty or ``off``: no shadow."""

SHADOW, TEACHER = "shadow", "teacher"
"""Roles: the version that was asked for, and the baseline of the served version's promotion."""

_URI = re.compile(r"models:/+([^/@:=]+)(?:@[^/@:=]+|/\d+)")
_SHARE = re.compile(r"(\d{1,3}(?:\.\d+)?)%")
_TAG = re.compile(r"([^/@:=\s]+)(?::(.*))?")
_NAMED_LABELS = 3


class ShadowOption(NamedTuple):
    """A shadow that was asked for.

    Attributes:
        name: Registered model.
        uri: ``models:/NAME@ALIAS`` or ``models:/NAME/VERSION``.
        share: Share of the requests, above 0 and at most 1.
    """

    name: str
    uri: str
    share: float


def parse_share(text: str, subject: str) -> float:
    """Parse ``20%`` as a share of the requests.

    Args:
        text: The percentage.
        subject: What it belongs to, for the message.

    Raises:
        ServingError: It is not above 0 % and at most 100 %.
    """
    found = _SHARE.fullmatch(text.strip())
    share = float(found[1]) / 100 if found else 0.0
    if not 0 < share <= 1:
        raise ServingError(
            f"{subject} has the share {text!r}; give more than 0% and at most 100%, e.g. 20%"
        )
    return share


def parse_shadows(text: str) -> tuple[ShadowOption, ...]:
    """Parse the option ``shadow``: URIs, each with an optional share, separated by commas.

    Raises:
        ServingError: One is not understood, or a model has two.
    """
    found: dict[str, ShadowOption] = {}
    for word in filter(None, (each.strip() for each in text.split(","))):
        uri, equals, percent = word.partition("=")
        named = _URI.fullmatch(uri)
        if named is None:
            raise ServingError(
                f"shadow is {word!r}; give models:/NAME@ALIAS, or with a share of the requests "
                "models:/NAME@ALIAS=20%"
            )
        name = named[1]
        if name in found:
            raise ServingError(
                f"shadow names two shadows of {name}, {found[name].uri} and {uri}; give one"
            )
        share = parse_share(percent, f"shadow {uri}") if equals else 1.0
        found[name] = ShadowOption(name, uri, share)
    return tuple(found.values())


def check_served(shadows: Iterable[ShadowOption], words: Sequence[str]) -> None:
    """Check that the model of each shadow is served.

    Args:
        shadows: The shadows.
        words: Model arguments of the command line; what an ``@FILE`` names is not known yet.

    Raises:
        ServingError: A shadow belongs to no model.
    """
    uris = [re.sub(r"^[A-Za-z0-9][\w.-]*=", "", word) for word in words]
    if any(uri.startswith("@") for uri in uris):
        return
    names = {found[1] for uri in uris if (found := re.match("models:/+([^/@]+)", uri))}
    for shadow in shadows:
        if shadow.name not in names:
            raise ServingError(
                f"shadow is {shadow.uri}, but {shadow.name} is not served; serve it from the "
                f"registry, e.g. models:/{shadow.name}@champion"
            )


def wanted_shadow(
    name: str, tags: Mapping[str, str], options: Iterable[ShadowOption]
) -> ShadowOption | None:
    """The shadow of a registered model: that of its tag, or else that of the option.

    Args:
        name: The registered model.
        tags: Its tags.
        options: See `parse_shadows`.

    Raises:
        ServingError: The tag is not understood.
    """
    text = tags.get(SHADOW_TAG)
    if text is None:
        return next((option for option in options if option.name == name), None)
    text = text.strip()
    if text.lower() in ("", "off"):
        return None
    found = _TAG.fullmatch(text)
    if found is None:
        raise ServingError(
            f"the tag {SHADOW_TAG} is {text[:80]!r}; write challenger, challenger:20% or off"
        )
    share = 1.0 if found[2] is None else parse_share(found[2], f"the tag {SHADOW_TAG}")
    return ShadowOption(name, f"models:/{name}@{found[1]}", share)


@dataclass(frozen=True)
class ShadowTarget:
    """A version that is to score what another one answered.

    Attributes:
        role: `SHADOW` or `TEACHER`.
        uri: What was asked for.
        share: Share of the requests, 0 to 1.
        version: Its version, or None if it is not known.
        problem: Why it does not score; empty if it does.
    """

    role: str
    uri: str
    share: float
    version: str | None = None
    problem: str = ""


@dataclass(frozen=True)
class ShadowPlan:
    """The shadows of one served model.

    Attributes:
        registered_model: Name in the registry, or None.
        answered: Label of the version that answers.
        labels: Its classes.
        column: What it reads: ``text`` or ``image``.
        model_config: Its serving options.
        agreement: Its agreement with the baseline when it was promoted, or None.
        targets: The shadows.
    """

    registered_model: str | None
    answered: str
    labels: tuple[str, ...]
    column: str
    model_config: Mapping[str, Any] = field(default_factory=dict)
    agreement: float | None = None
    targets: tuple[ShadowTarget, ...] = ()

    @property
    def active(self) -> tuple[ShadowTarget, ...]:
        """The targets that score."""
        return tuple(target for target in self.targets if not target.problem)

    @property
    def share(self) -> float:
        """Share of the requests that at least one target scores."""
        return max((target.share for target in self.active), default=0.0)

    def to_json(self) -> dict[str, Any]:
        """A JSON document for `from_json`."""
        return asdict(self)

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> ShadowPlan:
        """The plan of a JSON document."""
        targets = tuple(ShadowTarget(**each) for each in document["targets"])
        return cls(**{**document, "labels": tuple(document["labels"]), "targets": targets})


def label_problem(answered: Sequence[str], shadow: Sequence[str]) -> str:
    """Why the labels of two versions cannot be compared; empty if they are the same.

    Args:
        answered: Labels of the version that answers.
        shadow: Those of its shadow; the order does not matter.
    """
    missing = [label for label in answered if label not in set(shadow)]
    added = [label for label in shadow if label not in set(answered)]
    if not missing and not added:
        return ""
    facts = [
        f"it {verb} {', '.join(labels[:_NAMED_LABELS])}"
        + (f" and {len(labels) - _NAMED_LABELS} more" if len(labels) > _NAMED_LABELS else "")
        for verb, labels in (("lacks", missing), ("adds", added))
        if labels
    ]
    return f"its labels differ: {', '.join(facts)}. Shadow a version with the same labels."
