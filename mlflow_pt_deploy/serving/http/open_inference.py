"""The Open Inference Protocol (V2) over REST: tensors to rows, predictions to tensors.

Specification: https://github.com/kserve/open-inference-protocol. Of the binary tensor extension
inputs are read; responses are always JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from mlflow_pt_deploy.errors import RequestError
from mlflow_pt_deploy.preprocessing import Row
from mlflow_pt_deploy.serving.http.json_parser import load_json
from mlflow_pt_deploy.serving.http.request import Headers
from mlflow_pt_deploy.serving.http.response import Response
from mlflow_pt_deploy.serving.http.scoring_format import (
    JSON,
    BodyType,
    ScoringInput,
    UnsupportedMediaError,
    check_identity_encoding,
    check_rows,
)
from mlflow_pt_deploy.serving.model.explaining import wants_explanation
from mlflow_pt_deploy.serving.model.inputs import parse_rows

if TYPE_CHECKING:
    from mlflow_pt_deploy.serving.model.inference_service import InferenceService

ROOT, MODELS = "/v2", "/v2/models/"
JSON_LENGTH_HEADER = "inference-header-content-length"
INPUT_NAMES = ("input-0", "INPUT0")
"""Names that the tensor may have besides the model's column: those of KServe's and Triton's
examples."""
OUTPUTS = {"label": "BYTES", "score": "FP64"}
"""Output tensors and their datatypes."""

_OCTETS = "application/octet-stream"
_SIZE_BYTES = 4
_VERSIONED = re.compile(r"(/v2/models/[^/]+)/versions/([^/]+)(/ready|/infer)?")


class Wanted(NamedTuple):
    """What the response must hold.

    Attributes:
        id: The request's id; None if it has none.
        outputs: Names of the output tensors.
        width: Labels per row, if the request asks for them; None: the tensors are flat.
    """

    id: str | None
    outputs: tuple[str, ...]
    width: int | None


class OpenInferenceFormat:
    """One tensor of texts or images in, tensors ``label`` and ``score`` out.

    Args:
        model: Name of the model.
    """

    def __init__(self, model: str) -> None:
        self._model = model

    def body_type(self, headers: Headers) -> BodyType:
        """See `ScoringFormat`; clients send no content type with binary data."""
        media = (headers.get("content-type") or JSON).partition(";")[0].strip().lower()
        if media not in (JSON, _OCTETS):
            raise UnsupportedMediaError(f"'Content-Type' must be {JSON} or {_OCTETS}, or absent")
        check_identity_encoding(headers)
        length = headers.get(JSON_LENGTH_HEADER)
        if length is None:
            return BodyType(JSON)
        if not (length.isascii() and length.isdecimal() and len(length) < 16):
            raise RequestError(f"'{JSON_LENGTH_HEADER}' must be a number of bytes")
        return BodyType(JSON, int(length))

    def parse(self, service: InferenceService, body: bytes, kind: BodyType) -> ScoringInput:
        """See `ScoringFormat`."""
        column = service.loaded.preprocessor.column
        length = len(body) if kind.json_bytes is None else kind.json_bytes
        if length > len(body):
            raise RequestError(f"'{JSON_LENGTH_HEADER}' is more than the length of the body")
        request = load_json(body[:length])
        if not isinstance(request, dict):
            raise RequestError("the body must be an object with 'inputs', a list of one tensor")
        tensor = _only_tensor(request.get("inputs"), column)
        count = _row_count(tensor, column)
        service.check_row_count(count)
        rows = _rows(tensor, count, memoryview(body)[length:], column)
        check_rows(service, rows)
        params = _object(request, "parameters")
        if wants_explanation(params):
            raise RequestError(
                "'explain' is not part of this protocol; POST the rows to /models/NAME/explain"
            )
        top_k = service.formatter.top_k(params)
        return ScoringInput(rows, top_k, wanted=_wanted(request, params, top_k))

    def write(self, texts: Sequence[str], found: ScoringInput, version: str) -> bytes:
        """See `ScoringFormat`."""
        wanted: Wanted = found.wanted
        predictions = json.loads(f"[{','.join(texts)}]")
        shape = [len(predictions)]
        if wanted.width is not None:
            shape.append(wanted.width)
            predictions = [
                each for row in predictions for each in (row if type(row) is list else [row])
            ]
        outputs = [
            {
                "name": name,
                "shape": shape,
                "datatype": OUTPUTS[name],
                "data": [each[name] for each in predictions],
            }
            for name in wanted.outputs
        ]
        response: dict[str, Any] = {"model_name": self._model, "model_version": version}
        if wanted.id is not None:
            response["id"] = wanted.id
        return json.dumps(response | {"outputs": outputs}).encode()


def split_version(path: str) -> tuple[str, str]:
    """Split ``/versions/V`` off the path of a model; the version is empty if there is none."""
    found = _VERSIONED.fullmatch(path)
    return (found[1] + (found[3] or ""), found[2]) if found else (path, "")


def is_open_inference(path: str) -> bool:
    """Whether a path belongs to this protocol."""
    return path == ROOT or path.startswith(f"{ROOT}/")


def as_error(response: Response) -> Response:
    """The same error in this protocol's form, ``{"error": ...}``."""
    content = json.loads(response.body)
    if "message" not in content:
        return response
    return response._replace(body=json.dumps({"error": content["message"]}).encode())


def server_metadata() -> dict[str, Any]:
    """Name and version of this server."""
    from mlflow_pt_deploy._version import __version__

    return {"name": "pt-deploy", "version": __version__, "extensions": []}


def model_metadata(name: str, versions: Sequence[str], runtime: str, column: str) -> dict[str, Any]:
    """Tensors of a model.

    Args:
        name: Name of the model.
        versions: Labels of the versions that serve.
        runtime: Runtime of the variant.
        column: Column that the model reads.
    """
    return {
        "name": name,
        "versions": list(versions),
        "platform": f"pt-deploy_{runtime}",
        "inputs": [_metadata(column, "BYTES")],
        "outputs": [_metadata(*output) for output in OUTPUTS.items()],
    }


def _metadata(name: str, datatype: str) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": [-1]}


def _object(owner: Mapping[str, Any], field: str) -> Mapping[str, Any]:
    """A field that holds an object; empty if it is absent."""
    value = owner.get(field)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise RequestError(f"'{field}' must be an object")
    return value


def _only_tensor(inputs: Any, column: str) -> Mapping[str, Any]:
    """The one input tensor; its name and datatype are checked."""
    if not isinstance(inputs, list) or not all(isinstance(each, dict) for each in inputs):
        raise RequestError("'inputs' must be a list of one tensor")
    if len(inputs) != 1:
        raise RequestError(f"'inputs' has {len(inputs)} tensors; the model reads one, '{column}'")
    tensor: Mapping[str, Any] = inputs[0]
    if tensor.get("name") not in (column, *INPUT_NAMES):
        raise RequestError(f"the input tensor must be named '{column}'")
    if tensor.get("datatype") != "BYTES":
        raise RequestError(f"the datatype of '{column}' must be BYTES")
    return tensor


def _row_count(tensor: Mapping[str, Any], column: str) -> int:
    """Rows of a tensor by its shape, [N] or [N, 1]."""
    shape = tensor.get("shape")
    whole = isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape)
    if not whole or len(shape) not in (1, 2) or shape[1:] not in ([], [1]):  # type: ignore[arg-type,index]
        raise RequestError(f"the shape of '{column}' must be [N] or [N, 1], N texts or images")
    count: int = shape[0]  # type: ignore[index]
    return count


def _rows(tensor: Mapping[str, Any], count: int, binary: memoryview, column: str) -> list[Row]:
    """The rows of a tensor, from JSON or from the binary data after it."""
    size = _object(tensor, "parameters").get("binary_data_size")
    if size is None:
        if binary:
            raise RequestError(
                f"bytes follow the JSON, but '{column}' has no parameter 'binary_data_size'"
            )
        return parse_rows(_listed(tensor, count, column), column)
    if type(size) is not int or size != len(binary) or "data" in tensor:
        raise RequestError(
            f"'binary_data_size' of '{column}' must be the number of bytes after the JSON, "
            f"whose length is in '{JSON_LENGTH_HEADER}', and instead of 'data'"
        )
    elements = _elements(binary, count, column)
    if column == "text":
        return parse_rows(_decoded(elements), column)
    return parse_rows(elements, column)


def _listed(tensor: Mapping[str, Any], count: int, column: str) -> list[Any]:
    """The elements of ``data``, flat or nested as the shape [N, 1]."""
    data = tensor.get("data")
    if not isinstance(data, list) or len(data) != count:
        raise RequestError(
            f"'data' of '{column}' must be a list of as many elements as its shape says"
        )
    if any(isinstance(each, dict) for each in data):
        raise RequestError(f"'data' of '{column}' must hold strings only")
    return data


def _elements(binary: memoryview, count: int, column: str) -> list[bytes]:
    """Split binary data: each element follows its length, four bytes, little-endian."""
    elements: list[bytes] = []
    at = 0
    while at < len(binary) and len(elements) < count:
        start = at + _SIZE_BYTES
        at = start + int.from_bytes(binary[at:start], "little")
        if at > len(binary):
            break
        elements.append(bytes(binary[start:at]))
    if at != len(binary) or len(elements) != count:
        raise RequestError(
            f"the binary data of '{column}' must be as many elements as its shape says, each "
            "after its length in four bytes, little-endian"
        )
    return elements


def _decoded(elements: Sequence[bytes]) -> list[str]:
    texts: list[str] = []
    try:
        for each in elements:
            texts.append(each.decode())
    except UnicodeDecodeError as error:
        raise RequestError(f"'text' row {len(texts)} is not UTF-8; texts must be") from error
    return texts


def _wanted(request: Mapping[str, Any], params: Mapping[str, Any], top_k: int) -> Wanted:
    given = request.get("id")
    if given is not None and not isinstance(given, str):
        raise RequestError("'id' must be a string")
    listed = request.get("outputs") or []
    known = isinstance(listed, list) and all(
        isinstance(each, dict) and each.get("name") in tuple(OUTPUTS) for each in listed
    )
    if not known:
        raise RequestError(f"'outputs' must be a list of tensors named {' or '.join(OUTPUTS)}")
    names = dict.fromkeys(each["name"] for each in listed) or OUTPUTS
    return Wanted(given, tuple(names), None if params.get("top_k") is None else top_k)
