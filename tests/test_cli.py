"""The command line: fast to answer, clear when it refuses."""

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlflow
import pytest
import yaml

from mlflow_pt_deploy.cli import _path, _ways, main
from mlflow_pt_deploy.flags import parser

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("run", "train", "distill", "search", "optimize", "promote", "serve")


def test_import_and_help_are_instant_and_load_nothing_heavy() -> None:
    code = (
        "import sys, mlflow_pt_deploy\n"
        "from mlflow_pt_deploy.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'torch', 'mlflow', 'transformers', 'pandas'} & set(sys.modules)\n"
        "import time; print(time.process_time())"
    )
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert float(run.stdout.splitlines()[-1]) < 0.4  # processor seconds; 0.06 on a quiet machine


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_has_help(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([stage, "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "--json" in shown
    looks = (
        "Columns: `text`, or `image` (names of files in CSV, their bytes in Parquet), and `label`"
    )
    assert (looks in shown) == ("--data" in shown)
    assert ("made for (required)" in shown) == (stage in ("distill", "search", "optimize"))


def test_the_command_line_understands_every_entry_point() -> None:
    points = yaml.safe_load((ROOT / "MLproject").read_text())["entry_points"]
    assert {"run" if name == "main" else name for name in points} == set(STAGES)
    for name, point in points.items():
        given = point["parameters"]
        values = {key: shlex.quote(str(kind.get("default", "x"))) for key, kind in given.items()}
        command = shlex.split(point["command"].format(**values))
        stage = "run" if name == "main" else name
        # the code beside it, not what an environment of an earlier clone has
        assert command[:4] == ["python", "-m", "mlflow_pt_deploy.cli", stage]
        parsed = vars(parser().parse_args(command[3:]))
        for key, kind in given.items():
            assert parsed[key] == type(parsed[key])(kind.get("default", "x")), (name, key)
            assert f"{{{key}}}" in point["command"], (name, key)


def test_mlproject_has_the_defaults_of_the_command_line() -> None:
    from dataclasses import asdict

    from mlflow_pt_deploy.options import Options

    defaults = asdict(Options())
    points = yaml.safe_load((ROOT / "MLproject").read_text())["entry_points"]
    assert set(points["main"]["parameters"]) == set(defaults) - {"storage"}  # it has passwords
    del points["search"]["parameters"]["trials"]  # 0 is for those who do not search
    for stage in ("distill", "search", "optimize"):  # each takes a model, which has its own data
        assert points[stage]["parameters"].pop("data") == {"type": "str", "default": ""}
    for point in points.values():
        for name, given in point["parameters"].items():
            if name in defaults and "default" in given:
                assert type(defaults[name])(given["default"]) == defaults[name], name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--data", "nowhere.csv"], "nowhere.csv"),
        (["train", "--device", "cuda:7"], "device is 'cuda:7'; choose from cpu, cuda"),
        (["run", "--retain", "2"], "retain is 2.0; give the share"),
        (["run", "--variants", "tensorrt"], "there is no tensorrt; choose from aotinductor"),
        (["run", "--objective", "size"], "objective is 'size'"),
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
def test_a_mistake_is_one_clear_line(
    arguments: list[str], message: str, tracking: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    shown = capsys.readouterr()
    assert message in shown.err
    assert "Traceback" not in shown.err


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[[str], str]:
    """Runs the line on a tracking server that it must refuse; what it says, without a secret."""

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


def test_an_unreachable_tracking_server_is_told_before_training(
    refused: Callable[[str], str],
) -> None:
    message = refused("http://user:secret@127.0.0.1:9")
    assert "server http://127.0.0.1:9 does not answer" in message
    assert "nothing was trained" in message


def test_a_database_without_its_driver_names_the_package(
    monkeypatch: pytest.MonkeyPatch, refused: Callable[[str], str]
) -> None:
    for driver in ("psycopg", "psycopg2"):
        monkeypatch.setitem(sys.modules, driver, None)
    message = refused("postgresql://user:secret@127.0.0.1:9/mlflow")
    assert re.search(r"needs the Python package psycopg2?\. Install it: pip install psy", message)


def test_next_steps_start_a_ui_where_there_is_none_and_repeat_no_password() -> None:
    ui = "http://127.0.0.1:5000"
    start, address, prefix = _ways("sqlite:////tmp/a b/mlflow.db")
    assert start.startswith("mlflow ui --backend-store-uri 'sqlite:////tmp/a b/mlflow.db'")
    assert (address, prefix) == (ui, "MLFLOW_TRACKING_URI='sqlite:////tmp/a b/mlflow.db' ")
    start, address, prefix = _ways("postgresql://me:secret@db/mlflow")
    assert start.startswith('mlflow ui --backend-store-uri "$MLFLOW_TRACKING_URI"')
    assert (address, prefix) == (ui, "")
    assert "a@b" in _ways("sqlite:////home/a@b/mlflow.db")[0]
    assert _ways("https://me:secret@team") == ("open", "https://team", "")
    assert _ways("http://team:5000") == (
        "open",
        "http://team:5000",
        "MLFLOW_TRACKING_URI=http://team:5000 ",
    )


def test_an_environment_of_mlflows_is_put_on_the_path() -> None:
    made = "/home/me/.mlflow/envs/mlflow-" + "61f3cf5a" * 5
    assert _path(made) == f"PATH={made}/bin:$PATH "
    assert _path("/home/me/project/.venv") == _path("/home/me/mlflow-envs") == ""


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
cli._CALLS["train"] = stage
status = cli.main(["train", "--data", "x"])
assert signal.getsignal(signal.SIGTERM) is before
sys.exit(status)
"""
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, check=False, capture_output=True, text=True, timeout=50)
    assert ended.returncode == 143
    assert ended.stderr.splitlines()[-1] == "pt-deploy train: terminated"
    assert mlflow.get_run(ended.stdout.strip()).info.status == "FAILED"
