"""Access log: a line per response; the only client data in it is the request id."""

from __future__ import annotations

import logging

from mlflow_pt_deploy.serving.http.response import Response

_logger = logging.getLogger("mlflow_pt_deploy.access")


class AccessLog:
    """Logs responses."""

    def write(self, route: str, response: Response, seconds: float, request_id: str) -> None:
        """Log one response.

        Args:
            route: A path of this server, or ``-``.
            response: What was sent.
            seconds: Headers read to response sent.
            request_id: The request's id.
        """
        _logger.info(
            "%s %d",
            route,
            response.status,
            extra={
                "fields": {
                    "route": route,
                    "status": response.status,
                    "error": response.error_code or None,
                    "version": response.model_version or None,
                    "ms": round(seconds * 1000, 3),
                    "bytes": len(response.body),
                    "request_id": request_id,
                }
            },
        )
