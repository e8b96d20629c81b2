"""What the names of a table's columns say of its task.

Data and requests are read with the same eyes, so that what one refuses the other refuses too. Knows
names, no values and no file format.
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
_USUAL = {
    "text": re.compile(f"({_TEXT})s?"),
    "image": re.compile("(file|filename|file_name|img|path|photo|picture|pixel)s?|pixel_values"),
    LABEL: re.compile(
        "(annotation|category|categorie|class|classe|emotion|genre|intent|output|rating|sentiment|"
        "star|tag|target|topic)s?|y"
    ),
}
"""What input columns and labels are called elsewhere."""

# What names a text only where another one stands beside it.
_PART = re.compile(
    "anchor|answers?|choices|claim|completion|context|doc|document|endings|evidence|hypothesis|"
    "options|pair|paragraph|passage|premise|prompt|query|question|reply|response|sentence|"
    "statement"
)
_STEM = re.compile(
    f"{_TEXT}|alternative|candidate|choice|doc|ending|option|passage|{_PICTURE.pattern}"
)
_PLACES = "[0-9]|a|b|c|pair|one|two|first|second|left|right|other"
_NUMBERED = re.compile(rf"(?:(.+?)_?({_PLACES})|(first|second|left|right|other)_(.+))")
_LONGEST = 40  # a request's names may be of any length
_SHORT = re.compile(r"(s|q|sent)_?[12]")
_OTHER_TASKS = {
    "similarity or ranking": ("anchor", "positive", "negative", "similarity", "relevance"),
    "token classification": ("tokens", "words", "ner_tags", "pos_tags", "ner"),
    "object detection": ("objects", "bbox", "bboxes", "boxes"),
    "segmentation": ("mask", "masks", "segmentation", "segmentation_mask"),
    "regression": ("score", "scores", "price", "value"),
    "extractive question answering": ("answer_start", "start_positions", "is_impossible"),
}


def normal(name: str) -> str:
    """A name in one spelling: ``textPair``, ``Text Pair`` and ``text-pair`` as ``text_pair``."""
    parted = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name.strip())
    return re.sub(r"[^a-z0-9]+", "_", parted.lower()).strip("_")


def paired(columns: Iterable[object]) -> tuple[str, list[str]]:
    """Whether a row has several texts or images, as a pair of sentences to compare has.

    Args:
        columns: Names of a table's columns; what is no string is left out.

    Returns:
        ``text`` or ``image``, and the columns that hold them; none where there is one at most.
    """
    found: dict[str, list[str]] = {"text": [], "image": []}
    short_names = (name for name in columns if isinstance(name, str) and len(name) <= _LONGEST)
    names = [(name, normal(name)) for name in short_names]
    known = {plain for _, plain in names}
    for name, plain in names:
        short = _SHORT.fullmatch(plain) and f"{plain[:-1]}3" not in known
        if plain in INPUTS or _PART.fullmatch(plain) or short or _is_numbered(plain):
            found["image" if _PICTURE.search(plain) else "text"].append(name)
    kind = max(found, key=lambda kind: len(found[kind]))
    return kind, found[kind] if len(found[kind]) > 1 else []


def _is_numbered(name: str) -> bool:
    """Whether a name is one of several of its kind, as ``sentence2`` is."""
    match = _NUMBERED.fullmatch(name)
    stem = (match[1] or match[4] or "") if match else ""
    return _STEM.fullmatch(stem) is not None


def other_task(columns: Iterable[str]) -> str:
    """The task of a table that has no column of inputs or labels; empty: names do not tell."""
    known = {normal(name) for name in columns}
    return next(
        (task for task, names in _OTHER_TASKS.items() if not known.isdisjoint(names)),
        "",
    )


def renames(columns: Sequence[str], missing: Sequence[str]) -> list[str]:
    """For missing columns the ones that seem to be meant: ``rename `Intent` to `label```.

    Args:
        columns: The names that a table has.
        missing: Some of ``text``, ``image`` and ``label``.
    """
    said = []
    for wanted in missing:
        others = [name for name in columns if name not in (*INPUTS, LABEL)]
        meant = [name for name in others if normal(name).rstrip("s") == wanted]
        meant = meant or [name for name in others if _USUAL[wanted].fullmatch(normal(name))]
        if meant:
            choices = " or ".join(f"`{name}`" for name in meant[:4])
            said.append(f"rename {choices} to `{wanted}`")
    return said
