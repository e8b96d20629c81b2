"""NumPy alone, for static students: a server that needs neither PyTorch nor another runtime.

A static student is a sum of embeddings and two small matrix products; calling a framework would
cost more than computing it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from mlflow_pt_deploy.errors import UnsupportedError, VariantError
from mlflow_pt_deploy.model_types import STATIC
from mlflow_pt_deploy.runtimes.base import Inputs, Logits, Predict, Variant

if TYPE_CHECKING:
    from mlflow_pt_deploy.models import Classifier


_FEW_ROWS = 12  # up to here setting up a sparse matrix costs more than it saves
_WEIGHTS = "static.safetensors"
_SHAPE = "static.json"

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class NumPy(Variant):
    """Arrays in safetensors; see `models.static` for the network they belong to."""

    runtime: ClassVar[str] = "numpy"

    def export(
        self, module: Classifier, example: Inputs, calibration: Sequence[Inputs], folder: Path
    ) -> None:
        from safetensors.numpy import save_file

        from mlflow_pt_deploy.models.static import PRIMES

        config = module.network.config
        if config.model_type != STATIC:
            raise VariantError("the numpy runtime runs static students only.")
        arrays = {name: tensor.numpy() for name, tensor in module.network.state_dict().items()}
        # The layer norm's scale and shift are folded into the hidden layer behind it.
        hidden = arrays["hidden.weight"] * arrays["norm.weight"]
        tables = {
            # An n-gram's row lies behind all pieces: one table, one gather.
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
        from safetensors.numpy import load_file
        from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]

        if device != "cpu":
            raise UnsupportedError("the numpy variant runs on the CPU only; use device=cpu.")
        # Its products are so small that a second thread gains nothing, and is waited for by the
        # hundredfold where its core has other work. Of the whole process, as PyTorch's threads are.
        threadpool_limits(1, user_api="blas")
        shape = json.loads((folder / _SHAPE).read_text(encoding="utf8"))
        return _Static(load_file(folder / _WEIGHTS), **shape)


class _Static:
    """The network of `models.static`, on rows without their padding.

    Of one row each call into NumPy costs more than what it computes, so there are few of them: the
    layer norm subtracts no mean (the hidden layer's columns have lost theirs instead) and divides
    behind that layer.
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
        self._embeddings = arrays["embeddings"]
        self._hidden = arrays["hidden"] - arrays["hidden"].mean(0)
        self._hidden_bias = arrays["hidden_bias"]
        self._output, self._output_bias = arrays["output"], arrays["output_bias"]
        width = self._embeddings.shape[1]
        self._mean = np.full(width, 1 / width, dtype=np.float32)
        self._pieces, self._buckets = pieces, buckets
        self._multipliers, self._epsilon = multipliers, epsilon

    def __call__(self, inputs: Inputs) -> Logits:
        features, ends = self._features(inputs["input_ids"], inputs["attention_mask"].sum(1))
        total = self._sums(features, ends)
        variance = np.einsum("ij,ij->i", total, total) * self._mean[0] - (total @ self._mean) ** 2
        hidden = total @ self._hidden
        hidden /= np.sqrt(variance + self._epsilon)[:, None]
        hidden += self._hidden_bias
        np.maximum(hidden, 0, out=hidden)
        logits: Logits = hidden @ self._output
        logits += self._output_bias
        return logits

    def _features(self, ids: Array, lengths: Array) -> tuple[Array, Array]:
        """Table rows of all pieces and n-grams, row after row, and where each row's end.

        Args:
            ids: int64 (batch, length), padded on the right.
            lengths: int64 (batch,), pieces in each row.
        """
        if len(ids) == 1:  # the common case needs no masks
            flat = np.concatenate(self._places(ids[0, : lengths[0]]))
            return flat, np.asarray([len(flat)])
        real = np.arange(ids.shape[1]) < lengths[:, None]
        found = self._places(ids)
        kept = np.concatenate([real[:, size:] for size in range(len(found))], axis=1)
        return np.concatenate(found, axis=1)[kept], kept.sum(1).cumsum()

    def _places(self, ids: Array) -> list[Array]:
        """Table rows of the pieces, then of all pairs of neighbours, and so on.

        Args:
            ids: int64 (..., length).

        Returns:
            For n-grams of `size` pieces int64 (..., length - size + 1).
        """
        found, code = [ids], ids * self._multipliers[0]
        for size, multiplier in enumerate(self._multipliers[1:], start=2):
            if ids.shape[-1] < size:
                break
            code = code[..., :-1] + ids[..., size - 1 :] * multiplier
            found.append(code % self._buckets + self._pieces)
        return found

    def _sums(self, features: Array, ends: Array) -> Array:
        """Sum of each row's embeddings, float32 (batch, width)."""
        table, ones = self._embeddings, np.ones(len(features), dtype=np.float32)
        if len(ends) <= _FEW_ROWS:
            total: Array = np.empty((len(ends), table.shape[1]), dtype=np.float32)
            start = 0
            for row, end in zip(total, ends.tolist(), strict=True):
                np.dot(ones[start:end], table.take(features[start:end], axis=0), out=row)
                start = end
            return total
        from scipy.sparse import csr_array  # type: ignore[import-untyped]

        # A sparse matrix of ones adds rows up without copying them first; it would look for the
        # largest of wider indices.
        places = (features.astype(np.int32), np.append(0, ends).astype(np.int32))
        chosen = csr_array((ones, *places), shape=(len(ends), len(table)))
        total = chosen @ table
        return total
