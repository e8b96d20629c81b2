"""The place of this process among those that torchrun started, read from its environment."""

from __future__ import annotations

import os
from dataclasses import dataclass

from mlflow_pt_deploy.errors import TrainingError

_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True)
class Ranks:
    """Place of a process in a training.

    Attributes:
        rank: Number of this process, from 0; process 0 alone logs and saves.
        size: Number of processes on all machines.
        local_rank: Number of this process on its machine; also the number of its GPU.
        local_size: Number of processes on this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    def environment(self) -> dict[str, str]:
        """Variables that tell a child process its place, as torchrun does."""
        numbers = (self.rank, self.size, self.local_rank, self.local_size)
        return dict(zip(_VARIABLES, map(str, numbers), strict=True))


def launched_ranks() -> Ranks:
    """Return the place that torchrun gave this process; without torchrun it is alone.

    Raises:
        TrainingError: A variable is missing or not a number.
    """
    given = [os.environ.get(name, "") for name in _VARIABLES]
    if not (given[0] and given[1]):
        return Ranks()
    if not all(text.isdecimal() for text in given):
        pairs = zip(_VARIABLES, given, strict=True)
        shown = ", ".join(f"{name}={text!r}" for name, text in pairs)
        raise TrainingError(
            f"{shown}: torchrun sets all four to numbers. Start the command with torchrun, or "
            "unset them."
        )
    return Ranks(*map(int, given))
