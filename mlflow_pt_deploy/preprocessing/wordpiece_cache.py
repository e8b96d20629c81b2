"""Cache of WordPiece tokens per word, for fast tokenization of plain text.

A tokenizer spends most of its time on words that it has tokenized before. For BERT's WordPiece
tokenizer, a regular expression splits plain text into words, and a dictionary returns the token
ids of each word; the tokenizer computes the ids of new words. Rows that are not plain text are
left to the tokenizer. The token ids are identical, which tests verify.
"""

from __future__ import annotations

import re
from itertools import chain
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Printable ASCII and typographic quotes and dashes, which no normalizer changes.
_PLAIN = re.compile(r"[ -~\u2018\u2019\u201c\u201d\u2013\u2014\u2026]*").fullmatch
# BERT's words: runs of letters and digits; every other character is a word.
_WORDS = re.compile(r"[A-Za-z0-9]+|[^A-Za-z0-9 ]").findall
_MAX_WORDS = 100_000  # about 20 MB; the cache is cleared when it is full
_MAX_WORD_LENGTH = 40  # characters; longer words are rare and not cached


class WordPieceCache:
    """Encodes rows of plain text.

    Args:
        tokenizer: A tokenizer that `supports` accepts.
        max_length: Maximum sequence length in tokens, including special tokens.
        side: Truncation side, ``right`` or ``left``.
    """

    def __init__(self, tokenizer: Tokenizer, max_length: int, side: str = "right") -> None:
        self._model = tokenizer.model
        self._lowercase = tokenizer.normalizer.lowercase
        self._first, self._last = _special_ids(tokenizer)
        self._capacity = max_length - len(self._last)
        self._left = side == "left"
        added = tokenizer.get_added_tokens_decoder().values()
        self._added = tuple(token.content.lower() for token in added)
        self._first_characters = tuple({content[0] for content in self._added})
        self._ids: dict[str, tuple[int, ...]] = {}

    @staticmethod
    def supports(tokenizer: Tokenizer) -> bool:
        """Whether a tokenizer is a WordPiece model on BERT's words."""
        from tokenizers.models import WordPiece
        from tokenizers.normalizers import BertNormalizer
        from tokenizers.pre_tokenizers import BertPreTokenizer

        return (
            isinstance(tokenizer.model, WordPiece)
            and isinstance(tokenizer.normalizer, BertNormalizer)
            and isinstance(tokenizer.pre_tokenizer, BertPreTokenizer)
            and all(token.content for token in tokenizer.get_added_tokens_decoder().values())
            and [*chain(*_special_ids(tokenizer))] == tokenizer.encode("").ids
        )

    def encode(self, row: str) -> list[int] | None:
        """Token ids of a row with special tokens; None if the row is not plain text."""
        if not _PLAIN(row):
            return None
        lower = row.lower()
        for character in self._first_characters:
            if character in lower and any(token in lower for token in self._added):
                return None
        cached, ids = self._ids, self._first.copy()
        for word in _WORDS(lower if self._lowercase else row):
            ids += cached.get(word) or self._tokenize(word)
        if self._left:
            surplus = max(0, len(ids) - self._capacity)
            del ids[len(self._first) : len(self._first) + surplus]
        else:
            del ids[self._capacity :]
        ids += self._last
        return ids

    def _tokenize(self, word: str) -> tuple[int, ...]:
        ids = tuple(token.id for token in self._model.tokenize(word))
        if len(word) <= _MAX_WORD_LENGTH:
            if len(self._ids) >= _MAX_WORDS:
                self._ids = {}
            self._ids[word] = ids
        return ids


def _special_ids(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids of the special tokens before and after a row."""
    inner = [token.id for token in tokenizer.model.tokenize("a")]
    whole = tokenizer.encode("a").ids
    for start in range(len(whole) - len(inner) + 1):
        if whole[start : start + len(inner)] == inner:
            return whole[:start], whole[start + len(inner) :]
    return [], []
