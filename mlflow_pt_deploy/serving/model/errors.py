"""Errors of scoring as MLflow's, with HTTP status and code."""

from __future__ import annotations

import json
import logging

from mlflow.exceptions import MlflowException

from mlflow_pt_deploy.errors import DeadlineError, OverloadedError, RequestError

_logger = logging.getLogger(__name__)


class ScoringError(MlflowException):
    """An MLflow error whose body stays as it was written.

    MLflow's scoring server puts the caller's data in front of every message; of this error it sends
    the message alone.
    """

    def __init__(self, message: str, code: str = "INTERNAL_ERROR") -> None:
        from mlflow.protos.databricks_pb2 import ErrorCode

        super().__init__(message, error_code=ErrorCode.Value(code))
        self._body = json.dumps({"error_code": code, "message": message})

    @property
    def status(self) -> int:
        """The HTTP status."""
        return int(self.get_http_status_code())  # type: ignore[no-untyped-call]

    def serialize_as_json(self) -> str:
        """The body of the response."""
        return self._body


def scoring_error(error: Exception) -> ScoringError:
    """Any error as MLflow's, with the right code and nothing of the caller's data."""
    if isinstance(error, ScoringError):
        return error
    codes = {
        RequestError: "INVALID_PARAMETER_VALUE",
        OverloadedError: "RESOURCE_EXHAUSTED",
        DeadlineError: "DEADLINE_EXCEEDED",
    }
    for kind, code in codes.items():
        if isinstance(error, kind):
            return ScoringError(str(error), code)
    _logger.error("the model failed (%s)", type(error).__name__, exc_info=error)
    return ScoringError(
        "The model failed on this request; the server's log says why.", "INTERNAL_ERROR"
    )
