"""Text preprocessing with a small vocabulary of six words."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import BertProcessing

from mlflow_pt_deploy.errors import ArtifactError, ModelError
from mlflow_pt_deploy.models import load_classifier
from mlflow_pt_deploy.preprocessing import TextPreprocessor

PAD, UNKNOWN, BEGIN, END, RED, GREEN = range(6)


@pytest.fixture
def tokenizer() -> Tokenizer:
    words = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "red", "green")
    tokenizer = Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = BertProcessing(("[SEP]", END), ("[CLS]", BEGIN))
    return tokenizer


@pytest.fixture
def preprocessor(tokenizer: Tokenizer) -> TextPreprocessor:
    return TextPreprocessor(tokenizer, max_length=5, pad_id=PAD)


@pytest.mark.parametrize(
    ("row", "ids"),
    [
        ("", [BEGIN, END]),
        ("red", [BEGIN, RED, END]),
        ("green  red\n", [BEGIN, GREEN, RED, END]),
        ("green violet", [BEGIN, GREEN, UNKNOWN, END]),
        ("red green red green", [BEGIN, RED, GREEN, RED, END]),  # 5 with the special tokens
        ("red " * 100_000, [BEGIN, RED, RED, RED, END]),
        ("red \ud800", [BEGIN, RED, UNKNOWN, END]),  # a lone surrogate, as JSON allows
        ("\udfff", [BEGIN, UNKNOWN, END]),
        ("😀", [BEGIN, UNKNOWN, END]),
    ],
)
def test_encode(preprocessor: TextPreprocessor, row: str, ids: list[int]) -> None:
    assert preprocessor.encode([row]) == [ids]


def test_collate_pads_to_the_longest_row(preprocessor: TextPreprocessor) -> None:
    inputs = preprocessor.collate([[BEGIN, END], [BEGIN, RED, GREEN, END], [BEGIN, RED, END]])
    assert list(inputs) == ["input_ids", "attention_mask"]
    assert inputs["input_ids"].tolist() == [[2, 3, 0, 0], [2, 4, 5, 3], [2, 4, 3, 0]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 0]]
    assert {array.dtype for array in inputs.values()} == {np.dtype(np.int64)}


def test_padding_id_of_the_model(tokenizer: Tokenizer) -> None:
    preprocessor = TextPreprocessor(tokenizer, max_length=5, pad_id=7)
    assert preprocessor.collate([[2, 4, 3], [2, 3]])["input_ids"].tolist() == [[2, 4, 3], [2, 3, 7]]


def test_padding_of_the_tokenizer_is_disabled(tokenizer: Tokenizer) -> None:
    tokenizer.enable_padding(length=12)
    preprocessor = TextPreprocessor(tokenizer, max_length=5, pad_id=PAD)
    assert preprocessor.encode(["red"]) == [[BEGIN, RED, END]]


def test_call_encodes_and_collates(preprocessor: TextPreprocessor) -> None:
    inputs = preprocessor(["red", "green red"])
    assert inputs["input_ids"].tolist() == [[2, 4, 3, 0], [2, 5, 4, 3]]


def test_save_and_load(preprocessor: TextPreprocessor, tmp_path: Path) -> None:
    preprocessor.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(TextPreprocessor.files)
    loaded = TextPreprocessor.load(tmp_path)
    assert (loaded.max_length, loaded.pad_id) == (5, PAD)
    rows = ["", "red", "green violet red red red"]
    assert loaded.encode(rows) == preprocessor.encode(rows)
    again = tmp_path / "again"
    again.mkdir()
    loaded.save(again)
    for name in TextPreprocessor.files:
        assert (again / name).read_bytes() == (tmp_path / name).read_bytes()


@pytest.mark.parametrize("name", TextPreprocessor.files)
@pytest.mark.parametrize("content", [None, b"", b"{}", b"\xff"])
def test_invalid_file(
    preprocessor: TextPreprocessor, tmp_path: Path, name: str, content: bytes | None
) -> None:
    folder = tmp_path / "a-variant"
    folder.mkdir()
    preprocessor.save(folder)
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(ArtifactError, match="^a-variant: the preprocessor cannot be read: "):
        TextPreprocessor.load(folder)


def test_maximum_length_of_tokenizer_and_model(tiny_model: Path) -> None:
    tokenizer = load_classifier(str(tiny_model)).tokenizer
    assert TextPreprocessor.from_transformers(tokenizer, 512).max_length == 128
    shorter = TextPreprocessor.from_transformers(tokenizer, 64)
    assert shorter.max_length == 64
    assert len(shorter.encode(["card " * 500])[0]) == 64
    assert (
        len(tokenizer("card " * 500, truncation=False)["input_ids"]) == 502
    )  # the tokenizer is not changed


def test_ids_equal_those_of_transformers(tiny_model: Path) -> None:
    classifier = load_classifier(str(tiny_model))
    rows = ["Where is my CARD?", "שלום", "", "zebra-crossing 😀"]
    inputs = classifier.preprocessor(rows)
    expected = classifier.tokenizer(rows, padding=True)
    assert inputs["input_ids"].tolist() == expected["input_ids"]
    assert inputs["attention_mask"].tolist() == expected["attention_mask"]


def test_slow_tokenizer() -> None:
    class Slow:
        name_or_path = "old/model"
        backend_tokenizer = None

    with pytest.raises(ModelError, match=r"old/model has no fast tokenizer \(tokenizer.json\)"):
        TextPreprocessor.from_transformers(Slow(), 512)


def test_settings_are_plain_json(preprocessor: TextPreprocessor, tmp_path: Path) -> None:
    preprocessor.save(tmp_path)
    settings = json.loads((tmp_path / "preprocessor.json").read_text(encoding="utf8"))
    assert settings == {
        "kind": "text",
        "max_length": 5,
        "pad_id": 0,
        "truncation_side": "right",
        "padding_side": "right",
    }
