"""One self-contained HTML page about a choice: for light and dark screens, and for phones."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlflow_pt_deploy.evaluation.result import Result, find_result
from mlflow_pt_deploy.evaluation.slices import Slice
from mlflow_pt_deploy.reporting.remarks import headline, promise_on_test
from mlflow_pt_deploy.reporting.tables import ranked_cells
from mlflow_pt_deploy.selection.choice import Choice
from mlflow_pt_deploy.selection.policy import Policy

__all__ = ["Page", "render"]

_TEMPLATE = Path(__file__).with_name("report.html.j2")


@dataclass(frozen=True)
class Page:
    """What a page shows.

    Attributes:
        title: Heading.
        results: All variants.
        choice: The chosen one, and why.
        policy: Of the choice.
        commands: Lines to copy: how to serve, how to roll back.
        facts: Machine, data, versions.
        image: Plot as PNG; empty: none.
        comparison: Comparison with the earlier champion.
        slices: Accuracy of the chosen variant by class and by length.
        name: Registered model.
        history: Its promotions, newest first: mappings with when, who, action, after, before, why.
        served: Table of what its versions promised and served, with titles; empty: none served.
    """

    title: str
    results: Sequence[Result]
    choice: Choice
    policy: Policy
    commands: Sequence[str]
    facts: Mapping[str, str]
    image: bytes = b""
    comparison: str = ""
    slices: Sequence[Slice] = ()
    name: str = ""
    history: Sequence[Mapping[str, Any]] = field(default=())
    served: Sequence[Sequence[str]] = ()


def render(page: Page) -> str:
    """Return the page as HTML; all values are escaped."""
    from jinja2 import Environment

    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    chosen = find_result(page.results, page.choice.variant)
    warning = headline(page.results, chosen, page.policy)
    kept, promise = promise_on_test(chosen, page.policy) if chosen else (True, "")
    header, rows = ranked_cells(page.results, page.choice)
    considered = [(name, why) for name, why in page.choice.considered if why != "chosen"]
    return environment.from_string(_TEMPLATE.read_text(encoding="utf8")).render(
        title=page.title,
        subtitle=f"policy {page.policy.digest}: {_policy_text(page.policy)}",
        warning=warning,
        reason=page.choice.reason,
        promise=promise if kept else "",
        comparison=page.comparison,
        image=base64.b64encode(page.image).decode() if page.image else "",
        header=header,
        rows=[{"chosen": chosen, "cells": cells} for chosen, cells in rows],
        perturbed=_perturbed(page.results),
        slices=_slices(page.slices),
        rejected=considered,
        name=page.name,
        history=page.history,
        served=page.served,
        commands=page.commands,
        facts=list(page.facts.items()),
    )


def _policy_text(policy: Policy) -> str:
    parts = [f"{key} {value}" for key, value in policy.to_json().items() if value not in ([], "")]
    return ", ".join(parts)


def _perturbed(results: Sequence[Result]) -> list[list[str]]:
    """Agreement by kind of perturbation; empty if it was not measured."""
    kinds = [
        each.dataset
        for result in results
        for each in result.measurements
        if each.name == "agreement_perturbed" and each.dataset
    ]
    kinds = list(dict.fromkeys(kinds))
    if not kinds:
        return []
    lines = [["variant", "all", *kinds]]
    for result in results:
        if not result.reason:
            values = (result.value("agreement_perturbed", kind) for kind in ("", *kinds))
            lines.append([result.variant, *("-" if v is None else f"{v:.3f}" for v in values)])
    return lines


def _slices(slices: Sequence[Slice]) -> list[list[str]]:
    if not slices:
        return []
    header = ["rows", "number", "baseline", "variant", "drop, points"]
    return [
        header,
        *(
            [
                each.name,
                str(each.rows),
                f"{each.baseline:.4f}",
                f"{each.accuracy:.4f}",
                f"{100 * each.drop:+.2f} [{100 * each.low:+.2f}, {100 * each.high:+.2f}]",
            ]
            for each in slices
        ),
    ]
