"""Sockets to listen on: one port, several descriptors, and free again afterwards."""

import socket
import threading
from pathlib import Path

import pytest
from tiny.server import until
from tiny.serving import save_tiny

from mlflow_pt_deploy.errors import ServingError
from mlflow_pt_deploy.serving.port import several_handles, take_port
from mlflow_pt_deploy.serving.server import build_server, run_server
from mlflow_pt_deploy.serving.settings import Settings


def test_a_port_that_is_taken_is_refused_in_words() -> None:
    (held,) = take_port("127.0.0.1", 0)
    with held:
        held.listen()
        port = held.getsockname()[1]
        with pytest.raises(ServingError, match=f"port {port}: .*; give another --port"):
            take_port("127.0.0.1", port)


def test_any_handle_takes_a_connection_and_all_must_close_to_free_the_port() -> None:
    (taken,) = take_port("127.0.0.1", 0)
    handles = several_handles([taken])
    assert len(handles) == len({each.fileno() for each in handles}) > 1
    address = taken.getsockname()
    handles[0].listen()
    for handle in (handles[0], handles[-1]):
        with socket.create_connection(address), handle.accept()[0] as accepted:
            accepted.sendall(b"x")
    for handle in handles:
        handle.close()
    with pytest.raises(ConnectionRefusedError), socket.create_connection(address):
        pass


def test_a_server_that_ended_leaves_its_port_free(tmp_path: Path) -> None:
    words: list[str] = []
    model = str(save_tiny(tmp_path / "tiny"))
    server = build_server([model], None, Settings(port=0), words.extend)

    def ends_when_open() -> None:
        until(lambda: words)
        server.should_exit = True

    thread = threading.Thread(target=ends_when_open)
    thread.start()
    run_server(server)
    thread.join()
    port = int(words[0].split("http://127.0.0.1:")[1].split()[0])
    (again,) = take_port("127.0.0.1", port)
    again.close()
