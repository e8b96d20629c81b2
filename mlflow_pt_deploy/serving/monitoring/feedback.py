"""Feedback: the right labels of served rows, sent later, and the live accuracy that they show.

The event loop appends answers to a bounded queue; the monitor's thread writes them once a second.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mlflow_pt_deploy.errors import RequestError
from mlflow_pt_deploy.evaluation.statistics import Estimate, proportion
from mlflow_pt_deploy.serving.http.json_parser import load_json
from mlflow_pt_deploy.serving.http.response import (
    RETRY_AFTER,
    Response,
    error_response,
    json_response,
)
from mlflow_pt_deploy.serving.lifecycle.served_model import ServedModel
from mlflow_pt_deploy.serving.model.outputs import best_label
from mlflow_pt_deploy.serving.model.version_counts import VersionCounts
from mlflow_pt_deploy.serving.monitoring.feedback_store import Answers, Feedback, FeedbackStore
from mlflow_pt_deploy.serving.monitoring.monitor import Duty, ServerCounts
from mlflow_pt_deploy.serving.observability.metrics import Metrics

MAX_ITEMS = 1000
"""Most labels in one request."""
MAX_QUEUED_ROWS = 100_000
"""Answered rows that wait to be written; further ones are dropped and counted."""

_FORM = '{"feedback": [{"request_id": "...", "row": 0, "label": "..."}]}'
_MAX_CHARACTERS = 1000

_logger = logging.getLogger(__name__)


class _Queued(NamedTuple):
    request_id: str
    model: str
    version: str
    at: float
    predictions: Sequence[str]


class FeedbackCollector(Duty):
    """Remembers answers and takes feedback on them; a duty of the monitor.

    Args:
        models: Models by name.
        store: Shared by all workers.
        metrics: Gets live accuracy, and the rows that were dropped.

    Attributes:
        store: See above.
    """

    def __init__(
        self, models: Mapping[str, ServedModel], store: FeedbackStore, metrics: Metrics
    ) -> None:
        self._models = models
        self.store = store
        self._metrics = metrics
        self._queue: deque[_Queued] = deque()
        self._queued_rows = self._written_rows = 0  # each is changed by one thread only
        self._dropped = self._reported = 0
        self._writing = threading.Lock()
        self._failed = False

    def remember(
        self, request_id: str, model: str, version: str, predictions: Sequence[str]
    ) -> None:
        """Queue the answer of a request; on the event loop.

        Args:
            request_id: Id of the request.
            model: Name of the model.
            version: Label of the version that answered.
            predictions: As JSON, one string per row.
        """
        if self._queued_rows - self._written_rows + len(predictions) > MAX_QUEUED_ROWS:
            self._dropped += len(predictions)
            return
        self._queued_rows += len(predictions)
        self._queue.append(_Queued(request_id, model, version, time.time(), predictions))

    def take(self, body: bytes) -> Response:
        """Answer ``POST /feedback``; on a thread."""
        try:
            items = parse_feedback(load_json(body))
            self._write()
            known = self.store.judge(items)
        except RequestError as error:
            return error_response(400, "INVALID_PARAMETER_VALUE", str(error))
        except sqlite3.Error as error:
            self._log(error)
            message = "feedback cannot be stored now; retry later"
            return error_response(503, "TEMPORARILY_UNAVAILABLE", message, RETRY_AFTER)
        missing = [index for index, found in enumerate(known) if not found]
        message = "no answer to this row is remembered; send it again if it is a second old"
        not_taken = [{"index": index, "status": 404, "message": message} for index in missing]
        return json_response({"taken": len(items) - len(missing), "not_taken": not_taken})

    def counts(self) -> dict[str, dict[str, VersionCounts]]:
        """Judged and correct rows of all workers, by model and version label."""
        found: dict[str, dict[str, VersionCounts]] = {}
        try:
            judged = self.store.judged()
        except sqlite3.Error as error:
            self._log(error)
            return found
        for (model, version), cells in judged.items():
            rows = sum(cell.rows for cell in cells)
            correct = sum(cell.rows for cell in cells if cell.answered == cell.sent)
            found.setdefault(model, {})[version] = VersionCounts(judged=rows, correct=correct)
        return found

    def status(self, model: str) -> dict[str, Any]:
        """Live accuracy by version, for ``/model``."""
        found = self.counts().get(model, {})
        return {version: _as_json(counts) for version, counts in found.items()}

    def follow(self) -> None:
        """Write what is queued."""
        try:
            self._write()
            self._failed = False
        except sqlite3.Error as error:
            self._log(error)

    def lead(self, counts: ServerCounts) -> None:
        """Publish live accuracy as metrics."""
        for model, versions in counts.items():
            for version, each in versions.items():
                if accuracy := live_accuracy(each):
                    self._metrics.judged(model, version, each.judged, accuracy)

    def _write(self) -> None:
        """Write what is queued.

        Raises:
            sqlite3.Error: It cannot be written; it is dropped.
        """
        with self._writing:
            queued = [self._queue.popleft() for _ in range(len(self._queue))]
            rows = sum(len(each.predictions) for each in queued)
            dropped = self._dropped - self._reported
            self._reported += dropped
            try:
                if queued:
                    self.store.add(self._answers(queued))
            except sqlite3.Error:
                dropped += rows
                raise
            finally:
                self._written_rows += rows
                if dropped:
                    self._metrics.answers_dropped(dropped)

    def _answers(self, queued: Sequence[_Queued]) -> list[Answers]:
        return [
            Answers(
                each.request_id,
                each.model,
                each.version,
                counted.labels,
                each.at,
                [best_label(prediction) for prediction in each.predictions],
            )
            for each in queued
            if (counted := self._models[each.model].counted.get(each.version))
        ]

    def _log(self, error: sqlite3.Error) -> None:
        if not self._failed:
            self._failed = True
            _logger.warning("answers cannot be stored for feedback: %s", error)


def parse_feedback(document: Any) -> list[Feedback]:
    """Check the body of ``POST /feedback``.

    Raises:
        RequestError: It is invalid; the message has the item's index and repeats no content.
    """
    items = document.get("feedback") if isinstance(document, dict) else None
    if not isinstance(items, list) or not items or len(document) > 1:
        raise RequestError(f"the body must be {_FORM}")
    if len(items) > MAX_ITEMS:
        raise RequestError(
            f"'feedback' has {len(items)} items; one request may have {MAX_ITEMS}. Send several "
            "smaller requests."
        )
    return [_parse_item(index, item) for index, item in enumerate(items)]


def live_accuracy(counts: VersionCounts) -> Estimate | None:
    """Share of judged rows that were answered correctly; None if none was judged."""
    return proportion(counts.correct, counts.judged) if counts.judged else None


def _parse_item(index: int, item: Any) -> Feedback:
    if not isinstance(item, dict) or item.keys() - {"request_id", "row", "label"}:
        raise RequestError(
            f"'feedback' item {index} must be an object with 'request_id', 'row' and 'label'"
        )
    for name in ("request_id", "label"):
        text = item.get(name)
        if not isinstance(text, str) or not 0 < len(text) <= _MAX_CHARACTERS or not _is_utf8(text):
            raise RequestError(
                f"'feedback' item {index}: '{name}' must be a text of 1 to {_MAX_CHARACTERS} "
                "characters"
            )
    row = item.get("row")
    if row is not None and (type(row) is not int or not 0 <= row < 2**31):
        raise RequestError(f"'feedback' item {index}: 'row' must be a whole number from 0")
    return Feedback(item["request_id"], row, item["label"])


def _is_utf8(text: str) -> bool:
    """Whether a text has no half of a surrogate pair, which JSON can express."""
    return text.encode("utf8", "ignore").decode() == text


def _as_json(counts: VersionCounts) -> dict[str, float]:
    found: dict[str, float] = {"judged_rows": counts.judged}
    if accuracy := live_accuracy(counts):
        names = ("accuracy", "accuracy_low", "accuracy_high")
        found |= {name: round(value, 4) for name, value in zip(names, accuracy, strict=True)}
    return found
