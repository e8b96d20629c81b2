"""The report page: escaped, complete, self-contained."""

from __future__ import annotations

import re
from dataclasses import replace

from tiny.optimized import BASELINE, VARIANTS, Made, made_result

from mlflow_pt_deploy.evaluation.slices import Slice
from mlflow_pt_deploy.reporting.html import Page, render
from mlflow_pt_deploy.selection.choice import choose
from mlflow_pt_deploy.selection.policy import Policy

RESULTS = [made_result(name, made) for name, made in VARIANTS.items()]


def page(results: list = RESULTS, **more: object) -> str:
    choice = choose(results, Policy())
    made = Page("A & B", results, choice, Policy(), ["pt-deploy serve X"], {"cpu": "<fast>"})
    return render(replace(made, **more))


def test_a_page_shows_choice_table_and_reasons() -> None:
    text = page(
        image=b"png",
        slices=[Slice("class <b>", 40, 0.9, 0.8, 0.1, 0.02, 0.18)],
        name="shop",
        history=[
            {"when": "now", "who": "me", "action": "promote", "after": "2", "before": None}
            | {"why": "faster"}
        ],
        served=[["version", "accuracy"], ["3", "<0.93>"]],
    )
    assert "A &amp; B" in text and "&lt;fast&gt;" in text and "class &lt;b&gt;" in text
    assert "student-openvino-int8 takes 1 ms per row" in text
    assert "the promise is kept" in text
    assert "excluded: validation accuracy 0.8000" in text
    assert "negated" in text and "0.800" in text
    assert "+10.00 [+2.00, +18.00]" in text
    assert "Promised and served by shop" in text and "&lt;0.93&gt;" in text
    assert "faster" in text and "pt-deploy serve X" in text
    assert 'src="data:image/png;base64,cG5n"' in text
    assert not re.findall(r'(?:src|href)="http', text)  # nothing is fetched
    assert text.count('<tr class="chosen">') == 1


def test_a_broken_promise_is_the_first_line() -> None:
    broken = made_result("student-openvino-int8", Made(359, 330, 10.0))
    text = page([RESULTS[0], broken])
    assert text.index("THE PROMISE IS NOT KEPT") < text.index("The choice")


def test_worthless_timings_are_said_first() -> None:
    noisy = made_result(BASELINE, Made(360, 360, 1.6))
    assert "instead of 1x. Do not trust speedups under 1.6x" in page([noisy, RESULTS[1]])


def test_a_run_without_a_choice_has_a_page() -> None:
    choice = choose(RESULTS, Policy(max_artifact_mb=1))
    made = Page("Nothing", RESULTS, choice, Policy(max_artifact_mb=1), [], {})
    assert "None of the 3 measured variants is within the limits" in render(made)
