"""``pt-deploy``: one sub-command a stage. Parse, call, print.

Imports nothing heavy before a stage is called, so that ``--help`` answers at once.
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
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from mlflow_pt_deploy.child import kill_all
from mlflow_pt_deploy.flags import SERVE, parser
from mlflow_pt_deploy.home import own_temporary_folder
from mlflow_pt_deploy.interrupt import Interrupted, ended_by, handled
from mlflow_pt_deploy.progress import quiet_bars
from mlflow_pt_deploy.sigterm import on_sigterm
from mlflow_pt_deploy.unexpected import told

if TYPE_CHECKING:
    from mlflow_pt_deploy.fitting import Trained
    from mlflow_pt_deploy.optimize import Optimized
    from mlflow_pt_deploy.options import Options
    from mlflow_pt_deploy.pipeline import Lifecycle
    from mlflow_pt_deploy.promote import Promotion
    from mlflow_pt_deploy.searches import Searched

Call = Callable[[argparse.Namespace], dict[str, Any]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: As typed; None: this process's own, and signals stay handled until it is gone.

    Returns:
        Its exit status: 0 done, 1 a stage failed, 2 wrong usage, 130 interrupted, 143 terminated.
    """
    options = parser().parse_args(arguments)
    _quiet_libraries()
    own = arguments is None
    try:
        with _interruptible(options.stage, own):
            document = _CALLS[options.stage](options)
            if options.json:
                print(json.dumps(document))
            sys.stdout.flush()
    except KeyboardInterrupt as interrupted:
        number = getattr(interrupted, "number", signal.SIGINT)
        print(f"pt-deploy {options.stage}: {ended_by(number)}", file=sys.stderr, flush=True)
        if own:
            os._exit(128 + number)  # all is cleaned up; to take PyTorch apart lasts for seconds
        return 128 + number
    except BrokenPipeError:  # its reader, e.g. `head`, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except Exception as error:
        print(f"pt-deploy {options.stage}: {told(error)}", file=sys.stderr)
        return 1
    return 0


@contextmanager
def _interruptible(stage: str, own: bool) -> Iterator[None]:
    """Signals end what runs inside, and what it left in temporary folders goes with it.

    A server ends in its own way; until that is in force, SIGTERM does what Ctrl-C does.
    """
    if stage == "serve":
        with on_sigterm(_terminate):
            yield
        return
    with handled(kill_all, f"pt-deploy {stage}", keep=own), own_temporary_folder():
        yield


def _terminate() -> None:
    raise Interrupted(signal.SIGTERM)


def _quiet_libraries() -> None:
    """Keep the terminal for our own words; what the user has set stays."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("ALEMBIC_LOG_LEVEL", "WARNING")
    quiet_bars()
    warnings.filterwarnings("ignore", category=FutureWarning)
    import logging

    for name in ("alembic", "mlflow.store.db.utils", "mlflow.tracking.fluent"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _options(parsed: argparse.Namespace) -> Options:
    from mlflow_pt_deploy.options import Options

    known = {field.name for field in fields(Options)}
    given = {key: value for key, value in vars(parsed).items() if key in known}
    if not given.get("storage"):  # the environment, because it may hold a password
        given["storage"] = os.environ.get("PT_DEPLOY_STORAGE", "")
    return Options(**given)


def _run(parsed: argparse.Namespace) -> dict[str, Any]:
    from mlflow_pt_deploy.pipeline import run_lifecycle

    done = run_lifecycle(_options(parsed))
    _show(done.optimized)
    _next_steps(done)
    return {
        **_document(done.optimized),
        "stage": "run",
        "run_id": done.run_id,
        "promoted": _promoted(done.promotion),
        "seconds": dict(done.seconds),
    }


def _train(parsed: argparse.Namespace) -> dict[str, Any]:
    from mlflow_pt_deploy.stages import train_teacher

    return _trained("train", train_teacher(_options(parsed)))


def _distill(parsed: argparse.Namespace) -> dict[str, Any]:
    from mlflow_pt_deploy.stages import distill_student

    return _trained("distill", distill_student(_options(parsed)))


def _trained(stage: str, done: Trained) -> dict[str, Any]:
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
    from mlflow_pt_deploy.report import trials_table
    from mlflow_pt_deploy.searches import search_students

    done = search_students(_options(parsed))
    print(trials_table(done.found, [each.trial for each in done.chosen]))
    for chosen, student in zip(done.chosen, done.students, strict=True):
        print(f"\n{chosen.reason}\nTrained again: {student.model}")
    models = ",".join(student.model for student in done.students)
    print(f"\nnext: pt-deploy optimize --model {parsed.teacher} --student {models} --data ...")
    return _searched(done)


def _searched(done: Searched) -> dict[str, Any]:
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
    from mlflow_pt_deploy.stages import optimize_models

    parsed.teacher = parsed.model
    done = optimize_models(_options(parsed))
    _show(done)
    print(f"next: pt-deploy promote --run {done.run_id} --name NAME")
    return _document(done)


def _promote(parsed: argparse.Namespace) -> dict[str, Any]:
    from mlflow_pt_deploy.stages import promote_choice, read_optimized

    done = read_optimized(parsed.run, _options(parsed).policy())
    promotion = promote_choice(done, parsed.name)
    print(f"{promotion.uri} is version {promotion.version}: {done.choice.reason}")
    return {"stage": "promote", "choice": done.choice.variant, **_promoted(promotion)}


def _serve(parsed: argparse.Namespace) -> dict[str, Any]:
    from mlflow_pt_deploy.serving.options import parse_config
    from mlflow_pt_deploy.serving.serve import serve

    names = [flag.removeprefix("--").replace("-", "_") for flag in SERVE]
    settings = {name: getattr(parsed, name) for name in (*names, "access_log", "insecure", "pin")}
    serve(parsed.uri, *parsed.more, model_config=parse_config(parsed.config), **settings)
    return {"stage": "serve", "uri": parsed.uri}


def _show(done: Optimized) -> None:
    from mlflow_pt_deploy.report import table

    print(table(done.results, done.choice))


def _next_steps(done: Lifecycle) -> None:
    import mlflow

    from mlflow_pt_deploy.serving.rows import EXAMPLES

    start, address, prefix = _ways(mlflow.get_tracking_uri())
    prefix = _path(sys.prefix) + prefix
    experiment = mlflow.get_run(done.run_id).info.experiment_id
    pages = f"{address}/#/experiments/{experiment}"
    view = "?workflowType=machine_learning"  # else the UI opens among traces of agents
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


def _ways(uri: str) -> tuple[str, str, str]:
    """To a tracking store: what starts its UI, where that is, what a command needs in front.

    A password is not repeated on the terminal; where there is one, the environment has it.
    """
    from mlflow_pt_deploy.reach import without_password

    secret = without_password(uri) != uri
    shown = '"$MLFLOW_TRACKING_URI"' if secret else shlex.quote(uri)
    prefix = "" if secret else f"MLFLOW_TRACKING_URI={shown} "
    if uri.startswith(("http:", "https:")):
        return "open", without_password(uri), prefix
    return f"mlflow ui --backend-store-uri {shown}   # and open", "http://127.0.0.1:5000", prefix


def _path(environment: str) -> str:
    """What a command needs in front where MLflow made the environment: it is on nobody's PATH."""
    if not re.fullmatch("mlflow-[0-9a-f]{40}", os.path.basename(environment)):
        return ""
    return f"PATH={shlex.quote(os.path.join(environment, 'bin'))}:$PATH "


def _document(done: Optimized) -> dict[str, Any]:
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


def _promoted(promotion: Promotion) -> dict[str, Any]:
    return {"uri": promotion.uri, "version": promotion.version, "previous": promotion.previous}


_CALLS: dict[str, Call] = {
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
