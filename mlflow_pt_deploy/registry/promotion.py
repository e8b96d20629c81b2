"""Promote logged models: register versions, describe them, and move the aliases.

Which variant to promote is decided in `selection`.
"""

from __future__ import annotations

import getpass
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from mlflow_pt_deploy.errors import ModelError, TrackingError
from mlflow_pt_deploy.registry.addresses import BASELINE_TAG, DIGEST_TAG, logged_metrics
from mlflow_pt_deploy.registry.aliases import (
    CHALLENGER,
    CHAMPION,
    PREVIOUS,
    alias_move,
    placement,
)
from mlflow_pt_deploy.registry.fetch import fetch_digest
from mlflow_pt_deploy.registry.history import Event
from mlflow_pt_deploy.registry.mlmodel import FLAVOR_NAME
from mlflow_pt_deploy.system.clock import now

_FORBIDDEN = "/:"
_ABOUT = (
    "Aliases: `champion` is served, `previous` was served before, `challenger` is compared next. "
    "Move `champion` to promote or to go back. `pt-deploy history` lists the promotions; they are "
    "kept in the tags `pt_deploy.event.*`."
)


@dataclass(frozen=True)
class Candidate:
    """A logged model that is registered.

    Attributes:
        uri: ``models:/m-...`` of a logged pt_deploy model.
        description: Markdown for people, shown by the UI.
        tags: Tags of the version, e.g. its latency.
        measured: Measurements for the history.
    """

    uri: str
    description: str
    tags: Mapping[str, str] = field(default_factory=dict)
    measured: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Promotion:
    """Result of a promotion or a rollback.

    Attributes:
        name: Name of the registered model.
        version: The `champion` version.
        previous: The former `champion` version, or None if there was none or it is the same.
        baseline: Version of the baseline, or None if none was registered.
        challenger: Version of the runner-up, or None.
    """

    name: str
    version: str
    previous: str | None
    baseline: str | None = None
    challenger: str | None = None

    @property
    def uri(self) -> str:
        """URI of the champion."""
        return f"models:/{self.name}@{CHAMPION}"


def promote(
    chosen: Candidate,
    name: str,
    why: str,
    *,
    baseline: Candidate | None = None,
    challenger: Candidate | None = None,
    instead_of: str | None = None,
) -> Promotion:
    """Register logged models and move the alias `champion` to the chosen one.

    The former champion gets the alias `previous`. A logged model that is already registered under
    this name keeps its version.

    Args:
        chosen: The new champion.
        name: Name of the registered model; created if it does not exist.
        why: Reason, for the history.
        baseline: Registered beside it, to go back to.
        challenger: Gets the alias `challenger`.
        instead_of: Version that the decision was made against: fails if `champion` has moved.

    Raises:
        TrackingError: The registry rejects the request, another promotion is under way, or a model
            lacks the `pt_deploy` flavor.
        ArtifactError: An MLmodel file asks for code, or is damaged.
    """
    check_name(name)
    client = MlflowClient()
    with _registry_errors(f"{name} was not promoted"):
        digests = {each.uri: _digest(each.uri) for each in (chosen, baseline, challenger) if each}
        create_model(client, name)
        with alias_move(client, name) as move:
            versions = {
                each.uri: _register(client, name, each, digests[each.uri])
                for each in (chosen, baseline, challenger)
                if each
            }
            version = versions[chosen.uri]
            if baseline is not None:
                _note_baseline(client, name, versions[baseline.uri], versions.values())
            current = placement(client.get_registered_model(name))[CHAMPION]
            if instead_of not in (None, current):
                raise TrackingError(
                    f"{CHAMPION} of {name} was moved to version {current} meanwhile; nothing was "
                    "changed. Run the command again to compare with it."
                )
            previous = current if current != version else None
            after: dict[str, str | None] = {CHAMPION: version}
            if previous is not None:
                after[PREVIOUS] = previous
            if challenger is not None:
                after[CHALLENGER] = versions[challenger.uri]
            event = Event("promote", current, version, why, user(), now(), dict(chosen.measured))
            move(after, event)
    return Promotion(
        name,
        version,
        previous,
        versions[baseline.uri] if baseline else None,
        versions[challenger.uri] if challenger else None,
    )


def nominate(candidate: Candidate, name: str) -> str:
    """Register a logged model and give it the alias `challenger`; return its version.

    Raises:
        As `promote`.
    """
    client = MlflowClient()
    with _registry_errors(f"{candidate.uri} was not registered as {name}"):
        digest = _digest(candidate.uri)
        with alias_move(client, name) as move:
            version = _register(client, name, candidate, digest)
            move({CHALLENGER: version}, None)
    return version


def promote_version(name: str, version: str, why: str) -> Promotion:
    """Move the alias `champion` to a version that is registered already.

    Raises:
        TrackingError: See `promote`.
    """
    client = MlflowClient()
    with _registry_errors(f"{name} was not promoted"), alias_move(client, name) as move:
        current = placement(client.get_registered_model(name))[CHAMPION]
        measured = logged_metrics(client.get_model_version(name, version).tags)
        event = Event("promote", current, version, why, user(), now(), measured)
        after: dict[str, str | None] = {CHAMPION: version}
        move({**after, PREVIOUS: current} if current not in (None, version) else after, event)
    return Promotion(name, version, current if current != version else None)


def rollback(name: str, to: str = "") -> Promotion:
    """Move the alias `champion` back; the version that it leaves becomes `previous`.

    Args:
        name: Name of the registered model.
        to: Version to go to; empty: that of the alias `previous`.

    Raises:
        TrackingError: There is nothing to go back to, the version does not exist, or the registry
            rejects the change.
    """
    check_name(name)
    client = MlflowClient()
    with _registry_errors(f"{name} was not rolled back"), alias_move(client, name) as move:
        before = placement(client.get_registered_model(name))
        target = to or before[PREVIOUS]
        if target is None:
            raise TrackingError(
                f"{name} has no version with the alias {PREVIOUS}, so there is nothing to go back "
                "to. Name one with --to; pt-deploy history lists the promotions."
            )
        if target == before[CHAMPION]:
            raise TrackingError(f"version {target} of {name} is the champion already.")
        version = client.get_model_version(name, target)
        measured = logged_metrics(version.tags)
        why = f"rollback from version {before[CHAMPION]}"
        event = Event("rollback", before[CHAMPION], target, why, user(), now(), measured)
        move({CHAMPION: target, PREVIOUS: before[CHAMPION]}, event)
    return Promotion(name, target, before[CHAMPION])


def champion(name: str) -> str | None:
    """Return the version with the alias `champion`, or None."""
    try:
        return str(MlflowClient().get_model_version_by_alias(name, CHAMPION).version)
    except MlflowException:
        return None


def check_name(name: str) -> None:
    """Check the name of a registered model.

    Raises:
        TrackingError: It is empty, or has a character that MLflow does not allow.
    """
    if not name.strip() or any(character in name for character in _FORBIDDEN):
        raise TrackingError(
            f"{name!r} cannot be the name of a registered model; give a name without / and :."
        )


def user() -> str:
    """The user as MLflow knows it: of the tracking server, or else of this machine."""
    try:
        return os.environ.get("MLFLOW_TRACKING_USERNAME") or getpass.getuser()
    except (OSError, KeyError):  # a container's user without a name
        return "unknown"


@contextmanager
def _registry_errors(what: str) -> Iterator[None]:
    try:
        yield
    except MlflowException as error:
        raise TrackingError(
            f"{what}: {error.message} Check the model in the registry and run the command again."
        ) from error


def create_model(client: MlflowClient, name: str) -> None:
    """Create a registered model if it does not exist.

    Raises:
        MlflowException: The registry rejects it.
    """
    try:
        client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        try:
            client.create_registered_model(name, description=_ABOUT)
        except MlflowException as raced:
            if raced.error_code != "RESOURCE_ALREADY_EXISTS":
                raise


def _register(client: MlflowClient, name: str, candidate: Candidate, digest: str) -> str:
    """Register a logged model and describe it; return its version."""
    version = _registered_version(client, candidate.uri, name)
    if version is None:
        version = str(mlflow.register_model(candidate.uri, name).version)
    client.update_model_version(name, version, candidate.description)
    for key, value in {DIGEST_TAG: digest, **candidate.tags}.items():
        client.set_model_version_tag(name, version, key, value)
    return version


def _note_baseline(client: MlflowClient, name: str, baseline: str, versions: Iterable[str]) -> None:
    """Tag the other versions of a promotion with the baseline's."""
    for version in versions:
        if version != baseline:
            client.set_model_version_tag(name, version, BASELINE_TAG, baseline)


def _digest(model_uri: str) -> str:
    """Compute the digest from the files in the artifact store."""
    with tempfile.TemporaryDirectory(prefix="pt-deploy-promote-") as folder:
        try:
            return fetch_digest(model_uri, Path(folder))
        except ModelError as error:
            raise TrackingError(
                f"{model_uri} has no {FLAVOR_NAME} flavor. Promote a model logged by pt-deploy "
                "optimize."
            ) from error


def _registered_version(client: MlflowClient, model_uri: str, name: str) -> str | None:
    quote = '"' if "'" in name else "'"
    versions = client.search_model_versions(f"name = {quote}{name}{quote}")
    return next((str(v.version) for v in versions if v.source == model_uri), None)
