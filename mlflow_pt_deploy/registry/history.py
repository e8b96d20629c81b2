"""History of a registered model: every promotion and rollback, as tags in the registry alone."""

from __future__ import annotations

import json
import secrets
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import chain

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from mlflow_pt_deploy.errors import TrackingError
from mlflow_pt_deploy.registry.addresses import LOGGED_METRICS
from mlflow_pt_deploy.registry.served_figures import (
    COLUMNS,
    promised_and_served,
    served_versions,
)

EVENT_PREFIX = "pt_deploy.event."
_MAX_EVENTS = 200
_MAX_WHY = 400  # characters; the version's description holds everything
_WIDTH = 130


@dataclass(frozen=True)
class Event:
    """One change of the alias `champion`.

    Attributes:
        action: ``promote`` or ``rollback``.
        before: Version before, or None.
        after: Version after.
        why: Reason.
        who: User.
        when: Time in UTC, ISO 8601.
        measured: Measurements of the new version, e.g. `accuracy`.
        key: Unique; sorts by time.
    """

    action: str
    before: str | None
    after: str
    why: str
    who: str
    when: str
    measured: Mapping[str, float] = field(default_factory=dict)
    key: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "why", self.why[:_MAX_WHY])
        if not self.key:
            stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S.%f")
            object.__setattr__(self, "key", f"{stamp}-{secrets.token_hex(3)}")


@dataclass(frozen=True)
class History:
    """Events of a registered model, oldest first.

    Attributes:
        events: The events.
        champion: Version of the alias `champion` now, or None.
        versions: Versions that were served, newest first.
    """

    events: tuple[Event, ...]
    champion: str | None
    versions: tuple[ModelVersion, ...] = ()

    @property
    def moved_by_hand(self) -> bool:
        """Whether `champion` is not where the last event left it."""
        last = self.events[-1].after if self.events else None
        return self.champion != last

    def table(self) -> str:
        """Format as aligned plain text, newest first, with the reasons below the lines."""
        if not self.events:
            return "No promotion by pt-deploy."
        newest = self.events[::-1]
        lines = _aligned(
            [("when", "who", "what", "version", "from", *LOGGED_METRICS), *map(_cells, newest)]
        )
        reasons = [textwrap.indent(textwrap.fill(event.why, _WIDTH), "    ") for event in newest]
        return "\n".join([lines[0], *chain.from_iterable(zip(lines[1:], reasons, strict=True))])

    def served_table(self) -> str:
        """Format what versions promised and served as aligned plain text; empty if none served."""
        rows = promised_and_served(self.versions)
        return "\n".join(_aligned([COLUMNS, *rows])) if rows else ""


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


def _cells(event: Event) -> tuple[str, ...]:
    metrics = (event.measured.get(name) for name in LOGGED_METRICS)
    numbers = ("-" if value is None else f"{value:.4g}" for value in metrics)
    return (event.when, event.who, event.action, event.after, event.before or "-", *numbers)


def append_event(client: MlflowClient, name: str, event: Event) -> None:
    """Append an event, and drop the oldest ones of a very long history.

    Raises:
        MlflowException: The registry rejects the change.
    """
    client.set_registered_model_tag(name, EVENT_PREFIX + event.key, json.dumps(asdict(event)))
    keys = [k for k in client.get_registered_model(name).tags if k.startswith(EVENT_PREFIX)]
    for key in sorted(keys)[:-_MAX_EVENTS]:
        client.delete_registered_model_tag(name, key)


def read_history(name: str) -> History:
    """Read the history of a registered model.

    Raises:
        TrackingError: There is no such model, or the registry does not answer.
    """
    client = MlflowClient()
    try:
        model = client.get_registered_model(name)
        versions = served_versions(client, name)
    except MlflowException as error:
        raise TrackingError(
            f"the history of {name} cannot be read: {error.message} Check the name and "
            "MLFLOW_TRACKING_URI."
        ) from error
    events = []
    for key, value in sorted(model.tags.items()):
        if key.startswith(EVENT_PREFIX):
            try:
                events.append(Event(**json.loads(value)))
            except (ValueError, TypeError):
                continue  # written by hand or by a later version
    champion = dict(model.aliases).get("champion")
    return History(tuple(events), None if champion is None else str(champion), versions)
