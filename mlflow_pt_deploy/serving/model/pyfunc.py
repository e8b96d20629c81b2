"""The model as MLflow calls it: ``predict``, and the signature."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mlflow_pt_deploy.errors import RequestError
from mlflow_pt_deploy.model_config import ServingOptions
from mlflow_pt_deploy.serving.model.errors import scoring_error
from mlflow_pt_deploy.serving.model.inference_service import InferenceService
from mlflow_pt_deploy.serving.model.inputs import read_rows

if TYPE_CHECKING:
    from mlflow.models import ModelSignature

    from mlflow_pt_deploy.artifacts import LoadedVariant

__all__ = ["PtDeployPyFunc", "signature"]


class PtDeployPyFunc:
    """A loaded variant behind MLflow's ``predict``.

    Works in a notebook, in batch scoring and inside the stock `mlflow models serve`, where many
    threads call `predict` at the same time and share one micro-batcher.

    Args:
        loaded: The variant, its preprocessor and its labels.
        model_config: Serving options; see `MODEL_CONFIG`.

    Attributes:
        service: Scores the rows.

    Raises:
        ServingError: An option is wrong; names it.
    """

    def __init__(
        self, loaded: LoadedVariant, model_config: Mapping[str, Any] | None = None
    ) -> None:
        self.loaded = loaded
        self.options = ServingOptions.from_config(model_config)
        self.service = InferenceService(loaded, self.options)

    def warm_up(self) -> None:
        """See `InferenceService.warm_up`."""
        self.service.warm_up()

    def predict(self, data: object, params: Mapping[str, Any] | None = None) -> list[Any]:
        """Score rows.

        Args:
            data: See `inputs.read_rows`.
            params: ``top_k``: how many labels a row, the best first.

        Returns:
            A ``{"label", "score"}`` per row, in order, see `outputs.Predictions`; with `top_k`
            above 1 a list of them per row. The score is the softmax probability.

        Raises:
            MlflowException: 400 for a wrong request, 429 if the queue is full, 504 after the
                deadline, 500 for a fault of the model.
        """
        serving = _is_serving()
        column = self.loaded.preprocessor.column
        try:
            top_k = self.service.formatter.top_k(params)
            rows = read_rows(data, column)
            if serving and len(rows) > self.options.queue_rows:
                raise RequestError(
                    f"'{column}' has {len(rows)} rows; one request may have "
                    f"{self.options.queue_rows} (queue_rows). Send several smaller requests."
                )
            answers: list[Any] = []
            for logits in self.service.predict(rows, bounded=serving):
                answers += self.service.formatter.to_objects(logits, top_k)
            formatter = self.service.formatter
            return formatter.as_predictions(answers) if top_k == 1 else answers
        except Exception as error:
            raise scoring_error(error) from error

    def get_raw_model(self) -> LoadedVariant:
        """What ``PyFuncModel.get_raw_model`` returns."""
        return self.loaded


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
