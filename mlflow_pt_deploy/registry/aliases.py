"""Move the aliases of a registered model together, safely against crashes and other promotions.

MLflow has no transaction over aliases. So the plan of a move is written to the registered model as
a tag, the aliases are moved, an event is appended to the history, and the plan is deleted. If the
process dies in between, `repair` finishes the move if `champion` had been moved, or else undoes
it. Every plan has its own key: a process that sees another plan beside its own withdraws.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

from mlflow import MlflowClient
from mlflow.entities.model_registry import RegisteredModel
from mlflow.exceptions import MlflowException

from mlflow_pt_deploy.errors import TrackingError
from mlflow_pt_deploy.registry.history import EVENT_PREFIX, Event, append_event

CHAMPION, PREVIOUS, CHALLENGER = "champion", "previous", "challenger"
ALIASES = (PREVIOUS, CHAMPION, CHALLENGER)
"""The aliases in the order in which they are moved."""

PENDING_PREFIX = "pt_deploy.pending."
STALE_S = 120.0
"""Seconds after which a plan without its process counts as abandoned."""

_ATTEMPTS = 4

Placement = dict[str, str | None]
"""Version of each alias; None: the alias is not set."""


@dataclass(frozen=True)
class Plan:
    """A move of aliases that is under way.

    Attributes:
        key: Key of its tag.
        begun_at: Seconds since 1970.
        before: Versions of the aliases before the move; empty while the move is prepared.
        after: Versions of the aliases after the move.
        event: Entry for the history.
    """

    key: str
    begun_at: float
    before: Placement
    after: Placement
    event: Event | None

    def to_tag(self) -> str:
        """Return the value of the tag."""
        return json.dumps(asdict(self))


@contextmanager
def alias_move(
    client: MlflowClient, name: str
) -> Iterator[Callable[[Placement, Event | None], None]]:
    """Reserve the aliases of a registered model, which must exist; moves happen inside the block.

    Yields:
        Moves the aliases to the given versions and appends an event to the history, if one is
        given. Aliases that are not given stay. It fails if an alias was changed since the block
        began.

    Raises:
        TrackingError: Another promotion is under way, one was interrupted, or an alias was moved
            meanwhile. Nothing has changed.
        MlflowException: The registry rejects a change.
    """
    key = _reserve(client, name)
    before: Placement = {}

    def move(after: Placement, event: Event | None) -> None:
        if placement(client.get_registered_model(name)) != before:
            raise TrackingError(
                f"an alias of {name} was moved meanwhile; nothing was changed. Look at the model "
                "in the registry and run the command again."
            )
        plan = Plan(key, time.time(), before, {**before, **after}, event)
        client.set_registered_model_tag(name, key, plan.to_tag())
        _apply(client, name, plan.after)
        if event is not None:
            append_event(client, name, event)

    try:
        before |= placement(client.get_registered_model(name))
        yield move
    except BaseException:
        with suppress(TrackingError):  # the plan stays, for a later `repair`
            repair(name, only=key)
        raise
    client.delete_registered_model_tag(name, key)


def placement(model: RegisteredModel) -> dict[str, str | None]:
    """The versions of our aliases."""
    found = dict(model.aliases)
    return {alias: str(found[alias]) if alias in found else None for alias in ALIASES}


def repair(name: str, *, only: str = "") -> list[str]:
    """Finish or undo moves of aliases that were interrupted.

    Args:
        name: Name of the registered model.
        only: Key of one plan; empty: all plans.

    Returns:
        A sentence for each plan that was found.

    Raises:
        TrackingError: The registry rejects a change.
    """
    client = MlflowClient()
    try:
        plans = [plan for plan in _plans(client, name) if not only or plan.key == only]
        return [_settle(client, name, plan) for plan in plans]
    except MlflowException as error:
        raise TrackingError(
            f"{name} cannot be repaired: {error.message} When the registry works again, run "
            f"pt-deploy promote --repair {name}"
        ) from error


def _reserve(client: MlflowClient, name: str) -> str:
    """Write a plan without a move; return its key.

    Two processes that write at the same time both see each other's plan: both withdraw, and try
    again after different times.
    """
    for attempt in range(_ATTEMPTS):
        key = f"{PENDING_PREFIX}{secrets.token_hex(6)}"
        client.set_registered_model_tag(name, key, Plan(key, time.time(), {}, {}, None).to_tag())
        others = [plan for plan in _plans(client, name) if plan.key != key]
        if not others:
            return key
        client.delete_registered_model_tag(name, key)
        if any(time.time() - plan.begun_at > STALE_S for plan in others):
            break
        time.sleep((0.2 + secrets.randbelow(1000) / 1000) * (attempt + 1))
    raise TrackingError(
        f"another promotion of {name} is under way, or was interrupted. Nothing was changed. If "
        f"none is running: pt-deploy promote --repair {name}"
    )


def _plans(client: MlflowClient, name: str) -> list[Plan]:
    tags = client.get_registered_model(name).tags
    return [
        _parse(key, value) for key, value in sorted(tags.items()) if key.startswith(PENDING_PREFIX)
    ]


def _parse(key: str, value: str) -> Plan:
    try:
        document: dict[str, Any] = json.loads(value)
        event = document["event"] and Event(**document["event"])
        return Plan(key, document["begun_at"], document["before"], document["after"], event)
    except (ValueError, KeyError, TypeError):
        return Plan(key, 0.0, {}, {}, None)  # nothing was moved by a plan that cannot be read


def _settle(client: MlflowClient, name: str, plan: Plan) -> str:
    now = placement(client.get_registered_model(name))
    version = plan.after.get(CHAMPION)
    if not plan.after:
        done = f"{name}: a promotion that had not moved an alias was removed."
    elif now[CHAMPION] == version:
        _apply(client, name, plan.after)
        event = plan.event
        if event and EVENT_PREFIX + event.key not in client.get_registered_model(name).tags:
            append_event(client, name, event)
        done = f"{name}: the promotion of version {version} was finished."
    elif now[CHAMPION] == plan.before[CHAMPION]:
        _apply(client, name, plan.before)
        done = f"{name}: the promotion of version {version} was undone."
    else:
        done = (
            f"{name}: {CHAMPION} was moved to version {now[CHAMPION]} meanwhile; the aliases stay."
        )
    client.delete_registered_model_tag(name, plan.key)
    return done


def _apply(client: MlflowClient, name: str, wanted: Placement) -> None:
    now = placement(client.get_registered_model(name))
    for alias in ALIASES:
        version = wanted.get(alias)
        if version == now[alias]:
            continue
        if version is None:
            client.delete_registered_model_alias(name, alias)
        else:
            client.set_registered_model_alias(name, alias, version)
