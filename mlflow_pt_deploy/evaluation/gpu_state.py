"""Clocks, power, temperature and processes of a GPU, as ``nvidia-smi`` says; read only.

What ``nvidia-smi`` does not know (``[N/A]``) or does not say, because it is not installed or a
container hides it, is absent. Parsing is apart from asking.
"""

from __future__ import annotations

import csv
import subprocess
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

_QUERY = {
    "name": "name",
    "driver": "driver_version",
    "memory_mib": "memory.total",
    "sm_mhz": "clocks.sm",
    "max_sm_mhz": "clocks.max.sm",
    "memory_mhz": "clocks.mem",
    "power_w": "power.draw",
    "power_limit_w": "power.limit",
    "temperature_c": "temperature.gpu",
}
# The second name is that of drivers before 535.
_REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
# Bits of nvmlClocksEventReasons in nvml.h that slow a busy GPU down; an idle GPU has others.
_THROTTLING = {
    0x4: "power limit",
    0x8: "hardware slowdown",
    0x20: "temperature",
    0x40: "temperature, by hardware",
    0x80: "external power brake",
}
_PROCESSES = "pid,used_gpu_memory"
_FORMAT = "--format=csv,noheader,nounits"
_TIMEOUT_S = 20
_MIB = 2**20


@dataclass(frozen=True)
class GpuState:
    """A GPU at one moment; None: unknown.

    Attributes:
        name: Name of the GPU.
        driver: Version of the driver.
        memory_mib: Size of its memory.
        sm_mhz, max_sm_mhz: Clock of the multiprocessors, and its limit.
        memory_mhz: Clock of the memory.
        power_w, power_limit_w: Power, and its limit.
        temperature_c: Temperature of the chip.
        throttled: Why the clock is reduced.
    """

    name: str | None = None
    driver: str | None = None
    memory_mib: float | None = None
    sm_mhz: float | None = None
    max_sm_mhz: float | None = None
    memory_mhz: float | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    temperature_c: float | None = None
    throttled: tuple[str, ...] = ()

    def describe(self) -> str:
        """Format what changes from moment to moment; empty if nothing is known."""
        known = (
            (self.sm_mhz, self.max_sm_mhz, "MHz"),
            (self.memory_mhz, None, "MHz memory"),
            (self.power_w, self.power_limit_w, "W"),
            (self.temperature_c, None, "°C"),
        )
        return ", ".join(
            f"{value:.0f}{'' if limit is None else f' of {limit:.0f}'} {unit}"
            for value, limit, unit in known
            if value is not None
        )

    def tags(self) -> dict[str, str]:
        """What does not change, as run tags: ``hardware.gpu``, ``hardware.gpu_driver``, ..."""
        facts = {
            "gpu": self.name,
            "gpu_driver": self.driver,
            "gpu_memory_mib": self.memory_mib,
            "gpu_max_sm_mhz": self.max_sm_mhz,
            "gpu_power_limit_w": self.power_limit_w,
        }
        return {
            f"hardware.{key}": fact if isinstance(fact, str) else f"{fact:.0f}"
            for key, fact in facts.items()
            if fact is not None
        }


def state_commands(uuid: str) -> list[list[str]]:
    """Return the commands whose outputs `parse_state` reads; one of the last two may fail."""
    queries = (",".join(_QUERY.values()), *_REASONS)
    return [["nvidia-smi", "-i", uuid, f"--query-gpu={query}", _FORMAT] for query in queries]


def gpu_state(uuid: str) -> GpuState:
    """Ask for the state of a GPU.

    Args:
        uuid: ``GPU-...``; the numbers of CUDA and of nvidia-smi may differ. Empty: nothing is
            known.
    """
    if not uuid:
        return GpuState()
    return parse_state([_run(each) for each in state_commands(uuid)])


def parse_state(outputs: Sequence[str]) -> GpuState:
    """Read the outputs of `state_commands`; a command that failed has an empty one."""
    facts, *reasons = outputs
    cells = _rows(facts)[:1]
    values: dict[str, str | float | None] = {}
    if cells and len(cells[0]) == len(_QUERY):
        for key, cell in zip(_QUERY, cells[0], strict=True):
            values[key] = (_known(cell) or None) if key in ("name", "driver") else _number(cell)
    throttled = next(filter(None, map(_reasons, reasons)), ())
    return GpuState(**values, throttled=throttled)  # type: ignore[arg-type]  # by name


def _reasons(output: str) -> tuple[str, ...]:
    """Names of the bits of a mask such as ``0x0000000000000004``."""
    cell = _known(output)
    try:
        mask = int(cell, 16)
    except ValueError:
        return ()
    return tuple(reason for bit, reason in _THROTTLING.items() if mask & bit)


def gpu_processes(uuid: str) -> dict[int, float | None]:
    """Memory of each process on a GPU in bytes, by process id; None: not known.

    Inside a container nvidia-smi shows no process, or the ids of the host.
    """
    if not uuid:
        return {}
    query = ["nvidia-smi", "-i", uuid, f"--query-compute-apps={_PROCESSES}", _FORMAT]
    return parse_processes(_run(query))


def parse_processes(output: str) -> dict[int, float | None]:
    """Read the output of nvidia-smi's ``--query-compute-apps=pid,used_gpu_memory``."""
    found: dict[int, float | None] = {}
    for cells in _rows(output):
        if len(cells) == 2 and cells[0].isdecimal():
            mib = _number(cells[1])
            found[int(cells[0])] = None if mib is None else mib * _MIB
    return found


def gpu_warnings(
    loaded: GpuState, processes: Mapping[int, float | None], own: Collection[int]
) -> list[str]:
    """Return what makes timings on a GPU doubtful, as ends of a sentence.

    Args:
        loaded: State under load.
        processes: All processes on the GPU.
        own: Ids of the processes of the benchmark. If none of them is seen, the ids are those of
            another namespace and tell nothing.
    """
    found = []
    if loaded.throttled:
        found.append(f"ran on a GPU with a reduced clock ({'; '.join(loaded.throttled)})")
    others = set(processes) - set(own)
    if others and len(others) < len(processes):
        count = "another process" if len(others) == 1 else f"{len(others)} other processes"
        found.append(f"shared its GPU with {count}")
    return found


def _run(query: Sequence[str]) -> str:
    try:
        done = subprocess.run(query, capture_output=True, timeout=_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.decode("utf8", "replace")


def _rows(output: str) -> list[list[str]]:
    return [[cell.strip() for cell in row] for row in csv.reader(output.splitlines()) if row]


def _known(cell: str) -> str:
    """The content of a cell; empty for ``[N/A]``, ``[Unknown Error]`` and the like."""
    cell = cell.strip()
    return "" if cell.startswith("[") or cell in ("N/A", "Not Supported") else cell


def _number(cell: str) -> float | None:
    try:
        return float(_known(cell).split()[0])
    except (ValueError, IndexError):
        return None
