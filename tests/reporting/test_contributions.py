"""Explanations in a terminal."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from tiny.artifact import SAVED

from mlflow_pt_deploy import cli
from mlflow_pt_deploy.reporting.contributions import contributions_text

TEXT = "no red, é so red"


def prediction(*values: float, logit: float = 2.0, truncated: bool = False) -> dict[str, object]:
    spans = [(0, 2), (3, 6), (8, 9), (10, 12), (13, 16)][: len(values)]
    contributions = [
        {"start": start, "end": end, "value": value}
        for (start, end), value in zip(spans, values, strict=True)
    ]
    explanation = {
        "method": "occlusion",
        "logit": logit,
        "truncated": truncated,
        "contributions": contributions,
    }
    return {"label": "red", "score": 0.75, "explanation": explanation}


def test_words_come_by_the_size_of_their_values() -> None:
    lines = contributions_text(TEXT, prediction(-1, 2, 0, 0.25, 1.5)).splitlines()
    assert lines[0] == "red (0.750), by occlusion"
    words = [re.split(r"  +", line)[:2] for line in lines[1:]]
    assert words == [
        ["red", "+2.000"],
        ["red", "+1.500"],
        ["no", "-1.000"],
        ["so", "+0.250"],
        ["é", "+0.000"],
        ["everything else", "-0.750"],
        ["logit", "+2.000"],
    ]
    bars = [line.count("█") for line in lines[1:6]]
    assert bars == [24, 18, 12, 3, 0]


def test_colors_mark_the_words_in_the_text() -> None:
    shown = contributions_text(TEXT, prediction(-2, 2, 0.1), colors=True).splitlines()[1]
    assert re.sub(r"\x1b\[[\d;]*m", "", shown) == TEXT
    assert shown.startswith("\x1b[30;48;5;210mno\x1b[0m \x1b[30;48;5;120mred\x1b[0m, é")


@pytest.mark.parametrize("values", [(), (0.0, 0.0)])
def test_texts_without_words_or_values(values: tuple[float, ...]) -> None:
    text = contributions_text(TEXT, prediction(*values, truncated=True), colors=True)
    assert "█" not in text
    assert text.endswith("the model read only a part of this text")


def test_the_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["explain", str(SAVED), "my card is lost", "--json"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("card (") and lines[0].endswith("by gradient_x_input")
    assert lines[1].split()[0] == "card"
    assert '"stage": "explain"' in lines[-1]
    wrong = ["explain", str(SAVED), "my card", "-C", "explain_method=integrated_gradients"]
    assert cli.main(wrong) == 1
    assert "has no gradients" in capsys.readouterr().err
