"""Who may score, and who may look behind: bearer tokens, compared in constant time.

Knows no routes. Tokens come from the environment or from files, never from the command line,
where every user of the machine could read them.
"""

from __future__ import annotations

import hmac
import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path

from mlflow_pt_deploy.errors import ServingError

SCORE_ENV, ADMIN_ENV = "PT_DEPLOY_TOKEN", "PT_DEPLOY_ADMIN_TOKEN"
_LEAST = 16


@dataclass(frozen=True, repr=False)
class TokenAuth:
    """The tokens of a server.

    Attributes:
        scoring: Any of them may score; none: everybody may.
        admin: Any of them may read ``/metrics`` and ``/model``; none: whoever may score.
    """

    scoring: tuple[bytes, ...] = ()
    admin: tuple[bytes, ...] = ()

    def can_score(self, authorization: str | None) -> bool:
        """Whether a request with this ``Authorization`` header may score."""
        return not self.scoring or _holds(authorization, self.scoring)

    def can_read_admin(self, authorization: str | None) -> bool:
        """Whether it may read what is for those who run the server."""
        return _holds(authorization, self.admin) if self.admin else self.can_score(authorization)


def auth_from_environment() -> TokenAuth:
    """Tokens in ``PT_DEPLOY_TOKEN`` and ``PT_DEPLOY_ADMIN_TOKEN``, or in files named by the same
    names with ``_FILE``; a file may hold several, one a line, so that they can be exchanged.

    Raises:
        ServingError: A file cannot be read, or a token is shorter than 16 characters.
    """
    return TokenAuth(_tokens(SCORE_ENV), _tokens(ADMIN_ENV))


def require_auth_unless_loopback(host: str, guard: TokenAuth, insecure: bool) -> None:
    """Refuse to let a whole network score without a token.

    Raises:
        ServingError: `host` is not this machine only, and nobody said that this is meant.
    """
    if insecure or guard.scoring or is_loopback(host):
        return
    raise ServingError(
        f"{host} can be reached from other machines and {SCORE_ENV} is not set, so anybody there "
        f"could score. Set {SCORE_ENV} or {SCORE_ENV}_FILE; or listen on 127.0.0.1 behind a proxy "
        "that knows its callers; or say --insecure where the network itself is closed."
    )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches `host`."""
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
    if any(len(token) < _LEAST for token in tokens):
        raise ServingError(
            f"{name}: a token has fewer than {_LEAST} characters; make one: openssl rand -hex 32"
        )
    return tokens


def _holds(authorization: str | None, tokens: tuple[bytes, ...]) -> bool:
    scheme, _, given = (authorization or "").encode("latin1", "replace").partition(b" ")
    if scheme.lower() != b"bearer":
        return False
    # every token is compared, so that time does not tell which one came close
    return sum(hmac.compare_digest(given.strip(), token) for token in tokens) > 0
