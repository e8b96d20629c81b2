"""The ``pt-deploy`` command: parse the arguments, call a stage, print its result.

Heavy imports happen inside the stages, so ``--help`` is fast.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mlflow_pt_deploy.cli_args import build_parser
from mlflow_pt_deploy.config import Options
from mlflow_pt_deploy.option_fields import option_specs
from mlflow_pt_deploy.serving.settings import ServerSettings
from mlflow_pt_deploy.system.child_process import kill_all
from mlflow_pt_deploy.system.interrupt import describe_signal, handle_signals
from mlflow_pt_deploy.system.paths import own_temporary_folder
from mlflow_pt_deploy.system.progress import quiet_bars
from mlflow_pt_deploy.system.unexpected_errors import error_message

if TYPE_CHECKING:
    from mlflow_pt_deploy.pipeline.lifecycle import LifecycleResult
    from mlflow_pt_deploy.pipeline.optimize import OptimizationResult
    from mlflow_pt_deploy.pipeline.search_stage import SearchResult
    from mlflow_pt_deploy.pipeline.training_run import TrainedModel
    from mlflow_pt_deploy.registry.promotion import Promotion

Command = Callable[[argparse.Namespace], dict[str, Any]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Command-line arguments; None: those of this process, which then keeps its
            signal handlers until it exits.

    Returns:
        Exit status: 0 success, 1 a stage failed, 2 wrong usage, 130 interrupted, 143 terminated.
    """
    parsed = build_parser().parse_args(arguments)
    _quiet_libraries()
    own = arguments is None
    try:
        with _interruptible(parsed.stage, own):
            document = _COMMANDS[parsed.stage](parsed)
            if parsed.json:
                print(json.dumps(document))
            sys.stdout.flush()
        if own and parsed.stage == "serve":
            os._exit(0)  # the workers are gone; what is left of the main process holds nothing
    except KeyboardInterrupt as interrupted:
        number = getattr(interrupted, "number", signal.SIGINT)
        print(f"pt-deploy {parsed.stage}: {describe_signal(number)}", file=sys.stderr, flush=True)
        if own:
            os._exit(128 + number)  # cleanup is done; a normal exit with PyTorch takes seconds
        return 128 + number
    except BrokenPipeError:  # the reader, e.g. `head`, closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except Exception as error:
        print(f"pt-deploy {parsed.stage}: {error_message(error)}", file=sys.stderr)
        return 1
    return 0


@contextmanager
def _interruptible(stage: str, own: bool) -> Iterator[None]:
    """Let signals end the block, and remove its temporary files.

    `serve` installs signal handlers of its own.
    """
    if stage == "serve":
        yield
        return
    with handle_signals(kill_all, f"pt-deploy {stage}", keep=own), own_temporary_folder():
        yield


def _quiet_libraries() -> None:
    """Silence progress bars and messages of libraries, unless the user configured them."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("ALEMBIC_LOG_LEVEL", "WARNING")
    quiet_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)
    import logging

    for name in ("alembic", "mlflow.store.db.utils", "mlflow.tracking.fluent"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _options(parsed: argparse.Namespace) -> Options:
    known = {spec.name for spec in option_specs(Options)}
    given = {key: value for key, value in vars(parsed).items() if key in known}
    if not given.get("storage"):  # an environment variable, since it may hold a password
        given["storage"] = os.environ.get("PT_DEPLOY_STORAGE", "")
    return Options(**given)


def _run(parsed: argparse.Namespace) -> dict[str, Any]:
    from mlflow_pt_deploy.pipeline.lifecycle import run_lifecycle

    done = run_lifecycle(_options(parsed))
    _print_table(done.optimized)
    _print_next_steps(done)
    return {
        **_optimization_document(done.optimized),
        "stage": "run",
        "run_id": done.run_id,
        "promoted": _promotion_document(done.promotion),
        "seconds": dict(done.seconds),
    }


def _train(parsed: argparse.Namespace) -> dict[str, Any]:
    from mlflow_pt_deploy.pipeline.stages import train_teacher

    return _training_document("train", train_teacher(_options(parsed)))


def _distill(parsed: argparse.Namespace) -> dict[str, Any]:
    from mlflow_pt_deploy.pipeline.stages import distill_student

    return _training_document("distill", distill_student(_options(parsed)))


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


def _search(parsed: argparse.Namespace) -> dict[str, Any]:
    from mlflow_pt_deploy.pipeline.search_stage import search_students
    from mlflow_pt_deploy.reporting.tables import trials_table

    done = search_students(_options(parsed))
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


def _optimize(parsed: argparse.Namespace) -> dict[str, Any]:
    from mlflow_pt_deploy.pipeline.stages import optimize_models

    parsed.teacher = parsed.model
    done = optimize_models(_options(parsed))
    _print_table(done)
    print(f"next: pt-deploy promote --run {done.run_id} --name NAME")
    return _optimization_document(done)


def _promote(parsed: argparse.Namespace) -> dict[str, Any]:
    from mlflow_pt_deploy.pipeline.stages import promote_choice, read_optimized

    done = read_optimized(parsed.run, _options(parsed).policy())
    promotion = promote_choice(done, parsed.name)
    print(f"{promotion.uri} is version {promotion.version}: {done.choice.reason}")
    return {"stage": "promote", "choice": done.choice.variant, **_promotion_document(promotion)}


def _serve(parsed: argparse.Namespace) -> dict[str, Any]:
    from mlflow_pt_deploy.model_config import parse_config
    from mlflow_pt_deploy.serving.api import serve

    settings = {spec.name: getattr(parsed, spec.name) for spec in option_specs(ServerSettings)}
    serve(parsed.uri, *parsed.more, model_config=parse_config(parsed.config), **settings)
    return {"stage": "serve", "uri": parsed.uri}


def _print_table(done: OptimizationResult) -> None:
    from mlflow_pt_deploy.reporting.tables import table

    print(table(done.results, done.choice))


def _print_next_steps(done: LifecycleResult) -> None:
    import mlflow

    from mlflow_pt_deploy.serving.model.inputs import EXAMPLES

    start, address, prefix = _tracking_commands(mlflow.get_tracking_uri())
    prefix = _path_prefix(sys.prefix) + prefix
    experiment = mlflow.get_run(done.run_id).info.experiment_id
    pages = f"{address}/#/experiments/{experiment}"
    view = "?workflowType=machine_learning"  # the UI opens with traces of agents otherwise
    row = EXAMPLES[done.column]
    times = ", ".join(f"{stage} {value:.0f} s" for stage, value in done.seconds.items())
    print(f"""
promoted: {done.promotion.uri} is version {done.promotion.version}   ({times})

look:   {start}
        {pages}/runs/{done.run_id}{view}   (the choice)
        {pages}/models{view}   (all variants)
serve:  {prefix}mlflow models serve -m {done.promotion.uri} --env-manager local -p 5001
   or:  {prefix}pt-deploy serve {done.promotion.uri} --port 5001
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


def _promotion_document(promotion: Promotion) -> dict[str, Any]:
    return {"uri": promotion.uri, "version": promotion.version, "previous": promotion.previous}


_COMMANDS: dict[str, Command] = {
    "run": _run,
    "train": _train,
    "distill": _distill,
    "search": _search,
    "optimize": _optimize,
    "promote": _promote,
    "serve": _serve,
}

if __name__ == "__main__":
    sys.exit(main())
