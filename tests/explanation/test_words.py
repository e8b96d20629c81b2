"""Words and their characters, with the tokenizers of several architectures."""

from __future__ import annotations

import pytest
from tiny import models as tiny
from tokenizers import Tokenizer
from tokenizers.models import Unigram
from tokenizers.pre_tokenizers import Metaspace

from mlflow_pt_deploy.explanation.words import words_of
from mlflow_pt_deploy.preprocessing import TextPreprocessor

WORDPIECE, BYTES, UNIGRAM = "wordpiece", "bytes", "unigram"


@pytest.fixture(scope="module")
def preprocessors() -> dict[str, TextPreprocessor]:
    pieces = [
        ("<unk>", 0.0),
        ("▁", -2.0),
        ("▁play", -1.0),
        ("song", -1.0),
        ("s", -3.0),
        ("東", -3.0),
    ]
    unigram = Tokenizer(Unigram(pieces, 0, byte_fallback=False))
    unigram.pre_tokenizer = Metaspace()
    return {
        WORDPIECE: TextPreprocessor(tiny.words().backend_tokenizer, max_length=64, pad_id=0),
        BYTES: TextPreprocessor(tiny.pieces().backend_tokenizer, max_length=64, pad_id=1),
        UNIGRAM: TextPreprocessor(unigram, max_length=64, pad_id=0),
    }


def words(preprocessor: TextPreprocessor, text: str) -> list[str]:
    return [text[word.start : word.end] for word in words_of(text, preprocessor.locate(text))]


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        (WORDPIECE, "Play  some JAZZ!", ["Play", "some", "JAZZ", "!"]),
        (WORDPIECE, "naïve CAFÉ", ["naïve", "CAFÉ"]),
        (WORDPIECE, "nai\u0308ve cafe\u0301 x", ["nai\u0308ve", "cafe\u0301", "x"]),
        (WORDPIECE, "😀 play😀", ["😀", "play😀"]),
        (WORDPIECE, "play 東京's", ["play", "東", "京", "'", "s"]),
        (WORDPIECE, "[SEP] play", ["[SEP]", "play"]),
        (WORDPIECE, "\ud800 play", ["\ud800", "play"]),
        (WORDPIECE, "", []),
        (WORDPIECE, " \n\t", []),
        (BYTES, " play  jazz zürich", ["play", "jazz", "zürich"]),
        (BYTES, "jazz 😀😀 for", ["jazz", "😀", "😀", "for"]),
        (BYTES, "東京", ["東", "京"]),
        (UNIGRAM, "play songs", ["play", "songs"]),
        (UNIGRAM, "東play", ["東", "play"]),
        (UNIGRAM, "  ", []),
    ],
)
def test_words_are_spans_of_the_original_text(
    preprocessors: dict[str, TextPreprocessor], kind: str, text: str, expected: list[str]
) -> None:
    assert words(preprocessors[kind], text) == expected
    assert preprocessors[kind].locate(text).ids == preprocessors[kind].encode([text])[0]


def test_each_token_is_of_one_word_or_of_none(preprocessors: dict[str, TextPreprocessor]) -> None:
    for preprocessor in preprocessors.values():
        for text in (*tiny.TEXTS[:5], "añejo 😀x"):
            located = preprocessor.locate(text)
            pieces = [at for word in words_of(text, located) for at in word.pieces]
            assert len(set(pieces)) == len(pieces) <= len(located.ids)
            assert not located.truncated


@pytest.mark.parametrize(("side", "kept"), [("right", ["play", "some"]), ("left", ["jazz", "!"])])
def test_only_what_is_read_has_words(side: str, kept: list[str]) -> None:
    tokenizer = tiny.words().backend_tokenizer
    whole = TextPreprocessor(tokenizer, max_length=64, pad_id=0)
    count = len(whole.encode([" ".join(kept)])[0])
    cut = TextPreprocessor(tokenizer, max_length=count, pad_id=0, truncation_side=side)
    text = "play some more jazz!"
    assert words(cut, text) == kept
    assert cut.locate(text).truncated
    assert cut.locate(text).ids == cut.encode([text])[0]
    assert not cut.locate(" ".join(kept)).truncated


def test_a_text_without_tokens_has_no_words() -> None:
    plain = TextPreprocessor(tiny.plain("<pad>").backend_tokenizer, max_length=8, pad_id=1)
    assert plain.locate("").ids == plain.encode([""])[0]
    assert words(plain, "") == []
