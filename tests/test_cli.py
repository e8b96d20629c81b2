"""The command line: start-up time, arguments, MLproject, error messages."""

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
import yaml

from mlflow_pt_deploy.cli import main
from mlflow_pt_deploy.cli_args import STAGES, build_parser, stage_options
from mlflow_pt_deploy.commands.pipeline import _path_prefix, _tracking_commands

ROOT = Path(__file__).resolve().parent.parent


def test_import_and_help_are_fast_and_load_nothing_heavy() -> None:
    code = (
        "import sys, mlflow_pt_deploy\n"
        "from mlflow_pt_deploy.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'mlflow', 'numpy', 'transformers', 'pandas'} & set(sys.modules)\n"
        "import time; print(time.process_time())"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert float(run.stdout.splitlines()[-1]) < 0.4  # CPU seconds; 0.06 on an idle machine


@pytest.mark.parametrize("stage", [*STAGES])
def test_every_stage_has_help(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([stage, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "--json" in shown
    columns = (
        "Columns: `text`, or `image` (file names in CSV, file contents in Parquet), and `label`"
    )
    assert (columns in shown) == ("--data" in shown)
    needs_data = stage in ("distill", "search", "optimize")
    assert ("(required) data that the model was trained on" in shown) == needs_data


def test_every_entry_point_is_a_valid_command_line() -> None:
    points = yaml.safe_load((ROOT / "MLproject").read_text())["entry_points"]
    assert {"run" if name == "main" else name for name in points} == set(STAGES)
    for name, point in points.items():
        given = point["parameters"]
        values = {key: shlex.quote(str(kind.get("default", "x"))) for key, kind in given.items()}
        command = shlex.split(point["command"].format(**values))
        stage = "run" if name == "main" else name
        # the code of this clone, not of an installed package
        assert command[:4] == ["python", "-m", "mlflow_pt_deploy.cli", stage]
        parsed = vars(build_parser().parse_args(command[3:]))
        for key, kind in given.items():
            found = parsed["models"][0] if (stage, key) == ("serve", "uri") else parsed[key]
            assert found == type(found)(kind.get("default", "x")), (name, key)
            assert f"{{{key}}}" in point["command"], (name, key)


NOT_IN_MLPROJECT = {
    "run": {"storage"},  # may hold a password, and MLflow logs parameters
    "search": {"storage"},
    "distill": {"epochs", "image_size"},  # of the teacher, which is not trained
}
DEFAULTS_OF_STAGE = {("search", "trials"): 20}


@pytest.mark.parametrize("stage", [*STAGES])
def test_mlproject_has_the_options_of_each_command(stage: str) -> None:
    points = yaml.safe_load((ROOT / "MLproject").read_text())["entry_points"]
    given = points["main" if stage == "run" else stage]["parameters"]
    specs = {spec.name: spec for spec in stage_options(stage)}
    if stage == "serve":
        assert given.keys() - {"uri"} <= specs.keys()
    else:
        special = {"optimize": {"model"}, "promote": {"run"}}.get(stage, set())
        assert given.keys() == specs.keys() - NOT_IN_MLPROJECT.get(stage, set()) | special
    for name, parameter in given.items():
        if name not in specs:
            continue
        spec = specs[name]
        default = DEFAULTS_OF_STAGE.get((stage, name), spec.default)
        if name == "data" and stage in ("distill", "search", "optimize"):
            default = ""  # a model is measured on the data it was trained on
        assert parameter["type"] == spec.type.__name__, name
        if (stage, name) in {("distill", "teacher"), ("search", "teacher")}:
            assert "default" not in parameter
        else:
            assert spec.type(parameter["default"]) == default, name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--data", "nowhere.csv"], "nowhere.csv"),
        (["train", "--device", "cuda:7"], "device=cuda:7: PyTorch cannot use it here"),
        (["train", "--device", "gpu"], "device is 'gpu'; give auto, cpu, cuda, or one GPU such as"),
        (["run", "--device", "cuda:7"], "device=cuda:7: PyTorch cannot use it here"),
        (["optimize", "--model", "no", "--data", "digits", "--device", "cuda:7"], "PyTorch cannot"),
        (["search", "--teacher", "no", "--data", "digits", "--device", "cuda:7"], "PyTorch cannot"),
        (["run", "--devices", "gpu"], "devices: gpu is unknown; choose from cpu, cuda"),
        (["train", "--processes", "0"], "processes is 0; give a number of at least 1"),
        (["run", "--retain", "2"], "retain is 2.0; give the fraction"),
        (["run", "--variants", "tensorrt"], "variants: unknown tensorrt; choose from aotinductor"),
        (["run", "--objective", "fun"], "objective is 'fun'"),
        (["run", "--policy", "none.yaml"], "the policy file none.yaml cannot be read"),
        (["run", "--name", "a/b"], "'a/b' cannot be the name of a registered model"),
        (["run", "--retain", "0.9", "--retain-low", "0.95"], "retain_low is 0.95, above retain"),
        (["promote", "--run", "0123", "--replace", "maybe"], "replace is 'maybe'; choose from no"),
        (["train", "--teacher", "no/such-model"], "no/such-model: no classifier"),
        (["optimize", "--model", "runs:/0123/model", "--data", "digits"], "cannot be fetched from"),
        (["optimize", "--model", "mine"], "--data is missing. Give the data that the model was"),
        (["optimize", "--model", "mine", "--data", ""], "--data is missing"),
        (["distill", "--teacher", "mine"], "--data is missing"),
        (["search", "--teacher", "mine"], "--data is missing"),
        (["promote", "--run", "0123"], "run 0123 cannot be resumed"),
        (["run", "--resume", "0123"], "run 0123 cannot be resumed"),
    ],
)
def test_a_user_error_is_one_line(
    arguments: list[str], message: str, tracking: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    shown = capsys.readouterr()
    assert message in shown.err
    assert "Traceback" not in shown.err


@pytest.fixture
def tracking_error(capsys: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    """Run the pipeline with an unusable tracking server; returns the message."""

    def run(uri: str) -> str:
        mlflow.set_tracking_uri(uri)
        try:
            assert main(["run"]) == 1
        finally:
            mlflow.set_tracking_uri(None)
        message = capsys.readouterr().err
        assert "secret" not in message
        return message

    return run


def test_an_unreachable_tracking_server_is_reported_before_training(
    tracking_error: Callable[[str], str],
) -> None:
    message = tracking_error("http://user:secret@127.0.0.1:9")
    assert "server http://127.0.0.1:9 does not answer" in message
    assert "nothing was trained" in message


def test_a_database_without_its_driver_names_the_package(
    monkeypatch: pytest.MonkeyPatch, tracking_error: Callable[[str], str]
) -> None:
    for driver in ("psycopg", "psycopg2"):
        monkeypatch.setitem(sys.modules, driver, None)
    message = tracking_error("postgresql://user:secret@127.0.0.1:9/mlflow")
    assert re.search(r"needs the Python package psycopg2?\. Install it: pip install psy", message)


def test_next_steps_start_a_ui_if_needed_and_omit_passwords() -> None:
    ui = "http://127.0.0.1:5000"
    start, address, prefix = _tracking_commands("sqlite:////tmp/a b/mlflow.db")
    assert start.startswith("mlflow ui --backend-store-uri 'sqlite:////tmp/a b/mlflow.db'")
    assert (address, prefix) == (ui, "MLFLOW_TRACKING_URI='sqlite:////tmp/a b/mlflow.db' ")
    start, address, prefix = _tracking_commands("postgresql://me:secret@db/mlflow")
    assert start.startswith('mlflow ui --backend-store-uri "$MLFLOW_TRACKING_URI"')
    assert (address, prefix) == (ui, "")
    assert "a@b" in _tracking_commands("sqlite:////home/a@b/mlflow.db")[0]
    assert _tracking_commands("https://me:secret@team") == ("open", "https://team", "")
    assert _tracking_commands("http://team:5000") == (
        "open",
        "http://team:5000",
        "MLFLOW_TRACKING_URI=http://team:5000 ",
    )


def test_an_environment_created_by_mlflow_is_put_on_the_path_prefix() -> None:
    made = "/home/me/.mlflow/envs/mlflow-" + "61f3cf5a" * 5
    assert _path_prefix(made) == f"PATH={made}/bin:$PATH "
    assert _path_prefix("/home/me/project/.venv") == _path_prefix("/home/me/mlflow-envs") == ""


def test_a_terminated_stage_ends_its_run(tracking: str) -> None:
    code = """
import os, signal, sys, time
from mlflow_pt_deploy import cli

def stage(_):
    from mlflow_pt_deploy.tracking import stage_run

    with stage_run("train", "train") as run:
        print(run.info.run_id, flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

before = signal.getsignal(signal.SIGTERM)
cli._COMMANDS["train"] = stage
status = cli.main(["train", "--data", "x"])
assert signal.getsignal(signal.SIGTERM) is before
sys.exit(status)
"""
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=50)
    assert ended.returncode == 143
    assert ended.stderr.splitlines()[-1] == "pt-deploy train: terminated"
    assert mlflow.get_run(ended.stdout.strip()).info.status == "FAILED"
