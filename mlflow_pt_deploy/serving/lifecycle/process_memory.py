"""How much memory this process holds, how it hands back what it has freed, and its garbage."""

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

    Where there is no ``/proc`` (macOS) the largest that it ever was, which does not fall.
    """
    try:
        pages = int(_STATM.read_text(encoding="ascii").split()[1])
    except OSError:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak * (1 if sys.platform == "darwin" else 1024) / 1e6
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def trim() -> None:
    """Hand freed memory back to the system, of which glibc keeps much for itself."""
    with suppress(AttributeError, OSError, TypeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def settle() -> None:
    """Have later garbage collections leave alone what lives now.

    All objects of libraries and models would be looked at again and again, for nearly a tenth of a
    busy server's time.
    """
    gc.unfreeze()  # what was left alone before may be garbage by now
    gc.collect()
    gc.freeze()
