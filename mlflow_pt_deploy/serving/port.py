"""Reserves the server's TCP port for its workers.

Each worker listens with its own socket (SO_REUSEPORT). The kernel then spreads connections evenly,
a worker that does not listen yet gets none, and a worker that dies takes only its own connections.
"""

from __future__ import annotations

import errno
import os
import socket
from contextlib import ExitStack
from weakref import WeakSet

from mlflow_pt_deploy.errors import ServingError

_ABSENT = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)

_reserved: WeakSet[socket.socket] = WeakSet()


def hold_port(host: str, port: int, option: str = "--port") -> list[socket.socket]:
    """Reserve a port for this user's processes until the returned sockets are closed.

    A forked child closes them at once, so that it does not keep the port after the main process.

    Args:
        host: Name or address; there is one socket for each address of a name.
        port: 0 takes a free one.
        option: The command line option of the port.

    Returns:
        Sockets that are bound and do not listen.

    Raises:
        ServingError: The port is in use, or the address is not one of this machine.
    """
    if port:  # otherwise a second server would share the port of the first without an error
        for exclusive in _bind(host, port, option, shared=False):
            exclusive.close()
    sockets = _bind(host, port, option, shared=True)
    _reserved.update(sockets)
    return sockets


def _bind(host: str, port: int, option: str, *, shared: bool) -> list[socket.socket]:
    """`_bind_all` with errors that name the option to change."""
    try:
        return _bind_all(host, port, shared=shared)
    except socket.gaierror as error:
        raise ServingError(
            f"the host {host} cannot be found ({error.strerror}); give an address of this machine "
            "as --host"
        ) from error
    except OSError as error:
        raise ServingError(
            f"{host}, port {port}: {error.strerror}; give another {option} or --host"
        ) from error
    except OverflowError as error:
        raise ServingError(f"port is {port}; give 1 to 65535, or 0 for any free one") from error
    except UnicodeError as error:  # not a name that can be looked up
        raise ServingError(f"{host!r} is no host; give an address of this machine") from error


def _bind_all(host: str, port: int, *, shared: bool) -> list[socket.socket]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    sockets: list[socket.socket] = []
    absent: OSError | None = None
    with ExitStack() as stack:  # closes all of them on any error
        for family, _, _, _, address in dict.fromkeys(found):
            here = stack.enter_context(socket.socket(family, socket.SOCK_STREAM))
            try:
                here.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if shared:
                    here.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
                if family == socket.AF_INET6:
                    here.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                here.bind((address[0], port or address[1], *address[2:]))
            except OSError as error:
                if error.errno not in _ABSENT:
                    raise
                absent = error  # localhost may have an address that is switched off
                here.close()
                continue
            sockets.append(here)
            port = port or here.getsockname()[1]
        if absent is not None and not sockets:
            raise absent
        stack.pop_all()
    return sockets


def _release_in_child() -> None:
    for each in list(_reserved):
        each.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_release_in_child)
