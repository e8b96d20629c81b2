"""Behind the stage `optimize`: build, measure, log, choose, each for all variants.

Knows the order of these steps; each of them is another module's.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlflow

from mlflow_pt_deploy import interrupt, tracking
from mlflow_pt_deploy.cascades import plan_cascades
from mlflow_pt_deploy.data import Splits
from mlflow_pt_deploy.errors import PtDeployError, VariantError
from mlflow_pt_deploy.hardware import usable_cores
from mlflow_pt_deploy.home import work_folder
from mlflow_pt_deploy.measure import Bench, Result
from mlflow_pt_deploy.options import Options
from mlflow_pt_deploy.policy import Choice, choose, finalists, no_slower
from mlflow_pt_deploy.progress import progress
from mlflow_pt_deploy.report import markdown, plot
from mlflow_pt_deploy.variants.base import Variant
from mlflow_pt_deploy.variants.build import Built, build, golden_rows, suited
from mlflow_pt_deploy.variants.cascade import CASCADE, Cascade, write_cascade
from mlflow_pt_deploy.variants.table import VARIANTS, select, wants_cascades


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
    folders = work / "variants"
    built = _build(models, splits, select(options.variants), folders)
    reference = VARIANTS[0].name(next(iter(models)))
    with _bench(built, reference, splits, options) as bench:
        results = _measure(bench, built)
        if wants_cascades(options.variants):
            results += _measure(bench, _cascade(results, splits, options.retain, folders))
        results = _with_fewer_threads(bench, results, options)
    addresses = _log_results(results, splits)
    choice = choose(results, options.policy())
    _log_outcome(results, choice, splits, addresses, work, options.retain)
    shutil.rmtree(work, ignore_errors=True)
    return Optimized(run_id, tuple(results), addresses, choice)


def _log_results(results: Sequence[Result], splits: Splits) -> dict[str, str]:
    """The models' addresses, by the variants' names."""
    addresses = {}
    with progress("logging", len(results), "variants") as shown:
        for step, result in enumerate(results):
            interrupt.check()
            address = tracking.log_result(result, splits, step)
            if address is not None:
                addresses[result.variant] = address
            shown.update(note=result.variant)
    return addresses


def _build(
    models: Mapping[str, Path], splits: Splits, variants: Sequence[Variant], target: Path
) -> list[Built]:
    with progress("building", len(suited(models, variants)), "variants") as shown:

        def note(one: Built) -> None:
            shown.update(note=one.name)

        return build(models, splits, target, variants=variants, progress=note)


def _cascade(results: Sequence[Result], splits: Splits, retain: float, target: Path) -> list[Built]:
    """Cascades of what was measured, where one would be faster than every variant alone."""
    made = []
    for plan in plan_cascades(results, retain):
        cascade = Cascade(threshold=plan.threshold, fast=plan.fast, strong=plan.strong)
        name, folder, reason = cascade.name(CASCADE), target / cascade.name(CASCADE), ""
        try:
            write_cascade(
                folder,
                target / plan.fast,
                target / plan.strong,
                threshold=plan.threshold,
                golden_rows=golden_rows(splits),
            )
        except (PtDeployError, OSError) as error:
            reason = str(error)
        found = None if reason else folder
        made.append(Built(name, CASCADE, cascade.runtime, cascade.precision, found, reason))
    return made


def _bench(built: Sequence[Built], reference: str, splits: Splits, options: Options) -> Bench:
    """What all variants are measured against.

    Raises:
        VariantError: The baseline could not be built, or fails.
    """
    one = next((one for one in built if one.name == reference), None)
    if one is None or one.folder is None:
        reason = one.reason if one else "it is not among the variants"
        raise VariantError(f"the baseline {reference} is needed for every comparison: {reason}")
    return Bench(one.folder, splits, seconds=options.seconds, threads=options.threads)


def _measure(bench: Bench, built: Sequence[Built]) -> list[Result]:
    """A result for each, those that could not be built included."""
    folders = {one.name: one.folder for one in built if one.folder is not None}
    with _measuring("measuring", len(folders)) as note:
        measured = {each.variant: each for each in bench.measure(folders, progress=note)}
    return [measured.get(one.name) or bench.failed(one.name, one.reason) for one in built]


def _with_fewer_threads(bench: Bench, results: Sequence[Result], options: Options) -> list[Result]:
    """The same, but the finalists with as few threads as they need; a small model needs one."""
    kept = {each.variant: each for each in results}
    names = finalists(results, options.policy())
    fewer = [] if options.threads or not names else _fewer(usable_cores())
    folders = {name: folder for name in names if (folder := kept[name].folder) is not None}
    with _measuring("fewer threads", len(folders) * len(fewer)) as note:
        for threads in fewer:
            for result in bench.measure(folders, threads=threads, progress=note):
                if not result.reason and no_slower(result, kept[result.variant]):
                    kept[result.variant] = result
    return list(kept.values())


@contextmanager
def _measuring(what: str, total: int) -> Iterator[Callable[[Result], None]]:
    with progress(what, total, "variants") as shown:
        yield lambda result: shown.update(note=result.variant)


def _fewer(cores: int) -> list[int]:
    """Half of the cores, a quarter, and so on to one."""
    return [cores >> step for step in range(1, cores.bit_length())]


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
