"""Request deadlines: the earlier of the client's header and the server's default."""

from __future__ import annotations

import time
from functools import lru_cache

DEADLINE_HEADER = "x-deadline-ms"


class Deadline:
    """Time limit of a request.

    Attributes:
        expires_at: Time by `time.monotonic`, seconds; None: no limit.
    """

    __slots__ = ("expires_at",)

    def __init__(self, expires_at: float | None) -> None:
        self.expires_at = expires_at

    @classmethod
    def from_header(cls, header: str | None, default_ms: float) -> Deadline:
        """Deadline of a request that arrives now.

        Args:
            header: Milliseconds that the client waits; ignored unless it consists of digits.
            default_ms: The server's default; 0: none.
        """
        seconds = _seconds(header, default_ms)
        return cls(None if seconds is None else time.monotonic() + seconds)

    def remaining_s(self) -> float | None:
        """Seconds that are left, at least 0; None without a deadline."""
        return None if self.expires_at is None else max(0.0, self.expires_at - time.monotonic())


@lru_cache(maxsize=256)
def _seconds(header: str | None, default_ms: float) -> float | None:
    server_s = default_ms / 1000 or None
    if header is None or not header.isdecimal() or len(header) > 9:
        return server_s
    client_s = int(header) / 1000
    return client_s if server_s is None else min(client_s, server_s)
