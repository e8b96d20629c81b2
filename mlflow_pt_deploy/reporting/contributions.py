"""An explanation for a terminal: the text in colours, and its words with their values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_MOST = 12
_BAR = 24
# backgrounds of the 256-color palette, from weak to strong
_FOR, _AGAINST = (194, 157, 120), (224, 217, 210)


def contributions_text(text: str, prediction: Mapping[str, Any], *, colors: bool = False) -> str:
    """Format an explained prediction.

    Args:
        text: The text that was scored.
        prediction: Its label and score, with the explanation.
        colors: Whether the text is shown too, each word on green where it speaks for the label and
            on red where it speaks against it.
    """
    found = prediction["explanation"]
    ranked = sorted(found["contributions"], key=lambda each: -abs(each["value"]))
    largest = abs(ranked[0]["value"]) if ranked else 0.0
    lines = [f"{prediction['label']} ({prediction['score']:.3f}), by {found['method']}"]
    if colors:
        lines.append(_colored(text, found["contributions"], largest))
    words = [" ".join(text[each["start"] : each["end"]].split()) for each in ranked[:_MOST]]
    width = max(map(len, [*words, "everything else"]))
    for word, each in zip(words, ranked, strict=False):
        bar = "█" * round(_BAR * abs(each["value"]) / largest) if largest else ""
        lines.append(f"{word:{width}}  {each['value']:+9.3f}  {bar}".rstrip())
    rest = found["logit"] - sum(each["value"] for each in ranked[:_MOST])
    lines.append(f"{'everything else':{width}}  {rest:+9.3f}")
    lines.append(f"{'logit':{width}}  {found['logit']:+9.3f}")
    if found["truncated"]:
        lines.append("the model read only a part of this text")
    return "\n".join(lines)


def _colored(text: str, contributions: list[dict[str, Any]], largest: float) -> str:
    shown, at = "", 0
    for each in contributions:
        shades = _FOR if each["value"] > 0 else _AGAINST
        strength = round(len(shades) * abs(each["value"]) / largest) if largest else 0
        word = text[each["start"] : each["end"]]
        color = f"\x1b[30;48;5;{shades[strength - 1]}m{word}\x1b[0m" if strength else word
        shown += text[at : each["start"]] + color
        at = each["end"]
    return shown + text[at:]
