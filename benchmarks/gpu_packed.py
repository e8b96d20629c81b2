"""BERT without padding: the tokens of all rows in one line, attention within each row.

`torch.nn.attention.varlen.varlen_attn` (PyTorch 2.11 and later) computes attention of rows of
different lengths; everything else in a transformer treats tokens alone. Weights are those of a
transformers network; query, key and value become one product.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from torch.nn import functional

from mlflow_pt_deploy.runtimes.base import Logits
from mlflow_pt_deploy.runtimes.cuda_graphs import CapturedGraph

TOKENS = tuple(sorted({*(16 << i for i in range(12)), *(24 << i for i in range(2, 11))}))
# From 2 on: a compiler makes a special case of one row. Unused rows have no tokens.
ROWS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
LONGEST = (32, 64, 128, 256, 512)

Encoded = Sequence[Sequence[int]]


class PackedBert(nn.Module):
    """A `BertForSequenceClassification` over packed rows.

    Args:
        network: The transformers network; its weights are shared, but for query, key and value.
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.embeddings = network.bert.embeddings
        self.layers = nn.ModuleList(_Layer(layer) for layer in network.bert.encoder.layer)
        self.pooler = network.bert.pooler.dense
        self.classifier = network.classifier

    def forward(
        self, ids: torch.Tensor, places: torch.Tensor, ends: torch.Tensor, longest: int
    ) -> torch.Tensor:
        """Logits of packed rows.

        Args:
            ids: Token ids, int64 (tokens,).
            places: Position of each token in its row, int64 (tokens,).
            ends: Borders of the rows, int32 (rows + 1,).
            longest: Upper bound of the rows' lengths; attention's grid is launched for it.
        """
        table = self.embeddings
        hidden = table.word_embeddings(ids) + table.token_type_embeddings.weight[0]
        hidden = table.LayerNorm(hidden + table.position_embeddings(places))
        for layer in self.layers:
            hidden = layer(hidden, ends, longest)
        first = hidden[ends[:-1].long().clamp(max=len(ids) - 1)]  # an unused row has no token
        logits: torch.Tensor = self.classifier(torch.tanh(self.pooler(first)))
        return logits


class _Layer(nn.Module):
    def __init__(self, layer: Any) -> None:
        super().__init__()
        attention = layer.attention.self
        parts = (attention.query, attention.key, attention.value)
        self.heads = attention.num_attention_heads
        self.qkv = nn.Linear(parts[0].in_features, sum(part.out_features for part in parts))
        self.qkv.weight = nn.Parameter(torch.cat([part.weight.detach() for part in parts]))
        self.qkv.bias = nn.Parameter(torch.cat([part.bias.detach() for part in parts]))
        self.mixed = layer.attention.output.dense
        self.mixed_norm = layer.attention.output.LayerNorm
        self.wide = layer.intermediate.dense
        self.narrow = layer.output.dense
        self.narrow_norm = layer.output.LayerNorm

    def forward(self, hidden: torch.Tensor, ends: torch.Tensor, longest: int) -> torch.Tensor:
        tokens = len(hidden)
        query, key, value = self.qkv(hidden).view(tokens, 3, self.heads, -1).unbind(1)
        context = _attention(query, key, value, ends, longest).reshape(tokens, -1)
        hidden = self.mixed_norm(self.mixed(context) + hidden)
        wide = functional.gelu(self.wide(hidden))
        normed: torch.Tensor = self.narrow_norm(self.narrow(wide) + hidden)
        return normed


def _attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, ends: torch.Tensor, longest: int
) -> torch.Tensor:
    """Attention within rows, (tokens, heads, width); row by row where there is no GPU."""
    if query.is_cuda:
        from torch.nn.attention.varlen import varlen_attn

        found = varlen_attn(query, key, value, ends, ends, longest, longest)
        return cast(torch.Tensor, found)
    mixed = torch.zeros_like(value)
    for start, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
        q, k, v = (part[start:end].transpose(0, 1) for part in (query, key, value))
        mixed[start:end] = functional.scaled_dot_product_attention(q, k, v).transpose(0, 1)
    return mixed


def pack(encoded: Encoded, tokens: int, rows: int) -> dict[str, npt.NDArray[Any]]:
    """Arrays for `PackedBert`: at least `tokens` long, for at least `rows` rows."""
    lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded))
    total = int(lengths.sum())
    ids = np.zeros(max(tokens, total), dtype=np.int64)
    places = np.zeros_like(ids)
    ends = np.full(max(rows, len(encoded)) + 1, total, dtype=np.int32)
    ids[:total] = np.fromiter(chain.from_iterable(encoded), dtype=np.int64, count=total)
    ends[0] = 0
    ends[1 : len(encoded) + 1] = np.cumsum(lengths)
    places[:total] = np.arange(total) - np.repeat(ends[: len(encoded)], lengths)
    return {"ids": ids, "places": places, "ends": ends}


class PackedGraphs:
    """Encoded rows to logits by one graph per bucket of tokens, rows and longest row.

    Args:
        module: A `PackedBert` on `device`, as it is or compiled.
        device: See `CapturedGraph`.
    """

    def __init__(self, module: Callable[..., torch.Tensor], device: str) -> None:
        self._module = module
        self._device = device
        self._captured: dict[tuple[int, int, int], CapturedGraph] = {}
        self._pool = torch.cuda.graph_pool_handle() if device != "cpu" else None

    def __call__(self, encoded: Encoded) -> Logits:
        answers = []
        for start in range(0, len(encoded), ROWS[-1]):
            rows = encoded[start : start + ROWS[-1]]
            answers.append(self.start(rows).logits()[: len(rows)].copy())
        return np.concatenate(answers)

    def start(self, encoded: Encoded) -> CapturedGraph:
        """Start a batch of at most 1024 rows; wait for it before the next one is started."""
        tokens = _least(TOKENS, sum(map(len, encoded)))
        rows = _least(ROWS, len(encoded))
        longest = _least(LONGEST, max(map(len, encoded)))
        arrays = pack(encoded, tokens, rows)
        bucket = self._captured.get((tokens, rows, longest))
        if bucket is None:
            module = partial(self._module, longest=longest)
            bucket = CapturedGraph(module, arrays, self._device, self._pool)
            self._captured[tokens, rows, longest] = bucket
        for name, array in arrays.items():
            bucket.inputs[name][:] = array
        bucket.launch()
        return bucket


def _least(sizes: Sequence[int], wanted: int) -> int:
    """The smallest size that holds `wanted`; `wanted` itself where none does."""
    at = bisect_left(sizes, wanted)
    return sizes[at] if at < len(sizes) else wanted
