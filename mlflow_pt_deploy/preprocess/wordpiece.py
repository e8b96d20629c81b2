"""A word's pieces, remembered: BERT's tokenizer for plain text at a fraction of its cost.

A tokenizer spends most of its time on words that it has met before. Where it is a WordPiece over
BERT's words, one regular expression cuts a row of plain text into words, and each word's ids
come from a dictionary, which the real tokenizer fills when it meets a new one. All other rows are
the real tokenizer's. The ids are the same; tests compare them.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Printable ASCII and the signs that editors put in its place; no normalizer changes those.
_PLAIN = re.compile(r"[ -~\u2018\u2019\u201c\u201d\u2013\u2014\u2026]*").fullmatch
# BERT's words therein: runs of letters and digits; every other sign is one by itself.
_WORDS = re.compile(r"[A-Za-z0-9]+|[^A-Za-z0-9 ]").findall
_MOST_WORDS = 100_000  # some 20 MB; then they are learned anew
_LONGEST_WORD = 40  # longer ones are no words, and would fill the memory


class WordMemory:
    """Encodes rows of plain text.

    Args:
        tokenizer: One that `suits`.
        max_length: Longest sequence in tokens, special tokens included.
        side: Where a long row is cut, ``right`` or ``left``.
    """

    def __init__(self, tokenizer: Tokenizer, max_length: int, side: str = "right") -> None:
        self._model = tokenizer.model
        self._lowercase = tokenizer.normalizer.lowercase
        self._first, self._last = _around(tokenizer)
        self._room = max_length - len(self._last)
        self._left = side == "left"
        added = tokenizer.get_added_tokens_decoder().values()
        self._added = tuple(token.content.lower() for token in added)
        self._signs = tuple({content[0] for content in self._added})
        self._known: dict[str, tuple[int, ...]] = {}

    @staticmethod
    def suits(tokenizer: Tokenizer) -> bool:
        """Whether it cuts words as BERT does, and into WordPieces."""
        from tokenizers.models import WordPiece
        from tokenizers.normalizers import BertNormalizer
        from tokenizers.pre_tokenizers import BertPreTokenizer

        return (
            isinstance(tokenizer.model, WordPiece)
            and isinstance(tokenizer.normalizer, BertNormalizer)
            and isinstance(tokenizer.pre_tokenizer, BertPreTokenizer)
            and all(token.content for token in tokenizer.get_added_tokens_decoder().values())
            and [*_around(tokenizer)[0], *_around(tokenizer)[1]] == tokenizer.encode("").ids
        )

    def encode(self, row: str) -> list[int] | None:
        """Token ids of a row, special tokens included; None if the row is not plain text."""
        if not _PLAIN(row):
            return None
        lower = row.lower()
        for sign in self._signs:
            if sign in lower and any(token in lower for token in self._added):
                return None
        known, ids = self._known, self._first.copy()
        for word in _WORDS(lower if self._lowercase else row):
            ids += known.get(word) or self._learn(word)
        if self._left:
            del ids[len(self._first) : len(ids) - self._room + len(self._first)]
        else:
            del ids[self._room :]
        ids += self._last
        return ids

    def _learn(self, word: str) -> tuple[int, ...]:
        pieces = tuple(token.id for token in self._model.tokenize(word))
        if len(word) <= _LONGEST_WORD:
            if len(self._known) >= _MOST_WORDS:
                self._known = {}
            self._known[word] = pieces
        return pieces


def _around(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids that the tokenizer puts before and after a row."""
    inner = [token.id for token in tokenizer.model.tokenize("a")]
    whole = tokenizer.encode("a").ids
    for start in range(len(whole) - len(inner) + 1):
        if whole[start : start + len(inner)] == inner:
            return whole[:start], whole[start + len(inner) :]
    return [], []
