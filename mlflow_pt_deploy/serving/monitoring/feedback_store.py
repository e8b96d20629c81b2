"""Served answers, and the labels that were sent for them, in an SQLite file of the run directory.

All workers of a server share it, so feedback may reach any of them. An answer is a request id, a
row, a version and a label; the row's text or image is not kept.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

from mlflow_pt_deploy.errors import RequestError

FILE = "feedback.db"
_LOCK_S = 5.0
_SCHEMA = """
PRAGMA journal_mode = WAL;
CREATE TABLE versions (
    id INTEGER PRIMARY KEY, model TEXT, version TEXT, labels TEXT, UNIQUE (model, version, labels)
);
CREATE TABLE answers (
    place INTEGER PRIMARY KEY, request_id TEXT, row INTEGER, version INTEGER, answered TEXT,
    at REAL, sent TEXT, UNIQUE (request_id, row)
);
CREATE TABLE judged (
    version INTEGER, answered TEXT, sent TEXT, rows INTEGER,
    PRIMARY KEY (version, answered, sent)
) WITHOUT ROWID;
"""


class Answers(NamedTuple):
    """What one request was answered.

    Attributes:
        request_id: Id of the request.
        model: Name of the model.
        version: Label of the version that answered.
        labels: Labels of this version.
        at: Seconds since 1970.
        answered: Best label of each row.
    """

    request_id: str
    model: str
    version: str
    labels: Sequence[str]
    at: float
    answered: Sequence[str]


class Feedback(NamedTuple):
    """The right label of a served row; `row` is None for the only row of a request."""

    request_id: str
    row: int | None
    label: str


class Judged(NamedTuple):
    """Number of rows that a version answered with one label and that were sent with another."""

    answered: str
    sent: str
    rows: int


def create_store(folder: Path) -> None:
    """Create the file, before there are workers: they would lock each other out."""
    with closing(sqlite3.connect(folder / FILE)) as connection:
        connection.executescript(_SCHEMA)


class FeedbackStore:
    """The file of one server; any thread may call its methods.

    Args:
        folder: Where `create_store` put it.
        most_rows: Answered rows that are remembered; older ones are dropped.
    """

    def __init__(self, folder: Path, most_rows: int) -> None:
        self._path = folder / FILE
        self._most_rows = most_rows

    def add(self, answers: Iterable[Answers]) -> None:
        """Remember answers; those of a request id that is used again replace the earlier ones.

        Raises:
            sqlite3.Error: The file cannot be written.
        """
        with self._transaction() as connection:
            connection.executemany(
                "INSERT OR REPLACE INTO answers (request_id, row, version, answered, at) "
                "VALUES (?, ?, ?, ?, ?)",
                _rows(connection, answers),
            )
            connection.execute(
                "DELETE FROM answers WHERE place <= (SELECT max(place) FROM answers) - ?",
                (self._most_rows,),
            )

    def judge(self, items: Sequence[Feedback]) -> list[bool]:
        """Count feedback; the last one of a row replaces earlier ones.

        Returns:
            For each item whether its row is remembered.

        Raises:
            RequestError: An item is invalid, see `_find`; nothing is counted.
            sqlite3.Error: The file cannot be written.
        """
        with self._transaction() as connection:
            return [_judge(connection, index, item) for index, item in enumerate(items)]

    def judged(self) -> dict[tuple[str, str], list[Judged]]:
        """Counts by model and version label.

        Raises:
            sqlite3.Error: The file cannot be read.
        """
        found: dict[tuple[str, str], list[Judged]] = {}
        with closing(self._connect()) as connection:
            for model, version, *counts in connection.execute(
                "SELECT model, versions.version, answered, sent, sum(rows) FROM judged "
                "JOIN versions ON id = judged.version WHERE rows > 0 "
                "GROUP BY model, versions.version, answered, sent ORDER BY answered, sent"
            ):
                found.setdefault((model, version), []).append(Judged(*counts))
        return found

    def _connect(self) -> sqlite3.Connection:
        # without the mode, a file that is gone would be created anew
        uri = f"{self._path.absolute().as_uri()}?mode=rw"
        connection = sqlite3.connect(uri, uri=True, timeout=_LOCK_S, isolation_level=None)
        # the file ends with the server, so it need not survive a power failure
        connection.execute("PRAGMA synchronous = OFF")
        return connection

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        with closing(self._connect()) as connection:
            connection.execute("BEGIN IMMEDIATE")
            yield connection  # closing without a commit rolls back
            connection.execute("COMMIT")


def _rows(connection: sqlite3.Connection, answers: Iterable[Answers]) -> list[tuple[object, ...]]:
    versions: dict[tuple[str, str], int] = {}
    found: list[tuple[object, ...]] = []
    for each in answers:
        key = each.model, each.version
        if key not in versions:
            versions[key] = _version(connection, each)
        found += [
            (each.request_id, row, versions[key], label, each.at)
            for row, label in enumerate(each.answered)
        ]
    return found


def _version(connection: sqlite3.Connection, answers: Answers) -> int:
    key = (answers.model, answers.version, json.dumps(list(answers.labels)))
    connection.execute(
        "INSERT OR IGNORE INTO versions (model, version, labels) VALUES (?, ?, ?)", key
    )
    (number,) = connection.execute(
        "SELECT id FROM versions WHERE (model, version, labels) = (?, ?, ?)", key
    ).fetchone()
    return int(number)


def _judge(connection: sqlite3.Connection, index: int, item: Feedback) -> bool:
    """Count one item; returns whether its row is remembered."""
    found = _find(connection, index, item)
    if found is None:
        return False
    place, version, answered, before = found

    def count(sent: str, change: int) -> None:
        connection.execute(
            "INSERT INTO judged VALUES (?, ?, ?, ?) "
            "ON CONFLICT DO UPDATE SET rows = rows + excluded.rows",
            (version, answered, sent, change),
        )

    if before is not None:
        count(before, -1)
    count(item.label, 1)
    connection.execute("UPDATE answers SET sent = ? WHERE place = ?", (item.label, place))
    return True


def _find(
    connection: sqlite3.Connection, index: int, item: Feedback
) -> tuple[int, int, str, str | None] | None:
    """Place, version, answered label and earlier feedback of an item's row, if it is remembered.

    Raises:
        RequestError: The row is missing and the request had several, or the label is not one of the
            model that answered; the message has the item's index.
    """
    rows = connection.execute(
        "SELECT place, answers.version, answered, sent, labels, row FROM answers "
        "JOIN versions ON id = answers.version WHERE request_id = ? ORDER BY row = ? DESC LIMIT 2",
        (item.request_id, item.row or 0),
    ).fetchall()
    if item.row is None and len(rows) > 1:
        raise RequestError(f"'feedback' item {index} has no 'row', and its request had several")
    if not rows or rows[0][5] != (item.row or 0):
        return None
    place, version, answered, before, labels, _ = rows[0]
    if item.label not in json.loads(labels):
        raise RequestError(
            f"'feedback' item {index}: 'label' is not a label of the model that answered"
        )
    return place, version, answered, before
