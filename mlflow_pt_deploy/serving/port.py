"""A port to listen on, alone or with other processes, each with a socket of its own (SO_REUSEPORT).

Of one inherited socket the process that wakes first takes whatever waits, so that a pool of
connections kept alive may end up with one of them; here the kernel spreads connections evenly, a
process that does not listen yet gets none, and one that died takes only its own along.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence

from mlflow_pt_deploy.errors import ServingError

_HANDLES = 16
_ABSENT = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


def take_port(host: str, port: int) -> list[socket.socket]:
    """Sockets at a port for this process alone, ready to listen.

    Args:
        host, port: As for `hold_port`.

    Raises:
        ServingError: As for `hold_port`.
    """
    return _bind_in_words(host, port, shared=False)


def several_handles(sockets: Sequence[socket.socket]) -> list[socket.socket]:
    """The same sockets, each under several file descriptors, for an event loop to listen on all.

    libuv takes one new connection a turn from each; where turns last milliseconds, a client that
    opens hundreds of connections would wait for the last one for seconds.
    """
    return [
        each for known in sockets for each in [known, *(known.dup() for _ in range(_HANDLES - 1))]
    ]


def hold_port(host: str, port: int) -> list[socket.socket]:
    """Sockets that do not listen, but keep the port for this user's processes.

    Args:
        host: A name may mean several addresses; there is a socket for each.
        port: 0 takes a free one.

    Raises:
        ServingError: Somebody else listens there, or the address is not this machine's.
    """
    if port:  # else a second server would silently share the port of the first
        for held in _bind_in_words(host, port, shared=False):
            held.close()
    return _bind_in_words(host, port, shared=True)


def join_port(host: str, port: int) -> list[socket.socket]:
    """Sockets at a port that this user's process holds, ready to listen."""
    return _bind(host, port, shared=True)


def _bind_in_words(host: str, port: int, *, shared: bool) -> list[socket.socket]:
    try:
        return _bind(host, port, shared=shared)
    except socket.gaierror as error:
        raise ServingError(
            f"the host {host} cannot be found ({error.strerror}); give an address of this machine "
            "as --host"
        ) from error
    except OSError as error:
        raise ServingError(
            f"{host}, port {port}: {error.strerror}; give another --port or --host"
        ) from error
    except UnicodeError as error:  # what no name server can be asked
        raise ServingError(f"{host!r} is no host; give an address of this machine") from error


def _bind(host: str, port: int, *, shared: bool) -> list[socket.socket]:
    sockets: list[socket.socket] = []
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    absent: OSError | None = None
    for family, _, _, _, address in dict.fromkeys(found):
        here = socket.socket(family, socket.SOCK_STREAM)
        try:
            here.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if shared:
                here.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if family == socket.AF_INET6:
                here.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            here.bind((address[0], port or address[1], *address[2:]))
        except OSError as error:
            here.close()
            absent = error
            if error.errno in _ABSENT:  # localhost may have an address that is switched off
                continue
            for other in sockets:
                other.close()
            raise
        sockets.append(here)
        port = port or here.getsockname()[1]
    if not sockets and absent is not None:
        raise absent
    return sockets
