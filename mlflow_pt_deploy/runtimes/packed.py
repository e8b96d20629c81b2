"""Packed rows: a BERT that computes no padding, replayed as CUDA graphs, see `packed_bert`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt

from mlflow_pt_deploy.errors import VariantError
from mlflow_pt_deploy.runtimes.base import Inputs, Logits, Predict, Variant
from mlflow_pt_deploy.runtimes.captured_graph import GraphLanes, GraphPart, Module
from mlflow_pt_deploy.runtimes.cuda_graphs import smallest_bucket, used_from
from mlflow_pt_deploy.runtimes.eager import in_precision, load_eager

if TYPE_CHECKING:
    from mlflow_pt_deploy.models import Classifier

MODEL_TYPE = "bert"

# Few sizes of rows and of the longest row: unused rows have no tokens, and blocks of attention
# beyond the end of a row return at once.
TOKENS = tuple(sorted({*(16 << i for i in range(12)), *(24 << i for i in range(2, 11))}))
ROWS = (4, 32, 256, 1024)
LONGEST = (32, 128, 512)
_MAX_HEAD_WIDTH = 256  # of flash attention


class Bucket(NamedTuple):
    """Shape of a graph: tokens and rows of a batch, and length of its longest row."""

    tokens: int
    rows: int
    longest: int


@dataclass(frozen=True)
class Packed(Variant):
    """BERT over packed rows, as CUDA graphs; stores the same files as eager.

    For models of the type ``bert``; a GPU needs flash attention, which is for 16-bit precisions.
    """

    runtime: ClassVar[str] = "packed"
    gpu_precisions: ClassVar[frozenset[str]] = frozenset({"bf16", "fp16"})
    least_capability: ClassVar[tuple[int, int]] = (8, 0)

    def export(
        self, module: Classifier, example: Inputs, calibration: Sequence[Inputs], folder: Path
    ) -> None:
        from mlflow_pt_deploy.models import save_classifier

        check_packable(module.network.config, module.preprocessor)
        save_classifier(module, folder)

    def load(self, folder: Path, *, device: str, threads: int) -> Predict:
        from mlflow_pt_deploy.runtimes.packed_bert import PackedBert

        self.check_device_kind(device)
        classifier = load_eager(folder, "fp32", device, threads)
        check_packable(classifier.network.config, classifier.preprocessor)
        module = in_precision(PackedBert(classifier.network), self.precision).to(device).eval()
        return PackedPredictor(module, device)


def check_packable(config: Any, preprocessor: Any) -> None:
    """Check that a model is a BERT of the usual kind.

    Raises:
        VariantError: It is not; the message names what differs.
    """
    if config.model_type != MODEL_TYPE:
        raise VariantError(f"packed runs BERT only, and the model type is {config.model_type}.")
    width = config.hidden_size // config.num_attention_heads
    if getattr(config, "is_decoder", False):
        problem = "the model is a decoder"
    elif getattr(config, "position_embedding_type", "absolute") not in (None, "absolute"):
        problem = f"its positions are {config.position_embedding_type}"
    elif preprocessor.padding_side != "right":
        problem = "its rows are padded on the left"
    elif width % 8 or width > _MAX_HEAD_WIDTH:
        problem = f"its attention heads are {width} wide"
    else:
        return
    raise VariantError(
        f"packed runs BERT encoders with absolute positions and attention heads of a multiple of 8 "
        f"up to {_MAX_HEAD_WIDTH}, and {problem}. Use cudagraphs."
    )


class PackedPredictor:
    """A `Predict` without padding; safe for concurrent calls, which overlap.

    Args:
        module: A `PackedBert` on `device`.
        device: See `CapturedGraph`.
    """

    pads = False

    def __init__(self, module: Callable[..., Any], device: str) -> None:
        self._module = module
        self._lanes = GraphLanes(self._make, device)

    def __call__(self, inputs: Inputs) -> Logits:
        return self.launch(inputs)()

    def launch(self, inputs: Inputs) -> Callable[[], Logits]:
        """Start a batch; returns a function that waits for its logits, to be called once."""
        ids, mask = inputs["input_ids"], inputs["attention_mask"] != 0
        parts = [(ids[rows], mask[rows]) for rows in row_slices(mask.sum(1))]
        collect = self._lanes.launch(
            GraphPart(bucket_of(part.sum(1)), len(part), partial(_fill, ids=found, mask=part))
            for found, part in parts
        )
        return lambda: np.concatenate(collect())

    def warm_up_buckets(self, max_rows: int, max_tokens: int, longest: int) -> None:
        """Capture every bucket that batches within these limits use, see `reachable_buckets`."""
        self._lanes.warm_up(reachable_buckets(max_rows, max_tokens, longest))

    def _make(self, bucket: Bucket) -> tuple[Module, Inputs]:
        """The module for a bucket, and rows of two tokens, as many as it holds."""
        rows = min(bucket.rows, bucket.tokens // 2)
        mask = np.ones((rows, 2), dtype=bool)
        arrays = pack(np.zeros((rows, 2), dtype=np.int64), mask, bucket)
        return partial(self._module, longest=bucket.longest), arrays


def row_slices(lengths: npt.NDArray[Any]) -> list[slice]:
    """Cut a batch into parts of consecutive rows that the largest bucket holds."""
    cuts = [0]
    tokens = 0
    for row, length in enumerate(lengths.tolist()):
        tokens += length
        if row - cuts[-1] == ROWS[-1] or (tokens > TOKENS[-1] and row > cuts[-1]):
            cuts.append(row)
            tokens = length
    return [slice(start, stop) for start, stop in pairwise((*cuts, len(lengths)))]


def bucket_of(lengths: npt.NDArray[Any]) -> Bucket:
    """The smallest bucket that holds rows of these lengths."""
    longest = int(lengths.max())
    return Bucket(
        smallest_bucket(TOKENS, int(lengths.sum())),
        smallest_bucket(ROWS, len(lengths)),
        smallest_bucket(LONGEST, longest) if longest <= LONGEST[-1] else longest,
    )


def reachable_buckets(max_rows: int, max_tokens: int, longest: int) -> list[Bucket]:
    """Buckets that a micro-batcher with these limits can need, the largest first.

    Every row has two tokens or more.

    Args:
        max_rows: Most rows of a batch.
        max_tokens: Most tokens of a batch of several rows.
        longest: Most tokens of a row.
    """
    found = []
    for tokens, least_tokens in used_from(TOKENS):
        for rows, least_rows in used_from(ROWS):
            for length, least_length in used_from(LONGEST):
                alone = least_rows == 1 and least_tokens <= longest
                fits = max(2 * (least_rows - 1) + least_length, least_tokens)
                if (
                    fits <= min(tokens, rows * length)
                    and least_rows <= max_rows
                    and least_length <= longest
                    and (alone or fits <= max_tokens)
                ):
                    found.append(Bucket(tokens, rows, length))
    return sorted(found, reverse=True)


def pack(
    ids: npt.NDArray[Any], mask: npt.NDArray[np.bool_], bucket: Bucket
) -> dict[str, npt.NDArray[Any]]:
    """Arguments of `PackedBert` from padded rows.

    Args:
        ids: Token ids, int64 (rows, length).
        mask: Which of them are no padding; each row has at least one.
        bucket: Holds the rows.
    """
    found = ids[mask]
    lengths = mask.sum(1)
    arrays: dict[str, npt.NDArray[Any]] = {
        "ids": np.zeros(max(bucket.tokens, len(found)), dtype=np.int64),
        "places": np.zeros(max(bucket.tokens, len(found)), dtype=np.int64),
        "ends": np.full(bucket.rows + 1, len(found), dtype=np.int32),
    }
    arrays["ids"][: len(found)] = found
    arrays["places"][: len(found)] = np.nonzero(mask)[1]
    arrays["ends"][0] = 0
    arrays["ends"][1 : len(mask) + 1] = np.cumsum(lengths)
    return arrays


def _fill(buffers: Inputs, ids: npt.NDArray[Any], mask: npt.NDArray[np.bool_]) -> None:
    """Write padded rows into the buffers of their bucket."""
    for name, array in pack(ids, mask, bucket_of(mask.sum(1))).items():
        buffers[name][:] = array
