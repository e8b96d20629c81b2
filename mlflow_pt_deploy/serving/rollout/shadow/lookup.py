"""Looks shadows up in the registry."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mlflow_pt_deploy.errors import ServingError
from mlflow_pt_deploy.registry.addresses import (
    AGREEMENT_TAG,
    ResolvedVersion,
    find_baseline,
    resolve,
)
from mlflow_pt_deploy.serving.rollout.shadow.plan import (
    SHADOW,
    SHADOW_TAG,
    TEACHER,
    ShadowPlan,
    ShadowTarget,
)
from mlflow_pt_deploy.serving.rollout.version_share import VersionShare, parse_tag

if TYPE_CHECKING:
    from mlflow_pt_deploy.serving.model.loaded_model import LoadedModel

_ABSENT = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE", "NOT_FOUND")
"""What MLflow's stores answer where there is no such model, version or alias."""


@dataclass(frozen=True)
class ShadowWish:
    """What was asked for on the command line.

    Attributes:
        options: Shadows by registered model.
        teacher_share: Share of the requests for the baseline; 0: none.
    """

    options: Mapping[str, VersionShare] = field(default_factory=dict)
    teacher_share: float = 0.0


def without_targets(served: LoadedModel) -> ShadowPlan:
    """The plan of a model before its shadows were looked up."""
    agreement = None
    with suppress(KeyError, ValueError):
        agreement = float(served.tags[AGREEMENT_TAG])
    loaded = served.pyfunc.loaded
    return ShadowPlan(
        served.resolved.name,
        served.label,
        tuple(loaded.labels),
        loaded.preprocessor.column,
        dict(served.spec.model_config),
        agreement,
    )


def look_up_targets(
    plan: ShadowPlan, tags: Mapping[str, str], wish: ShadowWish
) -> tuple[ShadowTarget, ...]:
    """The shadows of a model now.

    Args:
        plan: Its plan.
        tags: Tags of the version that answers.
        wish: What was asked for.

    Raises:
        MlflowException: The registry is not reachable.
    """
    found = [*_shadow(plan, wish.options)]
    if wish.teacher_share:
        found.append(_teacher(plan, tags, wish.teacher_share))
    return tuple(found)


def _shadow(plan: ShadowPlan, options: Mapping[str, VersionShare]) -> Iterable[ShadowTarget]:
    name = plan.registered_model
    if name is None:
        return
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        tag = MlflowClient().get_registered_model(name).tags.get(SHADOW_TAG)
        wanted = options.get(name) if tag is None else parse_tag(SHADOW_TAG, name, tag, 1.0)
    except ServingError as error:
        yield ShadowTarget(SHADOW, SHADOW_TAG, 0.0, problem=str(error))
        return
    if wanted is None:
        return
    try:
        version = resolve(wanted.uri)
    except MlflowException as error:
        if error.error_code not in _ABSENT:
            raise
        problem = f"{wanted.uri} does not exist. Set the alias, or name another version."
        yield ShadowTarget(SHADOW, wanted.uri, wanted.share, problem=problem)
        return
    yield _target(SHADOW, wanted.uri, wanted.share, version, plan)


def _teacher(plan: ShadowPlan, tags: Mapping[str, str], share: float) -> ShadowTarget:
    name, uri = plan.registered_model, "the baseline of the promotion"
    if name is None:
        problem = "the served model is not in the registry, so it has no baseline. Promote it."
        return ShadowTarget(TEACHER, uri, share, problem=problem)
    version = find_baseline(name, tags)
    if version is None:
        problem = (
            f"no baseline was registered with version {plan.answered} of {name}, or it is the "
            "baseline itself. Promote a student by pt-deploy promote."
        )
        return ShadowTarget(TEACHER, uri, share, problem=problem)
    return _target(TEACHER, version.uri, share, version, plan)


def _target(
    role: str, uri: str, share: float, version: ResolvedVersion, plan: ShadowPlan
) -> ShadowTarget:
    same = version.version == plan.answered
    problem = f"version {plan.answered} answers itself. Shadow another version." if same else ""
    return ShadowTarget(role, uri, share, version.version, problem)
