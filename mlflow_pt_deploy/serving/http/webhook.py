"""Receives webhooks of MLflow's registry: checks that MLflow sent them, and uses nothing they say.

MLflow signs ``DELIVERY_ID.TIMESTAMP.BODY`` with HMAC-SHA256 and the webhook's secret:
https://mlflow.org/docs/latest/ml/webhooks/
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import time
from collections.abc import Callable, Sequence

from mlflow_pt_deploy.serving.http.request import (
    BODY_TIMEOUT_S,
    BodyTooLongError,
    DisconnectedError,
    Headers,
    Request,
)
from mlflow_pt_deploy.serving.http.response import (
    CLIENT_DISCONNECTED,
    Response,
    error_response,
    json_response,
)

WEBHOOK_PATH = "/webhook"
WEBHOOK_ENV = "PT_DEPLOY_WEBHOOK_SECRET"
MAX_AGE_S = 300
"""Most seconds between the timestamp of a delivery and this machine's clock."""
MAX_BYTES = 256 * 2**10
"""Longest body; a new version with its description and tags takes a few KB."""

_ENTITIES = ("registered_model", "model_version", "model_version_tag", "model_version_alias")
_SIGNATURE, _DELIVERY, _TIMESTAMP = (
    "x-mlflow-signature",
    "x-mlflow-delivery-id",
    "x-mlflow-timestamp",
)


class WebhookReceiver:
    """Answers deliveries of MLflow's webhooks.

    Args:
        secrets: Secrets of the webhook; several while they are rotated.
        on_change: Called on a thread for each genuine delivery.
        clock: Seconds since 1970.

    Attributes:
        path: Where it is found.
    """

    path = WEBHOOK_PATH

    def __init__(
        self,
        secrets: Sequence[bytes],
        on_change: Callable[[], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._secrets = secrets
        self._on_change = on_change
        self._clock = clock
        self._seen: dict[str, float] = {}

    async def answer(self, request: Request) -> Response:
        """Check a delivery and report that the registry has changed."""
        try:
            body = await request.read(MAX_BYTES)
        except BodyTooLongError:
            await request.discard()
            message = f"the body is longer than {MAX_BYTES} bytes; MLflow sends less"
            return error_response(413, "INVALID_PARAMETER_VALUE", message)
        except TimeoutError:
            message = f"the body did not arrive within {BODY_TIMEOUT_S:g} s; send it again"
            return error_response(408, "DEADLINE_EXCEEDED", message)
        except DisconnectedError:
            return CLIENT_DISCONNECTED
        response = self.check(request.headers, body)
        if response.status == 202:
            await asyncio.get_running_loop().run_in_executor(None, self._on_change)
        return response

    def check(self, headers: Headers, body: bytes) -> Response:
        """The response to a delivery; its status is 202 if the registry is to be polled."""
        delivery, sent = headers.get(_DELIVERY) or "", headers.get(_TIMESTAMP) or ""
        signature = headers.get(_SIGNATURE) or ""
        if not (delivery and sent and signature):
            return _unauthenticated(
                f"{_SIGNATURE}, {_DELIVERY} or {_TIMESTAMP} is missing; create MLflow's webhook "
                "with a secret"
            )
        if not self._is_signed(delivery, sent, body, signature):
            return _unauthenticated(
                f"{_SIGNATURE} does not fit; give the webhook the secret in {WEBHOOK_ENV}"
            )
        now = self._clock()
        is_number = sent.isascii() and sent.isdecimal() and len(sent) < 16
        if not is_number or abs(int(sent) - now) > MAX_AGE_S:
            return _unauthenticated(
                f"{_TIMESTAMP} is more than {MAX_AGE_S} s off this server's clock; set both clocks"
            )
        if not _is_of_registry(body):
            return error_response(
                400,
                "INVALID_PARAMETER_VALUE",
                "this is no event of a registered model; create the webhook for "
                "model_version_alias.created",
            )
        self._seen = {key: until for key, until in self._seen.items() if until >= now}
        if delivery in self._seen:
            return json_response({"status": "ignored: this delivery was received before"})
        self._seen[delivery] = int(sent) + MAX_AGE_S
        return json_response({"status": "the registry is polled now"}, 202)

    def _is_signed(self, delivery: str, sent: str, body: bytes, signature: str) -> bool:
        content = f"{delivery}.{sent}.".encode("latin1", "replace") + body
        given, found = signature.encode("latin1", "replace"), False
        for secret in self._secrets:  # all, so that the time does not depend on which one matches
            digest = hmac.digest(secret, content, hashlib.sha256)
            found |= hmac.compare_digest(given, b"v1," + base64.b64encode(digest))
        return found


def _is_of_registry(body: bytes) -> bool:
    try:
        event = json.loads(body)
    except (ValueError, RecursionError):
        return False
    return isinstance(event, dict) and event.get("entity") in _ENTITIES


def _unauthenticated(message: str) -> Response:
    return error_response(401, "UNAUTHENTICATED", message)
