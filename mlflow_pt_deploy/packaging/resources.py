"""Memory and cores that a served model needs, measured, as Kubernetes writes them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

from mlflow_pt_deploy.artifacts.golden import read_golden_rows
from mlflow_pt_deploy.evaluation import Worker

# What the server takes beside the model: HTTP, registry client, request bodies.
_SERVER_MB = 160
_STEP_MB = 64


class Resources(NamedTuple):
    """Requests and limits of one replica.

    Attributes:
        rss_mb: Peak resident memory of a process that computed the golden rows, 10^6 bytes.
        memory_request_mi: Memory request, 2^20 bytes.
        memory_limit_mi: Memory limit.
        cores: Threads of a call of the model.
    """

    rss_mb: float
    memory_request_mi: int
    memory_limit_mi: int
    cores: int


def measure_resources(variant: Path, threads: int) -> Resources:
    """Load a variant in a fresh process, compute its golden rows, and read the peak memory.

    Args:
        variant: Folder of the variant.
        threads: Threads of a call.

    Raises:
        PtDeployError: The variant cannot run on this machine.
    """
    rows = read_golden_rows(variant)
    with Worker(variant, rows[0], threads=threads) as worker:
        worker.load_rows(rows)
        worker.batch(list(range(len(rows))), len(rows))
        rss_mb = worker.memory() / 1e6
    request = _round_up((rss_mb + _SERVER_MB) * 1e6 / 2**20)
    return Resources(rss_mb, request, _round_up(1.5 * request), threads)


def _round_up(mi: float) -> int:
    return math.ceil(mi / _STEP_MB) * _STEP_MB
