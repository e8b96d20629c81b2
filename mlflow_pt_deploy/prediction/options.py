"""Options of batch prediction."""

from __future__ import annotations

from dataclasses import dataclass

from mlflow_pt_deploy.option_fields import option


@dataclass(frozen=True)
class PredictionOptions:
    """Options of ``pt-deploy predict`` and `predict_table`."""

    column: str = option("", "column of the texts or images; empty: text or image, by the model")
    top_k: int = option(1, "labels of each row, in descending order of their scores")
    strict: bool = option(False, "end at the first row that cannot be used")
    overwrite: bool = option(False, "replace an output that exists, once the new one is complete")
    restart: bool = option(False, "begin again instead of continuing an unfinished prediction")
