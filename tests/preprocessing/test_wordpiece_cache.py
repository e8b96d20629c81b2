"""The WordPiece cache returns the same ids as the tokenizer."""

from __future__ import annotations

import copy
import random
import string
from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordLevel, WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer, Whitespace
from tokenizers.processors import BertProcessing

from mlflow_pt_deploy.preprocessing import TextPreprocessor
from mlflow_pt_deploy.preprocessing import wordpiece_cache as module
from mlflow_pt_deploy.preprocessing.wordpiece_cache import WordPieceCache

ROWS = (
    "",
    " ",
    "a",
    "Please REFUND me, now!",
    "contactless-card's   pin?",
    "[MASK] is special, [NAME] is not",
    "mask me [mask]",
    "tab\tand\nnewline",
    "naïve café",
    "“It’s – well — fine…” ‘quoted’",
    "日本 😀 refund",
    "\ud800 half a pair",
    "x" * 150,
    "card " * 300,
    "zero\x00control\x07",
    "1234567890 £5 $5 100%",
    "~!@#$%^&*()_+{}|:\"<>?`-=[]\\;',./",
    "no\u00a0break",
    "soft\u00adhyphen",
)


@pytest.fixture
def tokenizer(tiny_model: Path) -> Tokenizer:
    return Tokenizer.from_file(str(tiny_model / "tokenizer.json"))


def _reference(
    tokenizer: Tokenizer, rows: list[str], max_length: int, side: str = "right"
) -> list[list[int]]:
    tokenizer.no_padding()
    tokenizer.enable_truncation(max_length, direction=side)
    clean = [row.encode("utf8", "replace").decode("utf8") for row in rows]
    return [encoding.ids for encoding in tokenizer.encode_batch(clean)]


@pytest.mark.parametrize("max_length", [2, 3, 16, 128])
def test_ids_equal_those_of_the_tokenizer(tokenizer: Tokenizer, max_length: int) -> None:
    preprocessor = TextPreprocessor(tokenizer, max_length=max_length, pad_id=0)
    rows = [*ROWS, *ROWS]  # the second time from the cache
    assert preprocessor.encode(rows) == _reference(tokenizer, rows, max_length)
    for row, ids in zip(ROWS, _reference(tokenizer, list(ROWS), max_length), strict=True):
        assert preprocessor.encode([row]) == [ids]


@pytest.mark.parametrize("side", ["right", "left"])
def test_random_rows(tokenizer: Tokenizer, side: str) -> None:
    draw = random.Random(0)
    plain = string.ascii_letters + string.digits + string.punctuation + "    "
    characters = [*plain, *plain, *plain, "[PAD]", "[UNK]", "é", "\t", *"‘’“”–—…", "card", "refund"]
    rows = ["".join(draw.choices(characters, k=draw.randint(0, 60))) for _ in range(3000)]
    preprocessor = TextPreprocessor(tokenizer, max_length=40, pad_id=0, truncation_side=side)
    assert preprocessor.encode(rows) == _reference(tokenizer, rows, 40, side)


def test_only_plain_text_is_encoded(tokenizer: Tokenizer) -> None:
    cache = WordPieceCache(tokenizer, 128)
    assert cache.encode("refund [NAME]") is not None
    for row in ("[MASK]", "[mask]", "é", "a\tb"):
        assert cache.encode(row) is None


@pytest.mark.parametrize("lowercase", [True, False])
def test_upper_case(lowercase: bool) -> None:
    pieces = ("[UNK]", "[CLS]", "[SEP]", "red", "Red", "##s", "r", "##e", "##d")
    tokenizer = Tokenizer(WordPiece({p: i for i, p in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.post_processor = BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    rows = ["Reds red RED", "reds"]
    expected = _reference(tokenizer, rows, 20)
    assert WordPieceCache.supports(tokenizer)
    assert [WordPieceCache(tokenizer, 20).encode(row) for row in rows] == expected


def test_added_token(tokenizer: Tokenizer) -> None:
    tokenizer.add_tokens([AddedToken("refund now", normalized=True)])
    preprocessor = TextPreprocessor(tokenizer, max_length=20, pad_id=0)
    rows = ["please Refund Now", "refund it now"]
    assert preprocessor.encode(rows) == _reference(tokenizer, rows, 20)


def test_unsupported_tokenizer() -> None:
    tokenizer = Tokenizer(WordLevel({"[UNK]": 0, "a": 1}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    assert not WordPieceCache.supports(tokenizer)


def test_size_of_the_cache_is_bounded(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_MAX_WORDS", 3)
    cache = WordPieceCache(tokenizer, 128)
    rows = ["card", "refund me", "my pin", "x" * 41, "x" * 41]
    assert [cache.encode(row) for row in rows] == _reference(tokenizer, rows, 128)
    assert len(cache._ids) <= 3
    assert "x" * 41 not in cache._ids


def test_copy_of_a_preprocessor(tokenizer: Tokenizer) -> None:
    preprocessor = copy.deepcopy(TextPreprocessor(tokenizer, max_length=20, pad_id=0))
    assert preprocessor.encode(["my card"]) == _reference(tokenizer, ["my card"], 20)
