"""Addresses of Unix sockets in folders whose names may be long."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# of struct sockaddr_un, with a margin
_MAX_PATH = 100


class SocketAddress:
    """Address of a Unix socket in a folder.

    Args:
        folder: The folder; it exists.
        name: Name of the socket.

    Attributes:
        path: For `socket.bind`, `socket.connect` and `socket.sendto`.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.path = str(folder / name)
        self._folder: int | None = None
        if len(os.fsencode(self.path)) > _MAX_PATH and sys.platform == "linux":
            # the name of an open folder is short
            self._folder = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            self.path = f"/proc/self/fd/{self._folder}/{name}"

    def close(self) -> None:
        """Make the address invalid."""
        if self._folder is not None:
            os.close(self._folder)
            self._folder = None
