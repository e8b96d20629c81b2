"""Commands that train, build and measure: call a stage, print its result."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from mlflow_pt_deploy.commands.options import read_options
from mlflow_pt_deploy.commands.registry import promotion_document
from mlflow_pt_deploy.errors import TrainingError
from mlflow_pt_deploy.system.ranks import launched_ranks

if TYPE_CHECKING:
    from mlflow_pt_deploy.config import Options
    from mlflow_pt_deploy.pipeline.lifecycle import LifecycleResult
    from mlflow_pt_deploy.pipeline.optimize import OptimizationResult
    from mlflow_pt_deploy.pipeline.search_stage import SearchResult
    from mlflow_pt_deploy.pipeline.training_run import TrainedModel


def run(parsed: argparse.Namespace) -> dict[str, Any]:
    from mlflow_pt_deploy.pipeline.lifecycle import run_lifecycle

    if (size := launched_ranks().size) > 1:
        raise TrainingError(
            f"torchrun started {size} processes, and only train and distill can be started so. "
            f"Give pt-deploy run --processes {size} instead."
        )
    done = run_lifecycle(read_options(parsed))
    print_table(done.optimized)
    _print_next_steps(done)
    return {
        **_optimization_document(done.optimized),
        "stage": "run",
        "run_id": done.run_id,
        "promoted": promotion_document(done.promotion) if done.promotion else None,
        "why_not": done.why_not,
        "seconds": dict(done.seconds),
    }


def train(parsed: argparse.Namespace) -> dict[str, Any]:
    from mlflow_pt_deploy.pipeline.stages import train_teacher

    return _train("train", train_teacher, read_options(parsed))


def distill(parsed: argparse.Namespace) -> dict[str, Any]:
    from mlflow_pt_deploy.pipeline.stages import distill_student

    return _train("distill", distill_student, read_options(parsed))


def _train(stage: str, work: Callable[[Options], TrainedModel], options: Options) -> dict[str, Any]:
    """Run the stage; where torchrun started this process and it is not the first, only train."""
    if rank := launched_ranks().rank:
        from mlflow_pt_deploy.pipeline.training_process import join_training

        join_training(stage, options)
        return {"stage": stage, "rank": rank}
    return _training_document(stage, work(options))


def _training_document(stage: str, done: TrainedModel) -> dict[str, Any]:
    following = "distill --teacher" if stage == "train" else "optimize --model TEACHER --student"
    print(f"validation accuracy {done.validation_accuracy:.4f}, model {done.model}")
    print(f"next: pt-deploy {following} {done.model} --data ...")
    return {
        "stage": stage,
        "run_id": done.run_id,
        "model": done.model,
        "validation_accuracy": done.validation_accuracy,
    }


def search(parsed: argparse.Namespace) -> dict[str, Any]:
    from mlflow_pt_deploy.pipeline.search_stage import search_students
    from mlflow_pt_deploy.reporting.tables import trials_table

    done = search_students(read_options(parsed))
    print(trials_table(done.found, [each.trial for each in done.chosen]))
    for chosen, student in zip(done.chosen, done.students, strict=True):
        print(f"\n{chosen.reason}\nTrained again: {student.model}")
    models = ",".join(student.model for student in done.students)
    print(f"\nnext: pt-deploy optimize --model {parsed.teacher} --student {models} --data ...")
    return _search_optimization_document(done)


def _search_optimization_document(done: SearchResult) -> dict[str, Any]:
    return {
        "stage": "search",
        "run_id": done.run_id,
        "finished": len(done.found.finished),
        "front": [trial.number for trial in done.found.front],
        "chosen": [
            {
                "trial": chosen.trial.number,
                "meets": chosen.meets,
                "reason": chosen.reason,
                "model": student.model,
                "validation_accuracy": student.validation_accuracy,
            }
            for chosen, student in zip(done.chosen, done.students, strict=True)
        ],
    }


def optimize(parsed: argparse.Namespace) -> dict[str, Any]:
    from mlflow_pt_deploy.pipeline.stages import optimize_models

    parsed.teacher = parsed.model
    done = optimize_models(read_options(parsed))
    print_table(done)
    print(f"next: pt-deploy promote --run {done.run_id} --name NAME")
    return _optimization_document(done)


def print_table(done: OptimizationResult) -> None:
    from mlflow_pt_deploy.reporting.tables import table

    print(table(done.results, done.choice, policy=done.policy))


def _print_next_steps(done: LifecycleResult) -> None:
    import mlflow

    from mlflow_pt_deploy.serving.model.inputs import EXAMPLES

    start, address, prefix = _tracking_commands(mlflow.get_tracking_uri())
    prefix = _path_prefix(sys.prefix) + prefix
    experiment = mlflow.get_run(done.run_id).info.experiment_id
    pages = f"{address}/#/experiments/{experiment}"
    view = "?workflowType=machine_learning"  # the UI opens with traces of agents otherwise
    row = EXAMPLES[done.column]
    if done.promotion:
        promoted = f"promoted: {done.promotion.uri} is version {done.promotion.version}"
    else:
        promoted = f"not promoted: {done.why_not}"
    uri = f"models:/{done.name}@champion"
    times = ", ".join(f"{stage} {value:.0f} s" for stage, value in done.seconds.items())
    print(f"""
{promoted}   ({times})

look:   {start}
        {pages}/runs/{done.run_id}{view}   (the choice)
        {pages}/models{view}   (all variants)
        {pages}/runs/{done.run_id}/artifacts/report.html   (the report)
serve:  {prefix}mlflow models serve -m {uri} --env-manager local -p 5001
   or:  {prefix}pt-deploy serve {uri} --port 5001
score:  curl http://127.0.0.1:5001/invocations -H 'Content-Type: application/json' \\
             -d '{{"inputs": ["{row}"]}}'
""")


def _tracking_commands(uri: str) -> tuple[str, str, str]:
    """Describe how to use a tracking store.

    A URI with a password is not printed; commands then rely on the environment variable.

    Returns:
        The command that opens its UI, the UI's address, and the prefix of commands that use it.
    """
    from mlflow_pt_deploy.tracking_server import redact_uri

    secret = redact_uri(uri) != uri
    shown = '"$MLFLOW_TRACKING_URI"' if secret else shlex.quote(uri)
    prefix = "" if secret else f"MLFLOW_TRACKING_URI={shown} "
    if uri.startswith(("http:", "https:")):
        return "open", redact_uri(uri), prefix
    return f"mlflow ui --backend-store-uri {shown}   # and open", "http://127.0.0.1:5000", prefix


def _path_prefix(environment: str) -> str:
    """Prefix of commands in an environment that MLflow created, which is not on the PATH."""
    if not re.fullmatch("mlflow-[0-9a-f]{40}", os.path.basename(environment)):
        return ""
    return f"PATH={shlex.quote(os.path.join(environment, 'bin'))}:$PATH "


def _optimization_document(done: OptimizationResult) -> dict[str, Any]:
    return {
        "stage": "optimize",
        "run_id": done.run_id,
        "choice": done.choice.variant,
        "reason": done.choice.reason,
        "variants": [
            {
                "variant": result.variant,
                "reason": result.reason,
                "model": done.models.get(result.variant),
                "validation": {**result.metrics(""), **result.metrics("validation")},
                "test": result.metrics("test"),
            }
            for result in done.results
        ],
    }
