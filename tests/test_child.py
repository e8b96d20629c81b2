"""Processes of our own run the code of their parent, wherever they are started."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mlflow_pt_deploy
from mlflow_pt_deploy.system.child_process import command, environment

PACKAGE = Path(mlflow_pt_deploy.__path__[0])


def says(folder: Path, env: dict[str, str]) -> str:
    run = subprocess.run(
        command("cli", "--help"), cwd=folder, env=env, check=True, capture_output=True, text=True
    )
    return run.stdout


def test_a_file_in_the_working_folder_takes_no_librarys_place(tmp_path: Path) -> None:
    (tmp_path / "argparse.py").write_text("raise SystemExit('not this one')")
    assert "usage: pt-deploy" in says(tmp_path, environment())


def test_a_checkout_comes_before_what_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mlflow_pt_deploy").mkdir()
    for path in PACKAGE.glob("*.py"):
        shutil.copy(path, tmp_path / "mlflow_pt_deploy")
    changed = tmp_path / "mlflow_pt_deploy" / "flags.py"
    changed.write_text(changed.read_text(encoding="utf8").replace("pt-deploy", "another"), "utf8")
    monkeypatch.setattr(sys, "path", ["", *sys.path])  # as in a notebook
    monkeypatch.chdir(tmp_path)
    assert "usage: another" in says(PACKAGE, environment(SOME="thing"))
    assert environment(SOME="thing")["SOME"] == "thing"
