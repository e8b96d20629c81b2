"""Processes that train one model together, each on its share of every batch.

PyTorch's DistributedDataParallel averages the gradients, so all processes make the same steps as
one process would with the whole batch. gloo connects processes on CPUs, NCCL on GPUs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import numpy.typing as npt
import torch
from torch import distributed, nn

from mlflow_pt_deploy.errors import TrainingError
from mlflow_pt_deploy.system.device import check_gpus
from mlflow_pt_deploy.system.hardware import usable_cores
from mlflow_pt_deploy.system.ranks import Ranks

# Process 0 may label rows while the other processes wait. The end of a process is noticed earlier.
_TIMEOUT = timedelta(hours=2)


@dataclass(frozen=True)
class ProcessGroup:
    """A process and those that train with it; alone by default, and then nothing is sent.

    Attributes:
        rank: Number of this process, from 0.
        size: Number of processes.
        device: Device of the tensors that are sent, ``cpu`` or ``cuda``.
    """

    rank: int = 0
    size: int = 1
    device: str = "cpu"

    def wrap(self, model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> nn.Module:
        """Return the module to call in training: weights of process 0, averaged gradients.

        Args:
            model: The model; it is called once, to find weights that no output depends on, such as
                those of a pooler. DistributedDataParallel must know of them.
            inputs: Its inputs for a row.
        """
        if self.size == 1:
            return model
        model.eval()
        model(*inputs).sum().backward()
        unused = any(each.requires_grad and each.grad is None for each in model.parameters())
        model.zero_grad(set_to_none=True)
        return nn.parallel.DistributedDataParallel(model, find_unused_parameters=unused)

    def share(
        self, rows: npt.NDArray[np.int64], least: int = 1
    ) -> tuple[npt.NDArray[np.int64], float]:
        """Return this process's rows of a batch, and the weight of their mean loss.

        With these weights the average over all processes is the mean over the batch. A share below
        `least` rows is filled with other rows of the batch.
        """
        mine = rows[self.rank :: self.size]
        weight = len(mine) * self.size / len(rows)
        return (mine if len(mine) >= least else np.resize(rows, least)), weight

    def sum(self, number: float) -> float:
        """Return the sum of the number over all processes."""
        if self.size == 1:
            return number
        total = torch.tensor(number, dtype=torch.float64, device=self.device)
        distributed.all_reduce(total)
        return float(total)

    def share_buffers(self, model: nn.Module) -> None:
        """Give all processes the buffers of process 0, e.g. statistics of batch norm."""
        if self.size > 1:
            for buffer in model.buffers():
                distributed.broadcast(buffer, 0)

    def broadcast(self, content: bytes) -> bytes:
        """Return the bytes of process 0 in all processes."""
        if self.size == 1:
            return content
        length = torch.tensor(len(content), device=self.device)
        distributed.broadcast(length, 0)
        data = torch.empty(int(length), dtype=torch.uint8)
        if self.rank == 0:
            data = torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else data
        data = data.to(self.device)
        distributed.broadcast(data, 0)
        return data.cpu().numpy().tobytes()

    def check_same(self, digest: str) -> None:
        """Check that this process has the training rows of process 0.

        Raises:
            TrainingError: It has others.
        """
        if self.broadcast(digest.encode()) != digest.encode():
            raise TrainingError(
                "it read other rows than process 0. All processes must find the same data and "
                "teacher under the same names: give --data, not rows in memory."
            )


@contextmanager
def joined(ranks: Ranks, device: str, rendezvous: str = "env://") -> Iterator[ProcessGroup]:
    """Meet the other processes, and leave them at the end of the block.

    Inside the block this process uses its part of the machine's cores, or its own GPU.

    Args:
        ranks: Place of this process.
        device: ``cpu`` or ``cuda``: the GPU of this process's local rank.
        rendezvous: Where the processes meet, as PyTorch's `init_method`; ``env://`` is torchrun's
            ``MASTER_ADDR`` and ``MASTER_PORT``.

    Raises:
        UnsupportedError: This machine has fewer GPUs than processes.
    """
    if device == "cuda":
        check_gpus(ranks.local_size)
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, usable_cores() // ranks.local_size))
    if device == "cuda":
        torch.cuda.set_device(ranks.local_rank)
    try:
        distributed.init_process_group(
            "nccl" if device == "cuda" else "gloo",
            init_method=rendezvous,
            timeout=_TIMEOUT,
            rank=ranks.rank,
            world_size=ranks.size,
        )
        yield ProcessGroup(ranks.rank, ranks.size, device)
    finally:
        if distributed.is_initialized():
            distributed.destroy_process_group()
        torch.set_num_threads(threads)


def check_shares(processes: int, batch_size: int, *, least: int = 1) -> None:
    """Check that each process gets rows of every full batch.

    Args:
        processes: Number of processes.
        batch_size: Rows of a training step.
        least: Rows that a process needs; 2 with batch norm.

    Raises:
        TrainingError: There are more processes than the batch has shares.
    """
    if processes > 1 and batch_size < processes * least:
        raise TrainingError(
            f"processes is {processes}, and a batch of {batch_size} rows has no {least} for each. "
            f"Give at most {max(1, batch_size // least)} processes, or a larger --batch-size."
        )


ALONE = ProcessGroup()
"""A group of this process alone."""
