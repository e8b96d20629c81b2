"""Child processes import the code of their parent, whatever the working folder is."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mlflow_pt_deploy
from mlflow_pt_deploy.system.child_process import command, environment

PACKAGE = Path(mlflow_pt_deploy.__path__[0])


def run_help(folder: Path, env: dict[str, str]) -> str:
    run = subprocess.run(
        command("cli", "--help"), cwd=folder, env=env, check=True, capture_output=True, text=True
    )
    return run.stdout


def test_a_file_in_the_working_folder_does_not_shadow_a_library(tmp_path: Path) -> None:
    (tmp_path / "argparse.py").write_text("raise SystemExit('shadowed')")
    assert "usage: pt-deploy" in run_help(tmp_path, environment())


def test_a_checkout_takes_precedence_over_an_installed_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "mlflow_pt_deploy"
    shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    changed = copy / "cli_args.py"
    changed.write_text(changed.read_text(encoding="utf8").replace("pt-deploy", "another"), "utf8")
    monkeypatch.setattr(sys, "path", ["", *sys.path])  # as in a notebook
    monkeypatch.chdir(tmp_path)
    assert "usage: another" in run_help(PACKAGE, environment(SOME="thing"))
    assert environment(SOME="thing")["SOME"] == "thing"
