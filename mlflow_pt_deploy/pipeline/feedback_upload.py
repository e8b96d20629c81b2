"""Send a file of labels to a running server, in batches."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mlflow_pt_deploy.data.tables.chunk import Chunk
from mlflow_pt_deploy.data.tables.readers import open_table
from mlflow_pt_deploy.errors import DataError, ServingError
from mlflow_pt_deploy.serving.http.auth import auth_from_environment, bearer
from mlflow_pt_deploy.system.progress import progress

if TYPE_CHECKING:
    import requests

BATCH = 500
_MAX_FAULTS = 5
_TRIES, _PAUSE_S, _TIMEOUT_S = 5, 1.0, 60.0

_Item = tuple[int, dict[str, Any]]
"""Number of a row in the file, and what is sent of it."""


@dataclass
class Sent:
    """What became of the labels of a file.

    Attributes:
        rows: Labels in the file.
        taken: Those that the server took.
        unknown: Those of rows that it does not remember.
        rejected: Those that are invalid.
        faults: Why the first of these are.
    """

    rows: int = 0
    taken: int = 0
    unknown: int = 0
    rejected: int = 0
    faults: list[str] = field(default_factory=list)

    def reject(self, row: int, reason: str) -> None:
        """Count an invalid label."""
        self.rejected += 1
        if len(self.faults) < _MAX_FAULTS:
            self.faults.append(f"row {row}: {reason}")


def send_feedback(file: str, url: str) -> Sent:
    """Send the labels of a file to ``POST /feedback``.

    Args:
        file: A table with the columns ``request_id``, ``label`` and optionally ``row``.
        url: Address of the server.

    Raises:
        DataError: The file cannot be read, or lacks a column.
        ServingError: The server does not answer, or takes no feedback.
    """
    import requests

    sent = Sent()
    table = open_table(file)
    try:
        _check_columns(file, table.names)
        with (
            requests.Session() as session,
            progress("feedback", table.total, table.unit) as bar,
        ):
            session.headers.update(bearer(auth_from_environment().scoring))
            position = 0
            while (chunk := table.read(BATCH)) is not None:
                sent.rows += len(chunk)
                if items := list(_items(chunk, sent)):
                    _send(session, url, items, sent)
                bar.update(table.position - position)
                position = table.position
    finally:
        table.close()
    return sent


def _check_columns(file: str, names: Sequence[str] | None) -> None:
    if missing := [name for name in ("request_id", "label") if names and name not in names]:
        raise DataError(
            f"{file} has no column {' and '.join(missing)}. Give request_id, label and, where a "
            "request had several rows, row."
        )


def _items(chunk: Chunk, sent: Sent) -> Iterator[_Item]:
    """The valid rows; the others are counted as rejected."""
    known: list[str] = [name for name in ("request_id", "row", "label") if name in chunk.names()]
    columns = {name: chunk.values(name) for name in known}
    for index in range(len(chunk)):
        number = chunk.first + index
        cells: dict[str, Any] = {name: values[index] for name, values in columns.items()}
        reason = chunk.faults.get(index) or _convert(cells)
        if reason:
            sent.reject(number, reason)
        else:
            yield number, cells


def _convert(cells: dict[str, Any]) -> str:
    """Convert cells to what the server takes; returns what is wrong with them."""
    row = cells.pop("row", None)
    if row not in (None, ""):
        if not str(row).isdecimal():
            return "row is not a whole number"
        cells["row"] = int(str(row))
    for name in ("request_id", "label"):
        if cells.get(name) in (None, ""):
            return f"{name} is missing"
        cells[name] = str(cells[name])
    return ""


def _send(session: requests.Session, url: str, items: Sequence[_Item], sent: Sent) -> None:
    """Send items; halves a batch that is rejected until the invalid items are alone."""
    answer = _post(session, url, [item for _, item in items])
    content: dict[str, Any] = answer.json()
    if answer.status_code == 200:
        sent.taken += content["taken"]
        sent.unknown += len(content["not_taken"])
    elif len(items) > 1:
        half = len(items) // 2
        _send(session, url, items[:half], sent)
        _send(session, url, items[half:], sent)
    else:
        sent.reject(items[0][0], content["message"].removeprefix("'feedback' item 0: "))


def _post(session: requests.Session, url: str, items: Sequence[Any]) -> requests.Response:
    """The answer to a batch: status 200 or 400.

    Raises:
        ServingError: It has another status, or there is none.
    """
    import requests

    reason = ""
    for attempt in range(_TRIES):
        time.sleep(_PAUSE_S if attempt else 0)
        try:
            answer = session.post(
                f"{url.rstrip('/')}/feedback", json={"feedback": list(items)}, timeout=_TIMEOUT_S
            )
            if answer.status_code in (200, 400):
                return answer
            reason = str(answer.json()["message"])
        except (requests.RequestException, ValueError, KeyError, TypeError) as error:
            raise ServingError(
                f"{url} does not answer as pt-deploy serve does ({type(error).__name__}). Give the "
                "address in its startup banner."
            ) from error
        if answer.status_code != 503:
            break
    raise ServingError(f"{url} took no feedback: {reason}")
