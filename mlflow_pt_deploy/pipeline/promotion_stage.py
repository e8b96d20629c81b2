"""The stage `promote`: choose from a run's results, compare with the champion, and promote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import mlflow
from mlflow import MlflowClient

from mlflow_pt_deploy import tracking
from mlflow_pt_deploy.errors import NotPromotedError, PolicyError
from mlflow_pt_deploy.evaluation import Result
from mlflow_pt_deploy.evaluation.profile import Profile
from mlflow_pt_deploy.pipeline.optimize import OptimizationResult
from mlflow_pt_deploy.pipeline.stored_results import read_measured
from mlflow_pt_deploy.registry.addresses import AGREEMENT_TAG, LOGGED_METRICS, RUN_TAG
from mlflow_pt_deploy.registry.profile_tags import PROFILE_TAG
from mlflow_pt_deploy.registry.promotion import (
    Candidate,
    Promotion,
    champion,
    check_name,
    nominate,
    promote,
    user,
)
from mlflow_pt_deploy.reporting.remarks import promise_on_test
from mlflow_pt_deploy.selection.challenge import Measured, challenge
from mlflow_pt_deploy.selection.choice import choose
from mlflow_pt_deploy.selection.policy import Policy
from mlflow_pt_deploy.system import interrupt
from mlflow_pt_deploy.system.clock import now
from mlflow_pt_deploy.system.device import CPU
from mlflow_pt_deploy.system.hardware import library_versions


@dataclass(frozen=True)
class _Champion:
    """The current champion: its version, the logged model behind it, its tags."""

    version: str
    source: str
    tags: Mapping[str, str]

    def measured(self, name: str) -> Measured:
        """Its stored measurements.

        Raises:
            ModelError: It has none.
        """
        subject = f"version {self.version} of {name}, the champion"
        return read_measured(subject, self.tags, "Replace it without a comparison: --replace")


def promote_choice(optimized: OptimizationResult, name: str, *, replace: bool = False) -> Promotion:
    """Move the alias `champion` of a registered model to the chosen variant.

    An existing champion is replaced only if the chosen variant is better, see `challenge`;
    otherwise the chosen variant becomes the `challenger`.

    Args:
        optimized: Results with a choice.
        name: Name of the registered model.
        replace: Replace the champion without a comparison.

    Raises:
        NotPromotedError: Nothing was chosen, or the champion stays; the message says why.
        PolicyError: The champion was measured under other conditions.
        TrackingError: The registry rejected the change.
    """
    check_name(name)
    chosen = optimized.result(optimized.choice.variant)
    if chosen is None:
        raise NotPromotedError(f"nothing is promoted. {optimized.choice.reason}")
    current, facts = _current_champion(name), _facts(optimized)
    comparison = ""
    if current is not None and current.source != optimized.models[chosen.variant] and not replace:
        verdict = challenge(_measured(optimized, chosen), current.measured(name), optimized.policy)
        comparison = f"Compared with version {current.version}, the champion: {verdict.reason}."
        if not verdict.replaces:
            candidate = _candidate(optimized, chosen, "challenger", facts, comparison)
            with interrupt.shielded():
                version = nominate(candidate, name)
            raise NotPromotedError(
                f"version {current.version} of {name} stays the champion. {chosen.variant} is "
                f"version {version}, the challenger: {verdict.reason}. To promote it all the "
                "same: --replace",
                champion_stays=True,
            )
    baseline, runner_up = optimized.result(chosen.baseline), optimized.choice.runner_up
    others = {
        role: _candidate(optimized, result, role, facts)
        for role, result in (("baseline", baseline), ("challenger", optimized.result(runner_up)))
        if result is not None and result is not chosen
    }
    interrupt.check()
    with interrupt.shielded():  # the aliases and the tags of the versions change together
        return promote(
            _candidate(optimized, chosen, "champion", facts, comparison),
            name,
            f"{optimized.choice.reason} {comparison}".strip(),
            instead_of=current.version if current else None,
            baseline=others.get("baseline"),
            challenger=others.get("challenger"),
        )


def check_champion(name: str, conditions: Mapping[str, str]) -> None:
    """Check, before anything is trained, that a champion can be compared with what will be chosen.

    Args:
        name: Name of the registered model; it may not exist.
        conditions: See `tracking.conditions`.

    Raises:
        PolicyError: The champion was measured on other data or other hardware.
    """
    current = _current_champion(name)
    if current is None:
        return
    keys = ["data", "hardware"]
    if "gpu" in conditions and current.tags.get("pt_deploy.gpu"):  # both may be on a GPU
        keys.append("gpu")
    for key in keys:
        before = current.tags.get(f"pt_deploy.{key}")
        if before != conditions[key]:
            raise PolicyError(
                f"{name} has a champion that was measured on other {key} ({before or 'unknown'} "
                f"instead of {conditions[key]}), so it could not be compared with a new one. Give "
                "another --name, or --replace. Nothing was trained."
            )


def read_optimized(run_id: str, policy: Policy | None = None) -> OptimizationResult:
    """Read the results of an earlier run, and choose again with a policy (default: its own).

    Raises:
        TrackingError: The run is not on this tracking server.
        ModelError: The run has no finished optimize stage.
    """
    saved = tracking.saved_options(run_id)
    results, conditions = tracking.read_results(run_id)
    try:
        models = mlflow.artifacts.load_dict(f"runs:/{run_id}/models.json")
    except Exception as error:  # differs by artifact store
        raise tracking.no_results(run_id) from error
    policy = policy or saved.selection_policy()
    return OptimizationResult(run_id, results, models, choose(results, policy), policy, conditions)


def _current_champion(name: str) -> _Champion | None:
    version = champion(name)
    if version is None:
        return None
    found = MlflowClient().get_model_version(name, version)
    return _Champion(version, str(found.source), dict(found.tags))


def _measured(optimized: OptimizationResult, result: Result) -> Measured:
    return Measured(result, optimized.run_id, optimized.conditions)


def _facts(optimized: OptimizationResult) -> dict[str, str]:
    """What all versions of a promotion have in common; unknown facts are empty."""
    conditions, policy = optimized.conditions, optimized.policy
    commit = MlflowClient().get_run(optimized.run_id).data.tags.get("mlflow.source.git.commit", "")
    versions = library_versions()
    libraries = ", ".join(f"{name} {version}" for name, version in sorted(versions.items()))
    return {
        "policy": f"{policy.objective}, digest {policy.digest}",
        "data": conditions.get("data", ""),
        "dataset": conditions.get("validation", ""),
        "hardware": conditions.get("hardware", ""),
        "libraries": libraries,
        "git_commit": commit,
        "promoted_by": user(),
        "promoted_at": now(),
    }


def _candidate(
    optimized: OptimizationResult,
    result: Result,
    role: str,
    facts: Mapping[str, str],
    comparison: str = "",
) -> Candidate:
    """The version of a variant: description for people, tags for programs."""
    policy, facts = optimized.policy, {**facts, "role": role}
    if result.device != CPU:
        facts["gpu"] = optimized.conditions.get("gpu", "")
    metrics = {**result.metrics(""), **result.metrics("validation")}
    measured = {key: metrics[key] for key in LOGGED_METRICS if key in metrics}
    tags = {
        tracking.VARIANT_TAG: result.variant,
        RUN_TAG: optimized.run_id,
        **{key: f"{value:.6g}" for key, value in measured.items()},
        **{f"pt_deploy.{key}": fact for key, fact in facts.items() if fact},
        "pt_deploy.policy": policy.digest,
    }
    if result.profile is not None:
        tags[PROFILE_TAG] = Profile.of(result.profile).to_tag()
    if "agreement" in metrics and role != "baseline":
        tags[AGREEMENT_TAG] = f"{metrics['agreement']:.6g}"
    about = {
        "champion": optimized.choice.reason,
        "challenger": f"{result.variant}, the runner-up of {optimized.choice.variant}.",
        "baseline": f"{result.variant}, the baseline of all comparisons.",
    }[role]
    _, promise = promise_on_test(result, policy)
    table = "\n".join(
        f"| {key.replace('_', ' ')} | {fact} |" for key, fact in facts.items() if fact
    )
    paragraphs = [about, promise, comparison, f"| | |\n|---|---|\n{table}"]
    return Candidate(
        optimized.models[result.variant], "\n\n".join(filter(None, paragraphs)), tags, measured
    )
