"""What can be typed: the flags of each stage, their types, defaults and words.

Imports nothing heavy, so that ``--help`` answers at once.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from mlflow_pt_deploy import __version__

_Table = Mapping[str, tuple[type, Any, str]]
"""Of each flag its type, its default, and what it means."""

_DATA = {
    "--data": (
        str,
        "catalog",
        "folder or file of CSV/Parquet, hf:OWNER/NAME, catalog (a demo), digits, abo:FOLDER",
    ),
    "--limit": (int, 0, "at most this many rows a split, for a quick trial; 0: all"),
    "--seed": (int, 0, "of cuts, order of rows and dropout"),
    "--resume": (str, "", "id of an interrupted run to go on with"),
}
# A model that exists was made for some data; to measure it on the demo's would tell nothing.
_DATA_OF_MODEL = {
    **_DATA,
    "--data": (str, "", f"the data that the model was made for (required): {_DATA['--data'][2]}"),
}
_DATA_LOOKS = (
    "data: train.csv, train.csv.gz or train.parquet in a folder, with validation and test beside "
    "it if there are any (else they are cut from train), or one such file. Columns: `text`, or "
    "`image` (names of files in CSV, their bytes in Parquet), and `label`, one class a row, a word "
    "or a whole number. CSV is UTF-8 with the names in the first line."
)
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
SERVE = {
    "--host": (str, "127.0.0.1", "address to listen on"),
    "--port": (int, 5000, "0: any free one"),
    "--poll-s": (float, 5.0, "seconds between looks at the registry; 0: do not follow it"),
    "--grace-s": (int, 30, "seconds for requests in flight to finish when told to stop"),
    "--max-body-mb": (float, 4.0, "longest request body"),
    "--max-connections": (int, 1024, "most connections at a time"),
    "--replicas": (int, 0, "processes at the port; 0: one for every 4 cores, at most 8"),
    "--hang-s": (
        float,
        30.0,
        "seconds until one that stands still is told of, a replica killed; 0: never",
    ),
    "--max-models": (int, 0, "most models in memory, others load when asked for; 0: no limit"),
    "--max-memory-mb": (float, 0.0, "resident memory above which models go; 0: no limit"),
    "--tls-cert": (str, "", "PEM file with the certificate: serve HTTPS"),
    "--tls-key": (str, "", "PEM file with its key"),
}
_NAME = {"--name": (str, "pt-deploy-demo", "registered model to promote into")}


_NO_SEARCH = {"--trials": (int, 0, "search for students instead: how many to try; 0: do not")}
_STAGES: dict[str, tuple[str, _Table]] = {
    "run": (
        "the whole line: train, distill, optimize, promote",
        {
            **{**_DATA, **_TEACHER, **_STUDENT, **_LESSON, **_SEARCH, **_NO_SEARCH},
            **{**_FIT, **_MEASURE, **_POLICY, **_NAME},
        },
    ),
    "train": ("fine-tune a teacher", {**_DATA, **_TEACHER, **_FIT}),
    "distill": (
        "distill a student from a fine-tuned teacher",
        {**_DATA_OF_MODEL, **_TEACHER, **_STUDENT, **_LESSON, **_FIT},
    ),
    "search": (
        "search for students of a teacher",
        {
            **{**_DATA_OF_MODEL, **_SEARCH, **_LESSON},
            "--device": _FIT["--device"],
            "--seconds": _MEASURE["--seconds"],
            "--retain": _POLICY["--retain"],
        },
    ),
    "optimize": (
        "build, measure and log every variant of a model",
        {**_DATA_OF_MODEL, **_MEASURE, **_POLICY},
    ),
    "promote": (
        "choose a variant of a run and move the alias champion",
        {**_POLICY, **_NAME},
    ),
    "serve": ("serve registered or logged models, and follow promotions", SERVE),
}


def parser() -> argparse.ArgumentParser:
    """Of the whole command; what was typed ends up under the options' names, `stage` among them."""
    command = argparse.ArgumentParser(
        prog="pt-deploy",
        description="From a good but slow PyTorch model to a fast, served one, on MLflow.",
    )
    command.add_argument("--version", action="version", version=__version__)
    stages = command.add_subparsers(dest="stage", required=True, metavar="STAGE")
    for name, (about, table) in _STAGES.items():
        looks = _DATA_LOOKS if "--data" in table else None
        stage = stages.add_parser(
            name, help=about, description=about, epilog=looks, allow_abbrev=False
        )
        _add(stage, table)
        stage.add_argument("--json", action="store_true", help="end with one line of JSON")
        _special(name, stage)
    return command


def _add(parser: argparse.ArgumentParser, table: _Table) -> None:
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
