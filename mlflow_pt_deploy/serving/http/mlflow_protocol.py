"""MLflow's scoring protocol: request bodies to rows, predictions to a body."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

from mlflow_pt_deploy.serving.http.csv_parser import parse_csv
from mlflow_pt_deploy.serving.http.json_parser import parse_json
from mlflow_pt_deploy.serving.http.parquet_reader import ParquetReader
from mlflow_pt_deploy.serving.http.request import Headers
from mlflow_pt_deploy.serving.http.scoring_format import (
    JSON,
    BodyType,
    ScoringInput,
    UnsupportedMediaError,
    check_identity_encoding,
    check_rows,
)
from mlflow_pt_deploy.serving.model.explaining import check_explainable, wants_explanation
from mlflow_pt_deploy.serving.model.inputs import parse_rows

if TYPE_CHECKING:
    from mlflow_pt_deploy.serving.model.inference_service import InferenceService

CSV, PARQUET = "text/csv", "application/vnd.apache.parquet"

PARQUET_READER = ParquetReader()


class MlflowFormat:
    """JSON, CSV or Parquet in, ``{"predictions": [...]}`` out.

    Args:
        explain: Whether predictions get explanations although no parameter asks for them.
    """

    def __init__(self, *, explain: bool = False) -> None:
        self._explain = explain

    def body_type(self, headers: Headers) -> BodyType:
        """See `ScoringFormat`; the media type must be one of MLflow's, and UTF-8."""
        media, _, parameters = (headers.get("content-type") or "").partition(";")
        media = media.strip().lower()
        charset = "utf-8"
        for parameter in parameters.split(";"):
            name, _, value = parameter.partition("=")
            if name.strip().lower() == "charset":
                charset = value.strip().strip('"').lower()
        if media not in (JSON, CSV, PARQUET) or charset not in ("utf-8", "utf8"):
            raise UnsupportedMediaError(
                f"'Content-Type' must be {JSON}, {CSV} or {PARQUET}, and the text UTF-8"
            )
        if headers.get("content-encoding"):
            check_identity_encoding(headers)
        if media == PARQUET and not _has_pyarrow():
            raise UnsupportedMediaError(
                "this server cannot read Parquet: pyarrow is not installed; send JSON or CSV"
            )
        return BodyType(media)

    def parse(self, service: InferenceService, body: bytes, kind: BodyType) -> ScoringInput:
        """See `ScoringFormat`."""
        column = service.loaded.preprocessor.column
        if kind.media == JSON:
            data, params = parse_json(body, column)
        else:
            read = PARQUET_READER.read if kind.media == PARQUET else parse_csv
            data, params = read(body, column, service.options.queue_rows), None
        rows = parse_rows(data, column)
        check_rows(service, rows)
        explain = (bool(params) and wants_explanation(params)) or self._explain
        if explain:
            check_explainable(service.loaded.preprocessor.column, rows)
        return ScoringInput(rows, service.formatter.top_k(params), explain=explain)

    def write(self, texts: Sequence[str], found: ScoringInput, version: str) -> bytes:
        """See `ScoringFormat`."""
        return f'{{"predictions": [{", ".join(texts)}]}}'.encode()


@cache
def _has_pyarrow() -> bool:
    return find_spec("pyarrow") is not None
