"""Resident memory of this process, returning freed memory, and garbage collection."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from contextlib import suppress
from pathlib import Path

_STATM = Path("/proc/self/statm")


def resident_mb() -> float:
    """Resident memory of this process in MB (10^6 bytes).

    Without ``/proc`` (macOS) this is the peak, which never falls.
    """
    try:
        pages = int(_STATM.read_text(encoding="ascii").split()[1])
    except OSError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if sys.platform == "darwin" else 1024) / 1e6
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def trim() -> None:
    """Return freed memory to the system; glibc keeps much of it by default."""
    with suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def freeze_gc() -> None:
    """Exempt all current objects from later garbage collections.

    Traversing objects of libraries and models takes nearly a tenth of a busy server's time.
    """
    gc.unfreeze()  # objects frozen before may be garbage by now
    gc.collect()
    gc.freeze()
