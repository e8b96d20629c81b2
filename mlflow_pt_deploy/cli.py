"""``pt-deploy``: one sub-command a stage. Parse, call, print.

Imports nothing heavy before a stage is called, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from mlflow_pt_deploy import __version__
from mlflow_pt_deploy.errors import PtDeployError

if TYPE_CHECKING:
    from mlflow_pt_deploy.optimize import Optimized
    from mlflow_pt_deploy.options import Options
    from mlflow_pt_deploy.pipeline import Lifecycle
    from mlflow_pt_deploy.promote import Promotion
    from mlflow_pt_deploy.searches import Searched
    from mlflow_pt_deploy.stages import Trained

_DATA = {
    "--data": (
        str,
        "catalog",
        "folder or file of CSV/Parquet, hf:OWNER/NAME, catalog, digits, abo:FOLDER",
    ),
    "--limit": (int, 0, "at most this many rows a split, for a quick trial; 0: all"),
    "--seed": (int, 0, "of cuts, order of rows and dropout"),
    "--resume": (str, "", "id of an interrupted run to go on with"),
}
_FIT = {
    "--learning-rate": (float, 0.0, "peak; 0: by the model's width"),
    "--batch-size": (int, 0, "rows a training step; 0: by the model"),
    "--device": (str, "cpu", "where to train: cpu or cuda"),
}
_TEACHER = {
    "--teacher": (
        str,
        "auto",
        "Hugging Face id or folder, minilm, resnet, runs:/... or models:/...",
    ),
    "--epochs": (int, -1, "passes over train for the teacher; 0: take it as it is; -1: choose"),
    "--image-size": (int, 0, "edge in pixels at which resnet looks at images; 0: by their own"),
}
_STUDENT = {
    "--student-epochs": (int, -1, "passes over train for the student; 0: none; -1: choose"),
    "--student-layers": (int, 3, "layers it keeps of the teacher's; distill: 0 is a static one"),
    "--keep-layers": (str, "", "which of the teacher's, e.g. 0,2,5; empty: evenly spread"),
    "--student-heads": (int, 0, "attention heads it keeps in each of them; 0: all"),
    "--student-neurons": (int, 0, "feed-forward neurons it keeps in each of them; 0: all"),
    "--student-width": (float, 1.0, "share of the width it keeps, of a MobileNetV2's for images"),
    "--student-precision": (str, "fp32", "or int8-qat: it learns with int8's rounding"),
    "--vocabulary": (str, "all", "word pieces of students: all, or those that train uses"),
    "--static-epochs": (int, 12, "passes over train for the static student; 0: none"),
    "--temperature": (float, 2.0, "of the soft labels"),
    "--soft-weight": (float, 0.7, "share of the soft labels in a student's loss"),
}
_LESSON = {
    "--relation-weight": (float, 0.0, "of the loss that compares relations among rows; 0: without"),
    "--made-texts": (float, 0.0, "texts for the teacher to label besides, as a multiple of train"),
}
_SEARCH = {
    "--trials": (int, 20, "students to try, those of an earlier call included"),
    "--search-seconds": (float, 0.0, "time for it; 0: no limit"),
    "--kinds": (str, "transformer,static", "kinds of students to try"),
    "--study": (str, "", "name, to share a study between processes; empty: the run's id"),
    "--storage": (str, "", "database of the study, e.g. postgresql://...; $PT_DEPLOY_STORAGE"),
}
_MEASURE = {
    "--variants": (str, "", "which to build, e.g. onnxruntime,openvino-fp32; empty: all"),
    "--seconds": (float, 8.0, "timing budget for each variant"),
    "--threads": (int, 0, "threads for one call; 0: all cores"),
}
_POLICY = {
    "--retain": (float, 0.99, "least share of the teacher's validation accuracy to keep"),
    "--objective": (str, "latency", "latency or throughput"),
    "--max-latency-p95-ms": (float, 0.0, "0: no limit"),
    "--max-artifact-mb": (float, 0.0, "0: no limit"),
    "--max-peak-rss-mb": (float, 0.0, "0: no limit"),
}
_SERVE = {
    "--host": (str, "127.0.0.1", "address to listen on"),
    "--port": (int, 5000, "0: any free one"),
    "--poll-s": (float, 5.0, "seconds between looks at the registry; 0: do not follow it"),
    "--grace-s": (int, 30, "seconds for requests in flight to finish when told to stop"),
    "--max-body-mb": (float, 4.0, "longest request body"),
    "--max-connections": (int, 1024, "most connections at a time"),
    "--replicas": (int, 0, "processes at the port; 0: one for every 4 cores, at most 8"),
    "--hang-s": (float, 30.0, "seconds until a replica that stands still is killed; 0: never"),
    "--max-models": (int, 0, "most models in memory, others load when asked for; 0: no limit"),
    "--max-memory-mb": (float, 0.0, "resident memory above which models go; 0: no limit"),
    "--tls-cert": (str, "", "PEM file with the certificate: serve HTTPS"),
    "--tls-key": (str, "", "PEM file with its key"),
}
_NAME = {"--name": (str, "pt-deploy-demo", "registered model to promote into")}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status (0 done, 1 a stage failed, 2 wrong usage)."""
    options = _parser().parse_args(arguments)
    _quiet_libraries()
    try:
        document = options.call(options)
    except PtDeployError as error:
        print(f"pt-deploy {options.stage}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"pt-deploy {options.stage}: interrupted", file=sys.stderr)
        return 130
    if options.json:
        print(json.dumps(document))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="pt-deploy",
        description="From a good but slow PyTorch model to a fast, served one, on MLflow.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    stages = parser.add_subparsers(dest="stage", required=True, metavar="STAGE")
    no_search = {"--trials": (int, 0, "search for students instead: how many to try; 0: do not")}
    searching = {**_SEARCH, **no_search}
    rest = {**_FIT, **_MEASURE, **_POLICY}
    trying = {
        **_DATA,
        **_SEARCH,
        **_LESSON,
        **{f: rest[f] for f in ("--device", "--seconds", "--retain")},
    }
    making = {**_TEACHER, **_STUDENT, **_LESSON, **searching, **_FIT}
    everything = {**_DATA, **making, **_MEASURE, **_POLICY, **_NAME}
    for name, call, about, tables in (
        ("run", _run, "the whole line: train, distill, optimize, promote", everything),
        ("train", _train, "fine-tune a teacher", {**_DATA, **_TEACHER, **_FIT}),
        (
            "distill",
            _distill,
            "distill a student from a fine-tuned teacher",
            {**_DATA, **_TEACHER, **_STUDENT, **_LESSON, **_FIT},
        ),
        ("search", _search, "search for students of a teacher", trying),
        (
            "optimize",
            _optimize,
            "build, measure and log every variant of a model",
            {**_DATA, **_MEASURE, **_POLICY},
        ),
        (
            "promote",
            _promote,
            "choose a variant of a run and move the alias champion",
            {**_POLICY, **_NAME},
        ),
        ("serve", _serve, "serve registered or logged models, and follow promotions", _SERVE),
    ):
        stage = stages.add_parser(name, help=about, description=about, allow_abbrev=False)
        _add(stage, tables)
        stage.add_argument("--json", action="store_true", help="end with one line of JSON")
        stage.set_defaults(call=call)
        _special(name, stage)
    return parser


def _add(parser: argparse.ArgumentParser, table: Mapping[str, tuple[type, Any, str]]) -> None:
    for flag, (kind, default, about) in table.items():
        parser.add_argument(
            flag, type=kind, default=default, help=about + (f" ({default})" if default else "")
        )


def _special(name: str, stage: argparse.ArgumentParser) -> None:
    """Arguments that only one stage has."""
    forms = "Hugging Face id or folder, runs:/... or models:/..."
    if name == "search":
        stage.add_argument("--teacher", required=True, help=f"a fine-tuned teacher: {forms}")
    if name == "optimize":
        stage.add_argument("--model", required=True, help=f"the model: {forms}")
    if name in ("run", "optimize"):
        about = f"smaller models made already, separated by commas: {forms}"
        stage.add_argument("--student", default="", help=about)
    if name == "promote":
        stage.add_argument("--run", required=True, help="id of a run with an optimize stage")
    if name == "serve":
        about = "models:/NAME@champion, runs:/..., a path or @FILE; NAME=URI names it"
        stage.add_argument("uri", help=about)
        stage.add_argument("more", nargs="*", help="more models, at /models/NAME/invocations")
        about = "serving option of all models, e.g. -C num_threads=2 -C max_batch_rows=64"
        stage.add_argument("-C", dest="config", action="append", default=[], help=about)
        about = "a line of JSON for each request, without anything a client wrote"
        stage.add_argument("--access-log", action="store_true", help=about)
        about = "give each replica cores of its own"
        stage.add_argument("--pin", action="store_true", help=about)
        about = "listen beyond this machine without PT_DEPLOY_TOKEN"
        stage.add_argument("--insecure", action="store_true", help=about)


def _quiet_libraries() -> None:
    """Keep the terminal for our own words; what the user has set stays."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("ALEMBIC_LOG_LEVEL", "WARNING")
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

    names = [flag.removeprefix("--").replace("-", "_") for flag in _SERVE]
    settings = {name: getattr(parsed, name) for name in (*names, "access_log", "insecure", "pin")}
    serve(parsed.uri, *parsed.more, model_config=parse_config(parsed.config), **settings)
    return {"stage": "serve", "uri": parsed.uri}


def _show(done: Optimized) -> None:
    from mlflow_pt_deploy.report import table

    print(table(done.results, done.choice))


def _next_steps(done: Lifecycle) -> None:
    import mlflow

    from mlflow_pt_deploy.serving.rows import EXAMPLES

    uri = mlflow.get_tracking_uri()
    local = uri.startswith("sqlite:")
    start = f"mlflow ui --backend-store-uri {shlex.quote(uri)}   # and open" if local else "open"
    address = "http://127.0.0.1:5000" if local else uri
    experiment = mlflow.get_run(done.run_id).info.experiment_id
    pages = f"{address}/#/experiments/{experiment}"
    view = "?workflowType=machine_learning"  # else the UI opens among traces of agents
    prefix = f"MLFLOW_TRACKING_URI={shlex.quote(uri)} "
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


if __name__ == "__main__":
    sys.exit(main())
