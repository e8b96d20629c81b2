"""The SQLite file of MLflow is created atomically, also by concurrent and killed processes."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from mlflow_pt_deploy import tracking_database as database
from mlflow_pt_deploy.errors import TrackingError
from mlflow_pt_deploy.tracking_database import prepare

FIRST_RUN = """
import mlflow
from mlflow_pt_deploy.tracking_server import check_tracking
from mlflow_pt_deploy.tracking import stage_run
check_tracking()
with stage_run("train", "train") as run:
    print(run.info.run_id)
"""


def tables(path: Path) -> dict[str, str]:
    with closing(sqlite3.connect(path)) as found:
        rows = found.execute("SELECT name, sql FROM sqlite_master WHERE type = 'table'")
        return dict(rows.fetchall())


def test_two_concurrent_commands_create_one_database(tmp_path: Path) -> None:
    database_file = tmp_path / "mlflow.db"
    environment = {**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{database_file}"}
    command = [sys.executable, "-c", FIRST_RUN]
    both = [
        subprocess.Popen(
            command,
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    output = [process.communicate(timeout=200) for process in both]
    assert [process.returncode for process in both] == [0, 0], output
    with closing(sqlite3.connect(database_file)) as found:
        runs = {run for (run,) in found.execute("SELECT run_uuid FROM runs")}
    assert runs == {out.strip() for out, _ in output}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mlflow.db"]


def test_an_incomplete_database_is_an_error_and_a_used_one_is_left_to_mlflow(
    tracking: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(database, "_STALLED_S", 0.3)
    path = Path(tracking.removeprefix("sqlite:///"))
    with closing(sqlite3.connect(path)) as found:
        found.execute("UPDATE alembic_version SET version_num = 'ff01da956556'")
        found.commit()
    with pytest.raises(TrackingError, match=r"mlflow\.db is incomplete: .* delete it and run"):
        prepare(tracking)
    assert capsys.readouterr().err == "waiting: another process creates mlflow.db\n"
    with closing(sqlite3.connect(path)) as found:
        found.execute("INSERT INTO runs (run_uuid, experiment_id) VALUES ('1', 0)")
        found.commit()
    prepare(tracking)  # MLflow explains how to upgrade an old one


def test_a_file_that_is_not_a_database_of_mlflow_is_named(tmp_path: Path) -> None:
    other, text = tmp_path / "other.db", tmp_path / "text.db"
    with closing(sqlite3.connect(other)) as found:
        found.execute("CREATE TABLE studies (study_id INTEGER)")
    text.write_text("not a database, " * 100)
    with pytest.raises(TrackingError, match=r"other\.db is not a database of MLflow"):
        prepare(f"sqlite:///{other}")
    with pytest.raises(TrackingError, match=r"text\.db cannot be read: file is not a database"):
        prepare(f"sqlite:///{text}")
    with pytest.raises(TrackingError, match=r"none/mlflow\.db cannot be created: No such file"):
        prepare(f"sqlite:///{tmp_path}/none/mlflow.db")
    for uri in ("sqlite://", "sqlite:///:memory:", "http://127.0.0.1:9", str(tmp_path)):
        prepare(uri)
