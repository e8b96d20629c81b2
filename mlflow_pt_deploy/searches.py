"""The stage `search`: students are tried, some are chosen, and those are trained once more.

Trials are children of its run. Knows what is logged of a search, and what it leads to.
"""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlflow

from mlflow_pt_deploy import tracking
from mlflow_pt_deploy.chart import plot_front
from mlflow_pt_deploy.data import Splits, load_data
from mlflow_pt_deploy.data.splits import align
from mlflow_pt_deploy.errors import SearchError
from mlflow_pt_deploy.fitting import Trained
from mlflow_pt_deploy.hardware import usable_cores
from mlflow_pt_deploy.home import home, work_folder
from mlflow_pt_deploy.options import Options
from mlflow_pt_deploy.reach import check_tracking
from mlflow_pt_deploy.report import trials_markdown
from mlflow_pt_deploy.search import (
    STATIC,
    TRANSFORMER,
    Chosen,
    Dropped,
    Finished,
    Found,
    Plan,
    Point,
    Space,
    choose_point,
    search,
)
from mlflow_pt_deploy.stages import distill_stage, distill_student, unless_finished

if TYPE_CHECKING:
    from mlflow_pt_deploy.models import Classifier

KINDS = ("transformer", "static")
_NARROW = 512  # wider encoders want lower learning rates, as in `train.Schedule.resolved`
_WIDE_RATES = (1e-5, 1e-4)


@dataclass(frozen=True)
class Searched:
    """What a search found, and the students that it led to.

    Attributes:
        run_id: The run whose children the trials are.
        found: All trials of the study.
        chosen: A trial of each kind that was tried with success, the overall choice first.
        students: Trained from these, in the same order.
    """

    run_id: str
    found: Found
    chosen: tuple[Chosen, ...]
    students: tuple[Trained, ...]


def search_students(
    options: Options, splits: Splits | None = None, *, space: Space | None = None
) -> Searched:
    """Search for students by accuracy and measured latency, and train those that it chooses.

    Trials are children of the run. A killed search goes on with `options.resume`; several processes
    share one that `options.study` and `options.storage` name.

    Args:
        options: `teacher` was fine-tuned; at least one of `trials`.
        splits: The data, if it was loaded already.
        space: What to vary; by default as `options.kinds` says.

    Raises:
        ModelError: `options.teacher` was not fine-tuned on these labels.
        SearchError: The study cannot be used, or no trial finished.
    """
    from mlflow_pt_deploy.models import load_classifier
    from mlflow_pt_deploy.rehearsal import rehearse_students

    if splits is None:
        check_tracking()
        splits = load_data(options.data, seed=options.seed, limit=options.limit, say=print)
    teacher = load_classifier(tracking.fetch_model(options.teacher))
    splits = align(splits, teacher.labels)
    if splits.column != "text":
        raise SearchError(
            "a search tries students of texts, and these are images. Leave trials at 0: the line "
            "distills one student of images."
        )
    space = space or default_space(teacher, options.kinds)
    if options.trials:
        rehearse_students(teacher, options, splits)
    with tracking.stage_run(
        "search", f"{splits.name} search", resume=options.resume, options=options.to_json()
    ) as run:
        run_id = run.info.run_id
        tracking.log_dataset_facts(splits)
        found, chosen = _explore(run_id, teacher, splits, options, space)
        students = []
        for each in chosen:
            wanted = _as_options(each.trial.point, options)
            stage = distill_stage(wanted)
            students.append(unless_finished(run_id, stage, distill_student, wanted, splits))
    return Searched(run_id, found, chosen, tuple(students))


def default_space(teacher: Classifier, kinds: str) -> Space:
    """Students with fewer layers than the teacher, static ones, on one core and on all.

    Args:
        teacher: The fine-tuned teacher.
        kinds: ``transformer``, ``static``, or both, separated by a comma.

    Raises:
        SearchError: A kind does not exist.
    """
    wanted = {kind.strip() for kind in kinds.split(",") if kind.strip()}
    if not wanted or wanted - set(KINDS):
        raise SearchError(f"kinds is {kinds!r}; choose from {', '.join(KINDS)}.")
    config = teacher.network.config
    most = max(1, getattr(config, "num_hidden_layers", 1) - 1)
    threads = tuple(sorted({1, usable_cores()}))
    transformer = replace(TRANSFORMER, layers=(1, most), threads=threads, **_cuts(config))
    if getattr(config, "hidden_size", 768) > _NARROW:
        transformer = replace(transformer, learning_rate=_WIDE_RATES)
    return Space(
        transformer if "transformer" in wanted else None, STATIC if "static" in wanted else None
    )


def _cuts(config: Any) -> dict[str, Any]:
    """Heads and shares of the width that are tried, where these can be cut at all."""
    from mlflow_pt_deploy.models.family import FAMILIES

    family = FAMILIES.get(config.model_type)
    if family is None or not family.queries:
        return {}
    heads = config.num_attention_heads
    fewer = {round(heads * share) for share in (2 / 3, 1 / 2)} - {0, heads}
    return {"heads": (0, *sorted(fewer, reverse=True)), "width": (1.0, 0.75, 0.5)}


def _explore(
    run_id: str, teacher: Classifier, splits: Splits, options: Options, space: Space
) -> tuple[Found, tuple[Chosen, ...]]:
    """Try points until there are enough, and choose."""
    from mlflow_pt_deploy.train import evaluate
    from mlflow_pt_deploy.trial import Evaluator

    tracking.end_abandoned(run_id)
    plan = Plan(
        study=options.study or run_id,
        storage=options.storage or _own_storage(),
        trials=options.trials,
        seconds=options.search_seconds or float("inf"),
        seed=options.seed,
    )
    work = work_folder(run_id)
    accuracy = evaluate(teacher, splits.validation, device=options.device)
    found = search(Evaluator(teacher, splits, options, work), space, plan, on_trial=_say)
    chosen = _choose(found, options.retain, accuracy)
    _log_outcome(found, chosen, options.retain * accuracy, work)
    shutil.rmtree(work, ignore_errors=True)
    return found, chosen


def _own_storage() -> str:
    home().mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{home() / 'studies.db'}"


def _choose(found: Found, retain: float, accuracy: float) -> tuple[Chosen, ...]:
    """One of each kind, so that what follows can make a cascade of them."""
    best = choose_point(found, retain, accuracy)
    others = []
    for kind in KINDS:
        finished = tuple(trial for trial in found.finished if trial.point.kind == kind)
        if finished and kind != best.trial.point.kind:
            others.append(choose_point(Found(finished, found.dropped), retain, accuracy))
    return (best, *others)


def _as_options(point: Point, options: Options) -> Options:
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


def _say(trial: Finished | Dropped) -> None:
    if isinstance(trial, Finished):
        outcome = trial.outcome
        what = f"{outcome.latency_ms:.3g} ms, validation accuracy {outcome.accuracy:.4f}"
    else:
        what = f"{trial.state}: {trial.reason}"
    print(f"search: trial {trial.number}, {trial.point}: {what}", flush=True)


def _log_outcome(found: Found, chosen: tuple[Chosen, ...], least: float, work: Path) -> None:
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
    tracking.describe(report)
