"""Samples of answered requests as bytes, from the workers to the shadow process.

A message is the length of its header, the header as JSON, and the bytes of all rows. It goes
through a Unix datagram socket in the run directory, which only this user can open.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from mlflow_pt_deploy.preprocessing import Row
from mlflow_pt_deploy.serving.model.outputs import best_label
from mlflow_pt_deploy.serving.rollout.version_share import place_of
from mlflow_pt_deploy.system.socket_address import SocketAddress

MAX_BYTES = 128 * 2**10
"""Longest message. Linux holds about 200 KiB in a socket."""

_SOCKET = "shadow.sock"
_PREFIX_BYTES = 4


class Sample(NamedTuple):
    """An answered request.

    Attributes:
        model: Served model.
        version: Label of the version that answered.
        point: See `sampling_point`.
        texts: A prediction per row, as JSON.
        rows: Raw rows.
    """

    model: str
    version: str
    point: float
    texts: Sequence[str]
    rows: Sequence[Row]

    @property
    def labels(self) -> list[str]:
        """The best label of each row."""
        return [best_label(text) for text in self.texts]


def sampling_point(request_id: str) -> float:
    """Where a request id lies between 0 and 1; it is sampled if this is below the share.

    Has a key of its own, so that it is independent of other decisions by request id.
    """
    return place_of(request_id, b"shadow")


def pack(samples: Iterable[Sample]) -> bytes:
    """Samples as one message."""
    heads, body = [], list[bytes]()
    for model, version, point, texts, rows in samples:
        parts = [
            row.encode("utf8", "surrogatepass") if isinstance(row, str) else row for row in rows
        ]
        is_text = bool(rows) and isinstance(rows[0], str)
        heads.append((model, version, point, texts, is_text, [len(part) for part in parts]))
        body += parts
    head = json.dumps(heads).encode()
    return b"".join((len(head).to_bytes(_PREFIX_BYTES, "big"), head, *body))


def unpack(message: bytes) -> list[Sample]:
    """The samples of a message."""
    start = _PREFIX_BYTES + int.from_bytes(message[:_PREFIX_BYTES], "big")
    samples = []
    for model, version, point, texts, is_text, lengths in json.loads(message[_PREFIX_BYTES:start]):
        rows: list[Row] = []
        for length in lengths:
            part = message[start : start + length]
            rows.append(part.decode("utf8", "surrogatepass") if is_text else part)
            start += length
        samples.append(Sample(model, version, point, texts, rows))
    return samples


def new_socket() -> socket.socket:
    """A socket with room for a message of `MAX_BYTES`."""
    made = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    for side in (socket.SO_SNDBUF, socket.SO_RCVBUF):
        made.setsockopt(socket.SOL_SOCKET, side, 2 * MAX_BYTES)
    return made


def new_address(folder: Path) -> SocketAddress:
    """Address of the shadow process in a run directory."""
    return SocketAddress(folder, _SOCKET)
