"""BERT without padding: the tokens of all rows in one line, attention within each row.

`torch.nn.attention.varlen.varlen_attn` (PyTorch 2.11 and later) computes attention of rows of
different lengths; everything else in a transformer treats tokens alone. Weights are those of a
transformers network; query, key and value become one product.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional


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
        self.activation = layer.intermediate.intermediate_act_fn
        self.narrow = layer.output.dense
        self.narrow_norm = layer.output.LayerNorm

    def forward(self, hidden: torch.Tensor, ends: torch.Tensor, longest: int) -> torch.Tensor:
        tokens = len(hidden)
        query, key, value = self.qkv(hidden).view(tokens, 3, self.heads, -1).unbind(1)
        context = _attention(query, key, value, ends, longest).reshape(tokens, -1)
        hidden = self.mixed_norm(self.mixed(context) + hidden)
        wide = self.activation(self.wide(hidden))
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
