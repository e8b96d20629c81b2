"""Behind the stage `optimize`: build, measure, log, choose, each for all variants.

Knows the order of these steps; each of them is another module's.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import mlflow
from tqdm.auto import tqdm

from mlflow_pt_deploy import tracking
from mlflow_pt_deploy.data import Splits
from mlflow_pt_deploy.hardware import usable_cores
from mlflow_pt_deploy.home import work_folder
from mlflow_pt_deploy.measure import Result, measure
from mlflow_pt_deploy.options import Options
from mlflow_pt_deploy.policy import Choice, choose
from mlflow_pt_deploy.report import markdown, plot
from mlflow_pt_deploy.variants.base import Variant
from mlflow_pt_deploy.variants.build import Built, build
from mlflow_pt_deploy.variants.table import select


@dataclass(frozen=True)
class Optimized:
    """All variants, and which of them the policy chose.

    Attributes:
        run_id: The run whose children the variants are.
        results: A row for each variant, failed ones included.
        models: Variant name to ``models:/m-...``.
        choice: The variant and the reason.
    """

    run_id: str
    results: tuple[Result, ...]
    models: Mapping[str, str]
    choice: Choice


def optimize(
    run_id: str, models: Mapping[str, Path], splits: Splits, options: Options
) -> Optimized:
    """Build every variant of the models, measure and log each, and choose.

    Args:
        run_id: The active run; the variants become its children.
        models: First part of the variants' names to a Hugging Face folder; all are compared with
            the first.
        splits: Numbered as the models number their classes.
        options: What concerns building, measuring and choosing.
    """
    work = work_folder(run_id)
    built = _build(models, splits, select(options.variants), work / "variants")
    results = _measure(built, splits, next(iter(models)), options)
    addresses = {}
    for step, result in enumerate(tqdm(results, desc="logging", unit="variant", leave=False)):
        address = tracking.log_result(result, splits, step)
        if address is not None:
            addresses[result.variant] = address
    choice = choose(results, options.policy())
    _log_outcome(results, choice, splits, addresses, work, options.retain)
    shutil.rmtree(work, ignore_errors=True)
    return Optimized(run_id, tuple(results), addresses, choice)


def _build(
    models: Mapping[str, Path], splits: Splits, variants: Sequence[Variant], target: Path
) -> list[Built]:
    with tqdm(total=len(models) * len(variants), desc="building", unit="variant") as bar:

        def progress(one: Built) -> None:
            bar.set_postfix_str(one.name)
            bar.update()

        return build(models, splits, target, variants=variants, progress=progress)


def _measure(built: list[Built], splits: Splits, baseline: str, options: Options) -> list[Result]:
    folders = {one.name: one.folder for one in built if one.folder is not None}
    reference = f"{baseline}-eager-fp32"
    with tqdm(total=len(folders), desc="measuring", unit="variant") as bar:

        def progress(result: Result) -> None:
            bar.set_postfix_str(result.variant)
            bar.update()

        measured = measure(
            folders,
            baseline=reference,
            splits=splits,
            seconds=options.seconds,
            threads=options.threads,
            progress=progress,
        )
    by_name = {result.variant: result for result in measured}
    threads = options.threads or usable_cores()
    return [
        by_name.get(one.name)
        or Result(
            one.name,
            one.model,
            one.runtime,
            one.precision,
            "cpu",
            threads,
            None,
            one.reason,
            baseline=reference,
        )
        for one in built
    ]


def _log_outcome(
    results: list[Result],
    choice: Choice,
    splits: Splits,
    models: Mapping[str, str],
    work: Path,
    retain: float,
) -> None:
    figure = work / "accuracy_latency.png"
    plot(results, figure, choice, retain=retain)
    report = markdown(results, choice, notes=splits.notes)
    tracking.log_results(results, {"report.md": report}, figure)
    mlflow.log_dict(dict(models), "models.json")
    tracking.describe(report)
