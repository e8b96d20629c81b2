"""The common request, a few texts as JSON: whether one is it, and what it says.

Whatever else a body may be, MLflow's own parser reads it, see `protocol`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

MOST_ROWS = 16
MOST_BYTES = 16 * 2**10
_MEDIA = (b"application/json", b"application/json; charset=utf-8")


def looks_short(headers: Mapping[bytes, bytes], body: bytes) -> bool:
    """Whether a request is worth a look at its body.

    Args:
        headers: Names in lower case.
        body: The whole of it.
    """
    return (
        len(body) <= MOST_BYTES
        and headers.get(b"content-type", b"").lower() in _MEDIA
        and b"content-encoding" not in headers
    )


def read_short(body: bytes, classes: int) -> tuple[list[str], int] | None:
    """Texts and `top_k`, at most `classes`; None: it is not the common request."""
    try:
        request = json.loads(body.decode())  # of bytes it would first guess their encoding
    except (ValueError, RecursionError):
        return None
    if not isinstance(request, dict) or not request.keys() <= {"inputs", "params"}:
        return None
    rows, params = request.get("inputs"), request.get("params")
    params = {} if params is None else params
    if not isinstance(rows, list) or not all(isinstance(row, str) for row in rows):
        return None
    if not isinstance(params, dict) or not params.keys() <= {"top_k"}:
        return None
    top_k = params.get("top_k", 1)
    if type(top_k) is not int or not 1 <= top_k <= classes:
        return None
    return (rows, top_k) if 0 < len(rows) <= MOST_ROWS else None
