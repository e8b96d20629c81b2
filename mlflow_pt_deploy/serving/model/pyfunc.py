"""MLflow's interface of a model: ``predict`` and the signature."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mlflow_pt_deploy.model_config import ServingOptions
from mlflow_pt_deploy.serving.batching.request import RequestContext
from mlflow_pt_deploy.serving.model.errors import scoring_error
from mlflow_pt_deploy.serving.model.explaining import (
    PredictionExplainer,
    check_explainable,
    wants_explanation,
)
from mlflow_pt_deploy.serving.model.inference_service import InferenceService
from mlflow_pt_deploy.serving.model.inputs import parse_rows

if TYPE_CHECKING:
    from mlflow.models import ModelSignature

    from mlflow_pt_deploy.artifacts import LoadedVariant

__all__ = ["PtDeployPyFunc", "signature"]


class PtDeployPyFunc:
    """A loaded variant behind MLflow's ``predict``.

    Used in notebooks, in batch scoring and in the stock `mlflow models serve`, where many threads
    call `predict` concurrently and share one micro-batcher.

    Args:
        loaded: The variant with its preprocessor and labels.
        model_config: Serving options; see `MODEL_CONFIG`.

    Attributes:
        service: Scores the rows.
        explainer: Explains predictions.

    Raises:
        ServingError: An option is invalid; the message names it.
        VariantError: The option `explain_method` is not possible with this variant.
    """

    def __init__(
        self, loaded: LoadedVariant, model_config: Mapping[str, Any] | None = None
    ) -> None:
        self.loaded = loaded
        self.options = ServingOptions.from_config(model_config)
        self.service = InferenceService(loaded, self.options)
        self.explainer = PredictionExplainer(self.service)

    def warm_up(self) -> None:
        """See `InferenceService.warm_up`."""
        self.service.warm_up()

    def predict(self, data: object, params: Mapping[str, Any] | None = None) -> list[Any]:
        """Score rows.

        Args:
            data: See `inputs.parse_rows`.
            params: ``top_k``: labels per row, in descending order. ``explain``: whether the best
                label of each row gets an explanation.

        Returns:
            A ``{"label", "score"}`` per row, in order, see `outputs.Predictions`; with `top_k`
            above 1 a list of them per row. The score is the softmax probability.

        Raises:
            MlflowException: 400 for an invalid request, 429 if the queue is full, 503 if the
                device has no memory for a row, 504 after the deadline, 500 for an error of the
                model.
        """
        serving = _is_serving()
        try:
            formatter, column = self.service.formatter, self.loaded.preprocessor.column
            top_k, explain = formatter.top_k(params), wants_explanation(params)
            rows = parse_rows(data, column)
            if serving:
                self.service.check_row_count(len(rows))
            if explain:
                check_explainable(column, rows if serving else ())
            objects: list[Any] = []
            for logits in self.service.predict(rows, bounded=serving):
                objects += formatter.to_objects(logits, top_k)
            if explain:
                context = RequestContext(self._expires_at() if serving else None)
                self.explainer.explain(rows, objects, context, bounded=serving)
            return formatter.as_predictions(objects) if top_k == 1 else objects
        except Exception as error:
            from mlflow_pt_deploy.serving.model.mlflow_error import MlflowScoringError

            raise MlflowScoringError(scoring_error(error)) from error

    def _expires_at(self) -> float | None:
        """The deadline of an explanation that begins now."""
        seconds = self.options.deadline_ms / 1000
        return time.monotonic() + seconds if seconds else None

    def get_raw_model(self) -> LoadedVariant:
        """The result of ``PyFuncModel.get_raw_model``."""
        return self.loaded


def signature() -> ModelSignature:
    """The model signature: outputs and parameters, no inputs, so that MLflow passes all formats on.

    With a declared column MLflow drops a second text column, so that a pair is scored by half;
    rejects plain lists; repeats client data in the error for a missing column; and takes 0.9
    instead of 0.2 ms per request. With a declared input without a name it rejects
    ``{"inputs": {"text": [...]}}`` and scores null as the text ``None``.
    `inputs.parse_rows` checks rows instead, and decodes base64 without the type `binary`. What to
    send is shown by the input example of the logged model.
    """
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema

    return ModelSignature(
        outputs=Schema([ColSpec("string", "label"), ColSpec("double", "score")]),
        params=ParamSchema([ParamSpec("top_k", "long", 1), ParamSpec("explain", "boolean", False)]),
    )


def _is_serving() -> bool:
    """Whether a scoring server runs in this process; the variable is set after the model loads."""
    from mlflow.environment_variables import _MLFLOW_IS_IN_SERVING_ENVIRONMENT

    return bool(_MLFLOW_IS_IN_SERVING_ENVIRONMENT.get())
