"""Requests that are rejected before their body is parsed."""

from __future__ import annotations

from mlflow_pt_deploy.serving.http.response import Response, error_response


class Rejection(Exception):
    """A request is rejected before its body is parsed.

    Args:
        response: The response. The rest of the body is read and dropped before it is sent: a proxy
            such as nginx treats an earlier response as a failure of the server.
    """

    def __init__(self, response: Response) -> None:
        super().__init__(response.error_code)
        self.response = response


def not_allowed(allowed: str) -> Response:
    """The response to a method that a path does not take; `allowed`: the methods it takes."""
    message = f"this path takes {allowed}"
    return error_response(405, "INVALID_PARAMETER_VALUE", message, ("allow", allowed))


def unauthorized(token: str) -> Response:
    """The response to a wrong token; `token`: the kind that is needed."""
    message = f"send {token}: Authorization: Bearer ..."
    return error_response(401, "UNAUTHENTICATED", message, ("www-authenticate", "Bearer"))
