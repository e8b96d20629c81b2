"""CUDA graphs for a few shapes: one launch per batch instead of one per kernel.

For a small model Python needs more time to launch the kernels than the GPU to run them. A graph is
captured once per bucket, a shape (rows, length), and replayed with new contents. A batch is padded
to the smallest bucket that holds it. Copies to and from pinned host memory are part of
the graph. See https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.

On the CPU the same code runs the module directly, for tests without a GPU.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from mlflow_pt_deploy.runtimes.base import Inputs, Logits

if TYPE_CHECKING:
    import torch

ROWS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
LENGTHS = (16, 32, 64, 128, 256, 512)
# Batches below this size take about as long as an empty one: they are not split by length.
_SPLIT_TOKENS = 4096
# Calls before a capture, in which libraries allocate workspaces and select kernels.
_WARM_UP_CALLS = 2
_MASK = "attention_mask"


class Part(NamedTuple):
    """Rows of a batch for one bucket: their indices and the bucket's shape."""

    indices: npt.NDArray[np.int64]
    rows: int
    length: int


class CapturedGraph:
    """One captured graph with static input and output buffers.

    Not safe for concurrent use: the buffers hold one batch at a time.

    Args:
        module: Takes one tensor per input on `device`; returns logits (rows, classes).
        example: Valid input arrays of the bucket's shape.
        device: ``cuda``, ``cuda:1``, ...; on ``cpu`` no graph is captured.
        pool: Memory pool shared by graphs that never run at the same time.

    Attributes:
        inputs: Views of the pinned input buffers; write here, then call `launch`.
    """

    def __init__(
        self, module: Callable[..., torch.Tensor], example: Inputs, device: str, pool: Any = None
    ) -> None:
        import torch

        self._module = module
        self._device = torch.device(device)
        self._graph: torch.cuda.CUDAGraph | None = None
        with torch.inference_mode():
            self._hosts = [self._host_buffer(torch.from_numpy(array)) for array in example.values()]
            self._tensors = [torch.empty_like(host, device=device) for host in self._hosts]
            self.inputs = {
                name: host.numpy() for name, host in zip(example, self._hosts, strict=True)
            }
            if self._device.type == "cuda":
                with torch.cuda.device(self._device):
                    self._capture(pool)
            else:
                self._output = torch.empty_like(self._logits())

    def launch(self) -> None:
        """Start the computation of the contents of `inputs`."""
        import torch

        if self._graph is not None:
            self._graph.replay()
        else:
            with torch.inference_mode():
                self._step()

    def logits(self) -> Logits:
        """Wait for the result; the next launch overwrites the array."""
        import torch

        if self._graph is not None:
            torch.cuda.current_stream(self._device).synchronize()
        return np.asarray(self._output.numpy(), dtype=np.float32)

    def _host_buffer(self, tensor: torch.Tensor) -> torch.Tensor:
        if self._device.type != "cuda":
            return tensor.clone()
        return tensor.pin_memory()

    def _logits(self) -> torch.Tensor:
        for tensor, host in zip(self._tensors, self._hosts, strict=True):
            tensor.copy_(host, non_blocking=True)
        return self._module(*self._tensors).float()

    def _step(self) -> None:
        self._output.copy_(self._logits(), non_blocking=True)

    def _capture(self, pool: Any) -> None:
        import torch

        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP_CALLS):
                logits = self._logits()
            self._output = torch.empty(logits.shape, dtype=torch.float32, pin_memory=True)
            self._step()
        stream.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may allocate during the capture, e.g. to serve the previous model.
        with torch.cuda.graph(
            self._graph, pool=pool, stream=stream, capture_error_mode="thread_local"
        ):
            self._step()


class CudaGraphs:
    """A `Predict` that replays one graph per bucket; safe for concurrent calls.

    A batch of many tokens is first split by length, so that short rows are not padded to the
    longest one. Buckets are captured on first use, or by `warm_up`.

    Args:
        module: See `CapturedGraph`.
        example: Any batch; its rows fill the unused rows of a bucket.
        device: See `CapturedGraph`.
        rows: Bucket sizes, ascending; larger batches are split.
        lengths: Bucket lengths (axis 1 of every input), ascending; the last one is the maximum
            length of the model. Empty if axis 1 is fixed, as for images.
    """

    def __init__(
        self,
        module: Callable[..., torch.Tensor],
        example: Inputs,
        *,
        device: str,
        rows: Sequence[int] = ROWS,
        lengths: Sequence[int] = LENGTHS,
    ) -> None:
        self._module = module
        self._example = {name: array[:1] for name, array in example.items()}
        self._device = device
        self._rows = tuple(rows)
        self._lengths = tuple(lengths)
        self._graphs: dict[tuple[int, int], CapturedGraph] = {}
        self._pool: Any = None
        self._lock = threading.Lock()

    def __call__(self, inputs: Inputs) -> Logits:
        with self._lock:
            return self._predict(inputs)

    def warm_up(self, shapes: Sequence[tuple[int, int]] = ()) -> None:
        """Capture buckets before the first request.

        Args:
            shapes: Pairs of rows and length; empty captures every bucket.
        """
        all_shapes = [(rows, length) for rows in self._rows for length in self._lengths or (0,)]
        with self._lock:
            # Largest first: smaller graphs then reuse its memory from the pool.
            for rows, length in sorted(shapes or all_shapes, reverse=True):
                self._bucket(rows, length)

    def parts(self, inputs: Inputs) -> list[Part]:
        """Split a batch into parts, each with the smallest bucket that holds it."""
        size = len(next(iter(inputs.values())))
        indices = np.arange(size)
        if not self._lengths:
            return list(self._split(indices, 0))
        longest = next(iter(inputs.values())).shape[1]
        length = _smallest_bucket(self._lengths, longest)
        if _MASK not in inputs or size * length <= _SPLIT_TOKENS:
            return list(self._split(indices, length))
        lengths = inputs[_MASK].shape[1] - np.argmax(inputs[_MASK][:, ::-1] != 0, axis=1)
        buckets = np.searchsorted(self._lengths, lengths)
        return [
            part
            for bucket in np.unique(buckets)
            for part in self._split(indices[buckets == bucket], self._lengths[bucket])
        ]

    def _split(self, indices: npt.NDArray[np.int64], length: int) -> list[Part]:
        size = self._rows[-1]
        chunks = [indices[start : start + size] for start in range(0, len(indices), size)]
        return [Part(chunk, _smallest_bucket(self._rows, len(chunk)), length) for chunk in chunks]

    def _predict(self, inputs: Inputs) -> Logits:
        in_flight: dict[CapturedGraph, Part] = {}
        results: list[tuple[Part, Logits]] = []

        def collect(bucket: CapturedGraph) -> None:
            part = in_flight.pop(bucket)
            results.append((part, bucket.logits()[: len(part.indices)].copy()))

        for part in self.parts(inputs):
            bucket = self._bucket(part.rows, part.length)
            if bucket in in_flight:  # its buffers are in use
                collect(bucket)
            _fill(bucket.inputs, inputs, part)
            bucket.launch()
            in_flight[bucket] = part
        for bucket in list(in_flight):
            collect(bucket)
        size = len(next(iter(inputs.values())))
        logits = np.empty((size, results[0][1].shape[1]), dtype=np.float32)
        for part, result in results:
            logits[part.indices] = result
        return logits

    def _bucket(self, rows: int, length: int) -> CapturedGraph:
        graph = self._graphs.get((rows, length))
        if graph is None:
            example = self._filler(rows, length)
            graph = CapturedGraph(self._module, example, self._device, self._shared_pool())
            self._graphs[rows, length] = graph
        return graph

    def _shared_pool(self) -> Any:
        import torch

        if self._pool is None and torch.device(self._device).type == "cuda":
            self._pool = torch.cuda.graph_pool_handle()
        return self._pool

    def _filler(self, rows: int, length: int) -> dict[str, npt.NDArray[Any]]:
        """Valid rows of a bucket's shape, so that unused rows compute no NaN."""
        filler = {}
        for name, array in self._example.items():
            shape = (rows, length, *array.shape[2:]) if length else (rows, *array.shape[1:])
            filler[name] = np.zeros(shape, dtype=array.dtype)
            filler[name][:, : array.shape[1]] = array[:, : shape[1]]
        return filler


def _smallest_bucket(sizes: Sequence[int], required: int) -> int:
    """Smallest size that is at least `required`, or the largest size."""
    return sizes[min(bisect_left(sizes, required), len(sizes) - 1)]


def _fill(buffers: Inputs, inputs: Inputs, part: Part) -> None:
    """Write a part's rows, padded with zeros, into a bucket's buffers."""
    rows = len(part.indices)
    for name, buffer in buffers.items():
        array = inputs[name][part.indices]
        if part.length:
            width = min(array.shape[1], part.length)
            buffer[:rows, :width] = array[:, :width]
            buffer[:rows, width:] = 0
        else:
            buffer[:rows] = array
