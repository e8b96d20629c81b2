"""How many files the process may have open: a connection is one, a lent one (`front`) is two."""

from __future__ import annotations

_OTHERS = 256


def room_for_loans(connections: int) -> int:
    """How many of so many connections may be lent; asks the system for more files where it may."""
    try:
        import resource
    except ModuleNotFoundError:  # Windows has no such limit
        return connections
    wanted = 2 * connections + _OTHERS
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if files == resource.RLIM_INFINITY:
        return connections
    if files < wanted:
        files = wanted if most == resource.RLIM_INFINITY else min(wanted, most)
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, most))
    return max(0, min(connections, files - _OTHERS - connections))
