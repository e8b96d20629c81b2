"""The access log: one line of JSON a request, with nothing that a client wrote."""

from __future__ import annotations

import json
import sys
from typing import TextIO

from mlflow_pt_deploy.serving.http.mlflow_protocol import Answer
from mlflow_pt_deploy.serving.model.loaded_model import now


class AccessLog:
    """Writes to a stream, standard error unless told otherwise.

    A line holds the time, the route (never the path as given), the status, MLflow's error code,
    the version that answered and milliseconds; no address, no header, no text.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr

    def write(self, route: str, label: str, result: Answer, seconds: float) -> None:
        """Add a line.

        Args:
            route: A path that this server has, or ``-``.
            label: The version that answered, empty where none did.
            result: What was answered.
            seconds: How long it took.
        """
        line = {
            "time": now(),
            "route": route,
            "status": result.status,
            "error": result.error or None,
            "version": label or None,
            "ms": round(seconds * 1000, 3),
            "bytes": len(result.body),
        }
        self._stream.write(json.dumps(line) + "\n")
