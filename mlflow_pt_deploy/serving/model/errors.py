"""Converts scoring errors to MLflow errors with HTTP status and code."""

from __future__ import annotations

import json
import logging

from mlflow.exceptions import MlflowException

from mlflow_pt_deploy.errors import DeadlineError, OverloadedError, RequestError

_logger = logging.getLogger(__name__)


class ScoringError(MlflowException):
    """An MLflow error whose HTTP body holds the message only.

    MLflow's scoring server prefixes the message of other errors with the request's data.
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
    """Convert any error to MLflow's, with its code and without client data."""
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
