"""Bearer tokens for scoring and for the admin pages, compared in constant time.

Tokens, and the secret of MLflow's webhook, come from environment variables or files. They are not
command line options, because every user of the machine can read those.
"""

from __future__ import annotations

import hmac
import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path

from mlflow_pt_deploy.errors import ServingError
from mlflow_pt_deploy.serving.http.webhook import WEBHOOK_ENV

SCORE_ENV, ADMIN_ENV = "PT_DEPLOY_TOKEN", "PT_DEPLOY_ADMIN_TOKEN"
_MIN_CHARS = 16


@dataclass(frozen=True, repr=False)
class TokenAuth:
    """The tokens of a server.

    Attributes:
        scoring: Tokens for scoring; if there are none, requests need no token.
        admin: Tokens for ``/metrics`` and ``/model``; if there are none, the scoring tokens.
        webhook: Secrets that MLflow signs webhooks with; if there are none, there is no
            ``/webhook``.
    """

    scoring: tuple[bytes, ...] = ()
    admin: tuple[bytes, ...] = ()
    webhook: tuple[bytes, ...] = ()

    def can_score(self, authorization: str | None) -> bool:
        """Whether a request with this ``Authorization`` header may score."""
        return not self.scoring or _holds(authorization, self.scoring)

    def can_read_admin(self, authorization: str | None) -> bool:
        """Whether a request with this ``Authorization`` header may read the admin pages."""
        return _holds(authorization, self.admin) if self.admin else self.can_score(authorization)


def auth_from_environment() -> TokenAuth:
    """Read ``PT_DEPLOY_TOKEN``, ``PT_DEPLOY_ADMIN_TOKEN`` and ``PT_DEPLOY_WEBHOOK_SECRET``, or the
    files in the variables with ``_FILE`` at the end. A file may hold several tokens, one per line,
    so that tokens can be rotated.

    Raises:
        ServingError: A file cannot be read, or a token is shorter than 16 characters.
    """
    return TokenAuth(_tokens(SCORE_ENV), _tokens(ADMIN_ENV), _tokens(WEBHOOK_ENV))


def bearer(tokens: tuple[bytes, ...]) -> dict[str, str]:
    """The header of a client that has these tokens; empty if there are none."""
    return {"Authorization": f"Bearer {tokens[0].decode()}"} if tokens else {}


def require_auth_unless_loopback(host: str, auth: TokenAuth, insecure: bool) -> None:
    """Refuse to listen beyond this machine without a token.

    Raises:
        ServingError: `host` is not a loopback address, there is no token, and `insecure` is False.
    """
    if insecure or auth.scoring or is_loopback(host):
        return
    raise ServingError(
        f"{host} can be reached from other machines and {SCORE_ENV} is not set. Set {SCORE_ENV} or "
        f"{SCORE_ENV}_FILE, listen on 127.0.0.1 behind a proxy that authenticates clients, or give "
        "--insecure if the network is closed."
    )


def is_loopback(host: str) -> bool:
    """Whether `host` can be reached from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _tokens(name: str) -> tuple[bytes, ...]:
    text = os.environ.get(name, "")
    if path := os.environ.get(f"{name}_FILE"):
        try:
            text = Path(path).read_text(encoding="utf8")
        except OSError as error:
            raise ServingError(f"{name}_FILE cannot be read ({error.strerror})") from error
        if not text.strip():
            raise ServingError(f"{name}_FILE is empty; write a token into it")
    tokens = tuple(line.strip().encode() for line in text.splitlines() if line.strip())
    if any(len(token) < _MIN_CHARS for token in tokens):
        raise ServingError(
            f"{name}: a token has fewer than {_MIN_CHARS} characters; make one: "
            "openssl rand -hex 32"
        )
    return tokens


def _holds(authorization: str | None, tokens: tuple[bytes, ...]) -> bool:
    scheme, _, given = (authorization or "").encode("latin1", "replace").partition(b" ")
    if scheme.lower() != b"bearer":
        return False
    token, found = given.strip(), False
    for known in tokens:  # all of them, so that the time does not depend on which one matches
        found |= hmac.compare_digest(token, known)
    return found
