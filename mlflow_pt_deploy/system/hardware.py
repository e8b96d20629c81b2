"""Hardware and software of this machine: cores, instruction sets, library versions.

Imports nothing heavy.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from functools import cache
from math import ceil
from pathlib import Path, PurePosixPath

from mlflow_pt_deploy.system.device import gpu_name

_LIBRARIES = (
    "torch",
    "torchao",
    "transformers",
    "tokenizers",
    "pillow",
    "onnxruntime",
    "openvino",
    "nncf",
    "mlflow",
)
_FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni")
_ROOT = Path("/")
# Core count of a process that shares the machine with others, e.g. of a replica.
CORES_ENV = "PT_DEPLOY_CORES"
SWITCH_S = 0.5e-3
"""Seconds that a busy thread of a server may hold the interpreter. Python's default of 5 ms delays
the event loop by ten times the time that a fast model takes."""
THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
    "RAYON_NUM_THREADS",  # of tokenizers
)


@cache
def cpu_flags() -> frozenset[str]:
    """Instruction sets of this CPU by their Linux names; empty on other systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf8").splitlines()
    except OSError:
        return frozenset()
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), ":")
    return frozenset(flags.partition(":")[2].split())


def usable_cores(_root: Path = _ROOT) -> int:
    """Number of cores this process may keep busy.

    The minimum of its CPU affinity, the CPU quotas of its cgroups, and ``PT_DEPLOY_CORES``. A quota
    of 1.5 cores counts as 2: rounded down, a third of it would never be used.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    share = os.environ.get(CORES_ENV, "")
    return min([cores, *_quotas(_root), *([max(1, int(share))] if share.isdecimal() else [])])


def core_numbers(_root: Path = _ROOT) -> list[int]:
    """Numbers of the cores this process may run on; empty if the system has no CPU affinity.

    Sorted by package and physical core, so that hyperthreads of a core are adjacent and a slice of
    the list shares as little hardware as possible with the rest.
    """
    if not hasattr(os, "sched_getaffinity"):
        return []

    def place(number: int) -> tuple[int, int, int]:
        folder = _root / f"sys/devices/system/cpu/cpu{number}/topology"
        words = (_read(folder / name).strip() for name in ("physical_package_id", "core_id"))
        package, core = (int(word) if word.isdecimal() else number for word in words)
        return package, core, number

    return sorted(os.sched_getaffinity(0), key=place)


def library_versions() -> dict[str, str]:
    """Versions of Python and of the installed libraries that affect measurements."""
    import importlib.metadata

    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, str]:
    """Describe this machine in short strings for tags and tables.

    Returns:
        ``cpu``, ``cores`` (usable), ``cpu_flags`` (those that select kernels), ``memory_gb``
        (10^9 bytes, at most the container's limit), ``gpu``, ``os``, ``python`` and the version of
        each library; missing facts are left out.
    """
    flags = [name for name in sorted(cpu_flags()) if name in _FLAGS or name.startswith("amx_")]
    facts = {
        "cpu": _cpu_model() or platform.processor() or platform.machine(),
        "cores": str(usable_cores()),
        "cpu_flags": " ".join(flags),
        "memory_gb": f"{memory / 1e9:.1f}" if (memory := memory_bytes()) else "",
        "gpu": gpu_name(),
        "os": f"{platform.system()} {platform.release()}",
        **library_versions(),
    }
    return {name: fact for name, fact in facts.items() if fact}


def _read(path: Path | str) -> str:
    try:
        return Path(path).read_text(encoding="utf8", errors="replace")
    except OSError:
        return ""


def _quotas(root: Path) -> Iterator[int]:
    """CPU quotas, in cores rounded up, of all cgroups that contain this process.

    Reads ``cpu.max`` (cgroup v2) and CFS bandwidth control (v1). Inside a container,
    ``/proc/self/cgroup`` may have the host's path while only the container's own files are
    mounted, so every parent of that path is tried too.

    Args:
        root: Folder with ``proc`` and ``sys``.
    """
    mount = root / "sys" / "fs" / "cgroup"
    lines = _read(root / "proc" / "self" / "cgroup").splitlines()
    for line in ["0::/", "1:cpu:/", *lines]:
        controllers, _, path = line.partition(":")[2].partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        own = PurePosixPath(path.lstrip("/"))
        # v2 lists no controllers; in a hybrid setup it is mounted at "unified"
        for name in {"cpu", controllers} if controllers else {"", "unified"}:
            for group in (own, *own.parents):
                yield from _quota(mount / name / group)


def _quota(group: Path) -> Iterator[int]:
    text = _read(group / "cpu.max")
    if not text:
        text = f"{_read(group / 'cpu.cfs_quota_us')} {_read(group / 'cpu.cfs_period_us')}"
    numbers = [int(word) for word in text.split() if word.isdecimal()]
    if len(numbers) == 2 and all(numbers):  # "max" and "-1" mean no limit
        yield ceil(numbers[0] / numbers[1])


def _cpu_model() -> str:
    for line in _read("/proc/cpuinfo").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return ""


def memory_bytes() -> int:
    """Memory of this machine or container; 0: unknown."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return 0
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = _read("/sys/fs/cgroup/memory.max").strip()
    if limit.isdigit():
        size = min(size, int(limit))
    return size


def hardware_tags() -> dict[str, str]:
    """`hardware` as run tags: ``hardware.cpu``, ``hardware.cores``, ``hardware.torch``, ..."""
    return {f"hardware.{name}": fact for name, fact in hardware().items()}
