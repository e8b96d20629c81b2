"""The words of a text that a model read, as spans of the original text and as token positions."""

from __future__ import annotations

import unicodedata
from typing import NamedTuple

from mlflow_pt_deploy.preprocessing.text import LocatedText


class Word(NamedTuple):
    """A part of a text.

    Attributes:
        start, end: Characters in the original text, from `start` to before `end`.
        pieces: Positions of its tokens.
    """

    start: int
    end: int
    pieces: tuple[int, ...]


def words_of(text: str, located: LocatedText) -> list[Word]:
    """The words that the model read, in order.

    A word is what the tokenizer splits text into before it looks for pieces. Tokens that share a
    character belong together. Characters of East Asian scripts, which are written without spaces,
    are words of their own where the tokenizer has pieces for them. Special tokens and blanks belong
    to no word.
    """
    words: list[Word] = []
    number_before: int | None = None
    for at, (span, number) in enumerate(zip(located.spans, located.numbers, strict=True)):
        if span is None:
            continue
        start, end = _glyphs(text, *span)
        if start >= end:
            continue
        last = words[-1] if words else None
        if last and _belongs_to(text, last, start, number == number_before):
            words[-1] = Word(last.start, max(last.end, end), (*last.pieces, at))
        else:
            words.append(Word(start, end, (at,)))
        number_before = number
    return words


def _glyphs(text: str, start: int, end: int) -> tuple[int, int]:
    """A span without blanks at its ends, and with the accents that follow its last letter."""
    while start < end and text[start].isspace():
        start += 1
    while end > start and text[end - 1].isspace():
        end -= 1
    while start < end < len(text) and unicodedata.combining(text[end]):
        end += 1
    return start, end


def _belongs_to(text: str, word: Word, start: int, same_number: bool) -> bool:
    if start < word.end:
        return True
    between = text[word.end : start]
    neighbors = text[word.end - 1], text[start]
    wide = any(unicodedata.east_asian_width(each) in "WF" for each in neighbors)
    return same_number and not wide and not any(map(str.isspace, between))
