"""The model as MLflow calls it: setup, decode, predict, encode.

Works in a notebook, in batch scoring and inside the untouched `mlflow models serve`, where many
threads call `predict` at the same time and share one batcher. Here our errors become MLflow's.

Knows nothing of HTTP, and nothing of the runtime behind the variant.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from mlflow.exceptions import MlflowException

from mlflow_pt_deploy.errors import (
    DeadlineError,
    OverloadedError,
    RequestError,
    RowError,
)
from mlflow_pt_deploy.preprocess import Row
from mlflow_pt_deploy.serving.batcher import Batcher
from mlflow_pt_deploy.serving.labels import Labels
from mlflow_pt_deploy.serving.options import MODEL_CONFIG, Options
from mlflow_pt_deploy.serving.rows import read_rows
from mlflow_pt_deploy.serving.ticket import Caller
from mlflow_pt_deploy.serving.warmup import FEW, fastest_s, meet_shapes
from mlflow_pt_deploy.variants.base import Logits, pads_rows, streams_of
from mlflow_pt_deploy.variants.cascade import Stages

if TYPE_CHECKING:
    from mlflow.models import ModelSignature

    from mlflow_pt_deploy.variants.folder import LoadedVariant

__all__ = ["MODEL_CONFIG", "Options", "PyFunc", "ScoringError", "scoring_error", "signature"]

_logger = logging.getLogger(__name__)

# To hand rows to a thread and the answers back takes about 0.2 ms of two cores, and more where they
# have to be woken.
_QUICK_S = 0.5e-3

# An event loop serves nobody else while it scores.
MOST_AT_ONCE = 256


class ScoringError(MlflowException):
    """An MLflow error whose body stays as it was written.

    MLflow's scoring server puts the caller's data in front of every message before it answers;
    this one answers with the message it was made with.
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
        """The body of the answer."""
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


class PyFunc:
    """A loaded variant behind MLflow's ``predict``.

    Args:
        loaded: The variant, its preprocessor and its labels.
        model_config: Serving options; see `MODEL_CONFIG`.

    Attributes:
        labels: Writes the answers.
        quick: Whether a row takes less time than a thread would; known after `warm_up`.
        glances: Whether that is so of a cascade's fast model; see `glance`.

    Raises:
        ServingError: An option is wrong; names it.
    """

    def __init__(
        self, loaded: LoadedVariant, model_config: Mapping[str, Any] | None = None
    ) -> None:
        self.loaded = loaded
        self.options = Options.from_config(model_config)
        self.quick = self.glances = False
        self.labels = Labels(loaded.labels)
        self.setup()

    def setup(self) -> None:
        """Build the batcher that all callers share."""
        preprocessor = self.loaded.preprocessor
        self.batcher = Batcher(
            self.loaded.predict,
            preprocessor.collate,
            self.options,
            preprocessor.tokens,
            pads_rows(self.loaded.predict),
        )

    def warm_up(self) -> None:
        """Let the model meet a few shapes, so that the first callers do not pay for them.

        Raises:
            ServingError: An answer holds NaN or infinity; or whatever the model raises.
        """
        for sample in self.loaded.preprocessor.samples():
            for rows in {1, 4, min(16, self.options.max_batch_rows)}:
                self.labels.read(self.batcher.submit([sample] * rows, bounded=False))
        if self.loaded.preprocessor.column != "text":
            return
        # the longest sample, which comes last
        predict = self.loaded.predict
        models = predict.models if isinstance(predict, Stages) else (predict,)
        meet_shapes(models, self.loaded.preprocessor.collate([sample] * max(FEW)))
        if self.options.max_wait_ms:
            return
        self.quick = fastest_s(lambda: self.batcher.submit([sample], bounded=False)) < _QUICK_S
        single, streams = streams_of(predict)
        if streams > 1 and not self.quick:
            self.batcher.spread(single, streams)
        if isinstance(predict, Stages):
            self.glances = fastest_s(lambda: self.glance([sample])) < _QUICK_S

    @property
    def full(self) -> bool:
        """Whether no row that came now could be begun; see `Workers.full`."""
        return self.batcher.workers.full and not self.glances

    def brisk(self, rows: int) -> bool:
        """Whether an event loop had better score this many rows itself than hand them over."""
        if self.batcher.workers.busy or self.options.max_wait_ms or rows > MOST_AT_ONCE:
            return False
        return self.quick or 0 < rows * self.batcher.row_s < _QUICK_S

    def glance(self, encoded: Sequence[Any]) -> tuple[Logits, npt.NDArray[np.bool_]]:
        """What a cascade's fast model says of encoded rows, and of which it is not sure enough.

        Takes no turn in the batcher; where `glances` is true, an event loop may call it.
        """
        assert isinstance(self.loaded.predict, Stages)
        return self.loaded.predict.glance(self.loaded.preprocessor.collate(encoded))

    def score(self, rows: Sequence[Row]) -> Logits:
        """Logits of a few raw rows, float32 (rows, classes), without limits on time or queue.

        Raises:
            RowError: A row cannot be read; or whatever the model raises.
        """
        encoded = self.loaded.preprocessor.encode(rows)
        logits = self.batcher.at_once(encoded, keys=rows)
        if logits is None:
            logits = self.batcher.submit(encoded, keys=rows, bounded=False)
        return logits

    def decode(self, data: object) -> list[Row]:
        """Rows from whatever MLflow hands over; see `rows.read_rows`.

        Raises:
            RequestError: Names the field and the row, never the content.
        """
        return read_rows(data, self.loaded.preprocessor.column)

    def predict(
        self,
        data: object,
        params: Mapping[str, Any] | None = None,
        *,
        caller: Caller | None = None,
    ) -> list[Any]:
        """Score rows.

        Args:
            data: See `decode`.
            params: ``top_k``: how many labels a row, the best first.
            caller: Who waits for the answer, where a server knows it.

        Returns:
            A ``{"label", "score"}`` per row, in order, see `labels.Predictions`; with ``top_k``
            above 1 a list of them per row. The score is the softmax probability.

        Raises:
            MlflowException: 400 for a wrong request, 429 without room, 504 after the deadline,
                500 for a fault of the model's.
        """
        serving = _is_serving()
        try:
            top_k = self.labels.top_k(params)
            rows = self.decode(data)
            if serving and len(rows) > self.options.queue_rows:
                column = self.loaded.preprocessor.column
                raise RequestError(
                    f"'{column}' has {len(rows)} rows; one request may have "
                    f"{self.options.queue_rows} (queue_rows). Send several smaller requests."
                )
            answers: list[Any] = []
            size = self.loaded.preprocessor.slice_rows
            for start in range(0, len(rows), size):
                part = rows[start : start + size]
                logits = self.batcher.submit(
                    self._read(part, start), keys=part, bounded=serving, caller=caller
                )
                answers += self.labels.read(logits, top_k)
            return self.labels.as_predictions(answers) if top_k == 1 else answers
        except Exception as error:
            raise scoring_error(error) from error

    def get_raw_model(self) -> LoadedVariant:
        """What ``PyFuncModel.get_raw_model`` answers."""
        return self.loaded

    def _read(self, rows: Sequence[Row], start: int) -> Sequence[Any]:
        """Encoded rows; `start` is the number of the first in its request."""
        try:
            return self.loaded.preprocessor.encode(rows)
        except RowError as error:
            column = self.loaded.preprocessor.column
            raise RequestError(f"'{column}' row {start + error.row} {error.fault}") from error


def signature() -> ModelSignature:
    """The signature that lets every request format through: `top_k` and the answer, no inputs.

    Without it a row of base64 needs no type `binary` either: `rows.read_rows` reads it.
    With a declared input MLflow itself refuses some formats (a bare list in a notebook, or
    ``{"inputs": "a"}``), turns null into the text ``None``, repeats the caller's data in the
    answer where a column is missing, and takes five times as long (0.9 instead of 0.2 ms a
    request). `rows.read_rows` checks instead.
    """
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    return ModelSignature(
        outputs=Schema([ColSpec("string", "label"), ColSpec("double", "score")]),
        params=ParamSchema([ParamSpec("top_k", "long", 1)]),
    )


def _is_serving() -> bool:
    """Whether a scoring server runs in this process; it says so after it loaded the model."""
    from mlflow.environment_variables import _MLFLOW_IS_IN_SERVING_ENVIRONMENT

    return bool(_MLFLOW_IS_IN_SERVING_ENVIRONMENT.get())
