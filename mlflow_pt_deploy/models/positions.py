"""Determine the maximum sequence length of a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_DEFAULT = 512  # tokens, if neither the network nor the tokenizer has a limit
_MAX_LIMIT = 1_000_000  # transformers uses 1e30 for "no limit"
_PROBE = 8  # tokens


def longest_text(network: Any, tokenizer: Any) -> int:
    """Maximum number of tokens of a text, including special tokens.

    The minimum of the limits of the config, the tokenizer and the position embeddings. Some
    architectures (e.g. RoBERTa) do not start at the first position embedding, so a short text is
    run through the network to find the first position.
    """
    limits = [getattr(network.config, "max_position_embeddings", None), tokenizer.model_max_length]
    limits += [len(table) - first for first, table in _position_tables(network)]
    valid = [int(n) for n in limits if isinstance(n, int | float) and 0 < n < _MAX_LIMIT]
    return min(valid, default=_DEFAULT)


@torch.no_grad()
def _position_tables(network: Any) -> list[tuple[int, torch.Tensor]]:
    """Embedding tables indexed by position: the row of the first position, and the table."""
    pieces = network.get_input_embeddings()
    config, count = network.config, len(pieces.weight)
    special = {value for name, value in config.to_dict().items() if name.endswith("_token_id")}
    regular = next(index for index in reversed(range(count)) if index not in special)
    end = getattr(config, "eos_token_id", None)  # BART's classifier needs it
    end = end if isinstance(end, int) and 0 <= end < count else regular
    ids = torch.tensor([[regular] * (_PROBE - 1) + [end]], device=pieces.weight.device)
    lookups, training = _Lookups(), network.training
    network.eval()
    try:
        with lookups:
            network(input_ids=ids, attention_mask=torch.ones_like(ids))
    finally:
        network.train(training)
    return lookups.by_position


class _Lookups(TorchFunctionMode):
    """Records embedding tables whose rows are looked up consecutively."""

    def __init__(self) -> None:
        super().__init__()
        self.by_position: list[tuple[int, torch.Tensor]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.nn.functional.embedding:
            self._record(*args[:2])
        return func(*args, **(kwargs or {}))

    def _record(self, rows: torch.Tensor, table: torch.Tensor) -> None:
        if rows.dim() == 0 or rows.shape[-1] < _PROBE or rows.is_floating_point():
            return
        rows = rows.reshape(-1, rows.shape[-1])[:, :_PROBE]  # some networks pad to a multiple
        first = int(rows[0, 0])
        if (rows == torch.arange(first, first + _PROBE, device=rows.device)).all():
            self.by_position.append((first, table))
