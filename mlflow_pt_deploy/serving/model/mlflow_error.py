"""A scoring error as MLflow's exception, for `PtDeployPyFunc.predict`."""

from __future__ import annotations

from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import ErrorCode

from mlflow_pt_deploy.serving.model.errors import ScoringError


class MlflowScoringError(MlflowException):
    """An MLflow error whose HTTP body holds the message only.

    MLflow's scoring server prefixes the message of other errors with the request's data.
    """

    def __init__(self, error: ScoringError) -> None:
        super().__init__(error.message, error_code=ErrorCode.Value(error.code))
        self._body = error.body

    def serialize_as_json(self) -> str:
        """The body of the response."""
        return self._body
