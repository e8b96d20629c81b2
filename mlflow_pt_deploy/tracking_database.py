"""Create the SQLite database of MLflow atomically, and check an existing one.

MLflow creates a database in place with tens of migrations. A second process that opens it during
the migrations breaks it, and a killed process leaves a file that MLflow cannot open. Therefore the
database is created in a temporary folder and then linked to its path, which only one process can
do; the others use the result.
"""

from __future__ import annotations

import os
import sqlite3
import sys
import tempfile
import time
from contextlib import closing, suppress
from pathlib import Path

import sqlalchemy
from mlflow import MlflowClient
from mlflow.store.db import utils

from mlflow_pt_deploy.errors import TrackingError
from mlflow_pt_deploy.system import interrupt

_STALLED_S = 10.0


def prepare(uri: str) -> None:
    """Create the SQLite file of a tracking or registry URI, or wait for another process to do so.

    Args:
        uri: URI of any store; other stores than SQLite files are ignored.

    Raises:
        TrackingError: The file cannot be created, is incomplete, or is not an MLflow database.
    """
    path = _sqlite_file(uri)
    if path is None:
        return
    if not path.exists():
        try:
            _create(path)
        except OSError as error:
            raise TrackingError(
                f"MLflow's database {path} cannot be created: {error.strerror}. Check the folder, "
                "or set MLFLOW_TRACKING_URI. Nothing was trained."
            ) from error
    _wait_until_ready(path)


def _sqlite_file(uri: str) -> Path | None:
    if not uri.startswith("sqlite"):
        return None
    name = sqlalchemy.make_url(uri).database or ""
    in_memory = not name or name == ":memory:" or name.startswith("file:")
    return None if in_memory else Path(name)


def _create(path: Path) -> None:
    """Create an empty database with the tables of MLflow, unless another process was faster."""
    if not os.access(path.parent, os.W_OK):
        path.open("xb").close()  # raises the error of the operating system
        path.unlink()
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        migrated, copy = Path(folder, "migrated.db"), Path(folder, "copy.db")
        MlflowClient(tracking_uri=f"sqlite:///{migrated}").search_experiments(max_results=1)
        # MLflow keeps connections to the first file open, so a copy is linked.
        with closing(sqlite3.connect(migrated)) as source, closing(sqlite3.connect(copy)) as target:
            source.backup(target)
        with suppress(FileExistsError):
            os.link(copy, path)


def _wait_until_ready(path: Path) -> None:
    """Wait until the schema is current, or is an older one that needs `mlflow db upgrade`."""
    head = utils._get_latest_schema_revision()
    schema, changed_at, announced = _Schema.read(path), time.monotonic(), False
    while not schema.is_ready(head):
        if time.monotonic() - changed_at > _STALLED_S:
            raise TrackingError(
                f"MLflow's database {path} is incomplete: the process that created it was killed. "
                "It contains no runs; delete it and run the command again. Nothing was trained."
            )
        if not announced:
            print(f"waiting: another process creates {path.name}", file=sys.stderr, flush=True)
            announced = True
        interrupt.check()
        time.sleep(0.1)
        current = _Schema.read(path)
        if (current.version, current.tables) != (schema.version, schema.tables):
            schema, changed_at = current, time.monotonic()


class _Schema:
    """Schema of a database.

    Attributes:
        version: Schema revision of MLflow; empty if there is none or the database is locked.
        tables: Names of the tables.
        has_runs: Whether there are runs.
    """

    def __init__(self, version: str, tables: frozenset[str], has_runs: bool) -> None:
        self.version, self.tables, self.has_runs = version, tables, has_runs

    @classmethod
    def read(cls, path: Path) -> _Schema:
        """Read the schema without changing the file.

        Raises:
            TrackingError: The file is not an SQLite database of MLflow, or cannot be read.
        """
        try:
            with closing(
                sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
            ) as database:
                rows = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
                tables = frozenset(name for (name,) in rows)
                versions, has_runs = [], False
                if "alembic_version" in tables:
                    versions = database.execute(
                        "SELECT version_num FROM alembic_version"
                    ).fetchall()
                if "runs" in tables:
                    has_runs = bool(database.execute("SELECT 1 FROM runs LIMIT 1").fetchall())
        except sqlite3.DatabaseError as error:
            if "locked" in str(error):
                return cls("", frozenset(), False)
            raise TrackingError(
                f"MLflow's database {path} cannot be read: {error}. Check the file, or set "
                "MLFLOW_TRACKING_URI. Nothing was trained."
            ) from error
        if tables - {"alembic_version"} and "experiments" not in tables:
            raise TrackingError(
                f"{path} is not a database of MLflow. Set MLFLOW_TRACKING_URI to another file. "
                "Nothing was trained."
            )
        return cls(versions[0][0] if versions else "", tables, has_runs)

    def is_ready(self, head: str) -> bool:
        """Whether no other process is creating the tables."""
        return self.version == head or self.has_runs or not self.tables
