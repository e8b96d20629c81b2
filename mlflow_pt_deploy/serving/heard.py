"""What one replica says by itself, asked at its Unix socket; imports nothing heavy.

The sockets are in a folder that only their user can enter. It is the event loop that answers there,
so an answer is a sign of life too.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import NamedTuple

PATIENCE_S = 1.0
"""Seconds that a replica has to answer."""
SERVED = "served"
"""What its parent asks for, see `served`; no path that a client can ask for."""


class Heard(NamedTuple):
    """What one replica answers by itself."""

    status: int
    pid: int
    body: bytes


def socket_of(folder: Path, index: int) -> Path:
    """Where a replica is asked."""
    return folder / f"{index}.sock"


async def ask_replica(at: Path, path: str) -> Heard | None:
    """What a replica answers to a path; None: nothing, or not soon enough."""
    try:
        async with asyncio.timeout(PATIENCE_S):
            reader, writer = await asyncio.open_unix_connection(at)
            try:
                writer.write(path.encode() + b"\n")
                head, _, body = (await reader.read(-1)).partition(b"\n")
                status, pid = head.split()
                return Heard(int(status), int(pid), body)
            finally:
                writer.close()
    except (OSError, TimeoutError, ValueError):
        return None
