"""Request deadlines: the client's header and the server's default, whichever is earlier."""

from __future__ import annotations

import time
from functools import lru_cache

DEADLINE_HEADER = "x-deadline-ms"


class Deadline:
    """When a request is given up.

    Attributes:
        expires_at: By `time.monotonic`, seconds; None: never.
    """

    __slots__ = ("expires_at",)

    def __init__(self, expires_at: float | None) -> None:
        self.expires_at = expires_at

    @classmethod
    def from_header(cls, header: str | None, default_ms: float) -> Deadline:
        """Deadline of a request that arrives now.

        Args:
            header: Milliseconds that the client waits; anything but digits is ignored.
            default_ms: The server's own limit; 0: none.
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
