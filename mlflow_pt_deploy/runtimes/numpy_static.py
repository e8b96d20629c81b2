"""NumPy runtime for static students; serving needs neither PyTorch nor another runtime.

A static student is a sum of embeddings and two small matrix products. The overhead of a framework
would exceed the computation.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from mlflow_pt_deploy.errors import VariantError
from mlflow_pt_deploy.model_types import STATIC
from mlflow_pt_deploy.runtimes.base import Inputs, Logits, Predict, Variant

if TYPE_CHECKING:
    from mlflow_pt_deploy.models import Classifier


_WEIGHTS = "static.safetensors"
_SHAPE = "static.json"
_SLICE_BYTES = 2**20

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class NumPy(Variant):
    """Static student as arrays in safetensors, see `models.static` for the network."""

    runtime: ClassVar[str] = "numpy"

    def export(
        self, module: Classifier, example: Inputs, calibration: Sequence[Inputs], folder: Path
    ) -> None:
        from safetensors.numpy import save_file

        from mlflow_pt_deploy.models.static import PRIMES

        config = module.network.config
        if config.model_type != STATIC:
            raise VariantError("the numpy runtime supports static students only.")
        arrays = {name: tensor.numpy() for name, tensor in module.network.state_dict().items()}
        # The scale and shift of the layer norm are folded into the hidden layer.
        hidden = arrays["hidden.weight"] * arrays["norm.weight"]
        tables = {
            # One table for word pieces and n-grams needs a single gather.
            "embeddings": np.concatenate([arrays["pieces.weight"], arrays["grams.weight"]]),
            "hidden": np.ascontiguousarray(hidden.T),
            "hidden_bias": arrays["hidden.bias"] + arrays["hidden.weight"] @ arrays["norm.bias"],
            "output": np.ascontiguousarray(arrays["classifier.weight"].T),
            "output_bias": arrays["classifier.bias"],
        }
        save_file(tables, folder / _WEIGHTS)
        shape = {
            "pieces": config.vocab_size,
            "buckets": config.buckets,
            "multipliers": PRIMES[: config.ngrams],
            "epsilon": module.network.norm.eps,
        }
        (folder / _SHAPE).write_text(json.dumps(shape), encoding="utf8")

    def load(self, folder: Path, *, device: str, threads: int) -> Predict:
        from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

        self.check_device_kind(device)
        # The products are too small for a second thread, and waiting for a busy core is slow. The
        # limit applies to the whole process.
        threadpool_limits(1, user_api="blas")
        shape = json.loads((folder / _SHAPE).read_text(encoding="utf8"))
        return StaticPredictor(_load_arrays(folder / _WEIGHTS), **shape)


def _load_arrays(path: Path) -> dict[str, Array]:
    """Load all arrays in slices of about 1 MB.

    safetensors copies with the GIL held: a table of 90 MB at once stops the event loop of a server
    for 75 ms.
    """
    from safetensors import safe_open

    arrays = {}
    with safe_open(path, framework="numpy") as file:
        for name in file.keys():  # noqa: SIM118  # not a dict
            part = file.get_slice(name)
            first = part[:1]
            array = np.empty(part.get_shape(), dtype=first.dtype)
            rows = max(1, _SLICE_BYTES // first.nbytes)
            for start in range(0, len(array), rows):
                stop = min(start + rows, len(array))
                array[start:stop] = part[start:stop]
            arrays[name] = array
    return arrays


class StaticPredictor:
    """The network of `models.static` without padding.

    For one row the call overhead of NumPy dominates, so there are few calls: the mean of the layer
    norm is subtracted from the columns of the hidden layer in advance, and the division is done
    after that layer.

    Attributes:
        embeddings: Of the pieces, then of the n-grams, float32 (pieces + buckets, width).
        hidden: float32 (width, hidden), without the mean of its columns.
        hidden_bias, output, output_bias: float32 (hidden,), (hidden, classes), (classes,).
        epsilon: Added to the variance.
    """

    pads = False

    def __init__(
        self,
        arrays: dict[str, Array],
        *,
        pieces: int,
        buckets: int,
        multipliers: list[int],
        epsilon: float,
    ) -> None:
        self.embeddings = arrays["embeddings"]
        self.hidden = arrays["hidden"] - arrays["hidden"].mean(0)
        self.hidden_bias = arrays["hidden_bias"]
        self.output, self.output_bias = arrays["output"], arrays["output_bias"]
        width = self.embeddings.shape[1]
        self._mean = np.full(width, 1 / width, dtype=np.float32)
        self._pieces, self._buckets = pieces, buckets
        self._multipliers, self.epsilon = multipliers, epsilon

    def __call__(self, inputs: Inputs) -> Logits:
        indices, ends = self._table_rows(inputs["input_ids"], inputs["attention_mask"].sum(1))
        total = self._sums(indices, ends)
        variance = np.einsum("ij,ij->i", total, total) * self._mean[0] - (total @ self._mean) ** 2
        hidden = total @ self.hidden
        hidden /= np.sqrt(variance + self.epsilon)[:, None]
        hidden += self.hidden_bias
        np.maximum(hidden, 0, out=hidden)
        logits: Logits = hidden @ self.output
        logits += self.output_bias
        return logits

    def _table_rows(self, ids: Array, lengths: Array) -> tuple[Array, Array]:
        """Return the table rows of all pieces and n-grams, and the end offset of each text.

        Args:
            ids: int64 (batch, length), padded on the right.
            lengths: int64 (batch,), number of pieces in each text.
        """
        if len(ids) == 1:  # the common case needs no masks
            flat = np.concatenate(self.ngram_rows(ids[0, : lengths[0]]))
            return flat, np.asarray([len(flat)])
        real = np.arange(ids.shape[1]) < lengths[:, None]
        rows = self.ngram_rows(ids)
        kept = np.concatenate([real[:, size:] for size in range(len(rows))], axis=1)
        return np.concatenate(rows, axis=1)[kept], kept.sum(1).cumsum()

    def ngram_rows(self, ids: Array) -> list[Array]:
        """Return the table rows of the pieces, then of all pairs of neighbors, and so on.

        Args:
            ids: int64 (..., length).

        Returns:
            One array per n-gram size, int64 (..., length - size + 1).
        """
        rows, code = [ids], ids * self._multipliers[0]
        for size, multiplier in enumerate(self._multipliers[1:], start=2):
            if ids.shape[-1] < size:
                break
            code = code[..., :-1] + ids[..., size - 1 :] * multiplier
            rows.append(code % self._buckets + self._pieces)
        return rows

    def _sums(self, indices: Array, ends: Array) -> Array:
        """Sum of the embeddings of each text, float32 (batch, width)."""
        table, ones = self.embeddings, np.ones(len(indices), dtype=np.float32)
        total: Array = np.empty((len(ends), table.shape[1]), dtype=np.float32)
        start = 0
        for row, end in zip(total, ends.tolist(), strict=True):
            np.dot(ones[start:end], table.take(indices[start:end], axis=0), out=row)
            start = end
        return total
