"""Scoring errors as they are answered: status, MLflow's error code, no client data."""

from __future__ import annotations

import json
import logging
from typing import NamedTuple

from mlflow_pt_deploy.errors import (
    DeadlineError,
    DeviceLostError,
    DeviceMemoryError,
    OverloadedError,
    RequestError,
)

_logger = logging.getLogger(__name__)

_INTERNAL = "INTERNAL_ERROR"
_STATUSES = {
    "INVALID_PARAMETER_VALUE": 400,
    "RESOURCE_EXHAUSTED": 429,
    _INTERNAL: 500,
    "TEMPORARILY_UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}


class ScoringError(NamedTuple):
    """An error as it is answered.

    Attributes:
        code: MLflow's error code.
        message: For the client.
    """

    code: str
    message: str

    @property
    def status(self) -> int:
        """The HTTP status that belongs to the code."""
        return _STATUSES[self.code]

    @property
    def body(self) -> str:
        """The body of the response, in MLflow's form."""
        return json.dumps({"error_code": self.code, "message": self.message})


def scoring_error(error: Exception) -> ScoringError:
    """Convert any error; an unexpected one is logged."""
    codes = {
        RequestError: "INVALID_PARAMETER_VALUE",
        OverloadedError: "RESOURCE_EXHAUSTED",
        DeviceMemoryError: "TEMPORARILY_UNAVAILABLE",
        DeviceLostError: "TEMPORARILY_UNAVAILABLE",
        DeadlineError: "DEADLINE_EXCEEDED",
    }
    for kind, code in codes.items():
        if isinstance(error, kind):
            return ScoringError(code, str(error))
    _logger.error("the model failed (%s)", type(error).__name__, exc_info=error)
    return ScoringError(_INTERNAL, "The model failed on this request; the server's log says why.")
