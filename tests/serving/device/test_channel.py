"""Messages arrive as they were sent; what is no message is refused; errors keep their class."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest

from mlflow_pt_deploy.errors import (
    ArtifactError,
    DataError,
    DeviceMemoryError,
    MissingExtraError,
    RowError,
    ServingError,
    VariantError,
)
from mlflow_pt_deploy.serving.device.channel import (
    MAX_HEADER_BYTES,
    Channel,
    error_header,
    raise_error,
)


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, Channel]]:
    left, right = socket.socketpair()
    with closing(left), closing(Channel(right)) as channel:
        yield left, channel


def test_arrays_arrive_as_they_were_sent(pair: tuple[socket.socket, Channel]) -> None:
    sender = Channel(pair[0])
    ids = np.arange(12, dtype=np.int64).reshape(3, 4)
    arrays = {"ids": ids[:, ::2], "pixels": np.ones((2, 3), np.float32), "none": ids[:0]}
    sender.send({"request": "predict"}, arrays)
    sender.send({"last": True})
    header, found = pair[1].receive()
    assert header == {"request": "predict"} and list(found) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype
    assert pair[1].receive() == ({"last": True}, {})


def test_a_large_message_is_sent_in_parts(pair: tuple[socket.socket, Channel]) -> None:
    pair[0].settimeout(10)
    small = np.zeros((40, 512), dtype=np.int64)  # more than is joined, less than a socket holds
    Channel(pair[0]).send({}, {"ids": small})
    assert pair[1].receive().arrays["ids"].shape == small.shape


def framed(header: object) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(4, "big") + text


@pytest.mark.parametrize(
    "data",
    [
        (MAX_HEADER_BYTES + 1).to_bytes(4, "big"),
        framed(b"\x80\x04pickle"),
        framed(b"[" * 30_000),
        framed([]),
        framed({}),
        framed({"arrays": 3}),
        framed({"arrays": [["ids", "int64"]]}),
        framed({"arrays": [["ids", "object", [1]]]}),
        framed({"arrays": [["ids", "int64", [-1]]]}),
        framed({"arrays": [["ids", "int64", [True]]]}),
        framed({"arrays": [["ids", "int64", [1, 1, 1, 1, 1]]]}),
        framed({"arrays": [["ids", "int64", [2**20, 2**20]]]}),
        framed({"arrays": [["ids", "int64", ["1"]]]}),
        framed({"arrays": [["ids", "uint8", [1]]] * 17}),
    ],
)
def test_what_is_no_message_is_refused(pair: tuple[socket.socket, Channel], data: bytes) -> None:
    pair[0].sendall(data)
    with pytest.raises(ServingError, match="a message has"):
        pair[1].receive()


def test_an_end_within_a_message_is_an_end(pair: tuple[socket.socket, Channel]) -> None:
    pair[0].sendall(framed({"arrays": [["ids", "int64", [2]]]}) + b"\0" * 8)
    pair[0].shutdown(socket.SHUT_WR)
    with pytest.raises(EOFError):
        pair[1].receive()


def test_silence_is_a_timeout(pair: tuple[socket.socket, Channel]) -> None:
    pair[1].set_timeout(0.01)
    with pytest.raises(TimeoutError):
        pair[1].receive()


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (DeviceMemoryError("full; send fewer rows"), DeviceMemoryError),
        (ArtifactError("changed"), ArtifactError),
        (MissingExtraError("onnxruntime", "onnx"), VariantError),
        (RowError(3, "is empty"), DataError),
    ],
)
def test_our_errors_keep_class_and_message(error: Exception, kind: type[Exception]) -> None:
    with pytest.raises(kind) as caught:
        raise_error(json.loads(json.dumps(error_header(error))))
    assert type(caught.value) is kind and str(caught.value) == str(error)


@pytest.mark.parametrize("error", [RuntimeError("secret /path"), KeyError("client data")])
def test_other_errors_say_nothing(error: Exception) -> None:
    with pytest.raises(ServingError, match="^the model failed in its device process$"):
        raise_error(error_header(error))


@pytest.mark.parametrize("name", ["SystemExit", "RowError", "", None, 3])
def test_an_unknown_class_is_a_serving_error(name: object) -> None:
    with pytest.raises(ServingError, match="why"):
        raise_error({"error": name, "message": "why"})


def test_a_reply_without_error_raises_nothing() -> None:
    raise_error({"pid": 1})
