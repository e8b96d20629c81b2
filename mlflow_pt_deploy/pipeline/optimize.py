"""The stage `optimize`: build, measure and log all variants, then choose one."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import mlflow

from mlflow_pt_deploy import tracking
from mlflow_pt_deploy.artifacts.builder import BuildResult, build, golden_rows, supported_pairs
from mlflow_pt_deploy.artifacts.cascade_writer import write_cascade
from mlflow_pt_deploy.config import Options
from mlflow_pt_deploy.data import Splits
from mlflow_pt_deploy.errors import PtDeployError, VariantError
from mlflow_pt_deploy.evaluation import Bench, Result
from mlflow_pt_deploy.reporting.tables import markdown, plot
from mlflow_pt_deploy.runtimes.base import Variant
from mlflow_pt_deploy.runtimes.cascade import CASCADE, Cascade
from mlflow_pt_deploy.runtimes.catalog import VARIANTS, select, wants_cascades
from mlflow_pt_deploy.selection.cascade_planner import plan_cascades
from mlflow_pt_deploy.selection.policy import Choice, choose, finalists, not_slower_than
from mlflow_pt_deploy.system import interrupt
from mlflow_pt_deploy.system.hardware import usable_cores
from mlflow_pt_deploy.system.paths import work_folder
from mlflow_pt_deploy.system.progress import progress


@dataclass(frozen=True)
class OptimizationResult:
    """Results of all variants, and the choice of the policy.

    Attributes:
        run_id: Parent run of the variants.
        results: One result per variant, failed ones included.
        models: Variant name to model URI, ``models:/m-...``.
        choice: Chosen variant and the reason.
    """

    run_id: str
    results: tuple[Result, ...]
    models: Mapping[str, str]
    choice: Choice


def optimize(
    run_id: str, models: Mapping[str, Path], splits: Splits, options: Options
) -> OptimizationResult:
    """Build every variant of the models, measure and log each, and choose one.

    Args:
        run_id: The active run; the variants become its children.
        models: Role (first part of a variant's name) to a Hugging Face folder; the first model is
            the baseline.
        splits: Data, with the class numbers of the models.
        options: Options of building, measuring and choosing.
    """
    work = work_folder(run_id)
    folders = work / "variants"
    built = _build(models, splits, select(options.variants), folders)
    baseline = VARIANTS[0].name(next(iter(models)))
    with _bench(built, baseline, splits, options) as bench:
        results = _measure(bench, built)
        if wants_cascades(options.variants):
            results += _measure(bench, _cascade(results, splits, options.retain, folders))
        results = _with_fewer_threads(bench, results, options)
    uris = _log_results(results, splits)
    choice = choose(results, options.policy())
    _log_outcome(results, choice, splits, uris, work, options.retain)
    shutil.rmtree(work, ignore_errors=True)
    return OptimizationResult(run_id, tuple(results), uris, choice)


def _log_results(results: Sequence[Result], splits: Splits) -> dict[str, str]:
    """Log each result; returns the model URIs by variant name."""
    uris = {}
    with progress("logging", len(results), "variants") as shown:
        for step, result in enumerate(results):
            interrupt.check()
            uri = tracking.log_result(result, splits, step)
            if uri is not None:
                uris[result.variant] = uri
            shown.update(note=result.variant)
    return uris


def _build(
    models: Mapping[str, Path], splits: Splits, variants: Sequence[Variant], target: Path
) -> list[BuildResult]:
    with progress("building", len(supported_pairs(models, variants)), "variants") as shown:

        def note(one: BuildResult) -> None:
            shown.update(note=one.name)

        return build(models, splits, target, variants=variants, progress=note)


def _cascade(
    results: Sequence[Result], splits: Splits, retain: float, target: Path
) -> list[BuildResult]:
    """Build the cascades that are expected to be faster than every single variant."""
    built = []
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
        path = None if reason else folder
        built.append(BuildResult(name, CASCADE, cascade.runtime, cascade.precision, path, reason))
    return built


def _bench(built: Sequence[BuildResult], baseline: str, splits: Splits, options: Options) -> Bench:
    """Benchmark against the baseline.

    Raises:
        VariantError: The baseline could not be built, or fails to run.
    """
    one = next((one for one in built if one.name == baseline), None)
    if one is None or one.folder is None:
        reason = one.reason if one else "it is not one of the variants"
        raise VariantError(f"the baseline {baseline} is needed for every comparison: {reason}")
    return Bench(one.folder, splits, seconds=options.seconds, threads=options.threads)


def _measure(bench: Bench, built: Sequence[BuildResult]) -> list[Result]:
    """Measure each variant; those that could not be built get a failed result."""
    folders = {one.name: one.folder for one in built if one.folder is not None}
    with _progress_of("measuring", len(folders)) as on_result:
        measured = {each.variant: each for each in bench.measure(folders, progress=on_result)}
    return [measured.get(one.name) or bench.failed(one.name, one.reason) for one in built]


def _with_fewer_threads(bench: Bench, results: Sequence[Result], options: Options) -> list[Result]:
    """Replace the finalists' results by those with the fewest threads that are not slower."""
    kept = {each.variant: each for each in results}
    names = finalists(results, options.policy())
    counts = [] if options.threads or not names else _smaller_thread_counts(usable_cores())
    folders = {name: folder for name in names if (folder := kept[name].folder) is not None}
    with _progress_of("fewer threads", len(folders) * len(counts)) as on_result:
        for threads in counts:
            for result in bench.measure(folders, threads=threads, progress=on_result):
                if not result.reason and not_slower_than(result, kept[result.variant]):
                    kept[result.variant] = result
    return list(kept.values())


@contextmanager
def _progress_of(what: str, total: int) -> Iterator[Callable[[Result], None]]:
    with progress(what, total, "variants") as shown:
        yield lambda result: shown.update(note=result.variant)


def _smaller_thread_counts(cores: int) -> list[int]:
    """Half of the cores, a quarter, and so on down to one."""
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
    tracking.set_run_description(report)
