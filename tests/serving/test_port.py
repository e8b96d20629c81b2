"""The port: refused in words where it is taken, shared by this server's workers only."""

import gc
import multiprocessing
import socket

import pytest

from mlflow_pt_deploy.errors import ServingError
from mlflow_pt_deploy.serving.port import hold_port

pytestmark = pytest.mark.skipif(not hasattr(socket, "SO_REUSEPORT"), reason="needs SO_REUSEPORT")


def shared_listener(port: int) -> socket.socket:
    """What a worker does: listens at a port that the main process holds."""
    worker = socket.socket()
    worker.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    worker.bind(("127.0.0.1", port))
    worker.listen()
    return worker


def test_a_port_that_is_taken_is_refused_in_words() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServingError, match=f"127.0.0.1, port {port}: .*another --port"):
            hold_port("127.0.0.1", port)


def test_a_second_server_does_not_share_the_port_of_the_first() -> None:
    (held,) = hold_port("127.0.0.1", 0)
    port = held.getsockname()[1]
    message = f"port {port}: .*another --port"
    with held, shared_listener(port), pytest.raises(ServingError, match=message):
        hold_port("127.0.0.1", port)


def test_workers_listen_at_a_port_that_is_held() -> None:
    (held,) = hold_port("127.0.0.1", 0)
    address = held.getsockname()
    with held, shared_listener(address[1]) as first, shared_listener(address[1]):
        with socket.create_connection(address) as client:
            client.sendall(b"x")
        first.close()
    with pytest.raises(ConnectionRefusedError), socket.create_connection(address):
        pass


def test_an_address_of_another_machine_is_refused_in_words() -> None:
    with pytest.raises(ServingError, match="192.0.2.1, port .*another --port or --host"):
        hold_port("192.0.2.1", 0)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_an_impossible_port_is_named_and_leaves_no_socket(host: str) -> None:
    with pytest.raises(ServingError, match="port is 70000; give 1 to 65535"):
        hold_port(host, 70000)
    gc.collect()  # an open socket is a warning, and so an error


def test_a_forked_process_does_not_hold_the_port() -> None:
    (held,) = hold_port("127.0.0.1", 0)
    port = held.getsockname()[1]
    context = multiprocessing.get_context("fork")
    go_on = context.Event()
    child = context.Process(target=go_on.wait, args=(30,))
    child.start()
    try:
        held.close()
        for again in hold_port("127.0.0.1", port):
            again.close()
    finally:
        go_on.set()
        child.join(30)
