"""The stage `optimize`: build, measure and log all variants, then choose one."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

import mlflow

from mlflow_pt_deploy import tracking
from mlflow_pt_deploy.artifacts.builder import BuildResult, build, golden_rows, supported_pairs
from mlflow_pt_deploy.artifacts.cascade_writer import write_cascade
from mlflow_pt_deploy.artifacts.portable_writer import write_portable
from mlflow_pt_deploy.config import Options
from mlflow_pt_deploy.data import Splits
from mlflow_pt_deploy.errors import ModelError, PtDeployError, VariantError
from mlflow_pt_deploy.evaluation import Bench, Result
from mlflow_pt_deploy.evaluation.result import find_baseline, find_result
from mlflow_pt_deploy.pipeline.pyfunc_timer import PYFUNC_ROWS, pyfunc_latency_ms
from mlflow_pt_deploy.reporting.tables import markdown, plot
from mlflow_pt_deploy.runtimes.base import Variant
from mlflow_pt_deploy.runtimes.cascade import CASCADE, Cascade
from mlflow_pt_deploy.runtimes.catalog import (
    GPU_VARIANTS,
    VARIANTS,
    select,
    wants_cascades,
    wants_portable,
)
from mlflow_pt_deploy.runtimes.portable import Portable
from mlflow_pt_deploy.selection.cascade_planner import CascadePlan, cross_fitted, plan_cascades
from mlflow_pt_deploy.selection.choice import Choice, choose, finalists, not_slower_than
from mlflow_pt_deploy.selection.policy import Policy
from mlflow_pt_deploy.selection.portable_planner import plan_portable
from mlflow_pt_deploy.system import interrupt
from mlflow_pt_deploy.system.device import CUDA, kind_of
from mlflow_pt_deploy.system.hardware import usable_cores
from mlflow_pt_deploy.system.paths import work_folder
from mlflow_pt_deploy.system.progress import progress

PYFUNC_METRIC = "pyfunc_latency_p50_ms"
# With a smaller timing budget mlflow.pyfunc is not timed, because its imports take longer.
_MIN_SECONDS = 0.5


@dataclass(frozen=True)
class OptimizationResult:
    """Results of all variants, and the choice of the policy.

    Attributes:
        run_id: Parent run of the variants.
        results: One result per variant, failed ones included.
        models: Variant name to model URI, ``models:/m-...``.
        choice: Chosen variant and the reason.
        policy: Policy of the choice.
        conditions: Data and machine of the measurements, see `tracking.conditions`.
    """

    run_id: str
    results: tuple[Result, ...]
    models: Mapping[str, str]
    choice: Choice
    policy: Policy = field(default_factory=Policy)
    conditions: Mapping[str, str] = field(default_factory=dict)

    def result(self, variant: str | None) -> Result | None:
        """Return the result of a variant, or None."""
        return find_result(self.results, variant)


def optimize(
    run_id: str, models: Mapping[str, Path], splits: Splits, options: Options
) -> OptimizationResult:
    """Build every variant of the models, measure and log each, and choose one.

    Args:
        run_id: The active run; the variants become its children.
        models: Role (first part of a variant's name) to a Hugging Face folder; the first model is
            the baseline.
        splits: Data, with the class numbers of the models.
        options: Options of building, measuring and choosing, with the device of this machine.
    """
    work = work_folder(run_id)
    folders = work / "variants"
    baseline = VARIANTS[0].name(next(iter(models)))
    built = _with_baseline(_build(models, splits, _variants(options), folders), baseline)
    policy = options.selection_policy()
    with _bench(built, baseline, splits, options) as bench:
        results = _measure(bench, built)
        plans: dict[str, CascadePlan] = {}
        if wants_cascades(options.variants):
            plans = {_name(plan): plan for plan in plan_cascades(results, policy)}
            cascades = _cascades(plans, splits, folders)
            results = _judge(results + _measure(bench, cascades), plans, baseline)
        if wants_portable(options.variants):
            results += _measure(bench, _portable(plan_portable(results, policy), folders))
        results = _judge(_with_fewer_threads(bench, results, options, policy), plans, baseline)
        mlflow.set_tags(bench.gpu_state.tags())
    uris = _log_results(results, splits)
    choice = choose(results, policy)
    conditions = tracking.conditions(splits, options.device)
    timed = options.seconds >= _MIN_SECONDS
    notes = [*splits.notes, *(_pyfunc_note(choice, results, uris, splits) if timed else ())]
    done = OptimizationResult(run_id, tuple(results), uris, choice, policy, conditions)
    _log_outcome(done, splits, work, notes)
    shutil.rmtree(work, ignore_errors=True)
    return done


def _variants(options: Options) -> tuple[Variant, ...]:
    """The requested variants, and the baseline of each of their devices."""
    found = select(options.variants, options.device)
    if any(each.device == CUDA for each in found) and GPU_VARIANTS[0] not in found:
        return (*found, GPU_VARIANTS[0])
    return found


def _log_results(results: Sequence[Result], splits: Splits) -> dict[str, str]:
    """Log each result; returns the model URIs by variant name."""
    uris = {}
    baseline = find_baseline(results)
    with progress("logging", len(results), "variants") as shown:
        for step, result in enumerate(results):
            interrupt.check()
            uri = tracking.log_result(result, splits, step, baseline)
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


def _with_baseline(built: Sequence[BuildResult], baseline: str) -> list[BuildResult]:
    """Give the variants on a GPU a reason if the baseline there could not be built."""
    needed = next((one for one in built if one.name == f"{baseline}-{CUDA}"), None)
    if needed is None or needed.folder is not None:
        return list(built)
    reason = f"{needed.name} is needed for every comparison on a GPU: {needed.reason}"
    return [
        replace(one, folder=None, reason=reason)
        if one.folder is not None and one.name.endswith(f"-{CUDA}")
        else one
        for one in built
    ]


def _name(plan: CascadePlan) -> str:
    return Cascade(fast=plan.fast, strong=plan.strong).name(CASCADE)


def _judge(
    results: Sequence[Result], plans: Mapping[str, CascadePlan], baseline: str
) -> list[Result]:
    """Replace the accuracy of cascades, whose threshold was set on the validation rows."""
    reference = next(each for each in results if each.variant == baseline)
    return [
        cross_fitted(each, plans[each.variant], reference) if each.variant in plans else each
        for each in results
    ]


def _cascades(plans: Mapping[str, CascadePlan], splits: Splits, target: Path) -> list[BuildResult]:
    """Build the cascades that are expected to be faster than every single variant."""
    built = []
    for name, plan in plans.items():
        cascade = Cascade(threshold=plan.threshold, fast=plan.fast, strong=plan.strong)
        folder = target / name
        write = partial(
            write_cascade,
            folder,
            target / plan.fast,
            target / plan.strong,
            threshold=plan.threshold,
            golden_rows=golden_rows(splits),
        )
        built.append(_combined(cascade, CASCADE, folder, write))
    return built


def _portable(names: tuple[str, str] | None, target: Path) -> list[BuildResult]:
    """Build the portable variant of two others, if there are two."""
    if names is None:
        return []
    cpu, cuda = names
    model, variant = cpu.partition("-")[0], Portable(cpu=cpu, cuda=cuda)
    folder = target / variant.name(model)
    write = partial(write_portable, target / cpu, target / cuda, folder)
    return [_combined(variant, model, folder, write)]


def _combined(
    variant: Variant, model: str, folder: Path, write: Callable[[], object]
) -> BuildResult:
    """Build a variant of others; one that cannot be written gets a reason."""
    reason = ""
    try:
        write()
    except (PtDeployError, OSError) as error:
        reason = str(error)
    path = None if reason else folder
    return BuildResult(folder.name, model, variant.runtime, variant.precision, path, reason)


def _bench(built: Sequence[BuildResult], baseline: str, splits: Splits, options: Options) -> Bench:
    """Benchmark against the baseline.

    Raises:
        VariantError: The baseline could not be built, or fails to run.
    """
    folders = {one.name: one.folder for one in built}
    if (folder := folders.get(baseline)) is None:
        reasons = [one.reason for one in built if one.name == baseline]
        reason = reasons[0] if reasons else "it is not one of the variants"
        raise VariantError(f"the baseline {baseline} is needed for every comparison: {reason}")
    on_gpu = folders.get(f"{baseline}-{CUDA}")
    return Bench(
        folder,
        splits,
        seconds=options.seconds,
        threads=options.threads,
        device_baselines={CUDA: on_gpu} if on_gpu is not None else {},
        gpu=options.device if kind_of(options.device) == CUDA else CUDA,
    )


def _measure(bench: Bench, built: Sequence[BuildResult]) -> list[Result]:
    """Measure each variant; those that could not be built get a failed result."""
    folders = {one.name: one.folder for one in built if one.folder is not None}
    with _progress_of("measuring", len(folders)) as on_result:
        measured = {each.variant: each for each in bench.measure(folders, progress=on_result)}
    return [measured.get(one.name) or bench.failed(one.name, one.reason) for one in built]


def _with_fewer_threads(
    bench: Bench, results: Sequence[Result], options: Options, policy: Policy
) -> list[Result]:
    """Replace the finalists' results by those with the fewest threads that are not slower."""
    kept = {each.variant: each for each in results}
    names = finalists(results, policy)
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


def _pyfunc_note(
    choice: Choice, results: Sequence[Result], models: Mapping[str, str], splits: Splits
) -> list[str]:
    """Time the chosen variant through `mlflow.pyfunc`, log it, and say it beside its own time."""
    chosen = find_result(results, choice.variant)
    if chosen is None or chosen.variant not in models:
        return []
    try:
        latency_ms = pyfunc_latency_ms(models[chosen.variant], splits.validation.rows)
    except ModelError as error:
        return [str(error)]
    mlflow.log_metric(PYFUNC_METRIC, latency_ms)
    return [
        f"{chosen.variant} takes {chosen.value('latency_p50_ms'):.3g} ms per row by itself, and "
        f"{latency_ms:.3g} ms through mlflow.pyfunc's predict (median of {PYFUNC_ROWS} rows)"
    ]


def _log_outcome(
    done: OptimizationResult, splits: Splits, work: Path, notes: Sequence[str]
) -> None:
    figure = work / "accuracy_latency.png"
    plot(done.results, figure, done.choice, retain=done.policy.retain)
    report = markdown(done.results, done.choice, notes=notes, policy=done.policy)
    tracking.log_results(done.results, done.conditions, {"report.md": report}, figure)
    chosen, baseline = done.result(done.choice.variant), find_baseline(done.results)
    if chosen is not None and baseline is not None:
        tracking.log_differences(chosen, baseline, splits)
    mlflow.log_dict(dict(done.models), "models.json")
    tracking.set_run_description(report)
