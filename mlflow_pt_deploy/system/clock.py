"""Points in time as text."""

from __future__ import annotations

from datetime import UTC, datetime


def now() -> str:
    """Current time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")
