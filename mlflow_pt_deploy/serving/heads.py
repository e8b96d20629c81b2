"""Heads of requests that were parsed before, and of answers that were written before.

A client sends the same head again and again: what the parser made of one is kept, and the same
bytes are not parsed twice. Knows nothing of who may send what.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from http import HTTPStatus
from typing import NamedTuple

from mlflow_pt_deploy.serving.http.mlflow_protocol import Answer

GAP = b"\r\n\r\n"
"""What ends a head."""
_MOST_HEADS = 1024
_MOST_BYTES = 1024


class Head(NamedTuple):
    """What a request's head says; its connection stays open. `text` is the head itself."""

    text: bytes
    url: bytes
    headers: list[tuple[bytes, bytes]]
    fields: dict[bytes, bytes]
    length: int


_known: dict[bytes, Head] = {}
"""What was parsed before, by its bytes."""


def known(data: bytes) -> tuple[Head | None, bytes]:
    """The head and the body of a whole request; None: it is not one with a head that is known."""
    text, _, body = data.partition(GAP)
    head = _known.get(text)
    if head is not None and len(body) == head.length:
        return head, body
    return None, b""


def keep(came: bytes, head: Head, body: bytes) -> None:
    """Remember a head if it, its body and nothing else came in one piece.

    Args:
        came: That piece.
        head: What the parser made of it.
        body: Likewise.
    """
    text, _, rest = came.partition(GAP)
    if (
        rest == body
        and len(text) <= _MOST_BYTES
        and head.fields.get(b"content-length") == b"%d" % len(body)
        and b"transfer-encoding" not in head.fields
    ):
        if len(_known) >= _MOST_HEADS:
            _known.clear()
        _known[text] = head._replace(text=text)


@lru_cache(maxsize=256)
def _start(status: int, keep_alive: bool, *headers: tuple[bytes, bytes]) -> bytes:
    """Status line and headers; the same for a second, for then the date is another."""
    lines = [b"HTTP/1.1 %d %s" % (status, HTTPStatus(status).phrase.encode())]
    lines += [b"%s: %s" % header for header in headers]
    if not keep_alive:
        lines.append(b"connection: close")
    return b"\r\n".join([*lines, b""])


def written(result: Answer, keep_alive: bool, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """An answer of a model's as it goes out.

    Args:
        result: Its version must be given.
        keep_alive: Whether the connection stays open.
        headers: More of them.
    """
    assert result.version is not None
    start = _start(
        result.status,
        keep_alive,
        *headers,
        (b"content-type", result.content_type),
        result.version.header,
        *result.headers,
    )
    length = b"content-length: %d" % len(result.body)
    return b"".join([start, length, GAP, result.body])
