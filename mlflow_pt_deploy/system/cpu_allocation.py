"""Number of replicas, and the CPU cores of each; pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlflow_pt_deploy.errors import ServingError

# A process keeps about four cores busy: the event loop takes one, and a small model gains little
# from more than three threads. A machine with fewer than eight cores runs one process.
CORES_PER_REPLICA = 4
# Each replica polls the registry, and on the CPU has its own copy of the model.
MAX_REPLICAS = 8


@dataclass(frozen=True)
class Share:
    """CPU share of a replica.

    Attributes:
        cores: Number of cores it may keep busy.
        pinned: Numbers of the cores it is pinned to; empty: not pinned.
    """

    cores: int
    pinned: tuple[int, ...] = ()


def count_replicas(requested: int, cores: int, *, fit: bool = True) -> int:
    """Number of replicas.

    Args:
        requested: Number that the user requested; 0: choose by `cores`.
        cores: Usable cores.
        fit: Whether this system spreads connections over several replicas.
    """
    return requested or (min(max(1, cores // CORES_PER_REPLICA), MAX_REPLICAS) if fit else 1)


def share_cores(replicas: int, cores: int, numbers: Sequence[int], pin: bool) -> list[Share]:
    """Divide the cores evenly; shares differ by at most one core.

    Pinning is optional: a pinned replica cannot use idle cores of others, and the kernel
    distributes connections without regard to load.

    Args:
        replicas: Number of replicas.
        cores: Usable cores; a container's quota may make them fewer than `numbers`.
        numbers: Core numbers in topological order.
        pin: Whether to pin each replica to its own cores.

    Raises:
        ServingError: There are fewer cores than replicas to pin.
    """
    if pin and len(numbers) < replicas:
        raise ServingError(
            f"pin: {replicas} replicas need a core each, but there are {len(numbers)}; give fewer "
            "replicas, or leave pin out"
        )
    shares = []
    for index in range(replicas):
        own = _part(range(cores), index, replicas)
        pinned = _part(numbers, index, replicas) if pin else ()
        shares.append(Share(max(1, len(own)), tuple(pinned)))
    return shares


def describe_shares(shares: Sequence[Share]) -> str:
    """Describe the shares in one line."""
    counts = sorted({share.cores for share in shares})
    each = " or ".join(map(str, counts)) + (" core" if counts == [1] else " cores")
    if len(shares) == 1:
        return f"1 process for {each}"
    pinned = [",".join(map(str, share.pinned)) for share in shares if share.pinned]
    where = f"pinned to {' | '.join(pinned)}" if pinned else "not pinned"
    return f"{len(shares)} replicas, each a process for {each}, {where}"


def _part(whole: Sequence[int], index: int, parts: int) -> Sequence[int]:
    return whole[index * len(whole) // parts : (index + 1) * len(whole) // parts]
