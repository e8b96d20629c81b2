"""What the scoring protocols share: their interface, limits of rows, errors as responses.

A protocol is a parser of the body and a writer of the response; everything between them is the
application's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from mlflow_pt_deploy.errors import RequestError
from mlflow_pt_deploy.preprocessing import Row
from mlflow_pt_deploy.serving.batching.request import Encoded
from mlflow_pt_deploy.serving.http.request import Headers
from mlflow_pt_deploy.serving.http.response import RETRY_AFTER, Response
from mlflow_pt_deploy.serving.model.errors import scoring_error

if TYPE_CHECKING:
    from mlflow_pt_deploy.serving.model.inference_service import InferenceService

JSON = "application/json"

MAX_TEXT_CHARS = 100_000
"""Longest text. Tokenizing takes time in proportion, even if the model truncates to 128 tokens."""

MAX_INLINE_BYTES = 16 * 2**10
"""Longer bodies are parsed and encoded on a thread, so that they do not block the event loop."""


class UnsupportedMediaError(RequestError):
    """The content type or encoding is not part of the protocol."""


class BodyType(NamedTuple):
    """What the headers say about a body.

    Attributes:
        media: Media type.
        json_bytes: Length of the JSON part, which binary data follow; None: there are none.
    """

    media: str
    json_bytes: int | None = None


class ScoringInput(NamedTuple):
    """What a request wants.

    Attributes:
        rows: Raw rows.
        top_k: Labels per row.
        encoded: The encoded rows, see `InferenceService.encode_missing`; None until then.
        wanted: What else the protocol's `write` needs.
        explain: Whether each prediction gets an explanation.
    """

    rows: list[Row]
    top_k: int
    encoded: list[Encoded | None] | None = None
    wanted: Any = None
    explain: bool = False


class ScoringFormat(Protocol):
    """A scoring protocol."""

    def body_type(self, headers: Headers) -> BodyType:
        """Read the headers.

        Raises:
            UnsupportedMediaError: The content type or encoding is not part of the protocol.
        """

    def parse(self, service: InferenceService, body: bytes, kind: BodyType) -> ScoringInput:
        """Parse a body into rows and parameters.

        Raises:
            RequestError: The body is wrong. The message names the field and the row, not the
                content.
        """

    def write(self, texts: Sequence[str], found: ScoringInput, version: str) -> bytes:
        """The body of the response.

        Args:
            texts: A prediction per row as JSON, see `InferenceService.submit`.
            found: What the request wanted.
            version: Label of the version that computed them.
        """


def parse_and_encode(
    protocol: ScoringFormat, service: InferenceService, body: bytes, kind: BodyType
) -> ScoringInput:
    """`ScoringFormat.parse`, then encode the rows that are not cached; runs on a thread.

    Raises:
        RequestError: See `ScoringFormat.parse`.
    """
    found = protocol.parse(service, body, kind)
    return found._replace(encoded=service.encode_missing(found.rows, found.top_k))


def check_identity_encoding(headers: Headers) -> None:
    """Reject compressed bodies.

    Raises:
        UnsupportedMediaError: The body is compressed.
    """
    if (headers.get("content-encoding") or "identity").lower() != "identity":
        raise UnsupportedMediaError(
            "'Content-Encoding' is not supported; send the body uncompressed"
        )


def check_rows(service: InferenceService, rows: Sequence[Row]) -> None:
    """Reject requests with too many rows, or with a text that is too long.

    Raises:
        RequestError: There are more than `queue_rows`, or one has more than `MAX_TEXT_CHARS`.
    """
    if len(rows) > service.options.queue_rows:  # a call less for nearly all requests
        service.check_row_count(len(rows))
    for number, row in enumerate(rows):
        if isinstance(row, str) and len(row) > MAX_TEXT_CHARS:
            raise RequestError(
                f"'{service.loaded.preprocessor.column}' row {number} has {len(row)} characters; "
                f"a text may have {MAX_TEXT_CHARS}. Shorten it."
            )


def error_to_response(error: Exception, model_version: str) -> Response:
    """Convert any error to a response without client data."""
    known = scoring_error(error)
    unsupported = isinstance(error, UnsupportedMediaError)
    status = 415 if unsupported else known.status
    headers = (RETRY_AFTER,) if status in (429, 503) else ()
    if unsupported:
        headers = (("accept-encoding", "identity"),)
    return Response(status, known.body.encode(), known.code, headers, model_version=model_version)
