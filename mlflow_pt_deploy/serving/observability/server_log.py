"""Server log on standard error: one format, as text or as JSON.

2026-11-27T22:44:03+00:00 INFO replica=0 shop: version 4 was activated
{"time": "...", "level": "INFO", "replica": 0, "message": "..."}
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

TEXT, JSON = "text", "json"

# Lines per message template and minute. Any client can cause a message with each request.
_MAX_PER_MINUTE = 60


class Formatter(logging.Formatter):
    """Formats all lines alike.

    Args:
        style: `TEXT` or `JSON`.
        replica: Index of this worker; None in the main process and if there is one worker.
    """

    def __init__(self, style: str, replica: int | None = None) -> None:
        super().__init__()
        self._as_json = style == JSON
        self._replica = replica

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
        }
        if self._replica is not None:
            line["replica"] = self._replica
        line |= getattr(record, "fields", {})
        line["message"] = record.getMessage()
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        if self._as_json:
            return json.dumps(line)
        words = [line.pop("time"), line.pop("level")]
        message, trace = line.pop("message"), line.pop("traceback", "")
        words += [f"{name}={value}" for name, value in line.items() if value is not None]
        return " ".join([*words, message]) + (f"\n{trace}" if trace else "")


class RateLimit(logging.Filter):
    """Passes `_MAX_PER_MINUTE` records per message template and minute."""

    def __init__(self) -> None:
        super().__init__()
        self._minute = 0
        self._counts: dict[str, int] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.name.endswith(".access"):
            return True
        minute = int(time.monotonic() // 60)
        if minute != self._minute:
            self._minute, self._counts = minute, {}
        count = self._counts[record.msg] = self._counts.get(record.msg, 0) + 1
        if count == _MAX_PER_MINUTE:
            record.msg = f"{record.msg} (repeated {count} times; silenced for this minute)"
        return count <= _MAX_PER_MINUTE


def configure_log(style: str = TEXT, replica: int | None = None) -> logging.Handler:
    """Log to standard error.

    Args:
        style, replica: See `Formatter`.
    """
    logger = logging.getLogger("mlflow_pt_deploy")
    for handler in list(logger.handlers):
        if isinstance(handler.formatter, Formatter):  # of the main process, inherited by a fork
            logger.removeHandler(handler)
    handler = logging.StreamHandler()
    handler.setFormatter(Formatter(style, replica))
    handler.addFilter(RateLimit())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    return handler


def log_granian() -> None:
    """Send granian's messages to our handlers; call it after granian set up its own."""
    granian = logging.getLogger("_granian")
    granian.handlers = list(logging.getLogger("mlflow_pt_deploy").handlers)
    granian.propagate = not granian.handlers


@contextmanager
def server_log(style: str = TEXT) -> Iterator[None]:
    """Log to standard error, unless the embedding program has set up logging."""
    logger = logging.getLogger("mlflow_pt_deploy")
    if logging.getLogger().handlers or logger.handlers:
        yield
        return
    handler = configure_log(style)
    try:
        yield
    finally:
        logger.removeHandler(handler)
