"""CUDA graphs over a few (rows, length) buckets, with eager PyTorch's kernels and weights.

A batch is padded to the smallest bucket that holds it, see `captured_graph`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from mlflow_pt_deploy.runtimes.base import Inputs, Logits, Predict, Variant
from mlflow_pt_deploy.runtimes.captured_graph import GraphLanes, GraphPart, Module
from mlflow_pt_deploy.runtimes.eager import load_eager

if TYPE_CHECKING:
    from mlflow_pt_deploy.models import Classifier

Bucket = tuple[int, int]
"""Rows and length; the length is 0 if axis 1 is fixed, as for images."""

ROWS = (1, 2, 4, 8, 16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
LENGTHS = (16, 32, 64, 128, 256, 512)
# Batches below this size take about as long as an empty one: they are not split by length.
_SPLIT_TOKENS = 4096
_MASK = "attention_mask"


@dataclass(frozen=True)
class CudaGraphs(Variant):
    """Eager PyTorch replayed as CUDA graphs; stores the same files as eager."""

    runtime: ClassVar[str] = "cudagraphs"
    gpu_precisions: ClassVar[frozenset[str]] = frozenset({"fp32", "bf16", "fp16"})

    def export(
        self, module: Classifier, example: Inputs, calibration: Sequence[Inputs], folder: Path
    ) -> None:
        from mlflow_pt_deploy.models import save_classifier

        save_classifier(module, folder)

    def load(self, folder: Path, *, device: str, threads: int) -> Predict:
        module = load_eager(folder, self.precision, device, threads)
        preprocessor = module.preprocessor
        example = preprocessor.collate(preprocessor.warmup_rows()[:1])
        longest = [axes[1].maximum for axes in preprocessor.axes.values() if 1 in axes]
        return GraphPredictor(
            module, example, device=device, lengths=lengths_up_to(max(longest, default=0))
        )


class Part(NamedTuple):
    """Rows of a batch for one bucket: their indices and the bucket's shape."""

    indices: npt.NDArray[np.int64]
    rows: int
    length: int


class GraphPredictor:
    """A `Predict` that replays one graph per bucket; safe for concurrent calls, which overlap.

    A batch of many tokens is first split by length, so that short rows are not padded to the
    longest one. Buckets are captured on first use, or by `warm_up_buckets`.

    Args:
        module: See `captured_graph.Module`.
        example: Any batch; its rows fill the unused rows of a bucket.
        device: See `CapturedGraph`.
        rows: Bucket sizes, ascending; larger batches are split.
        lengths: Bucket lengths (axis 1 of every input), ascending; the last one is the maximum
            length of the model. Empty if axis 1 is fixed, as for images.
    """

    def __init__(
        self,
        module: Module,
        example: Inputs,
        *,
        device: str,
        rows: Sequence[int] = ROWS,
        lengths: Sequence[int] = LENGTHS,
    ) -> None:
        self._module = module
        self._example = {name: array[:1] for name, array in example.items()}
        self._rows = tuple(rows)
        self._lengths = tuple(lengths)
        self._lanes = GraphLanes(self._make, device)

    def __call__(self, inputs: Inputs) -> Logits:
        return self.launch(inputs)()

    def launch(self, inputs: Inputs) -> Callable[[], Logits]:
        """Start a batch; returns a function that waits for its logits, to be called once."""
        parts = self.parts(inputs)
        collect = self._lanes.launch(
            GraphPart(part[1:], len(part.indices), partial(_fill, inputs=inputs, part=part))
            for part in parts
        )
        return lambda: _in_row_order(parts, collect())

    def warm_up_buckets(self, max_rows: int, max_tokens: int, longest: int) -> None:
        """Capture every bucket that batches within these limits use, see `reachable_buckets`."""
        buckets = reachable_buckets(self._rows, self._lengths, max_rows, max_tokens, longest)
        self._lanes.warm_up(buckets)

    def parts(self, inputs: Inputs) -> list[Part]:
        """Split a batch into parts, each with the smallest bucket that holds it."""
        size = len(next(iter(inputs.values())))
        indices = np.arange(size)
        if not self._lengths:
            return self._split(indices, 0)
        longest = next(iter(inputs.values())).shape[1]
        length = smallest_bucket(self._lengths, longest)
        if _MASK not in inputs or size * length <= _SPLIT_TOKENS:
            return self._split(indices, length)
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
        return [Part(chunk, smallest_bucket(self._rows, len(chunk)), length) for chunk in chunks]

    def _make(self, bucket: Bucket) -> tuple[Module, Inputs]:
        """The module, and valid rows of a bucket's shape, so that unused rows compute no NaN."""
        rows, length = bucket
        filler = {}
        for name, array in self._example.items():
            shape = (rows, length, *array.shape[2:]) if length else (rows, *array.shape[1:])
            filler[name] = np.zeros(shape, dtype=array.dtype)
            filler[name][:, : array.shape[1]] = array[:, : shape[1]]
        return self._module, filler


def lengths_up_to(longest: int) -> tuple[int, ...]:
    """Bucket lengths of a model whose rows have at most `longest` tokens; empty for 0."""
    return (*(length for length in LENGTHS if length < longest), longest) if longest else ()


def smallest_bucket(sizes: Sequence[int], required: int) -> int:
    """Smallest size that is at least `required`, or the largest size."""
    return sizes[min(bisect_left(sizes, required), len(sizes) - 1)]


def reachable_buckets(
    rows: Sequence[int], lengths: Sequence[int], max_rows: int, max_tokens: int, longest: int
) -> list[Bucket]:
    """Buckets that a micro-batcher with these limits can need.

    Args:
        rows: See `GraphPredictor`.
        lengths: See `GraphPredictor`.
        max_rows: Most rows of a batch.
        max_tokens: Most tokens of a batch of several rows, padding included.
        longest: Most tokens of a row; for images, the tokens that each of them counts as.

    Returns:
        Largest first: smaller graphs then reuse its memory from the pool.
    """
    by_length = used_from(lengths) or [(0, longest)]
    found = [
        (row_bucket, length_bucket)
        for row_bucket, least_rows in used_from(rows)
        for length_bucket, least_length in by_length
        if least_rows <= max_rows
        and least_length <= longest
        and (least_rows == 1 or least_rows * least_length <= max_tokens)
    ]
    return sorted(found, reverse=True)


def used_from(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Each size of a bucket, and the smallest size for which it is used."""
    return [(size, below + 1) for below, size in pairwise((0, *sizes))]


def _in_row_order(parts: Sequence[Part], results: Sequence[Logits]) -> Logits:
    logits = np.empty((sum(map(len, results)), results[0].shape[1]), dtype=np.float32)
    for part, result in zip(parts, results, strict=True):
        logits[part.indices] = result
    return logits


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
