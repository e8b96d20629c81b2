"""Captured CUDA graphs: one launch per batch instead of one per kernel.

For a small model Python needs more time to launch the kernels than the GPU to run them. A graph is
captured once for a bucket, a shape of the inputs, and replayed with new contents. Copies to and
from pinned host memory are part of the graph.
See https://docs.pytorch.org/docs/stable/notes/cuda.html#cuda-graphs.

On the CPU the same code runs the module directly, for tests without a GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import suppress
from queue import LifoQueue
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mlflow_pt_deploy.runtimes.base import Inputs, Logits
from mlflow_pt_deploy.system.device import CPU

if TYPE_CHECKING:
    import torch

Module = Callable[..., "torch.Tensor"]
"""Takes one tensor per input, on the device; returns logits (rows, classes)."""

# Calls before a capture, in which libraries allocate workspaces and select kernels.
_WARM_UP_CALLS = 2
# A capture starts by waiting for the device, which would end a capture in another thread.
_CAPTURING = threading.Lock()


class GraphPart(NamedTuple):
    """Rows of a batch that fill one bucket.

    Attributes:
        bucket: Identifies the graph.
        rows: Number of rows; the bucket may hold more.
        write: Writes the rows into the input buffers of the graph.
    """

    bucket: Hashable
    rows: int
    write: Callable[[Inputs], None]


class CapturedGraph:
    """One captured graph with static input and output buffers.

    Not safe for concurrent use: the buffers hold one batch at a time.

    Args:
        module: See `Module`.
        example: Valid input arrays of the bucket's shape.
        device: ``cuda``, ``cuda:1``, ...; on ``cpu`` no graph is captured.
        stream: Where it runs; required on a GPU.
        pool: Memory pool, shared by graphs of the same stream.

    Attributes:
        inputs: Views of the pinned input buffers; write here, then call `launch`.
    """

    def __init__(
        self, module: Module, example: Inputs, device: str, stream: Any = None, pool: Any = None
    ) -> None:
        import torch

        self._module = module
        self._stream = stream
        self._graph: torch.cuda.CUDAGraph | None = None
        with torch.inference_mode():
            if device == CPU:
                self._allocate(example, device)
            else:
                with torch.cuda.device(device), _CAPTURING:
                    self._allocate(example, device)
                    self._capture(pool)

    def launch(self) -> None:
        """Start the computation of the contents of `inputs`; returns at once on a GPU."""
        import torch

        if self._graph is None:
            with torch.inference_mode():
                self._output = self._logits()
            return
        with torch.cuda.stream(self._stream):
            self._graph.replay()
            self._done.record()

    def logits(self) -> Logits:
        """Wait for the result; the next launch overwrites the array."""
        if self._graph is not None:
            self._done.synchronize()
        return np.asarray(self._output.numpy(), dtype=np.float32)

    def _allocate(self, example: Inputs, device: str) -> None:
        import torch

        arrays = [torch.from_numpy(np.ascontiguousarray(array)) for array in example.values()]
        self._hosts = [array.clone() if device == CPU else array.pin_memory() for array in arrays]
        self._tensors = [torch.empty_like(host, device=device) for host in self._hosts]
        self.inputs = {name: host.numpy() for name, host in zip(example, self._hosts, strict=True)}

    def _logits(self) -> torch.Tensor:
        for tensor, host in zip(self._tensors, self._hosts, strict=True):
            tensor.copy_(host, non_blocking=True)
        return self._module(*self._tensors).float()

    def _step(self) -> None:
        self._output.copy_(self._logits(), non_blocking=True)

    def _capture(self, pool: Any) -> None:
        import torch

        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM_UP_CALLS):
                logits = self._logits()
            self._output = torch.empty(logits.shape, dtype=torch.float32, pin_memory=True)
            self._step()
        self._stream.synchronize()
        self._done = torch.cuda.Event()
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate during the capture, e.g. to serve the previous model.
        with torch.cuda.graph(
            graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            self._step()
        self._graph = graph


class _Lane:
    """A stream, its memory pool, and its graphs by bucket."""

    def __init__(self, device: str) -> None:
        self.graphs: dict[Hashable, CapturedGraph] = {}
        self.stream = self.pool = None
        if device != CPU:
            import torch

            self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def settle(self) -> None:
        """Wait for what was launched, so that the buffers are free."""
        if self.stream is not None:
            self.stream.synchronize()


class GraphLanes:
    """Graphs of a model in several lanes, so that copies and kernels of two batches overlap.

    A lane has a stream, memory and graphs of its own, and holds one batch from `launch` until its
    result is collected. The weights are shared. Safe for concurrent calls.

    Args:
        make: Returns the module and an example for a bucket; called once per lane and bucket.
        device: See `CapturedGraph`.
        count: Number of lanes; one more batch waits in `launch`.
    """

    def __init__(
        self, make: Callable[[Any], tuple[Module, Inputs]], device: str, count: int = 2
    ) -> None:
        self._make = make
        self._device = device
        self._count = count
        self._warming = threading.Lock()
        # Last in, first out: a single caller uses, and captures, the graphs of one lane only.
        self._free: LifoQueue[_Lane] = LifoQueue()
        for _ in range(count):
            self._free.put(_Lane(device))

    def launch(self, parts: Iterable[GraphPart]) -> Callable[[], list[Logits]]:
        """Start a batch; returns a function that waits for the logits of each part.

        It must be called exactly once: until then the batch occupies a lane.
        """
        lane = self._free.get()
        results: list[Logits] = []
        waiting: list[tuple[CapturedGraph, int]] = []

        def collect_first() -> None:
            graph, rows = waiting.pop(0)
            results.append(graph.logits()[:rows].copy())

        def collect() -> list[Logits]:
            try:
                while waiting:
                    collect_first()
            finally:
                self._free.put(lane)
            return results

        try:
            for part in parts:
                graph = self._graph(lane, part.bucket)
                while any(graph is busy for busy, _ in waiting):  # its buffers are in use
                    collect_first()
                part.write(graph.inputs)
                graph.launch()
                waiting.append((graph, part.rows))
        except BaseException:
            with suppress(RuntimeError):  # a device that failed fails here again
                lane.settle()
            self._free.put(lane)
            raise
        return collect

    def warm_up(self, buckets: Sequence[Hashable]) -> None:
        """Capture buckets in every lane, in their order; waits for running batches."""
        lanes: list[_Lane] = []
        with self._warming:  # two callers with one lane each would wait for each other
            try:
                for _ in range(self._count):
                    lanes.append(self._free.get())
                    for bucket in buckets:
                        self._graph(lanes[-1], bucket)
            finally:
                for lane in lanes:
                    self._free.put(lane)

    def _graph(self, lane: _Lane, bucket: Hashable) -> CapturedGraph:
        graph = lane.graphs.get(bucket)
        if graph is None:
            module, example = self._make(bucket)
            graph = CapturedGraph(module, example, self._device, lane.stream, lane.pool)
            lane.graphs[bucket] = graph
        return graph
