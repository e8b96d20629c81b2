"""Tokenization of texts with the `tokenizers` library."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from mlflow_pt_deploy.errors import ArtifactError, ModelError
from mlflow_pt_deploy.preprocessing.base import BATCH, Axis
from mlflow_pt_deploy.preprocessing.wordpiece_cache import WordPieceCache

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_SETTINGS = "preprocessor.json"
_TOKENIZER = "tokenizer.json"
_MIN_LENGTH = 2  # tokens; exported graphs do not support shorter batches


class LocatedText(NamedTuple):
    """A text as token ids, and where each of them comes from.

    Attributes:
        ids: As from `TextPreprocessor.encode`.
        spans: First character of each token in the text, and the one after its last; None for
            tokens that the tokenizer adds.
        numbers: Number of the word that each token is a piece of, as the tokenizer splits words.
        truncated: Whether the text is longer than what the ids hold.
    """

    ids: list[int]
    spans: list[tuple[int, int] | None]
    numbers: list[int | None]
    truncated: bool


class TextPreprocessor:
    """Converts texts to token ids.

    `collate` pads to the longest row of the batch.

    Args:
        tokenizer: A `tokenizers.Tokenizer`; its padding is disabled and its truncation is set.
        max_length: Maximum sequence length in tokens, including special tokens.
        pad_id: Token id for padding.
        truncation_side: Side at which long rows are truncated, ``right`` or ``left``.
        padding_side: Side at which short rows are padded, ``right`` or ``left``.

    Attributes:
        unknown_id: Token id of what the vocabulary lacks; None if the tokenizer has none.
    """

    column = "text"
    files: tuple[str, ...] = (_SETTINGS, _TOKENIZER)
    slice_rows = 8192

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        max_length: int,
        pad_id: int,
        truncation_side: str = "right",
        padding_side: str = "right",
    ) -> None:
        tokenizer.no_padding()
        tokenizer.enable_truncation(max_length=max_length, direction=truncation_side)
        supported = WordPieceCache.supports(tokenizer)
        self._cache = WordPieceCache(tokenizer, max_length, truncation_side) if supported else None
        self._tokenizer = tokenizer
        # Unigram names its unknown token nowhere; <unk> is SentencePiece's
        unknown = getattr(tokenizer.model, "unk_token", None) or "<unk>"
        self.unknown_id: int | None = tokenizer.token_to_id(unknown)
        self._empty_ids = tokenizer.encode(" ").ids or [pad_id]
        self.max_length = max_length
        self.pad_id = pad_id
        self.truncation_side = truncation_side
        self.padding_side = padding_side

    @classmethod
    def from_transformers(
        cls, tokenizer: Any, positions: int, pad_id: int | None = None
    ) -> TextPreprocessor:
        """Create a preprocessor from the tokenizer of a Hugging Face model.

        Args:
            tokenizer: A fast transformers tokenizer.
            positions: Maximum sequence length of the model, in tokens.
            pad_id: The model's padding id, for a tokenizer without one.

        Raises:
            ModelError: The tokenizer is not a fast tokenizer.
        """
        from tokenizers import Tokenizer

        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ModelError(
                f"{tokenizer.name_or_path} has no fast tokenizer (tokenizer.json), and "
                f"transformers cannot convert its {type(tokenizer).__name__}. Choose a model with "
                "a fast tokenizer."
            )
        copy = Tokenizer.from_str(backend.to_str())  # the given tokenizer is not changed
        own = tokenizer.pad_token_id
        return cls(
            copy,
            max_length=int(min(tokenizer.model_max_length, positions)),
            pad_id=own if own is not None else pad_id or 0,
            truncation_side=tokenizer.truncation_side,
            padding_side=tokenizer.padding_side,
        )

    @classmethod
    def load(cls, folder: Path) -> TextPreprocessor:
        """Load a preprocessor from the files of `save`.

        Raises:
            ArtifactError: A file is missing or unreadable.
        """
        from tokenizers import Tokenizer

        try:
            settings = json.loads((folder / _SETTINGS).read_text(encoding="utf8"))
            tokenizer = Tokenizer.from_file(str(folder / _TOKENIZER))
            return cls(
                tokenizer,
                max_length=settings["max_length"],
                pad_id=settings["pad_id"],
                truncation_side=settings.get("truncation_side", "right"),
                padding_side=settings.get("padding_side", "right"),
            )
        except Exception as error:  # tokenizers raises bare Exception
            raise ArtifactError(
                f"{folder.name}: the preprocessor cannot be read: {error}"
            ) from error

    def save(self, folder: Path) -> None:
        """Write ``preprocessor.json`` and ``tokenizer.json`` to an existing folder."""
        settings = {
            "kind": "text",
            "max_length": self.max_length,
            "pad_id": self.pad_id,
            "truncation_side": self.truncation_side,
            "padding_side": self.padding_side,
        }
        (folder / _SETTINGS).write_text(json.dumps(settings, indent=1), encoding="utf8")
        self._tokenizer.save(str(folder / _TOKENIZER))

    @property
    def axes(self) -> dict[str, dict[int, Axis]]:
        """``input_ids`` and ``attention_mask``, with dynamic batch and length."""
        dynamic = {0: BATCH, 1: Axis("length", _MIN_LENGTH, self.max_length)}
        return {"input_ids": dynamic, "attention_mask": dynamic}

    def encode(self, rows: Sequence[str]) -> list[list[int]]:
        """Token ids of each row, without padding, at most `max_length` long.

        A text without any token is encoded like a single space.
        """
        found = [self._cache.encode(row) if self._cache else None for row in rows]
        if rest := [index for index, ids in enumerate(found) if ids is None]:
            # Lone surrogates cannot be encoded as UTF-8 and are replaced.
            clean = [rows[index].encode("utf8", "replace").decode("utf8") for index in rest]
            for index, encoding in zip(rest, self._tokenizer.encode_batch_fast(clean), strict=True):
                found[index] = encoding.ids or self._empty_ids
        return cast(list[list[int]], found)

    def locate(self, row: str) -> LocatedText:
        """Encode a row, and find the characters of each token; slower than `encode`."""
        # A lone surrogate becomes one other character, so the positions stay.
        encoding = self._tokenizer.encode(row.encode("utf8", "replace").decode("utf8"))
        ids = encoding.ids or self._empty_ids
        if not encoding.ids:
            return LocatedText(ids, [None] * len(ids), [None] * len(ids), False)
        added = encoding.special_tokens_mask
        spans = [
            None if special else span for span, special in zip(encoding.offsets, added, strict=True)
        ]
        return LocatedText(ids, spans, encoding.word_ids, bool(encoding.overflowing))

    def collate(self, encoded: Sequence[Sequence[int]]) -> dict[str, npt.NDArray[np.int64]]:
        """Pad encoded rows to the longest one.

        Returns:
            ``input_ids`` and ``attention_mask``, int64 (rows, longest).
        """
        longest = max(_MIN_LENGTH, *map(len, encoded))
        ids = np.full((len(encoded), longest), self.pad_id, dtype=np.int64)
        mask = np.zeros((len(encoded), longest), dtype=np.int64)
        left = self.padding_side == "left"
        for row, tokens in enumerate(encoded):
            start = longest - len(tokens) if left else 0
            ids[row, start : start + len(tokens)] = tokens
            mask[row, start : start + len(tokens)] = 1
        return {"input_ids": ids, "attention_mask": mask}

    def join(
        self, batches: Sequence[Mapping[str, npt.NDArray[np.int64]]]
    ) -> dict[str, npt.NDArray[np.int64]]:
        """Combine results of `collate`, padded to the longest row of all.

        Returns:
            See `collate`.
        """
        sizes = [batch["input_ids"].shape for batch in batches]
        shape = sum(rows for rows, _ in sizes), max(length for _, length in sizes)
        joined = {
            "input_ids": np.full(shape, self.pad_id, dtype=np.int64),
            "attention_mask": np.zeros(shape, dtype=np.int64),
        }
        start = 0
        for batch, (rows, length) in zip(batches, sizes, strict=True):
            left = shape[1] - length if self.padding_side == "left" else 0
            for name, array in joined.items():
                array[start : start + rows, left : left + length] = batch[name]
            start += rows
        return joined

    def warmup_rows(self) -> list[list[int]]:
        """Encoded rows of several lengths, to warm up a model."""
        return self.encode([" ".join(["a"] * words) for words in (3, 12, 48)])

    def token_count(self, encoded: Sequence[int]) -> int:
        """Length of an encoded row in tokens."""
        return len(encoded)

    def __call__(self, rows: Sequence[str]) -> dict[str, npt.NDArray[np.int64]]:
        """`encode` and `collate` in one step."""
        return self.collate(self.encode(rows))
