"""How many replicas, and which part of the cores each of them has; pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mlflow_pt_deploy.errors import ServingError

# One process keeps about four cores busy: its event loop takes one, and a small model gains little
# from more than three threads. So a machine with less than eight has one.
CORES_EACH = 4
# Each holds the model in its own memory, and looks at the registry by itself.
MOST = 8


@dataclass(frozen=True)
class Share:
    """What one replica has.

    Attributes:
        cores: How many it may keep busy.
        pinned: Numbers of those that it stays on; empty: any.
    """

    cores: int
    pinned: tuple[int, ...] = ()


def count_replicas(asked: int, cores: int, *, fit: bool = True) -> int:
    """How many replicas; `asked`, or by the number of usable cores where it is 0.

    Args:
        asked: What the user wants.
        cores: How many are usable.
        fit: Whether this system and the model suit several: a GPU would hold the model many times.
    """
    return asked or (min(max(1, cores // CORES_EACH), MOST) if fit else 1)


def share_cores(replicas: int, cores: int, numbers: Sequence[int], pin: bool) -> list[Share]:
    """A share for each replica; they differ by one core at most.

    Pinned only where asked for: a pinned replica cannot use the cores that its neighbours leave
    idle, and the kernel hands out connections without looking who is idle.

    Args:
        replicas: How many.
        cores: How many are usable; a container's quota may make them fewer than `numbers`.
        numbers: Of the cores, neighbours side by side.
        pin: Whether each stays on its own.

    Raises:
        ServingError: There are fewer cores than replicas to pin.
    """
    if pin and len(numbers) < replicas:
        raise ServingError(
            f"pin: {replicas} replicas cannot have a core each of {len(numbers)}; give fewer "
            "replicas, or leave pin out"
        )
    shares = []
    for index in range(replicas):
        own = _part(range(cores), index, replicas)
        pinned = _part(numbers, index, replicas) if pin else ()
        shares.append(Share(max(1, len(own)), tuple(pinned)))
    return shares


def describe_shares(shares: Sequence[Share]) -> str:
    """What was decided, in one line."""
    counts = sorted({share.cores for share in shares})
    each = " or ".join(map(str, counts)) + (" core" if counts == [1] else " cores")
    if len(shares) == 1:
        return f"1 process for {each}"
    pinned = [",".join(map(str, share.pinned)) for share in shares if share.pinned]
    where = f"pinned to {' | '.join(pinned)}" if pinned else "not pinned"
    return f"{len(shares)} replicas, each a process for {each}, {where}"


def _part(whole: Sequence[int], index: int, parts: int) -> Sequence[int]:
    return whole[index * len(whole) // parts : (index + 1) * len(whole) // parts]
