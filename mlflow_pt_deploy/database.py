"""MLflow's SQLite database: created whole or not at all, and what is wrong with it in words.

MLflow creates a database in place by tens of migrations. A second process that opens it meanwhile
breaks it, and one that is killed meanwhile leaves a file that MLflow can never open again. So it is
created aside, and linked to its place: only one process can, and the others use what is there.
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

from mlflow_pt_deploy import interrupt
from mlflow_pt_deploy.errors import TrackingError

_STANDS_STILL_S = 10.0


def prepare(uri: str) -> None:
    """Create the SQLite file of a tracking or registry URI, or wait until another process has.

    Args:
        uri: Of any store; what is no SQLite file is left alone.

    Raises:
        TrackingError: It cannot be created, is half made, or belongs to something else.
    """
    path = _file(uri)
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


def _file(uri: str) -> Path | None:
    if not uri.startswith("sqlite"):
        return None
    name = sqlalchemy.make_url(uri).database or ""
    in_memory = not name or name == ":memory:" or name.startswith("file:")
    return None if in_memory else Path(name)


def _create(path: Path) -> None:
    """An empty database with MLflow's tables, unless another process is quicker."""
    if not os.access(path.parent, os.W_OK):
        path.open("xb").close()  # for the system's own reason
        path.unlink()
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-") as folder:
        aside, whole = Path(folder, "aside.db"), Path(folder, "whole.db")
        MlflowClient(tracking_uri=f"sqlite:///{aside}").search_experiments(max_results=1)
        # MLflow keeps its connections to the first file, so the second one is linked.
        with closing(sqlite3.connect(aside)) as made, closing(sqlite3.connect(whole)) as copy:
            made.backup(copy)
        with suppress(FileExistsError):
            os.link(whole, path)


def _wait_until_ready(path: Path) -> None:
    """Return once the tables are MLflow's current ones, or may only need `mlflow db upgrade`."""
    head = utils._get_latest_schema_revision()
    seen, since, said = _Schema.read(path), time.monotonic(), False
    while not seen.settled(head):
        if time.monotonic() - since > _STANDS_STILL_S:
            raise TrackingError(
                f"MLflow's database {path} is half made: the process that prepared it was killed. "
                "It holds no runs; delete it and give the same command again. Nothing was trained."
            )
        if not said:
            print(f"another process prepares {path.name}; waiting", file=sys.stderr, flush=True)
            said = True
        interrupt.check()
        time.sleep(0.1)
        now = _Schema.read(path)
        if (now.version, now.tables) != (seen.version, seen.tables):
            seen, since = now, time.monotonic()


class _Schema:
    """What is in a database.

    Attributes:
        version: Of MLflow's tables; empty: none, or it is locked.
        tables: Their names.
        runs: Whether there are any.
    """

    def __init__(self, version: str, tables: frozenset[str], runs: bool) -> None:
        self.version, self.tables, self.runs = version, tables, runs

    @classmethod
    def read(cls, path: Path) -> _Schema:
        """Look without changing anything.

        Raises:
            TrackingError: It is no SQLite database, or cannot be read.
        """
        try:
            with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as found:
                rows = found.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
                tables = frozenset(name for (name,) in rows)
                versions, runs = [], False
                if "alembic_version" in tables:
                    versions = found.execute("SELECT version_num FROM alembic_version").fetchall()
                if "runs" in tables:
                    runs = bool(found.execute("SELECT 1 FROM runs LIMIT 1").fetchall())
        except sqlite3.DatabaseError as error:
            if "locked" in str(error):
                return cls("", frozenset(), False)
            raise TrackingError(
                f"MLflow's database {path} cannot be read: {error}. Check the file, or set "
                "MLFLOW_TRACKING_URI. Nothing was trained."
            ) from error
        if tables - {"alembic_version"} and "experiments" not in tables:
            raise TrackingError(
                f"{path} is the database of something else than MLflow. Set MLFLOW_TRACKING_URI to "
                "a file of its own. Nothing was trained."
            )
        return cls(versions[0][0] if versions else "", tables, runs)

    def settled(self, head: str) -> bool:
        """Whether no other process is making these tables."""
        return self.version == head or self.runs or not self.tables
