"""Messages between a worker and a device process, over a Unix socket.

    4 bytes    length of the header, big-endian
    header     a JSON object; ``arrays`` lists name, type and shape of each array
    bytes      of the arrays, one after the other

Nothing is pickled. A message that breaks a rule ends the connection.
"""

from __future__ import annotations

import json
import math
import socket
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mlflow_pt_deploy import errors
from mlflow_pt_deploy.errors import PtDeployError, ServingError

Arrays = Mapping[str, npt.NDArray[Any]]

HELLO, OPEN, PREDICT, WARM_UP = "hello", "open", "predict", "warm_up"
"""Requests: devices of this machine; load a model; compute a batch; prepare for shapes."""

MAX_HEADER_BYTES = 64 * 2**10
MAX_ARRAY_BYTES = 2**30
"""Most bytes of all arrays of a message: 1,700 images of 224 x 224."""

_PREFIX_BYTES = 4
_MAX_ARRAYS = 16
_MAX_RANK = 4
_TYPES = ("int64", "int32", "uint8", "float32")
# Smaller messages are copied into one buffer, which costs less than a system call for each part.
_JOINED_BYTES = 64 * 2**10
# Classes whose only argument is their message.
_ERRORS: Mapping[str, type[PtDeployError]] = {
    name: kind for name in errors.__all__ if "__init__" not in vars(kind := getattr(errors, name))
}


def file_name(device: str) -> str:
    """Part of the names of a device's files in the run directory: ``device-cuda-0``."""
    return f"device-{device.replace(':', '-')}"


class Message(NamedTuple):
    """A message: its header without ``arrays``, and its arrays by name."""

    header: dict[str, Any]
    arrays: dict[str, npt.NDArray[Any]]


class Channel:
    """One end of a connection; used by one thread at a time.

    Args:
        connection: A connected stream socket, which the channel owns from now on.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection

    def send(self, header: Mapping[str, Any], arrays: Arrays | None = None) -> None:
        """Send a message.

        Raises:
            OSError: The connection is broken.
        """
        parts = {name: np.ascontiguousarray(array) for name, array in (arrays or {}).items()}
        described = [(name, array.dtype.name, array.shape) for name, array in parts.items()]
        head = json.dumps({**header, "arrays": described}).encode()
        start = len(head).to_bytes(_PREFIX_BYTES, "big") + head
        buffers = [array.data.cast("B") for array in parts.values() if array.size]
        if sum(map(len, buffers)) <= _JOINED_BYTES:
            self._socket.sendall(b"".join((start, *buffers)))
            return
        self._socket.sendall(start)
        for buffer in buffers:
            self._socket.sendall(buffer)

    def set_timeout(self, seconds: float | None) -> None:
        """Give up after this many seconds without progress, with `TimeoutError`; None: never."""
        self._socket.settimeout(seconds)

    def receive(self) -> Message:
        """Wait for a message.

        Raises:
            EOFError: The other side closed the connection.
            OSError: The connection is broken.
            ServingError: What came is no message.
        """
        size = int.from_bytes(self._read(_PREFIX_BYTES), "big")
        if size > MAX_HEADER_BYTES:
            raise ServingError(
                f"a message has a header of {size} bytes; {MAX_HEADER_BYTES} at most"
            )
        header, layout = _parse(self._read(size))
        arrays = {}
        for name, kind, shape in layout:
            arrays[name] = array = np.empty(shape, kind)
            self._fill(array.data.cast("B") if array.size else memoryview(b""))
        return Message(header, arrays)

    def wait_until_closed(self) -> None:
        """Wait until the other side is gone, or `close` is called; it must not send."""
        with suppress(OSError):
            self._socket.settimeout(None)
            self._socket.recv(1)

    def close(self) -> None:
        """End the connection, also for a thread that waits in this channel."""
        with suppress(OSError):  # it has ended already
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _read(self, size: int) -> bytearray:
        buffer = bytearray(size)
        self._fill(memoryview(buffer))
        return buffer

    def _fill(self, buffer: memoryview) -> None:
        while buffer:
            count = self._socket.recv_into(buffer)
            if not count:
                raise EOFError("the other side closed the connection")
            buffer = buffer[count:]


def error_header(error: Exception) -> dict[str, str]:
    """An error as the header of a reply; only our own errors have their message in it."""
    kind = next((each for each in type(error).__mro__ if each.__name__ in _ERRORS), None)
    if kind is None or not isinstance(error, PtDeployError):
        return {"error": "ServingError", "message": "the model failed in its device process"}
    return {"error": kind.__name__, "message": str(error)}


def raise_error(header: Mapping[str, Any]) -> None:
    """Raise the error of a reply, if it is one.

    Raises:
        PtDeployError: As the other side raised it.
    """
    if "error" in header:
        raise _ERRORS.get(str(header["error"]), ServingError)(str(header.get("message")))


def _parse(text: bytearray) -> tuple[dict[str, Any], list[tuple[str, str, list[int]]]]:
    """The header of a message, and the layout of its arrays.

    Raises:
        ServingError: A rule is broken.
    """
    try:
        header = json.loads(text)
        layout = header.pop("arrays")
        known = len(layout) <= _MAX_ARRAYS and all(_is_array(*each) for each in layout)
        size = sum(math.prod(shape) * np.dtype(kind).itemsize for _, kind, shape in layout)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ServingError(f"a message has an invalid header ({type(error).__name__})") from error
    if not known:
        raise ServingError("a message has an array of a type or shape that is not supported")
    if size > MAX_ARRAY_BYTES:
        raise ServingError(f"a message has {size} bytes of arrays; {MAX_ARRAY_BYTES} at most")
    return header, layout


def _is_array(name: object, kind: object, shape: object) -> bool:
    return (
        isinstance(name, str)
        and kind in _TYPES
        and isinstance(shape, list)
        and len(shape) <= _MAX_RANK
        and all(type(size) is int and 0 <= size < 2**31 for size in shape)
    )
