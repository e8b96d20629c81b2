"""The stage `search`: try students as trials, choose some, and train those again.

Trials are child runs. The stage logs the Pareto front, a report and all trials.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow

from mlflow_pt_deploy import tracking
from mlflow_pt_deploy.config import Options
from mlflow_pt_deploy.data import Splits, load_data
from mlflow_pt_deploy.data.splits import align
from mlflow_pt_deploy.errors import SearchError
from mlflow_pt_deploy.pipeline.device import on_this_machine
from mlflow_pt_deploy.pipeline.stages import distill_stage, distill_student, run_or_resume
from mlflow_pt_deploy.pipeline.training_run import TrainedModel
from mlflow_pt_deploy.reporting.plots import plot_front
from mlflow_pt_deploy.reporting.tables import trials_markdown
from mlflow_pt_deploy.search import (
    STATIC,
    TRANSFORMER,
    CompletedTrial,
    FailedTrial,
    SelectedTrial,
    Space,
    StudyConfig,
    StudyResult,
    TrialParams,
    choose_point,
    search,
)
from mlflow_pt_deploy.selection.policy import Policy
from mlflow_pt_deploy.system.hardware import usable_cores
from mlflow_pt_deploy.system.paths import home, work_folder
from mlflow_pt_deploy.tracking_server import check_tracking

if TYPE_CHECKING:
    from mlflow_pt_deploy.models import Classifier

KINDS = ("transformer", "static")
_NARROW = 512  # wider encoders need lower learning rates, as in `Schedule.resolved`
_WIDE_RATES = (1e-5, 1e-4)


@dataclass(frozen=True)
class SearchResult:
    """Result of a search.

    Attributes:
        run_id: Parent run of the trials.
        found: All trials of the study.
        chosen: The best trial of each kind, the overall best first.
        students: Students trained with the parameters of `chosen`, in the same order.
    """

    run_id: str
    found: StudyResult
    chosen: tuple[SelectedTrial, ...]
    students: tuple[TrainedModel, ...]


def search_students(
    options: Options, splits: Splits | None = None, *, space: Space | None = None
) -> SearchResult:
    """Search for students by accuracy and measured latency, and train the chosen ones.

    Trials are child runs. `options.resume` continues an interrupted search; several processes share
    a search if `options.study` and `options.storage` are the same.

    Args:
        options: `teacher` is a fine-tuned model; `trials` is at least 1.
        splits: The data, if it is loaded already.
        space: Search space; default: `default_space` of `options.kinds`.

    Raises:
        ModelError: `options.teacher` was not fine-tuned on these labels.
        SearchError: The study cannot be used, or no trial finished.
    """
    from mlflow_pt_deploy.models import load_classifier
    from mlflow_pt_deploy.pipeline.dry_run import dry_run_students

    options = on_this_machine(options)
    if splits is None:
        check_tracking()
        splits = load_data(options.data, seed=options.seed, limit=options.limit, on_note=print)
    teacher = load_classifier(tracking.fetch_model(options.teacher))
    splits = align(splits, teacher.labels)
    if splits.column != "text":
        raise SearchError(
            "a search supports text models only, and the data are images. Leave trials at 0 to "
            "distill one image student."
        )
    space = space or default_space(teacher, options.kinds)
    if options.trials:
        dry_run_students(teacher, options, splits)
    with tracking.stage_run(
        "search", f"{splits.name} search", resume=options.resume, options=options.to_json()
    ) as run:
        run_id = run.info.run_id
        tracking.log_device(run, options.device)
        tracking.log_dataset_facts(splits)
        found, chosen = _explore(run_id, teacher, splits, options, space)
        students = []
        for each in chosen:
            parameters = _as_options(each.trial.point, options)
            stage = distill_stage(parameters)
            students.append(run_or_resume(run_id, stage, distill_student, parameters, splits))
    return SearchResult(run_id, found, chosen, tuple(students))


def default_space(teacher: Classifier, kinds: str) -> Space:
    """Students with fewer layers than the teacher and static ones, on one core and on all.

    Args:
        teacher: The fine-tuned teacher.
        kinds: ``transformer``, ``static``, or both, separated by a comma.

    Raises:
        SearchError: A kind is unknown.
    """
    chosen = {kind.strip() for kind in kinds.split(",") if kind.strip()}
    if not chosen or chosen - set(KINDS):
        raise SearchError(f"kinds is {kinds!r}; choose from {', '.join(KINDS)}.")
    config = teacher.network.config
    max_layers = max(1, getattr(config, "num_hidden_layers", 1) - 1)
    threads = tuple(sorted({1, usable_cores()}))
    transformer = replace(
        TRANSFORMER, layers=(1, max_layers), threads=threads, **_pruning_space(config)
    )
    if getattr(config, "hidden_size", 768) > _NARROW:
        transformer = replace(transformer, learning_rate=_WIDE_RATES)
    return Space(
        transformer if "transformer" in chosen else None, STATIC if "static" in chosen else None
    )


def _pruning_space(config: Any) -> dict[str, Any]:
    """Numbers of heads and shares of the width to try, if the architecture can be pruned."""
    from mlflow_pt_deploy.models.architectures import FAMILIES

    family = FAMILIES.get(config.model_type)
    if family is None or not family.queries:
        return {}
    heads = config.num_attention_heads
    head_counts = {round(heads * share) for share in (2 / 3, 1 / 2)} - {0, heads}
    return {"heads": (0, *sorted(head_counts, reverse=True)), "width": (1.0, 0.75, 0.5)}


def _explore(
    run_id: str, teacher: Classifier, splits: Splits, options: Options, space: Space
) -> tuple[StudyResult, tuple[SelectedTrial, ...]]:
    """Run the trials, and choose."""
    from mlflow_pt_deploy.pipeline.trial_objective import Evaluator
    from mlflow_pt_deploy.training.inference import evaluate

    tracking.terminate_abandoned_children(run_id)
    config = StudyConfig(
        study=options.study or run_id,
        storage=options.storage or _default_storage(),
        trials=options.trials,
        seconds=options.search_seconds or float("inf"),
        seed=options.seed,
    )
    work = work_folder(run_id)
    accuracy = evaluate(teacher, splits.validation, device=options.device)
    found = search(Evaluator(teacher, splits, options, work), space, config, on_trial=_print_trial)
    chosen = _choose(found, options.selection_policy(), accuracy)
    _log_outcome(found, chosen, options.retain * accuracy, work)
    shutil.rmtree(work, ignore_errors=True)
    return found, chosen


def _default_storage() -> str:
    home().mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{home() / 'studies.db'}"


def _choose(found: StudyResult, policy: Policy, accuracy: float) -> tuple[SelectedTrial, ...]:
    """The best trial of each kind, so that `optimize` can build a cascade of them."""
    best = choose_point(found, policy, accuracy)
    others = []
    for kind in KINDS:
        finished = tuple(trial for trial in found.finished if trial.point.kind == kind)
        if finished and kind != best.trial.point.kind:
            others.append(choose_point(StudyResult(finished, found.dropped), policy, accuracy))
    return (best, *others)


def _as_options(point: TrialParams, options: Options) -> Options:
    return replace(
        options,
        student_layers=point.layers,
        student_heads=point.heads,
        student_width=point.width,
        student_epochs=point.epochs,
        static_epochs=point.epochs,
        temperature=point.temperature,
        soft_weight=point.soft_weight,
        learning_rate=point.learning_rate,
        batch_size=point.batch_size,
    )


def _print_trial(trial: CompletedTrial | FailedTrial) -> None:
    if isinstance(trial, CompletedTrial):
        outcome = trial.outcome
        what = f"{outcome.latency_ms:.3g} ms, validation accuracy {outcome.accuracy:.4f}"
    else:
        what = f"{trial.state}: {trial.reason}"
    print(f"search: trial {trial.number}, {trial.point}: {what}", flush=True)


def _log_outcome(
    found: StudyResult, chosen: tuple[SelectedTrial, ...], least: float, work: Path
) -> None:
    taken = [each.trial for each in chosen]
    plot_front(found, taken, work / "pareto.png", least=least)
    mlflow.log_artifact(str(work / "pareto.png"))
    reasons = "\n\n".join(each.reason for each in chosen)
    report = f"{reasons}\n\n{trials_markdown(found, taken)}"
    mlflow.log_text(report, "report.md")
    mlflow.log_dict(
        {
            "finished": [asdict(trial) for trial in found.finished],
            "dropped": [asdict(trial) for trial in found.dropped],
            "front": [trial.number for trial in found.front],
            "chosen": [trial.number for trial in taken],
        },
        "trials.json",
    )
    tracking.set_run_description(report)
