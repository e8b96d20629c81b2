"""Write the HTML report of a run, or of the champion of a registered model."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import mlflow
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from mlflow_pt_deploy import tracking
from mlflow_pt_deploy.errors import ModelError, TrackingError
from mlflow_pt_deploy.evaluation.slices import Slice
from mlflow_pt_deploy.pipeline.optimize import PYFUNC_METRIC, OptimizationResult
from mlflow_pt_deploy.pipeline.promotion_stage import read_optimized
from mlflow_pt_deploy.registry.addresses import RUN_TAG
from mlflow_pt_deploy.registry.aliases import CHAMPION
from mlflow_pt_deploy.registry.history import read_history
from mlflow_pt_deploy.registry.served_figures import COLUMNS, promised_and_served
from mlflow_pt_deploy.reporting.html import Page, render
from mlflow_pt_deploy.reporting.plots import plot

ARTIFACT = "report.html"

_RUN_ID = re.compile("[0-9a-f]{32}")


def write_report(subject: str, out: Path | None = None) -> Path:
    """Write one HTML page: the choice, the plot, all variants, history, how to serve.

    Args:
        subject: Id of a run with an optimize stage, or name of a registered model.
        out: File to write; None: ``report-SUBJECT.html``.

    Raises:
        TrackingError: There is no such run or model, or the file cannot be written.
        ModelError: The run has no finished optimize stage, or the champion no measurements.
    """
    name = "" if _RUN_ID.fullmatch(subject) else subject
    done = read_optimized(_run_of_champion(name) if name else subject)
    text = report_html(done, name)
    out = out or Path(f"report-{re.sub(r'[^A-Za-z0-9_.-]+', '-', subject)}.html")
    temporary = out.with_name(f".{out.name}.new")
    try:
        temporary.write_text(text, encoding="utf8")
        temporary.replace(out)
    except OSError as error:
        raise TrackingError(f"{out} cannot be written: {error.strerror}") from error
    return out


def log_report(done: OptimizationResult, name: str, why_not: str = "") -> None:
    """Log the report as an artifact of its run; `why_not`: why the earlier champion stays."""
    MlflowClient().log_text(done.run_id, report_html(done, name, why_not), ARTIFACT)


def report_html(done: OptimizationResult, name: str = "", why_not: str = "") -> str:
    """Return the report of an optimize stage.

    Args:
        done: Its results and choice.
        name: Registered model whose champion the report is about; empty: none.
        why_not: Why the earlier champion stays; empty: the report does not say.
    """
    run_id = done.run_id
    choice, tags = done.choice, _champion_tags(name)
    promoted = tags.get(tracking.VARIANT_TAG)
    if tags.get(RUN_TAG) == run_id and promoted and promoted != choice.variant:
        why = f"{promoted} was promoted by another policy or by hand. By the policy of the run: "
        choice = replace(choice, variant=promoted, reason=why + choice.reason)
    with tempfile.TemporaryDirectory(prefix="pt-deploy-report-") as folder:
        image = Path(folder, "plot.png")
        plot(done.results, image, choice, retain=done.policy.retain)
        page = Page(
            title=f"{choice.variant or 'Nothing'} was chosen" + _role(name, run_id, tags),
            results=done.results,
            choice=choice,
            policy=done.policy,
            commands=_commands(name or "NAME"),
            facts=_facts(run_id, done.conditions),
            image=image.read_bytes(),
            comparison=why_not,
            slices=_slices(run_id),
            name=name,
            history=_events(name),
            served=_served(name),
        )
    return render(page)


def _role(name: str, run_id: str, tags: Mapping[str, str]) -> str:
    """What became of the chosen variant in the registry, as the end of a title."""
    if not tags:
        return ""
    if tags.get(RUN_TAG) == run_id:
        return f" as the champion of {name}"
    return f"; {name} keeps its earlier champion"


def _run_of_champion(name: str) -> str:
    run_id = _champion_tags(name, required=True).get(RUN_TAG)
    if not run_id:
        raise ModelError(
            f"the champion of {name} was not promoted by pt-deploy, so there is nothing to report."
        )
    return run_id


def _champion_tags(name: str, *, required: bool = False) -> dict[str, str]:
    if not name:
        return {}
    try:
        return dict(MlflowClient().get_model_version_by_alias(name, CHAMPION).tags)
    except MlflowException as error:
        if not required:
            return {}
        raise TrackingError(
            f"{name} has no version with the alias {CHAMPION}: {error.message} Give a run's id or "
            "a registered model."
        ) from error


def _events(name: str) -> list[dict[str, Any]]:
    with suppress(TrackingError):  # not registered yet
        if name:
            return [asdict(event) for event in reversed(read_history(name).events)]
    return []


def _served(name: str) -> list[list[str]]:
    with suppress(TrackingError):  # not registered yet
        if name and (rows := promised_and_served(read_history(name).versions)):
            return [list(COLUMNS), *rows]
    return []


def _slices(run_id: str) -> list[Slice]:
    try:
        table = mlflow.artifacts.load_dict(f"runs:/{run_id}/{tracking.SLICES}")
    except Exception:  # differs by artifact store; older runs have none
        return []
    return [Slice(*row) for row in table["data"]]


def _commands(name: str) -> list[str]:
    return [
        f"pt-deploy serve models:/{name}@champion --port 5001",
        f"mlflow models serve -m models:/{name}@champion --env-manager local -p 5001",
        "",
        f"pt-deploy history {name}",
        f"pt-deploy rollback {name}",
    ]


def _facts(run_id: str, conditions: Mapping[str, str]) -> dict[str, str]:
    data = MlflowClient().get_run(run_id).data
    tags, latency_ms = data.tags, data.metrics.get(PYFUNC_METRIC)
    hardware = {
        key.removeprefix("hardware."): value
        for key, value in sorted(tags.items())
        if key.startswith("hardware.")
    }
    timed = {} if latency_ms is None else {"mlflow.pyfunc": f"{latency_ms:.3g} ms per row (p50)"}
    return {"run": run_id, **timed, **conditions, **hardware}
