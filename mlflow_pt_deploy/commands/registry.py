"""Commands on registered models: call a function, print its result."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from mlflow_pt_deploy.commands.options import read_options
from mlflow_pt_deploy.errors import TrackingError

if TYPE_CHECKING:
    from mlflow_pt_deploy.pipeline.optimize import OptimizationResult
    from mlflow_pt_deploy.registry.promotion import Promotion

VERIFY_STATUS = {"pass": 0, "degraded": 4, "wrong": 5}
"""Exit status of ``pt-deploy verify``."""

DRIFT_STATUS = {"same": 0, "too few rows": 0, "moved": 4}
"""Exit status of ``pt-deploy drift``."""


def promote(parsed: argparse.Namespace) -> dict[str, Any]:
    """Promote the choice of a run; or copy a champion elsewhere; or repair a promotion."""
    if parsed.repair:
        return _repair(parsed.repair)
    if parsed.to or parsed.registry_uri:
        return _copy(parsed)
    if not parsed.run:
        raise TrackingError(
            "--run is missing: the id of a run with an optimize stage. Or copy a champion with "
            "--to, or finish an interrupted promotion with --repair."
        )
    from mlflow_pt_deploy.pipeline.promotion_stage import promote_choice, read_optimized

    options = read_options(parsed)
    done = read_optimized(parsed.run, options.selection_policy())
    if parsed.dry_run:
        return _dry_run(done)
    promotion = promote_choice(done, parsed.name, replace=options.replace == "yes")
    print(f"{promotion.uri} is version {promotion.version}: {done.choice.reason}")
    if promotion.previous:
        print(f"back to version {promotion.previous}: pt-deploy rollback {parsed.name}")
    return {"stage": "promote", "choice": done.choice.variant, **promotion_document(promotion)}


def _dry_run(done: OptimizationResult) -> dict[str, Any]:
    width = max(len(name) for name, _ in done.choice.considered)
    for name, why in done.choice.considered:
        print(f"{name:<{width}}  {why}")
    print(f"\n{done.choice.reason}\nNothing was changed (--dry-run).")
    return {
        "stage": "promote",
        "dry_run": True,
        "choice": done.choice.variant,
        "reason": done.choice.reason,
        "considered": dict(done.choice.considered),
        "policy": done.policy.to_json(),
        "exit_status": 0 if done.choice.variant else 3,
    }


def _repair(name: str) -> dict[str, Any]:
    from mlflow_pt_deploy.registry.aliases import repair

    done = repair(name)
    print("\n".join(done) or f"{name}: no promotion was interrupted.")
    return {"stage": "promote", "repaired": done}


def _copy(parsed: argparse.Namespace) -> dict[str, Any]:
    from mlflow_pt_deploy.pipeline.transfer import copy_champion

    promotion = copy_champion(
        parsed.name, parsed.to or parsed.name, parsed.registry_uri, verify=parsed.verify
    )
    where = f" in {parsed.registry_uri}" if parsed.registry_uri else ""
    copied = f"a verified copy of the champion of {parsed.name}"
    print(f"{promotion.uri}{where} is version {promotion.version}, {copied}")
    return {"stage": "promote", **promotion_document(promotion)}


def rollback(parsed: argparse.Namespace) -> dict[str, Any]:
    """Move the alias champion back."""
    from mlflow_pt_deploy.registry.promotion import rollback as roll_back

    promotion = roll_back(parsed.name, parsed.to)
    print(
        f"{promotion.uri} is version {promotion.version} again; version {promotion.previous} is "
        "the previous one"
    )
    return {"stage": "rollback", **promotion_document(promotion)}


def history(parsed: argparse.Namespace) -> dict[str, Any]:
    """Print the promotions of a registered model, newest first, and what was served."""
    from dataclasses import asdict

    from mlflow_pt_deploy.registry.history import read_history
    from mlflow_pt_deploy.registry.served_figures import served_tags

    found = read_history(parsed.name)
    print(found.table())
    if served := found.served_table():
        print(f"\n{served}")
    if found.moved_by_hand:
        print(f"\nchampion is version {found.champion or 'none'} now: it was moved by hand since.")
    return {
        "stage": "history",
        "champion": found.champion,
        "moved_by_hand": found.moved_by_hand,
        "events": [asdict(event) for event in found.events],
        "served": {str(each.version): served_tags(each.tags) for each in found.versions},
    }


def compare(parsed: argparse.Namespace) -> dict[str, Any]:
    """Compare two versions."""
    from mlflow_pt_deploy.pipeline.comparison import compare_models

    done = compare_models(parsed.first, parsed.second, parsed.data, seconds=parsed.seconds)
    print(done.table())
    return {
        "stage": "compare",
        "names": list(done.names),
        "metrics": {title: [first, second] for title, first, second in done.rows},
        "findings": list(done.findings),
    }


def verify(parsed: argparse.Namespace) -> dict[str, Any]:
    """Compare a model on this machine with what was logged."""
    from mlflow_pt_deploy.pipeline.verification import verify_model

    done = verify_model(parsed.uri, latency=parsed.latency)
    print(f"{done.status}: {done.uri}")
    print("\n".join(f"  {finding}" for finding in done.findings))
    return {
        "stage": "verify",
        "uri": done.uri,
        "status": done.status,
        "findings": list(done.findings),
        "slowdown": done.slowdown,
        "changed_labels": done.changed_labels,
        "exit_status": VERIFY_STATUS[done.status],
    }


def drift(parsed: argparse.Namespace) -> dict[str, Any]:
    """Compare served rows with those that decided the promotion."""
    from mlflow_pt_deploy.pipeline.drift_report import drift_in_registry, drift_of_server

    done = (
        drift_of_server(parsed.name, parsed.url) if parsed.url else drift_in_registry(parsed.name)
    )
    print(done.text())
    return {
        "stage": "drift",
        "version": done.version,
        "verdict": done.verdict,
        "windows": {
            window: [shift._asdict() for shift in shifts] for window, shifts in done.windows.items()
        },
        "exit_status": DRIFT_STATUS[done.verdict],
    }


def report(parsed: argparse.Namespace) -> dict[str, Any]:
    """Write the HTML report."""
    from pathlib import Path

    from mlflow_pt_deploy.pipeline.report_stage import write_report

    out = write_report(parsed.subject, Path(parsed.out) if parsed.out else None)
    print(f"report: {out}")
    return {"stage": "report", "file": str(out)}


def promotion_document(promotion: Promotion) -> dict[str, Any]:
    """The JSON form of a promotion."""
    return {
        "uri": promotion.uri,
        "version": promotion.version,
        "previous": promotion.previous,
        "baseline": promotion.baseline,
        "challenger": promotion.challenger,
    }
