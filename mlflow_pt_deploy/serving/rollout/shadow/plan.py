"""Which versions shadow a served model, and the plan of a server; pure.

A shadow scores the rows of answered requests too. Its answers are compared and discarded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

SHADOW_TAG = "pt_deploy.shadow"
"""Tag of a registered model: ``challenger:20%``; empty or ``off``: no shadow."""

SHADOW, TEACHER = "shadow", "teacher"
"""Roles: the version that was asked for, and the baseline of the served version's promotion."""

_NAMED_LABELS = 3


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
