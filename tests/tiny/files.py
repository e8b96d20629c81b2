"""Damage to files."""

from __future__ import annotations

from pathlib import Path


def flip_last_byte(path: Path) -> None:
    """Damage a file without changing its size."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
