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
from mlflow_pt_deploy.variants.base import Inputs, Logits, Predict, Variant

if TYPE_CHECKING:
    from mlflow_pt_deploy.models import Classifier

STATIC = "pt_deploy_static"
"""`model_type` of static students in their config.json."""

_FEW_ROWS = 4  # up to here setting up a sparse matrix costs more than it saves
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

        if device != "cpu":
            raise UnsupportedError("the numpy variant runs on the CPU only; use device=cpu.")
        shape = json.loads((folder / _SHAPE).read_text(encoding="utf8"))
        return _Static(load_file(folder / _WEIGHTS), **shape).predict


class _Static:
    """The network of `models.static`, on rows without their padding."""

    def __init__(
        self,
        arrays: dict[str, Array],
        *,
        pieces: int,
        buckets: int,
        multipliers: list[int],
        epsilon: float,
    ) -> None:
        self._arrays = arrays
        self._pieces, self._buckets = pieces, buckets
        self._multipliers, self._epsilon = multipliers, epsilon

    def predict(self, inputs: Inputs) -> Logits:
        features, ends = self._features(inputs["input_ids"], inputs["attention_mask"].sum(1))
        total = self._sums(features, ends)
        total -= total.mean(1, keepdims=True)
        total /= np.sqrt(np.square(total).mean(1, keepdims=True) + self._epsilon)
        hidden = total @ self._arrays["hidden"] + self._arrays["hidden_bias"]
        np.maximum(hidden, 0, out=hidden)
        logits: Logits = hidden @ self._arrays["output"] + self._arrays["output_bias"]
        return logits

    def _features(self, ids: Array, lengths: Array) -> tuple[Array, Array]:
        """Table rows of all pieces and n-grams, row after row, and where each row's end.

        Args:
            ids: int64 (batch, length), padded on the right.
            lengths: int64 (batch,), pieces in each row.
        """
        if len(ids) == 1:  # the common case needs no masks
            ids = ids[:, : lengths[0]]
        length = ids.shape[1]
        found, real = [ids], [np.arange(length) < lengths[:, None]]
        code = ids * self._multipliers[0]
        for size, multiplier in enumerate(self._multipliers[1:], start=2):
            if length < size:
                break
            code = code[:, :-1] + ids[:, size - 1 :] * multiplier
            found.append(code % self._buckets + self._pieces)
            real.append(real[0][:, size - 1 :])
        if len(ids) == 1:
            flat = np.concatenate(found, axis=1)[0]
            return flat, np.asarray([len(flat)])
        kept = np.concatenate(real, axis=1)
        return np.concatenate(found, axis=1)[kept], kept.sum(1).cumsum()

    def _sums(self, features: Array, ends: Array) -> Array:
        """Sum of each row's embeddings, float32 (batch, width)."""
        table = self._arrays["embeddings"]
        if len(ends) <= _FEW_ROWS:
            starts = [0, *ends[:-1].tolist()]
            parts = zip(starts, ends.tolist(), strict=True)
            return np.stack([table[features[start:end]].sum(0) for start, end in parts])
        from scipy.sparse import csr_array  # type: ignore[import-untyped]

        # A sparse matrix of ones adds rows up without copying them first: ten times as fast.
        ones = np.ones(len(features), dtype=np.float32)
        chosen = csr_array((ones, features, np.append(0, ends)), shape=(len(ends), len(table)))
        total: Array = chosen @ table
        return total
