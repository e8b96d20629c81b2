"""How long a text a network can read, asked of the network itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_USUAL = 512  # tokens, where neither the network nor the tokenizer knows a limit
_SANE = 1_000_000  # transformers writes 1e30 for "no limit"
_PROBE = 8  # tokens


def longest_text(network: Any, tokenizer: Any) -> int:
    """The most tokens of a text, special ones included.

    The least of what the config says, of what the tokenizer says, and of the rows that are left in
    the network's table of positions. Some architectures (RoBERTa and its relatives) do not begin
    with the table's first row, so one short text is read to see where they do.
    """
    limits = [getattr(network.config, "max_position_embeddings", None), tokenizer.model_max_length]
    limits += [len(table) - first for first, table in _position_tables(network)]
    known = [int(it) for it in limits if isinstance(it, int | float) and 0 < it < _SANE]
    return min(known, default=_USUAL)


@torch.no_grad()
def _position_tables(network: Any) -> list[tuple[int, torch.Tensor]]:
    """Tables that are looked up by position: the row of the first position, and the table."""
    pieces = network.get_input_embeddings()
    config, count = network.config, len(pieces.weight)
    special = {value for name, value in config.to_dict().items() if name.endswith("_token_id")}
    usual = next(index for index in reversed(range(count)) if index not in special)
    end = getattr(config, "eos_token_id", None)  # BART's classifier looks for it
    end = end if isinstance(end, int) and 0 <= end < count else usual
    ids = torch.tensor([[usual] * (_PROBE - 1) + [end]], device=pieces.weight.device)
    lookups, training = _Lookups(), network.training
    network.eval()
    try:
        with lookups:
            network(input_ids=ids, attention_mask=torch.ones_like(ids))
    finally:
        network.train(training)
    return lookups.by_position


class _Lookups(TorchFunctionMode):
    """Notes the tables in which consecutive rows are looked up for consecutive tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.by_position: list[tuple[int, torch.Tensor]] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is torch.nn.functional.embedding:
            self._note(*args[:2])
        return func(*args, **(kwargs or {}))

    def _note(self, rows: torch.Tensor, table: torch.Tensor) -> None:
        if rows.dim() == 0 or rows.shape[-1] < _PROBE or rows.is_floating_point():
            return
        rows = rows.reshape(-1, rows.shape[-1])[:, :_PROBE]  # some pad to a multiple
        first = int(rows[0, 0])
        if (rows == torch.arange(first, first + _PROBE, device=rows.device)).all():
            self.by_position.append((first, table))
