"""Validation of search spaces and outcomes."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mlflow_pt_deploy.errors import SearchError
from mlflow_pt_deploy.search import STATIC, TRANSFORMER, Outcome, Space


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": (4, 2)}, "layers is .4, 2.; give a lower bound"),
        ({"temperature": (0.0, 2.0)}, "temperature is .0.0, 2.0."),
        ({"epochs": (0, 2)}, "at least 1"),
        ({"soft_weight": (0.5, 1.5)}, "soft_weight goes up to 1.5"),
        ({"variants": ()}, "variants is .*at least one"),
        ({"batch_size": (8, 8)}, "batch_size is .*without repetitions"),
    ],
)
def test_invalid_ranges(change: dict[str, tuple[float, float]], message: str) -> None:
    with pytest.raises(SearchError, match=message):
        replace(TRANSFORMER, **change)  # type: ignore[arg-type]  # untyped on purpose


def test_invalid_spaces_and_outcomes() -> None:
    with pytest.raises(SearchError, match="the search space is empty"):
        Space(None, None)
    with pytest.raises(SearchError, match="a transformer has at least 1"):
        Space(transformer=STATIC)
    with pytest.raises(SearchError, match="a static student has none"):
        Space(static=TRANSFORMER)
    with pytest.raises(SearchError, match="accuracy is nan"):
        Outcome(float("nan"), 1.0)
    with pytest.raises(SearchError, match="latency_ms is 0"):
        Outcome(0.5, 0.0)
