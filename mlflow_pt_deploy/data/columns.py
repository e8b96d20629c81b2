"""Infer the task of a table from its column names.

Training data and scoring requests use the same rules, so both reject the same tables.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

INPUTS = ("text", "image")
LABEL = "label"

_TEXT = (
    "abstract|body|comment|content|description|document|email|headline|input|message|news|"
    "paragraph|phrase|post|query|question|review|sentence|sent|sms|statement|string|summary|"
    "text|title|tweet|utterance"
)
_PICTURE = re.compile("image|img|picture|photo")
_ALIASES = {
    "text": re.compile(f"({_TEXT})s?"),
    "image": re.compile("(file|filename|file_name|img|path|photo|picture|pixel)s?|pixel_values"),
    LABEL: re.compile(
        "(annotation|category|categorie|class|classe|emotion|genre|intent|output|rating|sentiment|"
        "star|tag|target|topic)s?|y"
    ),
}
"""Common names of input and label columns in other data sets."""

# Names of text columns that form a pair with another text column.
_PART = re.compile(
    "anchor|answers?|choices|claim|completion|context|doc|document|endings|evidence|hypothesis|"
    "options|pair|paragraph|passage|premise|prompt|query|question|reply|response|sentence|"
    "statement"
)
_STEM = re.compile(
    f"{_TEXT}|alternative|candidate|choice|doc|ending|option|passage|{_PICTURE.pattern}"
)
_SUFFIXES = "[0-9]|a|b|c|pair|one|two|first|second|left|right|other"
_NUMBERED = re.compile(rf"(?:(.+?)_?({_SUFFIXES})|(first|second|left|right|other)_(.+))")
_MAX_LENGTH = 40  # characters; column names of a request have any length
_SHORT = re.compile(r"(s|q|sent)_?[12]")
_OTHER_TASKS = {
    "similarity or ranking": ("anchor", "positive", "negative", "similarity", "relevance"),
    "token classification": ("tokens", "words", "ner_tags", "pos_tags", "ner"),
    "object detection": ("objects", "bbox", "bboxes", "boxes"),
    "segmentation": ("mask", "masks", "segmentation", "segmentation_mask"),
    "regression": ("score", "scores", "price", "value"),
    "extractive question answering": ("answer_start", "start_positions", "is_impossible"),
}


def normalize_name(name: str) -> str:
    """Convert ``textPair``, ``Text Pair`` and ``text-pair`` to ``text_pair``."""
    separated = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.strip())
    return re.sub(r"[^a-z0-9]+", "_", separated.lower()).strip("_")


def find_pair_columns(columns: Iterable[object]) -> tuple[str, list[str]]:
    """Find the columns of a table with several texts or images per row, e.g. sentence pairs.

    Args:
        columns: Column names; values that are not strings are skipped.

    Returns:
        ``text`` or ``image``, and the names of the columns; an empty list if there is at most one.
    """
    found: dict[str, list[str]] = {"text": [], "image": []}
    short_names = (name for name in columns if isinstance(name, str) and len(name) <= _MAX_LENGTH)
    names = [(name, normalize_name(name)) for name in short_names]
    known = {plain for _, plain in names}
    for name, plain in names:
        short = _SHORT.fullmatch(plain) and f"{plain[:-1]}3" not in known
        if plain in INPUTS or _PART.fullmatch(plain) or short or _is_numbered(plain):
            found["image" if _PICTURE.search(plain) else "text"].append(name)
    kind = max(found, key=lambda kind: len(found[kind]))
    return kind, found[kind] if len(found[kind]) > 1 else []


def _is_numbered(name: str) -> bool:
    """Whether a name has a number or position, e.g. ``sentence2``."""
    match = _NUMBERED.fullmatch(name)
    stem = (match[1] or match[4] or "") if match else ""
    return _STEM.fullmatch(stem) is not None


def guess_task(columns: Iterable[str]) -> str:
    """The unsupported task that column names indicate; empty if they indicate none."""
    known = {normalize_name(name) for name in columns}
    return next(
        (task for task, names in _OTHER_TASKS.items() if not known.isdisjoint(names)),
        "",
    )


def suggest_renames(columns: Sequence[str], missing: Sequence[str]) -> list[str]:
    """Suggest columns to rename, e.g. ``rename `Intent` to `label```.

    Args:
        columns: Column names of the table.
        missing: Required columns that are missing: some of ``text``, ``image`` and ``label``.
    """
    suggestions = []
    for wanted in missing:
        others = [name for name in columns if name not in (*INPUTS, LABEL)]
        similar = [name for name in others if normalize_name(name).rstrip("s") == wanted]
        similar = similar or [
            name for name in others if _ALIASES[wanted].fullmatch(normalize_name(name))
        ]
        if similar:
            choices = " or ".join(f"`{name}`" for name in similar[:4])
            suggestions.append(f"rename {choices} to `{wanted}`")
    return suggestions
