"""Argument parser of ``pt-deploy``, generated from the options in `config` and `serving.settings`.

Imports nothing heavy, so ``--help`` is fast.
"""

from __future__ import annotations

import argparse
from typing import Any

from mlflow_pt_deploy._version import __version__
from mlflow_pt_deploy.config import Options
from mlflow_pt_deploy.option_fields import SWITCH, OptionSpec, option_specs
from mlflow_pt_deploy.packaging import TARGETS
from mlflow_pt_deploy.prediction.options import PredictionOptions
from mlflow_pt_deploy.serving.settings import ServerSettings

STAGES = {
    "run": "train, distill, optimize and promote in one run",
    "train": "fine-tune a teacher",
    "distill": "distill a student from a fine-tuned teacher",
    "search": "search for students of a teacher",
    "optimize": "build, measure and log every variant of a model",
    "promote": "choose a variant of a run, or copy a champion, and move the alias champion",
    "serve": "serve registered or logged models, and follow promotions",
}
"""Stages: commands that are entry points of MLproject too, and their descriptions."""

COMMANDS = {
    **STAGES,
    "rollback": "move the alias champion back to an earlier version",
    "history": "list the promotions of a registered model",
    "compare": "compare two versions on the same rows",
    "verify": "compare a model on this machine with what was logged",
    "drift": "compare what is served with the rows that decided the promotion",
    "package": "write a folder from which an image, Kubernetes objects or a function are built",
    "predict": "score a Parquet, CSV or JSON lines file of any size",
    "feedback": "send the right labels of served rows to a running server",
    "explain": "print which words of a text made its label",
    "report": "write one HTML page about a run, or about the champion of a registered model",
}
"""All commands and their descriptions."""

# A model that exists was trained on some data; measuring it on the demo's would be meaningless.
_NO_DEFAULT_DATA = ("distill", "search", "optimize")
_DEFAULTS = {("search", "trials"): 20, **{(stage, "data"): "" for stage in _NO_DEFAULT_DATA}}
_REQUIRED = {("search", "teacher")}
_URI = "models:/NAME@champion, runs:/... or a folder"
_MODEL_FORMS = "Hugging Face id or folder, runs:/... or models:/..."
_DATA_FORMAT = (
    "data: a folder with train.csv, train.csv.gz or train.parquet, optionally with validation and "
    "test files (otherwise they are split off train), or one such file. Columns: `text`, or "
    "`image` (file names in CSV, file contents in Parquet), and `label`, one class per row, a "
    "string or an integer. CSV is UTF-8 with column names in the first line."
)


_CONFIG = (
    "-C",
    {
        "dest": "config",
        "action": "append",
        "default": list[str](),
        "help": "serving option of all models, e.g. -C num_threads=2 -C max_batch_rows=64",
    },
)
_VERSION = "version: NAME@ALIAS, NAME/VERSION or models:/..."
_ARGUMENTS: dict[str, tuple[tuple[str, dict[str, Any]], ...]] = {
    "optimize": (("--model", {"required": True, "help": f"model to optimize: {_MODEL_FORMS}"}),),
    "promote": (
        ("--run", {"default": "", "help": "id of a run with an optimize stage"}),
        (
            "--dry-run",
            {
                "action": "store_true",
                "help": "print every variant with what it passed and failed; change nothing",
            },
        ),
        (
            "--to",
            {
                "default": "",
                "metavar": "NAME",
                "help": "copy the champion of --name to this registered model, and promote it",
            },
        ),
        (
            "--registry-uri",
            {
                "default": "",
                "metavar": "URI",
                "help": "with --to: MLflow server of the copy; empty: the same",
            },
        ),
        (
            "--verify",
            {
                "action": "store_true",
                "help": "with --to: compute the golden rows of the copy before it is promoted",
            },
        ),
        (
            "--repair",
            {
                "default": "",
                "metavar": "NAME",
                "help": "finish or undo interrupted promotions of this registered model",
            },
        ),
    ),
    "rollback": (
        ("name", {"help": "registered model"}),
        (
            "--to",
            {
                "default": "",
                "metavar": "VERSION",
                "help": "version to go back to; empty: that of the alias previous",
            },
        ),
    ),
    "history": (("name", {"help": "registered model"}),),
    "compare": (
        ("first", {"help": f"first {_VERSION}"}),
        ("second", {"help": f"second {_VERSION}"}),
        (
            "--data",
            {
                "default": "",
                "help": "measure both anew on this data, interleaved; empty: stored answers",
            },
        ),
        (
            "--seconds",
            {
                "type": float,
                "default": 8.0,
                "help": "with --data: timing budget of each model in seconds (8)",
            },
        ),
    ),
    "report": (
        ("subject", {"help": "id of a run with an optimize stage, or registered model"}),
        (
            "--out",
            {"default": "", "metavar": "FILE", "help": "file to write (report-SUBJECT.html)"},
        ),
    ),
    "verify": (
        ("uri", {"help": _URI}),
        (
            "--latency",
            {
                "action": "store_true",
                "help": "time single rows too; nothing else should run meanwhile",
            },
        ),
    ),
    "drift": (
        ("name", {"help": "registered model: NAME (its champion), NAME@ALIAS or NAME/VERSION"}),
        (
            "--url",
            {
                "default": "",
                "metavar": "URL",
                "help": "ask a running server, with its token in PT_DEPLOY_ADMIN_TOKEN or "
                "PT_DEPLOY_TOKEN; empty: what servers wrote to the registry",
            },
        ),
    ),
    "package": (
        ("uri", {"help": _URI}),
        (
            "--target",
            {
                "choices": TARGETS,
                "default": TARGETS[0],
                "help": "what it is for (docker)",
            },
        ),
        ("--out", {"default": "", "metavar": "DIR", "help": "folder to create (package-TARGET)"}),
        (
            "--image",
            {
                "default": "",
                "metavar": "NAME",
                "help": "name of the image in Kubernetes objects and commands",
            },
        ),
        (
            "--without-golden-rows",
            {
                "action": "store_true",
                "help": "replace the golden rows, which are validation rows, by made ones",
            },
        ),
    ),
    "predict": (
        ("uri", {"help": _URI}),
        (
            "input",
            {"help": ".parquet, .csv, .csv.gz or .jsonl; - reads JSON lines from standard input"},
        ),
        (
            "output",
            {
                "help": "file to write, in any of these formats; - writes JSON lines to standard "
                "output"
            },
        ),
        _CONFIG,
    ),
    "feedback": (
        (
            "file",
            {
                "help": ".csv, .csv.gz, .jsonl or .parquet with request_id, row (optional for the "
                "only row of a request) and label; - reads JSON lines from standard input"
            },
        ),
        ("--url", {"required": True, "help": "address of the server, e.g. http://127.0.0.1:5000"}),
    ),
    "explain": (
        ("uri", {"help": _URI}),
        ("text", {"help": "text to score and explain"}),
        _CONFIG,
    ),
    "serve": (
        (
            "models",
            {
                "nargs": "*",
                "metavar": "MODEL",
                "help": "models:/NAME@champion, runs:/..., a path or @FILE; NAME=URI gives it a "
                "name. The first answers /invocations, each /models/NAME/invocations. None: "
                "PT_DEPLOY_MODEL, or the folder where the platform puts the model",
            },
        ),
        _CONFIG,
    ),
}
"""Arguments of a command that are not options of `Options` or `ServerSettings`."""


class _Join(argparse.Action):
    """Joins the values of a flag that is given several times by commas."""

    def __call__(
        self, parser: object, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        before = getattr(namespace, self.dest, None)
        setattr(namespace, self.dest, f"{before},{values}" if before else values)


def stage_options(stage: str) -> tuple[OptionSpec, ...]:
    """Options that a command has as flags."""
    if stage == "serve":
        return option_specs(ServerSettings)
    if stage == "predict":
        return option_specs(PredictionOptions)
    return tuple(spec for spec in option_specs(Options) if stage in spec.stages)


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of the whole command; `stage` of its result is the command."""
    command = argparse.ArgumentParser(
        prog="pt-deploy",
        description="Fine-tune, distill, optimize and serve text and image classifiers on MLflow.",
    )
    command.add_argument("--version", action="version", version=__version__)
    stages = command.add_subparsers(dest="stage", required=True, metavar="STAGE")
    for name, about in COMMANDS.items():
        options = stage_options(name)
        has_data = any(spec.name == "data" for spec in options)
        stage = stages.add_parser(
            name,
            help=about,
            description=about,
            epilog=_DATA_FORMAT if has_data else None,
            allow_abbrev=False,
        )
        for word, settings in _ARGUMENTS.get(name, ()):
            stage.add_argument(word, **settings)
        for spec in options:
            _add_option(name, stage, spec)
        stage.add_argument("--json", action="store_true", help="end with one line of JSON")
    return command


def _add_option(stage: str, parser: argparse.ArgumentParser, spec: OptionSpec) -> None:
    # a setting that is not given comes from the environment, so it must be told from its default
    missing: dict[str, Any] = {"default": argparse.SUPPRESS} if stage == "serve" else {}
    if spec.type is bool:
        parser.add_argument(spec.flag, action="store_true", help=spec.help, **missing)
        return
    default = _DEFAULTS.get((stage, spec.name), spec.default)
    about = spec.help.replace("%", "%%")  # argparse formats it
    shown: dict[str, Any] = {"help": about + (f" ({default})" if default else "")}
    if spec.choices == SWITCH:
        shown |= {"help": about, "nargs": "?", "const": "yes"}
    if spec.choices:
        shown["metavar"] = f"{{{','.join(spec.choices)}}}"
    if spec.name == "data" and not default:
        shown["help"] = f"(required) data that the model was trained on: {about}"
    if (stage, spec.name) in _REQUIRED:
        parser.add_argument(
            spec.flag, required=True, type=spec.type, help=f"fine-tuned teacher: {_MODEL_FORMS}"
        )
        return
    if spec.repeatable:
        shown["action"] = _Join
    parser.add_argument(spec.flag, type=spec.type, **{"default": default, **missing, **shown})
