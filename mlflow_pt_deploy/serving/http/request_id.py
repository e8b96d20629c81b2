"""Request ids: the client's ``X-Request-Id`` if it is well-formed, otherwise a new one."""

from __future__ import annotations

import re
import secrets
from itertools import count

from mlflow_pt_deploy.serving.http.request import Headers

_PLAIN = re.compile(r"[A-Za-z0-9._:-]{1,128}")


class RequestIds:
    """Generates ids that are unique across workers and restarts: random prefix and counter."""

    def __init__(self) -> None:
        self._prefix = secrets.token_hex(4)
        self._numbers = count(1)

    def of(self, headers: Headers) -> str:
        """The id of a request."""
        given = headers.get("x-request-id")
        if given is not None and _PLAIN.fullmatch(given):
            return given
        return f"{self._prefix}-{next(self._numbers):x}"
