"""Which requests a canary answers; pure."""

from __future__ import annotations

from hashlib import blake2b

KEY_HEADER = "x-pt-deploy-key"
"""Requests with the same value are answered by the same version."""

_BYTES = 8


def takes(share: float, salt: str, key: str) -> bool:
    """Whether a key is in the canary's share.

    A key keeps its place between 0 and 1, so a wider share has all keys of a narrower one.

    Args:
        share: 0 to 1.
        salt: Of one canary, so that the next one has other keys.
        key: Of the request.
    """
    digest = blake2b(f"{salt}\0{key}".encode(), digest_size=_BYTES).digest()
    return int.from_bytes(digest, "big") / 256.0**_BYTES < share
