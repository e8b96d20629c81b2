"""Perturbed rows: small changes by which a model is tested beside its own kind of data.

The tests follow CheckList (Ribeiro et al., "Beyond accuracy", ACL 2020) for texts and ImageNet-C
(Hendrycks & Dietterich, ICLR 2019) for images. The true label may change; what is compared is the
label of the teacher with that of a variant.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from mlflow_pt_deploy.data.validation import Row

ROWS_PER_KIND = 64

_KEPT = 0.75  # share of the words or of each side of an image that is kept

_Random = np.random.Generator


def perturb(
    rows: Sequence[Row], *, per_kind: int = ROWS_PER_KIND, seed: int = 0
) -> dict[str, tuple[Row, ...]]:
    """Perturb a sample of rows in each of several ways.

    Args:
        rows: Texts, or the bytes of image files.
        per_kind: Most rows of each kind.
        seed: Random seed; the same rows and seed give the same result.

    Returns:
        Kind to rows: `typos`, `case`, `dropped`, `swapped`, `negated` and `joined` for texts,
        `blur`, `crop` and `light` for images.
    """
    random = np.random.default_rng(seed)
    picked = [rows[i] for i in random.permutation(len(rows))[:per_kind].tolist()]
    kinds: Mapping[str, Callable[[Row, _Random], Row]] = (
        {name: _on_text(change) for name, change in _TEXT_KINDS.items()}
        if picked and isinstance(picked[0], str)
        else {name: _on_image(name) for name in ("blur", "crop", "light")}
    )
    perturbed = {
        name: tuple(change(row, random) for row in picked) for name, change in kinds.items()
    }
    if "typos" in perturbed:
        partners = picked[1:] + picked[:1]
        perturbed["joined"] = tuple(f"{a} {b}" for a, b in zip(picked, partners, strict=True))
    return perturbed


def _on_text(change: Callable[[list[str], _Random], list[str]]) -> Callable[[Row, _Random], Row]:
    def changed(row: Row, random: _Random) -> Row:
        assert isinstance(row, str)
        words = row.split()
        return " ".join(change(words, random)) if words else row

    return changed


def _typos(words: list[str], random: _Random) -> list[str]:
    """Swap two adjacent letters in one word of four, at least in one."""
    count = max(1, len(words) // 4)
    for index in random.permutation(len(words))[:count].tolist():
        word = words[index]
        if len(word) > 1:
            at = int(random.integers(len(word) - 1))
            words[index] = f"{word[:at]}{word[at + 1]}{word[at]}{word[at + 2 :]}"
    return words


def _case(words: list[str], random: _Random) -> list[str]:
    upper = [word.upper() for word in words]
    return upper if upper != words else [word.lower() for word in words]


def _dropped(words: list[str], random: _Random) -> list[str]:
    kept = max(1, round(_KEPT * len(words)))
    return [words[i] for i in sorted(random.permutation(len(words))[:kept].tolist())]


def _swapped(words: list[str], random: _Random) -> list[str]:
    """Exchange two halves: the same words in another order."""
    middle = (len(words) + 1) // 2
    return words[middle:] + words[:middle]


def _negated(words: list[str], random: _Random) -> list[str]:
    at = min(len(words), 1)
    return [*words[:at], "not", *words[at:]]


_TEXT_KINDS: Mapping[str, Callable[[list[str], _Random], list[str]]] = {
    "typos": _typos,
    "case": _case,
    "dropped": _dropped,
    "swapped": _swapped,
    "negated": _negated,
}


def _on_image(kind: str) -> Callable[[Row, _Random], Row]:
    def changed(row: Row, random: _Random) -> Row:
        from PIL import Image, ImageEnhance, ImageFilter

        assert isinstance(row, bytes)
        with Image.open(io.BytesIO(row)) as opened:
            image: Image.Image = opened.convert("RGB")
        if kind == "blur":
            image = image.filter(ImageFilter.GaussianBlur(max(image.size) / 64))
        elif kind == "crop":
            width, height = (max(1, round(_KEPT * side)) for side in image.size)
            left = int(random.integers(image.width - width + 1))
            top = int(random.integers(image.height - height + 1))
            image = image.crop((left, top, left + width, top + height))
        else:
            image = ImageEnhance.Brightness(image).enhance(float(random.choice([0.5, 1.5])))
        target = io.BytesIO()
        image.save(target, "PNG")
        return target.getvalue()

    return changed
